"""A run in a directory: what is kept, what a kill leaves, how it is read, and what a notebook shows of it."""

import json
import os
import signal
import subprocess
import sys
import time

import IPython.display
import pytest
import torch
from helpers import one_thread as one_thread
from torch import nn

from nbdev_trainer import EMA, Accuracy, Checkpoint, History, Learner, Loaders, Progress, Run, TensorBoard
from nbdev_trainer.callbacks import progress
from nbdev_trainer.core.errors import MissingPackage
from nbdev_trainer.store import history as history_module


@pytest.fixture
def loaders():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 4, generator=generator)
    return Loaders.from_arrays(inputs, inputs[:, :3].argmax(1), valid=0.25, batch_size=15, seed=0)


def make(loaders, run_dir=None, **options):
    torch.manual_seed(0)
    options = {"device": "cpu", "metrics": [Accuracy()], "lr": 0.1, "optimizer": torch.optim.SGD} | options
    return Learner(nn.Linear(4, 3), loaders, nn.CrossEntropyLoss(), run_dir=run_dir, verbose=0, **options)


def files_of(directory):
    return sorted(path.name for path in directory.iterdir() if path.name != "tensorboard")


def test_a_run_can_be_opened_as_the_learner_saw_it(loaders, tmp_path):
    learner = make(loaders, tmp_path / "run", seed=3, config={"data": "made up", "layers": [4, 3]})
    learner.fit_one_cycle(3, lr=0.5)
    learner.fit(1)
    run = Run.open(tmp_path / "run")
    assert run.history.rows == learner.history.rows and run.history.steps == learner.history.steps
    expected = {"data": "made up", "layers": [4, 3], "model": "Linear", "n_parameters": 15, "seed": 3}
    expected |= {"loss": "CrossEntropyLoss()", "optimizer": "SGD", "lr": 0.5, "batch_size": 15, "n_train": 45}
    assert {name: run.config[name] for name in expected} == expected
    assert run.config["versions"]["torch"] == torch.__version__
    assert files_of(run.directory) == ["checkpoints", "config.json", "fits.jsonl", "history.jsonl", "steps.jsonl"]


def test_keeping_a_run_does_not_change_its_weights(loaders, tmp_path):
    kept, plain = make(loaders, tmp_path / "run", seed=0), make(loaders, seed=0)
    for learner in (kept, plain):
        learner.fit(3)
    assert torch.equal(kept.model.weight, plain.model.weight)


