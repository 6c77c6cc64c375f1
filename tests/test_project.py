"""Rules for the whole project. Each is a function that lists problems, and is shown to find some."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from restore import restored

ROOT = Path(__file__).parents[1]
PACKAGE, PAGES = ROOT / "nbdev_trainer", ROOT / "nbs"

# A module imports from its own layer and from those with a lower number.
# `callbacks` and `scale` stand side by side, and so do `cli` and `testing`.
LAYERS = {"core": 0, "store": 1, "data": 2, "metrics": 3, "loop": 4, "callbacks": 5, "scale": 5, "use": 6}
LAYERS |= {"learner": 7, "apps": 8, "cli": 9, "testing": 9}
HEAVY = {"matplotlib", "pandas", "IPython", "tqdm.notebook", "torchmetrics", "sklearn", "torch._dynamo"}


def read_modules():
    """The source of each module, by its name within the package: `core.errors`, `data.__init__`."""
    files = [file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py") if file.name != "_modidx.py"]
    return {".".join(file.with_suffix("").parts): (PACKAGE / file).read_text("utf-8") for file in files}


def read_pages():
    """The cells of each page, as (type, source), by its path under nbs/."""
    pages = {}
    for file in sorted(PAGES.rglob("*.ipynb")):
        page = file.relative_to(PAGES)
        if not any(part[0] in "._" for part in page.parts):
            cells = json.loads(file.read_text("utf-8"))["cells"]
            pages[page.as_posix()] = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return pages


def nodes_at_run_time(tree):
    """All nodes but those under `if TYPE_CHECKING:`, which no program executes."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = tree.orelse
    else:
        yield tree
        children = ast.iter_child_nodes(tree)
    for child in children:
        yield from nodes_at_run_time(child)


