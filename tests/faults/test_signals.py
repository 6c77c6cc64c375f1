"""Signals end a fit between two batches, in every phase; what was saved goes on to the same end."""

import multiprocessing
import os
import signal
import subprocess
import threading
import time

import fault_program
import pytest
from children import children as children
from children import nursery as nursery
from fault_program import Slow, compare
from torch.utils.data import DataLoader

from nbdev_trainer import Callback, Interruptions, Run
from nbdev_trainer.core import signals
from nbdev_trainer.store.checkpoints import newest_checkpoint
from nbdev_trainer.store.sealed import verify

GRACE = 5  # seconds from the signal to the end


class At(Callback):
    """Sends signals to its own process at an event, once the run has come to a batch."""

    only_watches = True

    def __init__(self, event, batch, *numbers):
        self.event, self.batch, self.numbers = event, batch, list(numbers)

    def send(self, event, trainer):
        if event == self.event and trainer.state.batch >= self.batch:
            while self.numbers:
                self.kill(self.numbers.pop(0))

    def kill(self, number):
        os.kill(os.getpid(), number)

    def before_epoch(self, trainer):
        self.send("before_epoch", trainer)

    def after_backward(self, trainer):
        self.send("after_backward", trainer)

    def after_batch(self, trainer):
        self.send("after_batch", trainer)

    def after_evaluate_batch(self, trainer):
        self.send("after_evaluate_batch", trainer)

    def after_evaluate(self, trainer):
        self.send("after_evaluate", trainer)

    def after_epoch(self, trainer):
        self.send("after_epoch", trainer)


class AtLength(At):
    """As if there were time between one signal and the next, so that they are two requests."""

    def kill(self, number):
        signals.SAME_REQUEST = 0
        super().kill(number)


class ToAll(At):
    """Somebody else signals all processes of the group, as torchrun does with what it has started."""

    def before_fit(self, trainer):
        os.setpgid(0, 0)

    def kill(self, number):
        subprocess.run(["kill", f"-{number}", "--", f"-{os.getpid()}"], check=True, start_new_session=True)
        time.sleep(0.1)  # in which one that has ended is found out


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert nursery.run(fault_program.train, run_dir, every="1ep") == 0
    return run_dir


EVENTS = ["before_epoch", "after_backward", "after_batch", "after_evaluate_batch", "after_evaluate", "after_epoch"]


@pytest.mark.fault("SIGTERM in any phase", "sent at each event, and passed on: in a batch, in an evaluation, between epochs",
                   "saved once, exit code 143, resumed to the same bits")  # fmt: skip
@pytest.mark.parametrize("event", EVENTS)
def test_sigterm_in_any_phase(children, undisturbed, tmp_path, event):
    start = 0 if event.startswith("before") else 6
    at = At(event, start, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP)  # by three ways
    assert children.run(fault_program.train, tmp_path / "run", at, every="1ep", seconds=30) == 143
    run = Run.open(tmp_path / "run")
    assert run.ending == "interrupted: SIGTERM"
    before = newest_checkpoint(tmp_path / "run" / "checkpoints", strict=True)[1]
    assert before["state"]["batch"] == {"before_epoch": 1, "after_backward": 7, "after_batch": 6}.get(event, 9)
    assert children.run(fault_program.train, tmp_path / "run", every="1ep") == 0
    compare(tmp_path / "run", undisturbed)


@pytest.mark.fault("SIGTERM while data is waited for", "a reader that hangs for a minute", "exit code 143 at once, resumed")
def test_sigterm_while_data_is_waited_for(children, tmp_path):
    child = children.start(hanging, tmp_path / "run", tmp_path / "waits")
    wait_for(tmp_path / "waits")
    sent = time.monotonic()
    child.terminate()
    child.join(30)
    assert child.exitcode == 143 and time.monotonic() - sent < GRACE
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["state"]["batch"] == 3


def hanging(run_dir, waits):
    learner = fault_program.learner(run_dir)
    batches, loader = list(learner.loaders.train), learner.loaders

    class Hanging(list):
        def __iter__(self):
            yield from self[:3]
            waits.touch()
            time.sleep(60)

    loader.train = Hanging(batches)
    learner.fit(1)


def wait_for(path, seconds=30):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.fault("a second signal", "SIGTERM twice in a batch, and during the last save", "ends at once; a sound checkpoint")
@pytest.mark.parametrize("event", ["after_backward", "after_batch"])
def test_a_second_signal_ends_at_once(children, undisturbed, tmp_path, event):
    at = AtLength(event, 6, signal.SIGTERM, signal.SIGTERM)
    assert children.run(fault_program.train, tmp_path / "run", at, every="3ba", seconds=30) == 143
    assert newest_checkpoint(tmp_path / "run" / "checkpoints", strict=True)[1]["state"]["batch"] in (3, 6)
    assert children.run(fault_program.train, tmp_path / "run", every="3ba") == 0
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["state"]["batch"] == 18


@pytest.mark.fault("SIGTERM to the workers too", "to the whole group of processes, as torchrun does", "they read on; saved, exit code 143")
@pytest.mark.parametrize("workers", ["ours", "of torch"])
def test_a_signal_to_the_workers_too(children, tmp_path, workers):
    assert children.run(with_workers, tmp_path / "run", workers, seconds=30) == 143
    assert newest_checkpoint(tmp_path / "run" / "checkpoints", strict=True)[1]["state"]["batch"] == 4


