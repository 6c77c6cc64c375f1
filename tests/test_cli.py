"""The installed command, in processes of its own, in empty directories."""

import gzip
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from nbdev_trainer.apps.models import make_model, model_of_run
from nbdev_trainer.cli import main
from nbdev_trainer.data.datasets import digits
from nbdev_trainer.data.readers import read_numeric_csv
from nbdev_trainer.store.files import read_json, read_tensors
from nbdev_trainer.store.run import Run
from nbdev_trainer.store.weights import load_weights

COMMAND = Path(sys.executable).with_name("nbdev-trainer")
FILES = ["checkpoints", "config.json", "curves.svg", "fits.jsonl", "history.jsonl", "model.safetensors", "steps.jsonl"]


def run(words, folder, *, timeout=60):
    """The finished process."""
    arguments = words.split() if isinstance(words, str) else words
    return subprocess.run([COMMAND, *arguments], cwd=folder, capture_output=True, text=True, timeout=timeout)


def files_of(directory):
    """The files of a run; TensorBoard's are there where it is installed."""
    return sorted(path.name for path in directory.iterdir() if path.name != "tensorboard")


def result(process):
    """The numbers of the last line but one."""
    line = re.search(r"^result: (.*) after", process.stdout, re.M)[1]
    return {name: float(value) for name, value in (part.split() for part in line.split(", "))}


def write_table(path, n=60):
    """x and y are numbers, kind is 3 or 8, amount is linear in x and y, name is text."""
    rows = [(i % 7, i % 5, 3 + 5 * (i % 2), 10.5 * (i % 7) - 4 * (i % 5) + 1000, f"n{i}") for i in range(n)]
    path.write_text("\n".join(["x,y,kind,amount,name", *(",".join(map(str, row)) for row in rows)]) + "\n")


def write_idx(path, values, shape):
    header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    path.write_bytes(gzip.compress(header + bytes(values)))


def write_mnist(folder, n_train=64, n_test=17):
    """Images of 6 x 6 pixels whose upper or lower half is bright."""
    folder.mkdir()
    for part, n in (("train", n_train), ("t10k", n_test)):
        labels = [i % 2 for i in range(n)]
        bright = [(place < 18) == label for label in labels for place in range(36)]
        pixels = [250 - i % 9 if on else i % 9 for i, on in enumerate(bright)]
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", pixels, (n, 6, 6))
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels, (n,))


def test_the_digits_are_learned_and_the_run_is_kept(tmp_path):
    process = run("fit", tmp_path)
    assert process.returncode == 0 and process.stderr == ""
    assert result(process)["valid_accuracy"] >= 0.97
    (directory,) = (tmp_path / "runs").iterdir()
    assert process.stdout.endswith(f"run: {directory.relative_to(tmp_path)}\n")
    assert files_of(directory) == FILES
    config, tensors = read_json(directory / "config.json"), read_tensors(directory / "model.safetensors")
    rows = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    assert len(rows) == config["epochs"] and rows[-1]["valid_accuracy"] >= 0.97
    assert ElementTree.parse(directory / "curves.svg").getroot().tag.endswith("svg")
    assert {"seed", "lr", "batch_size", "model", "device", "versions"} <= config.keys()
    images, labels = digits()  # the weights alone, with other scales before they are loaded
    model = make_model(config["model"], images[:2], config["n_outputs"])
    load_weights(model, tensors, "the run")
    assert (model.eval()(images).argmax(1) == labels).float().mean() > 0.99


def test_help_and_version(tmp_path):
    assert "nbdev-trainer fit" in run("--help", tmp_path).stdout
    help = run("fit --help", tmp_path)
    assert help.returncode == 0 and "--batch-size" in help.stdout and "highest learning rate" in help.stdout
    assert re.match(r"nbdev-trainer \d+\.\d+\.\d+", run("--version", tmp_path).stdout)
    assert list(tmp_path.iterdir()) == []