def test_a_directory_with_a_run_is_refused_before_training(loaders, tmp_path):
    make(loaders, tmp_path / "run").fit(1)
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(FileExistsError, match="holds a run already.*resume=True"):
        make(loaders, tmp_path / "run").fit(1)
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_other_files_in_the_directory_are_left_alone(loaders, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    make(loaders, tmp_path).fit(1)
    assert (tmp_path / "note.txt").read_text() == "mine" and Run.open(tmp_path).history["epoch"] == [1]


def test_a_mistake_found_at_the_first_batch_leaves_nothing(loaders, tmp_path):
    learner = make([([torch.ones(2, 7)], torch.ones(2).long())] * 2, tmp_path / "run")
    with pytest.raises(Exception):  # noqa: B017  whatever the model raises
        learner.fit(1)
    assert not (tmp_path / "run").exists()


def test_a_stop_and_its_reason_are_kept(loaders, tmp_path):
    learner = make(loaders, tmp_path / "run")
    learner.on("after_batch", lambda trainer: trainer.stop("enough"), after="4ba")
    learner.fit(9)
    assert [entry["why"] for entry in Run.open(tmp_path / "run").history.control] == ["enough"]


def test_what_is_no_number_is_kept_as_json_and_read_as_nan(loaders, tmp_path):
    learner = make(loaders, tmp_path / "run")
    values = iter([1.0, float("nan"), float("inf")])
    learner.on("before_epoch", lambda trainer: trainer.log("ratio", next(values)))
    learner.fit(3)
    for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    ratios = Run.open(tmp_path / "run").history["ratio"]
    assert ratios[0] == 1.0 and all(ratio != ratio for ratio in ratios[1:])


KILLED = """
import torch, time
from torch import nn
from nbdev_trainer import Learner, Loaders
inputs = torch.randn(64, 4)
loaders = Loaders.from_arrays(inputs, inputs[:, :3].argmax(1), valid=0.25, batch_size=2, seed=0)
Learner(nn.Linear(4, 3), loaders, nn.CrossEntropyLoss(), run_dir="run", device="cpu").fit(100_000)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_run_can_be_opened_while_it_goes_on_and_after_a_kill(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED], cwd=tmp_path, stdout=subprocess.DEVNULL)
    lengths = []
    try:
        deadline = time.monotonic() + 60
        while len(lengths) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
            if (tmp_path / "run" / "config.json").exists():
                length = len(Run.open(tmp_path / "run").history)
                if length and length not in lengths:
                    lengths.append(length)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=20)
    finally:
        process.kill()
        process.wait()
    run = Run.open(tmp_path / "run")
    assert len(lengths) == 3 and len(run.history) >= lengths[-1]
    assert run.history["epoch"] == list(range(1, len(run.history) + 1))
    assert run.history.steps


def test_every_cut_of_a_history_can_be_read(tmp_path):
    lines = [json.dumps({"epoch": k, "batch": 10 * k, "train_loss": 1 / k}) for k in range(1, 4)]
    data = ("\n".join(lines) + "\n").encode()
    path = tmp_path / "history.jsonl"
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        run = Run.open(tmp_path)
        whole = data[:length].count(b"\n") + (length and data[length - 1 : length] == b"}")
        assert len(run.history) == whole, data[:length]
        assert bool(run.cut_off) == (0 < length and data[length - 1 : length] not in (b"\n", b"}"))


def test_runs_in_a_table(loaders, tmp_path):
    for lr in (0.01, 1.0, 0.1):
        make(loaders, tmp_path / f"lr {lr}", lr=lr).fit(3)
    (tmp_path / "no run").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    table = Run.table(tmp_path)
    assert [run.name for run in table] == ["lr 0.01", "lr 0.1", "lr 1.0"]
    assert list(table.problems) == ["broken"] and "not valid JSON" in table.problems["broken"]
    losses = [row["best_valid_loss"] for row in table.sort("best_valid_loss").rows]
    assert losses == sorted(losses) == [min(run.history["valid_loss"]) for run in table.sort("best_valid_loss")]
    assert table.rows[0]["best_valid_accuracy"] == max(table.runs[0].history["valid_accuracy"])
    with pytest.raises(KeyError, match="Did you mean 'best_valid_loss'"):
        table.sort("best_loss")
    assert len({len(line) for line in repr(table).splitlines()[:2]}) <= 2
    assert "<table>" in table._repr_html_()


def test_tensorboard_comes_with_a_run_directory_where_it_is_installed(loaders, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    torch.manual_seed(0)
    options = {"device": "cpu", "lr": 0.1, "optimizer": torch.optim.SGD}
    model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
    Learner(model, loaders, loss_fn, run_dir=tmp_path / "run", **options).fit(1)
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert capsys.readouterr().out.count("tensorboard --logdir") == 1

    own = make(loaders, tmp_path / "own", callbacks=[TensorBoard(tmp_path / "elsewhere")])
    assert [type(one) for one in own.trainer.callbacks].count(TensorBoard) == 1
    monkeypatch.setattr("nbdev_trainer.learner.find_spec", lambda name: None)
    without = make(loaders, tmp_path / "without")
    assert not any(isinstance(one, TensorBoard) for one in without.trainer.callbacks)
    assert not any(isinstance(one, TensorBoard) for one in make(loaders).trainer.callbacks)


def test_facts_without_a_directory_are_an_error(loaders):
    with pytest.raises(ValueError, match="pass run_dir="):
        make(loaders, config={"data": "made up"})


def test_plot_shows_loss_metrics_and_rates_of_several_runs(loaders):
    a, b = make(loaders), make(loaders, lr=0.5)
    for learner in (a, b):
        learner.fit_one_cycle(3)
    axes = a.history.plot(others={"lr 0.5": b.history})
    assert [ax.get_title() for ax in axes] == ["loss", "accuracy", "lr"]
    assert [line.get_label() for line in axes[2].get_lines()] == ["this run", "lr 0.5"]
    assert len(axes[2].get_lines()[0].get_xdata()) == len(a.history.steps)
    with pytest.raises(ValueError, match="Did you mean 'accuracy'"):
        a.history.plot(["acuracy"])


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    run = History()
    run.put({"epoch": 1, "batch": 1, "train_loss": 1.0})

    def missing(module, *, extra, why):
        raise MissingPackage(f"{why} needs {module}: [{extra}]", name=module)

    monkeypatch.setattr(history_module, "require", missing)
    with pytest.raises(ImportError, match=r"History.plot needs matplotlib.pyplot: \[plot\]"):
        run.plot()


class Shown:
    """Stands for an output of a notebook."""

    def __init__(self, data):
        self.data = [data]

    def update(self, data, raw):
        self.data.append(data)


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook would have been sent, output by output: table, curves, bar."""
    outputs = []

    def display(data, raw, display_id):
        outputs.append(Shown(data))
        return outputs[-1]

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(progress, "open_display", lambda file, curve: progress.Notebook(curve))
    return outputs


def test_a_notebook_ends_with_the_table_and_the_curves_of_the_run(loaders, notebook):
    learner = make(loaders, callbacks=[Progress()])
    learner.fit(30)
    table, curves = notebook[:2]
    assert table.data[-1]["text/html"].count("<tr>") == 31
    assert "valid_loss" in table.data[-1]["text/plain"]
    picture = curves.data[-1]["image/svg+xml"]
    assert ">accuracy</text>" in picture and picture.count("<polyline") == 4
    assert all(shown.data[-1] == {"text/html": "", "text/plain": ""} for shown in notebook[2:])


def test_a_notebook_is_sent_little_while_it_trains(loaders, notebook):
    make(loaders, callbacks=[Progress()]).fit(300)
    assert sum(len(shown.data) for shown in notebook[:2]) <= 12  # and not two for each of 300 rows


def test_a_notebook_without_curves(loaders, notebook):
    make(loaders, callbacks=[Progress(curve=False)]).fit(3)
    assert not any("image/svg+xml" in data for shown in notebook for data in shown.data)


def test_an_interrupted_fit_leaves_table_and_curves_but_no_bar(loaders, notebook):
    def interrupt(trainer):
        raise KeyboardInterrupt

    learner = make(loaders, callbacks=[Progress(interval=0)])
    learner.on("after_batch", interrupt, after="8ba")
    with pytest.raises(KeyboardInterrupt):
        learner.fit(5)
    table, curves, bar = notebook
    assert table.data[-1]["text/html"].count("<tr>") == 1 + len(learner.history)
    assert "image/svg+xml" in curves.data[-1]
    assert bar.data[-1] == {"text/html": "", "text/plain": ""}


def test_the_best_checkpoint_is_known_and_loaded_with_its_averages(loaders, tmp_path):
    learner = make(loaders, tmp_path / "run", callbacks=[EMA(0.5), Checkpoint(best="valid_loss", higher_is_better=True)])
    learner.fit(4)
    run = Run.open(tmp_path / "run")
    worst = max(range(4), key=lambda k: learner.history["valid_loss"][k])
    assert run.best.name == f"ba-{learner.history['batch'][worst]:06}"
    fresh = make(loaders)
    assert fresh.load(run.best, averaged=True).complete
    assert fresh.validate()["loss"] == pytest.approx(learner.history["valid_loss"][worst], rel=1e-6)
    with pytest.raises(IsADirectoryError, match="directory of a run; expected one of its checkpoints"):
        fresh.load(tmp_path / "run")
    best = run.best
    (best / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged: model.safetensors has 7 bytes"):
        fresh.load(best)


def test_a_finished_fit_of_another_length_is_refused(loaders, tmp_path):
    make(loaders, tmp_path / "run").fit(2)
    with pytest.raises(ValueError, match="fit 1 of this run was for 2ep and is finished; this one is for 3ep"):
        make(loaders, tmp_path / "run").fit(3, resume=True)
    again = make(loaders, tmp_path / "run")
    again.fit(2, resume=True)
    again.fit(1, resume=True)
    assert again.trainer.state.epoch == 3


@pytest.mark.parametrize("resume", ["runs/old", 1, None])
def test_resume_is_true_or_false(loaders, resume):
    with pytest.raises(TypeError, match="resume is .*expected True or False"):
        make(loaders).fit(1, resume=resume)


def test_the_arguments_of_a_loss_decide_the_result(loaders, tmp_path):
    make(loaders, tmp_path / "run").fit(1)
    for loss, found in (
        (nn.CrossEntropyLoss(label_smoothing=0.1), "loss with label_smoothing was 0.0, is now 0.1"),
        (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 1.0])), r"loss with weight was None, is now \[1.0, 2.0, 1.0\]"),
    ):
        other = Learner(nn.Linear(4, 3), loaders, loss, run_dir=tmp_path / "run", verbose=0, device="cpu", lr=0.1,
                        metrics=[Accuracy()], optimizer=torch.optim.SGD)  # fmt: skip
        with pytest.raises(ValueError, match=found):
            other.fit(1, resume=True)


