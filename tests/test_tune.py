"""The range test and the search for a batch size: beside loops written out, and without a trace whatever happens."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nbdev_trainer import Callback, Learner, Loaders, ManualStep, Mixup, StepOutput, SupervisedStep, Trainer, digits
from nbdev_trainer.core.nested import map_tensors
from nbdev_trainer.core.seeding import rng_state
from nbdev_trainer.testing import same_state
from nbdev_trainer.use.batch_sizes import batch_size_find
from nbdev_trainer.use.tune import RULES, RangeTest, lr_find, smoothed

torch.manual_seed(0)
INPUTS = torch.randn(50, 6)
TARGETS = INPUTS @ torch.randn(6, 1) + 0.1 * torch.randn(50, 1)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))


def learner_of(model=None, **options):
    loaders = Loaders.from_arrays(INPUTS, TARGETS, valid=10, batch_size=8, seed=0)
    return Learner(model or network(), loaders, options.pop("loss_fn", nn.MSELoss()), device="cpu", verbose=0,
                   **{"lr": 1e-3, **options})


def everything(learner):
    "All state of a run, the modes, the gradients and the generators"
    state = map_tensors(torch.clone, learner.trainer.state_dict())
    state["modes"] = [module.training for module in learner.model.modules()]
    state["grads"] = [None if p.grad is None else p.grad.clone() for p in learner.model.parameters()]
    state["frozen"] = [p.requires_grad for p in learner.model.parameters()]
    state["generators"] = rng_state()
    return state


def assert_untouched(learner, before):
    after = everything(learner)
    assert {name for name in before if not same_state(before[name], after[name], ignore=("elapsed", "since"))} == set()


LOOKS = {"lr_find": lambda learner: learner.lr_find(steps=40),
         "batch_size_find": lambda learner: learner.batch_size_find(limit=32)}


@pytest.mark.parametrize("epochs", [0, 1], ids=["new", "trained"])
@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"precision": "bf16"}, {"clip_norm": 0.1}, {"seed": 4}],
                         ids=str)
@pytest.mark.parametrize("look", LOOKS)
def test_everything_is_equal_afterwards(look, options, epochs):
    learner = learner_of(**options)
    if epochs: learner.fit(epochs)
    before = everything(learner)
    LOOKS[look](learner)
    assert_untouched(learner, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("look", LOOKS)
def test_everything_is_equal_after_an_error_in_the_middle(look, error):
    class Fails(nn.MSELoss):
        calls = None
        def forward(self, predictions, targets):
            if self.calls is not None: self.calls += 1
            if self.calls == 7: raise error("stop here")
            return super().forward(predictions, targets)
    loss_fn = Fails()
    learner = learner_of(loss_fn=loss_fn)
    learner.fit(1)
    before = everything(learner)
    loss_fn.calls = 0
    with pytest.raises(error, match="stop here"): LOOKS[look](learner)
    loss_fn.calls = None
    assert_untouched(learner, before)


@pytest.mark.parametrize("look", LOOKS)
def test_a_fit_after_a_look_is_the_fit_without_it(look):
    plain, looked = learner_of(seed=0), learner_of(seed=0)
    for learner in (plain, looked):
        learner.fit(1)  # seeds the generators, from which the dropout draws
        if learner is looked: LOOKS[look](looked)
        learner.fit_one_cycle(2, lr=1e-2)
    assert same_state(dict(plain.model.state_dict()), dict(looked.model.state_dict()))
    assert plain.history["train_loss"] == looked.history["train_loss"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_curve_is_that_of_a_loop_written_out(accumulate):
    model = nn.Linear(6, 1).double()
    by_hand = copy.deepcopy(model)
    data = [(INPUTS[i:i + 10].double(), TARGETS[i:i + 10].double()) for i in range(0, 50, 10)]
    trainer = Trainer(model, SupervisedStep(nn.MSELoss()), torch.optim.SGD(model.parameters(), lr=1), accumulate=accumulate)
    test = lr_find(trainer, data, start=1e-4, end=1e-1, steps=25, tests=1)

    optimizer, number, losses = torch.optim.SGD(by_hand.parameters(), lr=1), 0, []
    for k in range(25):
        optimizer.param_groups[0]["lr"] = 1e-4 * 1000 ** (k / 24)
        optimizer.zero_grad()
        window = []
        for _ in range(accumulate):
            inputs, targets = data[number % 5]
            number += 1
            window.append(F.mse_loss(by_hand(inputs), targets))
        (sum(window) / accumulate).backward()
        losses.append((sum(window) / accumulate).item())
        optimizer.step()
    assert test.losses == pytest.approx(losses, rel=1e-9)
    assert test.lrs == pytest.approx([1e-4 * 1000 ** (k / 24) for k in range(25)])


def test_groups_keep_their_proportions():
    model, seen = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)), []
    groups = [{"params": model[0].parameters(), "lr": 1e-4}, {"params": model[1].parameters(), "lr": 1e-2}]

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)
    learner = learner_of(model, optimizer=Watching(groups), lr=None)
    test = learner.lr_find(steps=20, tests=1)
    tried = len(test.lrs)  # and one more, if that one diverged
    assert 10 <= tried <= len(seen) <= tried + 1
    assert [high for _, high in seen[:tried]] == pytest.approx(test.lrs)
    assert [low for low, _ in seen[:tried]] == pytest.approx([lr / 100 for lr in test.lrs])
    assert [group["lr"] for group in learner.trainer.engine.slots["main"].optimizer.param_groups] == [1e-4, 1e-2]


def test_a_rate_in_a_tensor_is_put_back():
    model = network()
    rate = torch.tensor(3e-3)
    learner = learner_of(model, optimizer=torch.optim.Adam(model.parameters(), lr=rate, foreach=False), lr=None)
    learner.lr_find(steps=20)
    group = learner.trainer.engine.slots["main"].optimizer.param_groups[0]
    assert group["lr"] is rate and rate.item() == pytest.approx(3e-3)


def test_frozen_parts_stay_frozen_during_the_test():
    model = network()
    learner = learner_of(model)
    learner.freeze("0", "1")
    before = everything(learner)
    moved = []
    model[4].register_forward_pre_hook(lambda *_: moved.append(model[1].running_mean.clone()))
    learner.lr_find(steps=20)
    assert all(one.eq(0).all() for one in moved) and len(moved) >= 10
    assert_untouched(learner, before)


def test_callbacks_do_not_act():
    class Counts(Callback):
        calls = 0
        def before_batch(self, trainer): self.calls += 1
    counts, mixing = Counts(), Mixup()
    learner = learner_of(callbacks=[counts, mixing])
    learner.lr_find(steps=20)
    learner.batch_size_find(limit=16)
    assert counts.calls == 0 and mixing.seed is None


def test_a_foreign_shuffling_loader_gives_the_epoch_it_would_have_given():
    generator = torch.Generator().manual_seed(3)
    def loader(): return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=8, shuffle=True, generator=generator)
    first = torch.cat([inputs for inputs, _ in loader()])
    generator.manual_seed(3)
    model, same_loader = network(), loader()
    learner = Learner(model, (same_loader, None), nn.MSELoss(), device="cpu", verbose=0)
    learner.lr_find(steps=20)
    learner.batch_size_find(limit=64)
    assert torch.equal(torch.cat([inputs for inputs, _ in same_loader]), first)


def test_it_stops_when_the_loss_is_no_number_or_far_too_high():
    model = nn.Linear(6, 1)
    trainer = Trainer(model, SupervisedStep(nn.MSELoss()), torch.optim.SGD(model.parameters(), lr=1))
    test = lr_find(trainer, [(INPUTS, TARGETS)], steps=100)
    assert test.ending.startswith("diverged at lr") and len(test.losses) < 100
    assert all(map(math.isfinite, test.losses))


def test_losses_below_zero_are_no_divergence():
    model = nn.Linear(6, 1)
    def loss_fn(predictions, targets): return F.mse_loss(predictions, targets) - 50
    trainer = Trainer(model, SupervisedStep(loss_fn), torch.optim.Adam(model.parameters(), lr=1))
    test = lr_find(trainer, [(INPUTS, TARGETS)], end=1.0, steps=80)
    assert test.ending == "reached the end" and 0.001 < test.suggestion < 1


def test_rules_do_not_depend_on_the_scale_or_the_level_of_the_loss():
    learner = learner_of(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1)))
    test = learner.lr_find()
    for scale, level in ((1000.0, 0.0), (1e-3, 0.0)):
        other = RangeTest(test.lrs, [scale * loss + level for loss in test.losses], test.ending)
        assert other.suggestions == pytest.approx(test.suggestions, rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_gives_a_rate_of_the_curve_also_for_odd_curves(rule):
    lrs = [10 ** (k / 10 - 6) for k in range(70)]
    for losses in ([1.0] * 70, list(range(70)), list(range(70, 0, -1)), [abs(k - 35) for k in range(70)]):
        found = RULES[rule](lrs, smoothed([float(loss) for loss in losses], 0.9))
        assert lrs[0] / 10 <= found <= lrs[-1]


def test_a_loss_that_never_falls_suggests_nothing():
    model = network()
    def noise(predictions, targets): return 0 * predictions.mean() + torch.rand(())
    learner = learner_of(model, loss_fn=noise)
    torch.manual_seed(0)
    test = learner.lr_find()
    assert len(test.losses) == 200 and "none" in repr(test)
    with pytest.raises(ValueError, match="never fell clearly"): test.suggestion  # noqa: B018


@pytest.mark.parametrize("seed", range(5))
def test_on_digits_the_suggestion_is_within_a_factor_of_three_of_the_best_of_a_grid(seed):
    torch.manual_seed(seed)
    loaders = Loaders.from_arrays(*digits(), valid=0.2, batch_size=64, seed=seed)
    model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10))
    learner = Learner(model, loaders, nn.CrossEntropyLoss(), lr=1e-3, device="cpu", verbose=0)
    before = everything(learner)
    suggestion = learner.lr_find().suggestion
    assert_untouched(learner, before)
    # by benchmarks/lr_find.py the best rate of the grid is BEST, on average over the seeds
    assert BEST / 3 < suggestion < BEST * 3


BEST = 0.0178


def test_training_at_the_suggestion_is_nearly_as_good_as_at_the_best_of_a_grid():
    images, labels = digits()
    def learner():
        torch.manual_seed(0)
        loaders = Loaders.from_arrays(images, labels, valid=0.2, batch_size=64, seed=0)
        model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10))
        return Learner(model, loaders, nn.CrossEntropyLoss(), lr=1e-3, device="cpu", verbose=0)
    def score(lr):
        one = learner()
        one.fit_one_cycle(4, lr=lr, validate_every=None)
        return one.validate()["loss"]
    grid = {lr: score(lr) for lr in (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 1.0)}
    assert score(learner().lr_find().suggestion) < 1.25 * min(grid.values()) < 0.3 * grid[1e-4]


def test_several_optimizers_are_refused_with_a_way_out():
    class ByHand(ManualStep):
        def train(self, trainer, batch): return StepOutput()
    model = nn.ModuleDict({"a": nn.Linear(6, 1), "b": nn.Linear(6, 1)})
    optimizers = {name: torch.optim.SGD(one.parameters(), lr=0.1) for name, one in model.items()}
    trainer = Trainer(model, ByHand(), optimizers)
    with pytest.raises(TypeError, match=r"ByHand optimizes by itself \(a, b\)"): lr_find(trainer, [(INPUTS, TARGETS)])


def test_neither_can_be_asked_for_during_a_fit():
    learner = learner_of()
    learner.on("after_batch", lambda trainer: learner.lr_find(steps=20))
    with pytest.raises(RuntimeError, match="during a fit"): learner.fit(1)


class Room(nn.Module):
    "Has room for so many samples"
    def __init__(self, room, error=torch.OutOfMemoryError):
        super().__init__()
        self.inner, self.room, self.error, self.seen = nn.Linear(6, 1), room, error, []

    def forward(self, inputs):
        if len(inputs) > self.room: raise self.error(f"not enough memory for {len(inputs)}")
        self.seen.append(len(inputs))
        return self.inner(inputs)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
@pytest.mark.parametrize("ours", [True, False], ids=["our loader", "a list"])
def test_the_largest_batch_that_fits_is_found(ours, error):
    model = Room(20, error)
    learner = learner_of(model)
    if not ours: learner.loaders = Loaders([(INPUTS[:6], TARGETS[:6]), (INPUTS[6:9], TARGETS[6:9])])
    before = everything(learner)
    found = learner.batch_size_find(start=4, limit=1000)
    assert list(found.seconds) == [4, 8, 16] and found.largest == 16
    assert found.ending == "32 samples do not fit into memory"
    assert set(model.seen) == set()  # what the model noted is put back too
    assert_untouched(learner, before)


def test_memory_that_runs_out_in_the_backward_pass_or_in_the_optimizer_counts_too():
    for event in ("backward", "step"):
        model = nn.Linear(6, 1)

        class Optimizer(torch.optim.SGD):
            def step(self, closure=None):
                if event == "step" and sizes[-1] > 8: raise torch.OutOfMemoryError("in the step")
                return super().step(closure)
        sizes = []
        model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
        def no_room(gradient):
            if event == "backward" and sizes[-1] > 8: raise torch.OutOfMemoryError("in the backward pass")
        model.weight.register_hook(no_room)
        trainer = Trainer(model, SupervisedStep(nn.MSELoss()), Optimizer(model.parameters(), lr=0.1))
        found = batch_size_find(trainer, [(INPUTS, TARGETS)], start=2, limit=64)
        assert (found.largest, found.ending) == (8, "16 samples do not fit into memory")
        assert all(p.grad is None for p in model.parameters())


def test_other_errors_are_raised_as_they_are():
    learner = learner_of(Room(20, KeyError))
    before = everything(learner)
    with pytest.raises(KeyError): learner.batch_size_find(limit=100)
    assert_untouched(learner, before)


def test_batches_of_lists_and_dicts_are_joined_too():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
        def forward(self, inputs): return torch.stack([one.sum() for one in inputs["a"]])[:, None] * self.scale
    data = [({"a": [torch.ones(2), torch.ones(3)], "b": torch.zeros(2)}, torch.zeros(2, 1))]
    model = Sums()
    trainer = Trainer(model, SupervisedStep(nn.MSELoss()), torch.optim.SGD(model.parameters(), lr=0.1))
    assert list(batch_size_find(trainer, data, start=2, limit=16).seconds) == [2, 4, 8, 16]
