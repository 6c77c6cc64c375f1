"""Runs of two processes in which something happens to one of them; for `launch` and for torchrun."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from nbdev_trainer.callbacks.bad_batches import BadBatches
from nbdev_trainer.callbacks.checkpoint import Checkpoint
from nbdev_trainer.data.loaders import Loaders
from nbdev_trainer.learner import Learner
from nbdev_trainer.loop.callback import Callback
from nbdev_trainer.loop.steps import SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.metrics.classification import Accuracy
from nbdev_trainer.metrics.regression import MeanAbsoluteError
from nbdev_trainer.scale.processes import has_group, join
from nbdev_trainer.scale.replicas import Replicas
from nbdev_trainer.scale.shards import Shards


def rank():
    return dist.get_rank() if has_group() else 0


class At(Callback):
    """Does something on one rank after some batch."""

    def __init__(self, batch, do, on=1):
        self.batch, self.do, self.on = batch, do, on

    def after_batch(self, trainer):
        if trainer.state.batch == self.batch and rank() == self.on:
            self.do(trainer)


def kill(trainer):
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def fail(trainer):
    raise ValueError("the label of sample 7 is missing")


def hang(trainer):
    time.sleep(60)


def ask_to_end(trainer):
    os.kill(os.getpid(), signal.SIGTERM)


def ask_to_stop(trainer):
    trainer.stop("seen enough")


def arrays(n=40):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=generator).double(), torch.randint(3, (n,), generator=generator)


def learner_of(run_dir=None, dropout=0.0, strategy="auto", metrics=None, data=None, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)).double()
    data = data or Loaders.from_arrays(*arrays(), valid=(arrays()[0][:7], arrays()[1][:7]), batch_size=8, seed=3)
    metrics = [Accuracy()] if metrics is None else metrics
    return Learner(model, data, nn.CrossEntropyLoss(), optimizer=lambda params, lr=None: optim.Adam(params, lr=0.02),
                   metrics=metrics, strategy=strategy, seed=5, run_dir=run_dir, verbose=1, **options)


def weights(learner):
    return {name: one.clone() for name, one in learner.model.state_dict().items()}


class Slow(Callback):
    only_watches = True

    def __init__(self, seconds):
        self.seconds = seconds

    def after_batch(self, trainer):
        time.sleep(self.seconds)


def train(run_dir=None, epochs=3, callbacks=(), resume=False, slow=None, **options):
    if slow:
        callbacks = [*callbacks, Slow(slow)]
    learner = learner_of(run_dir, callbacks=list(callbacks), **options)
    learner.fit(epochs, resume=resume)
    state = learner.trainer.state
    return weights(learner), dict(state.metrics), list(state.control), state.samples


def on_rank_1(do, batch=7, timeout="20s", **options):
    """Train while `do` happens to rank 1 after a batch."""
    strategy = Replicas(join(timeout=timeout))
    return train(callbacks=[At(batch, do), *options.pop("callbacks", ())], strategy=strategy, **options)


def alone_on_rank_0(what, file):
    """What the other rank does not do, and ends."""
    strategy = (Shards if what == "save" else Replicas)(join(timeout="20s"))
    learner = learner_of(strategy=strategy)
    if what == "validate": learner.model.append(nn.BatchNorm1d(3).double())  # buffers are the first thing that is told
    if rank() == 0: learner.fit(1) if what == "fit" else learner.validate() if what == "validate" else learner.save(file)


def nan_on_rank_1(callbacks=()):
    """One row, which rank 1 gets, has no finite loss."""
    inputs, targets = arrays()
    inputs[39] = float("nan")
    data = Loaders.from_arrays(inputs, targets, batch_size=8, shuffle=False, seed=3)
    strategy = Replicas(join(timeout="20s")) if "RANK" in os.environ else None
    return train(callbacks=callbacks, data=data, strategy=strategy, epochs=2)


def skip_bad():
    return nan_on_rank_1([BadBatches("skip")])


def ends_an_epoch_after_the_last_batch():
    """Asked for by the last process alone, when no step follows that would tell the others."""
    strategy = Replicas(join(timeout="20s")) if "RANK" in os.environ else "auto"
    on = dist.get_world_size() - 1 if has_group() else 0
    learner = learner_of(strategy=strategy, callbacks=[At(7, lambda trainer: trainer.end_epoch("enough"), on=on)])
    learner.fit("7ba")
    state = learner.trainer.state
    return state.epoch, state.epoch_batch, state.end_epoch, [(one["what"], one["batch"]) for one in state.control]


def for_a_time():
    """Half a second, and the batches that it took; an error when it does not end."""
    began = time.monotonic()

    def look(trainer):
        if time.monotonic() - began > 10:
            raise RuntimeError("the time is long over")

    learner = learner_of(strategy=Replicas(join(timeout="20s")))
    learner.on("after_batch", look)
    learner.fit("0.5s")
    return learner.trainer.state.batch


class WithMore(nn.Module):
    """One layer takes part on some ranks only."""

    def __init__(self, without):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.extra, self.without = nn.Linear(6, 3).double(), nn.Linear(6, 3).double(), without

    def forward(self, inputs):
        return self.layer(inputs) + (0 if rank() in self.without else self.extra(inputs))


def unused_on(ranks):
    strategy, model = Replicas(join(timeout="20s")), WithMore(ranks)
    data = Loaders.from_arrays(*arrays(), batch_size=8, seed=3)
    step, optimizer = SupervisedStep(nn.functional.cross_entropy), optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, step, optimizer, strategy=strategy).fit(data.train, None, "1ba")


class OnADevice(Replicas):
    """As if a count that is a tensor were on a GPU."""

    def in_hand(self, count, optimizer=None):
        numbers = super().in_hand(count, optimizer)
        if isinstance(count, torch.Tensor):
            self.on_device, numbers[0], numbers[3] = count, 0.0, 1.0
        return numbers


def counts_on_a_device():
    step = SupervisedStep(nn.functional.cross_entropy, count=lambda output, batch: torch.tensor(float(batch.size)))
    strategy, model = OnADevice(join(timeout="8s")), nn.Linear(6, 3).double()
    trainer = Trainer(model, step, optim.SGD(model.parameters(), lr=0.1), strategy=strategy)
    inputs, targets = arrays(5)
    trainer.fit(Loaders.from_arrays(inputs, targets, batch_size=1, seed=3).train, None, 1)
    return trainer.state.step, trainer.state.samples


def other_metrics():
    strategy = Replicas(join(timeout="20s"))
    return train(strategy=strategy, metrics=[Accuracy(), *([MeanAbsoluteError()] if rank() == 1 else [])])


class LogsOnOne(Callback):
    def after_epoch(self, trainer):
        if rank() == 1:
            trainer.log("pressure", 1.0)


def other_logs():
    return train(callbacks=[LogsOnOne()], strategy=Replicas(join(timeout="20s")))


def other_data():
    """No seed: each process draws an order and a split of its own."""
    strategy = Replicas(join(timeout="20s"))
    torch.seed()
    return train(strategy=strategy, data=Loaders.from_arrays(*arrays(), valid=0.2, batch_size=8))


def uneven_foreign():
    """torch loaders of five batches on rank 0 and of three on rank 1."""
    strategy = Replicas(join(timeout="20s"))
    n = 20 if rank() == 0 else 12
    inputs, targets = arrays()
    loader = DataLoader(TensorDataset(inputs[:n], targets[:n]), batch_size=4)
    whole = DataLoader(TensorDataset(inputs[:6], targets[:6]), batch_size=4)
    return train(strategy=strategy, data=Loaders(loader, whole), epochs=2)


def kept(run_dir, epochs=3, **options):
    return train(run_dir, epochs, resume=True, callbacks=[Checkpoint("1ba")], **options)


def who_speaks(run_dir):
    learner = learner_of(run_dir)
    learner.fit(2)
    return sorted(os.listdir(run_dir))


if __name__ == "__main__":  # under torchrun: RUN_DIR OUTPUT [what happens to rank 1]
    run_dir, output, *fault = sys.argv[1:]
    faults = {"kill": kill, "fail": fail, "term": ask_to_end}
    happens = [At(7, faults[one]) for one in fault if one in faults]
    hosts = "plain" in fault or "slow" in fault
    found = train(run_dir, resume=True, callbacks=[Checkpoint("1ba"), *happens], dropout=0.0 if hosts else 0.3,
                  slow=0.3 if "slow" in fault else None,
                  strategy=Replicas(join(timeout=os.environ["FAULT_TIMEOUT"])) if hosts else "auto")
    if rank() == 0:
        torch.save(found[0], output)
