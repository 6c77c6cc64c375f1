"""Run the notebooks under pytest: one test per notebook, its cells chosen and run by nbdev's own `test_nb`.

`pytest` runs what `nbdev-test` runs, and tests/. `pytest --full` adds the cells and tests marked slow.
What is marked gpu runs where there is a CUDA device. Exported cells run under the file name and the lines
of the module they export to, so coverage and tracebacks name the module.
"""

import ast
import os
import re
import warnings
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # before anything imports matplotlib: tests have no screen

import nbdev.test
import pytest
import torch
from execnb.shell import CaptureShell
from IPython.core.compilerop import CachingCompiler
from nbdev.config import get_config
from restore import restored

pytest_plugins = ["fault_table", "together"]
root = Path(__file__).parent
config = get_config(root)
collect_ignore_glob = [str(config.nbs_path / "*.py")]  # text twins of the notebooks


@pytest.fixture(autouse=True)
def _restored():
    with restored():
        yield


def exported_cells():
    """Map (notebook, cell id) to the module file and the line where the cell's code starts in it."""
    marker = re.compile(r"^# %% (\S.*\.ipynb) #(\S+)$", re.M)
    places = {}
    for module in config.lib_path.rglob("*.py"):
        text = module.read_text(encoding="utf-8")
        for match in marker.finditer(text):
            notebook = (module.parent / match[1]).resolve()
            places[notebook, match[2]] = str(module), text.count("\n", 0, match.end()) + 2
    return places


class Compiler(CachingCompiler):
    """Compiles a cell under the name of the file it exports to, when it exports to one."""

    place = None

    def cache(self, code, number=0, raw_code=None):
        return self.place[0] if self.place else super().cache(code, number, raw_code)


class Shell(CaptureShell):
    """nbdev's shell; it tells the compiler where each exported cell stands in its module."""

    current = None

    def __init__(self, path, **options):
        filters = warnings.filters[:]
        super().__init__(path, **options)
        warnings.filters[:] = filters  # IPython shows deprecations in cells; here they are errors
        self.notebook, self.compile, self.exported = Path(path).resolve(), Compiler(), exported_cells()
        self.ast_transformers.append(self)
        Shell.current = self

    def visit(self, tree):
        return ast.increment_lineno(tree, self.compile.place[1]) if self.compile.place else tree

    def cell(self, cell, **options):
        place = self.exported.get((self.notebook, cell.get("id")))
        if place:
            lines = cell.source.splitlines()
            directives = next((i for i, line in enumerate(lines) if not line.startswith("#|")), 0)
            self.compile.place = place[0], place[1] - directives - 1
        try:
            return super().cell(cell, **options)
        finally:
            self.compile.place = None

    def close(self):
        super().close()
        self.loop.close()


class NotebookFailed(Exception):
    pass


class NotebookItem(pytest.Item):
    def runtest(self):
        flags = set(config.tst_flags.split())
        run = {"slow"} if self.config.getoption("--full") else set()
        run |= {"gpu"} if torch.cuda.is_available() else set()
        nbdev.test.CaptureShell = Shell
        with restored():
            try:
                passed, _ = nbdev.test.test_nb(
                    self.path,
                    skip_flags=flags,
                    force_flags=run,
                    basepath=root,
                    cell_timeout=config.cell_timeout,
                )
            finally:
                if Shell.current:
                    Shell.current.close()
                    Shell.current = None  # what the page has made, such as worker processes, ends with it
        if not passed:
            raise NotebookFailed

    def repr_failure(self, excinfo):
        if excinfo.errisinstance(NotebookFailed):
            return f"{self.nodeid} failed; its traceback is below"
        return super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, None, self.nodeid


class NotebookFile(pytest.File):
    def collect(self):
        yield NotebookItem.from_parent(self, name="cells")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the cells and tests marked slow")


def pytest_collect_file(file_path, parent):
    if file_path.suffix != ".ipynb" or config.nbs_path not in file_path.parents:
        return None
    if any(part[0] in "_." for part in file_path.relative_to(config.nbs_path).parts):
        return None
    return NotebookFile.from_parent(parent, path=file_path)


def pytest_collection_modifyitems(config, items):
    # what starts several processes takes longest: first, so that not one of two workers is left with it at the end
    items.sort(key=lambda item: root / "tests" / "distributed" not in item.path.parents)
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --full"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
