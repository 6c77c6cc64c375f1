"""Processes that do not all do the same, and runs that go on with another number of them; each function runs in all of them."""

import torch
from scenarios import data
from torch import nn, optim
from torch.nn import functional as F

from nbdev_trainer import AUROC, Accuracy, F1Score, Learner, Loaders, ManualStep, Metric, Replicas, Shards, StepOutput
from nbdev_trainer.loop.steps import SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.scale.processes import join


def trainer_of(**options):
    torch.manual_seed(1)
    model = nn.Linear(5, 3).double()
    strategy = options.pop("strategy", None) or Replicas(join(timeout="20s"))
    return Trainer(model, SupervisedStep(F.cross_entropy), optim.SGD(model.parameters(), lr=0.1), strategy=strategy, **options)


def is_asked_alone():
    """Each process is asked for as many epochs as its rank says."""
    trainer, loaders = trainer_of(), data()
    trainer.fit(loaders.train, None, 1 + trainer.engine.strategy.rank)


def changes_a_rate_alone(rank, at="after_batch", **changed):
    """A callback changes a learning rate, or what else is given, on one process, in the second epoch."""
    trainer, loaders = trainer_of(), data()

    def change(one):
        if one.state.epoch == 1 and one.engine.strategy.rank == rank:
            one.engine.slots["main"].optimizer.param_groups[0].update(changed or {"lr": 0.05})

    trainer.on(at, change)

    def run():
        trainer.fit(loaders.train, loaders.valid, 3)

    return told_all(run), trainer.state.epoch


def logs_alone(rank, epochs=1):
    """One process logs a number, the others do not."""
    trainer, loaders = trainer_of(), data()
    if trainer.engine.strategy.rank == rank:
        trainer.on("after_batch", lambda one: one.log("mine", 1.0))
    trainer.fit(loaders.train, None, epochs)


def told_all(fn):
    """What a function returns or raises, on each process."""
    try:
        found = fn()
    except (ValueError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
    return join(timeout="20s").gather(found)


class ByHand(ManualStep):
    """A step of two optimizers, in an order that may be another on each process, or by themselves."""

    def __init__(self, order=("first", "second"), alone=False):
        self.order, self.alone = order, alone

    def train(self, trainer, batch):
        for name in self.order:
            loss = F.cross_entropy(trainer.model(batch.inputs), batch.targets)
            if self.alone:
                loss.backward()
                trainer.engine.slots[name].optimizer.step()
            elif name:
                trainer.optimize(loss, name)
        return StepOutput(loss=loss.detach())


def by_hand(order_on_rank_1=("first", "second"), alone=False):
    """What is told; a name that is None is a call that is left out."""
    strategy = Replicas(join(timeout="20s"))
    step = ByHand(order_on_rank_1, alone) if strategy.rank == 1 else ByHand(alone=alone)
    torch.manual_seed(1)
    model = nn.Linear(5, 3).double()
    optimizers = {name: optim.SGD([p], lr=0.1) for name, p in zip(("first", "second"), model.parameters())}
    trainer = Trainer(model, step, optimizers, strategy=strategy)
    return told_all(lambda: trainer.fit(data().train, None, 1) and trainer.state.step)


def freezes_alone():
    trainer = trainer_of()
    trainer.model.bias.requires_grad_(trainer.engine.strategy.rank == 0)
    return told_all(lambda: trainer.fit(data().train, None, 1))


class Highest(Metric):
    def __init__(self):
        super().__init__()
        self.most = torch.zeros(())

    def update(self, output, batch):
        self.most = torch.maximum(self.most, output.predictions.max())

    def compute(self):
        return self.most


def measures_with_a_graph():
    trainer = trainer_of(metrics=[Highest()])
    return told_all(lambda: trainer.fit(data().train, None, 1))


def some_validate(sizes, strategy=Replicas):
    """Validation data of one's own, so many batches on each rank; and what all have as rank 0 has it."""
    processes, loaders = join(timeout="20s"), data()
    valid = list(loaders.valid.batches(0))[:sizes[processes.rank]]
    trainer = trainer_of(strategy=strategy(processes), metrics=[Accuracy(), F1Score("multiclass", 3), AUROC("multiclass", 3)])

    def run():
        trainer.fit(loaders.train, valid, 1)
        in_fit = {name: one for name, one in trainer.state.metrics.items() if name.startswith("valid_")}
        assert set(in_fit.values()) == set(trainer.evaluate(valid).values())
        return in_fit

    return told_all(run), trainer.evaluate(list(loaders.valid.batches(0))[:max(sizes)])


def nobody_validates():
    """No process has a batch."""
    trainer = trainer_of()
    return told_all(lambda: trainer.evaluate([]))


def trains_on(sizes, strategy=Shards, **options):
    """Training data of one's own, so many batches on each rank."""
    processes = join(timeout="20s")
    batches = list(data().train.batches(0))[:sizes[processes.rank]]
    trainer = trainer_of(strategy=strategy(processes))

    def run():
        trainer.fit(batches, None, 1, **options)
        return trainer.state.batch

    return told_all(run)


def with_norms(run_dir=None, stop=0, resume=False, together=True, n=30, epochs=2, **options):
    """A run with a batch norm, which ends at a batch as a crash would."""
    from divided_runs import Stop, result

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    inputs, targets = torch.randn(n, 5).double(), torch.arange(n) % 3
    loaders = Loaders.from_arrays(inputs, targets, valid=(inputs, targets), batch_size=4, seed=2)
    strategy = Replicas(join(timeout="20s"), **{"sync_batch_norm": True, **options}) if together else None
    learner = Learner(model, loaders, F.cross_entropy, lr=0.05, device="cpu", seed=5, strategy=strategy or "auto", verbose=0,
                      run_dir=run_dir, callbacks=[Stop(stop)] if stop else [])
    try:
        learner.fit(epochs, resume=resume)
    except KeyError:
        return None
    return result(learner)


def has_a_slice_of_its_own():
    """Each process loads its own rows, as many as the other."""
    half = torch.arange(12.0).view(12, 1)[join().rank * 6:][:6]
    loaders = Loaders.from_arrays(half.expand(6, 5), torch.zeros(6, dtype=torch.int64), batch_size=2, seed=0)
    return told_all(lambda: trainer_of().fit(loaders.train, None, 1))
