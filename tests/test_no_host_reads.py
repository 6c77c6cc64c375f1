"""The loop reads nothing from the device between its displays: meta tensors have nothing to read."""

import pytest
import torch
import torchmetrics
from helpers import arrays
from helpers import one_thread as one_thread
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from nbdev_trainer.data.batch import Batch, StepOutput
from nbdev_trainer.data.loaders import Loaders
from nbdev_trainer.loop.callback import Callback
from nbdev_trainer.loop.schedules import linear, one_cycle
from nbdev_trainer.loop.steps import ManualStep, SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.metrics.base import Mean
from nbdev_trainer.metrics.classification import Accuracy, TopKAccuracy
from nbdev_trainer.metrics.confusion import CohenKappa, ConfusionMatrix, F1Score
from nbdev_trainer.metrics.probabilities import CalibrationError, LogLoss
from nbdev_trainer.metrics.ranking import AUROC, AveragePrecision

TARGETS = arrays()[1]


def net():
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(64, 3))


def largest_score(predictions, targets):
    return predictions.amax(1)


def top_score(predictions, targets):
    return predictions.max()


class Both(ManualStep):
    """One optimizer for the convolution, one for the head."""

    def train(self, trainer, batch):
        scores = trainer.model(batch.inputs)
        loss = nn.functional.cross_entropy(scores, batch.targets)
        trainer.optimize(loss, "body", count=(batch.targets >= 0).sum(), retain_graph=True)
        trainer.optimize(loss, "head")
        trainer.log("norm", scores.norm())
        return StepOutput(loss=loss.detach(), predictions=scores, logs={"top": scores.max()})


def weighted(batch):
    inputs, targets = batch
    return Batch(inputs, targets, weights=torch.rand(len(targets)))


RUNS = {  # the loss, and options of trainer and fit
    "all there is": (nn.CrossEntropyLoss(), dict(accumulate=3, clip_norm=1.0), dict(schedule=one_cycle())),
    "ignored targets and class weights": (
        nn.CrossEntropyLoss(torch.ones(3, device="meta"), ignore_index=1),
        dict(accumulate=2),
        {},
    ),
    "sample weights": (nn.CrossEntropyLoss(), dict(accumulate=2, as_batch=weighted), {}),
    "validation at each batch": (nn.CrossEntropyLoss(), {}, dict(validate_every="1ba", schedule=linear())),
    "images with channels side by side": (nn.CrossEntropyLoss(), dict(memory_format="channels_last"), {}),
    "own count": (nn.CrossEntropyLoss(), dict(accumulate=4), {}),
}


def fit_on_meta(loss_fn, options, fit, callbacks=(), step=None):
    """Two epochs with validation and metrics where no number exists."""
    model = net().to("meta")
    optimizers = optim.AdamW(model.parameters(), foreach=True)
    if step:
        optimizers = {
            "body": optim.SGD(model[0].parameters(), 0.1),
            "head": optim.SGD(model[5].parameters(), 0.1),
        }
    else:
        step = SupervisedStep(loss_fn)
    metrics = [
        Accuracy(),
        Accuracy("kept", ignore_index=1),
        TopKAccuracy(2),
        F1Score("multiclass", 3, ignore_index=1),
        CohenKappa("multiclass", 3, distance="linear"),
        ConfusionMatrix("multiclass", 3),
        LogLoss("multiclass", 3),
        CalibrationError("multiclass", 3),
        AUROC("multiclass", 3, n_bins=10),
        AveragePrecision("multiclass", 3),
        largest_score,
    ]
    if "as_batch" not in options:  # a mean over a batch cannot take its weights
        metrics += [top_score, Mean(top_score, name="mean_top")]
    trainer = Trainer(model, step, optimizers, metrics=metrics, callbacks=callbacks, device="meta", **options)
    data = list(zip(arrays()[0].split(8), TARGETS.split(8)))
    trainer.fit(data, None if step.can_evaluate is False else {"clean": data[:2], "noisy": data}, n=2, **fit)
    return trainer


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_fit_reads_nothing_from_the_device(name):
    trainer = fit_on_meta(*RUNS[name])
    assert trainer.state.batch == 10 and trainer.state.epoch == 2
    assert all(p.device.type == "meta" for p in trainer.model.parameters())


def test_a_step_with_two_optimizers_reads_nothing_from_the_device():
    trainer = fit_on_meta(None, dict(accumulate=3, clip_norm=1.0), dict(schedule=linear()), step=Both())
    assert trainer.state.step == 4


def test_metrics_of_torchmetrics_are_not_read_before_the_end():
    model = net().to("meta")
    trainer = Trainer(
        model,
        SupervisedStep(nn.MSELoss()),
        optim.SGD(model.parameters(), 0.1),
        device="meta",
        metrics=[torchmetrics.MeanSquaredError()],
    )
    data = list(zip(arrays()[0].split(8), torch.ones(37, 3).split(8)))
    trainer.fit(data, data, n=2)
    assert trainer.state.batch == 10


READS = {
    "item": lambda loss: loss.item(),
    "float": float,
    "bool": bool,
    "tolist": lambda loss: loss.tolist(),
    "cpu": lambda loss: loss.cpu(),
    "nonzero": lambda loss: loss.nonzero(),
    "mask": lambda loss: loss[loss > 0],
}


@pytest.mark.parametrize("read", READS)
def test_a_callback_that_reads_is_found_at_once(read):
    def look(self, trainer):
        READS[read](trainer.state.output.loss)

    reader = type("Reader", (Callback,), {"after_batch": look})()
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta") as caught:
        fit_on_meta(*RUNS["all there is"], callbacks=[reader])
    assert any("Reader at after_batch" in note for note in caught.value.__notes__)


# ---- on the CPU reads are cheap, and can be counted


class Reads(TorchDispatchMode):
    """Counts the operations that bring a value to the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.equal,
            torch.ops.aten.nonzero,
        ):
            self.count += 1
        return function(*args, **kwargs or {})


def reads_of(n_batches, loss_fn, targets, optimizer=optim.SGD, **options):
    inputs = torch.randn(4 * n_batches, 5)
    loader = Loaders.from_arrays(
        inputs, targets(4 * n_batches), batch_size=4, seed=0, valid=(inputs[:8], targets(8))
    )
    model = nn.Linear(5, 3)
    trainer = Trainer(
        model,
        SupervisedStep(loss_fn),
        optimizer(model.parameters(), lr=0.01),
        metrics=[largest_score],
        **options,
    )
    with Reads() as reads:
        trainer.fit(loader.train, loader.valid, n=2, schedule=linear())
    return reads.count


def classes(n):
    return torch.arange(n) % 3


def numbers(n):
    return torch.ones(n, 3)


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"accumulate": 3, "clip_norm": 1.0}], ids=str)
def test_the_reads_of_an_epoch_do_not_grow_with_its_batches(options):
    assert reads_of(5, nn.MSELoss(), numbers, **options) == reads_of(50, nn.MSELoss(), numbers, **options)


def test_on_the_cpu_cross_entropy_reads_one_count_per_batch_and_no_more():
    grown = reads_of(50, nn.CrossEntropyLoss(), classes) - reads_of(5, nn.CrossEntropyLoss(), classes)
    assert grown <= 2 * 45, "two epochs of 45 batches more"


def test_the_count_of_reads_sees_a_callback_that_reads():
    def look(self, trainer):
        trainer.state.output.loss.item()

    readers = [type("Reader", (Callback,), {"after_batch": look})()]
    assert reads_of(50, nn.MSELoss(), numbers, callbacks=readers) - reads_of(50, nn.MSELoss(), numbers) == 100