def with_workers(run_dir, workers):
    multiprocessing.set_start_method("fork", force=True)  # as in a program; here the server of the tests would start them
    one = fault_program.learner(run_dir, ToAll("after_backward", 3, signal.SIGTERM), every="1ep")
    of_torch = DataLoader(fault_program.dataset(), fault_program.BATCH_SIZE, num_workers=1)
    one.loaders.train = fault_program.loaders(1, "processes").train if workers == "ours" else of_torch
    one.fit(2)


def test_signals_from_outside_at_any_moment(children, undisturbed, tmp_path):
    child = children.start(fault_program.train, tmp_path / "run", Slow(0.05), every="1ep", background=True)
    wait_for(tmp_path / "run" / "checkpoints" / "ba-000000")
    time.sleep(0.3)
    child.terminate()
    child.join(GRACE)
    assert child.exitcode == 143
    for one in Run.open(tmp_path / "run").checkpoints:
        verify(one)
    assert children.run(fault_program.train, tmp_path / "run", every="1ep") == 0
    compare(tmp_path / "run", undisturbed)


def interrupted_like_a_cell(run_dir, event):
    """Ctrl-C in a notebook, and the same cell again: the process lives on, with its handlers as they were."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    learner = fault_program.learner(run_dir, At(event, 6, signal.SIGINT), every="1ep")
    try:
        learner.fit_one_cycle(2, lr=0.01)
    except KeyboardInterrupt:
        assert {name: signal.getsignal(name) for name in before} == before
        assert learner.model.training and learner.trainer.state.ending == "interrupted"
        learner.fit_one_cycle(2, lr=0.01, resume=True)
    else:
        raise AssertionError("the fit was not interrupted")


@pytest.mark.fault("Ctrl-C, and the cell again", "SIGINT in a batch and in an evaluation, then resume=True in the same process",
                   "handlers restored; the same bits")  # fmt: skip
@pytest.mark.parametrize("event", ["after_backward", "after_evaluate_batch"])
def test_ctrl_c_and_the_cell_again(children, undisturbed, tmp_path, event):
    assert children.run(interrupted_like_a_cell, tmp_path / "run", event) == 0
    compare(tmp_path / "run", undisturbed)


def in_a_thread(run_dir):
    one = fault_program.learner(run_dir, every="1ep")
    thread = threading.Thread(target=one.fit_one_cycle, args=[2], kwargs={"lr": 0.01})
    thread.start()
    thread.join()


@pytest.mark.fault("a fit outside of the main thread", "no signal can be noted there", "trains as usual")
def test_a_fit_in_a_thread(children, undisturbed, tmp_path):
    assert children.run(in_a_thread, tmp_path / "run") == 0
    compare(tmp_path / "run", undisturbed)


@pytest.mark.fault("SLURM's warning", "SIGUSR1 under SLURM, with requeue=True and a scontrol of the test", "saved; the job is queued again")
def test_slurm_warns_and_gets_its_job_back(children, tmp_path):
    assert children.run(under_slurm, tmp_path) == 143
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["state"]["batch"] == 7


def under_slurm(folder):
    scontrol = folder / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\n')
    scontrol.chmod(0o755)
    os.environ.update(PATH=f"{folder}:{os.environ['PATH']}", SLURM_JOB_ID="4711")
    callbacks = At("after_backward", 6, signal.SIGUSR1), Interruptions(requeue=True)
    fault_program.train(folder / "run", *callbacks, every="1ep")


@pytest.mark.fault("a signal to a worker", "SIGTERM to a process that reads data", "the worker ends, no checkpoint is written there")
def test_a_worker_that_gets_the_signal_saves_nothing(children, tmp_path):
    assert children.run(signal_to_a_fork, tmp_path / "run") == 0


def signal_to_a_fork(run_dir):
    class Forking(Callback):
        only_watches = True

        def after_backward(self, trainer):
            if trainer.state.batch != 3:
                return
            for number, expected in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 7)):
                child = os.fork()
                if child == 0:
                    os.kill(os.getpid(), number)
                    os._exit(7)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == expected

    one = fault_program.train(run_dir, Forking(), every="1ep")
    assert one.trainer.state.batch == 18


@pytest.mark.fault("the terminal is closed", "SIGHUP in a batch", "as at SIGTERM; what happens is said, and where the state lies")
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_what_a_signal_does_is_said(children, tmp_path):
    assert children.run(hung_up, tmp_path, seconds=30) == 143
    said = (tmp_path / "said").read_text()
    assert "SIGHUP: the batch in hand is finished, then the state is saved." in said
    assert f"saved after batch 7: {tmp_path}/run/checkpoints/ba-000007. The same program goes on" in said
    assert newest_checkpoint(tmp_path / "run" / "checkpoints", strict=True)[1]["state"]["batch"] == 7


def hung_up(folder):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even where the tests run under nohup
    one = fault_program.learner(folder / "run", At("after_backward", 6, signal.SIGHUP), every="1ep")
    one.trainer.shown = True
    file = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    one.fit_one_cycle(2, lr=0.01)
