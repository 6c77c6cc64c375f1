"""The loop is the one a PyTorch user writes by hand, bit for bit, whatever is added around it."""

import pytest
import torch
import torchmetrics
from helpers import conv_net, differences, foreign_loader, linear_net, own_loader
from helpers import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.nn import functional as F

from nbdev_trainer.data.batch import Batch
from nbdev_trainer.loop.callback import Callback
from nbdev_trainer.loop.events import Event
from nbdev_trainer.loop.optimizers import FusedAdamW
from nbdev_trainer.loop.schedules import linear, one_cycle
from nbdev_trainer.loop.steps import SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.metrics.classification import Accuracy

MODELS = {"convolution": conv_net, "linear": linear_net}
LOADERS = {"own loader": own_loader, "foreign loader": foreign_loader}


def fused(params):
    return optim.AdamW(params, lr=0.01, fused=True)


OPTIMIZERS = {  # of the trainer, of the plain loop
    "SGD": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9),) * 2,
    "Adam": (lambda p: optim.Adam(p, lr=0.01),) * 2,
    "fused AdamW": (fused, fused),
    "our FusedAdamW": (lambda p: FusedAdamW(p, lr=0.01), fused),
}


def plain_fit(model, optimizer, loader, epochs=2, schedule=None, n_steps=None, clip_norm=None, accumulate=1):
    """The loop that a PyTorch user writes by hand."""
    lrs, k = [group["lr"] for group in optimizer.param_groups], 0
    model.train()
    for epoch in range(epochs):
        batches = list(loader.batches(epoch)) if hasattr(loader, "batches") else loader
        for i, batch in enumerate(batches):
            inputs, targets = (batch.inputs, batch.targets) if isinstance(batch, Batch) else batch
            loss = F.cross_entropy(model(inputs), targets)
            (loss / accumulate if accumulate > 1 else loss).backward()
            if (i + 1) % accumulate:
                continue
            if schedule:
                for group, lr in zip(optimizer.param_groups, lrs):
                    group["lr"] = lr * schedule(k / (n_steps - 1))
            if clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            k += 1


def both(
    make_model=conv_net, make_loader=own_loader, optimizer="SGD", valid=None, fit=None, plain=None, **options
):
    """The state of the model after our fit, and after the plain loop."""
    ours, by_hand = OPTIMIZERS[optimizer]
    states = []
    for make_optimizer in ours, by_hand:
        model, loader = make_model(), make_loader()
        optimizer = make_optimizer(model.parameters())
        torch.manual_seed(7)
        if len(states) == 0:
            step = SupervisedStep(nn.CrossEntropyLoss())
            Trainer(model, step, optimizer, **options).fit(loader, valid, n=2, **fit or {})
        else:
            plain_fit(model, optimizer, loader, **plain or {})
        states.append({**model.state_dict(), "next draw": torch.rand(3)})
    return states


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_fit_gives_the_weights_of_the_plain_loop(model, optimizer, loader):
    assert differences(*both(MODELS[model], LOADERS[loader], optimizer)) == []


def test_the_comparison_sees_another_order():
    ours, plain = both(make_loader=foreign_loader)
    assert differences(ours, both(fit={"limit_batches": 4})[0]) and not differences(ours, plain)


def mean_confidence(predictions, targets):
    return predictions.softmax(1).amax(1)


def worst_score(predictions, targets):
    return predictions.min()


