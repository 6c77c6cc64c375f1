"""What careful readers found: each of these was wrong once."""

from functools import partial

import pytest
import torch
from nbdev_trainer import (
    Callback,
    EarlyStopping,
    Learner,
    Loaders,
    ManualStep,
    Recorder,
    StepOutput,
    SupervisedStep,
    Trainer,
    from_dict,
)
from nbdev_trainer.testing import StateAt, assert_same_weights, tiny_loaders, tiny_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

loss_fn = nn.CrossEntropyLoss()
inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
classes = inputs[:, :3].argmax(1)


def make(step=None, **options):
    model = tiny_model()
    return Trainer(
        model, step or SupervisedStep(loss_fn), torch.optim.SGD(model.parameters(), lr=0.1), **options
    )


def make_learner(**options):
    options = {"device": "cpu", "lr": 0.1, "optimizer": torch.optim.SGD, "default_callbacks": False} | options
    return Learner(tiny_model(), tiny_loaders(), loss_fn, **options)


def test_a_loaded_state_is_whole_before_any_fit():
    recorder, loaders = Recorder(), tiny_loaders()
    trainer = make(callbacks=[recorder])
    trainer.fit(loaders.train, n=1)
    saved = trainer.state_dict()
    trainer.fit(loaders.train, n=1)
    trainer.load_state_dict(saved)
    assert len(recorder.history) == 1
    again = trainer.state_dict()
    assert len(again["callbacks"]["Recorder"]["rows"]) == 1 and again["loader"] == saved["loader"]
    assert torch.equal(again["rng"]["torch"], saved["rng"]["torch"])


def test_a_rate_given_after_loading_inside_a_cycle_is_used_and_put_back():
    keeper = StateAt(7)
    make_learner(callbacks=[keeper]).fit_one_cycle(2, lr=0.3)
    learner = make_learner()
    learner.trainer.load_state_dict(keeper.state)
    group, seen = learner.trainer.engine.slots["main"].optimizer.param_groups[0], []
    before = group["lr"]
    learner.on("after_step", lambda trainer: seen.append(group["lr"]))
    learner.fit("2ba", lr=0.05)
    assert seen == [0.05, 0.05] and group["lr"] == before


def seeded_loader(where):
    generator, data = torch.Generator().manual_seed(0), TensorDataset(inputs, classes)
    if where == "loader":
        return DataLoader(data, 8, shuffle=True, generator=generator)
    return DataLoader(data, 8, sampler=RandomSampler(range(32), generator=generator))


@pytest.mark.parametrize("where", ["loader", "sampler"])
def test_a_loader_with_its_own_generator_goes_on_in_the_same_order(where):
    keeper, whole = StateAt(6), make()
    whole.callbacks.append(keeper)
    torch.manual_seed(1)
    whole.fit(seeded_loader(where), n=2)
    resumed = make()
    resumed.load_state_dict(keeper.state)
    resumed.fit(seeded_loader(where), n=2, resume=True)
    assert_same_weights(whole.model, resumed.model)


def test_validation_on_a_loader_that_shares_a_generator_changes_nothing():
    models = []
    for with_validation in (False, True):
        generator, data = torch.Generator().manual_seed(0), TensorDataset(inputs, classes)
        train = DataLoader(data, 8, shuffle=True, generator=generator)
        valid = DataLoader(data, 8, generator=generator)
        torch.manual_seed(1)
        trainer = make()
        trainer.fit(train, valid if with_validation else None, n=2)
        models.append(trainer.model)
    assert_same_weights(*models)


def test_a_batch_can_be_skipped_until_its_loss_is_there_and_not_later():
    class Skip(Callback):
        def after_loss(self, trainer):
            if trainer.state.batch == 1:
                trainer.skip_batch("bad")

    steps, trainer = [], make(callbacks=[Skip()])
    trainer.on("after_step", lambda trainer: steps.append(trainer.state.batch))
    trainer.fit(tiny_loaders().train)
    assert steps == [0, 2, 3, 4, 5]

    late = make()
    late.on("after_backward", lambda trainer: trainer.skip_batch("too late"))
    with pytest.raises(RuntimeError, match="comes too late"):
        late.fit(tiny_loaders().train)


