"""What `memory_format="channels_last"` gains in a training step, on this machine.

    python benchmarks/memory_format.py [--rounds 9] [--device cpu]

Four networks of convolutions, in 32 bits and in bf16, on ready batches in the usual layout, on one thread. In every round the
same learner with the option and without take turns. Shown is the median over the rounds of the time of a step with it, as a
share of that without: below 1 is a gain. The last column is the smallest and the largest round.
"""
import argparse
import platform
import statistics
import time
from datetime import date

import torch
from torch import nn

from nbdev_trainer import Learner

FORMATS = (None, "channels_last")


def plain(channels: int, width: int) -> nn.Module:
    "Convolution, norm, ReLU and pooling, three times"
    sizes = [channels, width, 2 * width, 4 * width]
    layers = [layer for n_in, n_out in zip(sizes, sizes[1:]) for layer in (
        nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], 10))


class Residual(nn.Module):
    "Two convolutions beside a short way"

    def __init__(self, width: int):
        super().__init__()
        def conv(): return nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.long = nn.Sequential(conv(), nn.ReLU(), conv())

    def forward(self, images): return torch.relu(self.long(images) + images)


def residual(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), Residual(width), Residual(width), nn.AvgPool2d(4),
                         nn.Flatten(), nn.Linear(width * 64, 10))


def depthwise(width: int) -> nn.Module:
    "Each channel by itself and then each pixel by itself, three times"
    layers = [layer for _ in range(3) for layer in (
        nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.GroupNorm(8, width), nn.GELU(),
        nn.Conv2d(width, width, 1), nn.GELU())]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


PARTS = {"grey 28 x 28, 16 to 64 channels": (lambda: plain(1, 16), (64, 1, 28, 28)),
         "colour 32 x 32, 32 to 128 channels": (lambda: plain(3, 32), (32, 3, 32, 32)),
         "colour 32 x 32, residual, 64 channels": (lambda: residual(64), (16, 3, 32, 32)),
         "colour 32 x 32, depthwise, 64 channels": (lambda: depthwise(64), (16, 3, 32, 32))}


def seconds(learner: Learner, device: str) -> float:
    "Of a pass over its batches"
    start = time.perf_counter()
    learner.fit(1)
    if device != "cpu": torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, precision: str, rounds: int, device: str, steps: int = 4) -> None:
    make, shape = PARTS[name]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(steps, *shape, generator=generator)
    batches = [(one, torch.randint(10, shape[:1], generator=generator)) for one in images]
    torch.manual_seed(0)
    learners = [Learner(make(), (batches, None), nn.CrossEntropyLoss(), lr=1e-3, device=device, precision=precision,
                        memory_format=one, default_callbacks=False, verbose=0) for one in FORMATS]
    for one in learners: seconds(one, device)
    times = [[seconds(one, device) for one in learners] for _ in range(rounds)]
    ratios = sorted(ours / usual for usual, ours in times)
    usual, ours = (1e3 * statistics.median(one) / steps for one in zip(*times))
    print(f"{name:38} {precision:5} {usual:9.2f} ms {ours:9.2f} ms   {statistics.median(ratios):.2f}   "
          f"{ratios[0]:.2f} to {ratios[-1]:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = platform.processor() or platform.machine() if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"{date.today()}, torch {torch.__version__}, {where}, one thread, medians of {options.rounds} rounds")
    print(f"{'':44} {'usual':>12} {'channels_last':>12}  ratio  of the rounds")
    for name in PARTS:
        for precision in ("32", "bf16"): compare(name, precision, options.rounds, options.device)


if __name__ == "__main__":
    main()
