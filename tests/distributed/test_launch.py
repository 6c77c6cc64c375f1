"""`launch` from executed notebooks: again and again, after errors and interrupts, and nothing is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from execnb.shell import CaptureShell
from left_over import left

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


def test_a_function_of_a_cell_works_twenty_times_also_after_errors(notebook):
    for k in range(20):
        if k % 7 == 3:
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


def test_the_processes_end_when_whoever_started_them_is_killed():
    program = f"{CELL}\nlaunch(add, 1, False, 60)"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path})
    end = time.monotonic() + 20
    while len(left()) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    while left():
        assert time.monotonic() < end + 10, "they live on"
        time.sleep(0.1)
