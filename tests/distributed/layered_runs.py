"""Layers divided over processes, mixed precision, and weights kept on the host: what each run reaches."""

import gc

import torch
from scenarios import data, result, whole
from torch import nn, optim
from torch.nn import functional as F

from nbdev_trainer.callbacks.averaging import EMA
from nbdev_trainer.data.loaders import Loaders
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
    return result(trainer, *vars(trainer.predict(loaders.valid)).values())


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


def norms_in_bfloat16():
    """Batch norms between layers that compute in bfloat16: synced or not, in a block, and as a block."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    processes, found = join(timeout="40s"), {}
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, options in {"whole": None, "divided": {}, "in blocks": {"wrap": ("0", "1.1")}, "not synced": {"sync_batch_norm": False}}.items():
        torch.manual_seed(1)
        inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        model = nn.Sequential(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), inner, nn.Linear(8, 3))
        of_both = {"sync_batch_norm": True, **(options or {})}
        strategy = Replicas(processes, **of_both) if options is None else Shards(processes, mixed_precision=half, **of_both)
        trainer = Trainer(model, SupervisedStep(F.cross_entropy, lambda model, inputs: model(inputs.float())),
                          optim.SGD(model.parameters(), lr=0.1), strategy=strategy)
        loaders = data(n=24)
        trainer.fit(loaders.train, loaders.valid_sets, 2)
        found[name] = result(trainer)
    return found


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


def parameters_there():
    """All with numbers, whoever holds them."""
    return [one for one in gc.get_objects() if type(one) is nn.Parameter and not one.is_meta]


def built(device, shards=True, **options):
    """A model built on a device, or on one of a list for each rank; and how many numbers were there in whole at most."""
    processes, most = join(timeout="40s") if shards else None, 0
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    earlier = {id(one): one for one in parameters_there()}  # of what ran before in this process
    with torch.device(device if isinstance(device, str) else device[processes.rank]):
        model = Deep()

    def initialize(module):
        nonlocal most
        fill_position(module)
        most = max(most, sum(one.numel() for one in parameters_there() if id(one) not in earlier))

    torch.manual_seed(2)
    fills = initialize if isinstance(device, str) else None  # what the first process has needs nobody to fill it
    strategy = Shards(processes, wrap=("blocks.*", "middle.0"), initialize=fills, sync_batch_norm=True) if shards else None
    trainer = Trainer(model, SupervisedStep(F.cross_entropy, lambda model, inputs: model(inputs.double())), device="cpu",
                      optimizer=optim.SGD(model.parameters(), lr=0.05), metrics=[Accuracy()], strategy=strategy,
                      callbacks=[average := EMA(0.9)], **options)
    loaders = data()
    trainer.fit(loaders.train, loaders.valid_sets, 2)
    return {**result(trainer), "most": most, "averages": {name: whole(one) for name, one in average.averages.items()}}


def told_of(fn):
    try:
        return fn()
    except (RuntimeError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


def nobody_fills(**options):
    """The error for a weight that nobody fills."""
    with torch.device("meta"):
        model = Deep()
    return told_of(lambda: Trainer(model, SupervisedStep(F.cross_entropy), optim.SGD(model.parameters(), lr=0.05), device="cpu",
                                   strategy=Shards(join(), **options)))


class Rescaled(nn.Module):
    """Fills what is in it by a way of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.leave = nn.Linear(5, 3)

    def reset_parameters(self):
        for p in self.parameters():
            nn.init.constant_(p, 0.25)

    def forward(self, inputs):
        for block in self.blocks:
            inputs = block(inputs)
        return self.leave(inputs)


def fills_its_parts(**options):
    """The sum of the weights of a model that fills its parts, whole or divided before that."""
    with torch.device("meta"):
        model = Rescaled()

    def build():
        Trainer(model, SupervisedStep(F.cross_entropy), optim.SGD(model.parameters(), lr=0.05), device="cpu",
                strategy=Shards(join(), **options))
        return sum(one.full_tensor().sum().item() for one in model.parameters())
    return told_of(build)


def one_fails(on):
    """What the processes are told when one of them fails to fill the model."""
    def initialize(module):
        fill_position(module)
        if join().rank == on:
            raise KeyError("no table of positions")
    return join().gather(nobody_fills(initialize=initialize))


def two_optimizers(divided, **options):
    """Several optimizers, each for its part; in the second batch nothing counts of what one of the processes sees."""
    from nbdev_trainer.data.batch import StepOutput
    from nbdev_trainer.loop.steps import ManualStep

    class Two(ManualStep):
        def train(self, trainer, batch):
            counted = (batch.targets >= 0).sum().item()
            scores = trainer.model(batch.inputs)
            loss = F.cross_entropy(scores, batch.targets, ignore_index=-100) if counted else scores.sum() * 0
            trainer.optimize(loss, "first", count=counted, retain_graph=True)
            trainer.optimize(loss * 2, "second", count=counted)
            return StepOutput(loss, scores, count=counted)

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    optimizers = {"first": optim.SGD(model[0].parameters(), lr=0.1), "second": optim.SGD(model[2].parameters(), lr=0.1)}
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(24, 5, generator=generator).double(), torch.randint(3, (24,), generator=generator)
    loaders = Loaders.from_arrays(inputs, targets, batch_size=4, seed=3)
    targets[list(loaders.train.shard(0, 2).batches(0))[1].ids] = -100
    loaders = Loaders.from_arrays(inputs, targets, batch_size=4, seed=3)
    trainer = Trainer(model, Two(), optimizers, strategy=Shards(join(), wrap=nn.Linear) if divided else None)
    trainer.fit(loaders.train, None, 1)
    return {name: whole(one) for name, one in model.state_dict().items()}
