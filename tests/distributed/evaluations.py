"""What two processes evaluate and read; each function runs in all of them."""

import io
from contextlib import redirect_stdout
from itertools import islice

import scenarios
import torch
from together import raised_by
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, TensorDataset

from nbdev_trainer.callbacks.averaging import EMA
from nbdev_trainer.callbacks.checkpoint import Checkpoint
from nbdev_trainer.callbacks.resume import resume_run
from nbdev_trainer.data.batch import Batch
from nbdev_trainer.data.kinds import Array, Category
from nbdev_trainer.data.loaders import Loaders
from nbdev_trainer.data.streams import StreamLoader
from nbdev_trainer.loop.callback import Callback
from nbdev_trainer.loop.steps import SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.metrics.base import Metric
from nbdev_trainer.scale.processes import join
from nbdev_trainer.scale.replicas import Replicas


def trainer_of(model, **options):
    return Trainer(model, SupervisedStep(F.cross_entropy), optim.SGD(model.parameters(), lr=0.1),
                   strategy=Replicas(join(timeout="20s")), **options)


def averages_of_norms_that_saw_other_samples():
    """The loss over the whole set, and that of rank 0 for all samples."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    trainer, loaders = trainer_of(model, callbacks=[EMA(0.9)]), scenarios.data(valid=40)
    trainer.fit(loaders.train, None, 2)
    whole = trainer.evaluate(loaders.valid)["loss"]
    own = trainer.predict(list(loaders.valid.batches(0))).losses.mean().item()  # of all batches, by this process
    return whole, own, trainer.evaluate(loaders.valid)["loss"]


class Right(Metric):
    """Counts in itself, and begins anew when it has answered: right in one process."""

    right = count = 0

    def update(self, output, batch):
        self.right = self.right + (output.predictions.argmax(1) == batch.targets).sum()
        self.count += batch.size

    def compute(self):
        share, self.right, self.count = self.right / self.count, 0, 0
        return share


class SharePerTwo(Metric):
    """Of few samples, which one process may have alone; with a number beside the mean."""

    seen = 0

    def update(self, output, batch):
        self.seen += batch.size
        of_row = batch.inputs[:, 0] == NUMBERS[0, 0]
        if of_row.any():
            self.mean.add((output.predictions[of_row] * 0 + 1).mean(), int(of_row.sum()))

    def compute(self):
        return 2 * self.mean.compute()


class Early(Callback):
    """Looks at the whole state when nothing has been counted yet."""

    def before_epoch(self, trainer):
        trainer.state_dict()


def counted_in_the_mean_of_one_process():
    trainer = trainer_of(nn.Linear(5, 3).double(), metrics=[SharePerTwo()], callbacks=[Early()])
    batches = Loaders.from_arrays(NUMBERS, torch.arange(20) % 3, batch_size=4, seed=0).train
    trainer.fit(batches, None, 2)
    return trainer.state.metrics["train_share_per_two"]


def counted_by_itself():
    trainer, loaders = trainer_of(scenarios.model_of(), metrics=[Right()]), scenarios.data(n=20)
    return raised_by(trainer.fit, loaders.train, None, 1)


def predicted_of_a_stream():
    kinds = {"x": Array(lambda item: item["x"]), "y": Category("y", vocab=[0, 1, 2])}
    stream = StreamLoader(scenarios.lines, kinds, inputs="x", targets="y", batch_size=4)
    trainer = trainer_of(scenarios.model_of())
    trainer.fit(stream, None, "5ba")
    return len(trainer.predict(stream).predictions)


def loaders_of_other_lengths_that_yield_dicts():
    processes, data = join(timeout="20s"), scenarios.data(n=20)
    batches = [{"x": batch.inputs, "y": batch.targets} for batch in data.train.batches(0)]
    trainer = trainer_of(scenarios.model_of(), as_batch=lambda raw: Batch(raw["x"], raw["y"]))
    trainer.fit(batches[:3 if processes.rank == 0 else 1], None, 1)
    return trainer.state.batch, trainer.state.samples


NUMBERS = torch.arange(100.0, dtype=torch.float64).view(20, 5) / 100
ROWS = TensorDataset(NUMBERS, torch.arange(20) % 3)


class Parts(IterableDataset):
    """Rank 0 reads 14 of the 20 rows, rank 1 the others."""

    def __iter__(self):
        rows = range(14) if join().rank == 0 else range(14, 20)
        return iter([ROWS[i] for i in rows])


class PartsThatSayTen(Parts):
    def __len__(self):
        return 10


def parts_of_other_lengths():
    """Batches, samples and loss where nobody has said, or said rightly, how many batches there are."""
    found = []
    for data, n, limit in ((Parts(), "5ba", 5), (PartsThatSayTen(), 1, None)):
        trainer = trainer_of(scenarios.model_of())
        loader = DataLoader(data, batch_size=2)
        trainer.fit(loader, loader, n, limit_batches=limit)
        found.append((trainer.state.batch, trainer.state.samples, trainer.evaluate(loader)["loss"]))
    whole = trainer.evaluate(scenarios.Loaders.from_arrays(*ROWS.tensors, batch_size=3, seed=0).train)["loss"]
    return found, whole


class Remembers:
    """A part of the rows, in an order of its own that goes on where it was, through an epoch and the next."""

    def __init__(self):
        self.at = 0

    def __len__(self):
        return 5

    def __iter__(self):
        for _ in range(self.at, 5):
            self.at += 1
            here = [2 * self.at - join().rank + k for k in (0, 7)]
            yield NUMBERS[here], torch.tensor(here) % 3
        self.at = 0

    def state_dict(self):
        return {"at": self.at + 100 * join().rank}

    def load_state_dict(self, state):
        self.at = state["at"] - 100 * join().rank


def in_the_middle_of_an_epoch():
    """The weights of a run, and of one that goes on from its state, with loaders that differ from rank to rank."""
    found = []
    for loader_of in (lambda: DataLoader(ROWS, batch_size=4, shuffle=True), Remembers):
        trainer, again = trainer_of(scenarios.model_of()), trainer_of(scenarios.model_of())
        trainer.fit(loader := loader_of(), None, "3ba")
        again.load_state_dict(trainer.state_dict())
        for one, data in ((trainer, loader), (again, loader_of())):
            one.fit(data, None, "4ba")
        found.append([one.model.state_dict() for one in (trainer, again)])
    return found


class CutOff(Exception):
    pass


def lists_of_other_lengths(folder):
    """The weights of a run that was cut off and went on, and of one that was not."""
    batches = [tuple(ROWS[i:i + 2]) for i in range(0, 20, 2)]
    own, weights = batches[:7] if join().rank == 0 else batches[7:], []
    for cut in (False, True):
        path = f"{folder}/{cut}"

        def power_cut(trainer):
            if trainer.state.batch == 5:
                raise CutOff

        trainer = trainer_of(scenarios.model_of(), callbacks=[Checkpoint("1ba", directory=path)])
        if cut:
            trainer.on("after_batch", power_cut)
        try:
            trainer.fit(own, own, 1)
        except CutOff:
            join().gather("both were cut off")
            trainer = trainer_of(scenarios.model_of(), callbacks=[Checkpoint("1ba", directory=path)])
            trainer.on("after_batch", id)
            resume_run(trainer, path, own, {"valid": own})
            trainer.fit(own, own, 1, resume=True)
        weights.append(trainer.model.state_dict())
    return weights


def told_of_the_data():
    """What rank 0 prints for loaders that give all to each process, and a part."""
    batches, found = [tuple(ROWS[i:i + 2]) for i in range(0, 20, 2)], {}
    sampler = DistributedSampler(ROWS, seed=0)
    for name, loader in {"all": batches, "all of a data set": DataLoader(ROWS, batch_size=2, shuffle=True),
                         "part": batches[join().rank::2],
                         "batches of a part": DataLoader(ROWS, batch_sampler=BatchSampler(sampler, 2, False))}.items():
        with redirect_stdout(io.StringIO()) as out:
            trainer_of(scenarios.model_of()).fit(loader, None, "2ba")
        found[name] = out.getvalue()
    return found


def error_of(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def stream_that_divides_itself():
    """What each process is told, in training, evaluation and prediction; and what it predicts after that."""
    kinds = {"x": Array(lambda item: item["x"]), "y": Category("y", vocab=[0, 1, 2])}

    def stream(lines):
        return StreamLoader(lines, kinds, inputs="x", targets="y", batch_size=4)

    def by_rank(epoch):
        return islice(scenarios.lines(epoch), join().rank, None, 2)

    trainer, own = trainer_of(scenarios.model_of()), stream(by_rank)
    told = [error_of(lambda: trainer.fit(own, None, "5ba")), error_of(lambda: trainer.evaluate(own)),
            error_of(lambda: trainer.predict(own))]
    trainer.evaluate(stream(scenarios.lines))
    return join().gather((told, trainer.state.batch, len(trainer.predict(stream(scenarios.lines)).predictions)))
