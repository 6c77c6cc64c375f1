"""What loading data costs: arrays in memory, a folder of images, our own work for each item, and a million paths.

    python benchmarks/data.py [--rounds 7] [--parts arrays images items memory]

Everything that is compared takes turns in every round, so a machine that is busy for a while is busy for all of it.
Shown is the median over the rounds, and the median of the ratios within a round. The bounds are what the library
promises; they were set for a machine of two cores.

Images: 400 JPEGs of 400 x 300 made of noise, scaled to 160 x 160, batches of 32. The loader beside ours is what one
writes by hand, a `Dataset` that decodes and scales by Pillow and divides by 255, and torch's `DataLoader` with two
workers. Ours scales by torch with antialiasing, which is the same filter; the pictures may differ by rounding.

Memory: each case in a process of its own, by the proportional set size of it and of its four workers, in which memory
that processes share is counted once. Only Linux tells it.
"""
import argparse
import functools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

import nbdev_trainer
from nbdev_trainer import Loaders
from nbdev_trainer.data import Apply, Category, Data, Image
from nbdev_trainer.data.kinds import Kind
from nbdev_trainer.data.loaders import Loader
from nbdev_trainer.data.samples import Transform
from nbdev_trainer.data.transforms import Resize

Times = dict[str, list[float]]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(jobs: dict[str, Callable[[], object]], rounds: int) -> Times:
    "Seconds that each job takes in each round; a first round is not counted"
    times: Times = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            taken = seconds(job)
            if number: times[name].append(taken)
    return times


def ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other))


def run_through(loader) -> None:
    for _ in loader: pass


# --------------------------------------------------------------------------------------------------- arrays in memory

