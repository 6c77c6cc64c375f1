"""The run that the fault tests disturb: all that has state, in one learner. Child processes import it."""

import itertools
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  # the first optimizer of a process imports it, which takes longer than the training here
from helpers import differences
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nbdev_trainer import EMA, Accuracy, Callback, Checkpoint, EarlyStopping, Learner, Loaders, Run, digits
from nbdev_trainer.data import Category, Data, Flip, Image, Normalize, RandomCrop, random_split
from nbdev_trainer.store import checkpoints as stored
from nbdev_trainer.store import sealed
from nbdev_trainer.store.checkpoints import newest_checkpoint

N, BATCH_SIZE, EPOCHS = 96, 8, 2   # 9 batches of training an epoch, the last one whole; 3 of validation
WALL_CLOCK = {"seconds", "elapsed", "since_validation", "watching", "settings"}


def items():
    images, labels = digits()
    pixels = (images[:N] * 255).byte().permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    return [{"image": image, "label": int(label)} for image, label in zip(pixels, labels[:N], strict=True)]


def loaders(workers=0, kind="threads"):
    data = Data(
        items(),
        {"image": Image("image"), "label": Category("label", vocab=list(range(10)))},
        inputs="image",
        targets="label",
        split=random_split(valid=0.25, seed=0),
        train_transforms=[RandomCrop(7), Flip()],
        batch_transforms=[Normalize([0.5] * 3, [0.5] * 3)],
    )
    how = {"num_workers": workers, "workers": kind} if workers else {}
    return data.loaders(BATCH_SIZE, seed=0, **how)


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(3)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 10))


def arrays():
    images, labels = digits()
    return Loaders.from_arrays(images[:N].repeat(1, 3, 1, 1), labels[:N], valid=0.25, batch_size=BATCH_SIZE, seed=0)


class WithState:
    """Batches in a new order in each epoch; keeps its position, as torchdata's StatefulDataLoader does."""

    def __init__(self):
        images, labels = digits()
        self.images, self.labels = images[:N].repeat(1, 3, 1, 1), labels[:N]
        self.epoch, self.done, self.read = 0, 0, 0

    def __len__(self):
        return N // BATCH_SIZE

    def __iter__(self):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch))
        while self.done < len(self):
            rows = order[self.done * BATCH_SIZE : (self.done + 1) * BATCH_SIZE]
            self.done, self.read = self.done + 1, self.read + 1
            yield self.images[rows], self.labels[rows]
        self.epoch, self.done = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state):
        self.epoch, self.done = state["epoch"], state["done"]


class InOrder(IterableDataset):
    """Samples one after another, the same ones each time it is begun."""

    def __iter__(self):
        images, labels = digits()
        return iter(list(zip(images[:N].repeat(1, 3, 1, 1), labels[:N], strict=True)))

    def __len__(self):
        return N


def dataset():
    images, labels = digits()
    return TensorDataset(images[:N].repeat(1, 3, 1, 1), labels[:N])


