"""Every metric equals scikit-learn's value, and torchmetrics' where both agree: any batches, weights and shards."""

import copy
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk
import torch
from helpers import one_thread as one_thread
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nbdev_trainer.data.batch import Batch, StepOutput
from nbdev_trainer.metrics.adapters import FunctionMetric, TorchMetric, WholeSet
from nbdev_trainer.metrics.base import Mean
from nbdev_trainer.metrics.classification import Accuracy, BinaryAccuracy, MultilabelAccuracy, TopKAccuracy
from nbdev_trainer.metrics.confusion import (
    ClassCounts,
    CohenKappa,
    ConfusionMatrix,
    Dice,
    F1Score,
    FBetaScore,
    IoU,
    MatthewsCorrelation,
    PrecisionScore,
    RecallScore,
    confusion_matrix,
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
from nbdev_trainer.metrics.text import BLEU, CharErrorRate, Perplexity, WordErrorRate, edit_distance

often = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


def quiet(function, *args, **options):
    """What another library says, without its warnings; NaN where it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*args, **options)
        except ValueError:
            return math.nan


# ---- data: any number of samples from one on, classes that never occur, ties, batches, shards, weights


@st.composite
def samples(draw, weighted=True):
    """Random settings: generator, samples, classes, sizes of batches, order of shards, weights or None."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    n, n_classes = draw(st.integers(1, 40)), draw(st.integers(2, 6))
    weights = None
    if weighted and draw(st.booleans()):
        weights = torch.randint(1, 5, (n,), generator=generator).float() / 2
    return generator, n, n_classes, draw(st.integers(1, 15)), draw(st.integers(1, 4)), weights


def classes(generator, n, n_classes):
    """Class numbers of which some may be missing."""
    return torch.randint(
        max(1, n_classes - int(torch.randint(3, (), generator=generator))), (n,), generator=generator
    )


def distinct(generator, *shape):
    """Scores without ties, in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rounded(generator, *shape):
    """Scores with many ties, in float64."""
    return (distinct(generator, *shape) * 2).round() / 2


def measured(metric, predictions, targets, batch_size, n_shards, weights, generator, tolerance=1e-9):
    """The result over batches that are dealt to shards and merged in a random order; it must be that of one pass."""
    whole, shards = copy.deepcopy(metric), [copy.deepcopy(metric) for _ in range(n_shards)]
    for i, start in enumerate(range(0, len(targets), batch_size)):
        part = slice(start, start + batch_size)
        batch = Batch(
            None, targets[part], len(targets[part]), None, None if weights is None else weights[part]
        )
        for one in (whole, shards[i % n_shards]):
            one.update(StepOutput(predictions=predictions[part]), batch)
    order = torch.randperm(n_shards, generator=generator).tolist()
    merged = shards[order[0]]
    for i in order[1:]:
        merged.merge(shards[i])
    one, other = as_numbers(whole.compute()), as_numbers(merged.compute())
    assert one == pytest.approx(other, rel=tolerance, abs=1e-12, nan_ok=True)
    return one


def as_numbers(value):
    if isinstance(value, dict):
        return [float(one) for one in value.values()]
    return float(value)


def close(got, expected, tolerance=1e-6):
    if isinstance(expected, np.ndarray):
        expected = expected.tolist()
    assert got == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)


# ---- classes


AVERAGES = {"macro": "macro", "micro": "micro", "weighted": "weighted", "per_class": None}
SCORES = {  # ours, and scikit-learn's with the same options
    "precision": (PrecisionScore, sk.precision_score, {}),
    "recall": (RecallScore, sk.recall_score, {}),
    "f1": (F1Score, sk.f1_score, {}),
    "f2": (FBetaScore, sk.fbeta_score, {"beta": 2.0}),
    "f0.5": (FBetaScore, sk.fbeta_score, {"beta": 0.5}),
    "dice": (Dice, sk.f1_score, {}),
    "iou": (IoU, sk.jaccard_score, {}),
}


@pytest.mark.parametrize("name", SCORES)
@often
@given(samples(), st.sampled_from(list(AVERAGES)))
def test_scores_of_classes_equal_those_of_scikit_learn(name, data, average):
    ours, theirs, options = SCORES[name]
    generator, n, n_classes, batch_size, n_shards, weights = data
    scores, targets = distinct(generator, n, n_classes), classes(generator, n, n_classes)
    metric = ours("multiclass", n_classes, average=average, **options)
    got = measured(metric, scores, targets, batch_size, n_shards, weights, generator)
    common = dict(average=AVERAGES[average], zero_division=0, sample_weight=weights, **options)
    close(got, theirs(targets, scores.argmax(1), labels=range(n_classes), **common))

    labels = (distinct(generator, n, n_classes) > 0.5).long()
    metric = ours("multilabel", n_classes, average=average, **options)
    got = measured(metric, scores, labels, batch_size, n_shards, weights, generator)
    close(got, theirs(labels, scores > 0, **common))

    answers = (scores[:, 1] > 0.5).float()
    got = measured(
        ours("binary", **options), scores[:, :1], answers, batch_size, n_shards, weights, generator
    )
    close(got, theirs(answers, scores[:, 0] > 0, **(common | {"average": "binary"})))


@often
@given(samples())
def test_accuracies_equal_those_of_scikit_learn(data):
    generator, n, n_classes, batch_size, n_shards, weights = data
    scores, targets = distinct(generator, n, n_classes), classes(generator, n, n_classes)
    how = batch_size, n_shards, weights, generator
    close(
        measured(Accuracy(), scores, targets, *how),
        sk.accuracy_score(targets, scores.argmax(1), sample_weight=weights),
    )
    for k in range(1, n_classes if n_classes > 2 else 2):
        expected = sk.top_k_accuracy_score(
            targets,
            scores if n_classes > 2 else scores[:, 1] - scores[:, 0],
            k=k,
            labels=range(n_classes),
            sample_weight=weights,
        )
        close(measured(TopKAccuracy(k), scores, targets, *how), expected)
    answers, limit = distinct(generator, n) > 0, 0.7
    expected = sk.accuracy_score(answers, scores[:, 0].sigmoid() > limit, sample_weight=weights)
    close(measured(BinaryAccuracy(threshold=limit), scores[:, 0], answers.double(), *how), expected)
    labels = distinct(generator, n, n_classes) > 0
    expected = sk.accuracy_score(labels, scores > 0, sample_weight=weights)
    close(measured(MultilabelAccuracy(exact=True), scores, labels, *how), expected)
    repeated = None if weights is None else weights.repeat_interleave(n_classes)
    expected = sk.accuracy_score(labels.flatten(), (scores > 0).flatten(), sample_weight=repeated)
    close(measured(MultilabelAccuracy(from_logits=False), scores.sigmoid(), labels, *how), expected)


@often
@given(samples())
def test_matrix_mcc_and_kappa_equal_those_of_scikit_learn(data):
    generator, n, n_classes, batch_size, n_shards, weights = data
    scores, targets = distinct(generator, n, n_classes), classes(generator, n, n_classes)
    scores[: n // 2] += 3 * F.one_hot(targets, n_classes)[: n // 2]
    how, guesses = (batch_size, n_shards, weights, generator), scores.argmax(1)
    matrix = sk.confusion_matrix(targets, guesses, labels=range(n_classes), sample_weight=weights)
    close(measured(ConfusionMatrix("multiclass", n_classes), scores, targets, *how), matrix.flatten())
    close(confusion_matrix(scores, targets, weights=weights).flatten().tolist(), matrix.flatten())
    expected = quiet(sk.matthews_corrcoef, targets, guesses, sample_weight=weights)
    close(measured(MatthewsCorrelation("multiclass", n_classes), scores, targets, *how), expected)
    for distance, name in {"none": None, "linear": "linear", "quadratic": "quadratic"}.items():
        metric = CohenKappa("multiclass", n_classes, distance=distance)
        expected = quiet(
            sk.cohen_kappa_score,
            targets,
            guesses,
            labels=range(n_classes),
            weights=name,
            sample_weight=weights,
        )
        close(measured(metric, scores, targets, *how), expected)


@often
@given(samples(), st.integers(0, 2))
def test_ignored_targets_are_as_if_they_were_not_there(data, ignored):
    generator, n, n_classes, batch_size, n_shards, weights = data
    scores, targets = distinct(generator, n, n_classes), classes(generator, n, n_classes)
    ignored = (-100, 255, 0)[ignored]
    targets[::3] = ignored
    kept = targets != ignored
    how, part = (batch_size, n_shards, weights, generator), None if weights is None else weights[kept]
    options = dict(labels=range(n_classes), average="macro", zero_division=0, sample_weight=part)
    expected = sk.f1_score(targets[kept], scores[kept].argmax(1), **options) if kept.any() else math.nan
    close(measured(F1Score("multiclass", n_classes, ignore_index=ignored), scores, targets, *how), expected)
    loss = LogLoss("multiclass", n_classes, ignore_index=ignored)
    each = F.cross_entropy(scores, targets, reduction="none", ignore_index=ignored)
    w = kept.double() if weights is None else weights.double() * kept
    close(measured(loss, scores, targets, *how), ((each * w).sum() / w.sum()).item())


# ---- ranking


@pytest.mark.parametrize("draw", [distinct, rounded])
@often
@given(data=samples())
def test_auroc_and_average_precision_equal_those_of_scikit_learn(draw, data):
    generator, n, n_classes, batch_size, n_shards, weights = data
    how, scores = (batch_size, n_shards, weights, generator), draw(generator, n, n_classes)
    answers = (distinct(generator, n) > 0).double()
    area, precision = (
        quiet(theirs, answers, scores[:, 0], sample_weight=weights)
        for theirs in (sk.roc_auc_score, sk.average_precision_score)
    )
    close(measured(AUROC("binary"), scores[:, 0], answers, *how), area)
    close(measured(AveragePrecision("binary"), scores[:, :1], answers, *how), precision)
    labels = distinct(generator, n, n_classes) > 0
    for average in ("macro", "micro", "per_class"):
        metrics = [kind("multilabel", n_classes, average=average) for kind in (AUROC, AveragePrecision)]
        for metric, theirs in zip(metrics, (sk.roc_auc_score, sk.average_precision_score)):
            expected = quiet(theirs, labels, scores, average=AVERAGES[average], sample_weight=weights)
            got = measured(metric, scores, labels, *how)
            if not np.isnan(np.asarray(expected)).all():
                close(got, expected)


@often
@given(samples())
def test_multiclass_auroc_equals_that_of_scikit_learn(data):
    generator, n, n_classes, batch_size, n_shards, weights = data
    n_classes, targets = max(3, n_classes), classes(generator, n, max(3, n_classes))
    scores = distinct(generator, n, n_classes)
    chances = scores.softmax(1)
    for average in ("macro", "weighted"):
        metric = AUROC("multiclass", n_classes, average=average)
        expected = quiet(
            sk.roc_auc_score,
            targets,
            chances,
            multi_class="ovr",
            average=average,
            labels=range(n_classes),
            sample_weight=weights,
        )
        got = measured(metric, scores, targets, batch_size, n_shards, weights, generator)
        if not math.isnan(expected):
            close(got, expected)
        metric = AveragePrecision("multiclass", n_classes, average=average)
        got = measured(metric, scores, targets, batch_size, n_shards, weights, generator)
        one_hot = F.one_hot(targets, n_classes)
        close(
            got, quiet(sk.average_precision_score, one_hot, chances, average=average, sample_weight=weights)
        )


@often
@given(samples())
def test_binned_values_come_near_the_exact_ones_and_are_exact_on_a_grid(data):
    generator, n, n_classes, batch_size, n_shards, weights = data
    on_grid = torch.randint(20, (n, n_classes), generator=generator) / 20 + 0.01
    labels = distinct(generator, n, n_classes) > 0
    for kind in (AUROC, AveragePrecision):
        settings = dict(from_logits=False, average="per_class")
        values = [
            measured(kind("multilabel", n_classes, n_bins=n_bins, **settings), on_grid, labels, *how)
            for n_bins, how in [
                (None, (batch_size, 1, weights, generator)),
                (20, (batch_size, n_shards, weights, generator)),
            ]
        ]
        close(*values)


# ---- probabilities


@often
@given(samples())
def test_log_loss_and_brier_score_equal_those_of_scikit_learn(data):
    generator, n, n_classes, batch_size, n_shards, weights = data
    how, scores = (batch_size, n_shards, weights, generator), 3 * distinct(generator, n, n_classes)
    targets, chances = classes(generator, n, n_classes), scores.softmax(1)
    for kind, theirs in ((LogLoss, sk.log_loss), (BrierScore, sk.brier_score_loss)):
        options = dict(labels=range(n_classes), sample_weight=weights)
        if kind is BrierScore:
            options["scale_by_half"] = False
        expected = theirs(targets, chances, **options)
        close(measured(kind("multiclass", n_classes), scores, targets, *how), expected)
        given = kind("multiclass", n_classes, from_logits=False)
        close(measured(given, chances, targets, *how), expected)
        answers = (targets == 0).long()
        expected = theirs(answers, scores[:, 0].sigmoid(), labels=[0, 1], sample_weight=weights)
        close(measured(kind("binary"), scores[:, 0], answers, *how), expected)
    extreme = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    expected = sk.log_loss([0, 0], extreme, labels=[0, 1])
    given = LogLoss("multiclass", 2, from_logits=False)
    close(measured(given, extreme, torch.tensor([0, 0]), 1, 1, None, generator), expected)


# ---- regression


ERRORS = {
    "mse": (MeanSquaredError, sk.mean_squared_error),
    "rmse": (RootMeanSquaredError, sk.root_mean_squared_error),
    "mae": (MeanAbsoluteError, sk.mean_absolute_error),
    "mape": (MeanAbsolutePercentageError, sk.mean_absolute_percentage_error),
    "r2": (R2, sk.r2_score),
    "explained variance": (ExplainedVariance, sk.explained_variance_score),
}


@pytest.mark.parametrize("name", ERRORS)
@often
@given(data=samples(), shift=st.sampled_from([0.0, 100.0, -1000.0]), constant=st.booleans())
def test_errors_equal_those_of_scikit_learn(name, data, shift, constant):
    ours, theirs = ERRORS[name]
    generator, n, n_outputs, batch_size, n_shards, weights = data
    targets = distinct(generator, n, n_outputs) + shift
    if constant:
        targets[:, 0] = 0.5 + shift
    predictions = targets + distinct(generator, n, n_outputs)
    tolerance = 1e-4 if shift else 1e-6  # the page says how many digits a large mean costs
    how = batch_size, n_shards, weights, generator, tolerance
    expected = quiet(theirs, targets[:, 0], predictions[:, 0], sample_weight=weights)
    close(measured(ours(), predictions[:, 0], targets[:, 0], *how), expected, tolerance)
    if name == "rmse":
        return  # of several outputs: scikit-learn averages roots
    expected = quiet(theirs, targets, predictions, sample_weight=weights)
    metric = ours(n_outputs) if name in ("r2", "explained variance") else ours()
    close(measured(metric, predictions, targets, *how), expected, tolerance)


@pytest.mark.parametrize("draw", [distinct, rounded])
@often
@given(data=samples(weighted=False), shift=st.sampled_from([0.0, 1000.0]))
def test_correlations_equal_those_of_scipy(draw, data, shift):
    generator, n, _, batch_size, n_shards, _ = data
    targets = draw(generator, n) + shift
    predictions = targets + draw(generator, n)
    for ours, theirs in (
        (PearsonCorrelation, scipy.stats.pearsonr),
        (SpearmanCorrelation, scipy.stats.spearmanr),
    ):
        expected = quiet(theirs, predictions, targets).statistic if n > 1 else math.nan
        got = measured(ours(), predictions, targets, batch_size, n_shards, None, generator, 1e-6)
        close(got, float(expected), 1e-5)


@often
@given(samples())
def test_a_weight_of_two_is_as_if_a_sample_were_there_twice(data):
    generator, n, _, batch_size, n_shards, _ = data
    targets, weights = distinct(generator, n), torch.randint(1, 4, (n,), generator=generator)
    predictions = targets + distinct(generator, n)
    repeated = predictions.repeat_interleave(weights), targets.repeat_interleave(weights)
    got = measured(
        PearsonCorrelation(), predictions, targets, batch_size, n_shards, weights.double(), generator
    )
    close(got, measured(PearsonCorrelation(), *repeated, batch_size, n_shards, None, generator))


# ---- texts


words = st.lists(st.sampled_from(["a", "b", "the", "cat", "sat"]), max_size=9).map(" ".join)


@often
@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 3))
def test_metrics_of_texts_equal_those_of_torchmetrics(triples, batch_size, n_shards):
    text = pytest.importorskip("torchmetrics.functional.text")
    generator = torch.Generator().manual_seed(len(triples))
    said, meant, also = (list(each) for each in zip(*triples))
    how = batch_size, n_shards, None, generator
    if any(meant):
        for ours, theirs in (
            (WordErrorRate, text.word_error_rate),
            (CharErrorRate, text.char_error_rate),
        ):
            close(measured(ours(), said, meant, *how), theirs(said, meant).item())
    for n in (1, 2, 4):
        expected = text.bleu_score(said, [[one] for one in meant], n_gram=n).item()
        got = measured(BLEU(n), said, meant, *how)
        if not math.isnan(got):
            close(got, expected, 1e-5)
        lengths = [[abs(len(t.split()) - len(s.split())) for t in (m, a)] for s, m, a in triples]
        if all(one != other for one, other in lengths) and not math.isnan(got):
            expected = text.bleu_score(said, list(zip(meant, also)), n_gram=n).item()
            close(measured(BLEU(n), said, list(zip(meant, also)), *how), expected, 1e-5)


@often
@given(words, words, words)
def test_edit_distance_is_a_distance(a, b, c):
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, b) == edit_distance(b, a) <= max(len(a), len(b))
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@often
@given(samples())
def test_perplexity_equals_that_of_torchmetrics(data):
    text = pytest.importorskip("torchmetrics.functional.text")
    generator, n, n_tokens, batch_size, n_shards, _ = data
    scores, tokens = distinct(generator, n, n_tokens, 5), classes(generator, n * 5, n_tokens).view(n, 5)
    tokens[:, 3:] = -100
    expected = text.perplexity(scores.movedim(1, 2), tokens, ignore_index=-100).item()
    close(measured(Perplexity(n_tokens), scores, tokens, batch_size, n_shards, None, generator), expected)


# ---- torchmetrics, where it has the same meaning


def torchmetrics_of(n_classes):
    """Ours and torchmetrics' for scores (n, classes) and class numbers, without weights."""
    tm = pytest.importorskip("torchmetrics.functional.classification")
    options = dict(num_classes=n_classes)
    skip = dict(skip_absent=True)
    return {
        "accuracy": (Accuracy(), lambda s, t: tm.multiclass_accuracy(s, t, average="micro", **options)),
        "top 2": (
            TopKAccuracy(min(2, n_classes - 1)),
            lambda s, t: tm.multiclass_accuracy(
                s, t, average="micro", top_k=min(2, n_classes - 1), **options
            ),
        ),
        "precision": (
            PrecisionScore("multiclass", n_classes, **skip),
            lambda s, t: tm.multiclass_precision(s, t, **options),
        ),
        "recall": (
            RecallScore("multiclass", n_classes, **skip),
            lambda s, t: tm.multiclass_recall(s, t, **options),
        ),
        "f1": (
            F1Score("multiclass", n_classes, **skip),
            lambda s, t: tm.multiclass_f1_score(s, t, **options),
        ),
        "f2, weighted": (
            FBetaScore("multiclass", n_classes, beta=2, average="weighted"),
            lambda s, t: tm.multiclass_fbeta_score(s, t, 2.0, average="weighted", **options),
        ),
        "iou": (
            IoU("multiclass", n_classes, **skip),
            lambda s, t: tm.multiclass_jaccard_index(s, t, **options),
        ),
        "kappa": (
            CohenKappa("multiclass", n_classes, distance="quadratic"),
            lambda s, t: tm.multiclass_cohen_kappa(s, t, weights="quadratic", **options),
        ),
        "matrix": (
            ConfusionMatrix("multiclass", n_classes),
            lambda s, t: tm.multiclass_confusion_matrix(s, t, **options).flatten().double().numpy(),
        ),
        "calibration": (
            CalibrationError("multiclass", n_classes, n_bins=10),
            lambda s, t: tm.multiclass_calibration_error(s.softmax(1), t, n_bins=10, **options),
        ),
        "worst calibration": (
            CalibrationError("multiclass", n_classes, n_bins=10, norm="max"),
            lambda s, t: tm.multiclass_calibration_error(s.softmax(1), t, n_bins=10, norm="max", **options),
        ),
        "auroc": (
            AUROC("multiclass", n_classes, from_logits=False, skip_absent=True),
            lambda s, t: tm.multiclass_auroc(s, t, **options),
        ),
        "average precision": (
            AveragePrecision("multiclass", n_classes, from_logits=False, skip_absent=True),
            lambda s, t: tm.multiclass_average_precision(s, t, **options),
        ),
    }


SAME = ["accuracy", "top 2", "precision", "recall", "f1", "f2, weighted", "iou", "kappa", "matrix"]
SAME += ["calibration", "worst calibration", "auroc", "average precision"]


@pytest.mark.parametrize("name", SAME)
@often
@given(data=samples(weighted=False))
def test_metrics_of_classes_equal_those_of_torchmetrics(name, data):
    generator, n, n_classes, batch_size, n_shards, _ = data
    ours, theirs = torchmetrics_of(n_classes)[name]
    scores, targets = distinct(generator, n, n_classes), classes(generator, n, n_classes)
    if name in ("auroc", "average precision"):
        scores = scores.softmax(1)
    got = measured(ours, scores, targets, batch_size, n_shards, None, generator)
    expected = quiet(theirs, scores, targets)
    if name in ("auroc", "average precision") and len(targets.unique()) < max(2, n_classes):
        return  # torchmetrics gives 0 for what does not exist
    if isinstance(got, float) and math.isnan(got):
        return
    close(got, expected if isinstance(expected, np.ndarray) else float(expected), 1e-5)


@often
@given(samples(weighted=False))
def test_regression_equals_that_of_torchmetrics(data):
    tm = pytest.importorskip("torchmetrics.functional")
    generator, n, _, batch_size, n_shards, _ = data
    targets = distinct(generator, n) + 5
    predictions, how = targets + distinct(generator, n), (batch_size, n_shards, None, generator)
    pairs = {
        MeanSquaredError: tm.mean_squared_error,
        MeanAbsoluteError: tm.mean_absolute_error,
        MeanAbsolutePercentageError: tm.mean_absolute_percentage_error,
        RootMeanSquaredError: lambda p, t: tm.mean_squared_error(p, t, squared=False),
    }
    if n > 2:
        pairs |= {
            R2: tm.r2_score,
            ExplainedVariance: tm.explained_variance,
            PearsonCorrelation: tm.pearson_corrcoef,
            SpearmanCorrelation: tm.spearman_corrcoef,
        }
    for ours, theirs in pairs.items():
        expected = float(quiet(theirs, predictions, targets))
        close(measured(ours(), predictions, targets, *how), expected, 1e-4)


# ---- what holds for all of them


def every_metric():
    """A maker of each, with what it is shown: scores, class numbers, labels, answers, numbers or texts."""
    for kind in (PrecisionScore, RecallScore, F1Score, Dice, IoU, AUROC, AveragePrecision):
        for task in ("binary", "multiclass", "multilabel"):
            yield kind(task, None if task == "binary" else 3), task
    for kind in (MatthewsCorrelation, CohenKappa, ConfusionMatrix, LogLoss, BrierScore, CalibrationError):
        for task in ("binary", "multiclass"):
            yield kind(task, None if task == "binary" else 3), task
    for kind in (AUROC, AveragePrecision):
        yield kind("multiclass", 3, n_bins=10), "multiclass"
    yield from [(Accuracy(), "multiclass"), (TopKAccuracy(2), "multiclass"), (BinaryAccuracy(), "binary")]
    yield from [(MultilabelAccuracy(), "multilabel"), (Perplexity(3), "multiclass")]
    for kind, _ in ERRORS.values():
        yield kind(), "numbers"
    yield from [(PearsonCorrelation(), "numbers"), (SpearmanCorrelation(), "numbers")]


def shown(task, n=8, device="cpu"):
    scores = torch.randn(n, 3, device=device, requires_grad=True)
    numbers = torch.randn(n, device=device)
    targets = torch.randint(3, (n,), device=device)
    return {
        "multiclass": (scores, targets),
        "multilabel": (scores, (scores.detach() > 0.3).float()),
        "binary": (scores[:, :1], (numbers > 0).float()),
        "numbers": (scores[:, 0], numbers),
    }[task]


def named(pair):
    return f"{pair[0].name} {pair[1]}" if isinstance(pair, tuple) else None


@pytest.mark.parametrize("pair", list(every_metric()), ids=named)
def test_no_metric_reads_the_device_before_the_end_or_keeps_a_graph(pair):
    metric, task = copy.deepcopy(pair[0]), pair[1]
    weights = None if isinstance(metric, SpearmanCorrelation) else torch.ones(8, device="meta")
    for given in (None, weights):  # on this device there is nothing to read
        scores, targets = shown(task, device="meta")
        metric.update(StepOutput(predictions=scores), Batch(None, targets, 8, weights=given))
    value = metric.compute()
    for one in value.values() if isinstance(value, dict) else [value]:
        assert one.device.type == "meta" and one.shape == () and not one.requires_grad
    assert "grad_fn" not in repr(metric.state_dict())


@pytest.mark.parametrize("pair", list(every_metric()), ids=named)
def test_a_metric_that_saw_nothing_is_nan_and_merges(pair):
    fresh = copy.deepcopy(pair[0])
    if not isinstance(fresh, ConfusionMatrix):
        assert math.isnan(fresh.compute()) and fresh.higher_is_better is not None
    scores, targets = shown(pair[1])
    one, other = copy.deepcopy(fresh), copy.deepcopy(fresh)
    one.update(StepOutput(predictions=scores), Batch(None, targets, 8))
    expected = as_numbers(one.compute())
    empty = (
        StepOutput(predictions=scores[:0]),
        Batch(None, targets[:0], 0),
    )  # a rank may get no sample of a batch
    other.update(*empty)
    one.update(*empty)
    for shard in (fresh, other):
        shard.merge(one)
        close(as_numbers(shard.compute()), expected)
        one.merge(copy.deepcopy(pair[0]))
    close(as_numbers(one.compute()), expected)
    if (sums := one.sums()) is not None:  # as processes do it: all sums in one vector
        packed = torch.cat([part.flatten().double() for part in sums.values()])
        parts = packed.split([part.numel() for part in sums.values()])
        again = copy.deepcopy(pair[0])
        again.load_sums({name: part.view(sums[name].shape) for name, part in zip(sums, parts)})
        close(as_numbers(again.compute()), expected)


def test_a_mean_and_a_whole_set_merge_too():
    def level(predictions, targets):
        return predictions.mean()

    for make in (lambda: Mean(level), lambda: WholeSet(level)):
        one, other = make(), make()
        one.update(StepOutput(predictions=torch.ones(3)), Batch(None, torch.ones(3), 3))
        other.update(StepOutput(predictions=torch.zeros(1)), Batch(None, torch.ones(1), 1))
        one.merge(other)
        assert float(one.compute()) == 0.75
        with pytest.raises(TypeError, match="cannot take in"):
            one.merge(Accuracy())


def test_segmentation_counts_pixels():
    scores, targets = torch.randn(3, 4, 5, 6), torch.randint(4, (3, 5, 6), dtype=torch.uint8)
    for ours, theirs in ((Dice, sk.f1_score), (IoU, sk.jaccard_score)):
        metric = ours("multiclass", 4)
        metric.update(StepOutput(predictions=scores), Batch(None, targets, 3))
        expected = theirs(
            targets.flatten(), scores.argmax(1).flatten(), labels=range(4), average="macro", zero_division=0
        )
        close(float(metric.compute()), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_taken(dtype):
    for metric, task in every_metric():
        scores, targets = shown(task)
        metric.update(StepOutput(predictions=scores.to(dtype)), Batch(None, targets, 8))
        assert metric.compute() is not None


OF_SCORES = [
    (metric, task)
    for metric, task in every_metric()
    if task != "numbers" and not (task == "multiclass" and isinstance(metric, ClassCounts))
]


@pytest.mark.parametrize("pair", OF_SCORES, ids=named)
def test_a_score_of_nan_that_counts_makes_the_result_nan(pair):
    spoiled, kept, light = (copy.deepcopy(pair[0]) for _ in range(3))
    scores, targets = (one.detach() for one in shown(pair[1]))
    holed = scores.clone()
    holed[2] = math.nan
    spoiled.update(StepOutput(predictions=holed), Batch(None, targets, 8))
    assert np.isnan(as_numbers(spoiled.compute())).all()
    weights = torch.ones(8)
    weights[2] = 0  # what does not count may be anything
    strange = targets.clone()
    strange[2] = 77
    light.update(StepOutput(predictions=holed), Batch(None, strange, 8, weights=weights))
    kept.update(StepOutput(predictions=scores), Batch(None, targets, 8, weights=weights))
    close(as_numbers(light.compute()), as_numbers(kept.compute()))
    light.merge(spoiled)
    assert np.isnan(as_numbers(light.compute())).all()


@pytest.mark.parametrize(
    "metric", [Accuracy(), TopKAccuracy(2), F1Score("multiclass", 3)], ids=["accuracy", "top 2", "f1"]
)
@pytest.mark.parametrize("target", [-100, 7, 3])
def test_targets_that_are_no_class_are_an_error_at_the_end(metric, target):
    metric, merged = copy.deepcopy(metric), copy.deepcopy(metric)
    for targets in ([0, target, 2], [0, 1, 2]):
        metric.update(StepOutput(predictions=torch.eye(3)), Batch(None, torch.tensor(targets), 3))
    merged.merge(metric)
    again = copy.deepcopy(merged)
    again.load_state_dict(metric.state_dict())
    for one in (metric, merged, again):
        with pytest.raises(
            ValueError, match="got 1 targets that are no class numbers; expected 0 to .*ignore_index"
        ):
            one.compute()


@often
@given(samples(weighted=True), st.sampled_from([0.0, 1e5, 1.7e9, -3e10]))
def test_a_large_mean_costs_no_digits(data, mean):
    generator, n, _, batch_size, n_shards, weights = data
    n = n + 3
    targets = 1000 * distinct(generator, n).round(decimals=1)
    predictions = targets + 100 * distinct(generator, n).round(decimals=1)
    weights = None if weights is None else torch.cat([weights, torch.ones(3)])
    how = batch_size, n_shards, weights, generator
    for kind in (PearsonCorrelation, R2, ExplainedVariance):
        shifted = measured(kind(), predictions + mean, targets + mean, *how)
        close(shifted, measured(kind(), predictions, targets, *how), 1e-9)


def test_sample_weights_are_used_or_refused():
    torchmetrics = pytest.importorskip("torchmetrics")
    predictions, targets = torch.tensor([1.0, 2.0]), torch.zeros(2)
    batch = Batch(None, targets, 2, weights=torch.tensor([3.0, 1.0]))

    def level(predictions, targets):
        return predictions.mean()

    refusing = [Mean(level), WholeSet(level), FunctionMetric(level), BLEU()]
    for metric in [*refusing, TorchMetric(torchmetrics.MeanSquaredError())]:
        with pytest.raises(ValueError, match="got sample weights"):
            metric.update(StepOutput(predictions=predictions), batch)
    each = FunctionMetric(torch.sub, name="difference")
    each.update(StepOutput(predictions=predictions), batch)
    assert each.compute().item() == 1.25


def test_bleu_adds_to_its_sums_once_per_batch(monkeypatch):
    metric, sizes = BLEU(), []
    original = torch.Tensor.__iadd__
    monkeypatch.setattr(torch.Tensor, "__iadd__", lambda one, other: sizes.append(1) or original(one, other))
    said = ["the cat sat on the mat"] * 50
    metric.update(StepOutput(predictions=said), Batch(None, said, 50))
    assert len(sizes) <= 3 and metric.compute().item() == 1


@pytest.mark.gpu
def test_on_a_gpu_the_values_are_the_same():
    for metric, task in every_metric():
        scores, targets = shown(task)
        there = copy.deepcopy(metric)
        metric.update(StepOutput(predictions=scores), Batch(None, targets, 8))
        there.update(StepOutput(predictions=scores.cuda()), Batch(None, targets.cuda(), 8))
        close(as_numbers(there.compute()), as_numbers(metric.compute()), 1e-5)