def test_another_optimizer_is_one_difference(loaders, tmp_path):
    make(loaders, tmp_path / "run").fit(1)
    with pytest.raises(ValueError, match="began: optimizer main kind was 'SGD', is now 'Adam'. Build"):
        make(loaders, tmp_path / "run", optimizer=torch.optim.Adam).fit(1, resume=True)


def test_persistent_workers_cannot_be_continued(tmp_path):
    data = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.arange(12) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True)
    make((list(loader), None), tmp_path / "run").fit(1)
    with pytest.raises(ValueError, match="persistent_workers=True, which draws its seed at another moment"):
        make((loader, None), tmp_path / "run").fit(1, resume=True)


def test_what_is_frozen_is_part_of_a_fit(loaders, tmp_path):
    def two_layers(run_dir):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        return Learner(model, loaders, nn.CrossEntropyLoss(), run_dir=run_dir, verbose=0, device="cpu", lr=0.1)

    first = two_layers(tmp_path / "run")
    first.freeze("0")
    first.on("after_batch", lambda trainer: 1 / 0, after="3ba")
    with pytest.raises(ZeroDivisionError):
        first.fit(2, callbacks=[])
    again = two_layers(tmp_path / "run")
    again.on("after_batch", lambda trainer: None, after="3ba")
    with pytest.raises(ValueError, match="0 was frozen then, nothing is now"):
        again.fit(2, resume=True)


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_fine_tuning_goes_on_in_the_same_process(loaders, batch):
    def tuned(cut):
        torch.manual_seed(0)
        learner = Learner(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), loaders, nn.CrossEntropyLoss(), verbose=0, device="cpu",
                          seed=0)  # fmt: skip

        def cut_off(trainer):
            raise KeyboardInterrupt

        if cut:
            learner.on("after_batch", cut_off, once=True, after=f"{cut}ba")
            with pytest.raises(KeyboardInterrupt):
                learner.fine_tune(2)
        learner.fine_tune(2, resume=bool(cut))
        return learner.model[0].weight

    assert torch.equal(tuned(batch), tuned(None))
