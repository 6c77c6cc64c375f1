"""Small models, data and comparisons that several test files share."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbdev_trainer.data.loaders import Loaders


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and wait for them where the machine is busy."""
    torch.set_num_threads(1)


def arrays(n=37):
    """Images (n, 1, 6, 6) and classes 0 to 2, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def conv_net():
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(64, 3))


def linear_net():
    torch.manual_seed(1)
    layers = nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3)
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(8, 3))


def own_loader(n=37, batch_size=8):
    """Shuffled by seed and epoch: 5 batches, the last one short."""
    return Loaders.from_arrays(*arrays(n), batch_size=batch_size, seed=3).train


def foreign_loader(n=37, batch_size=8, generator=None):
    """A DataLoader that shuffles by torch's global generator, or by one of its own."""
    own = None if generator is None else torch.Generator().manual_seed(generator)
    return DataLoader(TensorDataset(*arrays(n)), batch_size=batch_size, shuffle=True, generator=own)


def disturb_generators():
    """What happens between two runs: somebody draws."""
    random.random(), np.random.rand(), torch.rand(5)


def differences(a, b, path=""):
    """Where two nestings differ, bit for bit; NaN equals NaN."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        return [] if same and torch.equal(a.isnan(), b.isnan()) else [path]
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        keys = [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"] if a.keys() != b.keys() else []
        return keys + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        lengths = [f"{path}: lengths {len(a)} and {len(b)}"] if len(a) != len(b) else []
        return lengths + [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}[{i}]")]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a!r} and {b!r}"]
