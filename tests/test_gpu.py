"""On a GPU: bf16 beside exact arithmetic, and steps in which the host waits for nothing."""

import pytest
import torch
from torch import nn

from nbdev_trainer import EMA, Accuracy, Callback, Learner, Loaders

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

torch.manual_seed(0)
IMAGES = torch.randn(160, 3, 8, 8)
LABELS = IMAGES[:, :, :4].mean((2, 3)).argmax(1)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(256, 3))


def sgd(params, lr): return torch.optim.SGD(params, lr=lr, momentum=0.9)


def trained(device, **options):
    loaders = Loaders.from_arrays(IMAGES, LABELS, valid=(IMAGES, LABELS), batch_size=16, seed=0)
    learner = Learner(network(), loaders, nn.CrossEntropyLoss(), device=device, optimizer=sgd, lr=0.01, verbose=0,
                      metrics=[Accuracy()], default_callbacks=False, **options)
    learner.fit(2)
    return learner


@pytest.mark.parametrize("options, tolerance", [
    ({"precision": "64"}, 1e-8), ({"precision": "32"}, 0.05), ({"precision": "bf16"}, 0.1),  # "32": cuDNN rounds to TF32
    ({"precision": "bf16", "memory_format": "channels_last"}, 0.1), ({"precision": "bf16", "accumulate": 2}, 0.1)], ids=str)
def test_a_fit_goes_where_exact_arithmetic_goes(options, tolerance):
    exact = trained("cpu", **{**options, "precision": "64", "memory_format": None})
    learner = trained(DEVICE, **options)
    parameters = zip(learner.model.parameters(), exact.model.parameters(), network().double().parameters(), strict=True)
    for ours, right, start in parameters:
        assert ours.device.type == DEVICE
        assert (ours.detach().cpu().double() - right).norm() < tolerance * (right - start).norm()
    assert abs(learner.validate()["loss"] - exact.validate()["loss"]) < tolerance


class Forbidden(Callback):
    "From the third batch to the eighth, whatever waits for the device is an error of torch"

    def __init__(self): self.steps = 0

    def after_batch(self, trainer):
        if trainer.state.batch == 3: torch.cuda.set_sync_debug_mode("error")
        self.steps += torch.cuda.get_sync_debug_mode() == 2
        if trainer.state.batch == 8: torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def forbidden():
    yield Forbidden()
    torch.cuda.set_sync_debug_mode("default")


def fit_under(forbidden, callbacks=(), **options):
    batches = [(IMAGES[:16].pin_memory(), LABELS[:16].pin_memory()) for _ in range(10)]
    learner = Learner(network(), (batches, None), nn.CrossEntropyLoss(), device=DEVICE, lr=0.01, verbose=0,
                      default_callbacks=False, callbacks=[*callbacks, forbidden], **options)
    learner.fit(1)


OPTIONS = {"plain": {}, "bf16": {"precision": "bf16"}, "accumulated and clipped": {"accumulate": 2, "clip_norm": 1.0},
           "channels last": {"memory_format": "channels_last"}, "averaged": {"metrics": [Accuracy()], "callbacks": [EMA(0.9)]}}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_host_waits_for_nothing_in_a_step(forbidden, name):
    fit_under(forbidden, **OPTIONS[name])
    assert forbidden.steps == 6


def test_a_callback_that_waits_is_found(forbidden):
    class Reads(Callback):
        def after_batch(self, trainer): trainer.state.output.loss.item()

    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"): fit_under(forbidden, [Reads()])
