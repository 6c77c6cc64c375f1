"""A run saved in memory at any batch, and continued in a new trainer, ends as if nothing had happened."""

import importlib
import inspect
import pkgutil

import pytest
import torch
import torchmetrics
from helpers import (
    arrays,
    conv_net,
    differences,
    disturb_generators,
    foreign_loader,
    linear_net,
    own_loader,
)
from helpers import one_thread as one_thread
from torch import nn, optim
from torch.nn import functional as F

import nbdev_trainer
from nbdev_trainer.callbacks.activations import ActivationStatistics
from nbdev_trainer.callbacks.averaging import EMA, SWA
from nbdev_trainer.callbacks.bad_batches import BadBatches
from nbdev_trainer.callbacks.deterministic import Deterministic
from nbdev_trainer.callbacks.gradients import GradientNorms
from nbdev_trainer.callbacks.mixing import MixOneOf, Mixup
from nbdev_trainer.callbacks.rates import ReduceOnPlateau, TorchScheduler
from nbdev_trainer.loop.micro_batches import MicroBatching
from nbdev_trainer.loop.repeated import SAM
from nbdev_trainer.callbacks.recorder import Recorder
from nbdev_trainer.callbacks.stopping import EarlyStopping, Patience, Watching
from nbdev_trainer.data.batch import Batch, StepOutput
from nbdev_trainer.data import Data, Number
from nbdev_trainer.data.loaders import EpochLoader
from nbdev_trainer.data.streams import ByEpoch, Combined, StreamLoader
from nbdev_trainer.scale.precision import Scaled
from nbdev_trainer.loop.callback import AttachedFunction, Callback, attach
from nbdev_trainer.loop.optimizers import FusedAdamW
from nbdev_trainer.loop.schedules import linear
from nbdev_trainer.loop.state import State
from nbdev_trainer.loop.steps import ManualStep, SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.metrics.adapters import FunctionMetric, TorchMetric, WholeSet
from nbdev_trainer.metrics.base import Loss, Mean, Metric, RunningMean
from nbdev_trainer.metrics.classification import Accuracy, BinaryAccuracy, MultilabelAccuracy, TopKAccuracy
from nbdev_trainer.metrics.collection import MetricSet
from nbdev_trainer.metrics.confusion import (
    CohenKappa,
    ConfusionMatrix,
    Dice,
    F1Score,
    FBetaScore,
    IoU,
    MatthewsCorrelation,
    PrecisionScore,
    RecallScore,
)
from nbdev_trainer.metrics.probabilities import BrierScore, CalibrationError, LogLoss
from nbdev_trainer.metrics.ranking import AUROC, AveragePrecision
from nbdev_trainer.metrics.regression import (
    R2,
    ExplainedVariance,
    MeanAbsoluteError,
    MeanAbsolutePercentageError,
    MeanSquaredError,
    PearsonCorrelation,
    RootMeanSquaredError,
    SpearmanCorrelation,
)
from nbdev_trainer.metrics.text import BLEU, CharErrorRate, Perplexity, WordErrorRate


class History(Callback):
    """Keeps every result, and saves them with the run."""

    def __init__(self):
        self.rows = []

    def note(self, trainer, event):
        state = trainer.state
        self.rows.append([event, state.epoch, state.batch, state.step, state.loader, dict(state.metrics)])

    def before_epoch(self, trainer):
        self.note(trainer, "epoch begins")

    def after_evaluate(self, trainer):
        self.note(trainer, "evaluated")

    def after_epoch(self, trainer):
        self.note(trainer, "epoch ends")

    def state_dict(self):
        return {"rows": list(self.rows)}

    def load_state_dict(self, state):
        self.rows = list(state["rows"])


class Snapshots(Callback):
    """Takes the state of the run at each batch and at the end of each epoch, after all others."""

    runs_after = (Callback,)

    def __init__(self):
        self.taken = {}

    def after_batch(self, trainer):
        self.taken[f"batch {trainer.state.batch}"] = trainer.state_dict()

    def after_epoch(self, trainer):
        self.taken[f"epoch {trainer.state.epoch}"] = trainer.state_dict()


