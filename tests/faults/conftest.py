"""Child processes for the fault tests, forked from one warm parent that has imported everything and trained nothing."""

import multiprocessing
import os
import platform
import sys
from datetime import date
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

import nbdev_trainer

ROWS = pytest.StashKey[dict]()
FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
sys.path[:0] = FOLDERS


def pytest_addoption(parser):
    parser.addoption("--table", metavar="FILE", help="write the table of faults: what, how, what held, how often")


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(what, how, held): a row of the table of faults")
    config.stash[ROWS] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    mark = item.get_closest_marker("fault")
    if mark is not None and (report.when == "call" or not report.passed):
        item.config.stash[ROWS].setdefault(mark.args, []).append(report.outcome)
    return report


def result(outcomes):
    """What came of the tests of a fault, in words."""
    run = [one for one in outcomes if one != "skipped"]
    held = run.count("passed")
    skipped = f", {len(outcomes) - len(run)} only with --full" if len(run) < len(outcomes) else ""
    return ("held" if run and held == len(run) else "FAILED") + f" in {held} of {len(run)} tests{skipped}"


def pytest_sessionfinish(session):
    file = session.config.getoption("--table")
    if file is None:
        return
    lines = [
        f"{date.today()}, nbdev_trainer {nbdev_trainer.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "",
        "| fault | how it is brought about | what must hold | result |",
        "|---|---|---|---|",
    ]
    rows = session.config.stash[ROWS]
    lines += [f"| {' | '.join(row)} | {result(outcomes)} |" for row, outcomes in rows.items()]
    Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")


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
    forkserver._forkserver._stop()


@pytest.fixture
def children(nursery):
    yield nursery
    nursery.end()
