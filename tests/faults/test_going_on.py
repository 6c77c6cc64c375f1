"""A run that was cut off anywhere goes on in a new process and ends as the undisturbed one, bit for bit."""

import random
import signal
import subprocess
import sys
import time

import fault_program
import pytest
from children import FOLDERS
from children import children as children
from children import nursery as nursery
from fault_program import KillAt, Slow, compare, with_checkpoint

from nbdev_trainer import Run
from nbdev_trainer.store.checkpoints import list_checkpoints, newest_checkpoint

BATCHES = range(18 + 1)


@pytest.fixture(scope="module")
def saved_often(nursery, tmp_path_factory):
    """A run that kept a checkpoint of each batch, for arrays and for items that are read and augmented."""
    folder = tmp_path_factory.mktemp("often")
    for name, workers in (("arrays", None), ("items", 0)):
        assert nursery.run(fault_program.train, folder / name, workers=workers, keep_last=99) == 0
    return folder


@pytest.mark.fault("stopped at any batch", "resumed from the checkpoint of each batch of two epochs, in a new process",
                   "every tensor, the history")  # fmt: skip
@pytest.mark.parametrize("batch", BATCHES)
def test_resuming_at_every_batch_ends_with_the_same_bits(children, saved_often, tmp_path, batch):
    source, workers = saved_often / "items", (0, 2, 1)[batch % 3]
    with_checkpoint(source, tmp_path / "run", f"ba-{batch:06}")
    assert children.run(fault_program.train, tmp_path / "run", workers=workers) == 0
    compare(tmp_path / "run", source)


@pytest.mark.fault("saving itself", "a run that saves at each batch beside one that saves at epochs", "every tensor, the history")
def test_saving_often_changes_nothing(children, saved_often, tmp_path):
    assert children.run(fault_program.train, tmp_path / "run", every="1ep", background=True) == 0
    compare(tmp_path / "run", saved_often / "arrays")


@pytest.mark.fault("SIGKILL at a batch", "the process kills itself after it has saved", "goes on at the next batch")
@pytest.mark.parametrize("batch", [1, 4, 9, 14])
def test_a_run_that_was_killed_goes_on(children, saved_often, tmp_path, batch):
    killed = children.run(fault_program.train, tmp_path / "run", KillAt(batch), workers=0)
    assert killed == -signal.SIGKILL
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["state"]["batch"] == batch
    assert Run.open(tmp_path / "run").ending == "killed, or still running"
    assert children.run(fault_program.train, tmp_path / "run", workers=0) == 0
    compare(tmp_path / "run", saved_often / "items")


@pytest.mark.fault("started twice", "a second process with the same run_dir while the first trains",
                   "refused, the first named; the first ends as if alone")  # fmt: skip
def test_a_second_process_is_refused(children, saved_often, tmp_path):
    run_dir, report = tmp_path / "run", tmp_path / "report"
    first = children.start(fault_program.train, run_dir, Slow(0.5))
    deadline = time.monotonic() + 30
    while not (run_dir / "checkpoints" / "latest").exists():
        assert time.monotonic() < deadline and first.is_alive()
        time.sleep(0.02)
    assert children.run(fault_program.train_and_tell, report, run_dir) == 1
    kind, text, *_ = report.read_text().splitlines()
    assert kind == "BlockingIOError" and f"is being written by process {first.pid}" in text
    first.join(60)
    assert first.exitcode == 0
    compare(run_dir, saved_often / "arrays")


LONG = {"background": True, "epochs": 40, "patience": 40}


def kill_at_random(children, run_dir, times, seed=0):
    """How often the run was killed before it came to its end; it is started anew each time."""
    moments, kills = random.Random(seed), 0
    while kills < times:
        child = children.start(fault_program.train, run_dir, Slow(0.04), **LONG)
        child.join(moments.uniform(0.02, 0.5))
        if not child.is_alive():
            break
        child.kill()
        child.join()
        kills += 1
        checkpoints = run_dir / "checkpoints"
        if checkpoints.is_dir() and list_checkpoints(checkpoints):
            assert newest_checkpoint(checkpoints, strict=True) is not None
    return kills


@pytest.mark.fault("SIGKILL at random moments", "50 kills of one run that saves at each batch, restarted each time",
                   "a sound checkpoint at all times; the end is that of the undisturbed run")  # fmt: skip
def test_fifty_kills_of_one_run(children, tmp_path):
    assert children.run(fault_program.train, tmp_path / "undisturbed", **LONG) == 0
    assert kill_at_random(children, tmp_path / "run", 50) == 50
    assert children.run(fault_program.train, tmp_path / "run", **LONG) == 0
    compare(tmp_path / "run", tmp_path / "undisturbed")


PROGRAM = """
import sys
sys.path[:0] = {folders!r}
import fault_program as f
f.train({run_dir!r}, *([f.KillAt({batch})] if {batch} else []), workers=0)
"""


@pytest.mark.fault("SIGKILL, then another interpreter", "two programs started afresh", "every tensor, the history")
def test_a_fresh_interpreter_goes_on_as_well(saved_often, tmp_path):
    def program(batch):
        text = PROGRAM.format(folders=FOLDERS, run_dir=str(tmp_path / "run"), batch=batch)
        return subprocess.run([sys.executable, "-c", text], timeout=120).returncode

    assert program(7) == -signal.SIGKILL
    assert program(0) == 0
    compare(tmp_path / "run", saved_often / "items")