def spread(predictions, targets):
    return predictions.std(1)


def best_score(predictions, targets):
    return predictions.max()


class Adversaries(ManualStep):
    """Two optimizers; the second one acts every other batch."""

    def train(self, trainer, batch):
        body, head = trainer.model[0], trainer.model[1]
        hidden = F.dropout(body(batch.inputs.flatten(1)), 0.2, self.training_mode(trainer))
        trainer.optimize(F.cross_entropy(head(hidden), batch.targets), "body", retain_graph=True)
        loss = F.cross_entropy(head(hidden.detach()), batch.targets)
        if trainer.state.batch % 2:
            trainer.optimize(loss, "head")
        return StepOutput(loss=loss, predictions=head(hidden.detach()), logs={"size": hidden.detach().norm()})

    def evaluate(self, trainer, batch):
        scores = trainer.model[1](trainer.model[0](batch.inputs.flatten(1)))
        return StepOutput(loss=F.cross_entropy(scores, batch.targets), predictions=scores)

    def training_mode(self, trainer):
        return trainer.model.training


def two_networks():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(36, 8), nn.Linear(8, 3))


def supervised(model, optimizer=None, **options):
    optimizer = optimizer or FusedAdamW(model.parameters(), lr=0.01)
    metrics = [Accuracy(), spread, best_score, torchmetrics.F1Score("multiclass", num_classes=3)]
    return Trainer(model, SupervisedStep(nn.CrossEntropyLoss()), optimizer, metrics=metrics, **options)


def adversarial(**options):
    model = two_networks()
    optimizers = {
        "body": FusedAdamW(model[0].parameters()),
        "head": optim.SGD(model[1].parameters(), 0.1, 0.9),
    }
    return Trainer(model, Adversaries(), optimizers, metrics=[Accuracy()], **options)


def momentum(model):
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


RUNS = {  # how to make trainer, training loader and validation loader; what to ask of the fit
    "dropout and batch norm": (lambda: supervised(conv_net()), own_loader, {}),
    "accumulation": (lambda: supervised(linear_net(), accumulate=3, clip_norm=0.5), own_loader, {}),
    "schedule, momentum": (
        lambda: supervised(net := linear_net(), momentum(net), accumulate=2),
        own_loader,
        {"schedule": linear()},
    ),
    "validation in the midst": (
        lambda: supervised(linear_net(), accumulate=3),
        own_loader,
        {"validate_every": "3ba", "schedule": linear()},
    ),
    "foreign loader": (
        lambda: supervised(conv_net(), accumulate=3),
        foreign_loader,
        {"validate_every": "3ba"},
    ),
    "foreign loader of its own generator": (
        lambda: supervised(linear_net()),
        lambda: foreign_loader(generator=4),
        {},
    ),
    "two optimizers": (lambda: adversarial(clip_norm=0.5), own_loader, {"schedule": linear()}),
    "two optimizers, accumulation": (
        lambda: adversarial(accumulate=3),
        foreign_loader,
        {"validate_every": "2ba"},
    ),
    "few batches of a longer loader": (
        lambda: supervised(linear_net(), accumulate=3),
        own_loader,
        {"limit_batches": 4},
    ),
    "few batches of a foreign loader": (
        lambda: supervised(linear_net()),
        foreign_loader,
        {"limit_batches": 4},
    ),
    "a duration in batches": (lambda: supervised(linear_net(), accumulate=3), own_loader, {"n": "10ba"}),
    "a duration in batches, within an epoch": (
        lambda: supervised(linear_net(), accumulate=3),
        own_loader,
        {"n": "8ba"},
    ),
    "a duration in steps": (lambda: supervised(linear_net(), accumulate=3), own_loader, {"n": "4st"}),
}


def end_of(make_trainer, make_loader, fit, snapshot=None, callbacks=lambda: []):
    """All state after the fit, which may go on from a snapshot, and the snapshots it took."""
    trainer, loader, valid = make_trainer(), make_loader(), foreign_loader(13)
    history, snapshots = History(), Snapshots()
    extra = [history, *callbacks(), snapshots]
    trainer.callbacks += extra
    if snapshot is None:
        torch.manual_seed(7)
    else:
        disturb_generators()
        trainer.load_state_dict(snapshot)
    trainer.fit(loader, valid, **{"n": 2, **fit}, resume=snapshot is not None)
    return trainer.state_dict() | {
        "metrics": dict(trainer.state.metrics),
        "next": torch.rand(2),
    }, snapshots.taken


