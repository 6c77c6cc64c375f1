"""What several processes predict together; each function runs in all of them, and those of `CASES` in one as well."""

from dataclasses import replace
from functools import partial

import scenarios
import torch
from scenarios import data, model_of, strategy
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from nbdev_trainer.data.batch import Batch, StepOutput, from_dict
from nbdev_trainer.data.kinds import Array, Category
from nbdev_trainer.data.loaders import Loader, Loaders
from nbdev_trainer.data.streams import Combined, StreamLoader
from nbdev_trainer.loop.callback import Callback
from nbdev_trainer.loop.steps import Step, SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.scale.processes import join


class Doubled(nn.Linear):
    """Each number by itself, so that it is the same to the bit in a batch of any size."""

    def __init__(self):
        super().__init__(1, 1)

    def forward(self, inputs):
        return inputs * 2


def trainer_of(model=None, step=None, **options):
    model = model or nn.Sequential(Doubled())
    return Trainer(model, step or SupervisedStep(nn.MSELoss()), optim.SGD(model.parameters(), lr=0.1), strategy=strategy(), **options)


def rows(n, batch_size):
    numbers = torch.arange(3.0 * n).view(n, 3)
    return Loaders.from_arrays(numbers, numbers + 1, batch_size=batch_size, seed=1).train  # shuffled in training


def uneven():
    """Batches of 8 and 5, neither of which three processes can divide."""
    return trainer_of().predict(rows(13, 8))


def fewer_samples_than_processes():
    return trainer_of().predict(rows(1, 4))


def nothing_of_the_last_batch():
    return trainer_of().predict(rows(9, 4))


def of_a_linear_model():
    return trainer_of(model_of(), SupervisedStep(F.cross_entropy)).predict(data().valid)


def of_a_dataset():
    """What collates samples cannot collate none."""
    numbers = torch.arange(9.0).view(9, 1)
    return trainer_of().predict(Loaders(TensorDataset(numbers, numbers), batch_size=4, seed=0).train)


def of_dicts_without_ids():
    def fetch(ids):
        return {"x": ids.float(), "y": -ids.float()}

    reader = from_dict("x", targets="y")
    return trainer_of(as_batch=reader).predict(Loader(fetch, torch.arange(7), batch_size=3))


def of_a_stream():
    kinds = {"x": Array(lambda item: item["x"]), "y": Category("y", vocab=[0, 1, 2])}
    stream = StreamLoader(scenarios.lines, kinds, inputs="x", targets="y", batch_size=4)
    return trainer_of(model_of(), SupervisedStep(F.cross_entropy)).predict(stream)


def of_loaders_in_turn():
    return trainer_of().predict(Combined({"first": rows(7, 2), "second": rows(3, 3)}))


def bare_inputs():
    """No loader of ours: each process predicts what it is given."""
    return trainer_of().predict([torch.arange(5.0), torch.ones(2)])


class Detects(Step):
    """Finds another number of boxes in each image; all that a prediction may be made of."""

    def predict(self, trainer, batch):
        found = [{"boxes": image[0, :2] * 2, "sure": image.amax() > 5} for image in batch.inputs]
        names = [f"{len(one['boxes'])} boxes" for one in found]
        sums = torch.stack([image.sum() for image in batch.inputs]) if batch.size else torch.zeros(0)
        return StepOutput(predictions={"found": found, "names": names, "sums": (sums.half(), None), "complex": sums + 1j,
                                       "squares": sums[:, None, None].expand(-1, 2, 2)})


def images(ids):
    return Batch([torch.full((1, 1 + i % 3, 2), float(i)) for i in ids.tolist()], None, len(ids), ids)


def of_other_sizes():
    return trainer_of(step=Detects()).predict(Loader(images, torch.arange(7), batch_size=3))


class Within(Callback):
    def __init__(self, loader):
        self.loader, self.found = loader, []

    def after_batch(self, trainer):
        if trainer.state.batch % 2:
            self.found.append(trainer.predict(self.loader))


def within_a_fit():
    loaders = data()
    looks = Within(loaders.valid)
    trainer = trainer_of(model_of(), SupervisedStep(F.cross_entropy), callbacks=[looks])
    trainer.fit(loaders.train, loaders.valid_sets, 1)
    return [*looks.found, trainer.predict(loaders.valid)]


CASES = [uneven, fewer_samples_than_processes, nothing_of_the_last_batch, of_a_linear_model, of_a_dataset, of_dicts_without_ids,
         of_a_stream, of_loaders_in_turn, bare_inputs, of_other_sizes, within_a_fit]
DIVIDED = [fewer_samples_than_processes, nothing_of_the_last_batch, of_a_linear_model, within_a_fit]  # of the weights


def run_all():
    """The answers of each case."""
    torch.set_num_threads(1)
    return {case.__name__: case() for case in CASES}


