"""What importing the library adds to importing torch.

    python benchmarks/imports.py [--rounds 9]

Each round starts two fresh processes, one that imports torch and one that imports the library after it. The second
says itself how long its part took, so the time torch needs does not blur it.
"""
import argparse
import platform
import statistics
import subprocess
import sys
from datetime import date

program = """
import time
start = time.perf_counter()
import torch
torch_done = time.perf_counter()
import nbdev_trainer
print(torch_done - start, time.perf_counter() - torch_done, torch.__version__, nbdev_trainer.__version__)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="fresh processes")
    rounds = parser.parse_args().rounds
    lines = [subprocess.check_output([sys.executable, "-c", program], text=True).split() for _ in range(rounds + 1)][1:]
    torch_seconds, our_seconds = (statistics.median(float(line[i]) for line in lines) for i in (0, 1))
    print(f"{date.today()}, nbdev_trainer {lines[0][3]}, torch {lines[0][2]}, Python {platform.python_version()}, "
          f"median of {rounds}\n")
    print("| import | seconds |\n|---|---|")
    print(f"| torch | {torch_seconds:.2f} |\n| nbdev_trainer, after torch | {our_seconds:.3f} |")


if __name__ == "__main__":
    main()
