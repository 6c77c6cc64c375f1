"""Techniques of training where they meet what is unusual: faults, resuming, several optimizers, odd batches."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from nbdev_trainer.callbacks.averaging import EMA, SWA
from nbdev_trainer.callbacks.rates import TorchScheduler
from nbdev_trainer.callbacks.stopping import EarlyStopping
from nbdev_trainer.learner import Learner
from nbdev_trainer.loop.callback import Callback
from nbdev_trainer.loop.repeated import SAM
from nbdev_trainer.loop.schedules import cosine
from nbdev_trainer.loop.steps import SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.testing import (
    StateAt,
    assert_same_weights,
    check_callback,
    tiny_loaders,
    tiny_model,
    tiny_trainer,
)


def regression(n_batches=3, size=6):
    torch.manual_seed(1)
    return [(torch.randn(size, 4), torch.randn(size, 2)) for _ in range(n_batches)]


def trainer_for(model, loss_fn=None, optimizer=torch.optim.SGD, **options):
    made = optimizer(model.parameters(), lr=0.1)
    return Trainer(model, SupervisedStep(loss_fn or nn.MSELoss()), made, **options)


@pytest.mark.parametrize("make", [
    lambda params: torch.optim.LBFGS(params, lr=0.5, max_iter=4),
    lambda params: torch.optim.LBFGS(params, max_iter=4, line_search_fn="strong_wolfe"),
    lambda params: SAM(torch.optim.SGD(params, lr=0.1, momentum=0.9)),
    lambda params: SAM(torch.optim.AdamW(params, lr=0.01), rho=1.0, adaptive=True),
])
def test_resuming_with_an_optimizer_that_asks_again_gives_the_same_weights(make):
    def run(kept=None, at=0):
        model, keeper, loaders = tiny_model(), StateAt(at), tiny_loaders()
        trainer = Trainer(model, SupervisedStep(nn.CrossEntropyLoss()), make(model.parameters()), callbacks=[keeper])
        if kept is not None:
            trainer.load_state_dict(kept)
        torch.manual_seed(3)
        trainer.fit(loaders.train, loaders.valid, n=2, schedule=cosine(), resume=True)
        return model, keeper.state

    whole, _ = run()
    for batch in (1, 6, 8):
        assert_same_weights(whole, run(run(at=batch)[1])[0])


@pytest.mark.parametrize("make", [torch.optim.LBFGS, lambda params, lr: SAM(torch.optim.SGD(params, lr=lr))])
def test_check_and_overfit_work_with_optimizers_that_ask_again_and_change_nothing(make):
    learner = Learner(tiny_model(), tiny_loaders(), nn.CrossEntropyLoss(), optimizer=make, lr=0.1, verbose=0,
                      device="cpu")
    learner.check()
    learner.overfit(1, steps=20)
    assert_same_weights(learner.model, tiny_model())


def test_micro_batches_of_lists_of_ragged_tensors_give_the_gradient_of_the_batch():
    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, texts):
            return torch.stack([self.linear(one.mean(0)) for one in texts])

    torch.manual_seed(0)
    data = [([torch.randn(n, 2) for n in (1, 3, 2, 5, 4)], torch.randn(5, 1)) for _ in range(2)]
    models = []
    for size in (None, 2, "auto"):
        torch.manual_seed(0)
        model = Means()
        trainer_for(model, micro_batch_size=size).fit(data, n=2)
        models.append(model)
    for model in models[1:]:
        assert_same_weights(models[0], model, tolerance=1e-6)


@pytest.mark.parametrize("weight", [None, [0.01, 0.02, 0.03]])
def test_a_part_without_anything_that_counts_changes_neither_loss_nor_gradient(weight):
    loss_fn = nn.CrossEntropyLoss(None if weight is None else torch.tensor(weight))
    torch.manual_seed(0)
    data, found = [(torch.randn(6, 4), torch.tensor([-100, -100, 1, 2, 0, 2]))], []
    for size in (None, 2):
        torch.manual_seed(0)
        model, losses = nn.Linear(4, 3), []
        trainer = trainer_for(model, loss_fn, micro_batch_size=size)
        trainer.on("after_batch", lambda trainer, losses=losses: losses.append(trainer.state.output.loss.item()))
        trainer.fit(data, n=1)
        found.append((model, losses[0]))
    assert_same_weights(found[0][0], found[1][0], tolerance=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


def test_a_parameter_that_only_a_later_batch_of_a_window_uses_keeps_its_gradient_in_parts():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

        def forward(self, inputs):
            return self.parts[int(inputs[0, 0] > 100)](inputs)

    (first, targets), (second, others) = regression(2)
    second[:, 0] = 101.0
    models = []
    for size in (None, 4):
        torch.manual_seed(0)
        model = Branches()
        trainer_for(model, accumulate=2, micro_batch_size=size, clip_norm=1.0).fit(
            [(first, targets), (second, others)], n=1)
        models.append(model)
    assert_same_weights(*models, tolerance=1e-6)


def test_a_batch_that_is_passed_over_in_its_second_part_does_not_move_the_weights():
    class PassOver(Callback):
        def after_loss(self, trainer):
            if trainer.engine.rows.start: trainer.skip_batch("on purpose")

    model = nn.Linear(4, 2)
    before = [p.detach().clone() for p in model.parameters()]
    trainer_for(model, micro_batch_size=4, callbacks=[PassOver()]).fit(regression(), n=1)
    assert all(torch.equal(p, one) for p, one in zip(model.parameters(), before))


def test_memory_that_runs_out_leaves_batch_norms_and_dropout_as_if_parts_had_been_small_from_the_start():
    class Small(nn.Linear):
        def forward(self, inputs):
            if self.training and len(inputs) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(inputs)

    models = []
    for size in ("auto", 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), Small(4, 2))
        trainer = trainer_for(model, micro_batch_size=size)
        trainer.shown = False
        torch.manual_seed(2)
        trainer.fit(regression(), n=2)
        models.append(model)
    assert_same_weights(*models)


def test_the_size_of_parts_that_was_found_is_saved_with_the_run():
    trainer = trainer_for(nn.Linear(4, 2), micro_batch_size="auto")
    trainer.engine.largest = 3
    other = trainer_for(nn.Linear(4, 2), micro_batch_size="auto")
    other.load_state_dict(trainer.state_dict())
    assert other.engine.largest == 3


def test_going_back_to_the_best_weights_also_goes_back_to_before_the_mean_began():
    class Worse(Callback):  # the first epoch is the best, before SWA takes in anything
        runs_before = (EarlyStopping,)

        def after_evaluate(self, trainer):
            trainer.state.metrics["valid_loss"] = float(trainer.state.epoch)

    loaders, swa = tiny_loaders(), SWA(start=0.5)
    trainer = tiny_trainer([swa, Worse(), EarlyStopping(patience=None, restore_best=True), kept := StateAt(6)])
    trainer.shown = False
    trainer.fit(loaders.train, loaders.valid, n=4)
    assert swa.evaluation_weights(trainer) is None
    best = tiny_model()
    best.load_state_dict(kept.state["model"]["state"])
    assert_same_weights(trainer.model, best)


def test_a_fit_that_went_back_to_its_best_weights_is_finished_when_it_is_resumed():
    loaders = tiny_loaders()

    def made():
        one = tiny_trainer([EMA(0.5), EarlyStopping("valid_loss", patience=1, min_delta=10.0, restore_best=True)])
        one.shown = False
        return one

    first, second = made(), made()
    first.fit(loaders.train, loaders.valid, n=5)
    second.load_state_dict(first.state_dict())
    second.fit(loaders.train, loaders.valid, n=5, resume=True)
    assert_same_weights(first.model, second.model)
    assert first.evaluate(loaders.valid) == second.evaluate(loaders.valid)


def test_averages_pass_over_masks_and_follow_norms_without_parameters():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(2, affine=False)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

        def forward(self, inputs):
            return self.norm(self.linear(inputs)) + self.mask.exp()

    model, ema = Masked(), EMA(0.9)
    trainer = trainer_for(model, callbacks=[ema])
    trainer.fit(regression(), regression(1), n=2)
    assert set(ema.averages) == {"linear.weight", "linear.bias", "norm.running_mean", "norm.running_var"}
    assert all(one.isfinite().all() for one in ema.averages.values())
    assert torch.equal(model.mask, torch.tensor([0.0, -torch.inf]))


def test_validation_between_a_loss_and_its_gradient_leaves_the_gradient_alone_with_averaged_weights():
    class LookInside(Callback):
        def after_loss(self, trainer):
            if trainer.state.phase == "train":
                trainer.evaluate(data[:1])

    data, models = regression(), []
    for callbacks in ([EMA(0.5)], [EMA(0.5), LookInside()]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        trainer_for(model, callbacks=callbacks).fit(data, n=2)
        models.append(model)
    assert_same_weights(*models)


SCHEDULERS = {
    "lambda": lambda one: lr_scheduler.LambdaLR(one, lambda n: 1 / (n + 1)),
    "restarts": lambda one: lr_scheduler.CosineAnnealingWarmRestarts(one, 3),
    "cyclic": lambda one: lr_scheduler.CyclicLR(one, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "chained": lambda one: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(one, 0.5, 4), lr_scheduler.ExponentialLR(one, 0.9)]),
    "polynomial": lambda one: lr_scheduler.PolynomialLR(one, 8),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_torch_go_on_where_they_were(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_callback(lambda: TorchScheduler(SCHEDULERS[name], every="1st"), observes=False)


MOVES_MOMENTUM = {
    "betas": lambda momentum: lambda params, lr: torch.optim.AdamW(params, lr=lr, betas=(momentum, 0.999)),
    "momentum": lambda momentum: lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=momentum)}


class Fails(Callback):
    only_watches = True

    def __init__(self, at): self.at = at

    def after_batch(self, trainer):
        if trainer.state.batch == self.at: raise ConnectionError("cut")


@pytest.mark.parametrize("by_function", [True, False])
@pytest.mark.parametrize("optimizer", MOVES_MOMENTUM)
def test_a_run_whose_scheduler_moves_the_momentum_goes_on_after_each_cut(optimizer, by_function, tmp_path):
    def cycle(one): return lr_scheduler.OneCycleLR(one, 0.1, total_steps=40)

    def learner_for(run_dir=None, momentum=0.9, cut=None):
        torch.manual_seed(0)
        model = tiny_model()
        made = MOVES_MOMENTUM[optimizer](momentum)(model.parameters(), 0.01)
        callbacks = [TorchScheduler(cycle if by_function else cycle(made), every="1st"), Fails(cut)]
        return Learner(model, tiny_loaders(), nn.CrossEntropyLoss(), optimizer=made, callbacks=callbacks, run_dir=run_dir,
                       seed=0, device="cpu", verbose=0)

    def run(learner):
        for _ in range(2): learner.fit(2, resume=True)

    run(whole := learner_for())
    for cut in (8, 10, 12, 14, 20):  # of 24 batches: twice in the first fit, at its end, and twice in the second
        with pytest.raises(ConnectionError): run(learner_for(tmp_path / "run", cut=cut))
    if by_function:            # else the scheduler sets the momentum when it is made
        with pytest.raises(ValueError, match="was .*0.9.*, is now .*0.8"): run(learner_for(tmp_path / "run", momentum=0.8))
    run(resumed := learner_for(tmp_path / "run"))
    assert_same_weights(whole.model, resumed.model)
    assert whole.trainer.state.batch == resumed.trainer.state.batch


def test_a_rate_in_a_tensor_is_put_back_after_a_fit_with_a_scheduler_of_torch():
    model, rate = nn.Linear(4, 2), torch.tensor(0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    halving = TorchScheduler(lambda one: lr_scheduler.StepLR(one, 1, gamma=0.5), every="1st")
    Trainer(model, SupervisedStep(nn.MSELoss()), optimizer, callbacks=[halving]).fit(regression(), n=1)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.1)


def quiet_learner(**options):
    return Learner(tiny_model(), tiny_loaders(), nn.CrossEntropyLoss(), device="cpu", verbose=0, **options)


def test_a_fit_is_not_resumed_at_another_rate():
    def made(): return quiet_learner(lr=1e-3)
    stopped, saved = made(), {}
    stopped.on("after_batch", lambda trainer: saved.update(trainer.state_dict()), once=True, after="2ba")
    stopped.fit(2)
    again = made()
    again.on("after_batch", print, after="999ba")
    again.trainer.load_state_dict(saved)
    with pytest.raises(ValueError, match="lr was '0.001, 0.001', now '3, 3'"): again.fit(2, lr=3.0, resume=True)


def test_the_range_test_works_for_optimizers_that_ask_again():
    learner = quiet_learner(optimizer=lambda params, lr: SAM(torch.optim.SGD(params, lr=lr)))
    before = [p.detach().clone() for p in learner.model.parameters()]
    assert len(learner.lr_find(steps=20).lrs) > 5
    assert all(torch.equal(p, one) for p, one in zip(learner.model.parameters(), before))


def test_a_rate_for_a_fit_is_refused_where_a_scheduler_has_begun_and_used_where_it_begins():
    seen = []
    halving = TorchScheduler(lambda one: lr_scheduler.StepLR(one, 1, gamma=0.5), every="1ep")
    learner = Learner(tiny_model(), tiny_loaders(), nn.CrossEntropyLoss(), callbacks=[halving], device="cpu", verbose=0)
    group = learner.trainer.engine.slots["main"].optimizer.param_groups[0]
    learner.on("before_epoch", lambda trainer: seen.append(group["lr"]))
    learner.fit(2, lr=0.4)
    with pytest.raises(ValueError, match="lr=0.4 was given, and StepLR, which has begun already"):
        learner.fit(1, lr=0.4)
    assert seen == [0.4, 0.2] and learner.trainer.state.epoch == 2


def test_a_scheduler_made_at_rates_of_one_fit_says_what_to_do_in_the_next():
    def halving(): return TorchScheduler(lambda one: lr_scheduler.StepLR(one, 1, gamma=0.5), every="1ep")
    learner = quiet_learner(callbacks=[halving()])
    learner.fit(1, lr=(1e-3, 1e-2))
    for lr in (None, (1e-3, 1e-2)):
        with pytest.raises(ValueError, match="lr= of an earlier fit made more, for that fit only. Pass each fit a"):
            learner.fit(1, lr=lr)
    cured = quiet_learner()
    for _ in range(2): cured.fit(1, lr=(1e-3, 1e-2), callbacks=[halving()])
    assert cured.trainer.state.epoch == 2


def test_a_run_dir_must_be_a_path():
    with pytest.raises(TypeError, match="run_dir is int 3; expected the path of a directory"): quiet_learner(run_dir=3)