def imports(module, source):
    """Each thing that a module imports, within a function too: (module within the package or None, name)."""
    for node in nodes_at_run_time(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(alias.name.split("."), None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ["nbdev_trainer", *module.split(".")[: -node.level]] if node.level else []
            start += node.module.split(".") if node.module else []
            names = [(start, alias.name) for alias in node.names]
        else:
            continue
        for path, name in names:
            yield (".".join(path[1:]) if path[0] == "nbdev_trainer" else None), name


def import_graph(modules):
    """Module -> the modules of the package that it imports."""
    graph = {}
    for module, source in modules.items():
        targets = set()
        for path, name in imports(module, source):
            if path is not None:
                choices = [f"{path}.{name}".strip("."), path, f"{path}.__init__".strip(".")]
                targets.add(next((choice for choice in choices if choice in modules), path))
        graph[module] = targets
    return graph


def cycles(graph):
    """Modules that import each other, directly or through others."""
    for start in graph:
        seen, waiting = set(), set(graph[start])
        while waiting:
            module = waiting.pop()
            seen.add(module)
            waiting |= graph.get(module, set()) - seen
        if start in seen:
            yield f"{start} is part of a cycle of imports"


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def import_problems(modules):
    graph = import_graph(modules)
    problems = list(cycles(graph))
    for module, targets in graph.items():
        layer = module.split(".")[0]
        if layer == "__init__":
            continue
        if layer not in LAYERS:
            problems.append(f"{module} is in no layer")
            continue
        for target in targets:
            other = target.split(".")[0]
            if other != layer and LAYERS.get(other, 99) >= LAYERS[layer]:
                problems.append(f"{module} imports {target}, which is not below it")
            if layer == "callbacks" and target == "loop.trainer":
                problems.append(f"{module} imports the trainer; a callback receives it")
    for module, source in modules.items():
        for path, name in imports(module, source):
            if name == "*":
                problems.append(f"{module} has a wildcard import")
            parts = [*(path or "").split("."), name or ""] if path is not None else []
            if any(is_private(part) for part in parts):
                problems.append(f"{module} imports {name} of {path}, which is private there")
        imported = {name for path, name in imports(module, source) if path is not None}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                if isinstance(node.value, ast.Name) and node.value.id in imported:
                    problems.append(f"{module} uses {ast.unparse(node)}, which is private there")
    return problems


def page_problems(modules, pages):
    """Modules and notebooks that do not answer each other."""
    exports = {}
    for page, cells in pages.items():
        for _, source in cells:
            if match := re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M):
                exports[match[1]] = page
    problems = []
    for name, page in exports.items():
        if name not in modules:
            problems.append(f"{page} exports {name}, which does not exist")
        path = re.sub(r"/\d+[a-z]?_", "/", page).removeprefix("api/")
        expected = path.removesuffix(".ipynb").replace("/", ".")
        if name != expected:
            problems.append(f"{page} exports {name}; its place says {expected}")
    for module, source in modules.items():
        if module.split(".")[-1] != "__init__" and module not in exports:
            problems.append(f"{module} has no notebook")
        named = set(re.findall(r"^# (?:%%|AUTOGENERATED.*edit:) (?:\.\./)+nbs/(\S+\.ipynb)", source, re.M))
        problems += [f"{module} names {page}, which does not exist" for page in named - set(pages)]
    return problems


def api_problems(name, thing):
    """What is missing from the documentation and the types of a public function or class."""
    if not callable(thing) or not getattr(thing, "__module__", "").startswith(("nbdev_trainer", __name__)):
        return []
    text = thing.__doc__ or ""
    problems = [] if text and not text.startswith(f"{name}(") else [f"{name} has no docstring"]
    if inspect.isclass(thing):
        kinds = [kind for kind in thing.__mro__ if not vars(kind).get("_is_protocol")]  # theirs is of typing
        owner = next((kind for kind in kinds if "__init__" in vars(kind)), object)
        thing = owner.__init__ if owner.__module__.startswith(("nbdev_trainer", __name__)) else None
    if inspect.isroutine(thing):
        parameters = list(inspect.signature(thing).parameters.values())
        missing = [item.name for item in parameters if item.annotation is item.empty and item.name != "self"]
        problems += [f"{name}: parameter {parameter} has no type" for parameter in missing]
    return problems


def listed_names(source):
    """The public names that an `__init__.py` lists: its `__all__`, else what it imports."""
    tree = ast.parse(source)
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return [alias.asname or alias.name for node in imported for alias in node.names]


def listing_problems(source, namespace):
    counts = Counter(listed_names(source))
    problems = [f"{name} is listed {count} times" for name, count in counts.items() if count > 1]
    return problems + [f"{name} does not exist" for name in counts if not hasattr(namespace, name)]


CHECK = re.compile(
    r"^\s*(assert\b|test_\w+\(|(with )?expect_fail\(|torch\.testing\.assert_|np\.testing\.assert_)", re.M
)


def only_imports(source):
    imports = re.compile("import |from |if TYPE_CHECKING:")
    return all(imports.match(ast.unparse(node)) for node in ast.parse(source).body)


def texture_problems(cells):
    """How a page reads: enough prose and checks for its code, in pieces small enough to follow."""
    words = checks = in_a_row = longest_row = 0
    sizes, wide, prose = [], [], ""
    for kind, source in cells:
        if kind == "markdown":
            in_a_row, prose = 0, prose + source + "\n"
            words += len(re.sub(r"```.*?```", " ", source, flags=re.S).split())
        elif kind == "code":
            lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
            wide += [line for line in lines if len(line) > 110]
            if not re.search(r"^#\|\s*exporti?s?\b", source, re.M):
                in_a_row, checks = 0, checks + len(CHECK.findall(source))
            elif not only_imports(source):
                sizes.append(len(lines))
                in_a_row += 1
                longest_row = max(longest_row, in_a_row)
    exported = sum(sizes)
    if not exported or re.search(r"^Texture: \w+", prose, re.M):
        return []
    rules = {
        f"{words / exported:.1f} words of prose for each exported line; at least 3": words >= 3 * exported,
        f"{checks / exported:.2f} checks for each exported line; at least 0.15": checks >= 0.15 * exported,
        f"an export cell of {max(sizes)} lines; at most 40": max(sizes) <= 40,
        f"{longest_row} export cells in a row; at most 3": longest_row <= 3,
        "'| export' in the prose: a directive starts with '#|'": not re.search(r"^\| *export", prose, re.M),
        f"{exported} exported lines; at most 300": exported <= 300,
        f"lines wider than 110 columns: {wide}": not wide,
    }
    return [text for text, holds in rules.items() if not holds]


# What can turn the content of a file into a program, and the few places that may use it.
RUNS_CODE = {"eval", "exec", "__import__", "pickle.loads", "pickle.load", "pickle.Unpickler"}
RUNS_CODE |= {"importlib.import_module", "torch.load", "numpy.load", "torch.hub.load", "torch.jit.load"}
RUNS_CODE |= {
    "os.system",
    "os.popen",
    "shutil.unpack_archive",
    "marshal.loads",
    "runpy.run_path",
    "yaml.load",
}
MAY_RUN = {
    ("core.errors", "importlib.import_module"): "`require`; the names stand in the code, as checked below",
    ("data.__init__", "importlib.import_module"): "public names of the package, read from its own source",
    ("data.datasets", "numpy.load"): "with allow_pickle=False",
    ("data.sending", "pickle.loads"): "an error of this process, to see whether it can be sent",
    ("data.streams", "pickle.loads"): "items that the parent process sent to its worker",
    ("callbacks.run_directory", "subprocess.run"): "git, with fixed arguments and without its extensions",
    ("callbacks.run_directory", "subprocess.TimeoutExpired"): "the error of the line above",
    ("callbacks.interruptions", "subprocess.run"): "scontrol, with a job number that was looked at",
    ("scale.launch", "pickle.loads"): "a call and its answer, in a folder that this process made for itself",
    ("core.signals", "subprocess.Popen"): "starts nothing: what a worker starts is to get signals",
    ("core.signals", "subprocess.Popen.__init__"): "the line above",
    ("scale.launch", "subprocess.Popen"): "this Python, with a function of this process",
    ("scale.launch", "subprocess.PIPE"): "for the line above",
    ("scale.launch", "subprocess.STDOUT"): "likewise",
    ("store.foreign", "torch.load"): "with weights_only=True, after the names in the file were looked at",
}
MODULES_THAT_RUN_CODE = {
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "yaml",
    "runpy",
    "subprocess",
    "code",
}


def full_names(source):
    """Each use of an imported or built-in thing, as (its full name, the node)."""
    tree, known = ast.parse(source), {name: name for name in ("eval", "exec", "__import__")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            first, _, rest = ast.unparse(node).partition(".")
            if first in known and re.fullmatch(r"[\w.]*", rest):
                yield f"{known[first]}.{rest}".strip("."), node


def code_from_files(modules):
    """Where a module could run or import what a file says."""
    problems = []
    for module, source in modules.items():
        for name, node in full_names(source):
            known = name in RUNS_CODE or name.partition(".")[0] in MODULES_THAT_RUN_CODE and "." in name
            if known and (module, name) not in MAY_RUN:
                problems.append(f"{module} line {node.lineno} uses {name}")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call):
                continue
            called, options = (
                ast.unparse(node.func),
                {one.arg: ast.unparse(one.value) for one in node.keywords},
            )
            if called.split(".")[-1] == "require" and not isinstance(node.args[0], ast.Constant):
                problems.append(f"{module} line {node.lineno} imports a module whose name is not in the code")
            if called == "torch.load" and options.get("weights_only") != "True":
                problems.append(f"{module} line {node.lineno} calls torch.load without weights_only=True")
            if called in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
                problems.append(f"{module} line {node.lineno} calls numpy.load without allow_pickle=False")
    return problems


def heavy_imports(statement):
    """The heavy packages that a statement loads, in a new process that has torch and numpy."""
    before = "import sys, torch, numpy; before = set(sys.modules)"
    program = f"{before}; {statement}; print(*set(sys.modules) - before)"
    loaded = subprocess.check_output([sys.executable, "-c", program], text=True, timeout=120)
    return HEAVY & set(loaded.split())


def test_imports_follow_the_layers():
    assert import_problems(read_modules()) == []


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("core.x", "from ..data.batch import Batch", "imports data.batch, which is not below"),
        ("core.x", "def f():\n    from ..data import batch", "imports data.batch, which is not below"),
        ("core.x", "import nbdev_trainer.data.batch", "imports data.batch, which is not below"),
        ("scale.x", "from nbdev_trainer.callbacks.y import z", "imports callbacks.y, which is not below"),
        ("cli", "from . import Batch", "imports __init__, which is not below"),
        ("callbacks.x", "from ..loop.trainer import Trainer", "imports the trainer"),
        ("learner", "from torch.nn import *", "wildcard"),
        ("learner", "from .data.batch import _size", "private"),
        ("learner", "from .data import batch\nbatch._size(1)", "uses batch._size, which is private"),
        ("data.x", "from .y import y", "cycle"),
        ("other.x", "", "in no layer"),
    ],
)
def test_a_wrong_import_is_found(module, source, problem):
    others = {"__init__": "", "data.batch": "", "data.y": "from .z import z", "data.z": "from .x import x"}
    others |= {"callbacks.y": "", "loop.trainer": ""}
    assert problem in "\n".join(import_problems(others | {module: source}))


