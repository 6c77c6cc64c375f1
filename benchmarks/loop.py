"""What a training step costs: ours beside the loop of the tutorials and the barest loop one can write.

    python benchmarks/loop.py [--steps 1000] [--rounds 15]

All loops train the same tiny model (32-64-10, ReLU, batch 32) on the same list of ready batches, on one thread. They
take turns in every round, so a machine that is busy for a while is busy for all of them. Shown is the median over the
rounds, and ratios of medians. The model is small on purpose: what is left to see is the loop.

What callbacks add is a few microseconds, less than a step of that model varies on a shared machine. So it is measured
with a model of one weight, in many rounds, by the fastest tenth of them: what disturbs a round makes it slower, never
faster. The same loop measured twice says how far that can be trusted.
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


def first(predictions, targets) -> torch.Tensor:
    "The cheapest loss there is: of one prediction, that prediction"
    return predictions[0, 0]


def one_weight(batches, ten: type[Callback] | None = None) -> float:
    "Ours on a model of one weight, with ten callbacks of a kind"
    model, ten_callbacks = nn.Linear(1, 1, bias=False), [ten() for _ in range(10)] if ten else []
    learner = Learner(model, (batches, None), first, device="cpu", lr=1e-3, default_callbacks=False, verbose=0,
                      callbacks=ten_callbacks)
    start = time.perf_counter()
    learner.fit(1)
    return time.perf_counter() - start


def by_hand(batches, n_counters: int = 0) -> float:
    "A bare loop on a model of one weight, with the calls of so many `CountsEvents` written into it"
    model, counters = nn.Linear(1, 1, bias=False), [CountsEvents() for _ in range(n_counters)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    start = time.perf_counter()
    for inputs, targets in batches:
        for one in counters: one.before_batch(None)
        predictions = model(inputs)
        for one in counters: one.after_predict(None)
        loss = first(predictions, targets)
        for one in counters: one.after_loss(None)
        loss.backward()
        for one in counters: one.after_backward(None)
        for one in counters: one.before_step(None)
        optimizer.step()
        for one in counters: one.after_step(None)
        optimizer.zero_grad()
        for one in counters: one.after_batch(None)
    return time.perf_counter() - start


def ours(batches, optimizer: Callable | None = None) -> float:
    "With loss and accuracy tracked, history and progress on"
    model = make_model()
    learner = Learner(model, (batches, None), loss_fn, metrics=[Accuracy()], device="cpu", lr=1e-3,
                      optimizer=optimizer,
                      callbacks=[Progress(file=Screen())])
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
    "bare": by_hand,
    "ours": one_weight,
    "ours, the same once more, without any": one_weight,
    "ours, ten callbacks with seven empty methods": lambda batches: one_weight(batches, Empty),
    "ours, ten callbacks that count batches": lambda batches: one_weight(batches, CountsBatches),
    "ours, ten callbacks that count at all seven events": lambda batches: one_weight(batches, CountsEvents),
    "bare, the same seventy calls written into it": lambda batches: by_hand(batches, 10),
}


def measure(loops: dict[str, Callable], batches: list, rounds: int) -> dict[str, list[float]]:
    "Microseconds a step, for each loop in each round"
    for loop in loops.values():
        loop(batches[:50])
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            times[name].append(loop(batches) / len(batches) * 1e6)
    return times


def print_callbacks(steps: int, rounds: int) -> None:
    "What ten callbacks add to the fastest tenth of the rounds"
    times = measure(callbacks, [(torch.ones(1, 1), torch.ones(1))] * steps, rounds)
    fastest = {name: statistics.quantiles(found, n=10)[0] for name, found in times.items()}
    print(f"\nA model of one weight, the fastest tenth of {rounds} rounds of {steps} steps\n")
    print("| ten callbacks | µs a step | added |\n|---|---|---|")
    for name, found in fastest.items():
        print(f"| {name} | {found:.1f} | {found - fastest[name.split(',')[0]]:+.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each loop in a round")
    parser.add_argument("--rounds", type=int, default=15, help="times that all loops take their turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times = measure(loops, make_batches(arguments.steps), arguments.rounds)
    medians = {name: statistics.median(rounds) for name, rounds in times.items()}
    by_bare, by_tutorial = list(medians.values())[:2]
    print(f"{date.today()}, nbdev_trainer {nbdev_trainer.__version__}, torch {torch.__version__}, Python "
          f"{platform.python_version()}, one thread, {arguments.rounds} rounds of {arguments.steps} steps\n")
    print("| loop | µs a step | / bare | / tutorial |\n|---|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.0f} | {median / by_bare:.2f} | {median / by_tutorial:.2f} |")
    print_callbacks(arguments.steps, arguments.rounds * 5)


if __name__ == "__main__":
    main()
