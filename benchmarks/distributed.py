"""What two processes cost: a step beside a loop written by hand, messages counted, and how long it takes to start.

    python benchmarks/distributed.py [--rounds 30] [--steps 90]

Two processes of one thread each train a network of three linear layers, batch 64 over both. The loops take turns: torch's
`DistributedDataParallel` in a loop written by hand, which counts the loss and the accuracy of the training batches; the same without
them; and `Learner.fit`, which does more (history, requests of each process, the count of uneven batches). Shown are medians over
the rounds, and beside them the median of the ratios within a round. Each turn is a fit of one short epoch and one of a long epoch:
their difference is what the steps take, and the rest is what a fit settles besides them, once. The wide network, whose steps take
longer, gets a third of the steps. Messages are counted where torch.distributed is called, and the buckets of DistributedDataParallel
by torch itself.
"""
import argparse
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import nbdev_trainer
from nbdev_trainer import Accuracy, Learner, Loaders, Replicas, join, launch


def model_of(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def by_hand(inputs, targets, width, measured=True):
    """A function that trains one epoch; with the loss and the accuracy of what it trains on."""
    processes = join()
    model = DistributedDataParallel(model_of(width), gradient_as_bucket_view=True)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loader = Loaders.from_arrays(inputs, targets, batch_size=64, seed=0).train.shard(processes.rank, processes.world_size)
    epochs = iter(range(10**6))

    def epoch():
        total, right, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64), 0
        for batch in loader.batches(next(epochs)):
            optimizer.zero_grad()
            scores = model(batch.inputs)
            loss = F.cross_entropy(scores, batch.targets)
            loss.backward()
            optimizer.step()
            if measured:
                total += loss.detach() * batch.size
                right += (scores.argmax(1) == batch.targets).sum()
                count += batch.size
        if measured:
            sums = torch.stack([total, right.double(), torch.tensor(float(count), dtype=torch.float64)])
            dist.all_reduce(sums)
            return (sums[:2] / sums[2]).tolist()
    return epoch


def ours(inputs, targets, width, **options):
    loaders = Loaders.from_arrays(inputs, targets, batch_size=64, seed=0)
    learner = Learner(model_of(width), loaders, nn.CrossEntropyLoss(), metrics=[Accuracy()], verbose=0, **options)
    return lambda: learner.fit(1)


def timed(epoch) -> float:
    """Milliseconds that an epoch takes, when both processes begin together."""
    dist.barrier()
    began = time.perf_counter()
    epoch()
    return (time.perf_counter() - began) * 1000


def race(steps: int, rounds: int, width: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds a step, and of an epoch besides its steps, by loop; each round all take their turn."""
    torch.set_num_threads(1)
    few = max(steps // 10, 1)
    torch.manual_seed(0)  # the same on all processes
    inputs, targets = torch.randn(64 * steps, 256), torch.randint(10, (64 * steps,))
    loops = {"by hand": by_hand, "by hand, nothing measured": partial(by_hand, measured=False), "Learner": ours,
             "averaged after the backward pass": partial(ours, strategy=Replicas(join(), overlap=False))}
    epochs = {name: [loop(inputs[:64 * n], targets[:64 * n], width) for n in (few, steps)] for name, loop in loops.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name, (short, long) in epochs.items():
            brief, whole = timed(short), timed(long)
            step = (whole - brief) / (steps - few)
            if number: times[name].append((step, brief - few * step))  # the first warms up
    return times


def messages(steps: int) -> dict[str, Counter]:
    """Calls of torch.distributed in a fit of some steps, and in an evaluation."""
    found = Counter()
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list"):
        plain = getattr(dist, name)

        def counted(*args, plain=plain, name=name, **options):
            found[name] += 1
            return plain(*args, **options)
        setattr(dist, name, counted)
    torch.manual_seed(0)
    inputs, targets = torch.randn(640 * steps, 256), torch.randint(10, (640 * steps,))
    loaders = Loaders.from_arrays(inputs, targets, valid=(inputs[:96], targets[:96]), batch_size=64, seed=0)
    learner = Learner(model_of(64), loaders, nn.CrossEntropyLoss(), metrics=[Accuracy()], verbose=0)
    counts = {}
    for name, n in (("one fit of few steps", f"{steps // 2}ba"), ("one fit of many", f"{steps}ba")):
        found.clear()
        learner.fit(n, validate_every=None)
        counts[name] = Counter(found)
    found.clear()
    learner.validate()
    counts["evaluation"] = Counter(found)
    return counts


def now() -> float:
    return time.time()


def starts() -> tuple[float, float]:
    """Seconds until a program runs in two processes: by torchrun, by `launch`."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text("import time, nbdev_trainer\nprint('started', time.time())")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    theirs = float(re.search(r"started (\S+)", done.stdout)[1]) - began
    began = time.time()
    return theirs, launch(now) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="times that all loops take their turn")
    parser.add_argument("--steps", type=int, default=90, help="training steps of each loop in a round")
    arguments = parser.parse_args()
    if arguments.steps < 6: parser.error("--steps is less than 6, of which nothing can be told")
    print(f"{date.today()}, nbdev_trainer {nbdev_trainer.__version__}, torch {torch.__version__}, Python "
          f"{platform.python_version()}, gloo, two processes of one thread, {arguments.rounds} rounds of {arguments.steps} steps\n")
    for width, steps in ((256, arguments.steps), (768, arguments.steps // 3)):
        times = launch(race, steps, arguments.rounds, width)
        print(f"| width {width} | ms a step | / by hand | ms of an epoch, besides |\n|---|---|---|---|")
        for name, of in times.items():
            ratio = statistics.median(one / hand for (one, _), (hand, _) in zip(of, times["by hand"]))
            step, rest = (statistics.median(column) for column in zip(*of))
            print(f"| {name} | {step:.2f} | {ratio:.2f} | {round(rest)} |")
        print()
    counts = launch(messages, 40)
    more = counts["one fit of many"] - counts["one fit of few steps"]
    print("| messages besides the buckets | |\n|---|---|")
    print(f"| a step | {sum(more.values()) / 20:.2f} |")
    print(f"| an evaluation | {sum(counts['evaluation'].values())} |")
    print(f"| a fit, besides its steps | {sum(counts['one fit of many'].values()) - sum(more.values()) * 2} |\n")
    found = [starts() for _ in range(3)]
    theirs, own = (statistics.median(column) for column in zip(*found))
    print(f"Until a program runs: torchrun {theirs:.1f} s, launch {own:.1f} s")


if __name__ == "__main__":
    main()