def test_a_right_import_is_accepted():
    source = "if TYPE_CHECKING:\n    from ..loop.trainer import Trainer\nfrom ..loop.events import Event"
    assert import_problems({"callbacks.x": source, "loop.events": "", "loop.trainer": ""}) == []


def test_no_module_runs_or_imports_what_a_file_says():
    assert code_from_files(read_modules()) == []
    used = {(module, name) for module, source in read_modules().items() for name, _ in full_names(source)}
    assert set(MAY_RUN) <= used  # an exception that nobody needs any more goes


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import pickle\npickle.load(file)", "uses pickle.load"),
        ("from pickle import loads as read\nread(text)", "uses pickle.loads"),
        ("import torch\ntorch.load(path, weights_only=True)", "uses torch.load"),
        ("import torch as t\nread = t.load", "uses torch.load"),
        ("import importlib\nimportlib.import_module(config['class'])", "uses importlib.import_module"),
        ("eval(text)", "uses eval"),
        ("run = exec", "uses exec"),
        ("__import__(name)", "uses __import__"),
        ("import yaml\nyaml.safe_load(text)", "uses yaml"),
        ("import subprocess\nsubprocess.run(command, shell=True)", "uses subprocess"),
        ("from .core.errors import require\nrequire(name, extra='x', why='y')", "name is not in the code"),
        ("import numpy as np\nnp.load(path)", "without allow_pickle=False"),
    ],
)
def test_a_way_to_run_a_file_is_found(source, problem):
    assert problem in "\n".join(code_from_files({"use.x": source}))


