"""What `Learner(cuda_graph=True)` gains: the whole training step as one CUDA graph. Needs a CUDA device.

    python benchmarks/cuda_graph.py [--steps 1000] [--rounds 9] [--models tiny conv wide] [--check]

Three models on ready batches on the device: `tiny` (32-64-10, batch 32), where Python is all of the time; `conv`, three convolutions on 64
pictures; and `wide`, eight layers of 2048 on 4096 rows, which keeps the device busy and cannot gain. Five loops take turns in every round:
the barest loop by hand with a fused Adam, ours, ours recorded, ours recorded with accuracy and history, and a loop by hand that
records its step with torch.cuda.graph. The first 50 steps of each are warm-up and recording, and are not timed. Shown are medians over the
rounds. `--check` fails if the recorded step of the tiny model takes more than 0.35 of the barest loop.

`--emulate` runs it all on a CPU, where a tape stands in for the graph, to see that it runs; those times mean nothing.
"""
import argparse
import statistics
import sys
import time
from datetime import date

import torch
from torch import nn

import nbdev_trainer
from nbdev_trainer import Accuracy, Callback, Learner, Tape

BOUND, WARM_UP = 0.35, 50
loss_fn = nn.functional.cross_entropy


def tiny() -> nn.Module: return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def conv() -> nn.Module:
    sizes = [3, 32, 64, 128]
    layers = [layer for n_in, n_out in zip(sizes, sizes[1:]) for layer in (
        nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def wide(width: int = 2048) -> nn.Module:
    layers = [layer for _ in range(8) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


MODELS = {"tiny": (tiny, (32, 32)), "conv": (conv, (64, 3, 32, 32)), "wide": (wide, (4096, 2048))}


def wait(device: str) -> None:
    if device != "cpu": torch.cuda.synchronize()


class Clock(Callback):
    "Times a fit after its warm-up"

    def __init__(self, steps: int, device: str): self.last, self.device = steps + WARM_UP, device

    def after_batch(self, trainer):
        if trainer.state.batch in (WARM_UP, self.last):
            wait(self.device)
            if trainer.state.batch == WARM_UP: self.start = time.perf_counter()
            else: self.seconds = time.perf_counter() - self.start


def ours(make, batches, device: str, cuda_graph=False, tracked: bool = False) -> float:
    clock = Clock(len(batches) - WARM_UP, device)
    learner = Learner(make(), (batches, None), loss_fn, lr=1e-3, device=device, verbose=0, callbacks=[clock], cuda_graph=cuda_graph,
                      metrics=[Accuracy()] if tracked else [], default_callbacks=tracked)
    learner.fit(1)
    return clock.seconds


def bare(make, batches, device: str) -> float:
    "By hand, nothing tracked"
    model = make().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for k, (inputs, targets) in enumerate(batches):
        if k == WARM_UP:
            wait(device)
            start = time.perf_counter()
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
    wait(device)
    return time.perf_counter() - start


def recorded_by_hand(make, batches, device: str) -> float:
    "As the notes of torch on CUDA graphs have it: nothing tracked, one shape"
    model = make().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=device != "cpu")
    inputs, targets = (one.clone() for one in batches[0])

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()

    if device == "cpu":
        step()
        replay = Tape().capture(step)
    else:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): step()
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): step()
        replay = graph.replay
    for k, batch in enumerate(batches):
        if k == WARM_UP:
            wait(device)
            start = time.perf_counter()
        inputs.copy_(batch[0])
        targets.copy_(batch[1])
        replay()
    wait(device)
    return time.perf_counter() - start


def compare(name: str, steps: int, rounds: int, device: str) -> float:
    "The share of the barest loop's time that our recorded step takes"
    make, shape = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    several = [(torch.randn(shape, generator=generator).to(device), torch.randint(10, shape[:1], generator=generator).to(device))
               for _ in range(8)]
    batches = [several[k % 8] for k in range(steps + WARM_UP)]
    graph = Tape() if device == "cpu" else True
    loops = {"by hand": lambda: bare(make, batches, device), "ours": lambda: ours(make, batches, device),
             "ours, recorded": lambda: ours(make, batches, device, graph),
             "ours, recorded, accuracy and history": lambda: ours(make, batches, device, graph, tracked=True),
             "by hand, recorded": lambda: recorded_by_hand(make, batches, device)}
    times = [[1e6 * loop() / steps for loop in loops.values()] for _ in range(rounds)]
    print(f"\n{name}\n\n| loop | µs a step | / by hand | of the rounds |\n|---|---|---|---|")
    medians = {}
    for loop, found in zip(loops, zip(*times)):
        ratios = sorted(one / row[0] for one, row in zip(found, times))
        medians[loop] = statistics.median(ratios)
        print(f"| {loop} | {statistics.median(found):.1f} | {medians[loop]:.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |", flush=True)
    return medians["ours, recorded"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or options.emulate):
        sys.exit("This needs a CUDA device, and torch finds none here. --emulate runs it on a CPU, without meaning.")
    device = "cpu" if options.emulate else "cuda"
    where = "a CPU, emulated: these times mean nothing" if options.emulate else torch.cuda.get_device_name()
    print(f"{date.today()}, nbdev_trainer {nbdev_trainer.__version__}, torch {torch.__version__}, {where}, medians of {options.rounds} "
          f"rounds of {options.steps} steps")
    torch.manual_seed(0)
    ratios = {name: compare(name, options.steps, options.rounds, device) for name in options.models}
    if options.check and not options.emulate and ratios.get("tiny", 0) > BOUND:
        sys.exit(f"\nthe recorded step of the tiny model takes {ratios['tiny']:.2f} of the loop by hand; expected at most {BOUND}")


if __name__ == "__main__":
    main()
