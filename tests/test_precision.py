"""Precisions beside loops written out, and what they hold back when a step is left out."""

import copy

import pytest
import torch
from torch import nn

from nbdev_trainer import Accuracy, Callback, Learner, Loaders, ManualStep, StepOutput, one_cycle, weight_decay_groups
from nbdev_trainer.scale.precision import Scaled

torch.manual_seed(0)
INPUTS, TARGETS = torch.randn(48, 6), torch.randint(3, (48,))


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def learner_of(model, precision, optimizer=None, **options):
    loaders = Loaders.from_arrays(INPUTS, TARGETS, valid=(INPUTS, TARGETS), batch_size=8, seed=0)
    options = {"device": "cpu", "verbose": 0, "metrics": [Accuracy()], "default_callbacks": False} | options
    return Learner(model, loaders, nn.CrossEntropyLoss(), precision=precision, optimizer=optimizer, **options)


def sgd(model): return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batches(learner, epochs=2):
    return [(one.inputs, one.targets) for epoch in range(epochs) for one in learner.loaders.train.batches(epoch)]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("accumulate, clip_norm", [(1, None), (2, 0.5)])
def test_bf16_trains_what_a_loop_with_autocast_would(accumulate, clip_norm):
    model, by_hand = network(), network()
    learner = learner_of(model, "bf16", sgd(model), accumulate=accumulate, clip_norm=clip_norm)
    learner.fit(2)
    optimizer = sgd(by_hand)
    for number, (inputs, targets) in enumerate(batches(learner)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(by_hand(inputs), targets)
        (loss / accumulate).backward()
        if (number + 1) % accumulate: continue
        if clip_norm: nn.utils.clip_grad_norm_(by_hand.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    assert equal(model, by_hand) and model[0].weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16): expected = by_hand.eval()(INPUTS)
    assert torch.equal(learner.predict().predictions, expected.float())
    assert not equal(model, trained_in_32())


def trained_in_32():
    model = network()
    learner_of(model, "32", sgd(model)).fit(2)
    return model


@pytest.mark.parametrize("name, dtype", [("64", torch.float64), ("bf16-pure", torch.bfloat16)])
@pytest.mark.parametrize("default", [True, False])
def test_a_converted_model_trains_what_the_loop_in_this_type_would(name, dtype, default):
    model, by_hand = network(), network().to(dtype)
    learner = learner_of(model, name, None if default else sgd(model))
    learner.fit(2)
    groups = weight_decay_groups(by_hand)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True) if default else sgd(by_hand)
    for inputs, targets in batches(learner):
        optimizer.zero_grad()
        nn.functional.cross_entropy(by_hand(inputs.to(dtype)), targets).backward()
        optimizer.step()
    assert equal(model, by_hand) and model[0].weight.dtype == dtype
    host = torch.promote_types(dtype, torch.float32)  # numpy has no bfloat16
    assert learner.predict().predictions.numpy().dtype == torch.empty(0, dtype=host).numpy().dtype
    assert learner.validate()["accuracy"] > 0.3


class Steps(Callback):
    def __init__(self): self.seen = []

    def after_step(self, trainer): self.seen.append(trainer.state.batch)


@pytest.mark.parametrize("optimizer", [sgd, None], ids=["sgd", "default"])
def test_fp16_leaves_out_a_step_that_overflows_and_nothing_counts_it(optimizer):
    model, steps = network(), Steps()
    learner = learner_of(model, Scaled(torch.device("cpu"), start=2.0**24), None if optimizer is None else sgd(model),
                         callbacks=[steps], clip_norm=1.0)
    learner.fit(3, schedule=one_cycle())
    left_out = 18 - learner.trainer.state.step
    assert 0 < left_out < 17 and len(steps.seen) == learner.trainer.state.step  # the scale falls until it fits
    assert 0 < steps.seen[0] <= left_out and all(one.isfinite().all() for one in model.parameters())


