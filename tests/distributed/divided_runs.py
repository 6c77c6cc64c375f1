"""Runs of a learner whose weights may be divided over processes; each returns what is compared."""

import torch
from scenarios import data, whole
from torch import nn
from torch.nn import functional as F

from nbdev_trainer import EMA, Callback, Learner
from nbdev_trainer.scale.processes import has_group


class Stop(Callback):
    """Ends the fit as a crash would, so that nothing more is saved."""

    def __init__(self, batch):
        self.batch = batch

    def after_batch(self, trainer):
        if trainer.state.batch == self.batch:
            raise KeyError("as a crash")


def learner_for(strategy="auto", run_dir=None, stop=0, accumulate=1, every="2ba", average=True, **options):
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(7, 7), nn.Tanh())
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), inner, nn.Linear(7, 3)).double()
    callbacks = [EMA(0.9)] if average else []
    if stop:
        callbacks.append(Stop(stop))
    from nbdev_trainer import Checkpoint
    if run_dir is not None:
        callbacks.append(Checkpoint(every=every, keep_last=10))
    return Learner(model, data(n=29, batch_size=4), F.cross_entropy, lr=0.05, device="cpu", seed=5, strategy=strategy, verbose=0,
                   run_dir=run_dir, callbacks=callbacks, accumulate=accumulate, **options)


def result(learner):
    weights = {name: whole(one) for name, one in learner.model.state_dict().items()}
    averages = [{name: whole(one) for name, one in callback.averages.items()} for callback in learner.trainer.callbacks
                if isinstance(callback, EMA)]
    state = learner.trainer.state
    return {"weights": weights, "averages": averages, "metrics": dict(state.metrics),
            "counters": (state.epoch, state.batch, state.step, state.samples)}


def train(strategy="auto", run_dir=None, stop=0, resume=False, epochs=2, **options):
    learner = learner_for(strategy, run_dir, stop, **options)
    try:
        learner.fit(epochs, resume=resume)
    except KeyError:
        return None
    return result(learner)


def save_and_load(path):
    """Weights and averages into one file, and from it into another learner with divided weights."""
    learner = learner_for("fsdp")
    learner.fit(1)
    learner.save(path)
    other = learner_for("fsdp")
    other.load(path)
    assert has_group()
    return result(learner), result(other)