def test_a_column_of_few_integers_is_a_class(tmp_path):
    write_table(tmp_path / "t.csv")
    process = run("fit t.csv --target kind --drop amount,name --epochs 3 --device cpu --out run", tmp_path)
    assert process.returncode == 0 and "classification, 2 classes" in process.stdout
    config = read_json(tmp_path / "run" / "config.json")
    assert (config["classes"], config["columns"], config["epochs"]) == ([3, 8], ["x", "y"], 3)


def test_names_of_classes_are_learned_and_kept_with_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"{i % 10},{(7 * i) % 5},{'low' if i % 10 < 5 else 'high'}" for i in range(100)]
    (tmp_path / "t.csv").write_text("\n".join(["x,y,level", *rows]) + "\n")
    assert main("fit t.csv --target level --epochs 30 --device cpu --out run".split()) == 0
    assert "classification, 2 classes (the target has 2 distinct values, names)" in capsys.readouterr().out
    classes = Run.open("run").config["classes"]
    with torch.no_grad():
        answers = model_of_run("run")(torch.tensor([[1.0, 2.0], [8.0, 2.0]])).argmax(1)
    assert [classes[i] for i in answers] == ["low", "high"]


def test_amounts_are_predicted_in_their_own_units(tmp_path):
    write_table(tmp_path / "t.csv", n=200)
    process = run("fit t.csv --target amount --drop kind,name --epochs 60 --device cpu --out run", tmp_path)
    assert process.returncode == 0 and "task: regression" in process.stdout
    assert result(process)["valid_mae"] < 3 and result(process)["valid_loss"] < 0.05
    table = read_numeric_csv(tmp_path / "t.csv", "amount", drop=["kind", "name"])
    model = make_model("multilayer_perceptron", table.inputs[:2], 1)
    load_weights(model, read_tensors(tmp_path / "run" / "model.safetensors"), "the run")
    assert (model(table.inputs)[:, 0] - table.targets).abs().mean() < 3


def test_the_task_can_be_asked_for(tmp_path):
    write_table(tmp_path / "t.csv")
    words = "fit t.csv --target kind --drop amount,name --task regression --epochs 1 --device cpu --out run"
    assert "task: regression (as asked)" in run(words, tmp_path).stdout


def test_a_folder_like_mnist(tmp_path):
    write_mnist(tmp_path / "halves")
    process = run("fit halves --epochs 6 --device cpu --out run", tmp_path)
    assert process.returncode == 0 and "64 samples (1, 6, 6) to train on, 17 held out" in process.stdout
    assert result(process)["valid_accuracy"] > 0.9


def test_the_same_seed_gives_the_same_weights(tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(f"fit --epochs 1 --seed {seed} --device cpu --out {out}", tmp_path).returncode == 0
    a, b, c = ((tmp_path / out / "model.safetensors").read_bytes() for out in "abc")
    assert a == b != c
    assert torch.equal(*(read_tensors(tmp_path / out / "model.safetensors")["input_mean"] for out in "ab"))


WRONG = {
    "fti": "Did you mean 'fit'?",
    "fit nowhere": "no file or folder 'nowhere'",
    "fit empty": "neither a folder in the format of MNIST nor one with a folder of pictures for each class",
    "fit note.txt": "is no .csv or .csv.gz file",
    "fit t.csv": "say which column to predict",
    "fit t.csv --target knid": "Did you mean 'kind'?",
    "fit t.csv --target kind --drop nmae": "Did you mean 'name'?",
    "fit t.csv --target kind": "or drop name",
    "fit t.csv --target amount --drop name --task classification": "written as integers",
    "fit t.csv --target amount --drop name --task regresion": "Did you mean 'regression'?",
    "fit t.csv --target amount --drop name --model small_cnn": "small_cnn takes images",
    "fit tiny.csv --target b": "there are 2 samples",
    "fit --target kind": "there is none here",
    "fit --epochs 0": "--epochs is 0",
    "fit --epochs many": "'many' is not a value it takes",
    "fit --batch-size 0": "--batch-size is 0",
    "fit --threads 0": "--threads is 0",
    "fit --lr -1": "lr is -1",
    "fit --lr nan": "lr is nan",
    "fit --seed -1": "seed is int -1",
    "fit --device gpu": "names no device",
    "fit --device cuda:9": "no device 'cuda:9'",
    "fit --model smal_cnn": "Did you mean 'small_cnn'?",
    "fit --epoch 3": "Did you mean '--epochs'?",
    "fit --out full": "exists and is not empty",
    "fit --out t.csv": "is a file",
    "fit t.csv more": "one word too many",
}

# One process for all: a mistake costs the time of starting up, two seconds, and not of training.
ALL_WRONG = """
import contextlib, io, json, sys
from nbdev_trainer.cli import main
answers = {}
for words in json.load(sys.stdin):
    error, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(output): code = main(words.split())
    answers[words] = code, error.getvalue(), output.getvalue()
print(json.dumps(answers))
"""


def make_inputs(folder):
    write_table(folder / "t.csv")
    (folder / "tiny.csv").write_text("a,b\n1,2\n3,4\n")
    (folder / "note.txt").write_text("a note")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "file").touch()