@pytest.mark.parametrize("name", RUNS)
def test_resuming_at_any_batch_gives_the_same_weights_metrics_and_history(name):
    expected, taken = end_of(*RUNS[name])
    assert len(taken) >= 9, "every batch of two epochs"
    wrong = {}
    for moment, snapshot in taken.items():
        got, _ = end_of(*RUNS[name], snapshot=snapshot)
        if found := differences(got, expected):
            wrong[moment] = found
    assert wrong == {}


def test_a_snapshot_is_not_changed_by_training_on():
    expected, taken = end_of(*RUNS["accumulation"])
    first, [got, _] = taken["batch 2"], end_of(*RUNS["accumulation"], snapshot=taken["batch 2"])
    again, _ = end_of(*RUNS["accumulation"], snapshot=first)
    assert differences(got, expected) == [] == differences(again, expected)


def test_the_comparison_sees_a_run_that_went_another_way():
    expected, taken = end_of(*RUNS["accumulation"])
    taken["batch 2"]["windows"]["main"]["gradients"][0].add_(1e-3)
    got, _ = end_of(*RUNS["accumulation"], snapshot=taken["batch 2"])
    assert any(found.startswith(".model") for found in differences(got, expected))


def test_an_epoch_that_was_ended_early_stays_ended():
    def ask(trainer):
        if trainer.state.batch == 3:
            trainer.end_epoch("enough")

    run = (*RUNS["accumulation"][:2], {})
    callbacks = lambda: [attach("after_batch", ask)]  # noqa: E731
    expected, taken = end_of(*run, callbacks=callbacks)
    got = {moment: end_of(*run, snapshot=one, callbacks=callbacks)[0] for moment, one in taken.items()}
    assert {moment: found for moment, one in got.items() if (found := differences(one, expected))} == {}


def test_training_on_from_a_state_inside_a_fit_begins_at_the_learning_rate_of_the_user():
    _, taken = end_of(*RUNS["schedule, momentum"])
    trainer, lrs = RUNS["schedule, momentum"][0](), []
    trainer.callbacks += [History()]
    trainer.load_state_dict(taken["batch 8"])
    trainer.on(
        "before_step",
        lambda trainer: lrs.append(trainer.engine.slots["main"].optimizer.param_groups[0]["lr"]),
    )
    trainer.fit(own_loader(), n=1)
    assert lrs[0] == 0.1


def test_a_fit_after_a_loaded_one_goes_on_with_the_order_of_a_foreign_loader():
    make = RUNS["foreign loader of its own generator"]
    trainer, loader = make[0](), make[1]()
    trainer.fit(loader, n=1)
    saved = trainer.state_dict()
    orders = []
    for one, its_loader in ((trainer, loader), (make[0](), make[1]())):
        seen = []
        if one is not trainer:
            one.load_state_dict(saved)
        one.on("before_batch", lambda trainer: seen.append(trainer.state.current_batch.targets.tolist()))
        one.fit(its_loader, n=1)
        orders.append(seen)
    assert orders[0] == orders[1]


# ---- every class of the package that has state


def all_classes():
    """Every class of the package that defines both ways, but protocols and abstract ones."""
    names = [module.name for module in pkgutil.walk_packages(nbdev_trainer.__path__, "nbdev_trainer.")]
    members = [m for name in names for m in vars(importlib.import_module(name)).values()]
    classes = {c for c in members if inspect.isclass(c) and c.__module__.startswith("nbdev_trainer.")}
    stateful = [
        c
        for c in classes
        if callable(getattr(c, "state_dict", None))
        and hasattr(c, "load_state_dict")
        and getattr(c, "state_dict", None) is not torch.nn.Module.state_dict  # a model, whose state is torch's affair
    ]
    concrete = [c for c in stateful if not inspect.isabstract(c) and not getattr(c, "_is_protocol", False)]
    return sorted(concrete, key=lambda c: c.__qualname__)