def test_fp16_trains_what_a_loop_with_torchs_scaler_would():
    model, by_hand = network(), network()
    learner = learner_of(model, "fp16", sgd(model), clip_norm=0.5)
    learner.fit(2)
    optimizer, scaler = sgd(by_hand), torch.amp.GradScaler("cpu")
    for inputs, targets in batches(learner):
        with torch.autocast("cpu", torch.float16): loss = nn.functional.cross_entropy(by_hand(inputs), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert equal(model, by_hand)


@pytest.mark.parametrize("name", ["bf16", "fp16", "bf16-pure", "64"])
@pytest.mark.parametrize("stop", [1, 5, 6, 11])
def test_each_precision_goes_on_at_any_batch(name, stop):
    saved = []

    class Save(Callback):
        def after_batch(self, trainer):
            if trainer.state.batch == stop: saved.append(copy.deepcopy(trainer.state_dict()))

    def made(): return learner_of(model := network(), name, sgd(model), accumulate=2)
    whole = made()
    whole.trainer.callbacks.append(Save())
    whole.fit(2)
    again = made()
    again.trainer.load_state_dict(saved[0])
    again.fit(2, resume=True)
    assert equal(again.model, whole.model)


def test_each_of_several_optimizers_has_a_scale_of_its_own():
    class Both(ManualStep):
        def train(self, trainer, batch):
            for name, part in trainer.model.items():
                huge = 1e8 if name == "second" and trainer.state.batch < 3 else 1.0
                trainer.optimize(part(batch.inputs).square().mean() * huge, name)
            return StepOutput()
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(6, 1), "second": nn.Linear(6, 1)})
    optimizers = {name: torch.optim.SGD(part.parameters(), lr=1e-3) for name, part in model.items()}
    precision = Scaled(torch.device("cpu"), start=2.0**8)
    loaders = Loaders.from_arrays(INPUTS, TARGETS, batch_size=8, valid=None, seed=0)
    Learner(model, loaders, step=Both(), optimizer=optimizers, precision=precision, device="cpu", verbose=0).fit(1)
    first, second = (precision.scaler_of(one).get_scale() for one in optimizers.values())
    assert first == 2.0**8 and second < first


@pytest.mark.parametrize("stop", range(1, 6))
def test_the_scales_of_several_optimizers_go_on_by_their_names(stop):
    class Alternating(ManualStep):
        """The second is used in every other batch only, so after a stop the first comes first."""

        def train(self, trainer, batch):
            for name, part in trainer.model.items():
                if name == "second" and trainer.state.batch % 2 == 0: continue
                huge = 1e8 if name == "second" and trainer.state.batch < 2 else 1.0
                trainer.optimize(part(batch.inputs).square().mean() * huge, name)
            return StepOutput()

    def made(precision):
        torch.manual_seed(0)
        model = nn.ModuleDict({"second": nn.Linear(6, 1), "first": nn.Linear(6, 1)})
        optimizers = {name: torch.optim.SGD(part.parameters(), lr=1e-3) for name, part in model.items()}
        loaders = Loaders.from_arrays(INPUTS, TARGETS, batch_size=8, valid=None, seed=0)
        return Learner(model, loaders, step=Alternating(), optimizer=optimizers, precision=precision, device="cpu", verbose=0)
    scales = [Scaled(torch.device("cpu"), start=2.0**8) for _ in range(3)]
    whole, first, again = map(made, scales)
    whole.fit("6ba")
    first.fit(f"{stop}ba")
    again.trainer.load_state_dict(first.trainer.state_dict())
    if stop < 6: again.fit(f"{6 - stop}ba")
    assert equal(again.model, whole.model) and str(scales[2].state_dict()) == str(scales[0].state_dict())


def test_what_the_device_cannot_do_is_told_before_anything_else():
    with pytest.raises(ValueError, match="the device 'cpu' cannot compute in tf32"): learner_of(network(), "tf32")
    with pytest.raises(ValueError, match="Did you mean 'bf16'"): learner_of(network(), "bff16")
    saved = learner_of(model := network(), "fp16", sgd(model))
    saved.fit("1ba")
    other = learner_of(model := network(), "32", sgd(model))
    with pytest.raises(ValueError, match="the saved run scaled its losses, and Precision here does not"):
        other.trainer.load_state_dict(saved.trainer.state_dict())