FOREIGN = {
    "a DataLoader": lambda: DataLoader(dataset(), BATCH_SIZE, shuffle=True),
    "a DataLoader with a generator": lambda: DataLoader(
        dataset(), BATCH_SIZE, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "an IterableDataset": lambda: DataLoader(InOrder(), BATCH_SIZE),
    "a loader with a state": WithState,
    "a list": lambda: list(DataLoader(dataset(), BATCH_SIZE)),
}


def learner(run_dir, *callbacks, every="1ba", workers=None, keep_last=2, background=False, rich=True, data=None, patience=2, **options):
    torch.set_num_threads(1)
    rich_callbacks = [EMA(0.9), EarlyStopping("valid_loss", patience=patience, restore_best=True)] if rich else []
    if rich:
        options = {"precision": "bf16", "accumulate": 4, **options}
    saving = [] if every is None else [Checkpoint(every, keep_last=keep_last, background=background)]
    own = arrays() if workers is None else loaders(workers)
    return Learner(
        network(),
        own if data is None else (FOREIGN[data](), own.valid),
        nn.CrossEntropyLoss(),
        metrics=[Accuracy()],
        device="cpu",
        seed=0,
        run_dir=run_dir,
        callbacks=[*rich_callbacks, *saving, *callbacks],
        verbose=0,
        **options,
    )


def train(run_dir, *callbacks, epochs=EPOCHS, **options):
    one = learner(run_dir, *callbacks, **options)
    one.fit_one_cycle(epochs, lr=0.01, resume=True)
    return one


class KillAt(Callback):
    """Ends the process at a batch as the kernel would: nothing is run any more."""

    runs_after = (Callback, Checkpoint)
    only_watches = True

    def __init__(self, batch):
        self.batch = batch

    def after_batch(self, trainer):
        if trainer.state.batch == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


class Slow(Callback):
    """Takes its time, so that somebody outside can choose a moment."""

    only_watches = True

    def __init__(self, seconds=0.02):
        self.seconds = seconds

    def after_batch(self, trainer):
        time.sleep(self.seconds)


# --- faults inside a save; a child process is changed for good, and ends -------------------------------------------------

CHANGES = "mkdir", "chmod", "fsync", "rename", "replace", "unlink", "rmdir"  # calls that change what is on the disk


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_call(run_dir, number, when, **options):
    """Goes on with a run, and is killed before or after the n-th call of its first save that changes the disk."""
    count = itertools.count()

    def disturbed(call):
        def called(*args, **kwargs):
            here = next(count) if threading.current_thread().name == "checkpoint" else None
            if here == number and when == "before":
                die()
            try:
                return call(*args, **kwargs)
            finally:  # also when the call fails, as that which makes a directory that is there
                if here == number:
                    die()

        return called

    for name in CHANGES:
        setattr(os, name, disturbed(getattr(os, name)))
    train(run_dir, **options)


def limit_file(name, size):
    """From where a file of a checkpoint is written on, no file of this process can grow beyond so many bytes."""

    def limited(write):
        def written(path, *args, **options):
            if Path(path).name == name:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            try:
                return write(path, *args, **options)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        return written

    for module, function in ((stored, "write_tensors"), (stored, "write_text"), (sealed, "write_text")):
        setattr(module, function, limited(getattr(module, function)))


def train_until_byte(run_dir, name, size, **options):
    """Goes on with a run, and is killed by the kernel when a file of its first save would grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_file(name, size)
    train(run_dir, **options)


class FullAt(Callback):
    """From a batch on, a file of a checkpoint cannot be written; later it can again."""

    only_watches = True

    def __init__(self, batch, name, size, until=None):
        self.batch, self.name, self.size, self.until = batch, name, size, until

    def after_batch(self, trainer):
        if trainer.state.batch == self.batch:
            self.before = stored.write_tensors, stored.write_text, sealed.write_text
            limit_file(self.name, self.size)
        if trainer.state.batch == self.until:
            stored.write_tensors, stored.write_text, sealed.write_text = self.before


class DirectoryGoes(Callback):
    """At a batch, the directory with the checkpoints is removed, or a file takes its place."""

    only_watches = True

    def __init__(self, batch, directory, file=False):
        self.batch, self.directory, self.file = batch, Path(directory), file

    def after_batch(self, trainer):
        if trainer.state.batch == self.batch:
            self.directory.rename(away := self.directory.with_name("away"))  # at once, also when somebody writes to it
            shutil.rmtree(away, ignore_errors=True)
            if self.file:
                self.directory.write_text("a file")


def train_and_tell(report, run_dir, *callbacks, **options):
    """Trains, and writes to a file what was raised."""
    try:
        train(run_dir, *callbacks, **options)
    except BaseException as error:
        Path(report).write_text("\n".join([type(error).__name__, str(error), *getattr(error, "__notes__", [])]))
        raise


# --- what a run has left ------------------------------------------------------------------------------------------------


def final_state(run_dir):
    """What the newest checkpoint of a run holds, without what a clock decides."""
    return without_clock(newest_checkpoint(Path(run_dir) / "checkpoints", strict=True)[1])


def without_clock(value):
    if isinstance(value, dict):
        return {key: without_clock(one) for key, one in value.items() if key not in WALL_CLOCK}
    if isinstance(value, (list, tuple)):
        return type(value)(without_clock(one) for one in value)
    return value


def with_checkpoint(source, target, name):
    """A copy of a run directory as it was when the named checkpoint was its newest."""
    shutil.copytree(source, target, ignore=lambda folder, names: ["checkpoints"] if folder == str(source) else [])
    shutil.copytree(Path(source) / "checkpoints" / name, Path(target) / "checkpoints" / name)


def compare(run_dir, reference):
    """Asserts that two runs ended alike: every tensor, every number, the history."""
    assert differences(final_state(run_dir), final_state(reference)) == []
    own, other = (Run.open(one).history for one in (run_dir, reference))
    for name in ("rows", "steps", "control"):
        rows = [[{**row, "seconds": 0} for row in getattr(history, name)] for history in (own, other)]
        assert rows[0] == rows[1], name


def leftovers(run_dir):
    """What a save has begun and not brought to its end."""
    inside = (Path(run_dir) / "checkpoints").iterdir()
    return sorted(one.name for one in inside if one.name.startswith(".") and one.name != ".lock")
