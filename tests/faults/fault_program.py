"""The run that the fault tests disturb: all that has state, in one learner. Child processes import it."""

import os
import shutil
import signal
import time
from pathlib import Path

import torch
from torch import nn

from nbdev_trainer import EMA, Accuracy, Callback, Checkpoint, EarlyStopping, Learner, Loaders, digits
from nbdev_trainer.data import Category, Data, Flip, Image, Normalize, RandomCrop, random_split
from nbdev_trainer.store.checkpoints import newest_checkpoint

N, BATCH_SIZE, EPOCHS = 96, 8, 2   # 9 batches of training an epoch, the last one whole; 3 of validation
WALL_CLOCK = {"seconds", "elapsed", "since_validation", "watching", "settings"}


def items():
    images, labels = digits()
    pixels = (images[:N] * 255).byte().permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    return [{"image": image, "label": int(label)} for image, label in zip(pixels, labels[:N], strict=True)]


def loaders(workers=0):
    data = Data(
        items(),
        {"image": Image("image"), "label": Category("label", vocab=list(range(10)))},
        inputs="image",
        targets="label",
        split=random_split(valid=0.25, seed=0),
        train_transforms=[RandomCrop(7), Flip()],
        batch_transforms=[Normalize([0.5] * 3, [0.5] * 3)],
    )
    how = {"num_workers": workers, "workers": "threads"} if workers else {}
    return data.loaders(BATCH_SIZE, seed=0, **how)


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(3)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 10))


def arrays():
    images, labels = digits()
    return Loaders.from_arrays(images[:N].repeat(1, 3, 1, 1), labels[:N], valid=0.25, batch_size=BATCH_SIZE, seed=0)


def learner(run_dir, *callbacks, every="1ba", workers=None, keep_last=2, background=False, rich=True, **options):
    torch.set_num_threads(1)
    rich_callbacks = [EMA(0.9), EarlyStopping("valid_loss", patience=2, restore_best=True)] if rich else []
    if rich:
        options = {"precision": "bf16", "accumulate": 4, **options}
    saving = [] if every is None else [Checkpoint(every, keep_last=keep_last, background=background)]
    return Learner(
        network(),
        arrays() if workers is None else loaders(workers),
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
