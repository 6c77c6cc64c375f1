"""`check`, `overfit`, `dry_run` and `summary` leave no trace, also where a run has files, workers or a memory of its own."""

import numpy as np
import pytest
import torch
from helpers import one_thread as one_thread
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbdev_trainer import Callback, CSVTable, JSONLines, Learner, Loaders, Run, StepOutput, TensorBoard
from nbdev_trainer.loop.steps import Step

INPUTS = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
CLASSES = INPUTS[:, :3].argmax(1)
LOOKS = ("check", "overfit", "dry_run", "summary")


def make(loaders=None, **options):
    torch.manual_seed(0)
    loaders = loaders or Loaders.from_arrays(INPUTS, CLASSES, valid=0.25, batch_size=12, seed=0)
    options = {"loss_fn": nn.CrossEntropyLoss(), "lr": 0.1, "optimizer": torch.optim.SGD} | options
    return Learner(nn.Linear(4, 3), loaders, device="cpu", verbose=0, **options)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("run_dir", ["first", "runs/first", "many/runs/first"])
def test_a_dry_run_writes_nothing_where_the_run_will_be(tmp_path, monkeypatch, run_dir):
    monkeypatch.chdir(tmp_path)
    learner = make(run_dir=run_dir)
    report = learner.dry_run()
    assert report.ok and "config.json" in report.stages["files"] and files_below(tmp_path) == []
    learner.fit(1)
    assert Run.open(run_dir).history.rows == learner.history.rows
    if any(isinstance(one, TensorBoard) for one in learner.trainer.callbacks):
        assert len(list((tmp_path / run_dir / "tensorboard").iterdir())) == 1
    before = files_below(tmp_path)
    assert learner.dry_run().ok and files_below(tmp_path) == before


@pytest.mark.parametrize("kind", [JSONLines, CSVTable])
def test_a_directory_that_is_missing_is_told_by_a_dry_run(tmp_path, kind):
    learner = make(callbacks=[kind(tmp_path / "missing" / "rows")])
    with pytest.raises(FileNotFoundError, match="there is no directory") as caught:
        learner.dry_run()
    assert str(tmp_path / "missing") in str(caught.value)
    assert any("stands for '/'" in note for note in caught.value.__notes__)
    assert files_below(tmp_path) == []


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        return INPUTS[i] + torch.randn(4), CLASSES[i]


def weights_after(look, **options):
    loader = DataLoader(Noisy(), 12, shuffle=True, num_workers=1, persistent_workers=True)
    learner = make((loader, [(INPUTS, CLASSES)]), **options)
    if look:
        assert getattr(learner, look)() is not None
    learner.fit(2)
    return learner.model.weight.detach().clone()


def test_workers_that_stay_go_on_as_if_nobody_had_looked():
    plain = weights_after(None)
    for look in LOOKS:
        assert torch.equal(weights_after(look), plain), look
    assert torch.equal(weights_after(None, loss_fn=None), plain)  # a look at the targets


class Remembers(Step):
    """As a teacher with a centre, or a queue of negatives: state in plain attributes."""

    def __init__(self):
        self.centre, self.queue, self.counts, self.n = torch.zeros(3), [], {"rows": np.zeros(2)}, 0

    def train(self, trainer, batch):
        predictions = trainer.model(batch.inputs)
        self.centre += predictions.detach().mean(0)
        self.queue.append(self.centre.clone())
        self.counts["rows"] += 1
        self.n += 1
        return StepOutput(nn.functional.cross_entropy(predictions, batch.targets), predictions)


class Collects(Callback):
    def __init__(self):
        self.seen, self.total = {"losses": []}, torch.zeros(())

    def after_batch(self, trainer):
        self.seen["losses"].append(trainer.state.output.loss)
        self.total += trainer.state.output.loss.detach()


@pytest.mark.parametrize("look", LOOKS[:3])
def test_what_a_step_and_a_callback_remember_is_put_back(look):
    step, callback = Remembers(), Collects()
    learner = make(step=step, loss_fn=None, callbacks=[callback])
    getattr(learner, look)()
    assert (step.centre.tolist(), step.queue, step.n, step.counts["rows"].tolist()) == ([0, 0, 0], [], 0, [0, 0])
    assert (callback.seen, callback.total.item()) == ({"losses": []}, 0)


def test_a_broken_sample_is_not_called_an_empty_loader():
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            raise KeyError("image_17.png")

    learner = make((DataLoader(Broken(), 4), None))
    with pytest.raises(KeyError, match="image_17.png"):
        learner.overfit()


def test_overfit_says_how_many_batches_it_learned():
    data = DataLoader(TensorDataset(INPUTS, CLASSES), 4)
    assert make((data, None)).overfit(5, steps=10).title == "overfit 5 batches"
    assert make((data, None)).overfit(50, steps=12).title == "overfit 12 batches"


def test_a_model_that_has_learned_all_can_still_learn_by_heart():
    learner = make(lr=1.0, optimizer=torch.optim.Adam)
    learner.fit(60)
    assert learner.overfit(steps=20).ok
    negative = make(loss_fn=lambda predictions, targets: nn.functional.cross_entropy(predictions, targets) - 9)
    assert negative.overfit(steps=20).ok