class Plainest(Metric):
    def update(self, output, batch):
        self.mean.add(output.loss, batch.size)


def mean_of_scores(predictions, targets):
    return predictions.mean()


def shown(metric, predictions, targets=lambda targets: targets):
    """A metric that is shown other predictions and targets, made of scores (6, 3) and class numbers (6,)."""
    update = metric.update

    def convert(output, batch):
        seen = StepOutput(predictions=predictions(output.predictions))
        update(seen, Batch(None, targets(batch.targets), batch.size))

    metric.update = convert
    return metric


def first_scores(scores):
    return scores[:, 0]


def is_one(targets):
    return (targets == 1).float()


def one_hot(targets):
    return F.one_hot(targets, 3)


def as_float(targets):
    return targets.float()


def as_texts(values):
    """A text for each row: the order of its scores, or its class number."""
    return [" ".join(map(str, row)) for row in values.view(len(values), -1).argsort(1).tolist()]


def sample_loader():
    """Eight samples, one by one, in batches of three."""
    return Data(list(range(8)), {"x": Number()}, inputs="x").loaders(3, seed=0).train


def scaled():
    """A scale for one optimizer."""
    made, weight = Scaled(torch.device("cpu")), torch.ones(1, requires_grad=True)
    made.of_test = torch.optim.SGD([weight], lr=0.1)
    made.prepare(nn.Identity(), {"main": made.of_test})
    return made


def in_smaller_parts():
    model = two_networks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = MicroBatching(model, {"main": optimizer}, torch.device("cpu"))
    engine.tries = True
    return engine


