"""Memory does not grow with the number of steps, nor with the number of fits."""

import gc
import tracemalloc
import weakref
from statistics import median

import pytest
import torch
from helpers import arrays
from helpers import one_thread as one_thread
from torch import nn, optim

from nbdev_trainer.data.batch import Batch
from nbdev_trainer.loop.callback import Callback
from nbdev_trainer.loop.optimizers import FusedAdamW
from nbdev_trainer.loop.schedules import linear
from nbdev_trainer.loop.steps import SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.metrics.classification import Accuracy


class Gauge(Callback):
    """Reads the number of Python objects and the bytes behind them, now and then."""

    def __init__(self, every):
        self.every, self.batches, self.objects, self.kilobytes = every, 0, [], []

    def after_batch(self, trainer):
        self.batches += 1
        if self.batches % self.every == 0:
            self.read()

    def read(self):
        gc.collect()
        self.objects.append(len(gc.get_objects()))
        self.kilobytes.append(tracemalloc.get_traced_memory()[0] / 1024)

    def growth(self):
        """The middle third against the last third: objects, kilobytes."""
        third = len(self.objects) // 3
        return tuple(
            median(row[-third:]) - median(row[third:-third]) for row in (self.objects, self.kilobytes)
        )


@pytest.fixture(autouse=True)
def traced():
    gc.collect()
    gc.freeze()  # what was there before is not looked at again
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.unfreeze()


def mean_score(predictions, targets):
    return predictions.mean(1)


class Varied:
    """Batches that are all different: in size, and in how much their targets weigh."""

    def __init__(self, length):
        self.length, self.inputs = length, arrays(16)[0].flatten(1)
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return self.length

    def __iter__(self):
        for i in range(self.length):
            size = 3 + i % 13
            yield Batch(self.inputs[:size], torch.randint(3, (size,), generator=self.generator))


def make_trainer(gauge, optimizer=FusedAdamW, loss_fn=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(36, 3))
    return Trainer(
        model,
        SupervisedStep(loss_fn or nn.CrossEntropyLoss()),
        optimizer(model.parameters(), lr=1e-3),
        metrics=[Accuracy(), mean_score],
        callbacks=[gauge],
        **options,
    )


def assert_flat(measure, limit):
    """A leak shows each time; a dictionary or an allocator that makes room does so once, and is measured again."""
    measured = []
    for _ in range(3):
        measured.append(measure())
        objects, kilobytes = measured[-1]
        if objects < 40 and kilobytes < limit:
            return
    pytest.fail(f"memory grows by (objects, kilobytes): {measured}; at most 40 objects and {limit} kB were expected")


def class_weighted():
    return nn.CrossEntropyLoss(weight=torch.tensor([0.37, 1.113, 2.7]), ignore_index=1)


RUNS = {
    "plain": {},
    "SGD": {"optimizer": optim.SGD},
    "accumulation, clipping": {"accumulate": 3, "clip_norm": 1.0},
    "accumulation of class weights": {"accumulate": 3, "loss_fn": class_weighted},
}


def growth_over(n, name):
    options = dict(RUNS[name])
    if loss_fn := options.pop("loss_fn", None):
        options["loss_fn"] = loss_fn()
    gauge = Gauge(every=n // 30)
    data = Varied(n // 3)
    make_trainer(gauge, **options).fit(
        data, list(Varied(2)), n=f"{n}ba", schedule=linear(), validate_every="40ba"
    )
    assert len(gauge.objects) == 30
    return gauge.growth()


@pytest.mark.parametrize("name", RUNS)
def test_memory_is_flat_over_many_steps(name):
    # 600 steps in a third: a float kept at each would be 14 kB; scalars wait to be added up, more or fewer of them
    assert_flat(lambda: growth_over(1800, name), limit=14)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_memory_is_flat_over_twenty_thousand_steps(name):
    assert_flat(lambda: growth_over(20_000, name), limit=12)


def growth_over_fits():
    gauge = Gauge(every=10**9)
    trainer = make_trainer(gauge, accumulate=2)
    data, valid = Varied(5), list(Varied(2))
    for _ in range(24):
        trainer.fit(data, valid, n=1, schedule=linear(), callbacks=[Callback()])
        gauge.read()
    return gauge.growth()


def test_memory_is_flat_over_many_fits():
    assert_flat(growth_over_fits, limit=12)


def test_a_trainer_that_is_gone_is_freed():
    trainer = make_trainer(Gauge(10**9))
    trainer.fit(Varied(3), list(Varied(2)), n=1)
    gone = weakref.ref(trainer.model[0]), weakref.ref(trainer)
    del trainer
    gc.collect()
    assert [one() for one in gone] == [None, None]


@pytest.mark.parametrize("keep", [lambda state: state.output, lambda state: float(state.batch)])
def test_the_gauge_sees_what_is_kept(keep):
    def growth():
        gauge, kept = Gauge(every=60), []
        trainer = make_trainer(gauge)
        trainer.on("after_batch", lambda trainer: kept.append(keep(trainer.state)))
        trainer.fit(Varied(1800), n=1)
        return gauge.growth()

    with pytest.raises(pytest.fail.Exception, match="memory grows"):
        assert_flat(growth, limit=14)