def arrays(rounds: int) -> None:
    n, size = 60_000, 64
    inputs, targets = torch.randn(n, 784), torch.randint(10, (n,))

    def bare() -> None:
        for ids in torch.randperm(n).split(size):
            batch = inputs.index_select(0, ids), targets.index_select(0, ids)  # noqa: F841  (kept until the next is there)

    def load(shuffle: bool) -> Loader: return Loaders.from_arrays(inputs, targets, batch_size=size, shuffle=shuffle).train
    pair = TensorDataset(inputs, targets)
    times = in_turns({
        "ours": lambda shuffled=load(True): run_through(shuffled),
        "bare": bare,
        "torch": lambda shuffled=DataLoader(pair, size, shuffle=True): run_through(shuffled),
        "ours, in order": lambda in_order=load(False): run_through(in_order),
        "torch, in order": lambda in_order=DataLoader(pair, size): run_through(in_order)}, rounds)
    micros = {name: statistics.median(found) / -(-n // size) * 1e6 for name, found in times.items()}
    print(f"\nArrays of {n} x 784 floats, batches of {size}, one thread\n")
    print("| order | beside | ours, µs a batch | beside, µs | ratio | bound |\n|---|---|---|---|---|---|")
    for order, mine, other, name, bound in [
            ("shuffled", "ours", "torch", "`DataLoader(TensorDataset)`", 0.30),
            ("shuffled", "ours", "bare", "bare `index_select`", 1.3),
            ("in order", "ours, in order", "torch, in order", "`DataLoader(TensorDataset)`", 0.08)]:
        print(f"| {order} | {name} | {micros[mine]:.1f} | {micros[other]:.1f} | "
              f"{ratio(times[mine], times[other]):.3f} | {bound} |")


# ------------------------------------------------------------------------------------------------- a folder of images

def make_pictures(folder: Path, n: int = 400) -> list[Path]:
    draw, paths = np.random.default_rng(0), []
    for number in range(n):
        path = folder / ("ants", "bees")[number % 2] / f"{number:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = PIL.Image.fromarray(draw.integers(0, 255, (30, 40, 3), np.uint8))
        smooth = np.asarray(coarse.resize((400, 300), PIL.Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + draw.integers(-12, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
        PIL.Image.fromarray(noisy).save(path, quality=90)
        paths.append(path)
    return paths


class ByHand(Dataset):
    "What one writes without a library"

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.numbers = paths, {"ants": 0, "bees": 1}

    def __len__(self) -> int: return len(self.paths)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        path = self.paths[place]
        with PIL.Image.open(path) as picture:
            small = picture.convert("RGB").resize((160, 160), PIL.Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255), self.numbers[path.parent.name]


def label_of(path: Path) -> str: return path.parent.name


def by_hand(paths: list[Path]) -> DataLoader:
    return DataLoader(ByHand(paths), 32, shuffle=True, num_workers=2, persistent_workers=True)


def ours(paths: list[Path], workers: str) -> Loader:
    data = Data(paths, {"image": Image(), "label": Category(label_of)}, inputs="image", targets="label",
                transforms=[Resize(160)])
    return data.loaders(32, num_workers=2, workers=workers).train


def images(rounds: int) -> None:
    names = {"by hand": by_hand, "**ours, two processes**": functools.partial(ours, workers="processes"),
             "**ours, two threads**": functools.partial(ours, workers="threads")}
    first: Times = {name: [] for name in names}
    rate: Times = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        paths = make_pictures(Path(folder))
        for number in range(rounds + 1):
            for name, make in names.items():
                start = time.perf_counter()
                loader = make(paths)
                batches = iter(loader)
                next(batches)
                until_first = time.perf_counter() - start
                run_through(batches)
                per_second = len(paths) / seconds(functools.partial(run_through, loader))
                loader = batches = None  # its workers end
                if number == 0: continue
                first[name].append(until_first)
                rate[name].append(per_second)
        differs = (ByHand(paths)[0][0] * 255 - ours(paths, "threads").fetch.sample(0, 0)["image"]).abs()
    print(f"\n{len(paths)} JPEGs of 400 x 300 to 160 x 160; pixels differ by {differs.mean():.2f} of 255 on average, "
          f"{differs.max():.0f} at most\n")
    print("| loader | images a second | / by hand (at least 1) | first batch, ms | / by hand (at most 1.1) |")
    print("|---|---|---|---|---|")
    for name in names:
        print(f"| {name} | {statistics.median(rate[name]):.0f} | {ratio(rate[name], rate['by hand']):.2f} | "
              f"{statistics.median(first[name]) * 1e3:.0f} | {ratio(first[name], first['by hand']):.2f} |")


# ---------------------------------------------------------------------------------------------- our own work per item

NOTHING = torch.zeros(1)


class Nothing(Kind):
    "A field that takes no time"

    def encode(self, raw: int) -> Tensor: return NOTHING


@dataclass
class Same(Transform):
    "A transform that takes no time"
    amount: float = 0.5
    p: float = 0.5

    def __call__(self, sample, kinds, random): return sample


def same(value: Tensor) -> Tensor: return value


def items(rounds: int, n: int = 10_000) -> None:
    print("\nOur own work for each item: kinds and transforms that do nothing, their own calls taken off\n")
    print("| fields | transforms | µs an item | bound |\n|---|---|---|---|")
    for n_fields, steps, told in [
            (1, [], "none"), (1, [Same(), Same()], "two"), (4, [], "none"), (4, [Same(), Same()], "two"),
            (1, [Apply(same, "field0")], "one foreign, all generators seeded")]:
        kinds = {f"field{number}": Nothing() for number in range(n_fields)}
        loader = Data(list(range(n)), kinds, inputs="field0", train_transforms=steps).loaders(64).train
        def calls() -> None:
            for item in range(n):
                sample = {name: kind.encode(kind.read(item)) for name, kind in kinds.items()}
                for step in steps: step(sample, kinds, None)
        times = in_turns({"all": lambda: run_through(loader), "calls": calls}, rounds)
        own = statistics.median(one - other for one, other in zip(times["all"], times["calls"])) / n * 1e6
        bound = "" if told.startswith("one foreign") else "25"
        print(f"| {n_fields} | {told} | {own:.1f} | {bound} |")


# ------------------------------------------------------------------------------------------------------ a million paths

class Length(Kind):
    "The length of a path"

    def encode(self, raw: Path) -> Tensor: return torch.tensor(len(str(raw)))


def proportional(pid: int | str) -> float:
    "Megabytes of a process; what several share is divided among them"
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000


def make_paths(n: int) -> list[Path]:
    "Paths as they are after each has been looked at once"
    paths = [Path(f"/data/photos/{number % 1000:03}/{number:07}.jpg") for number in range(n)]
    for path in paths: str(path)
    return paths


def memory_of(n: int, keep: bool) -> None:
    "Print what a list of paths takes, and all processes together after an epoch; in a process of its own"
    before = proportional("self")
    paths = make_paths(n)
    copy = proportional("self") - before
    data = Data(paths, {"length": Length()}, inputs="length")
    if not keep: del paths
    loader = data.loaders(250, num_workers=4).train
    batches, pids = loader.batches(0), [os.getpid()]
    run_through(batches)
    pids += loader.processes[0].pids.tolist()
    print(copy, sum(map(proportional, pids)))


def memory() -> None:
    def of(n: int, keep: bool) -> Iterator[float]:
        words = [sys.executable, "-W", "ignore", __file__, "--memory-of", str(n), "--keep" if keep else "--hand-over"]
        return map(float, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
    print("\n1,000,000 paths and four workers, after an epoch\n")
    print("| the program | the list, MB | all with 1,000 paths, MB | all with 1,000,000, MB | copies | bound |")
    print("|---|---|---|---|---|---|")
    for keep in (False, True):
        (_, few), (copy, many) = of(1000, keep), of(1_000_000, keep)
        print(f"| {'keeps its list' if keep else 'hands its list over'} | {copy:.0f} | {few:.0f} | {many:.0f} | "
              f"{(many - few) / copy:.2f} | 1.3 |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="times that everything compared takes its turn")
    known = ["arrays", "images", "items", "memory"]
    parser.add_argument("--parts", nargs="+", choices=known, default=known)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    keeping = parser.add_mutually_exclusive_group()
    keeping.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    keeping.add_argument("--hand-over", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of: return memory_of(arguments.memory_of, arguments.keep)
    print(f"{date.today()}, nbdev_trainer {nbdev_trainer.__version__}, torch {torch.__version__}, Python "
          f"{platform.python_version()}, {os.cpu_count()} cores, {arguments.rounds} rounds")
    if "arrays" in arguments.parts: arrays(arguments.rounds)
    if "images" in arguments.parts: images(arguments.rounds)
    if "items" in arguments.parts: items(arguments.rounds)
    if "memory" in arguments.parts: memory()


if __name__ == "__main__":
    main()
