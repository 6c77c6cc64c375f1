"""Whatever happens while a state is written: what was saved before stays sound, and the run ends as the undisturbed one."""

import itertools
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import fault_program
import pytest
from children import children as children
from children import nursery as nursery
import torch
from fault_program import DirectoryGoes, FullAt, compare, leftovers, with_checkpoint
from helpers import differences

from nbdev_trainer import Checkpoint
from nbdev_trainer.callbacks import checkpoint as saving
from nbdev_trainer.store import checkpoints as stored
from nbdev_trainer.store.checkpoints import (
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from nbdev_trainer.store.sealed import MANIFEST, DamagedError, sealed_text

WRITTEN = "model.safetensors", "optimizer.safetensors", "state.safetensors", "state.json", MANIFEST, "latest"
EPOCHS = 3  # 27 batches: a run must not be over before it has been killed at each call that comes after the commit


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert nursery.run(fault_program.train, run_dir, epochs=EPOCHS) == 0
    return run_dir


@pytest.fixture
def begun(nursery, tmp_path_factory, undisturbed):
    """A run of which 5 batches are done, and the states of batches 4 and 5 are saved; the optimizer has stepped once."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    killed = nursery.run(fault_program.train, run_dir, fault_program.KillAt(5), background=False, epochs=EPOCHS)
    assert killed == -signal.SIGKILL
    return run_dir


def sound(run_dir):
    """The newest checkpoint, which must not be damaged."""
    path, state = newest_checkpoint(run_dir / "checkpoints", strict=True)
    assert state["state"]["batch"] == stored.batch_of(path)
    return path


# --- killed while saving ------------------------------------------------------------------------------------------------


@pytest.mark.fault("SIGKILL at each step of a save", "before each call that makes, syncs, renames or removes something; "
                   "--full: after each as well", "a sound checkpoint at all times; leftovers removed; the same end")  # fmt: skip
@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_a_kill_at_each_call_of_a_save(children, undisturbed, begun, when):
    for number in itertools.count():
        before = sound(begun)
        ending = children.run(fault_program.train_until_call, begun, number, when, epochs=EPOCHS)
        if ending == 0:
            break  # a save has no more calls
        assert ending == -signal.SIGKILL, number
        assert stored.batch_of(sound(begun)) - stored.batch_of(before) in (0, 1), number
        assert len(leftovers(begun)) <= 1, number
    assert number >= 30
    assert leftovers(begun) == []
    compare(begun, undisturbed)


def points(sizes, number):
    """(file, bytes) for as many places in each file, from its first byte on."""
    return [(name, k * size // number) for name, size in sizes.items() for k in range(number)]


@pytest.mark.fault("SIGKILL at each part of a file", "the kernel kills the writer when a file grows beyond n bytes; 12 places "
                   "in the 6 files of a save, --full: 42", "the one before loads; leftovers removed; the same end")  # fmt: skip
@pytest.mark.parametrize("number", [2, pytest.param(7, marks=pytest.mark.slow)])
def test_a_kill_inside_each_file_of_a_save(children, undisturbed, begun, number):
    sizes = {name: (sound(begun) / name).stat().st_size for name in WRITTEN[:-1]} | {"latest": 10}
    for name, size in points(sizes, number):
        before = sound(begun)
        killed = children.run(fault_program.train_until_byte, begun, name, size, epochs=EPOCHS)
        assert killed == -signal.SIGXFSZ, (name, size)
        assert (sound(begun) == before) == (name != "latest"), (name, size)
        assert len(leftovers(begun)) == 1, (name, size)
    assert children.run(fault_program.train, begun, epochs=EPOCHS) == 0
    assert leftovers(begun) == []
    compare(begun, undisturbed)


# --- damaged afterwards -------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(undisturbed, tmp_path, monkeypatch):
    """Two checkpoints, the newer of which is going to be damaged; nothing in it may be read as a state."""
    with_checkpoint(undisturbed, tmp_path / "run", list_checkpoints(undisturbed / "checkpoints")[-1].name)
    run_dir = tmp_path / "run"
    newest = sound(run_dir)
    older = write_checkpoint(newest.parent, read_checkpoint(newest), batch=1)
    real = stored.read_tensors

    def read(path):
        assert Path(path).parent != newest, "a file of a damaged checkpoint was read"
        return real(path)

    monkeypatch.setattr(stored, "read_tensors", read)
    return newest, older


def found(newest, older, *words):
    """Asserts that damage is found, told, and passed over."""
    told = []
    assert newest_checkpoint(newest.parent, told=told.append)[0] == older
    assert len(told) == 1 and str(newest) in told[0]
    for word in words:
        assert word in told[0]
    with pytest.raises(DamagedError):
        newest_checkpoint(newest.parent, strict=True)


@pytest.mark.fault("a truncated file", "each file of a checkpoint cut to 0, 10, 50, 90 and 99.9 %",
                   "found before use, named with both sizes; the one before is used")  # fmt: skip
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", WRITTEN[:-1])
def test_a_truncated_file_is_found(damaged, name, share):
    newest, older = damaged
    size = (newest / name).stat().st_size
    left = min(int(size * share), size - 1)
    os.truncate(newest / name, left)
    found(newest, older, name, *([] if name == MANIFEST else [f"{left:,} bytes", f"expected {size:,}"]))


def flips(newest, number):
    """(file, bit) for many places: some in each file, the rest by its size."""
    sizes = {name: (newest / name).stat().st_size for name in WRITTEN[:-1]}
    draw = random.Random(0)
    names = [name for name in sizes for _ in range(6)]
    names += draw.choices(list(sizes), list(sizes.values()), k=number - len(names))
    return [(name, draw.randrange(8 * sizes[name])) for name in names]


@pytest.mark.fault("a flipped bit", "100 places over all files of a checkpoint", "100 of 100 found before use")
def test_a_flipped_bit_is_found(damaged):
    newest, older = damaged
    for name, bit in flips(newest, 100):
        content = (newest / name).read_bytes()
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (newest / name).write_bytes(changed)
        found(newest, older, name)
        (newest / name).write_bytes(content)


@pytest.mark.fault("a damaged newest checkpoint", "a bit of its weights; then fit(resume=True)",
                   "goes on from the one before, and says so; the same end")  # fmt: skip
def test_a_run_goes_on_from_the_one_before(children, undisturbed, begun):
    newest = sound(begun)
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    assert children.run(fault_program.train, begun, epochs=EPOCHS) == 0
    compare(begun, undisturbed)


@pytest.mark.fault("a missing manifest, a missing file", "removed", "found before use, named; the one before is used")
@pytest.mark.parametrize("name", WRITTEN[:-1])
def test_a_missing_file_is_found(damaged, name):
    newest, older = damaged
    (newest / name).unlink()
    found(newest, older, f"has no {MANIFEST}" if name == MANIFEST else f"{name} is missing")


@pytest.mark.fault("a file too many", "put into a checkpoint", "left alone, never read")
def test_a_file_too_many_is_left_alone(undisturbed, tmp_path):
    with_checkpoint(undisturbed, tmp_path / "run", sound(undisturbed).name)
    newest = sound(tmp_path / "run")
    (newest / "zz.safetensors").write_bytes(b"not a file of tensors")
    assert differences(read_checkpoint(newest), read_checkpoint(sound(undisturbed))) == []


@pytest.mark.fault("a checkpoint of a newer version", "a higher number in its manifest", "refused, the version named")
def test_a_newer_form_is_refused(undisturbed, tmp_path):
    with_checkpoint(undisturbed, tmp_path / "run", sound(undisturbed).name)
    newest = sound(tmp_path / "run")
    content = json.loads((newest / MANIFEST).read_text())
    del content["seal"]
    content["schema"] += 1
    (newest / MANIFEST).write_text(sealed_text(content))
    with pytest.raises(ValueError, match="form 2.*Install the version that wrote it"):
        newest_checkpoint(newest.parent)


@pytest.mark.fault("another model", "fit(resume=True) with a layer changed", "refused, both named; nothing is loaded")
def test_another_model_is_refused(begun, monkeypatch):
    network = fault_program.network()
    network[-1] = torch.nn.Linear(36, 11)
    monkeypatch.setattr(fault_program, "network", lambda: network)
    weights = network[0].weight.clone()
    with pytest.raises(ValueError, match=r"out_features=10.*is now.*out_features=11"):
        fault_program.train(begun, epochs=EPOCHS)
    assert torch.equal(network[0].weight, weights)


# --- a disk that refuses ------------------------------------------------------------------------------------------------


@pytest.mark.fault("a full disk", "no file can grow beyond n bytes while a checkpoint is written (OSError)",
                   "OSError that names the file; nothing half-written; the one before is sound; the same end later")  # fmt: skip
@pytest.mark.parametrize("background", [True, False], ids=["background", "at once"])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk_is_an_error(children, undisturbed, begun, tmp_path, name, background):
    report, before = tmp_path / "report", sound(begun)
    options = {"background": background, "epochs": EPOCHS}
    ended = children.run(fault_program.train_and_tell, report, begun, FullAt(7, name, 5), **options)
    assert ended == 1
    kind, *text = report.read_text().splitlines()
    assert kind == "OSError"
    assert "File too large" in text[0] and f"{begun / 'checkpoints'}" in "".join(text) and name in "".join(text)
    assert leftovers(begun) == []
    assert stored.batch_of(sound(begun)) >= stored.batch_of(before)
    if background:  # once is enough
        assert children.run(fault_program.train, begun, epochs=EPOCHS) == 0
        compare(begun, undisturbed)


@pytest.mark.fault("a full disk, and on_error='warn'", "no checkpoint can be written from batch 7 to batch 12",
                   "told at each; training goes on; saved again when there is room; the same end")  # fmt: skip
def test_a_full_disk_can_be_waited_for(children, undisturbed, tmp_path):
    saved = Checkpoint("1ba", on_error="warn", background=False)  # the limit is for the whole process, history included
    full = FullAt(7, "model.safetensors", 5, until=12)
    assert children.run(fault_program.train, tmp_path / "run", full, saved, every=None, epochs=EPOCHS) == 0
    assert leftovers(tmp_path / "run") == []
    compare(tmp_path / "run", undisturbed)


@pytest.mark.fault("the directory vanishes", "removed at batch 7; or a file in its place", "OSError that names it")
@pytest.mark.parametrize("background", [True, False], ids=["background", "at once"])
@pytest.mark.parametrize("file", [False, True], ids=["removed", "a file"])
def test_a_directory_that_is_gone_is_an_error(children, tmp_path, file, background):
    run_dir, report = tmp_path / "run", tmp_path / "report"
    gone = DirectoryGoes(7, run_dir / "checkpoints", file)
    assert children.run(fault_program.train_and_tell, report, run_dir, gone, background=background) == 1
    kind, *text = report.read_text().splitlines()
    assert kind in ("FileNotFoundError", "NotADirectoryError", "IsADirectoryError")  # by what was in work just then
    assert str(run_dir / "checkpoints") in "".join(text)


@pytest.mark.fault("a path through a file", "the run is to be kept below a regular file", "OSError before the first batch")
def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    one = fault_program.learner(None, Checkpoint(directory=tmp_path / "file" / "checkpoints"), every=None)
    with pytest.raises(NotADirectoryError, match="checkpoints"):
        one.fit(1)
    assert one.trainer.state.batch == 0


# --- a disk that is slow ------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch):
    """Each write of a checkpoint takes a while; noted is what was under way, and what it was given at its begin and end."""
    notes, under_way, real = [], [], write_checkpoint

    def slowly(directory, state, batch, facts=None, shared=None):
        under_way.append(batch)
        weights = state["model"]["state"]["0.weight"]
        note = {"batch": batch, "under way": len(under_way), "weights": weights.clone(), "latest": latest(directory)}
        time.sleep(0.1)
        path = real(directory, state, batch, facts, shared)
        notes.append({**note, "afterwards": weights.clone(), "path": path})
        under_way.remove(batch)
        return path

    monkeypatch.setattr(saving, "write_checkpoint", slowly)
    return notes


def latest(directory):
    file = directory / "latest"
    return file.read_text().strip() if file.is_file() else None


class Weights(fault_program.Callback):
    """Keeps the weights of each batch, and which checkpoint was named the latest then."""

    def __init__(self):
        self.seen = {}

    def before_fit(self, trainer):
        self.after_batch(trainer)

    def after_batch(self, trainer):
        self.seen[trainer.state.batch] = trainer.model[0].weight.detach().clone()


@pytest.mark.fault("saving takes longer than the time to the next", "each write sleeps; saved at each batch",
                   "one under way at a time; `latest` moves when it is whole; fit returns when all is written")  # fmt: skip
def test_one_save_is_under_way_at_a_time(slow_disk, tmp_path):
    one = fault_program.learner(tmp_path / "run", background=True, rich=False)
    one.fit(1)
    directory = tmp_path / "run" / "checkpoints"
    assert [note["under way"] for note in slow_disk] == [1] * 11
    assert [note["batch"] for note in slow_disk] == [*range(10), 9]
    assert [note["latest"] for note in slow_disk] == [None, *[note["path"].name for note in slow_disk[:-1]]]
    assert latest(directory) == "ba-000009-2" == sound(tmp_path / "run").name
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


@pytest.mark.fault("weights change while they are written", "each write sleeps while training goes on",
                   "what is on the disk are the weights of its batch")  # fmt: skip
def test_what_is_written_are_the_weights_of_its_batch(slow_disk, tmp_path):
    weights = Weights()
    one = fault_program.learner(tmp_path / "run", weights, background=True, rich=False, keep_last=99)
    one.fit(1)
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        saved = read_checkpoint(path)["model"]["state"]["0.weight"]
        assert torch.equal(saved, weights.seen[stored.batch_of(path)]), path.name
    assert all(torch.equal(note["weights"], note["afterwards"]) for note in slow_disk)
    assert not torch.equal(weights.seen[8], weights.seen[9])


@pytest.mark.fault("an error beside the training", "the writer raises at batch 4", "raised at the next save, or the end")
@pytest.mark.parametrize("every, batch", [("1ba", 5), ("4ba", 8), ("20ba", None)])
def test_an_error_beside_the_training_is_raised(monkeypatch, tmp_path, every, batch):
    def failing(directory, state, number, facts=None, shared=None):
        if number >= 4:
            raise RuntimeError("a thing nobody thought of")
        return write_checkpoint(directory, state, number, facts, shared)

    monkeypatch.setattr(saving, "write_checkpoint", failing)
    one = fault_program.learner(tmp_path / "run", every=every, background=True, rich=False)
    with pytest.raises(RuntimeError, match="a thing nobody thought of"):
        one.fit(1)
    assert one.trainer.state.batch == (batch or 9)
