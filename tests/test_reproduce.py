"""Settings that make results repeat, and the report of what does not let them."""

import random
import subprocess

import numpy as np
import pytest
import torch
from helpers import differences
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nbdev_trainer import Callback, Deterministic, Duration, Learner
from nbdev_trainer.callbacks.deterministic import determinism
from nbdev_trainer.core.seeding import rng_state
from nbdev_trainer.testing import assert_same_weights, tiny_loaders, tiny_model
from nbdev_trainer.use.reproduce import drawn_while_reading, git_state

SETTINGS = [
    (False, False, False, False),
    (True, True, True, False),
    (True, False, False, True),
    (False, False, True, True),
]


def new_learner(loaders=None, **options):
    options = {"device": "cpu", "lr": 0.1, "verbose": 0, "seed": 0} | options
    return Learner(tiny_model(), loaders or tiny_loaders(), nn.CrossEntropyLoss(), **options)


@pytest.fixture(params=SETTINGS, ids=str)
def before(request):
    """The settings that somebody made before; put back after the test."""
    own = determinism()
    enabled, warn_only, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = request.param
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    yield determinism()
    enabled, warn_only, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = own
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_settings_hold_for_the_fit_and_are_put_back_however_it_ends(before, error):
    learner, seen = new_learner(deterministic=True), []

    def look(trainer):
        seen.append(determinism())
        if error is not None:
            raise error("here")

    learner.on("after_batch", look)
    assert determinism() == before  # making a learner sets nothing
    if error is None:
        learner.fit(1)
    else:
        with pytest.raises(error):
            learner.fit(1)
    assert set(seen) == {(True, False, False, True)} and determinism() == before


@pytest.mark.parametrize("event", ["before_fit", "after_fit"])
def test_the_settings_are_put_back_when_another_callback_fails_at_the_ends(before, event):
    def fail(self, trainer):
        raise RuntimeError("at an end")

    failing = type("Failing", (Callback,), {event: fail})()
    for callbacks in ([failing], [failing, Deterministic()]):
        learner = new_learner(callbacks=callbacks, deterministic=len(callbacks) == 1)
        with pytest.raises(RuntimeError, match="at an end"):
            learner.fit(1)
        assert determinism() == before


def test_an_operation_that_cannot_repeat_is_named_at_the_first_batch():
    class Refused(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs.clone().put_(torch.tensor([0]), torch.zeros(1)))

    options = {"device": "cpu", "lr": 0.1, "verbose": 0}
    Learner(Refused(4, 3), tiny_loaders(), nn.CrossEntropyLoss(), **options).fit(1)
    learner = Learner(Refused(4, 3), tiny_loaders(), nn.CrossEntropyLoss(), deterministic=True, **options)
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        learner.fit(1)
    assert learner.trainer.state.batch == 0


def test_deterministic_changes_no_result_on_a_cpu():
    learners = [new_learner(deterministic=one) for one in (False, True)]
    for learner in learners:
        learner.fit(2)
    assert_same_weights(learners[0].model, learners[1].model)


def test_cuda_without_its_work_space_is_refused_when_the_learner_is_made(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr("nbdev_trainer.learner.own_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr("nbdev_trainer.learner.move_model", lambda model, device: None)
    monkeypatch.setattr(nn.Module, "to", lambda self, *values: self)
    with pytest.raises(RuntimeError, match="Set it before Python starts"):
        new_learner(deterministic=True, device="cuda")


class Random(Dataset):
    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.full((4,), float(self.draw())), i % 3


@pytest.mark.parametrize(
    ("draw", "found"),
    [
        (random.random, ["python"]),
        (np.random.rand, ["numpy"]),
        (lambda: 1.0, []),
        (lambda: torch.rand(()), []),
    ],
)
def test_what_reading_draws_from_is_found_and_put_back(draw, found):
    loader = DataLoader(Random(draw), batch_size=4)
    before = rng_state()
    assert drawn_while_reading(loader) == found
    assert differences(before, rng_state()) == []


def test_a_report_changes_nothing_in_the_run():
    class Counting(Callback):
        def __init__(self):
            self.count, self.every = 0, Duration.parse("5m")

        def after_batch(self, trainer):
            self.count += 1

    data = TensorDataset(torch.randn(24, 4), torch.arange(24) % 3)
    learners = []
    for look in (True, False):
        torch.manual_seed(0)
        loader = DataLoader(data, batch_size=4, shuffle=True)
        learners.append(learner := new_learner((loader, None), callbacks=[Counting()], seed=None))
        learner.fit("3ba")
        if look:
            before, settings = learner.trainer.state_dict(), determinism()
            report = learner.reproduce("1h", validate_every="10m")
            assert differences(before, learner.trainer.state_dict()) == [] and determinism() == settings
            assert {"seed", "order_of_data", "clock", "callbacks_without_state"} <= set(report.names)
            assert (
                "n='1h'" in repr(report)
                and "every is '5m'" in repr(report)
                and "Counting changes count" in repr(report)
            )
        learner.fit("3ba")
    assert_same_weights(learners[0].model, learners[1].model)


def test_callbacks_of_the_library_are_not_reported():
    from nbdev_trainer import EMA, EarlyStopping, TimeSplit

    callbacks = [EMA(0.9), EarlyStopping("valid_loss", patience=2), TimeSplit()]
    assert "callbacks_without_state" not in new_learner(callbacks=callbacks).reproduce(3).names


def test_a_learner_of_ours_with_a_seed_has_nothing_to_mend(monkeypatch):
    monkeypatch.setattr("nbdev_trainer.use.reproduce.git_state", lambda: ("1a2b3c4", 0))
    report = new_learner(deterministic=True).reproduce(3, validate_every="1ep")
    assert report.ok and "commit 1a2b3c4" in repr(report)


def test_changes_that_are_in_no_commit_are_counted(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path, *words],
            check=True,
            capture_output=True,
        )

    assert git_state(str(tmp_path)) is None
    git("init")
    (tmp_path / "train.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    assert git_state(str(tmp_path))[1] == 0
    (tmp_path / "train.py").write_text("2")
    (tmp_path / "new.py").write_text("3")
    assert git_state(str(tmp_path))[1] == 2
    monkeypatch.setenv("PATH", "")
    assert git_state(str(tmp_path)) is None


def test_git_runs_no_program_that_a_repository_names(tmp_path):
    subprocess.run(["git", "init", tmp_path], check=True, capture_output=True)
    (hook := tmp_path / "hook.sh").write_text(f"#!/bin/sh\ntouch '{tmp_path / 'it ran'}'\n")
    hook.chmod(0o755)
    for setting in (["core.fsmonitor", str(hook)], ["user.name", "a"], ["user.email", "a@b"]):
        subprocess.run(["git", "-C", tmp_path, "config", *setting], check=True)
    commit = ["git", "-c", "core.fsmonitor=false", "-C", tmp_path, "commit", "--allow-empty", "-m", "first"]
    subprocess.run(commit, check=True, capture_output=True)
    assert git_state(str(tmp_path))[1] == 1
    assert not (tmp_path / "it ran").exists()