NOTHING = type("Nothing", (Callback,), {event: lambda self, trainer: trainer.state for event in Event})
EXTRAS = {
    "validation": {"valid": True},
    "validation with a foreign loader": {"valid": "foreign"},
    "validation in the midst of an epoch": {"valid": "foreign", "fit": {"validate_every": "2ba"}},
    "metrics": {"metrics": [Accuracy(), mean_confidence, worst_score]},
    "torchmetrics": {"metrics": [torchmetrics.F1Score("multiclass", num_classes=3)], "valid": True},
    "callbacks": {"callbacks": [NOTHING(), NOTHING()], "valid": True},
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_nothing_that_is_added_changes_the_weights(extra, loader):
    options = dict(EXTRAS[extra])
    valid = options.pop("valid", None)
    options["valid"] = valid and (foreign_loader(11) if valid == "foreign" else own_loader(11))
    assert differences(*both(make_loader=LOADERS[loader], optimizer="our FusedAdamW", **options)) == []


@pytest.mark.parametrize("schedule", [linear(1.0, 0.0), linear(0.1, 1.0), one_cycle()], ids=repr)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_schedule_sets_the_learning_rate_of_each_step_from_first_to_last(optimizer, schedule):
    plain = {"schedule": schedule, "n_steps": 10}
    assert differences(*both(optimizer=optimizer, fit={"schedule": schedule}, plain=plain)) == []


@pytest.mark.parametrize("clip_norm", [0.1, 1e6])
def test_clipping_is_that_of_torch(clip_norm):
    assert differences(*both(clip_norm=clip_norm, plain={"clip_norm": clip_norm})) == []


@pytest.mark.parametrize("accumulate", [2, 3])
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulation_of_equal_batches_is_the_loss_over_their_number(optimizer, loader, accumulate):
    ours = both(
        make_loader=lambda: LOADERS[loader](48),
        optimizer=optimizer,
        accumulate=accumulate,
        clip_norm=1.0,
        plain={"accumulate": accumulate, "clip_norm": 1.0},
    )
    assert differences(*ours) == []


def test_accumulation_schedule_and_clipping_together():
    schedule = linear(1.0, 0.0)
    plain = dict(accumulate=3, clip_norm=0.5, schedule=schedule, n_steps=4)
    states = both(
        make_loader=lambda: own_loader(48),
        optimizer="our FusedAdamW",
        accumulate=3,
        clip_norm=0.5,
        fit={"schedule": schedule},
        plain=plain,
    )
    assert differences(*states) == []


# ---- any split of a batch into micro-batches: the gradient of the whole batch, in double precision
N = 12


def classes(ignored=()):
    targets = torch.randint(3, (N,), generator=torch.Generator().manual_seed(5))
    targets[list(ignored)] = -100
    return targets


def tokens():
    targets = torch.randint(3, (N, 4), generator=torch.Generator().manual_seed(6))
    targets[torch.rand(N, 4, generator=torch.Generator().manual_seed(7)) < 0.6] = -100
    return targets


def as_tokens(model, inputs):
    return model(inputs).unsqueeze(2) * torch.arange(1.0, 5.0, dtype=torch.float64)


CLASS_WEIGHTS = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
NUMBERS = torch.linspace(-1, 1, 3 * N, dtype=torch.float64).view(N, 3)


def kept_targets(output, batch):
    return (batch.targets != -100).sum()  # stays a tensor, as on a GPU


LOSSES = {  # loss function, targets, options of the step
    "mse": (nn.MSELoss(), NUMBERS, {}),
    "each element": (nn.MSELoss(reduction="none"), NUMBERS, {}),
    "binary": (nn.BCEWithLogitsLoss(), NUMBERS.abs(), {}),
    "batch mean": (nn.KLDivLoss(reduction="batchmean"), NUMBERS.softmax(1), {}),
    "classes": (nn.CrossEntropyLoss(), classes(), {}),
    "functional": (F.cross_entropy, classes([0, 1, 5]), {}),
    "ignored": (nn.CrossEntropyLoss(), classes([0, 1, 2, 3, 7, 11]), {}),
    "ignored, counted by the user": (
        nn.CrossEntropyLoss(),
        classes([0, 1, 2, 7, 11]),
        {"count": kept_targets},
    ),
    "class weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), classes([3, 4]), {}),
    "smoothed class weights": (
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1),
        classes([3]),
        {},
    ),
    "probabilities": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), NUMBERS.softmax(1), {}),
    "tokens": (nn.CrossEntropyLoss(), tokens(), {"forward": as_tokens}),
    "weighted tokens": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), tokens(), {"forward": as_tokens}),
}


def double_net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batches_of(sizes, targets, weights=None):
    inputs = torch.linspace(-2, 2, 5 * N, dtype=torch.float64).sin().view(N, 5)
    parts = (
        inputs.split(sizes),
        targets.split(sizes),
        (weights if weights is not None else inputs).split(sizes),
    )
    return [Batch(x, y, weights=None if weights is None else w) for x, y, w in zip(*parts)]


def gradients_of_a_fit(batches, loss_fn, accumulate, **options):
    model, found = double_net(), []
    trainer = Trainer(
        model,
        SupervisedStep(loss_fn, **options),
        optim.SGD(model.parameters(), lr=1.0),
        accumulate=accumulate,
    )
    trainer.on("before_step", lambda trainer: found.append([p.grad.clone() for p in model.parameters()]))
    trainer.fit(batches, n=1)
    assert len(found) == 1, "one window, one step"
    return found[0]


def gradients_by_hand(loss):
    model = double_net()
    loss(model).backward()
    return [p.grad for p in model.parameters()]


splits = st.sets(st.integers(1, N - 1)).map(
    lambda cuts: [b - a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), N])]
)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(sizes=splits, spare=st.integers(0, 2))
def test_any_split_into_micro_batches_gives_the_gradient_of_the_big_batch(name, sizes, spare):
    loss_fn, targets, options = LOSSES[name]
    [whole] = batches_of([N], targets)
    forward = options.get("forward", lambda model, inputs: model(inputs))
    expected = gradients_by_hand(lambda model: loss_fn(forward(model, whole.inputs), targets).mean())
    got = gradients_of_a_fit(batches_of(sizes, targets), loss_fn, len(sizes) + spare, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


SAMPLE_WEIGHTS = {
    "uneven": torch.linspace(0.1, 3, N, dtype=torch.float64),
    "some zero": torch.tensor([0, 0, 1, 2] * 3, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", SAMPLE_WEIGHTS)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(sizes=splits)
def test_any_split_of_weighted_samples_gives_the_gradient_of_the_big_batch(kind, sizes):
    weights, targets = SAMPLE_WEIGHTS[kind], classes()
    [whole] = batches_of([N], targets)

    def loss(model):
        return (
            F.cross_entropy(model(whole.inputs), targets, reduction="none") * weights
        ).sum() / weights.sum()

    got = gradients_of_a_fit(batches_of(sizes, targets, weights), nn.CrossEntropyLoss(), len(sizes))
    torch.testing.assert_close(got, gradients_by_hand(loss), rtol=0, atol=1e-12)
