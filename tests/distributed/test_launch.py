"""`launch` from executed notebooks: again and again, after errors and interrupts, and nothing is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import launched
import pytest
from execnb.shell import CaptureShell
from left_over import left

from nbdev_trainer.scale.launch import launch
from nbdev_trainer.store.run import Run

CELL = """
from nbdev_trainer.scale.launch import launch
from nbdev_trainer.scale.processes import join
scale = 3

def add(number, fails=False, waits=0):
    import time, torch
    processes = join(timeout="20s")
    if fails and processes.rank == 1: raise ValueError("no label")
    time.sleep(waits)
    value = torch.tensor([float(processes.rank + number * scale)])
    processes.sum(value).wait()
    return value.item()
"""


@pytest.fixture
def notebook():
    shell = CaptureShell()
    shell.run_cell(CELL)
    yield shell
    shell.close()
    shell.loop.close()


def value(shell, code):
    shell.run_cell(f"found = {code}")
    return shell.user_ns["found"]


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_function_of_a_cell_works_every_time_also_after_errors(notebook, times):
    for k in range(times):
        if k % 7 == 1:
            notebook.run_cell("try: launch(add, 1, True)\nexcept ValueError as error: seen = str(error)")
            assert notebook.user_ns.pop("seen") == "no label"
        assert value(notebook, f"launch(add, {k})") == 6 * k + 1
    assert left() == []


def test_an_interrupt_leaves_no_process_and_the_next_call_works(notebook):
    timer = threading.Timer(4, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    notebook.run_cell("seen = None\ntry: launch(add, 1, False, 60)\nexcept KeyboardInterrupt: seen = 'interrupted'")
    assert notebook.user_ns["seen"] == "interrupted" and time.monotonic() - began < 20
    assert left() == []
    assert value(notebook, "launch(add, 2)") == 13


def test_the_processes_end_when_whoever_started_them_is_killed(tmp_path):
    program = f"{CELL}\nlaunch(add, 1, False, 60)"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    places = {"PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, **places})
    end = time.monotonic() + 20
    while len(left()) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    while left():
        assert time.monotonic() < end + 10, "they live on"
        time.sleep(0.1)
    assert not list(tmp_path.glob("launch-*"))  # nor does what was sent


def is_running(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_loader_with_workers_gives_its_batches():
    """The worker is forked from a process in which a thread listens."""
    assert launch(launched.batches_of_a_worker, processes=1) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_nobody_waits_for_a_program_that_the_function_has_left_running(tmp_path):
    began = time.monotonic()
    assert launch(launched.start_a_program, str(tmp_path / "number")) == "returned"
    assert time.monotonic() - began < 25
    os.kill(int((tmp_path / "number").read_text()), signal.SIGKILL)


def test_what_a_process_has_started_ends_with_it_when_it_is_ended(tmp_path):
    began = time.monotonic()
    with pytest.raises(ValueError, match="no label"):
        launch(launched.start_a_program_and_fail, str(tmp_path / "number"))
    assert time.monotonic() - began < 25
    assert not is_running(int((tmp_path / "number").read_text()))


def test_an_error_that_cannot_be_made_again_is_shown_by_its_text():
    with pytest.raises(RuntimeError, match="NoLabel: sample 7 in train.csv") as caught:
        launch(launched.fail_with_two_arguments, processes=1)
    assert any("in fail_with_two_arguments" in note for note in caught.value.__notes__)


def test_an_answer_that_cannot_be_made_again_is_an_error_that_says_so():
    with pytest.raises(TypeError, match="what the function returned cannot be sent back: .*__init__"):
        launch(launched.NotMadeAgain, processes=1)


def test_a_rank_that_leaves_by_exit_has_returned_and_the_answer_comes():
    assert launch(launched.leave_by_exit, 0) == "the answer"


def test_weights_that_are_divided_cannot_be_an_answer_and_the_note_says_what_can():
    with pytest.raises(TypeError, match="cannot be sent back: .*ProcessGroup") as caught:
        launch(launched.a_model_in_parts, processes=1)
    assert any("learner.save(path), on all ranks" in note for note in caught.value.__notes__)


def test_a_part_of_the_weights_is_no_answer():
    with pytest.raises(TypeError, match="cannot be sent back: it holds a DTensor") as caught:
        launch(launched.parts_in_a_dict, processes=1)
    assert any("learner.save(path), on all ranks" in note for note in caught.value.__notes__)


def test_a_program_has_its_arguments_in_the_function_too(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "3", ""])
    assert launch(launched.arguments, processes=1) == ["train.py", "--epochs", "3", ""]


def test_what_is_large_is_told_before_it_is_sent(monkeypatch, capsys):
    monkeypatch.setitem(launch.__globals__, "LARGE", 1000)
    assert len(launch(bytes, 3_000_000, processes=1)) == 3_000_000 and "MB" not in capsys.readouterr().out
    assert launch(len, bytes(3_000_000), processes=1) == 3_000_000
    assert "len is sent with 3 MB of what it uses, and each of 1 processes has a copy" in capsys.readouterr().out


def program_with(call, **variables):
    """A program that calls, with the functions of this folder."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    text = f"import launched, fault_runs; from nbdev_trainer.scale.launch import launch; {call}"
    return subprocess.Popen([sys.executable, "-c", text], env={**os.environ, "PYTHONPATH": path, **variables}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ranks_of(parent):
    """The processes that a program has started."""
    return [int(one) for one in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]


def ended(parent, *ranks):
    """What a program prints until it ends; none of its processes lives longer."""
    try:
        return "".join(parent.communicate(timeout=25))
    finally:
        parent.kill()
        parent.communicate()
        assert not any(is_running(one) for one in ranks)


def test_a_second_interrupt_ends_also_processes_that_do_not_listen():
    parent = program_with("launch(launched.does_not_end)")
    heard, ranks = sorted(parent.stdout.readline() for _ in range(2)), ranks_of(parent)
    for pause in (0.2, 2.2):  # the second comes at once, as by another way, and is the first
        parent.send_signal(signal.SIGINT)
        time.sleep(pause)
    assert parent.poll() is None and heard == ["[rank 1] deaf\n", "deaf\n"]
    parent.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert "not ended in time, and killed: rank 0, 1" in ended(parent, *ranks)
    assert time.monotonic() - began < 10 and parent.returncode == -signal.SIGINT


def test_a_signal_while_the_processes_start_leaves_none():
    parent = program_with("launch(launched.does_not_end)")
    while len(ranks := ranks_of(parent)) < 2:
        assert parent.poll() is None
        time.sleep(0.01)
    parent.send_signal(signal.SIGTERM)
    ended(parent, *ranks)
    assert parent.returncode == 143


@pytest.mark.parametrize("name, to_all", [("SIGTERM", True), ("SIGUSR1", False)])
def test_a_signal_lets_the_processes_save_and_ends_the_program_with_143(tmp_path, name, to_all):
    """To all processes, as `scancel` sends it, and then it is passed on as well; or to the program alone."""
    parent = program_with(f"launch(fault_runs.train, {str(tmp_path / 'run')!r}, 2000, slow=0.1)", SLURM_JOB_ID="7")
    end = time.monotonic() + 60  # beside other tests, to start and to train an epoch
    try:
        while not (tmp_path / "run/history.jsonl").exists():
            assert time.monotonic() < end and parent.poll() is None
            time.sleep(0.05)
        for one in [parent.pid, *(ranks := ranks_of(parent))][: None if to_all else 1]:
            os.kill(one, signal.Signals[name])
    except BaseException:
        parent.kill()
        raise
    said = ended(parent, *ranks)
    assert parent.returncode == 143, said
    assert "saved after batch" in said and Run.open(tmp_path / "run").ending == f"interrupted: {name}"


def test_the_meeting_point_is_reached_from_this_machine_alone():
    port, listening = launch(launched.who_listens, processes=1)
    assert listening == {"127.0.0.1"}, port
