"""Run the programs that the "Coming from" pages begin with, each in a process and a folder of its own.

    python benchmarks/coming_from/run.py [pytorch] [fastai] [lightning] [ignite] [keras]

They run in the Python that the environment variable NBDEV_TRAINER_PEERS_PYTHON names, else in this one; it needs what
`benchmarks/peers.txt` lists. A library that it does not have is left out, and said so.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# name: the package, and the module that proves that it is there
packages = {
    "pytorch": ("torch", "torch"),
    "fastai": ("fastai", "fastai"),
    "lightning": ("lightning", "lightning"),
    "ignite": ("pytorch-ignite", "ignite"),
    "keras": ("keras", "keras"),
}


def python() -> str:
    "The interpreter that has the other libraries"
    return os.environ.get("NBDEV_TRAINER_PEERS_PYTHON") or sys.executable


def installed(name: str) -> str | None:
    "The version of a library; None where it is not installed"
    package, module = packages[name]
    program = f"import importlib.util; assert importlib.util.find_spec({module!r}); " \
              f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    found = subprocess.run([python(), "-c", program], capture_output=True, text=True, timeout=60)
    return found.stdout.strip().split("+")[0] if found.returncode == 0 else None


def run(name: str) -> str:
    "The last line that a program prints; raises `RuntimeError` with all it said when it fails"
    program = Path(__file__).with_name(f"with_{name}.py").resolve()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([python(), "-W", "ignore", str(program)], cwd=folder, capture_output=True, text=True,
                              timeout=180)
    if done.returncode:
        raise RuntimeError(f"{program.name} failed\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *packages], help="which; none: all", metavar="name")
    for name in parser.parse_args().names or packages:
        version = installed(name)
        package = packages[name][0]
        print(f"{package} is not installed" if version is None else f"{package} {version}, {run(name)}")


if __name__ == "__main__":
    main()