MAKERS = {  # by class name, how to make a fresh one with the same settings; a callback needs no more
    "AUROC": lambda: AUROC("multiclass", 3),
    "Accuracy": Accuracy,
    "Additive": lambda: F1Score("multiclass", 3),
    "Answers": lambda: Accuracy(),
    "ClassAnswers": lambda: Accuracy("kept", ignore_index=1),
    "BadBatches": BadBatches,
    "Deterministic": Deterministic,
    "AttachedFunction": lambda: attach("after_step", lambda trainer: None, every="2ba"),
    "ByEpoch": lambda: ByEpoch(lambda epoch: own_loader()),
    "Combined": lambda: Combined({"one": own_loader(), "other": sample_loader()}),
    "EpochLoader": sample_loader,
    "SeededLoader": own_loader,
    "Scaled": lambda: scaled(),
    "Positioned": lambda: StreamLoader(range(8), {"x": Number()}, inputs="x", batch_size=3),
    "SampleLoader": sample_loader,
    "StreamLoader": lambda: StreamLoader(range(8), {"x": Number()}, inputs="x", batch_size=3),
    "AveragedWeights": lambda: EMA(0.9),
    "EMA": lambda: EMA(0.9),
    "ActivationStatistics": lambda: ActivationStatistics(every="2ba"),
    "CutMix": lambda: MixOneOf(Mixup(0.4), Mixup(1.0), seed=1),  # its images are no part of these runs
    "GradientNorms": lambda: GradientNorms(every="2st"),
    "MixOneOf": lambda: MixOneOf(Mixup(0.4), Mixup(1.0)),
    "Mixing": lambda: Mixup(0.4, p=0.5),
    "Mixup": lambda: Mixup(0.4),
    "NormTable": lambda: GradientNorms("parameter", every="1st"),
    "Watching": lambda: Watching("valid_loss", Patience(3, min_delta=10.0)),
    "MeanWeights": lambda: SWA(start=0.0, every="1st"),
    "SWA": lambda: SWA(start=0.0, every="1st"),
    "ReduceOnPlateau": lambda: ReduceOnPlateau("valid_loss", patience=1, min_delta=10.0),
    "SchedulerSettings": lambda: TorchScheduler(lambda one: torch.optim.lr_scheduler.StepLR(one, 1, 0.5), every="1st"),
    "TorchScheduler": lambda: TorchScheduler(lambda one: torch.optim.lr_scheduler.StepLR(one, 1, 0.5), every="1st"),
    "SAM": lambda: SAM(torch.optim.SGD(two_networks().parameters(), lr=0.1, momentum=0.9)),
    "MicroBatching": lambda: in_smaller_parts(),
    "AveragePrecision": lambda: AveragePrecision("multiclass", 3, n_bins=20),
    "BLEU": lambda: shown(BLEU(), as_texts, as_texts),
    "BinaryAccuracy": lambda: shown(BinaryAccuracy(), first_scores, is_one),
    "BrierScore": lambda: BrierScore("multiclass", 3),
    "CalibrationError": lambda: CalibrationError("multiclass", 3),
    "CharErrorRate": lambda: shown(CharErrorRate(), as_texts, as_texts),
    "ClassCounts": lambda: F1Score("multiclass", 3),
    "ClassScore": lambda: F1Score("multiclass", 3, average="per_class"),
    "CohenKappa": lambda: CohenKappa("multiclass", 3, distance="linear"),
    "ConfusionMatrix": lambda: ConfusionMatrix("multiclass", 3),
    "Dice": lambda: Dice("multiclass", 3),
    "EarlyStopping": lambda: EarlyStopping("valid_loss", patience=3, min_delta=10.0),
    "ExplainedVariance": lambda: shown(ExplainedVariance(), first_scores, as_float),
    "F1Score": lambda: shown(F1Score("binary"), first_scores, is_one),
    "FBetaScore": lambda: FBetaScore("multiclass", 3, beta=2),
    "FunctionMetric": lambda: FunctionMetric(spread),
    "FusedAdamW": lambda: FusedAdamW(two_networks().parameters()),
    "IoU": lambda: IoU("multiclass", 3),
    "Kept": lambda: WholeSet(best_score),
    "Loader": own_loader,
    "MomentState": lambda: shown(R2(), first_scores, as_float),
    "LogLoss": lambda: LogLoss("multiclass", 3),
    "Loss": Loss,
    "MatthewsCorrelation": lambda: MatthewsCorrelation("multiclass", 3),
    "Mean": lambda: Mean(mean_of_scores),
    "MeanAbsoluteError": lambda: shown(MeanAbsoluteError(), first_scores, as_float),
    "MeanAbsolutePercentageError": lambda: shown(MeanAbsolutePercentageError(), first_scores, as_float),
    "MeanSquaredError": lambda: shown(MeanSquaredError(), first_scores, as_float),
    "Metric": Plainest,
    "MetricSet": lambda: MetricSet([Accuracy(), FunctionMetric(best_score)]),
    "Moments": lambda: shown(R2(), first_scores, as_float),
    "MultilabelAccuracy": lambda: shown(MultilabelAccuracy(), lambda scores: scores, one_hot),
    "PearsonCorrelation": lambda: shown(PearsonCorrelation(), first_scores, as_float),
    "Perplexity": lambda: Perplexity(3),
    "PrecisionScore": lambda: PrecisionScore("multiclass", 3),
    "ProbabilityMetric": lambda: LogLoss("multiclass", 3),
    "R2": lambda: shown(R2(), first_scores, as_float),
    "Ranking": lambda: AUROC("multiclass", 3, n_bins=20),
    "RankingState": lambda: AUROC("multiclass", 3, n_bins=20),
    "RecallScore": lambda: RecallScore("multiclass", 3),
    "Recorder": lambda: Recorder(every="1st"),
    "RootMeanSquaredError": lambda: shown(RootMeanSquaredError(), first_scores, as_float),
    "RunningMean": RunningMean,
    "SpearmanCorrelation": lambda: shown(SpearmanCorrelation(), first_scores, as_float),
    "State": State,
    "TopKAccuracy": lambda: TopKAccuracy(2),
    "TorchMetric": lambda: TorchMetric(torchmetrics.F1Score("multiclass", num_classes=3)),
    "Trainer": lambda: supervised(linear_net()),
    "WholeSet": lambda: WholeSet(best_score),
    "WordErrorRate": lambda: shown(WordErrorRate(), as_texts, as_texts),
}
CLOCK = {"elapsed", "since_validation", "seconds", "time", "duration"}  # keys that differ from run to run


