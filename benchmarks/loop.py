"""What a training step costs: ours beside the loop of the tutorials and the barest loop one can write.

    python benchmarks/loop.py [--steps 1000] [--rounds 15]

All loops train the same tiny model (32-64-10, ReLU, batch 32) on the same list of ready batches, on one thread. They
take turns in every round, so a machine that is busy for a while is busy for all of them. Shown is the median over the
rounds, and ratios of medians. The model is small on purpose: what is left to see is the loop.
"""
import argparse
import io
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import nn

import nbdev_trainer
from nbdev_trainer import Accuracy, Callback, Learner, Progress
from nbdev_trainer.loop.optimizers import default_optimizer

loss_fn = nn.CrossEntropyLoss()


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def make_batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 32, 32, generator=generator)
    return [(batch, batch[:, :10].argmax(1)) for batch in inputs]


def tutorial(batches, fused: bool = False) -> float:
    "As most tutorials have it: loss and accuracy brought to the host at each step"
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused or None)
    start, total, right = time.perf_counter(), 0.0, 0.0
    for inputs, targets in batches:
        optimizer.zero_grad()
        predictions = model(inputs)
        loss = loss_fn(predictions, targets)
        loss.backward()
        optimizer.step()
        total += loss.item()
        right += (predictions.argmax(1) == targets).float().mean().item()
    return time.perf_counter() - start


def bare(batches) -> float:
    "Fused optimizer, nothing tracked"
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    start = time.perf_counter()
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
    return time.perf_counter() - start


class Screen(io.StringIO):
    "A terminal that nobody looks at, so that the progress bar is really drawn"

    def isatty(self) -> bool:
        return True


class Empty(Callback):
    "A template nobody has filled in: all seven events of a training step, with nothing in them"

    def before_batch(self, trainer) -> None: ...
    def after_predict(self, trainer) -> None: ...
    def after_loss(self, trainer) -> None: ...
    def after_backward(self, trainer) -> None: ...
    def before_step(self, trainer) -> None: ...
    def after_step(self, trainer) -> None: ...
    def after_batch(self, trainer) -> None: ...


class CountsBatches(Callback):
    "Does as little as one can at one event of a training step"

    n = 0

    def after_batch(self, trainer) -> None: self.n += 1


class CountsEvents(CountsBatches):
    "Does as little as one can at all seven events of a training step"

    def before_batch(self, trainer) -> None: self.n += 1
    def after_predict(self, trainer) -> None: self.n += 1
    def after_loss(self, trainer) -> None: self.n += 1
    def after_backward(self, trainer) -> None: self.n += 1
    def before_step(self, trainer) -> None: self.n += 1
    def after_step(self, trainer) -> None: self.n += 1


def by_hand(batches) -> float:
    "The bare loop, with the calls of ten `CountsEvents` written into it"
    model, counters = make_model(), [CountsEvents() for _ in range(10)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    start = time.perf_counter()
    for inputs, targets in batches:
        for one in counters: one.before_batch(None)
        predictions = model(inputs)
        for one in counters: one.after_predict(None)
        loss = loss_fn(predictions, targets)
        for one in counters: one.after_loss(None)
        loss.backward()
        for one in counters: one.after_backward(None)
        for one in counters: one.before_step(None)
        optimizer.step()
        for one in counters: one.after_step(None)
        optimizer.zero_grad()
        for one in counters: one.after_batch(None)
    return time.perf_counter() - start


def ours(batches, optimizer: Callable | None = None, ten: type[Callback] | None = None) -> float:
    "With loss and accuracy tracked, history and progress on"
    model = make_model()
    learner = Learner(model, (batches, None), loss_fn, metrics=[Accuracy()], device="cpu", lr=1e-3,
                      optimizer=optimizer or default_optimizer,
                      callbacks=[Progress(file=Screen()), *(ten() for _ in range(10) if ten is not None)])
    start = time.perf_counter()
    learner.fit(1)
    return time.perf_counter() - start


def fused_adam(params, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr, fused=True)


loops = {
    "bare, fused Adam, nothing tracked": bare,
    "tutorial, `.item()` of loss and accuracy": tutorial,
    "tutorial, fused Adam": lambda batches: tutorial(batches, fused=True),
    "**ours, default optimizer**": ours,
    "ours, the user's own fused Adam": lambda batches: ours(batches, fused_adam),
    "ours, the user's own unfused Adam": lambda batches: ours(batches, torch.optim.Adam),
}

callbacks = {
    "bare": bare,
    "ours": ours,
    "ours, ten callbacks with seven empty methods": lambda batches: ours(batches, ten=Empty),
    "ours, ten callbacks that count batches": lambda batches: ours(batches, ten=CountsBatches),
    "ours, ten callbacks that count at all seven events": lambda batches: ours(batches, ten=CountsEvents),
    "bare, the same seventy calls written into it": by_hand,
}


def measure(loops: dict[str, Callable], steps: int, rounds: int) -> dict[str, list[float]]:
    "Microseconds a step, for each loop in each round"
    batches = make_batches(steps)
    for loop in loops.values():
        loop(batches[:50])
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            times[name].append(loop(batches) / steps * 1e6)
    return times


def print_callbacks(steps: int, rounds: int) -> None:
    "What ten callbacks add, as differences within short rounds: a machine drifts less in a short time"
    times = measure(callbacks, steps, rounds)
    print(f"\n{rounds} rounds of {steps} steps; differences within a round\n")
    print("| ten callbacks | added, µs a step | half of the rounds lie between |\n|---|---|---|")
    for name in list(callbacks)[2:]:
        without = times[name.split(",")[0]]
        low, median, high = statistics.quantiles((b - a for a, b in zip(without, times[name])), n=4)
        print(f"| {name} | {median:.1f} | {low:.1f} and {high:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each loop in a round")
    parser.add_argument("--rounds", type=int, default=15, help="times that all loops take their turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times = measure(loops, arguments.steps, arguments.rounds)
    medians = {name: statistics.median(rounds) for name, rounds in times.items()}
    by_bare, by_tutorial = list(medians.values())[:2]
    print(f"{date.today()}, nbdev_trainer {nbdev_trainer.__version__}, torch {torch.__version__}, Python "
          f"{platform.python_version()}, one thread, {arguments.rounds} rounds of {arguments.steps} steps\n")
    print("| loop | µs a step | / bare | / tutorial |\n|---|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.0f} | {median / by_bare:.2f} | {median / by_tutorial:.2f} |")
    print_callbacks(arguments.steps // 5, arguments.rounds * 7)


if __name__ == "__main__":
    main()
