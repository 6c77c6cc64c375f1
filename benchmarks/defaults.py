"""Whether our defaults train at least as well as the loop that everybody writes, at equal epochs.

    NBDEV_TRAINER_DATA=... python benchmarks/defaults.py [--seeds 5] [--parts digits fashion adult housing resnet]

For each data set the same network, from the same weights, on the same split, is trained three times for each seed: by a loop
written out with Adam at 1e-3, which is what tutorials have; by `fit(n)` with nothing but the model, the data and the loss
given; and by `fit_one_cycle(n)`, as bare. Shown are the means over the seeds and the standard error of the first. `resnet` is
one more thing: a small residual network on Fashion-MNIST, in five epochs.
"""
import argparse
import os
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from torch import nn

from nbdev_trainer import R2, Accuracy, Learner, Loaders, digits, random_split, read_mnist_folder
from nbdev_trainer.data import Category, Data, Numbers, read_rows, split_by_value
from nbdev_trainer.data.datasets import fetch

ADULT = ("age workclass fnlwgt education education_num marital_status occupation relationship race sex capital_gain "
         "capital_loss hours_per_week native_country income").split()
ADULT_NUMBERS = ["age", "fnlwgt", "education_num", "capital_gain", "capital_loss", "hours_per_week"]
ADULT_CLASSES = ["workclass", "education", "marital_status", "occupation", "relationship", "race", "sex", "native_country"]
HOUSE = ["longitude", "latitude", "housing_median_age", "total_rooms", "total_bedrooms", "population", "households",
         "median_income"]


class Table(nn.Module):
    "A row of numbers beside an embedding for each column of words"

    def __init__(self, sizes: list[int], n_numbers: int, n_out: int):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, 8) for size in sizes)
        self.layers = nn.Sequential(nn.Linear(n_numbers + 8 * len(sizes), 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(),
                                    nn.Linear(32, n_out))

    def forward(self, inputs):
        numbers, *words = inputs.values()
        parts = [embedding(column) for embedding, column in zip(self.embeddings, words)]
        return self.layers(torch.cat([numbers.clamp(-4, 4), *parts], 1))


def cnn(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1),
                         nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 10))


def pictures(images, labels, valid):
    def make():
        model = cnn()
        model(images[:1])  # the lazy layer learns its shape
        return model
    return make, Loaders.from_arrays(images, labels, valid=valid, batch_size=64, seed=0), nn.CrossEntropyLoss(), Accuracy(), 3


def on_digits():
    images, labels = digits()
    return *pictures(images, labels, 0.2)[:-1], 10


def on_fashion():
    known = read_mnist_folder(fetch("fashion_mnist"))
    return pictures(known.train_images, known.train_labels, (known.test_images, known.test_labels))


def table_of(data: Data, n_out: int, batch_size: int):
    sizes = [len(data.fields[name].vocab) for name in data.inputs if name != "numbers"]
    def make(): return Table(sizes, len(data.fields["numbers"].mean), n_out)
    return make, data.loaders(batch_size, seed=0, in_memory=True)


def on_adult():
    folder = fetch("adult")
    rows = read_rows(folder / "adult.data", folder / "adult.test", names=ADULT, separator=",", missing=["?"], file_column="file")
    kinds = {name: Category(name, missing="unknown") for name in ADULT_CLASSES}
    fields = {"numbers": Numbers(ADULT_NUMBERS, standardize=True), **kinds,
              "income": Category(lambda row: row["income"].removesuffix("."))}
    data = Data(rows, fields, inputs=["numbers", *kinds], targets="income",
                split=split_by_value("file", train="adult.data", valid="adult.test"))
    return *table_of(data, 2, 128), nn.CrossEntropyLoss(), Accuracy(), 4


def on_housing():
    rows = read_rows(fetch("california_housing") / "housing.csv")
    fields = {"numbers": Numbers(HOUSE, standardize=True, missing="median"), "ocean": Category("ocean_proximity"),
              "price": Numbers("median_house_value", standardize=True)}
    data = Data(rows, fields, inputs=["numbers", "ocean"], targets="price", split=random_split(valid=0.2, seed=0))
    return *table_of(data, 1, 64), nn.MSELoss(), R2(), 15


def by_hand(model, loaders, loss_fn, n) -> None:
    "The loop of the tutorials"
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(n):
        for batch in loaders.train.batches(epoch):
            optimizer.zero_grad()
            loss_fn(model(batch.inputs), batch.targets).backward()
            optimizer.step()


def compare(name: str, part, seeds: int) -> None:
    make, loaders, loss_fn, metric, n = part()
    found: dict[str, list[float]] = {"Adam by hand": [], "fit": [], "fit_one_cycle": []}
    for seed in range(seeds):
        for way, results in found.items():
            torch.manual_seed(seed)
            model = make()
            loaders.train.seed = seed
            learner = Learner(model, loaders, loss_fn, metrics=[metric], device="cpu", verbose=0, default_callbacks=False)
            if way == "Adam by hand": by_hand(model, loaders, loss_fn, n)
            else: getattr(learner, way)(n)
            results.append(learner.validate()[metric.name])
    means = {way: statistics.mean(results) for way, results in found.items()}
    error = statistics.stdev(found["Adam by hand"]) / seeds**0.5
    least = means["Adam by hand"] - error
    held = [way for way in ("fit", "fit_one_cycle") if means[way] >= least]
    line = "  ".join(f"{way} {mean:.4f}" for way, mean in means.items())
    print(f"{name:8} {n:2} epochs  {metric.name:8}  {line}  standard error {error:.4f}  "
          f"at least {least:.4f}: {' and '.join(held) or 'neither'}", flush=True)


class Residual(nn.Module):
    "Two convolutions beside a short way"

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        def conv(a, b, size, by): return nn.Sequential(nn.Conv2d(a, b, size, by, size // 2, bias=False), nn.BatchNorm2d(b))
        self.long = nn.Sequential(conv(n_in, n_out, 3, stride), nn.ReLU(), conv(n_out, n_out, 3, 1))
        self.short = nn.Identity() if (n_in, stride) == (n_out, 1) else conv(n_in, n_out, 1, stride)

    def forward(self, images): return torch.relu(self.long(images) + self.short(images))


def small_resnet(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                         Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def resnet() -> None:
    known = read_mnist_folder(fetch("fashion_mnist"))
    loaders = Loaders.from_arrays(known.train_images, known.train_labels, valid=(known.test_images, known.test_labels),
                                  batch_size=128, seed=0)
    torch.manual_seed(0)
    learner = Learner(small_resnet(), loaders, nn.CrossEntropyLoss(), metrics=[Accuracy()], device="cpu", verbose=0)
    start = time.perf_counter()
    learner.fit_one_cycle(5)
    reached = learner.history["valid_accuracy"]
    print(f"resnet    5 epochs  accuracy of each epoch: {', '.join(f'{one:.4f}' for one in reached)}  "
          f"in {time.perf_counter() - start:.0f} s; at least 0.92: {'held' if reached[-1] >= 0.92 else 'missed'}", flush=True)


PARTS = {"digits": on_digits, "fashion": on_fashion, "adult": on_adult, "housing": on_housing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "resnet"], default=[*PARTS, "resnet"])
    options = parser.parse_args()
    if not Path(os.environ.get("NBDEV_TRAINER_DATA", "")).is_dir():
        print("NBDEV_TRAINER_DATA names no folder; the sets are downloaded")
    print(f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.seeds} seeds")
    for name in options.parts:
        if name == "resnet": resnet()
        else: compare(name, PARTS[name], options.seeds)


if __name__ == "__main__":
    main()