def test_what_a_step_logs_in_evaluation_is_of_that_set():
    class Logs(SupervisedStep):
        def train(self, trainer, batch):
            output = super().train(trainer, batch)
            trainer.log("flag", float(trainer.model.training))
            return output

    learner = Learner(
        tiny_model(), tiny_loaders(), step=Logs(loss_fn), lr=0.1, device="cpu", optimizer=torch.optim.SGD
    )
    learner.fit(1)
    assert learner.history["flag"] == [1.0] and learner.history["valid_flag"] == [0.0]
    assert learner.validate()["flag"] == 0.0


def test_a_step_that_replaces_train_does_not_inherit_the_events_it_no_longer_fires():
    class Own(SupervisedStep):
        def train(self, trainer, batch):
            return StepOutput(loss=loss_fn(trainer.model(batch.inputs), batch.targets))

    trainer = make(Own(loss_fn))
    trainer.on("after_loss", lambda trainer: None)
    with pytest.raises(ValueError, match="Own does not fire it"):
        trainer.fit(tiny_loaders().train)


def test_several_optimizers_need_a_manual_step():
    model = tiny_model()
    optimizers = {
        name: torch.optim.SGD(model[i].parameters(), lr=0.1) for name, i in (("main", 0), ("head", 4))
    }
    with pytest.raises(ValueError, match="derive from ManualStep"):
        Trainer(model, SupervisedStep(loss_fn), optimizers)


def test_an_interrupt_is_raised_again_even_if_after_fit_fails():
    class Breaks(Callback):
        def after_batch(self, trainer):
            raise KeyboardInterrupt

        def after_fit(self, trainer):
            raise ValueError("disk")

    with pytest.raises(KeyboardInterrupt) as caught:
        make(callbacks=[Breaks()]).fit(tiny_loaders().train)
    assert any("disk" in note for note in caught.value.__notes__)


def test_a_metric_over_the_whole_set_is_computed_once_an_epoch():
    calls = []

    def largest(predictions, targets):
        calls.append(len(predictions))
        return predictions.max()

    make_learner(metrics=[largest], default_callbacks=True).fit(1)
    assert sorted(calls) == [6, 6, 11, 33]  # two looks at what it returns, then each set once


def test_a_function_attached_before_the_first_fit_sees_evaluations():
    learner, seen = make_learner(), []
    learner.on("after_evaluate", lambda trainer: seen.append(trainer.state.phase))
    learner.validate()
    assert seen == ["valid"]


def test_a_function_attached_late_does_not_make_up_for_what_it_missed():
    loaders, seen, trainer = tiny_loaders(), [], make()
    trainer.fit(loaders.train, n=2)
    trainer.on("after_batch", lambda trainer: seen.append(trainer.state.batch), every="5ba")
    trainer.fit(loaders.train, n=1)
    assert seen == [15]


def test_two_losses_for_one_optimizer_in_a_window_are_refused():
    class Twice(ManualStep):
        def train(self, trainer, batch):
            for _ in range(2):
                trainer.optimize(loss_fn(trainer.model(batch.inputs), batch.targets))
            return StepOutput()

    make(Twice()).fit(tiny_loaders().train)
    with pytest.raises(RuntimeError, match="Add the losses"):
        make(Twice(), accumulate=2).fit(tiny_loaders().train)


def test_a_rate_that_a_callback_sets_without_a_schedule_stays():
    trainer = make()
    group = trainer.engine.slots["main"].optimizer.param_groups[0]
    trainer.on("after_epoch", lambda trainer: group.update(lr=0.01))
    trainer.fit(tiny_loaders().train)
    assert group["lr"] == 0.01


def test_predictions_and_targets_that_would_broadcast_are_refused():
    loaders = Loaders.from_arrays(inputs, inputs[:, 0], batch_size=8, seed=0)
    with pytest.raises(ValueError, match="would broadcast"):
        Learner(nn.Linear(4, 1), loaders, device="cpu", lr=0.1).fit(1)


