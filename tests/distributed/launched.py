"""Functions that `launch` runs, and that do what users do."""

import os
import signal
import subprocess
import sys
import time
from ipaddress import ip_address
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from nbdev_trainer.scale.processes import join


def batches_of_a_worker():
    return [batch.tolist() for batch in DataLoader(torch.arange(8), batch_size=4, num_workers=1)]


def start_a_program(file):
    """A program that goes on when the function has returned, with the output of its process."""
    if os.environ["RANK"] == "1":
        with open(file, "w") as out:
            out.write(str(subprocess.Popen(["sleep", "40"]).pid))
    return "returned"


def start_a_program_and_fail(file):
    start_a_program(file)
    if os.environ["RANK"] == "0":
        raise ValueError("no label")
    time.sleep(40)


class NoLabel(Exception):
    def __init__(self, sample, path):
        super().__init__(f"sample {sample} in {path}")


class NotMadeAgain:
    def __reduce__(self):
        return NoLabel, (7,)


def fail_with_two_arguments():
    raise NoLabel(7, "train.csv")


def does_not_end():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf", flush=True)
    time.sleep(60)


def who_listens():
    """The port where the processes meet, and the addresses at which it is open."""
    port, found = int(os.environ["MASTER_PORT"]), set()
    for name, width in (("tcp", 8), ("tcp6", 32)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            address, local_port = line.split()[1].split(":")
            if int(local_port, 16) != port or line.split()[3] != "0A":
                continue
            words = [bytes.fromhex(address[k:k + 8])[::-1] for k in range(0, width, 8)]
            found.add(str(ip_address(b"".join(words))))
    return port, found


def arguments():
    return sys.argv


def parts_in_a_dict():
    return {"weights": [a_model_in_parts().weight]}


def leave_by_exit(code):
    """As a script does in which only rank 0 goes on; rank 0 gives its answer."""
    if os.environ["RANK"] == "1":
        sys.exit(code)
    return "the answer"


def a_model_in_parts():
    """Its weights cannot leave the group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    join(timeout="20s")
    return fully_shard(torch.nn.Linear(4, 4), mesh=init_device_mesh("cpu", (1,)))
