"""The programs of other libraries that the "Coming from" pages begin with: they run, they reach what ours reaches,
and the pages show them as they are. They run in the Python that NBDEV_TRAINER_PEERS_PYTHON names, else in this one."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from nbdev_trainer import Accuracy, Learner, Loaders, digits

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "benchmarks" / "coming_from"
spec = importlib.util.spec_from_file_location("coming_from_run", PROGRAMS / "run.py")
programs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(programs)

ACCURACY = re.compile(r"validation accuracy: (\d\.\d+)$")


@pytest.fixture(scope="module")
def our_accuracy():
    torch.manual_seed(0)
    images, labels = digits()
    loaders = Loaders.from_arrays(images, labels, valid=0.2, batch_size=64, seed=0)
    model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10))
    learner = Learner(model, loaders, loss_fn=nn.CrossEntropyLoss(), metrics=[Accuracy()], device="cpu", verbose=0)
    learner.fit_one_cycle(5, lr=1e-2)
    return learner.history["valid_accuracy"][-1]


@pytest.mark.parametrize("name", programs.packages)
def test_a_program_of_another_library_reaches_what_ours_reaches(name, our_accuracy):
    if programs.installed(name) is None:
        pytest.skip(f"{programs.packages[name][0]} is not installed in {programs.python()}; see benchmarks/peers.txt")
    found = ACCURACY.match(programs.run(name))
    assert found, "the last line of the program says something else"
    assert float(found[1]) == pytest.approx(our_accuracy, abs=0.03)  # 359 or 360 images, another split


def saved_outputs(page):
    """The code cells of a page with outputs, as (source, text of the outputs)."""
    for cell in json.loads(page.read_text("utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            text = output.get("text") or output["data"].get("text/markdown") or output["data"].get("text/plain", "")
            yield "".join(cell["source"]), "".join(text)


@pytest.mark.parametrize("name", programs.packages)
def test_a_page_shows_the_program_as_it_is_and_what_both_sides_reached(name):
    (page,) = (ROOT / "nbs" / "howto").glob(f"*_coming_from_{name}.ipynb")
    outputs = list(saved_outputs(page))
    program = (PROGRAMS / f"with_{name}.py").read_text("utf-8")
    assert [text for source, text in outputs if f"with_{name}.py" in source] == [f"```python\n{program}```"]
    (run,) = (text for source, text in outputs if "coming_from/run.py" in source)
    assert ACCURACY.search(run.strip())
    assert any("fit_one_cycle(5, lr=1e-2)" in source and "valid_accuracy" in text for source, text in outputs)
