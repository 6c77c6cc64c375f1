"""`pytest tests/faults --table FILE`: the table of faults, written from the results of their tests."""

import platform
from datetime import date
from pathlib import Path

import pytest
import torch

import nbdev_trainer

ROWS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--table", metavar="FILE", help="write the table of faults: what, how, what held, how often")


def pytest_configure(config):
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