def test_security_promises_name_tests_that_exist():
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    promised = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", text)
    sources = {file: (ROOT / file).read_text("utf-8") for file, _ in promised}
    assert [name for file, name in promised if f"def {name}(" not in sources[file]] == []
    promises = text.split("## What is promised")[1].split("\n## ")[0].split("\n- ")[1:]
    assert promises and [promise for promise in promises if "`tests/" not in promise] == []


def test_every_module_has_its_notebook():
    assert page_problems(read_modules(), read_pages()) == []


def test_a_module_without_its_notebook_is_found():
    page = {"api/core/00_a.ipynb": [("code", "#| default_exp core.a")]}
    marker = "# %% ../../nbs/api/core/00_a.ipynb #1"
    assert page_problems({"core.a": marker, "core.__init__": ""}, page) == []
    assert page_problems({"core.a": "", "core.b": ""}, page) == ["core.b has no notebook"]
    assert page_problems({"core.a": marker.replace("00", "01")}, page) == [
        "core.a names api/core/01_a.ipynb, which does not exist"
    ]
    assert "does not exist" in page_problems({}, page)[0]
    moved = {"api/data/00_a.ipynb": page["api/core/00_a.ipynb"]}
    assert "its place says data.a" in page_problems({"core.a": ""}, moved)[0]


