"""Looks at a set-up before a fit: each process looks by itself, and what decides the training is the same in all."""

import pytest
import torch
from torch import nn

from nbdev_trainer.data.loaders import Loaders
from nbdev_trainer.learner import Learner
from nbdev_trainer.scale.processes import join


def learner_of():
    processes = join(timeout="30s")
    inputs = torch.randn(90, 5, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(processes.rank)  # dropout draws something else in each
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    loaders = Loaders.from_arrays(inputs, inputs[:, :3].argmax(1), valid=30, batch_size=16, seed=0)
    return Learner(model, loaders, nn.CrossEntropyLoss(), lr=0.05, device="cpu", verbose=0), processes


def all_of_them():
    learner, processes = learner_of()
    suggested = processes.gather(learner.lr_find(steps=40).suggestion)
    sizes = processes.gather(learner.batch_size_find(limit=32).seconds)
    looks = processes.gather((learner.check().ok, learner.overfit().title, learner.dry_run().ok))
    learner.fit(1)
    weights = processes.gather(learner.model[0].weight.sum().item())
    return suggested, sizes, looks, weights


def only_the_first():
    learner, processes = learner_of()
    return learner.check().ok if processes.rank == 0 else None


@pytest.mark.parametrize("processes", [2, 3])
def test_looks_work_and_decide_the_same_in_all_processes(together, processes):
    suggested, sizes, looks, weights = together(all_of_them, processes=processes)
    assert len(suggested) == processes and len(set(suggested)) == len(set(weights)) == 1
    assert all(one == sizes[0] for one in sizes) and list(sizes[0]) == [8, 16, 32]
    assert set(looks) == {(True, "overfit 2 batches", True)}


def test_one_process_can_check_alone(together):
    assert together(only_the_first) is True