def test_a_dataset_of_dicts_is_read_by_as_batch():
    class Dicts(Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, i):
            return {"x": inputs[i], "y": classes[i]}

    learner = Learner(
        tiny_model(),
        Loaders(Dicts(), batch_size=8, seed=0),
        loss_fn,
        lr=0.1,
        device="cpu",
        as_batch=from_dict("x", targets="y"),
    )
    learner.fit(1)
    assert learner.trainer.state.samples == 32


def test_a_rate_inside_a_partial_is_the_users():
    learner = make_learner(optimizer=partial(torch.optim.SGD, lr=0.5), lr=None)
    assert learner.trainer.engine.slots["main"].optimizer.param_groups[0]["lr"] == 0.5


def test_class_weights_follow_the_model_to_its_device():
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3))
    loaders = ([(inputs, classes)], None)
    Learner(nn.Linear(4, 3), loaders, weighted, device="meta", optimizer=torch.optim.SGD, lr=0.1).fit(1)
    assert weighted.weight.device.type == "meta"


def test_an_interrupted_cycle_goes_on():
    class Interrupt(Callback):
        def after_batch(self, trainer):
            if trainer.state.batch == 8:
                raise KeyboardInterrupt

    whole, cut = make_learner(seed=3), make_learner(seed=3)
    whole.fit_one_cycle(2, lr=0.3)
    with pytest.raises(KeyboardInterrupt):
        cut.fit_one_cycle(2, lr=0.3, callbacks=[Interrupt()])
    cut.fit_one_cycle(2, lr=0.3, resume=True)
    assert_same_weights(whole.model, cut.model)


def test_after_an_interrupt_inside_a_window_training_goes_on():
    class Once(Callback):
        done = False

        def after_backward(self, trainer):
            if trainer.state.batch == 1 and not self.done:
                self.done = True
                raise KeyboardInterrupt

    trainer, loaders = make(callbacks=[Once()], accumulate=3), tiny_loaders()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(loaders.train)
    trainer.fit(loaders.train, resume=True)
    assert (trainer.state.epoch, trainer.state.batch) == (1, 6)


def test_the_last_validation_is_of_the_final_weights_when_the_last_window_closes_after_one():
    class Unannounced:  # three batches, and no length that would tell
        def __iter__(self):
            return iter(list(tiny_loaders().train)[:3])

    class Results(Callback):
        def __init__(self):
            self.steps = []

        def after_evaluate(self, trainer):
            self.steps.append((trainer.state.batch, trainer.state.step))

    results, loaders = Results(), tiny_loaders()
    trainer = make(callbacks=[results], accumulate=2)
    trainer.fit(Unannounced(), loaders.valid, n="2st", validate_every="3ba")
    assert results.steps == [(3, 1), (3, 2)]
    assert trainer.state.metrics["valid_loss"] == trainer.evaluate(loaders.valid)["loss"]


def test_what_a_step_logs_can_be_monitored_when_the_direction_is_given():
    class Logs(SupervisedStep):
        def train(self, trainer, batch):
            output = super().train(trainer, batch)
            output.logs = {"constant": torch.tensor(1.0)}
            return output

    trainer = make(
        Logs(loss_fn), callbacks=[EarlyStopping("valid_constant", patience=2, higher_is_better=False)]
    )
    loaders = tiny_loaders()
    trainer.fit(loaders.train, loaders.valid, n=9)
    assert (trainer.state.ending, trainer.state.epoch) == ("stopped", 3)


@pytest.mark.parametrize("returned", [None, torch.tensor(1.0), 0.5])
def test_a_step_that_returns_something_else_says_what_is_expected(returned):
    class Wrong(SupervisedStep):
        def train(self, trainer, batch):
            return returned

    with pytest.raises(TypeError, match=r"Wrong.train returned .*; expected StepOutput\("):
        make(Wrong(loss_fn)).fit(tiny_loaders().train)


def test_float64_inputs_are_explained():
    with pytest.raises(RuntimeError) as caught:
        make().fit([(inputs.double(), classes)])
    assert any("inputs.to(torch.float32)" in note for note in caught.value.__notes__)
