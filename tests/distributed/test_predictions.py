"""Several processes predict what one predicts, each its part of it."""

import predictions
import pytest
import torch

from nbdev_trainer.core.nested import tensors
from nbdev_trainer.loop.evaluation import Predictions

BY_MATRICES = ("of_a_linear_model", "of_a_stream", "within_a_fit")  # whose sums depend on how many rows there are


@pytest.fixture(scope="module")
def one():
    torch.set_num_threads(1)
    return predictions.run_all()


@pytest.fixture(scope="module", params=[2, 3])
def several(request, together):
    return together(predictions.run_on_all, processes=request.param)


def assert_same(ours, theirs, exact, path):
    assert type(ours) is type(theirs), path
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), path
        close = torch.equal(ours, theirs) if exact else torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
        assert close, f"{path}: {ours} and {theirs}"
    elif isinstance(ours, (dict, Predictions)):
        ours, theirs = (one if isinstance(one, dict) else vars(one) for one in (ours, theirs))
        assert list(ours) == list(theirs), path
        for name in ours:
            assert_same(ours[name], theirs[name], exact, f"{path} {name}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), path
        for k, pair in enumerate(zip(ours, theirs)):
            assert_same(*pair, exact, f"{path} {k}")
    else:
        assert ours == theirs, path


@pytest.mark.parametrize("name", [one.__name__ for one in predictions.CASES])
def test_each_process_has_the_predictions_of_one(one, several, name):
    for rank, (found, _, _) in enumerate(several):
        assert_same(one[name], found[name], name not in BY_MATRICES, f"rank {rank}")
        assert_same(several[0][0][name], found[name], True, f"rank {rank}")


def test_the_cases_hold_what_they_are_named_for(one):
    assert one["uneven"].ids.tolist() == list(range(13)) and one["uneven"].losses.shape == (13,)
    assert one["of_dicts_without_ids"].ids is None and one["bare_inputs"].targets is None
    assert len({box.shape for box in tensors(one["of_other_sizes"].predictions["found"])}) > 2
    assert len(one["within_a_fit"]) > 2


@pytest.mark.parametrize("name", [one.__name__ for one in predictions.DIVIDED])
def test_divided_weights_predict_as_whole_ones(one, several, name):
    for rank, (_, found, _) in enumerate(several):
        assert_same(one[name], found[name], name not in BY_MATRICES, f"rank {rank}")


def test_each_process_sees_its_part_and_tells_it_at_once(several):
    n = len(several)
    assert [seen for _, _, (seen, _) in several] == {2: [7, 6], 3: [5, 5, 3]}[n]
    assert all(sent == ["gather"] + ["send"] * n for _, _, (_, sent) in several)


def test_an_error_on_one_process_is_told_to_the_other_and_both_go_on(together):
    (first, after), (second, after_it) = together(predictions.an_error_on_one_of_them)
    assert first == ("RuntimeError", "rank 1 could not do its part: OSError: no such picture")
    assert second == ("OSError", "no such picture")
    assert (after, after_it) == (13, 13)


def test_a_stream_that_is_empty_is_an_error_on_both(together):
    first, second = together(predictions.nothing_to_predict)
    assert first == second and "gave no batch for phase 'predict'" in first[1]


def test_outputs_of_another_structure_are_an_error_on_both(together):
    first, second = together(predictions.other_outputs_on_one_of_them)
    assert first == second and first[0] == "ValueError"
    assert "the predictions of batch 0 cannot be joined, rank 0: float32 (4, 3) on cpu; rank 1: dict with 'scores'" in first[1]


def test_all_predict_with_the_norms_of_the_first(together):
    (own, first), (others, second) = together(predictions.norms_that_saw_other_samples)
    assert not torch.allclose(own, others)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, own, rtol=1e-12, atol=1e-12)


def test_what_has_come_back_from_several_processes_predicts_alone(together):
    trainer, answer = together(predictions.a_trainer)
    torch.testing.assert_close(trainer.predict(predictions.data().valid).predictions, answer.predictions)


def test_an_error_where_weights_are_divided_keeps_nobody_waiting(together):
    with pytest.raises(OSError, match="no such picture"):
        together(predictions.an_error_where_weights_are_divided, within=60)


def test_parts_that_are_not_samples_in_a_row_are_predicted_by_each_process(together):
    for found in together(predictions.of_stripes):
        assert found.ids.tolist() == list(range(8)) and found.targets.flatten().tolist() == list(range(8))


def test_sequences_are_padded_by_part_unless_each_process_predicts_all(together):
    for by_part, whole in together(predictions.padded_by_part):
        assert by_part == [2, 2, 4, 4, 2, 2, 4, 4]
        assert whole.shape == (8, 4, 1)


def test_rank_0_may_predict_alone(together):
    first, second = together(predictions.on_rank_0_alone)
    assert len(first) == 9 and second is None


def test_what_is_of_a_batch_and_not_of_its_samples_cannot_be_divided(together):
    for told in together(predictions.of_the_batch):
        assert "'each' has 4 samples, 'scale' has 1" in told
