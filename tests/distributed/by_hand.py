"""The loop that a good engineer writes for two processes, beside ours; single precision."""

import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from nbdev_trainer.data.loaders import Loaders
from nbdev_trainer.loop.steps import SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.scale.processes import join
from nbdev_trainer.scale.replicas import Replicas


def parts():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(96, 1, 8, 8, generator=generator), torch.randint(10, (96,), generator=generator)
    return model, optim.AdamW(model.parameters(), lr=0.01), Loaders.from_arrays(images, labels, batch_size=16, seed=3).train


def by_hand(accumulate, epochs=2):
    processes = join()
    model, optimizer, loader = parts()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    mine = loader.shard(processes.rank, processes.world_size)
    for epoch in range(epochs):
        for k, batch in enumerate(mine.batches(epoch)):
            if (k + 1) % accumulate:
                with ddp.no_sync():
                    (F.cross_entropy(ddp(batch.inputs), batch.targets) / accumulate).backward()
                continue
            (F.cross_entropy(ddp(batch.inputs), batch.targets) / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def ours(accumulate, epochs=2):
    model, optimizer, loader = parts()
    trainer = Trainer(model, SupervisedStep(F.cross_entropy), optimizer, accumulate=accumulate, strategy=Replicas(join()))
    trainer.fit(loader, None, epochs)
    return [p.detach().clone() for p in model.parameters()]


def both(accumulate):
    return by_hand(accumulate), ours(accumulate)
