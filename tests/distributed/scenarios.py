"""Runs whose result must not depend on the number of processes; each returns what is compared."""

from functools import partial

import torch
from torch import nn, optim
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F

from nbdev_trainer.callbacks.averaging import EMA, SWA
from nbdev_trainer.callbacks.stopping import EarlyStopping
from nbdev_trainer.data.batch import StepOutput
from nbdev_trainer.data.kinds import Array, Category
from nbdev_trainer.data.loaders import Loaders
from nbdev_trainer.data.streams import Combined, StreamLoader
from nbdev_trainer.loop.callback import Callback
from nbdev_trainer.loop.repeated import SAM
from nbdev_trainer.loop.schedules import one_cycle
from nbdev_trainer.loop.steps import ManualStep, Step, SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.metrics.classification import Accuracy
from nbdev_trainer.metrics.confusion import F1Score
from nbdev_trainer.metrics.ranking import AUROC
from nbdev_trainer.scale.processes import has_group, join
from nbdev_trainer.scale.replicas import Replicas
from nbdev_trainer.scale.shards import Shards
from nbdev_trainer.core.nested import is_divided


def model_of(width=8):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).double()


def data(n=37, batch_size=8, valid=11):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n + valid, 5, generator=generator).double()
    targets = torch.randint(3, (n + valid,), generator=generator)
    return Loaders.from_arrays(inputs[:n], targets[:n], valid=(inputs[n:], targets[n:]), batch_size=batch_size, seed=3)


KIND = [Replicas]  # of the strategy, in this process


def strategy(overlap=True, **options):
    if not has_group():
        return None
    if KIND[0] is Shards:
        return Shards(join(timeout="30s"), wrap=nn.Linear, **options)
    return Replicas(join(timeout="30s"), overlap=overlap, **options)


def whole(one):
    return (one.full_tensor() if is_divided(one) else one).detach().clone()


def result(trainer, *more):
    state = trainer.state
    weights = {name: whole(one) for name, one in trainer.model.state_dict().items()}
    return {"weights": weights, "metrics": dict(state.metrics), "control": [(one["what"], one["batch"]) for one in state.control],
            "counters": (state.epoch, state.batch, state.step, state.samples), "more": more}


def supervised(loss=F.cross_entropy, loaders=None, replicas=None, epochs=2, step=None, optimizer=None, metrics=(), callbacks=(), schedule=None,
               model=None, overlap=True, sync_batch_norm=False, accuracy=Accuracy, **options):
    model, loaders = model or model_of(), loaders or data()
    optimizer = optim.Adam(model.parameters(), lr=0.05) if optimizer is None else optimizer(model)
    trainer = Trainer(model, step or SupervisedStep(loss), optimizer, metrics=[accuracy(), *metrics], callbacks=callbacks,
                      strategy=strategy(overlap=overlap, sync_batch_norm=sync_batch_norm, **(replicas or {})), **options)
    trainer.fit(loaders.train, loaders.valid_sets, epochs, schedule=schedule)
    return result(trainer)


def plain():
    return supervised()


def after_the_backward_pass():
    return supervised(overlap=False)


def one_graph_for_all_batches():
    return supervised(replicas={"static_graph": True}, loaders=data(n=32), accumulate=2)


def a_hook_of_ones_own():
    return supervised(replicas={"comm_hook": default_hooks.allreduce_hook, "bucket_mb": 0.001}, accumulate=3)


def empty_shards():
    return supervised(loaders=data(n=13, batch_size=4, valid=1))


def one_sample_a_batch():
    return supervised(loaders=data(n=5, batch_size=1, valid=2))


def accumulated_and_clipped():
    return supervised(accumulate=3, clip_norm=0.1, schedule=one_cycle())


def clipped_by_unit():
    return supervised(clip_adaptive=0.01, loaders=data(n=29, batch_size=9))


def averaged():
    model = model_of()
    ema = EMA(0.9)
    found = supervised(model=model, callbacks=[ema])
    return {**found, "more": [whole(one) for one in ema.averages.values()]}


class MaskedMean(Step):
    """A mean of its own, over some samples of a batch: often over none in the part of a process."""

    def train(self, trainer, batch):
        predictions = trainer.model(batch.inputs)
        counted = (batch.inputs[:, 0] > 0.0).double()
        losses = F.cross_entropy(predictions, batch.targets, reduction="none")
        return StepOutput((losses * counted).sum() / counted.sum(), predictions, count=int(counted.sum()))

    def evaluate(self, trainer, batch):
        predictions = trainer.model(batch.inputs)
        return StepOutput(F.cross_entropy(predictions, batch.targets), predictions)


def synced_norms_and_means_over_nothing():
    return norms(step=MaskedMean())


def means_over_nothing():
    return supervised(step=MaskedMean())


def ignored_targets():
    loaders = data(n=41, batch_size=7)
    fetch = loaders.train.fetch

    def with_holes(ids):
        batch = fetch(ids)
        batch.targets = torch.where(ids % 3 == 0, -100, batch.targets)
        return batch

    loaders.train.fetch = with_holes
    return supervised(nn.CrossEntropyLoss(), loaders, accumulate=2, accuracy=partial(Accuracy, ignore_index=-100))


