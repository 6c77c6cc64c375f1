"""The files and commands that the page on several processes shows: they run as they stand there."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from nbdev_trainer import Run, read_checkpoint

ROOT = Path(__file__).parents[2]
LIMIT = 90  # seconds for each program

SRUN = """#!{python}
import os, subprocess, sys, time
from pathlib import Path
command = [one for one in sys.argv[1:] if not one.startswith("--")]
step = {{**os.environ, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}}
tasks = [subprocess.Popen(command, env={{**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}}) for rank in "01"]
if "TIME_IS_UP_AFTER" in os.environ:
    rows = Path(os.environ["TIME_IS_UP_AFTER"])
    while not rows.is_file() and None in [one.poll() for one in tasks]: time.sleep(0.01)
    for one in tasks: one.terminate()
sys.exit(max(one.wait() % 256 for one in tasks))
"""


def shown(language):
    """The text files and commands in a language, in the order of the page."""
    cells = json.loads((ROOT / "nbs/howto/13_several_processes.ipynb").read_text("utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return [textwrap.dedent(one) for one in re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.M | re.S)]


def free_port(first=20_000):
    """A port that nobody listens at, of those that follow from the number of a job."""
    for port in range(first + os.getpid() % 10_000, first + 20_000):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)):
                return port
    raise RuntimeError("no port is free")


def program(name, text):
    name.write_text(text)
    name.chmod(0o755)


@pytest.fixture
def place(tmp_path):
    """A folder with train.py of the page, and a torchrun and a python that are those of this test."""
    (tmp_path / "train.py").write_text(next(one for one in shown("python") if one.startswith("# train.py")))
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/torchrun", f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    program(tmp_path / "bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    return tmp_path


def start(place, command, **variables):
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**alone, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    with (place / f"log-{len(list(place.glob('log-*')))}").open("w") as log:
        return subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(place, *processes):
    """The exit codes; nothing runs on when the time is up."""
    try:
        return [one.wait(LIMIT) for one in processes]
    finally:
        for one in processes:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
                one.wait()
        print(*(log.read_text() for log in sorted(place.glob("log-*"))))  # pytest shows it when a test fails


def found(place):
    """The history without the clock, and the weights, of the run in a folder."""
    run = Run.open(place / "runs/digits")
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in run.history.rows]
    return rows, read_checkpoint(run.checkpoints[-1])["model"]["state"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process finds."""
    place = tmp_path_factory.mktemp("one")
    (place / "train.py").write_text(next(one for one in shown("python") if one.startswith("# train.py")))
    assert finish(place, start(place, [sys.executable, "train.py"])) == [0]
    return found(place)


def assert_same(one, place):
    rows, weights = found(place)
    assert len(rows) == len(one[0]) == 5
    for ours, theirs in zip(rows, one[0]):
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert (ours["samples"], ours["valid_accuracy"]) == (theirs["samples"], theirs["valid_accuracy"])
    for name, value in one[1].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


def test_torchrun_on_one_machine(place, one):
    (command,) = [text for text in shown("sh") if "--standalone" in text]
    assert finish(place, start(place, shlex.split(command))) == [0]
    assert_same(one, place)


def test_torchrun_on_two_machines(place, one):
    (text,) = [text for text in shown("sh") if "--node-rank 0" in text]
    commands = [shlex.split(line, comments=True) for line in text.splitlines()]
    port = str(free_port())
    here = {"node1": "127.0.0.1", "29500": port, "4": "1"}  # this machine plays both, with a process each
    commands = [[here.get(word, word) for word in command] for command in commands]
    assert len(commands) == 2 and commands[0] != commands[1]
    assert finish(place, *(start(place, command) for command in commands)) == [0, 0]
    assert_same(one, place)


def slurm(place, job, **variables):
    (place / "digits.sbatch").write_text(shown("bash")[0])
    program(place / "bin/srun", SRUN.format(python=sys.executable))
    program(place / "bin/scontrol", f'#!/bin/sh\necho "$@" >> {place}/asked\n')
    common = {"SLURM_JOB_ID": job, "SLURM_SUBMIT_DIR": str(place), "SLURM_CPUS_PER_TASK": "1", **variables}
    return finish(place, start(place, ["bash", "digits.sbatch"], **common))


def test_the_sbatch_file_is_one(place):
    (text,) = shown("bash")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    assert text.startswith("#!/bin/bash\n#SBATCH") and text.count("#SBATCH") == len(options)
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@120" and "requeue" in options
    assert len(re.findall(r"^srun .*python train.py$", text, re.M)) == 1 and "torchrun" not in text


def test_the_sbatch_file_trains(place, one):
    assert slurm(place, str(free_port() - 20_000)) == [0]
    assert_same(one, place)
    assert not (place / "asked").exists()


def test_a_job_whose_time_is_up_is_queued_again_and_goes_on(place):
    train = place / "train.py"
    train.write_text(train.read_text().replace("fit(5,", "fit(12,"))
    job = str(free_port() - 20_000)
    assert slurm(place, job, TIME_IS_UP_AFTER=str(place / "runs/digits/history.jsonl")) == [143]
    assert (place / "asked").read_text().splitlines() == [f"requeue {job}"]
    run = Run.open(place / "runs/digits")
    assert run.ending == "interrupted: SIGTERM"
    done = read_checkpoint(run.checkpoints[-1])["state"]["batch"]
    assert 0 < done < 12 * 23
    assert slurm(place, job) == [0]
    run = Run.open(place / "runs/digits")
    assert run.ending == "finished" and run.history["epoch"] == list(range(1, 13))
    assert run.fits[-2]["batch"] == done  # the second part began where the first had ended


def test_the_kubernetes_job_is_one_group_with_the_names_it_uses(place, one):
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all(shown("yaml")[0])
    pod, (container,) = job["spec"]["template"]["spec"], job["spec"]["template"]["spec"]["containers"]
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert pod["subdomain"] == service["metadata"]["name"] and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] > 30  # which torchrun takes
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert variables["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    assert f"--nnodes {job['spec']['completions']} " in container["command"][-1]

    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # two pods, on this machine
    pods = [start(place, container["command"], JOB_COMPLETION_INDEX=index, **meeting) for index in "01"]
    assert finish(place, *pods) == [0, 0]
    assert_same(one, place)