def contents(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    make_inputs(folder)
    before, words = contents(folder), json.dumps(list(WRONG))
    program = [sys.executable, "-c", ALL_WRONG]
    done = subprocess.run(program, input=words, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and contents(folder) == before
    return json.loads(done.stdout)


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_is_one_line_and_exit_code_2(words, answers):
    code, error, output = answers[words]
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert error.startswith("nbdev-trainer: ") and WRONG[words] in error


def test_a_mistake_in_the_installed_command(tmp_path):
    make_inputs(tmp_path)
    before = contents(tmp_path)
    process = run("fit t.csv --target knid", tmp_path)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (2, "", 1)
    assert "Traceback" not in process.stderr and contents(tmp_path) == before


def test_a_defect_of_the_library_shows_its_traceback(tmp_path):
    program = """
import sys, nbdev_trainer.cli as cli
def broken(history): raise ValueError("a defect")
cli.curves_svg = broken
sys.exit(cli.main(["fit", "--epochs", "1", "--device", "cpu", "--out", "run"]))
"""
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 1 and "Traceback" in process.stderr and "a defect" in process.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    command = [COMMAND, *"fit --epochs 5000 --device cpu --out run".split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, text=True, **pipes)
    try:
        history, deadline = tmp_path / "run" / "history.jsonl", time.monotonic() + 40
        while not (history.exists() and history.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in error
    expected = r"interrupted after \d+ of 5,000 epochs; kept config.json and history.jsonl in run\n"
    assert re.search(expected + "$", error)
    assert "SIGINT: the batch in hand is finished, then the " in error
    assert files_of(tmp_path / "run") == ["checkpoints", "config.json", "fits.jsonl", "history.jsonl", "steps.jsonl"]
    assert len(history.read_text().splitlines()) >= 1


def test_check_finds_what_is_odd_and_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["check"]) == 0
    assert "nothing odd was found" in capsys.readouterr().out
    rows = [f"{i % 7},2020,{i * 10}" for i in range(60)] + ["3,2020,50"] * 2
    (tmp_path / "odd.csv").write_text("\n".join(["rooms,year,price", *rows]) + "\n")
    assert main(["check", "odd.csv", "--target", "price"]) == 1
    out = capsys.readouterr().out
    assert "one value only (1): year" in out and "with another target" in out
    assert [path.name for path in tmp_path.iterdir()] == ["odd.csv"]


def test_env_names_versions_devices_and_settings_and_no_path(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"- torch: {torch.__version__}" in out and "- cpu: " in out and "### Settings" in out
    assert str(Path.home()) not in out


def test_predict_answers_for_the_rest_when_a_file_cannot_be_read(monkeypatch, capsys):
    from nbdev_trainer import cli
    rows = [{"sample": "a.png", "label": "ant", "problem": ""}, {"sample": "b.png", "problem": "UnidentifiedImageError"}]
    monkeypatch.setattr(cli, "predict_with", lambda run, data: rows)
    assert cli.predict("run", "photos") == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["sample,label,problem", "a.png,ant,", "b.png,,UnidentifiedImageError"]
    assert printed.err == "1 file could not be read\n"
