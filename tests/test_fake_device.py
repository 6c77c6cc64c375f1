"""What a GPU would refuse or wait for, found without one: fits on a device whose tensors know no number, and calls of torch.cuda written down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_device import CASES
from torch._subclasses.fake_tensor import FakeTensorMode

from nbdev_trainer.callbacks.checkpoint import Copies
from nbdev_trainer.callbacks.progress import Glance

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def answers():
    found = subprocess.run([sys.executable, ROOT / "tests" / "fake_device.py"], capture_output=True, text=True, timeout=240,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("planted")])
def test_a_fit_mixes_no_devices_and_the_host_does_not_wait_in_its_batches(answers, name): assert answers[name] == {}


@pytest.mark.parametrize("name", ["planted: item", "planted: copy"])
def test_a_callback_that_waits_is_found(answers, name): assert list(answers[name].values()) == [6]


def test_a_callback_that_mixes_devices_is_found(answers): assert "fake:0 and cpu" in answers["planted: devices"]


@pytest.fixture
def second_gpu(monkeypatch):
    "Tensors on cuda:1, while the current device is another"
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device}")
    with FakeTensorMode(): yield torch.device("cuda:1")


def test_a_copy_for_a_file_waits_for_the_device_it_comes_from(monkeypatch, second_gpu):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    copied = Copies().take({"weights": torch.ones(2, device=second_gpu), "rows": [torch.ones(2)]})
    assert waited == [second_gpu] and copied["weights"].is_cpu


def test_a_glance_waits_for_the_stream_that_copies(monkeypatch, second_gpu):
    class Event:
        recorded = []
        def record(self, stream="the current stream of the current device"): self.recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert Glance().look(torch.ones((), device=second_gpu)) is None
    assert Event.recorded == ["the stream of cuda:1"]