def use(thing, turn):
    """Let an object do once more what changes its state; `turn` decides what it sees."""
    generator = torch.Generator().manual_seed(turn)
    scores, targets = torch.randn(6, 3, generator=generator), torch.randint(3, (6,), generator=generator)
    if isinstance(thing, Metric | MetricSet):
        output = StepOutput(
            loss=F.cross_entropy(scores, targets), predictions=scores, logs={"top": scores.max()}
        )
        thing.update(output, Batch(scores, targets, 6))
    elif isinstance(thing, RunningMean):
        thing.add(scores.mean(), turn + 1)
    elif isinstance(thing, EpochLoader):
        list(thing)
    elif isinstance(thing, torch.optim.Optimizer):
        for p in thing.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
        thing.step(*[lambda: 0.0] * isinstance(thing, SAM))  # it asks for the loss again
    elif isinstance(thing, Scaled):
        optimizer = thing.of_test
        thing.scale(optimizer.param_groups[0]["params"][0].sum() * (torch.inf if turn % 3 == 1 else 1), optimizer).backward()
        thing.unscale(optimizer)
        thing.step(optimizer)
        optimizer.zero_grad()
    elif isinstance(thing, MicroBatching):
        thing.get_smaller(4096 >> min(turn, 3) if turn < 4 else 2 * turn, shown=False)
    elif isinstance(thing, State):
        thing.batch, thing.metrics = thing.batch + 1, {"train_loss": float(scores.mean())}
    elif isinstance(thing, Trainer):
        thing.fit([Batch(arrays(6)[0] * turn, targets)], n=1)
    else:
        raise TypeError(f"say in use() how a {type(thing).__name__} is used")


def state_of(thing):
    """Its state, and what it answers."""
    answer = thing.compute() if hasattr(thing, "compute") else None
    return without_clock({"state": thing.state_dict(), "answer": answer})


def without_clock(state):
    if isinstance(state, dict):
        return {key: without_clock(value) for key, value in state.items() if key not in CLOCK}
    return [without_clock(one) for one in state] if isinstance(state, (list, tuple)) else state


def in_a_fit(make, snapshot=None):
    """The state of one callback at the end of a small fit, and the snapshots taken on the way."""
    callback = make()
    run = (*RUNS["accumulation"][:2], {"validate_every": "2ba"})
    _, taken = end_of(*run, snapshot=snapshot, callbacks=lambda: [callback])
    return without_clock(callback.state_dict()), taken


@pytest.mark.parametrize("cls", all_classes(), ids=lambda cls: cls.__qualname__)
def test_whatever_has_state_goes_on_from_it(cls):
    make = MAKERS.get(cls.__qualname__)
    assert make, (
        f"{cls.__qualname__} has state_dict and load_state_dict: add a maker for it to MAKERS in this file"
    )
    if issubclass(cls, Callback):
        expected, taken = in_a_fit(make)
        ends = {moment: in_a_fit(make, snapshot)[0] for moment, snapshot in taken.items()}
        assert {moment: found for moment, end in ends.items() if (found := differences(end, expected))} == {}
        return
    for n_before in 1, 3, 70:
        first, second = make(), make()
        if isinstance(first, torch.optim.Optimizer):  # an optimizer's state does not hold the parameters
            second.param_groups[0]["params"][:] = first.param_groups[0]["params"]
        for turn in range(n_before):
            use(first, turn)
        saved = first.state_dict()
        second.load_state_dict(saved)
        assert differences(state_of(first), state_of(second)) == []
        for turn in range(n_before, n_before + 2):
            use(first, turn)
            first_end = state_of(first)
        if isinstance(first, torch.optim.Optimizer):
            continue
        for turn in range(n_before, n_before + 2):
            use(second, turn)
        assert differences(state_of(second), first_end) == []
        assert differences(without_clock(saved), state_of(first)["state"]) != [], (
            "it has no state that changes"
        )


def test_there_is_no_maker_for_a_class_that_is_gone():
    assert MAKERS.keys() - {cls.__qualname__ for cls in all_classes()} == set()


def test_attached_functions_are_callbacks_with_state():
    assert AttachedFunction in all_classes() and issubclass(AttachedFunction, Callback)
