"""How near `learner.lr_find()` comes to the best learning rate of a grid.

    python benchmarks/lr_find.py [--seeds 3] [--tasks digits housing adult fashion text]

For each task and seed a small model is built, `lr_find` suggests a rate, and the same model is trained by
`fit_one_cycle` for a few epochs at each rate of a grid, from the same weights and in the same order. The score of a
rate is the validation loss after the last epoch, averaged over the seeds; the best rate is the one with the lowest
score. Shown are the suggestion of each seed, its distance from the best rate as a factor, and what it costs: the
validation loss of a training at the suggested rate beside that of the best one.

The data of the tasks besides digits is fetched once, by `nbdev_trainer.data.datasets.fetch`.
"""
import gzip
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nbdev_trainer import Learner, Loaders, digits, read_mnist_folder
from nbdev_trainer.apps.models import RelativeSquaredError, Standardized, multilayer_perceptron
from nbdev_trainer.data.datasets import fetch
from nbdev_trainer.data.rows import read_rows

GRID = [10 ** (k / 4) for k in range(-16, 3)]  # 1e-4 to 3.2, a factor of 1.78 from one to the next


def digits_task():
    "The embedded digits, with one convolution: 23 steps an epoch, 5 epochs"
    def model():
        return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10))
    return digits(), 64, 5, model, nn.CrossEntropyLoss


def housing_task():
    "California housing, prices: a perceptron with two hidden layers, 65 steps an epoch, 5 epochs"
    rows = read_rows(next(Path(fetch("california_housing", progress=False)).glob("housing.csv*")))
    names = [name for name in rows[0] if name not in ("ocean_proximity", "median_house_value")]
    places = sorted({row["ocean_proximity"] for row in rows})
    def numbers(row):
        return [*(float(row[name]) for name in names), *(float(row["ocean_proximity"] == one) for one in places)]
    inputs = torch.tensor([numbers(row) for row in rows]).nan_to_num(435.0)  # the median of what is missing
    targets = torch.tensor([[float(row["median_house_value"]) / 1e5] for row in rows])
    pick = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:10_400]
    inputs, targets = inputs[pick], targets[pick]
    def model(): return Standardized(multilayer_perceptron(inputs.shape[1], 1, (64, 64)), inputs, targets)
    return (inputs, targets), 128, 5, model, lambda: RelativeSquaredError(targets)


def adult_task():
    "Adult, who earns more: categories as columns of zeros and ones, a perceptron, 63 steps an epoch, 4 epochs"
    path = next(Path(fetch("adult", progress=False)).glob("adult.data*"))
    text = (gzip.open(path, "rt") if path.suffix == ".gz" else open(path)).read()
    rows = [line.split(", ") for line in text.splitlines() if line.strip()][:10_000]
    columns = []
    for k in range(14):
        values = np.array([row[k] for row in rows])
        if k in (0, 2, 4, 10, 11, 12): columns.append(values.astype(np.float32)[:, None])
        else: columns.append((values[:, None] == np.unique(values)).astype(np.float32))
    inputs = torch.from_numpy(np.concatenate(columns, 1))
    targets = torch.tensor([int(row[14].startswith(">")) for row in rows])
    def model(): return Standardized(multilayer_perceptron(inputs.shape[1], 2, (64, 64)), inputs)
    return (inputs, targets), 128, 4, model, nn.CrossEntropyLoss


def fashion_task():
    "5,000 pictures of Fashion-MNIST: two convolutions with batch norm, 63 steps an epoch, 4 epochs"
    data = read_mnist_folder(fetch("fashion_mnist", progress=False))
    def block(n_in, n_out):
        return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1), nn.BatchNorm2d(n_out), nn.ReLU())
    def model():
        return nn.Sequential(block(1, 16), block(16, 32), block(32, 32), nn.Flatten(), nn.Linear(512, 10))
    return (data.train_images[:5000], data.train_labels[:5000]), 64, 4, model, nn.CrossEntropyLoss


def text_task():
    "Rotten tomatoes, praise or not: the mean of word vectors and a linear layer, 133 steps an epoch, 4 epochs"
    folder = Path(fetch("rotten_tomatoes", progress=False))
    rows = []
    for label, name in ((1, "pos"), (0, "neg")):
        path = next(folder.glob(f"rt-polarity.{name}*"))
        text = (gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")).read()
        rows += [(line.split()[:40], label) for line in text.split("\n") if line]
    words = [word for word, n in Counter(word for row, _ in rows for word in row).most_common(8000)]
    number = {word: k + 1 for k, word in enumerate(words)}
    inputs = torch.zeros(len(rows), 40, dtype=torch.int64)
    for k, (row, _) in enumerate(rows): inputs[k, :len(row)] = torch.tensor([number.get(word, 0) for word in row])
    targets = torch.tensor([label for _, label in rows])
    def model():
        return nn.Sequential(nn.EmbeddingBag(8001, 32, mode="mean", padding_idx=0), nn.Linear(32, 2))
    return (inputs, targets), 64, 4, model, nn.CrossEntropyLoss


TASKS = {"digits": digits_task, "housing": housing_task, "adult": adult_task, "fashion": fashion_task, "text": text_task}


def learner_of(task, seed):
    "A new learner for a task; the same for the same seed"
    (inputs, targets), batch_size, _, model, loss_fn = task
    torch.manual_seed(seed)
    loaders = Loaders.from_arrays(inputs, targets, valid=0.2, batch_size=batch_size, seed=seed)
    return Learner(model(), loaders, loss_fn(), seed=seed, verbose=0, device="cpu")


def score(task, seed, lr):
    "The validation loss after a few epochs of one cycle; infinite where it is not finite"
    learner = learner_of(task, seed)
    try: learner.fit_one_cycle(task[2], lr=lr, validate_every=None)
    except FloatingPointError: return math.inf
    loss = learner.validate()["loss"]
    return loss if math.isfinite(loss) else math.inf
