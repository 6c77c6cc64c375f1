"""Freezing, groups and rates: beside loops written out, and as they were after whatever happens."""

import copy

import pytest
import torch
from torch import nn

from nbdev_trainer import Callback, Learner, Loaders, ManualStep, StepOutput, one_cycle
from nbdev_trainer.loop.groups import frozen_norms

torch.manual_seed(0)
INPUTS, TARGETS = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 1, dtype=torch.float64)


def network():
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    return nn.Sequential(body, nn.Linear(8, 8), nn.Linear(8, 1)).double()


def learner_of(model, optimizer=None, **options):
    loaders = Loaders.from_arrays(INPUTS, TARGETS, valid=None, batch_size=8, seed=0)
    return Learner(model, loaders, nn.MSELoss(), optimizer=optimizer, device="cpu", verbose=0, **options)


def batches(learner, epoch):
    return [(batch.inputs, batch.targets) for batch in learner.loaders.train.batches(epoch)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_freezing_trains_what_a_loop_with_frozen_parameters_and_norms_would():
    model, by_hand = network(), network()
    learner = learner_of(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    learner.freeze(except_last=1)
    learner.fit(2)

    optimizer = torch.optim.Adam(by_hand[2].parameters(), lr=1e-2)
    by_hand[:2].eval()
    for one in by_hand[:2].parameters(): one.requires_grad_(False)
    for epoch in range(2):
        for inputs, targets in batches(learner, epoch):
            optimizer.zero_grad()
            nn.functional.mse_loss(by_hand(inputs), targets).backward()
            optimizer.step()
    assert same(model, by_hand)
    assert torch.equal(model[0][1].running_mean, network()[0][1].running_mean)  # nothing moved


def test_a_frozen_batch_norm_that_trains_is_another_matter():
    model = network()
    learner = learner_of(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    learner.freeze("0.0")  # the layer before it; the norm itself goes on
    learner.fit(1)
    assert not torch.equal(model[0][1].running_mean, network()[0][1].running_mean)
    assert frozen_norms(model) == []


def test_unfreezing_keeps_the_state_of_the_optimizer():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    learner = learner_of(model, optimizer)
    learner.fit(1)
    kept = copy.deepcopy(optimizer.state[model[0][0].weight])
    learner.freeze("0")
    learner.fit(1)
    assert all(torch.equal(one, kept[name]) for name, one in optimizer.state[model[0][0].weight].items())
    weight = model[0][0].weight.detach().clone()
    learner.unfreeze()
    learner.fit("1ba")
    assert optimizer.state[model[0][0].weight]["step"] == kept["step"] + 1
    assert not torch.equal(weight, model[0][0].weight)


@pytest.mark.parametrize("make", [torch.optim.Adam, None], ids=["torch", "default"])
def test_what_was_frozen_before_the_learner_was_made_trains_once_it_is_unfrozen(make):
    model = network()
    model[0].requires_grad_(False)
    learner = learner_of(model, make, lr=1e-2)
    learner.fit(1)
    weight = model[0][0].weight.detach().clone()
    changed = learner.unfreeze("0")
    assert changed.names == [f"0.{name}" for name, _ in model[0].named_parameters()]
    learner.fit("2ba")
    assert not torch.equal(weight, model[0][0].weight)


def test_an_unfreezing_that_changes_nothing_leaves_the_optimizer_alone():
    model = network()
    optimizer = torch.optim.Adam(model[2].parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="nothing changes"): learner_of(model, optimizer).unfreeze()
    assert len(optimizer.param_groups[0]["params"]) == 2


def rates_of(learner):
    """Each rate once: the default optimizer has two groups, with and without weight decay."""
    slots = learner.trainer.engine.slots.values()
    return list(dict.fromkeys(group["lr"] for slot in slots for group in slot.optimizer.param_groups))


@pytest.mark.parametrize("lr, rates", [
    ((1e-4, 1e-2), {"0": 1e-4, "1": 1e-3, "2": 1e-2}), ([1e-4, 1e-3, 1e-2], {"0": 1e-4, "1": 1e-3, "2": 1e-2}),
    ({"2": 1e-2, "*": 1e-4}, {"0": 1e-4, "1": 1e-4, "2": 1e-2}),
    ({nn.BatchNorm1d: 1e-3, "0.*": 1e-4, "*": 1e-2}, {"0.0": 1e-4, "0.1": 1e-3, "1": 1e-2, "2": 1e-2})], ids=str)
@pytest.mark.parametrize("default", [True, False])
def test_rates_for_parts_train_what_an_optimizer_with_these_groups_would(lr, rates, default):
    model, by_hand = network(), network()
    learner = learner_of(model, None if default else torch.optim.AdamW(model.parameters(), lr=1.0))
    learner.fit(2, lr=lr, schedule=one_cycle())
    assert rates_of(learner) == [1e-3 if default else 1.0]  # as before

    groups = [{"params": [p for p in by_hand.get_submodule(name).parameters() if (p.ndim > 1) == decayed], "rate": rate,
               "weight_decay": 0.01 if decayed or not default else 0.0}
              for name, rate in rates.items() for decayed in (True, False)]
    optimizer, cycle = torch.optim.AdamW([group for group in groups if group["params"]]), one_cycle()
    for step, (inputs, targets) in enumerate(batches(learner, 0) + batches(learner, 1)):
        for group in optimizer.param_groups: group["lr"] = group["rate"] * cycle(step / 9)
        optimizer.zero_grad()
        nn.functional.mse_loss(by_hand(inputs), targets).backward()
        optimizer.step()
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_groups_are_as_before_when_a_fit_fails():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    learner, groups = learner_of(model, optimizer), optimizer.param_groups

    def fail(trainer): raise RuntimeError("on purpose")
    learner.on("after_batch", fail)
    with pytest.raises(RuntimeError, match="on purpose"): learner.fit(1, lr=(1e-4, 1e-2))
    assert optimizer.param_groups is groups and rates_of(learner) == [0.5] and len(groups[0]["params"]) == 8
    with pytest.raises(ValueError, match="4 parameters are in no group"): learner.fit(1, lr={"0": 0.1})
    assert optimizer.param_groups is groups and rates_of(learner) == [0.5]


def test_a_fine_tuning_that_fails_leaves_trained_what_was_trained_and_frozen_what_was_frozen():
    model = network()
    model[0][1].requires_grad_(False)
    learner = learner_of(model)

    def fail(trainer): raise KeyboardInterrupt
    learner.on("after_batch", fail)
    with pytest.raises(KeyboardInterrupt): learner.fine_tune(2, lr=1e-2)
    assert [name for name, one in model.named_parameters() if not one.requires_grad] == ["0.1.weight", "0.1.bias"]
    assert all(one.training for one in model.modules())


def test_unfreezing_in_the_middle_of_a_fit_takes_effect_at_once():
    model = network()
    learner, seen = learner_of(model), []
    learner.freeze("0")

    def gradually(trainer):
        seen.append(model[0][1].training)
        if trainer.state.epoch == 1: learner.unfreeze("0")
    learner.on("after_epoch", gradually)
    before = model[0][0].weight.detach().clone()
    learner.fit(2)
    assert seen == [False, True] and not torch.equal(model[0][0].weight, before)


@pytest.mark.parametrize("stop", range(1, 10))
def test_a_fit_with_rates_for_parts_goes_on_at_any_batch(stop):
    def fit(learner, resume=False): learner.fit(2, lr=(1e-4, 1e-2), schedule=one_cycle(), resume=resume)
    whole = learner_of(network())
    fit(whole)
    first, saved = learner_of(network()), []

    class Save(Callback):
        def after_batch(self, trainer):
            if trainer.state.batch == stop: saved.append(trainer.state_dict())
    first.trainer.callbacks.append(Save())
    fit(first)
    again = learner_of(network())
    again.trainer.load_state_dict(saved[0])
    fit(again, resume=True)
    assert same(again.model, whole.model)


def test_several_optimizers_are_not_guessed_at():
    model = network()
    model[1].requires_grad_(False)
    optimizers = {"body": torch.optim.SGD(model[0].parameters(), lr=0.1), "head": torch.optim.SGD(model[2].parameters(), lr=0.1)}

    class Both(ManualStep):
        def train(self, trainer, batch): return StepOutput()

    loaders = Loaders.from_arrays(INPUTS, TARGETS, valid=None, batch_size=8, seed=0)
    learner = Learner(model, loaders, step=Both(), optimizer=optimizers, device="cpu", verbose=0)
    with pytest.raises(ValueError, match="2 parameters are in none of the optimizers .*'1.weight'"): learner.unfreeze("1")
    assert not model[1].weight.requires_grad
