"""What two processes evaluate and read; each function runs in all of them."""

import scenarios
import torch
from torch import nn, optim
from torch.nn import functional as F

from nbdev_trainer.callbacks.averaging import EMA
from nbdev_trainer.data.batch import Batch
from nbdev_trainer.data.kinds import Array, Category
from nbdev_trainer.data.streams import StreamLoader
from nbdev_trainer.loop.steps import SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.scale.processes import join
from nbdev_trainer.scale.replicas import Replicas


def trainer_of(model, **options):
    return Trainer(model, SupervisedStep(F.cross_entropy), optim.SGD(model.parameters(), lr=0.1),
                   strategy=Replicas(join(timeout="20s")), **options)


def averages_of_norms_that_saw_other_samples():
    """The loss over the whole set, and that of rank 0 for all samples."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    trainer, loaders = trainer_of(model, callbacks=[EMA(0.9)]), scenarios.data(valid=40)
    trainer.fit(loaders.train, None, 2)
    whole = trainer.evaluate(loaders.valid)["loss"]
    own = trainer.predict(list(loaders.valid.batches(0))).losses.mean().item()  # of all batches, by this process
    return whole, own, trainer.evaluate(loaders.valid)["loss"]


def predicted_of_a_stream():
    kinds = {"x": Array(lambda item: item["x"]), "y": Category("y", vocab=[0, 1, 2])}
    stream = StreamLoader(scenarios.lines, kinds, inputs="x", targets="y", batch_size=4)
    trainer = trainer_of(scenarios.model_of())
    trainer.fit(stream, None, "5ba")
    return len(trainer.predict(stream).predictions)


def loaders_of_other_lengths_that_yield_dicts():
    processes, data = join(timeout="20s"), scenarios.data(n=20)
    batches = [{"x": batch.inputs, "y": batch.targets} for batch in data.train.batches(0)]
    trainer = trainer_of(scenarios.model_of(), as_batch=lambda raw: Batch(raw["x"], raw["y"]))
    trainer.fit(batches[:3 if processes.rank == 0 else 1], None, 1)
    return trainer.state.batch, trainer.state.samples
