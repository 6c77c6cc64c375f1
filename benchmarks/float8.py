"""What `precision="float8"` gains in a training step, beside bf16; needs a GPU of compute capability 8.9 or later.

    python benchmarks/float8.py [--rounds 9] [--widths 1024 2048 4096 8192] [--recipe tensorwise]

Eight linear layers of one width with ReLU between them, compiled, on ready batches of 8,192 rows. In every round a fit in bf16 and
one in float8 take turns. Shown is the median over the rounds of the time of a step in float8, as a share of that in bf16: below
1 is a gain. `--emulate` runs it all on a CPU, to see that it runs; those times mean nothing.
"""
import argparse
import statistics
import time
from datetime import date

import torch
from torch import nn

from nbdev_trainer import Float8, Learner


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(width, width), nn.ReLU())))


def seconds(learner: Learner) -> float:
    "Of a pass over its batches"
    start = time.perf_counter()
    learner.fit(1)
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(width: int, rows: int, rounds: int, device: str, float8: Float8, steps: int = 8) -> None:
    inputs = torch.randn(rows, width, device=device)
    batches = [(inputs, inputs)] * steps
    learners = [Learner(network(width), (batches, None), nn.MSELoss(), lr=1e-4, device=device, precision=one, verbose=0,
                        compile=device != "cpu", default_callbacks=False) for one in ("bf16", float8)]
    for one in learners * 2: seconds(one)
    times = [[seconds(one) for one in learners] for _ in range(rounds)]
    ratios = sorted(ours / usual for usual, ours in times)
    usual, ours = (1e3 * statistics.median(one) / steps for one in zip(*times))
    print(f"{width:6} {usual:9.2f} ms {ours:9.2f} ms   {statistics.median(ratios):.2f}   {ratios[0]:.2f} to {ratios[-1]:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--recipe", default="tensorwise")
    parser.add_argument("--emulate", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.emulate else "cuda"
    where = "a CPU, emulated" if options.emulate else torch.cuda.get_device_name()
    print(f"{date.today()}, torch {torch.__version__}, {where}, {options.recipe}, medians of {options.rounds} rounds")
    print(" width         bf16       float8  ratio  of the rounds")
    for width in options.widths:
        compare(width, options.rows, options.rounds, device, Float8(recipe=options.recipe, emulate=options.emulate))


if __name__ == "__main__":
    main()
