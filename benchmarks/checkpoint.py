"""What saving costs beside `torch.save`, and how soon a run goes on.

    python benchmarks/checkpoint.py [--megabytes 100] [--rounds 21]

A network with AdamW, whose weights and moments are 100 MB together, trains on one thread. For saving beside the training, a window
of steps that begins with a save stands between two that do not; what a save costs is the difference, the copy and all that the
training loses while the file is written. `torch.save` of the same state, which is neither verified nor brought to the disk, is
timed in the same round. For saving at once, the other is `torch.save`, SHA-256 of the file and fsync. Each writes a new file and
keeps the one before. Shown are medians. Going on
is timed from the call of `fit(resume=True)` to its first batch, in an epoch of 200,000 samples.
"""
import argparse
import hashlib
import os
import platform
import shutil
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from torch import nn

import nbdev_trainer
from nbdev_trainer import Callback, Checkpoint, Learner, Loaders
from nbdev_trainer.core.nested import tensors


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def make_ready(folder: Path, megabytes: int) -> None:
    """Nothing waits for the disk, and the kernel has memory at hand: a virtual machine may have given its own back to the host, and
    who writes first after that waits for it, ten times as long as writing takes."""
    (folder / "warm").write_bytes(bytes(megabytes * 10**6))
    os.sync()
    (folder / "warm").unlink()


class Rounds(Callback):
    "Takes the times inside a fit, between two batches"

    def __init__(self, checkpoint: Checkpoint, folder: Path, rounds: int, window: int) -> None:
        self.checkpoint, self.folder, self.rounds, self.window, self.saved = checkpoint, folder, rounds, window, 0
        self.windows: list[float] = []  # of the round: without, with and without a save
        self.stalls: list[float] = []
        self.calls: list[float] = []
        self.plain: list[float] = []
        self.sure: list[float] = []
        self.at_once: list[float] = []
        self.start = 0.0

    def plain_save(self, trainer) -> None:
        self.saved += 1
        torch.save(self.state(trainer), self.file())
        self.file(-2).unlink(missing_ok=True)  # two stay, as ours

    def file(self, back: int = 0) -> Path: return self.folder / f"plain-{self.saved + back}.pt"

    def state(self, trainer):
        model, optimizer = trainer.model, trainer.engine.slots["main"].optimizer
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def plain_sure_save(self, trainer) -> None:
        self.plain_save(trainer)
        with open(self.file(), "rb") as file:
            hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())

    def save_in_turn(self, trainer) -> None:
        others = [(self.plain, self.plain_save), (self.sure, self.plain_sure_save), (self.at_once, self.save_at_once)]
        first = len(self.plain) % 3  # each comes first, second and third as often as the others: the disk remembers
        for times, work in others[first:] + others[:first]:
            make_ready(self.folder, 250)
            times.append(seconds(lambda: work(trainer)))

    def save_at_once(self, trainer) -> None:
        self.checkpoint.background = False
        self.checkpoint.save(trainer)
        self.checkpoint.background = True

    def after_batch(self, trainer) -> None:
        now = time.perf_counter()
        if trainer.state.batch % self.window: return
        windows = self.windows
        if self.start: windows.append(now - self.start)
        self.checkpoint.settle()
        if len(windows) == 3:  # a round is over
            self.stalls.append(windows[1] - (windows[0] + windows[2]) / 2)
            self.save_in_turn(trainer)
            windows.clear()
            if len(self.stalls) == self.rounds: return trainer.stop("enough")
        make_ready(self.folder, 250)
        self.start = time.perf_counter()
        if len(windows) == 1:
            self.checkpoint.save(trainer)
            self.calls.append(time.perf_counter() - self.start)


def saving(megabytes: int, rounds: int, folder: Path, batch_size: int, window: int) -> dict[str, float]:
    "Ratios of saving, and seconds"
    width = round((megabytes * 1e6 / 12) ** 0.5)  # weights and two moments of 4 bytes
    model = nn.Linear(width, width, bias=False)
    batch = torch.randn(batch_size, width)
    checkpoint = Checkpoint("100000000ba", directory=folder / "checkpoints")
    times = Rounds(checkpoint, folder, rounds + 1, window)
    learner = Learner(model, ([(batch, batch)] * 1000, None), nn.MSELoss(), optimizer=torch.optim.AdamW(model.parameters(), fused=True),
                      device="cpu", callbacks=[checkpoint, times], default_callbacks=False, verbose=0)
    learner.fit("1000000ba", validate_every=None)
    plain, sure, stalls = times.plain[1:], times.sure[1:], times.stalls[1:]  # the first round made the files
    median = statistics.median
    return {"state": sum(one.nbytes for one in tensors(times.state(learner.trainer))) / 1e6,
            "plain": median(plain), "stall": median(stalls), "call": median(times.calls[1:]),
            "beside": median(stalls) / median(plain), "sure": median(sure), "at once": median(times.at_once[1:]),
            "at once ratio": median(a / b for a, b in zip(times.at_once[1:], sure))}


