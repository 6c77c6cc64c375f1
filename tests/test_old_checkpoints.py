"""Checkpoints that earlier versions wrote are read by this one, and their runs go on.

    python tests/test_old_checkpoints.py   # writes one with the version that is installed, before it is released
"""

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from nbdev_trainer import EMA, Callback, Checkpoint, Learner, Loaders, Run, __version__
from nbdev_trainer.store.checkpoints import SCHEMA, list_checkpoints, read_checkpoint

KEPT = Path(__file__).parent / "checkpoints"
EVERY = sorted(one.parent for one in KEPT.glob("*/checkpoints"))


class PowerCut(Callback):
    """Ends the run that is kept, in its second epoch."""

    only_watches = True

    def after_batch(self, trainer):
        if trainer.state.batch == 9:
            raise ConnectionError


def learner(run_dir, seed=0, *callbacks):
    """The program of the kept runs: a change here would be a change of their settings."""
    torch.manual_seed(seed)
    inputs = torch.linspace(-1, 1, 160).reshape(40, 4)
    loaders = Loaders.from_arrays(inputs, (inputs.sum(1) > 0).long(), valid=0.25, batch_size=5, seed=0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 2))
    return Learner(model, loaders, nn.CrossEntropyLoss(), lr=0.01, callbacks=[EMA(0.9), Checkpoint("4ba", best="valid_loss"), *callbacks],
                   accumulate=2, device="cpu", seed=0, verbose=0, run_dir=run_dir)  # fmt: skip


def write(directory):
    """A run that was cut off at batch 9, of which the state after batch 8 is kept; without the names of the machine."""
    with pytest.raises(ConnectionError):
        learner(directory, 0, PowerCut()).fit_one_cycle(3)
    shutil.rmtree(directory / "tensorboard", ignore_errors=True)
    for name in ("config.json", "fits.jsonl"):
        path = directory / name
        path.write_text(path.read_text().replace(platform.node(), "a machine"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "command": "", "git": None}, indent=2) + "\n")


@pytest.fixture(params=EVERY, ids=lambda one: one.name)
def kept(request, tmp_path):
    return Path(shutil.copytree(request.param, tmp_path / "run"))


def test_a_checkpoint_of_each_form_is_kept():
    forms = {json.loads((one / "manifest.json").read_text())["schema"] for run in EVERY for one in list_checkpoints(run / "checkpoints")}
    assert forms == set(range(1, SCHEMA + 1))


def test_a_kept_checkpoint_is_read(kept):
    newest = list_checkpoints(kept / "checkpoints")[-1]
    state = read_checkpoint(newest)
    assert state["state"]["batch"] == 8 and list(state["model"]["state"]) == list(learner(None).model.state_dict())
    assert Run.open(kept).best.name == "ba-000006"


def test_a_kept_run_goes_on(kept):
    one = learner(kept, seed=1)
    one.fit_one_cycle(3, resume=True)
    assert (one.trainer.state.batch, len(one.history)) == (18, 3)
    rows = [json.loads(line) for line in (kept / "history.jsonl").read_text().splitlines()]
    assert [row["batch"] for row in rows] == [6, 12, 18]


def test_weights_and_averages_of_a_kept_checkpoint_are_loaded(kept):
    newest = list_checkpoints(kept / "checkpoints")[-1]
    state = read_checkpoint(newest)
    one = learner(None, seed=1)
    assert one.load(newest).complete
    assert all(torch.equal(value, state["model"]["state"][name]) for name, value in one.model.state_dict().items())
    assert one.load(newest, averaged=True).complete
    assert torch.equal(one.model[0].weight, state["callbacks"]["EMA"]["averages"]["0.weight"])


if __name__ == "__main__":
    write(KEPT / f"v{__version__}")
