"""Runs of a learner whose weights may be divided over processes; each returns what is compared."""

import shutil

import torch
from scenarios import data, whole
from torch import nn
from torch.nn import functional as F

from nbdev_trainer import EMA, Callback, Checkpoint, Learner, Loaders
from nbdev_trainer.scale.processes import has_group


class Stop(Callback):
    """Ends the fit as a crash would, so that nothing more is saved."""

    def __init__(self, batch):
        self.batch = batch

    def after_batch(self, trainer):
        if trainer.state.batch == self.batch:
            raise KeyError("as a crash")


def learner_for(strategy="auto", run_dir=None, stop=0, accumulate=1, every="2ba", average=True, loaders=None, **options):
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(7, 7), nn.Tanh())
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), inner, nn.Linear(7, 3)).double()
    callbacks = [EMA(0.9)] if average else []
    if stop:
        callbacks.append(Stop(stop))
    if run_dir is not None:
        callbacks.append(Checkpoint(every=every, keep_last=10))
    return Learner(model, loaders or data(n=29, batch_size=4), F.cross_entropy, lr=0.05, device="cpu", seed=5, strategy=strategy, verbose=0,
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


def whole_then_stopped(run_dir):
    """What an undisturbed run reaches; and another one, which ends at batch 11."""
    found = train("fsdp")
    train("fsdp", run_dir, stop=11)
    return found


def nothing_for_rank_0(strategy, run_dir=None, stop=0, resume=False, **options):
    """In the first batch of a window of three nothing counts of what the first of two processes sees."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(24, 5, generator=generator).double(), torch.randint(3, (24,), generator=generator)
    loaders = Loaders.from_arrays(inputs, targets, batch_size=4, seed=3)
    seen = list(loaders.train.shard(0, 2).batches(0))[3].ids
    targets[seen] = -100
    options["loaders"] = Loaders.from_arrays(inputs, targets, batch_size=4, seed=3)
    learner = learner_for(strategy, run_dir, stop, accumulate=3, every="4ba", average=False, **options)
    try:
        learner.fit(1, resume=resume)
    except KeyError:
        return None
    return result(learner)


def looks():
    """What looks into a run finds nothing wrong with one whose weights are divided."""
    from nbdev_trainer import BadBatches, GradientNorms, NonFinite

    learner = learner_for("fsdp", average=False)
    found = {"parameters": learner.summary().layers[0].n_parameters, "findings": learner.check().names}
    learner.dry_run()
    for one in (BadBatches("skip"), NonFinite(), GradientNorms()):
        learner.fit(1, callbacks=[one])
    return found


def goes_on_from_loaded_averages(path):
    """Averages of a file are divided as the weights are, and go on."""
    learner = learner_for("fsdp")
    learner.fit(1)
    learner.save(path)
    learner.load(path)
    learner.validate()
    learner.fit(1)
    return result(learner)


def refused(what):
    """A second learner on a model that is divided; an optimizer that needs whole weights; a directory that is gone."""
    first = learner_for("fsdp", what if what != "Adafactor" and what != "second" else None, average=False)
    if what == "second":
        Learner(first.model, data(), F.cross_entropy, device="cpu", strategy="fsdp", verbose=0)
    elif what == "Adafactor":
        model = nn.Linear(5, 3)
        Learner(model, data(), F.cross_entropy, optimizer=torch.optim.Adafactor(model.parameters()), device="cpu",
                strategy="fsdp", verbose=0).fit(1)
    else:
        rank_0 = first.trainer.engine.strategy.rank == 0
        def remove(trainer):
            if trainer.state.batch == 3 and rank_0:
                for one in first.trainer.callbacks:
                    if isinstance(one, Checkpoint):
                        one.settle()
                        shutil.rmtree(one.directory)
        first.trainer.on("after_batch", remove)
        first.fit(1)


def save_and_load(path):
    """Weights and averages into one file, and from it into another learner with divided weights."""
    learner = learner_for("fsdp")
    learner.fit(1)
    learner.save(path)
    other = learner_for("fsdp")
    other.load(path)
    assert has_group()
    return result(learner), result(other)
