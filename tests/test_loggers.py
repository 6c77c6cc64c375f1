"""Logs of a run: TensorBoard, Weights & Biases and MLflow for real, offline; files that are not ours stay as they are.

wandb and mlflow start threads, set variables and keep a service process, so each has a process of its own here.
"""

import csv
import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from helpers import one_thread as one_thread
from torch import nn

from nbdev_trainer.callbacks.loggers import CSVTable, JSONLines
from nbdev_trainer.callbacks.recorder import Recorder
from nbdev_trainer.callbacks.trackers import TensorBoard
from nbdev_trainer.loop.steps import SupervisedStep
from nbdev_trainer.loop.trainer import Trainer

READY = [(torch.ones(2, 2), torch.ones(2, 1))] * 3

# What each of the programs is given: two fits of one run, and one that is interrupted.
RUN = """
import os, sys, torch
from torch import nn
from nbdev_trainer import MLflow, Recorder, SupervisedStep, Trainer, WeightsAndBiases

ready = [(torch.ones(2, 2), torch.ones(2, 1))] * 3
def train(tracker, interrupted=False):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, SupervisedStep(nn.MSELoss()), optimizer, callbacks=[tracker, Recorder("2st")])
    trainer.fit(ready, ready, 2)
    if not interrupted:
        trainer.fit(ready, ready, 1)
        return
    def stop(trainer): raise KeyboardInterrupt
    trainer.on("after_batch", stop)
    try: trainer.fit(ready, ready, 1)
    except KeyboardInterrupt: pass
"""


def run_alone(program, folder, **variables):
    """The output of a program in a new process group, which must have no process left afterwards."""
    environment = {**os.environ, "HOME": str(folder), "WANDB_SILENT": "true", **variables}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN + textwrap.dedent(program)],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        deadline = time.monotonic() + 20
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert members(process.pid) == []
    finally:
        try:
            os.killpg(process.pid, 9)
        except ProcessLookupError:
            pass
    return output


def members(session):
    """The processes of a session that are alive, by their command."""
    listed = subprocess.run(["ps", "-o", "stat=,args=", "-s", str(session)], capture_output=True, text=True)
    return [line for line in listed.stdout.splitlines() if not line.startswith("Z")]


def trainer_with(*callbacks):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, SupervisedStep(nn.MSELoss()), optimizer, callbacks=[*callbacks, Recorder("2st")])


def read_tensorboard(directory):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(directory), purge_orphaned_data=False).Reload()  # files of one second are in any order
    return {tag: sorted(event.step for event in found.Scalars(tag)) for tag in found.Tags()["scalars"]}


def test_tensorboard_has_rows_and_steps_of_all_fits_of_a_run(tmp_path):
    tracker = TensorBoard(tmp_path / "logs")
    trainer = trainer_with(tracker)
    trainer.fit(READY, READY, 2)
    trainer.fit(READY, READY, 1)
    found = read_tensorboard(tmp_path / "logs")
    assert found["loss/valid"] == found["loss/train"] == found["run/seconds"] == [3, 6, 9]
    assert found["loss/step"] == [1, 2, 4, 6, 8]
    assert tracker.writer is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_tensorboard_is_closed_however_a_fit_ends(tmp_path, error):
    def fail(trainer):
        raise error

    tracker = TensorBoard(tmp_path / "logs")
    trainer = trainer_with(tracker)
    trainer.on("after_batch", fail, after="4ba")
    with pytest.raises(error):
        trainer.fit(READY, READY, 2)
    assert tracker.writer is None
    assert read_tensorboard(tmp_path / "logs")["loss/step"] == [1, 2, 4]


def test_a_fit_that_cannot_begin_leaves_no_tensorboard_files(tmp_path):
    trainer = trainer_with(TensorBoard(tmp_path / "logs"))
    with pytest.raises(RuntimeError):
        trainer.fit([(torch.ones(2, 7), torch.ones(2, 1))])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_told_before_training(tmp_path, monkeypatch):
    for name in ("tensorboard", "wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    trainer = trainer_with(TensorBoard(tmp_path / "logs"))
    with pytest.raises(ImportError, match=r'nbdev_trainer\[track\]'):
        trainer.fit(READY)
    assert trainer.state.batch == 0


def test_weights_and_biases_keeps_an_offline_run(tmp_path):
    pytest.importorskip("wandb")
    program = """
    import wandb
    tracker = WeightsAndBiases("digits", name="first", mode="offline", directory=".", config={"data": "made up"})
    before = sys.stdout
    train(tracker, interrupted=True)
    assert tracker.run is None and wandb.run is None and sys.stdout is before
    wandb.teardown()
    """
    run_alone(program, tmp_path)
    kept = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert kept and len({path.name for path in kept}) == 1  # one run, though there were two fits
    text = b"".join(path.read_bytes() for path in kept)
    for word in (b"valid_loss", b"step_loss", b"higher_is_better", b"made up", b"first"):
        assert word in text


def test_mlflow_keeps_runs_in_a_file(tmp_path):
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package)
    program = """
    import json, mlflow
    before = mlflow.get_tracking_uri()
    tracker = MLflow("digits", uri="sqlite:///kept.db", name="first", config={"data": "made up"})
    train(tracker)
    train(MLflow("digits", uri="sqlite:///kept.db", name="second"), interrupted=True)
    assert tracker.client is None and mlflow.active_run() is None and mlflow.get_tracking_uri() == before
    client = mlflow.MlflowClient(tracking_uri="sqlite:///kept.db")
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id], order_by=["start_time"])
    first, second = sorted(runs, key=lambda run: run.info.run_name)
    print(json.dumps({
        "names": [first.info.run_name, second.info.run_name], "ends": [first.info.status, second.info.status],
        "params": first.data.params,
        "steps": {name: [metric.step for metric in client.get_metric_history(first.info.run_id, name)]
                  for name in ("valid_loss", "step_loss")}}))
    """
    found = json.loads(run_alone(program, tmp_path, MLFLOW_DISABLE_TELEMETRY="true").splitlines()[-1])
    assert (found["names"], found["ends"]) == (["first", "second"], ["FINISHED", "KILLED"])
    assert found["steps"] == {"valid_loss": [3, 6, 9], "step_loss": [1, 2, 4, 6, 8]}
    assert (found["params"]["data"], found["params"]["model"]) == ("made up", "Linear")


def test_a_csv_table_of_something_else_is_not_overwritten(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text("name,price\npear,3\n")
    with pytest.raises(FileExistsError, match="holds something else"):
        trainer_with(CSVTable(path)).fit(READY)
    assert path.read_text() == "name,price\npear,3\n"


def test_a_csv_table_of_another_run_is_not_overwritten(tmp_path):
    path = tmp_path / "history.csv"
    first = trainer_with(CSVTable(path))
    first.fit(READY, n=2)
    before = path.read_text()
    with pytest.raises(FileExistsError, match="another name"):
        trainer_with(CSVTable(path)).fit(READY, n=1)
    assert path.read_text() == before
    first.fit(READY, n=1)  # the same run goes on
    assert [row["epoch"] for row in csv.DictReader(path.read_text().splitlines())] == ["1", "2", "3"]


def test_json_lines_of_another_run_stay(tmp_path):
    path = tmp_path / "history.jsonl"
    trainer_with(JSONLines(path)).fit(READY, n=2)
    before = path.read_text()
    trainer_with(JSONLines(path)).fit(READY, n=1)
    assert path.read_text().startswith(before) and len(path.read_text().splitlines()) == 3
