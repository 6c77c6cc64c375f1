"""Child processes for the fault tests, forked from one warm parent that has imported everything and trained nothing."""

import multiprocessing
import os
import signal
from multiprocessing import forkserver
from pathlib import Path

import pytest

FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


class Children:
    """Starts functions in processes of their own; none of them outlives its test."""

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["fault_program"])
        with pytest.MonkeyPatch.context() as patch:  # the server looks for the program there
            patch.setenv("PYTHONPATH", os.pathsep.join(FOLDERS), prepend=os.pathsep)
            forkserver.ensure_running()
        self.started = []

    def start(self, fn, *args, **options):
        child = self.context.Process(target=fn, args=args, kwargs=options)
        child.start()
        self.started.append(child)
        return child

    def run(self, fn, *args, seconds=60, **options):
        """The exit code of a function in a process: 0, 1 after an exception, minus the signal that killed it."""
        child = self.start(fn, *args, **options)
        child.join(seconds)
        assert child.exitcode is not None, f"{fn.__name__} did not end within {seconds} s"
        return child.exitcode

    def end(self):
        for child in self.started:
            if child.is_alive():
                child.kill()
            child.join(10)
        self.started = []


@pytest.fixture(scope="session")
def nursery():
    children = Children()
    yield children
    children.end()
    if (server := forkserver._forkserver._forkserver_pid) is not None:  # each file has a nursery, and one ends first
        os.kill(server, signal.SIGKILL)  # else it would wait for whoever was forked meanwhile
    forkserver._forkserver._stop()


@pytest.fixture
def children(nursery):
    yield nursery
    nursery.end()
