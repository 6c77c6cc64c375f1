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


class Position(nn.Module):
    """Adds a weight of its own, which it does not fill by itself."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, inputs):
        return inputs + self.shift


class Deep(nn.Module):
    """Blocks of torch's layers, batch norms among them, and two layers with the same weights."""

    def __init__(self):
        super().__init__()
        self.enter, self.position, self.same = nn.Linear(5, 8), Position(), nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(3)])
        self.middle, self.leave = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.BatchNorm1d(8)), self.same), nn.Linear(8, 3)

    def forward(self, inputs):
        hidden = self.same(self.position(self.enter(inputs)))[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        return self.leave(self.middle(hidden[:, 0]))


def fill_position(module):
    if isinstance(module, Position):
        nn.init.constant_(module.shift, 0.5)


def built(device, shards=True, **options):
    """A model built on a device, by name, or by a list of them for each rank; and how many numbers were there in whole at most."""
    processes, most = join(timeout="40s") if shards else None, 0
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    with torch.device(device if isinstance(device, str) else device[processes.rank]):
        model = Deep()

    def initialize(module):
        nonlocal most
        fill_position(module)
        most = max(most, sum(p.numel() for p in model.parameters() if not p.is_meta and not hasattr(p, "placements")))

    torch.manual_seed(2)
    strategy = Shards(processes, wrap=("blocks.*", "middle.0"), initialize=initialize, sync_batch_norm=True) if shards else None
    trainer = Trainer(model, SupervisedStep(F.cross_entropy, lambda model, inputs: model(inputs.double())),
                      optim.SGD(model.parameters(), lr=0.05), metrics=[Accuracy()], strategy=strategy, **options)
    loaders = data()
    trainer.fit(loaders.train, loaders.valid_sets, 2)
    return {**result(trainer), "most": most}


def nobody_fills():
    """The error for a weight that nobody fills; the same on all processes, before anything waits."""
    with torch.device("meta"):
        model = Deep()
    try:
        Trainer(model, SupervisedStep(F.cross_entropy), optim.SGD(model.parameters(), lr=0.05), strategy=Shards(join()))
    except ValueError as error:
        return str(error)