def class_weights():
    return supervised(nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double()), accumulate=2)


def sample_weights():
    loaders = data(n=30, batch_size=7)
    for loader in (loaders.train, loaders.valid):
        fetch = loader.fetch

        def weighted(ids, fetch=fetch):
            batch = fetch(ids)
            batch.weights = (ids % 4).double()
            return batch

        loader.fetch = weighted
    return supervised(loaders=loaders)


def micro_batches():
    return supervised(micro_batch_size=2, accumulate=2)


def sharpness_aware():
    return supervised(optimizer=lambda model: SAM(optim.SGD(model.parameters(), lr=0.1), rho=0.05))


def lbfgs():
    return supervised(optimizer=lambda model: optim.LBFGS(model.parameters(), lr=0.2, max_iter=4))


def small_last_batch():
    return data(n=13, batch_size=4, valid=1)


def sharpness_aware_with_empty_shards():
    return supervised(loaders=small_last_batch(), optimizer=lambda model: SAM(optim.SGD(model.parameters(), lr=0.1), rho=0.05))


def lbfgs_that_searches():
    def searching(model):
        return optim.LBFGS(model.parameters(), lr=0.2, max_iter=4, line_search_fn="strong_wolfe")

    return supervised(loaders=small_last_batch(), optimizer=searching, epochs=1)


class ByParts(Step):
    """Calls parts of the model, and leaves one out in the first epoch."""

    def train(self, trainer, batch):
        hidden = trainer.model[0](batch.inputs)
        predictions = trainer.model[2](torch.tanh(hidden))
        return StepOutput(F.cross_entropy(predictions, batch.targets), predictions)


def a_step_of_ones_own():
    return supervised(step=ByParts())


class Duel(ManualStep):
    def train(self, trainer, batch):
        model = trainer.model
        hidden = torch.tanh(model[0](batch.inputs))
        one = F.cross_entropy(model[2](hidden), batch.targets)
        trainer.optimize(one, "first", retain_graph=True)
        if trainer.state.batch % 2:
            trainer.optimize((hidden**2).mean(), "second")
        return StepOutput(one.detach(), model[2](hidden).detach())

    def evaluate(self, trainer, batch):
        predictions = trainer.model(batch.inputs)
        return StepOutput(F.cross_entropy(predictions, batch.targets), predictions)


def several_optimizers():
    model, loaders = model_of(), data(n=24)
    optimizers = {"first": optim.Adam(model[2].parameters(), lr=0.05), "second": optim.SGD(model[0].parameters(), lr=0.1)}
    trainer = Trainer(model, Duel(), optimizers, metrics=[Accuracy()], strategy=strategy())
    trainer.fit(loaders.train, loaders.valid_sets, 2)
    return result(trainer)


def kept_outputs():
    loaders = data()
    return supervised(loaders=loaders, metrics=[F1Score("multiclass", 3), AUROC("multiclass", 3)])


def sure(predictions, targets):
    return predictions.softmax(1).amax(1)


def spread_of_errors(predictions, targets):
    losses = F.cross_entropy(predictions, targets, reduction="none")
    return losses.max() - losses.min()


def functions_as_metrics():
    return supervised(metrics=[sure, spread_of_errors], loaders=data(n=13, batch_size=4, valid=1))


def stopped_early():
    return supervised(callbacks=[EarlyStopping("valid_loss", patience=1)], epochs=30,
                      optimizer=lambda model: optim.Adam(model.parameters(), lr=1.0))


class Logs(Callback):
    def after_batch(self, trainer):
        trainer.log("loss_again", trainer.state.output.loss)


def logged():
    return supervised(callbacks=[Logs()], loaders=data(n=24, batch_size=12))


def by_batches():
    model, loaders = model_of(), data()
    trainer = Trainer(model, SupervisedStep(F.cross_entropy), optim.Adam(model.parameters(), lr=0.05), metrics=[Accuracy()],
                      accumulate=2, strategy=strategy())
    trainer.fit(loaders.train, loaders.valid_sets, "7ba", validate_every="2st")
    trainer.fit(loaders.train, loaders.valid_sets, "5ba", validate_every="3ba")
    return result(trainer)


class Freezes(Callback):
    """The first layer rests for a while in the middle of an epoch."""

    def after_batch(self, trainer):
        if trainer.state.batch in (3, 7):
            trainer.model[0].requires_grad_(trainer.state.batch == 7)


def frozen_for_a_while():
    return supervised(callbacks=[Freezes()])


def frozen_within_a_window():
    """What the first layer learned from the first batch of a window still counts in its step."""
    return supervised(callbacks=[Freezes()], accumulate=2)


class WithAid(nn.Module):
    """A model with a part that is there for the first epoch only."""

    def __init__(self):
        super().__init__()
        self.body, self.aid = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, inputs):
        return self.body(inputs) + (0 if self.aid is None else self.aid(inputs))