@pytest.mark.parametrize("module", [name for name in read_modules() if name.endswith("__init__")])
def test_listed_names_exist_and_stand_once(module):
    name = f"nbdev_trainer.{module}".removesuffix(".__init__")
    assert listing_problems(read_modules()[module], importlib.import_module(name)) == []


@pytest.mark.parametrize("module", read_modules())
def test_public_names_are_documented_and_typed(module):
    name = f"nbdev_trainer.{module}".removesuffix(".__init__")
    namespace = importlib.import_module(name)
    names = getattr(namespace, "__all__", listed_names(read_modules()[module]))
    assert [problem for each in names for problem in api_problems(each, getattr(namespace, each))] == []


def test_a_wrong_public_name_is_found():
    def undocumented(size): ...

    class Typed:
        """A documented class."""

        def __init__(self, size: int): ...

    class Untyped(Typed):
        def __init__(self, size): ...

    untyped = ["has no docstring", "parameter size has no type"]
    assert api_problems("Typed", Typed) == []
    for name, thing in [("undocumented", undocumented), ("Untyped", Untyped)]:
        for problem, expected in zip(api_problems(name, thing), untyped, strict=True):
            assert expected in problem
    problems = listing_problems("from .a import b, c\nfrom .d import b", Typed(1))
    assert problems == ["b is listed 2 times", "b does not exist", "c does not exist"]


@pytest.mark.parametrize("page", read_pages())
def test_pages_are_readable(page):
    assert texture_problems(read_pages()[page]) == []


def test_an_unreadable_page_is_found():
    prose, check = ("markdown", "word " * 40), ("code", "assert one() == 1")
    code = ("code", "#| export\ndef one():\n    return 1")
    good = [prose, code, check]
    assert texture_problems(good) == []

    def problem(cells):
        return "\n".join(texture_problems(cells))

    assert "words of prose" in problem([code, check])
    assert "checks for each" in problem([prose, code])
    assert "export cells in a row" in problem([prose, code, code, code, code, check])
    assert "an export cell of" in problem([*good, ("code", "#| export\n" + "a = 1\n" * 41)])
    assert "exported lines; at most" in problem(good * 151)
    assert "wider than 110" in problem([*good, ("code", f"a = '{'b' * 110}'")])
    assert "a directive starts with" in problem([("markdown", "| export\nWhat this is for."), *good])
    assert texture_problems([("markdown", "Texture: one table, read as a whole."), code]) == []


def test_importing_the_library_loads_nothing_heavy():
    assert heavy_imports("import nbdev_trainer") == set()
    assert heavy_imports("import pandas") == {"pandas"}


def test_a_first_run_loads_nothing_heavy(tmp_path):
    """Torch's optimizers load its compiler when they are made, which takes as long as loading torch; the default one does not."""
    made = f"""
from nbdev_trainer import Learner
data = [(torch.zeros(4, 2), torch.zeros(4, 1))] * 2
learner = Learner(torch.nn.Linear(2, 1), (data, data), torch.nn.functional.mse_loss, run_dir={str(tmp_path / 'run')!r})
learner.fit_one_cycle(1)
learner.validate()
learner.predict()
"""
    assert heavy_imports(f"exec({made!r})") == set()
    assert heavy_imports("torch.optim.SGD([torch.ones(1)])") == {"torch._dynamo"}


def test_a_page_leaves_the_process_as_it_was():
    def settings():
        generator = torch.get_rng_state().tolist()
        return torch.get_default_dtype(), torch.get_num_threads(), generator, os.environ.get("A")

    before = settings()
    with restored():
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(before[1] + 1)
        torch.rand(1)
        os.environ["A"] = "changed"
    assert settings() == before