class Counts(Doubled):
    seen = 0

    def forward(self, inputs):
        self.seen += len(inputs)
        return super().forward(inputs)


def noted(fn, name, sent, *args):
    sent.append(name)
    return fn(*args)


def samples_seen():
    """How many samples go through the model of a process, and the messages for that."""
    trainer = trainer_of(model := Counts())
    processes, sent = trainer.engine.strategy.processes, []
    for name in ("gather", "send", "sum"):
        setattr(processes, name, partial(noted, getattr(processes, name), name, sent))
    trainer.predict(rows(13, 8))
    return model.seen, sent


def run_on_all():
    """The answers of each case, on all processes; those with divided weights; what each has seen."""
    processes = join(timeout="60s")
    whole = run_all()
    scenarios.KIND[0] = scenarios.Shards
    try:
        divided = {case.__name__: case() for case in DIVIDED}
    finally:
        scenarios.KIND[0] = scenarios.Replicas
    return processes.gather((whole, divided, samples_seen()))


def error_of(predict):
    try:
        return len(predict().predictions)
    except Exception as error:
        return type(error).__name__, str(error)


class FailsOnRank1(SupervisedStep):
    """Until it is mended."""

    broken = True

    def predict(self, trainer, batch):
        if self.broken and trainer.engine.strategy.rank == 1:
            raise OSError("no such picture")
        return super().predict(trainer, batch)


def an_error_on_one_of_them():
    """What each process is told, and what it predicts after that."""
    trainer = trainer_of(step=FailsOnRank1(nn.MSELoss()))
    first = error_of(lambda: trainer.predict(rows(13, 8)))
    trainer.step.broken = False
    return join().gather((first, error_of(lambda: trainer.predict(rows(13, 8)))))


def an_error_where_weights_are_divided():
    """The other waits within the model, until the process that failed has ended."""
    scenarios.KIND[0] = scenarios.Shards
    trainer_of(step=FailsOnRank1(nn.MSELoss())).predict(rows(13, 8))


def nothing_to_predict():
    stream = StreamLoader([], {"x": Array(lambda item: item["x"])}, inputs="x")
    return join().gather(error_of(lambda: trainer_of().predict(stream)))


class UnlikeOnRank1(Step):
    def predict(self, trainer, batch):
        return StepOutput(predictions={"scores": batch.inputs} if trainer.engine.strategy.rank == 1 else batch.inputs)


def other_outputs_on_one_of_them():
    trainer = trainer_of(step=UnlikeOnRank1())
    return join().gather(error_of(lambda: trainer.predict(rows(13, 8))))


def norms_that_saw_other_samples():
    """The predictions of each process, and those of rank 0 alone."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    trainer, loaders = trainer_of(model, SupervisedStep(F.cross_entropy)), data(valid=40)
    trainer.fit(loaders.train, None, 1)
    before = trainer.predict(list(loaders.valid.batches(0))).predictions
    return join().gather((before, trainer.predict(loaders.valid).predictions))


def a_trainer():
    trainer = trainer_of(model_of(), SupervisedStep(F.cross_entropy))
    trainer.fit(data().train, None, 1)
    return trainer, trainer.predict(data().valid)


class Striped(Loader):
    """Parts that are not samples in a row, so each process predicts all."""

    in_rows = False

    def shard(self, rank, world_size):
        return replace(self, rows=self.rows[rank::world_size])


def of_stripes():
    return join().gather(trainer_of().predict(Striped(images_of_one, torch.arange(8), batch_size=4)))


def images_of_one(ids):
    return Batch(ids[:, None].float(), ids[:, None].float(), len(ids), ids)


class Scales(Step):
    """A number for the batch beside one for each sample."""

    def predict(self, trainer, batch):
        return StepOutput(predictions={"each": batch.inputs, "scale": torch.ones(1)})


def words(ids):
    """Padded to the longest of those that are asked for."""
    texts = [torch.ones(1 + i % 4, 1) for i in ids.tolist()]
    return Batch(nn.utils.rnn.pad_sequence(texts, batch_first=True), None, len(ids), ids)


def padded_by_part():
    """The sizes of what is predicted for each word by parts, and the whole by each process."""
    loader = Loader(words, torch.arange(8), batch_size=4)
    by_part, whole = (trainer_of().predict(loader, divided=divided).predictions for divided in (True, False))
    return join().gather(([len(one) for one in by_part], whole))


def on_rank_0_alone():
    trainer, processes = trainer_of(), join()
    found = trainer.predict(rows(9, 4), divided=False).predictions.tolist() if processes.rank == 0 else None
    return processes.gather(found)


def of_the_batch():
    told = None
    try:
        trainer_of(step=Scales()).predict(rows(8, 8))
    except ValueError as error:
        told = str(error)
    return join().gather(told)
