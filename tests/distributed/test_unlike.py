"""Processes that do not all do the same are told so by name, or followed; and runs go on with another number of them."""

import pytest
import unlike
from test_ranks_equal_one import assert_close

from nbdev_trainer import Shards


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_run_with_synced_norms_goes_on_with_another_number_of_processes(together, tmp_path, first, then):
    def run(processes, **options):
        return together(unlike.with_norms, **options) if processes == 2 else unlike.with_norms(together=False, **options)

    run(first, run_dir=tmp_path / "run", stop=11)
    assert_close(unlike.with_norms(together=False), run(then, run_dir=tmp_path / "run", resume=True), f"{first} then {then}")


def test_one_sample_for_a_batch_norm_is_told_with_what_helps(together):
    with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
        together(unlike.with_norms, sync_batch_norm=False)
    assert "divided over 2 processes, and this one got 1 sample of it" in "\n".join(caught.value.__notes__)


def test_what_one_process_logs_alone_is_told_by_its_name_and_ranks(together):
    with pytest.raises(ValueError, match="'mine' was logged on rank 1 and not on rank 0. Log"):
        together(unlike.logs_alone, 1)


def test_a_process_without_validation_batches_adds_nothing(together):
    (first, second), of_rank_0 = together(unlike.some_validate, (2, 0))
    assert first == second == pytest.approx({f"valid_{name}": value for name, value in of_rank_0.items()})


def test_validation_data_that_are_empty_on_all_processes_are_the_same_error_on_all(together):
    first, second = together(unlike.nobody_validates)
    assert first == second == "ValueError: the loaders of all processes gave no batch; expected some"


def test_divided_weights_refuse_loaders_of_other_lengths_before_the_fit(together):
    why = "must have as many batches on all processes, because each holds a part of the weights; it has"
    told, _ = together(unlike.some_validate, (2, 0), Shards)
    assert told[0] == told[1] and f"ValueError: the validation data 'valid' {why} 2 on rank 0, 0 on rank 1" in told[0]
    told = together(unlike.trains_on, (3, 2))
    assert told[0] == told[1] and f"ValueError: the training data {why} 3 on rank 0, 2 on rank 1" in told[0]
    assert together(unlike.trains_on, (3, 2), limit_batches=2) == [2, 2]


def test_another_duration_on_each_process_is_told_in_english(together):
    with pytest.raises(ValueError, match="would not train the same: duration on rank 0: '1ep', on rank 1: '2ep'. Build"):
        together(unlike.is_asked_alone)


def test_a_learning_rate_changed_on_one_process_is_told_at_the_end_of_the_epoch(together):
    (first, second), epoch = together(unlike.changes_a_rate_alone, 1)
    assert first == second and epoch == 2
    assert "the processes do not train the same any more: learning rates main on rank 0: [0.1], on rank 1: [0.05]" in first
    (first, _), epoch = together(unlike.changes_a_rate_alone, 0, momentum=0.5)
    assert epoch == 2 and "any more: momentum main on rank 0: [0.5], on rank 1: [0]" in first


@pytest.mark.parametrize("order", [("second", "first"), ("first", None)])
def test_a_step_of_ones_own_that_takes_another_way_on_one_process_is_told_so(together, order):
    first, second = together(unlike.by_hand, order)
    assert first.startswith("RuntimeError: rank 0 optimizes ") and second.startswith("RuntimeError: rank 1 optimizes ")
    assert all("and another process is elsewhere: each must call trainer.optimize" in one for one in (first, second))


def test_a_step_of_ones_own_that_steps_by_itself_is_refused_before_weights_differ(together):
    told = together(unlike.by_hand, alone=True)
    assert all("SGD was stepped with the gradients of rank " in one and "trainer.optimize(loss, name)" in one for one in told)


def test_a_weight_that_is_frozen_on_one_process_is_refused(together):
    first, second = together(unlike.freezes_alone)
    assert first == second and "would not train the same: frozen on rank 0: [], on rank 1: ['bias']. Build" in first


def test_a_metric_that_keeps_a_graph_is_named(together):
    told = together(unlike.measures_with_a_graph)
    assert all("the metric 'highest' keeps a tensor with the graph of its gradient" in one for one in told)


def test_a_slice_of_the_arrays_on_each_process_is_refused_because_it_would_be_divided_again(together):
    first, second = together(unlike.has_a_slice_of_its_own)
    assert "would not train the same: the data 'train' holds other numbers: all processes need the same arrays" in first
    assert "the data 'train' holds other numbers" in second
