"""What metrics cost per batch: accuracy, macro F1 and the loss, ours beside torchmetrics.

    python benchmarks/metrics.py [--batches 200] [--rounds 15]

Both are shown the same ready scores, targets and losses, on one thread, and take turns in every round, so a machine
that is busy for a while is busy for both. Shown is the median over the rounds and the ratio of the medians.
Torchmetrics is called as in its documentation, `metric(scores, targets)`: its `forward`, which also gives the value of
the batch. Its `update`, which does not, is shown beside it. The results at the end must agree.
"""
import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
import torchmetrics
from torch import Tensor, nn

import nbdev_trainer
from nbdev_trainer.data.batch import Batch, StepOutput
from nbdev_trainer.metrics.classification import Accuracy
from nbdev_trainer.metrics.collection import MetricSet
from nbdev_trainer.metrics.confusion import F1Score

Data = list[tuple[Tensor, Tensor, Tensor]]


def make_batches(n: int, n_classes: int, batch_size: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(n, batch_size, n_classes, generator=generator)
    targets = torch.randint(n_classes, (n, batch_size), generator=generator)
    return [(one, two, nn.functional.cross_entropy(one, two)) for one, two in zip(scores, targets)]


def theirs(n_classes: int) -> tuple[torchmetrics.Metric, torchmetrics.Metric, torchmetrics.Metric]:
    return (torchmetrics.Accuracy("multiclass", num_classes=n_classes, average="micro"),
            torchmetrics.F1Score("multiclass", num_classes=n_classes, average="macro"), torchmetrics.MeanMetric())


def by_forward(batches: Data, n_classes: int) -> tuple[float, list[float]]:
    accuracy, f1, mean = metrics = theirs(n_classes)
    start = time.perf_counter()
    for scores, targets, loss in batches:
        accuracy(scores, targets)
        f1(scores, targets)
        mean(loss)
    return time.perf_counter() - start, [metric.compute().item() for metric in metrics]


def by_update(batches: Data, n_classes: int) -> tuple[float, list[float]]:
    accuracy, f1, mean = metrics = theirs(n_classes)
    start = time.perf_counter()
    for scores, targets, loss in batches:
        accuracy.update(scores, targets)
        f1.update(scores, targets)
        mean.update(loss)
    return time.perf_counter() - start, [metric.compute().item() for metric in metrics]


def ours(batches: Data, n_classes: int) -> tuple[float, list[float]]:
    metrics = MetricSet([Accuracy(), F1Score("multiclass", n_classes)])
    start = time.perf_counter()
    for scores, targets, loss in batches:
        metrics.update(StepOutput(loss, scores), Batch(None, targets, len(targets)))
    seconds, results = time.perf_counter() - start, metrics.compute()
    return seconds, [results[name] for name in ("accuracy", "f1", "loss")]


loops: dict[str, Callable[[Data, int], tuple[float, list[float]]]] = {
    "torchmetrics, `forward`": by_forward, "torchmetrics, `update`": by_update, "**ours, `update`**": ours}


def measure(batches: Data, n_classes: int, rounds: int) -> dict[str, float]:
    "Microseconds a batch, the median of the rounds; raises `AssertionError` where results differ"
    for name, loop in loops.items():
        values = torch.tensor(loop(batches, n_classes)[1]) - torch.tensor(by_forward(batches, n_classes)[1])
        if values.abs().max() > 1e-5: raise AssertionError(f"{name} is off by {values.tolist()}")
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            times[name].append(loop(batches, n_classes)[0] / len(batches) * 1e6)
    return {name: statistics.median(rounds) for name, rounds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200, help="batches of each loop in a round")
    parser.add_argument("--rounds", type=int, default=15, help="times that all loops take their turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{date.today()}, nbdev_trainer {nbdev_trainer.__version__}, torch {torch.__version__}, torchmetrics "
          f"{torchmetrics.__version__}, Python {platform.python_version()}, one thread, {arguments.rounds} rounds of "
          f"{arguments.batches} batches\n\nAccuracy, macro F1 and mean loss, µs a batch:\n")
    print("| classes | batch | metrics | µs | / torchmetrics' `forward` |\n|---|---|---|---|---|")
    for n_classes, batch_size in ((10, 32), (10, 256), (1000, 256)):
        medians = measure(make_batches(arguments.batches, n_classes, batch_size), n_classes, arguments.rounds)
        for name, median in medians.items():
            ratio = median / medians["torchmetrics, `forward`"]
            print(f"| {n_classes} | {batch_size} | {name} | {median:.0f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
