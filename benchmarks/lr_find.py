"""How near `learner.lr_find()` comes to the best learning rate of a grid.

    python benchmarks/lr_find.py [--seeds 6] [--tasks digits housing adult fashion text] [--others]

For each task and seed a small model is built, `lr_find` suggests a rate, and then the same model is trained by
`fit_one_cycle` for a few epochs at each rate of a grid, from the same weights and with the data in the same order. The
score of a rate is the validation loss after the last epoch, averaged over the seeds. Near the best rate the loss is flat,
and which rate has the lowest score is chance; so the best rate is the middle of those that are not worse than the
lowest by more than one standard error of their difference (over the seeds, as powers of ten). Shown are, for each rule, the suggestions divided by the best rate, from the smallest to the largest of
the seeds; and what the default suggestion costs: the validation loss after a training at the rate suggested for
each seed, beside that at the best rate of the grid.

The divisor of the default rule was chosen on other seeds of the same five tasks; those of `--others` had no part in it.
The data of all tasks but digits is fetched once, by `nbdev_trainer.data.datasets.fetch`.
"""
import argparse
import gzip
import math
import statistics
import platform
import time
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nbdev_trainer import Learner, Loaders, digits, read_mnist_folder
from nbdev_trainer.apps.models import RelativeSquaredError, Standardized, multilayer_perceptron
from nbdev_trainer.data.datasets import fetch
from nbdev_trainer.data.rows import read_rows

GRID = [10 ** (k / 4) for k in range(-12, 0)]  # 0.001 to 0.56, a factor of 1.78 from one to the next
SEED = 300     # the first seed; others were used to choose the rule


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


def perceptron_task():
    "The digits again, with three hidden layers and layer norm: 45 steps an epoch, 4 epochs"
    def layer(n_in): return nn.Sequential(nn.Linear(n_in, 128), nn.LayerNorm(128), nn.GELU())
    def model(): return nn.Sequential(nn.Flatten(), layer(64), layer(128), layer(128), nn.Linear(128, 10))
    return digits(), 32, 4, model, nn.CrossEntropyLoss


def plain_task():
    "The digits again, with one hidden layer and nothing normalised: 23 steps an epoch, 5 epochs"
    return digits(), 64, 5, lambda: multilayer_perceptron(64, 10, (64,)), nn.CrossEntropyLoss


TASKS = {"digits": digits_task, "housing": housing_task, "adult": adult_task, "fashion": fashion_task, "text": text_task}
OTHERS = {"perceptron": perceptron_task, "plain": plain_task}  # these had no part in the choice of the rule


def learner_of(task, seed):
    "A new learner for a task; the same for the same seed"
    (inputs, targets), batch_size, _, model, loss_fn = task
    torch.manual_seed(seed)
    loaders = Loaders.from_arrays(inputs, targets, valid=0.3, batch_size=batch_size, seed=seed)
    return Learner(model(), loaders, loss_fn(), seed=seed, verbose=0, device="cpu")


def score(task, seed, lr):
    "The validation loss after a few epochs of one cycle; infinite where it is not finite"
    learner = learner_of(task, seed)
    try: learner.fit_one_cycle(task[2], lr=lr, validate_every=None)
    except FloatingPointError: return math.inf
    loss = learner.validate()["loss"]
    return loss if math.isfinite(loss) else math.inf


def measure(name, seeds):
    "Suggestions, scores of the grid, and the scores of what was suggested"
    task, found = (TASKS | OTHERS)[name](), {"suggestions": [], "scores": [], "suggested": []}
    for seed in range(SEED, SEED + seeds):
        learner = learner_of(task, seed)
        before = [p.detach().clone() for p in learner.model.parameters()]
        suggestions = learner.lr_find().suggestions
        assert all(torch.equal(p, q) for p, q in zip(before, learner.model.parameters(), strict=True))
        found["suggestions"].append(suggestions)
        found["suggested"].append(score(task, seed, suggestions["edge"]))
        found["scores"].append([score(task, seed, lr) for lr in GRID])
    return found


def best_of(scores):
    "The middle of the rates that cannot be told from the one with the lowest mean score, and those at both ends"
    columns = list(zip(*scores, strict=True))
    means = [sum(column) / len(column) for column in columns]
    lowest = columns[means.index(min(means))]
    def is_worse(column):
        differences = [one - other for one, other in zip(column, lowest, strict=True)]
        mean = sum(differences) / len(differences)
        variance = sum((one - mean) ** 2 for one in differences) / (len(differences) - 1)
        return mean > math.sqrt(variance / len(differences))
    alike = [lr for lr, column in zip(GRID, columns, strict=True) if not is_worse(column)]
    return math.sqrt(alike[0] * alike[-1]), alike, min(means), GRID[means.index(min(means))]


def report(name, found):
    "A line for a task; whether the default suggestions are within a factor of 3: their median, and each"
    best, alike, lowest, at = best_of(found["scores"])
    def spread(rule):
        factors = sorted(one[rule] / best for one in found["suggestions"])
        return f"{factors[0]:.2f} to {factors[-1]:.2f} ({statistics.median(factors):.2f})"
    rules = list(found["suggestions"][0])
    suggested = sum(found["suggested"]) / len(found["suggested"])
    print(f"{name:11}{best:8.2g}  {f'{at:.2g} of {alike[0]:.2g} to {alike[-1]:.2g}':30}" + "".join(f"{spread(rule):23}" for rule in rules)
          + f"{lowest:13.4f}{suggested:9.4f}", flush=True)
    factors = [one["edge"] / best for one in found["suggestions"]]
    return [1 / 3 <= factor <= 3 for factor in [statistics.median(factors), *factors]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--others", action="store_true", help="instead: tasks that had no part in the choice of the rule")
    arguments = parser.parse_args()
    names = list(OTHERS) if arguments.others else arguments.tasks
    torch.set_num_threads(1)
    print(f"{date.today()}, Python {platform.python_version()}, torch {torch.__version__}, "
          f"{arguments.seeds} seeds, AdamW")
    head = "".join(f"{rule + ' / best':23}" for rule in ("edge", "minimum", "steepest", "valley"))
    print(f"{'':11}{'best lr':>8}  {'lowest loss, and alike':30}{head}{'loss at best':>13}{'at edge':>9}")
    began = time.monotonic()
    good = [report(name, measure(name, arguments.seeds)) for name in names]
    print(f"default suggestions within a factor of 3: by the median of the seeds in {sum(one[0] for one in good)} of {len(good)} "
          f"tasks, {sum(sum(one[1:]) for one in good)} of {sum(len(one) - 1 for one in good)} one by one; "
          f"{(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__": main()