class TakesAidAway(Callback):
    def after_epoch(self, trainer):
        trainer.model.aid = None


def a_part_taken_away():
    torch.manual_seed(1)
    return supervised(model=WithAid().double(), callbacks=[TakesAidAway()])


def a_part_taken_away_between_windows():
    torch.manual_seed(1)
    return supervised(model=WithAid().double(), callbacks=[TakesAidAway()], accumulate=2)


class Tempered(nn.Module):
    """A loss with a weight of its own, which trains too."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))

    def forward(self, predictions, targets):
        return F.cross_entropy(predictions * self.scale, targets)


def weights_of_the_loss(**options):
    loss = Tempered()
    found = supervised(loss, optimizer=lambda model: optim.Adam([*model.parameters(), *loss.parameters()], lr=0.05), **options)
    return {**found, "scale": whole(loss.scale)}


def weights_of_the_loss_within_a_window():
    return weights_of_the_loss(accumulate=2)


class SaysItsLoss(Step):
    def train(self, trainer, batch):
        predictions = trainer.model(batch.inputs)
        loss = F.cross_entropy(predictions, batch.targets)
        return StepOutput(loss, predictions, logs={"again": loss.detach()})


def logs_of_a_step_without_samples():
    """Some ranks never have a sample, in training or in evaluation."""
    return supervised(step=SaysItsLoss(), loaders=data(n=5, batch_size=1, valid=1))


def by_turns():
    loaders = Loaders(Combined({"one": data(n=20).train, "other": data(n=13, batch_size=4).train}), data().valid)
    return supervised(loaders=loaders)


def lines(epoch):
    generator = torch.Generator().manual_seed(epoch)
    for row, label in zip(torch.randn(21, 5, generator=generator), torch.randint(3, (21,), generator=generator)):
        yield {"x": row.double().numpy(), "y": label.item()}


def from_a_stream():
    kinds = {"x": Array(lambda item: item["x"]), "y": Category("y", vocab=[0, 1, 2])}
    train = StreamLoader(lines, kinds, inputs="x", targets="y", batch_size=4)
    model, loaders = model_of(), Loaders(train, data().valid)
    trainer = Trainer(model, SupervisedStep(F.cross_entropy), optim.Adam(model.parameters(), lr=0.05), metrics=[Accuracy()],
                      strategy=strategy())
    trainer.fit(loaders.train, loaders.valid_sets, "12ba", validate_every="6ba")
    return result(trainer)


def norms(**options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    plain = partial(optim.SGD, lr=0.2, momentum=0.9)  # biases before a norm have no gradient but rounding
    return supervised(model=model.double(), sync_batch_norm=True, optimizer=lambda one: plain(one.parameters()), **options)


def synced_norms():
    return norms()


def synced_norms_of_empty_shards():
    return norms(loaders=data(n=14, batch_size=4, valid=3), accumulate=2)


def synced_norms_after_the_backward_pass():
    return norms(overlap=False, loaders=data(n=14, batch_size=4, valid=3))


def synced_norms_averaged():
    """The statistics of the mean weights are measured on the data, each sample once."""
    return norms(callbacks=[SWA(0.3)], epochs=3)


SCENARIOS = [plain, a_part_taken_away, a_part_taken_away_between_windows, weights_of_the_loss, weights_of_the_loss_within_a_window, one_graph_for_all_batches, a_hook_of_ones_own, synced_norms, synced_norms_averaged, frozen_within_a_window, logs_of_a_step_without_samples,
             synced_norms_of_empty_shards, synced_norms_after_the_backward_pass, from_a_stream,
             frozen_for_a_while, by_turns, after_the_backward_pass, empty_shards, one_sample_a_batch,
             accumulated_and_clipped, clipped_by_unit, averaged, means_over_nothing, synced_norms_and_means_over_nothing, ignored_targets, class_weights, sample_weights,
             micro_batches, sharpness_aware, lbfgs, sharpness_aware_with_empty_shards, lbfgs_that_searches,
             a_step_of_ones_own, several_optimizers, kept_outputs, functions_as_metrics, stopped_early, logged, by_batches]
NOT_DIVIDED = (a_part_taken_away, a_part_taken_away_between_windows, weights_of_the_loss, weights_of_the_loss_within_a_window, one_graph_for_all_batches, a_hook_of_ones_own, after_the_backward_pass, synced_norms_after_the_backward_pass, micro_batches, lbfgs, lbfgs_that_searches)
DIVIDED = [one for one in SCENARIOS if one not in NOT_DIVIDED]


def run_all():
    """The results of all scenarios, by name, in the processes of a launch."""
    join(timeout="30s")
    return {one.__name__: one() for one in SCENARIOS}


def run_divided(names):
    """Likewise, with the weights divided over the processes."""
    join(timeout="30s")
    KIND[0] = Shards
    return {one.__name__: one() for one in DIVIDED if not names or one.__name__ in names}
