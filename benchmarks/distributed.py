"""What two processes cost: a step beside a loop written by hand, messages counted, and how long it takes to start.

    python benchmarks/distributed.py [--steps 2500]

Two processes of one thread each train a network of three linear layers, batch 64 over both. The loops take turns every ten steps, since
the time of a step changes by a third with how the processes happen to be scheduled: torch's `DistributedDataParallel` in a loop written
by hand, which counts the loss and the accuracy of the training batches; the same once more, whose ratio shows how far one can trust the
others; the same without counting; and `Learner.fit`, which does more (history, requests of each process, the count of uneven batches).
It drives the others: whenever it asks for its next ten batches, each of them takes ten steps first, in an order drawn anew. Shown are
means and medians over all turns but the first of an epoch, beside those of both equal loops together; what else an epoch takes is a
line below. The last turn of the Learner in an epoch ends unseen. The wide network, whose steps take longer, gets a quarter of the
steps; the loop that averages after the backward pass, a third. Messages are counted where torch.distributed is called, and the buckets
of DistributedDataParallel by torch itself.
"""
import argparse
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
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


def by_hand(loader, width: int, measured: bool = True) -> Iterator[None]:
    """A loop that goes on by a step whenever it is asked; with the loss and the accuracy of what it trains on."""
    processes = join()
    model = DistributedDataParallel(model_of(width), gradient_as_bucket_view=True)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loader = loader.shard(processes.rank, processes.world_size)
    total, right, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64), 0
    for epoch in range(10**6):
        for batch in loader.batches(epoch):
            optimizer.zero_grad()
            scores = model(batch.inputs)
            loss = F.cross_entropy(scores, batch.targets)
            loss.backward()
            optimizer.step()
            if measured:
                total += loss.detach() * batch.size
                right += (scores.argmax(1) == batch.targets).sum()
                count += batch.size
            yield


class Race:
    """Loops that take turns, driven by the one that asks for batches."""
    def __init__(self, loader, others: dict[str, Iterator[None]]) -> None:
        self.loader, self.others = loader, others
        self.times: dict[str, list[float]] = {name: [] for name in (*others, "Learner")}  # seconds of each turn
        self.draws = random.Random(0)  # the same on all processes
        self.fetched, self.ended = 0, 0.0

    def fetch(self, ids):
        """A batch; where it is the first of a turn, every other loop has its turn before."""
        if self.fetched % TURN == 0:
            if self.fetched: self.times["Learner"].append(time.perf_counter() - self.ended)
            for name in self.draws.sample(list(self.others), len(self.others)):
                began = time.perf_counter()
                for _ in range(TURN): next(self.others[name])
                self.times[name].append(time.perf_counter() - began)
            self.ended = time.perf_counter()
        self.fetched += 1
        return self.loader.fetch(ids)


TURN, EPOCH = 10, 100  # steps


def race(steps: int, width: int, overlap: bool) -> tuple[dict[str, list[float]], float]:
    """Seconds a step in each turn, by loop; and of an epoch of the Learner besides its steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same on all processes
    inputs, targets = torch.randn(64 * EPOCH, 256), torch.randint(10, (64 * EPOCH,))
    loader = Loaders.from_arrays(inputs, targets, batch_size=64, seed=0).train
    running = Race(loader, {"by hand": by_hand(loader, width), "by hand, once more": by_hand(loader, width),
                            "by hand, nothing measured": by_hand(loader, width, measured=False)})
    learner = Learner(model_of(width), Loaders(replace(loader, fetch=running.fetch)), nn.CrossEntropyLoss(), metrics=[Accuracy()],
                      strategy=Replicas(join(), overlap=overlap), verbose=0)
    found, besides = {name: [] for name in running.times}, []
    for number in range(steps // EPOCH + 1):
        for of in running.times.values(): of.clear()
        dist.barrier()
        running.fetched, began = 0, time.perf_counter()
        learner.fit(1)
        whole = time.perf_counter() - began
        if not number: continue  # the first warms up
        for name, of in running.times.items(): found[name] += [one / TURN for one in of[1:]]
        own = running.times["Learner"]
        besides.append(whole - sum(map(sum, running.times.values())) - statistics.mean(own[1:]))  # the last turn ends unseen
    return found, statistics.median(besides)


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
    parser.add_argument("--steps", type=int, default=2500, help="training steps of each loop")
    arguments = parser.parse_args()
    if arguments.steps < 4 * EPOCH: parser.error(f"--steps is less than {4 * EPOCH}, of which nothing can be told")
    print(f"{date.today()}, nbdev_trainer {nbdev_trainer.__version__}, torch {torch.__version__}, Python "
          f"{platform.python_version()}, gloo, two processes of one thread, {arguments.steps} steps\n")
    for width, steps, overlap in ((256, arguments.steps, True), (256, arguments.steps // 3, False), (768, arguments.steps // 4, True)):
        times, besides = launch(race, steps, width, overlap)
        print(f"| width {width}{'' if overlap else ', averaged after the backward pass'} | mean ms | median | / by hand | median |\n"
              "|---|---|---|---|---|")
        equal = times["by hand"] + times["by hand, once more"]
        for name, of in times.items():
            mean, median = statistics.mean(of), statistics.median(of)
            print(f"| {name} | {mean * 1000:.2f} | {median * 1000:.2f} | {mean / statistics.mean(equal):.3f} | "
                  f"{median / statistics.median(equal):.3f} |")
        print(f"\nAn epoch of the Learner besides its steps: {besides * 1000:.0f} ms\n")
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
