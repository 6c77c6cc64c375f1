"""What importing the library adds to importing torch.

    python benchmarks/imports.py [--rounds 9]

Each round starts two fresh processes, one that imports torch and one that imports the library after it. The second
says itself how long its part took, so the time torch needs does not blur it. Python keeps what it compiled in a
folder that is new for this program, so that the result does not depend on settings of the machine: the first import
compiles the library, the others find it compiled, as every later start of a user's program does.
"""
import argparse
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from tempfile import TemporaryDirectory

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
    with TemporaryDirectory() as folder:
        settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        settings["PYTHONPYCACHEPREFIX"] = folder
        command = [sys.executable, "-c", program]
        first, *lines = [subprocess.check_output(command, text=True, env=settings).split() for _ in range(rounds + 1)]
    torch_seconds, our_seconds = (statistics.median(float(line[i]) for line in lines) for i in (0, 1))
    print(f"{date.today()}, nbdev_trainer {lines[0][3]}, torch {lines[0][2]}, Python {platform.python_version()}, "
          f"median of {rounds}\n")
    print("| import | seconds |\n|---|---|")
    print(f"| torch | {torch_seconds:.2f} |\n| nbdev_trainer, after torch | {our_seconds:.3f} |")
    print(f"| nbdev_trainer, after torch, at its very first import | {float(first[1]):.3f} |")


if __name__ == "__main__":
    main()
