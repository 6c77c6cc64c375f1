"""The function that `launch` runs, in two workers of Ray Train: the same weights, also after a worker was lost.

Ray is no requirement of the tests: `pip install "nbdev_trainer[ray]"`, then `pytest --full tests/distributed/test_ray.py`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray Train is optional: nbdev_trainer[ray]")
pytestmark = pytest.mark.slow
LIMIT = 240  # seconds for each program; most of it is the start of Ray's processes, and a busy machine makes it long

PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import torch
from torch import nn
from nbdev_trainer import Accuracy, Callback, Checkpoint, Learner, Loaders, ray_trainer
from nbdev_trainer.scale.launch import launch
from nbdev_trainer.testing import tiny_loaders

class DiesOnce(Callback):
    only_watches = True
    def __init__(self, mark, rank): self.mark, self.rank = Path(mark), rank
    def after_batch(self, trainer):
        if trainer.state.batch != 9 or os.environ["RANK"] != self.rank or self.mark.exists(): return
        self.mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

def train(run_dir, lost=None):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    callbacks = [Checkpoint("2ba")] + ([] if lost is None else [DiesOnce(run_dir + "-lost", lost)])
    learner = Learner(model, tiny_loaders(), nn.CrossEntropyLoss(), lr=0.1, seed=0, metrics=[Accuracy()], device="cpu",
                      callbacks=callbacks, run_dir=run_dir)
    learner.fit(3, resume=True)
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in learner.history.rows]
    weights = {name: one.tolist() for name, one in model.state_dict().items()}
    return {"weights": weights, "rows": rows, "processes": learner.trainer.engine.strategy.world_size}

def with_ray(folder, lost):
    import ray
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=f"{folder}/ray")
    try:
        result = ray_trainer(train, "run", lost, storage="storage", name="test", keep_last=9).fit()
    finally: ray.shutdown()
    reported = [{name: value for name, value in row.items() if name != "seconds"} for _, row in result.best_checkpoints]
    state = json.loads((Path(result.checkpoint.path) / "manifest.json").read_text())
    return {**result.return_value, "reported": reported, "last": state["batch"], "folder": result.path}

if __name__ == "__main__":
    folder, starter, *lost = sys.argv[1:]
    os.chdir(folder)
    found = launch(train, "run") if starter == "launch" else with_ray(folder, *lost or [None])
    Path("found.json").write_text(json.dumps(found))
"""


def processes_in(folder):
    """The command lines of processes that have a folder in them."""
    found = []
    for one in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = one.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if str(folder) in line:
            found.append(line)
    return found


@contextmanager
def short_folder():
    """A folder with a short path: Ray keeps sockets in it, whose paths may have 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="rt"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture
def folder():
    with short_folder() as path:
        yield path


def run(folder, *arguments):
    """What the program found, within the limit; no process of it is left."""
    (folder / "program.py").write_text(PROGRAM)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "HOME": str(folder), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(folder / "program.py"), str(folder), *arguments]
    with (folder / "log").open("w") as log:
        program = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = program.wait(LIMIT)
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)  # Ray's processes end when the program is gone
                program.wait()
    assert code == 0, (folder / "log").read_text()[-5000:]
    assert processes_in(folder) == []
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def launched():
    with short_folder() as path:
        return run(path, "launch")


def check(found, launched, folder):
    assert launched["processes"] == found["processes"] == 2
    assert found["weights"] == launched["weights"]
    assert found["rows"] == launched["rows"] and len(launched["rows"]) == 3
    assert found["reported"] == launched["rows"][-len(found["reported"]):]  # each row with a checkpoint, once
    assert found["last"] == launched["rows"][-1]["batch"]
    assert found["folder"] == str(folder / "storage" / "test")
    assert (folder / "run" / "history.jsonl").is_file()  # relative to where the program was started


def test_two_workers_of_ray_train_what_two_launched_processes_train(launched, folder):
    found = run(folder, "ray")
    check(found, launched, folder)
    assert found["reported"] == launched["rows"]
    assert not (folder / "run-lost").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_run_that_lost_a_worker_ends_with_the_weights_of_an_undisturbed_one(launched, folder, rank):
    check(run(folder, "ray", rank), launched, folder)  # Ray may have lost the row that came just before the worker
    assert (folder / "run-lost").exists()
