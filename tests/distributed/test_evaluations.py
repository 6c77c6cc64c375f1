"""Evaluation and reading in two processes, where they could differ from one."""

import evaluations
import torch


def test_averaged_norms_are_evaluated_with_the_statistics_of_rank_0(together):
    whole, of_rank_0, again = together(evaluations.averages_of_norms_that_saw_other_samples)
    assert abs(whole - of_rank_0) < 1e-12
    assert whole == again


def test_a_metric_that_counts_in_itself_is_an_error_on_both(together):
    for error in together(evaluations.counted_by_itself):
        assert isinstance(error, TypeError) and "'right' has counted in 'right', 'count', which is neither" in str(error)


def test_a_metric_may_have_counted_on_one_process_only(together):
    assert together(evaluations.counted_in_the_mean_of_one_process) == 2.0


def test_a_stream_that_was_trained_on_is_predicted_whole(together):
    assert together(evaluations.predicted_of_a_stream) == 21


def test_the_end_of_a_shorter_loader_is_not_given_to_as_batch(together):
    assert together(evaluations.loaders_of_other_lengths_that_yield_dicts) == (3, 20 + 8)


def test_parts_may_be_of_any_length_also_of_another_than_they_say(together):
    found, whole = together(evaluations.parts_of_other_lengths)
    assert [one[:2] for one in found] == [(5, 16), (7, 20)]
    assert abs(found[-1][-1] - whole) < 1e-12


def assert_equal(ours, theirs):
    for name, one in ours.items():
        assert torch.equal(one, theirs[name]), name


def test_each_process_goes_on_in_its_own_data_where_it_was(together):
    for undisturbed, again in together(evaluations.in_the_middle_of_an_epoch):
        assert_equal(undisturbed, again)


def test_lists_of_other_lengths_are_no_reason_not_to_go_on(together, tmp_path):
    assert_equal(*together(evaluations.lists_of_other_lengths, str(tmp_path)))


def test_it_is_told_where_each_process_takes_all(together):
    told = together(evaluations.told_of_the_data)
    assert told["all"].startswith("all processes were given the same first batch")
    assert told["all of a data set"].startswith("each process takes all that its own loader gives (train)")
    assert told["part"] == told["batches of a part"] == ""


def test_a_stream_that_divides_itself_is_an_error_on_both(together):
    for told, trained, predicted in together(evaluations.stream_that_divides_itself):
        assert all("rank 0 and rank 1 read other items from a stream" in one for one in told)
        assert (trained, predicted) == (0, 21)