class At(Callback):
    "Saves at some batches"
    runs_after = (Checkpoint,)

    def __init__(self, checkpoint: Checkpoint, batches: list[int]) -> None: self.checkpoint, self.batches = checkpoint, batches

    def after_batch(self, trainer) -> None:
        if trainer.state.batch in self.batches: self.checkpoint.save(trainer)
        if trainer.state.batch == self.batches[-1]: raise ConnectionError


class First(Callback):
    "Notes when the first batch comes"
    only_watches = True
    began = 0.0

    def before_batch(self, trainer) -> None:
        self.began = self.began or time.perf_counter()
        trainer.stop("that was all")


def going_on(folder: Path, rounds: int, samples: int = 200_000, batch_size: int = 64) -> dict[int, float]:
    "Seconds to the first batch, by percent of the epoch that is done"
    inputs = torch.randn(samples, 16, generator=torch.Generator().manual_seed(0))
    loaders = Loaders.from_arrays(inputs, inputs[:, :4].argmax(1), batch_size=batch_size, seed=0)
    at = {percent: percent * (samples // batch_size) // 100 for percent in (10, 50, 90)}

    def learner(checkpoint: Checkpoint, *callbacks: Callback) -> Learner:
        return Learner(nn.Linear(16, 4), loaders, nn.CrossEntropyLoss(), device="cpu", seed=0, verbose=0,
                       callbacks=[checkpoint, *callbacks])

    checkpoint = Checkpoint("100000000ba", directory=folder / "all", keep_last=99)
    try: learner(checkpoint, At(checkpoint, list(at.values()))).fit(1)
    except ConnectionError: pass
    found: dict[int, list[float]] = {percent: [] for percent in at}
    for _ in range(rounds):
        for percent, batch in at.items():
            shutil.rmtree(folder / "one", ignore_errors=True)
            shutil.copytree(folder / "all" / f"ba-{batch:06}", folder / "one" / f"ba-{batch:06}")
            one = learner(Checkpoint("100000000ba", directory=folder / "one"), first := First())
            start = time.perf_counter()
            one.fit(1, resume=True)
            found[percent].append(first.began - start)
    return {percent: statistics.median(times) for percent, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="of weights and moments")
    parser.add_argument("--rounds", type=int, default=21, help="times that all take their turn")
    parser.add_argument("--batch-size", type=int, default=64, help="of the training beside which is saved")
    parser.add_argument("--window", type=int, default=8, help="steps that are timed together; a save must be done within them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = saving(arguments.megabytes, arguments.rounds, Path(folder), arguments.batch_size, arguments.window)
        first = going_on(Path(folder), arguments.rounds)
    print(f"{date.today()}, nbdev_trainer {nbdev_trainer.__version__}, torch {torch.__version__}, Python "
          f"{platform.python_version()}, one thread beside the writer, {arguments.rounds} rounds, a state of {found['state']:.0f} MB\n")
    print("| what | seconds | the other, seconds | ratio | at most | |\n|---|---|---|---|---|---|")

    def row(name: str, ours: float, other: float, ratio: float, most: float) -> None:
        print(f"| {name} | {ours:.3f} | {other:.3f} | {ratio:.2f} | {most} | {'held' if ratio <= most else 'missed'} |")

    row("beside the training: what training loses / `torch.save`", found["stall"], found["plain"], found["beside"], 0.25)
    row("at once / `torch.save`, sha256, fsync", found["at once"], found["sure"], found["at once ratio"], 1.15)
    print(f"\nOf what training loses, {found['call']:.3f} s are the copy.\n\n| done of the epoch | seconds to the first batch | at most 1 "
          "|\n|---|---|---|")
    for percent, time_taken in first.items():
        print(f"| {percent} % | {time_taken:.3f} | {'held' if time_taken <= 1 else 'missed'} |")


if __name__ == "__main__":
    main()
