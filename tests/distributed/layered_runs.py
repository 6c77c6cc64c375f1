"""Layers divided over processes, mixed precision, and weights kept on the host: what each run reaches."""

import torch
from scenarios import data, result
from torch import nn, optim
from torch.nn import functional as F

from nbdev_trainer.loop.steps import SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.metrics.classification import Accuracy
from nbdev_trainer.scale.processes import join
from nbdev_trainer.scale.replicas import Replicas
from nbdev_trainer.scale.shards import Shards


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.up, self.down, self.leave = nn.Linear(5, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, inputs):
        hidden = torch.tanh(self.enter(inputs))
        return self.leave(hidden + self.down(torch.relu(self.up(hidden))))


def train(strategy, dtype=torch.float64, epochs=2, **options):
    torch.manual_seed(1)
    model, loaders = Model().to(dtype), data()
    trainer = Trainer(model, SupervisedStep(F.cross_entropy, lambda model, inputs: model(inputs.to(dtype))),
                      optim.SGD(model.parameters(), lr=0.05, momentum=0.9), metrics=[Accuracy()], strategy=strategy, **options)
    trainer.fit(loaders.train, loaders.valid_sets, epochs)
    return result(trainer)


def layers_divided(shape, **options):
    """With two layers divided over the second dimension of the mesh, and the data over the first."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    processes = join(timeout="40s")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return train(Shards(processes, mesh=mesh, tensor_parallel=plan), **options)


def in_copies_of_shards(**options):
    """Divided over two processes, and the same once more in two others."""
    from torch.distributed.device_mesh import init_device_mesh

    processes = join(timeout="40s")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return train(Shards(processes, mesh=mesh), **options)


def of_three_kinds():
    """In single precision: whole, divided, divided and kept on the host; and with layers that compute in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    processes = join(timeout="40s")
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return {"whole": train(Replicas(processes), torch.float32),
            "divided": train(Shards(processes, wrap=nn.Linear), torch.float32),
            "on the host": train(Shards(processes, cpu_offload=True), torch.float32),
            "bfloat16": train(Shards(processes, wrap=("up", "down"), mixed_precision=half), torch.float32)}
