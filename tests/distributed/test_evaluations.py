"""Evaluation and reading in two processes, where they could differ from one."""

import evaluations


def test_averaged_norms_are_evaluated_with_the_statistics_of_rank_0(together):
    whole, of_rank_0, again = together(evaluations.averages_of_norms_that_saw_other_samples)
    assert abs(whole - of_rank_0) < 1e-12
    assert whole == again


def test_a_stream_that_was_trained_on_is_predicted_whole(together):
    assert together(evaluations.predicted_of_a_stream) == 21


def test_the_end_of_a_shorter_loader_is_not_given_to_as_batch(together):
    assert together(evaluations.loaders_of_other_lengths_that_yield_dicts) == (3, 20 + 8)
