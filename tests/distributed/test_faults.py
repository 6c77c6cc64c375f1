"""What happens to all when something happens to one of two processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fault_runs
import pytest
import torch
from left_over import left
from together import raised_by

from nbdev_trainer.scale.launch import launch
from nbdev_trainer.store.run import Run


def same(first, second, tolerance=0.0):
    for name in first:
        difference = (first[name] - second[name]).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference}"


def torchrun(*arguments, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               f"--max-restarts={restarts}", "--monitor-interval=0.1", fault_runs.__file__, *map(str, arguments)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCHELASTIC_ERROR_FILE": ""})


@pytest.mark.fault(
    "one of two processes is killed",
    "`kill -9` of rank 1 after a batch, without torchrun",
    "all end, and the error says why",
)
def test_a_rank_that_was_killed_ends_all_and_is_named():
    began = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        launch(fault_runs.on_rank_1, fault_runs.kill)
    assert time.monotonic() - began < 25
    assert str(caught.value).startswith("rank 1 was ended by SIGKILL")
    assert "raised on rank 0" in "\n".join(caught.value.__cause__.__notes__)


@pytest.mark.fault(
    "one of two processes raises",
    "an exception in a callback of rank 1",
    "it is raised where the processes were started, with its traceback",
)
def test_a_rank_that_raises_is_the_one_whose_error_is_shown():
    with pytest.raises(ValueError, match="the label of sample 7 is missing") as caught:
        launch(fault_runs.on_rank_1, fault_runs.fail)
    assert any("raised on rank 1" in note and "in fail" in note for note in caught.value.__notes__)


@pytest.mark.fault(
    "one of two processes hangs",
    "rank 1 sleeps",
    "the other ends at the timeout; the stacks of the one that hangs are printed",
)
def test_a_rank_that_hangs_is_found_and_shows_where(capfd):
    began = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        launch(fault_runs.on_rank_1, fault_runs.hang, 7, "5s")
    assert time.monotonic() - began < 30
    assert "waited for a process that has ended or hangs" in "\n".join(caught.value.__notes__)
    printed = capfd.readouterr().out
    assert "[rank 1] rank 1: no batch for 2 s, in epoch 1 after batch 7" in printed
    assert "in hang" in printed


@pytest.mark.fault(
    "`fit` on rank 0 alone",
    "rank 1 is done without it",
    "the error says that not all ranks made this call",
)
@pytest.mark.parametrize("what", ["fit", "validate", pytest.param("save", marks=pytest.mark.slow)])
def test_what_one_rank_does_alone_says_that_it_is_for_all(what, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        launch(fault_runs.alone_on_rank_0, what, str(tmp_path / "model.safetensors"))
    assert "fit, validate, predict, and save with divided weights, are for all" in "\n".join(caught.value.__notes__)


@pytest.mark.fault(
    "one of two processes asks to stop",
    "`stop` on rank 1 alone",
    "both end after the same batch",
)
def test_a_request_of_one_rank_is_followed_by_all_at_the_same_batch(together):
    _, _, control, samples = together(fault_runs.on_rank_1, fault_runs.ask_to_stop)
    assert control == [{"what": "stop", "why": "seen enough (rank 1)", "epoch": 1, "batch": 8}]
    assert samples == 64


def test_an_epoch_that_one_rank_ends_after_the_last_batch_has_ended_on_all(together):
    found = fault_runs.ends_an_epoch_after_the_last_batch()
    assert found == (2, 0, None, [("end_epoch", 7)])
    two = together(fault_runs.ends_an_epoch_after_the_last_batch)
    assert two == found


@pytest.mark.parametrize("processes", [1, 2])
def test_a_fit_for_a_time_ends(together, processes):
    assert together(fault_runs.for_a_time, processes=processes) > 0


@pytest.mark.fault(
    "a bad batch on one of two processes",
    "a row that is no number, which rank 1 gets",
    "both skip it; weights as in one process that skips it",
)
def test_a_batch_that_one_rank_skips_is_skipped_by_all(together):
    two, alone = together(fault_runs.skip_bad), fault_runs.skip_bad()
    same(alone[0], two[0], 1e-12)
    assert [entry["batch"] for entry in two[2]] == [entry["batch"] for entry in alone[2]] == [4, 9]
    assert two[2][0]["why"].endswith("(rank 1)")
    assert two[3] == alone[3] == 64


@pytest.mark.fault(
    "a loss that is no number on one of two processes",
    "the same row, without `BadBatches`",
    "all end with its error",
)
def test_a_nan_on_one_rank_ends_all_with_its_error():
    with pytest.raises(Exception) as caught:
        launch(fault_runs.nan_on_rank_1)
    assert "loss" in str(caught.value) and "nan" in str(caught.value).lower()


@pytest.mark.fault(
    "processes that measure different things",
    "another metric, another name in `log`",
    "an error that names rank and key",
)
@pytest.mark.parametrize("run", [fault_runs.other_metrics, fault_runs.other_logs])
def test_different_metrics_are_an_error_that_names_rank_and_key(together, run):
    for found in together(raised_by, run):
        assert isinstance(found, ValueError) and "rank 1" in str(found)
        assert "mae" in str(found) or "pressure" in str(found)


@pytest.mark.fault(
    "a parameter without a part in the loss",
    "on both processes, on one, and in a fit of one batch",
    "an error that names rank, parameter and the way out, at that batch",
)
@pytest.mark.parametrize("on", [pytest.param((0, 1), marks=pytest.mark.slow), (1,)])
def test_a_parameter_that_is_not_used_is_named_at_once(on):
    with pytest.raises(RuntimeError, match=r"on rank \d the loss did not depend on extra.weight.*find_unused_parameters"):
        launch(fault_runs.unused_on, on)


@pytest.mark.fault(
    "counts on the device, and nothing for one process",
    "as on a GPU: one process knows its count on the device alone, the other has no sample",
    "both add it up",
)
def test_counts_on_the_device_are_added_up_by_all(together):
    assert together(fault_runs.counts_on_a_device) == (5, 5)


@pytest.mark.fault(
    "processes with different data",
    "a split without a seed",
    "refused before the first batch",
)
def test_data_that_were_split_without_a_seed_are_refused(together):
    for found in together(raised_by, fault_runs.other_data):
        with pytest.raises(ValueError, match="rank 0 and rank 1 would not train the same: .*split without a seed"):
            raise found


@pytest.mark.fault(
    "loaders of other lengths",
    "torch loaders of five and of three batches",
    "every sample is used, nobody waits for ever",
)
def test_foreign_loaders_of_other_lengths_are_used_to_their_ends(capfd):
    assert launch(fault_runs.uneven_foreign)[3] == 2 * (20 + 12)
    assert "each process takes all that its own loader gives (valid)" in capfd.readouterr().out


def test_one_process_writes_and_speaks(tmp_path, capfd):
    files = launch(fault_runs.who_speaks, str(tmp_path / "run"))
    printed = capfd.readouterr().out
    assert printed.count("2 processes share each batch") == 1
    assert "[rank 1]" not in printed
    assert {"checkpoints", "config.json", "history.jsonl"} <= set(files)
    begin, end = Run.open(tmp_path / "run").fits
    assert (begin["event"], begin["processes"], end["event"]) == ("begin", 2, "end")


@pytest.mark.fault(
    "another number of processes",
    "two processes, then one, then two",
    "the weights of one process, to 1e-12",
)
def test_another_number_of_processes_goes_on(together, tmp_path):
    """One epoch with two, one with one, one with two: the weights of three epochs in one process."""
    straight = fault_runs.train()
    run_dir = str(tmp_path / "run")
    together(in_parts, run_dir, 1)
    in_parts(run_dir, 2)
    found = together(in_parts, run_dir, 3)
    same(straight[0], found[0], 1e-12)
    assert found[1] == pytest.approx(straight[1], rel=1e-12)


def in_parts(run_dir, epochs):
    """As many fits of one epoch each; those that are done are passed over."""
    learner = fault_runs.learner_of(run_dir)
    for _ in range(epochs):
        learner.fit(1, resume=True)
    return fault_runs.weights(learner), dict(learner.trainer.state.metrics)


@pytest.fixture(scope="module")
def undisturbed(together, tmp_path_factory):
    """The weights that two processes find to which nothing happens."""
    return together(fault_runs.train, dropout=0.3)[0]


@pytest.mark.fault(
    "one of two processes is killed under torchrun",
    "`kill -9` of rank 1, `--max-restarts 1`",
    "the same bits as undisturbed",
)
def test_a_killed_rank_starts_again_and_ends_as_if_nothing_had_happened(tmp_path, undisturbed):
    done = torchrun(tmp_path / "run", tmp_path / "weights.pt", "kill", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    same(undisturbed, torch.load(tmp_path / "weights.pt", weights_only=True))


@pytest.mark.fault(
    "SIGTERM to one of two processes",
    "to rank 1 under torchrun",
    "both end at the same batch, saved, with 143; resumed with the same bits",
)
def test_a_signal_to_one_rank_ends_both_at_the_same_batch(tmp_path, undisturbed):
    done = torchrun(tmp_path / "run", tmp_path / "weights.pt", "term")
    assert done.returncode != 0 and "143" in done.stderr
    assert Run.open(tmp_path / "run").checkpoints[-1].name.startswith("ba-000008")
    done = torchrun(tmp_path / "run", tmp_path / "weights.pt")
    assert done.returncode == 0, done.stderr
    same(undisturbed, torch.load(tmp_path / "weights.pt", weights_only=True))


def test_torchrun_shows_the_error_of_the_rank_that_failed_first(tmp_path):
    done = torchrun(tmp_path / "run", tmp_path / "weights.pt", "fail")
    assert done.returncode == 1
    summary = done.stderr[done.stderr.index("Root Cause"):]
    assert "rank      : 1" in summary and "the label of sample 7 is missing" in summary


def test_no_process_is_left():
    time.sleep(0.2)
    assert left() == []
    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None)


LEAVES = """
import atexit
from nbdev_trainer.scale.processes import has_group, join
atexit.register(lambda: print(f"still in the group: {has_group()}", flush=True))  # runs after what comes later
processes = join(timeout="30s")
processes.gather(processes.rank)
"""


def test_a_program_leaves_the_group_before_python_ends(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(LEAVES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("still in the group: False") == 2
