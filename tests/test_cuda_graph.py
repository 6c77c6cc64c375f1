"""A recorded step beside the plain one, on a tape of operations: what a CUDA graph would repeat, and nothing of Python."""

import inspect
import random
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from helpers import one_thread as one_thread
from torch import nn

from nbdev_trainer import (
    AUROC, EMA, ActivationStatistics, Accuracy, AnomalyDetection, BadBatches, Batch, Callback, EarlyStopping, GradientNorms, Learner,
    Loaders, Mixup, NonFinite, StepOutput, SupervisedStep, Tape, TimeSplit, TorchScheduler, one_cycle)
from nbdev_trainer.loop.capture import CudaGraphs, side_stream
from nbdev_trainer.loop.engine import Engine
from nbdev_trainer.loop.optimizers import FusedAdamW
from nbdev_trainer.loop.step_graph import StepGraphs

torch.manual_seed(0)
INPUTS, LABELS = torch.randn(46, 6), torch.randint(3, (46,))  # batches of 8, the last one of 6


class Counting(Tape):
    "A tape that knows how often it was used"

    def __init__(self): self.ran, self.recorded, self.freed = 0, 0, 0

    def aside(self, fn):
        self.ran += 1
        return super().aside(fn)

    def rehearse(self, fn):
        self.ran += 1
        return super().rehearse(fn)

    def capture(self, fn):
        self.recorded += 1
        return super().capture(fn)

    def free(self): self.freed += 1


def network(dropout=0.3):
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout))
    return nn.Sequential(body, nn.Linear(16, 3))


def loss_fn(predictions, targets): return nn.functional.cross_entropy(predictions, targets)


def in_32_bits(factor, lr):
    "A schedule whose rates are numbers of 32 bits, which a tensor holds exactly"
    return lambda progress: torch.tensor(lr * factor(progress)).item() / lr


LR = 2.0**-6


def learner_of(cuda_graph, model=None, **options):
    loaders = Loaders.from_arrays(INPUTS, LABELS, valid=(INPUTS, LABELS), batch_size=8, seed=0)
    options = {"device": "cpu", "verbose": 0, "lr": LR, "default_callbacks": False, "metrics": [Accuracy()]} | options
    if "step" not in options: options.setdefault("loss_fn", loss_fn)
    return Learner(network() if model is None else model, loaders, cuda_graph=cuda_graph, **options)


def both(train, **options):
    "The plain learner and the recorded one, and the tape, after the same training"
    torch.manual_seed(2)
    plain = learner_of(False, **{name: one() if name == "callbacks" else one for name, one in options.items()})
    train(plain)
    torch.manual_seed(2)
    recorded = learner_of(tape := Counting(), **{name: one() if name == "callbacks" else one for name, one in options.items()})
    train(recorded)
    return plain, recorded, tape


def same_weights(one, other):
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def sgd(fused, **more): return lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, fused=fused, **more)


@pytest.mark.parametrize("options", [
    {}, {"clip_norm": 0.1}, {"clip_value": 0.01}, {"clip_adaptive": 0.01}, {"precision": "bf16"}, {"precision": "64"},
    {"optimizer": sgd(True)}, {"optimizer": sgd(False)}, {"optimizer": sgd(False, nesterov=True)}, {"loss_fn": nn.CrossEntropyLoss()},
    {"loss_fn": nn.CrossEntropyLoss(ignore_index=2)}, {"loss_fn": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]))},
], ids=lambda options: " ".join(options) or "plain")  # fmt: skip
def test_a_recorded_step_is_the_plain_step_bit_for_bit(options):
    plain, recorded, tape = both(lambda learner: learner.fit(5), **options)
    assert same_weights(plain, recorded)
    assert plain.trainer.state.metrics == recorded.trainer.state.metrics
    assert (tape.ran, tape.recorded, tape.freed) == (6, 2, 1)  # 5 whole batches and an uneven one in each epoch


def test_a_schedule_moves_the_rate_of_what_is_recorded():
    for optimizer in (None, sgd(True)):
        schedule = in_32_bits(one_cycle(), LR)
        plain, recorded, tape = both(lambda learner: learner.fit(6, schedule=schedule), optimizer=optimizer)
        assert same_weights(plain, recorded) and tape.recorded == 2
        assert recorded.trainer.engine.slots["main"].optimizer.param_groups[0]["lr"] == LR


def test_rates_that_need_64_bits_are_those_of_32():
    torch.manual_seed(2)
    model, other = (nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    plain, recorded = learner_of(False, model), learner_of(Tape(), other)
    for learner in (plain, recorded): learner.fit_one_cycle(6, lr=0.003)
    assert not same_weights(plain, recorded)
    torch.testing.assert_close(recorded.predict().predictions, plain.predict().predictions, rtol=1e-5, atol=1e-6)


def test_the_recording_calls_no_line_of_the_step():
    calls = []

    class Counts(SupervisedStep):
        def train(self, trainer, batch):
            calls.append(batch)
            return super().train(trainer, batch)

    step = Counts(loss_fn)
    learner = learner_of(tape := Counting(), step=step)
    learner.fit(8)
    in_evaluations = 8 * 6
    assert (learner.trainer.state.batch, len(calls) - in_evaluations, tape.ran) == (48, 6 + 2, 6)


class KeepsOutputs(Callback):
    "Keeps what it is shown, as callbacks do"

    def __init__(self): self.losses, self.predictions, self.norms, self.gradients = [], [], [], []

    def after_step(self, trainer):
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in trainer.model.parameters()])
        self.norms.append(trainer.engine.slots["main"].norm)

    def after_batch(self, trainer):
        self.losses.append(trainer.state.output.loss)
        self.predictions.append(trainer.state.output.predictions)


def test_what_callbacks_keep_is_not_written_over():
    plain, recorded, _ = both(lambda learner: learner.fit(4), callbacks=lambda: [KeepsOutputs()], clip_norm=0.1)
    ours, theirs = (one.trainer.callbacks[0] for one in (recorded, plain))
    for name in ("losses", "predictions", "norms"):
        for one, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert torch.equal(one, other) and not one.requires_grad
    for one, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(p.grad is None for p in recorded.model.parameters())


def test_metrics_that_keep_outputs_and_averages_of_weights_are_the_same():
    class Doubled(SupervisedStep):
        def train(self, trainer, batch):
            output = super().train(trainer, batch)
            output.logs = {"doubled": 2 * output.loss.detach()}
            return output

    plain, recorded, _ = both(lambda learner: learner.fit(5), step=Doubled(loss_fn), default_callbacks=True,
                              metrics=[Accuracy(), AUROC("multiclass", 3)], callbacks=lambda: [EMA(0.9), EarlyStopping("valid_loss", patience=9)])
    for name in ("train_loss", "train_doubled", "train_accuracy", "train_auroc", "valid_loss", "valid_auroc"):
        assert plain.history[name] == recorded.history[name], name
    assert torch.equal(plain.predict().predictions, recorded.predict().predictions)


def test_weights_of_samples_are_part_of_the_recording():
    weights = torch.rand(46)
    batches = [Batch(INPUTS[i:i + 8], LABELS[i:i + 8], weights=weights[i:i + 8]) for i in range(0, 46, 8)]

    def train(learner):
        learner.loaders = Loaders(batches, None)
        learner.fit(5)

    plain, recorded, tape = both(train, loss_fn=nn.CrossEntropyLoss())
    assert same_weights(plain, recorded) and tape.recorded == 2


class AtBatch(Callback):
    "Does something to the training once"

    def __init__(self, number, what): self.number, self.what = number, what

    def after_batch(self, trainer):
        if trainer.state.batch == self.number: self.what(trainer)


def freeze(trainer): trainer.model[0][0].requires_grad_(False)
def unfreeze(trainer): trainer.model[0][0].requires_grad_(True)
def eval_mode(trainer): trainer.model[0][3].eval()
def decay(trainer): trainer.engine.slots["main"].optimizer.param_groups[0]["weight_decay"] = 0.25
def in_place(trainer): trainer.model.load_state_dict(network().state_dict())


def elsewhere(trainer):
    for p in trainer.model.parameters(): p.data = p.data.clone()


def exchange(trainer):
    new = nn.ReLU6()
    trainer.model[0][2] = new


def load_optimizer(trainer):
    optimizer = trainer.engine.slots["main"].optimizer
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("change, again", [(freeze, 1), (eval_mode, 1), (decay, 1), (in_place, 0), (elsewhere, 1), (exchange, 1),
                                           (load_optimizer, 1)], ids=lambda one: getattr(one, "__name__", str(one)))
def test_what_changes_between_two_steps_is_followed(change, again, caplog):
    caplog.set_level("INFO", "nbdev_trainer")
    plain, recorded, tape = both(lambda learner: learner.fit(5), callbacks=lambda: [AtBatch(9, change)])
    assert same_weights(plain, recorded)
    assert sum("recorded again" in record.message for record in caplog.records) == again
    if again: assert tape.recorded >= 2 and tape.ran > 6


def test_parts_that_are_frozen_and_unfrozen_while_it_trains():
    plain, recorded, _ = both(lambda learner: learner.fit(6), callbacks=lambda: [AtBatch(7, freeze), AtBatch(17, unfreeze)])
    assert same_weights(plain, recorded)


def other_dropout(trainer): trainer.model[0][3] = nn.Dropout(0.5)


def test_a_layer_that_has_come_while_it_trains_is_looked_at_like_the_others():
    plain, recorded, _ = both(lambda learner: learner.fit(6), callbacks=lambda: [AtBatch(7, other_dropout), AtBatch(17, eval_mode)])
    assert same_weights(plain, recorded)


def test_fine_tuning_of_a_frozen_body():
    plain, recorded, tape = both(lambda learner: learner.fine_tune(3, lr=2.0**-5, frozen=2))
    torch.testing.assert_close(recorded.predict().predictions, plain.predict().predictions, rtol=0, atol=1e-3)
    assert tape.recorded == 2 and tape.freed == 2  # both fits are too short for the uneven batches


def test_an_engine_is_as_new_after_a_cleanup_that_failed():
    class Stuck(Counting):
        def free(self):
            super().free()
            if self.freed == 1: raise RuntimeError("the memory is still in use")

    learner, other = learner_of(tape := Stuck(), network(0)), learner_of(Counting(), network(0))
    with pytest.raises(RuntimeError, match="still in use"): learner.fit(4)
    other.fit(4)
    assert not learner.trainer.engine.running and learner.trainer.engine.this_fit is None
    for one in (learner, other): one.fit(4)
    assert same_weights(learner, other) and tape.freed == 2


def test_a_parameter_that_joins_the_optimizer_follows_the_schedule():
    def train(learner):
        learner.freeze("0")
        head = learner.model[1]
        for group in learner.trainer.engine.slots["main"].optimizer.param_groups:
            group["params"] = [p for p in group["params"] if any(p is one for one in head.parameters())]
        learner.on("after_batch", lambda trainer: learner.unfreeze(), once=True, after="9ba")
        learner.fit(5, schedule=in_32_bits(one_cycle(), LR))

    plain, recorded, _ = both(train)
    assert same_weights(plain, recorded)
    assert not torch.equal(plain.model[0][0].weight, network()[0][0].weight)


def test_the_rate_of_a_group_that_is_added_while_it_trains_is_read_on_the_device():
    def add(trainer):
        trainer.model[0][0].requires_grad_(True)
        trainer.engine.slots["main"].optimizer.add_param_group({"params": list(trainer.model[0][0].parameters())})

    def slower(trainer): trainer.engine.slots["main"].optimizer.param_groups[-1]["lr"] = LR / 8

    def train(learner):
        optimizer = learner.trainer.engine.slots["main"].optimizer
        body = {id(p) for p in learner.model[0][0].requires_grad_(False).parameters()}
        for group in optimizer.param_groups: group["params"] = [p for p in group["params"] if id(p) not in body]
        learner.fit(6)

    plain, recorded, tape = both(train, callbacks=lambda: [AtBatch(9, add), AtBatch(25, slower)])
    assert same_weights(plain, recorded) and tape.recorded >= 2
    assert not torch.equal(plain.model[0][0].weight, network()[0][0].weight)


def test_weights_outside_of_the_optimizer_get_no_gradient():
    def train(learner):
        optimizer = learner.trainer.engine.slots["main"].optimizer
        for group in optimizer.param_groups: group["params"] = [p for p in group["params"] if p is not learner.model[1].bias]
        learner.fit(4)

    plain, recorded, tape = both(train)
    assert same_weights(plain, recorded) and tape.recorded == 2
    assert plain.model[1].bias.grad is not None and recorded.model[1].bias.grad is None


def test_a_run_that_is_resumed_ends_with_the_same_bits():
    class Keep(Callback):
        def after_batch(self, trainer):
            if trainer.state.batch == 11: self.state = trainer.state_dict()

    schedule = in_32_bits(one_cycle(), LR)
    torch.manual_seed(2)
    whole = learner_of(Counting(), callbacks=[keep := Keep()])
    whole.fit(5, schedule=schedule)
    for cuda_graph in (Counting(), False):  # it warms up again, or is not recorded at all
        torch.manual_seed(9)
        resumed = learner_of(cuda_graph, callbacks=[Keep()])
        resumed.trainer.load_state_dict(keep.state)
        resumed.fit(5, schedule=schedule, resume=True)
        assert same_weights(whole, resumed)
        assert whole.trainer.state.metrics == resumed.trainer.state.metrics


def test_a_resumed_run_with_rates_of_64_bits_ends_with_the_same_bits_too():
    class Keep(Callback):
        def after_batch(self, trainer):
            if trainer.state.batch == 11: self.state = trainer.state_dict()

    torch.manual_seed(2)
    whole = learner_of(Counting(), callbacks=[keep := Keep()])
    whole.fit_one_cycle(5, lr=0.003)
    resumed = learner_of(Counting(), callbacks=[Keep()])
    resumed.trainer.load_state_dict(keep.state)
    resumed.fit_one_cycle(5, lr=0.003, resume=True)
    assert same_weights(whole, resumed)


def test_many_shapes_are_recorded_up_to_four_and_the_others_run_as_they_are(caplog):
    caplog.set_level("INFO", "nbdev_trainer")
    sizes = [2, 3, 4, 5, 6, 7]
    batches = [(INPUTS[:n], LABELS[:n]) for n in sizes] * 5

    def train(learner):
        learner.loaders = Loaders(batches, None)
        learner.fit(1)

    plain, recorded, tape = both(train)
    assert same_weights(plain, recorded)
    assert (tape.recorded, tape.ran) == (4, 4 * 3 + 2 * 5)
    assert sum("more than 4 shapes" in record.message for record in caplog.records) == 1


def test_texts_and_numbers_in_a_batch_make_kinds_of_their_own():
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.heads = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)})

        def forward(self, inputs): return self.heads[inputs["which"]](inputs["x"]) * inputs["scale"]

    batches = [Batch({"x": INPUTS[:8] + i, "which": "ab"[i % 2], "scale": 1 + i % 2}, LABELS[:8], size=8) for i in range(16)]

    def train(learner):
        learner.loaders = Loaders(batches, None)
        learner.fit(1)

    torch.manual_seed(2)
    tape = Counting()
    plain, recorded = (learner_of(one, Picks(), optimizer=sgd(False)) for one in (False, tape))
    train(plain)
    train(recorded)
    assert same_weights(plain, recorded) and tape.recorded == 2


def test_skipped_batches_and_requests_between_batches():
    class Asks(Callback):
        def before_batch(self, trainer):
            if trainer.state.batch in (2, 14): trainer.skip_batch("not this one")

        def after_batch(self, trainer):
            if trainer.state.batch == 22: trainer.stop("enough")

    plain, recorded, _ = both(lambda learner: learner.fit(5), callbacks=lambda: [Asks()])
    assert same_weights(plain, recorded) and recorded.trainer.state.ending == "stopped"
    assert (plain.trainer.state.step, plain.trainer.state.samples) == (recorded.trainer.state.step, recorded.trainer.state.samples)


def test_a_batch_that_a_callback_changes_is_what_is_trained_on():
    class Noise(Callback):
        def before_batch(self, trainer):
            batch = trainer.state.current_batch
            trainer.state.current_batch = Batch(batch.inputs + torch.randn_like(batch.inputs), batch.targets, batch.size)

    plain, recorded, _ = both(lambda learner: learner.fit(5), callbacks=lambda: [Noise()])
    assert same_weights(plain, recorded)


def test_tools_that_train_outside_of_a_fit_use_the_plain_engine():
    learner = learner_of(tape := Counting(), loss_fn=nn.CrossEntropyLoss())
    assert isinstance(learner.trainer.engine, StepGraphs)
    before = {name: one.clone() for name, one in learner.model.state_dict().items()}
    learner.check(), learner.overfit(), learner.lr_find(), learner.dry_run()
    assert tape.ran <= 12 and all(torch.equal(one, before[name]) for name, one in learner.model.state_dict().items())


def test_groups_without_weights_and_batches_without_tensors():
    def make(params, lr): return FusedAdamW([{"params": list(params)}, {"params": []}], lr=lr)
    plain, recorded, _ = both(lambda learner: learner.fit(4), optimizer=make)
    assert same_weights(plain, recorded)

    class Draws(SupervisedStep):
        def train(self, trainer, batch): return StepOutput(trainer.model(torch.zeros(4, 6)).square().mean())

    def train(learner):
        learner.loaders = Loaders([Batch(None, None, size=4) for _ in range(9)], None)
        learner.fit(1)

    plain, recorded, tape = both(train, step=Draws(loss_fn), metrics=[])
    assert same_weights(plain, recorded) and tape.recorded == 1


class Scaled(nn.Module):
    "A model with a factor that Python keeps"

    def __init__(self, counts=False):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.factor, self.counts = nn.Linear(6, 3), 1.0, counts

    def forward(self, inputs):
        if self.counts and self.training: self.factor += 0.5
        return self.layer(inputs) * self.factor


def test_a_number_of_a_layer_that_changes_between_epochs_is_followed(caplog):
    caplog.set_level("INFO", "nbdev_trainer")

    class Raises(Callback):
        def after_epoch(self, trainer): trainer.model.factor += 0.5

    tape = Counting()
    plain, recorded = (learner_of(one, Scaled(), callbacks=[Raises()]) for one in (False, tape))
    for learner in (plain, recorded): learner.fit(4)
    assert same_weights(plain, recorded) and (tape.recorded, tape.freed) == (4, 4)
    assert sum("Scaled.factor has changed, so the step is recorded again" in record.message for record in caplog.records) == 3


def test_a_number_that_the_step_itself_changes_is_an_error():
    with pytest.raises(RuntimeError, match="Scaled.factor changes in the step, from 2.5 to 3.0"): learner_of(Tape(), Scaled(True)).fit(1)


def test_the_memory_of_recordings_that_are_dropped_is_free_before_the_next():
    learner = learner_of(tape := Counting(), callbacks=[AtBatch(9, freeze)])
    freed = []
    learner.on("after_batch", lambda trainer: freed.append(tape.freed))
    learner.fit(5)
    assert (freed[8], freed[9], tape.freed) == (0, 1, 2)


def test_batches_that_never_come_again_are_told_of(caplog):
    caplog.set_level("INFO", "nbdev_trainer")

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, inputs): return self.layer(inputs["x"])

    learner = learner_of(tape := Counting(), Reads())
    learner.loaders = Loaders([Batch({"x": INPUTS[:8], "name": f"{i}.png"}, LABELS[:8], size=8) for i in range(60)], None)
    learner.fit(1)
    assert tape.recorded == 0 and sum("nothing is recorded" in record.message for record in caplog.records) == 1


# What is refused


REFUSED = {
    "gradient norms": (lambda: [GradientNorms()], "GradientNorms.around stands around Precision.unscale"),
    "bad batches": (lambda: [BadBatches("skip")], "BadBatches acts at after_loss"),
    "mixup": (lambda: [Mixup()], r"Mixup.* acts at after_backward"),
    "time split": (lambda: [TimeSplit()], r"Stopwatch.within.* stands around StepGraphs.run"),
    "non-finite": (lambda: [NonFinite()], r"stands around StepGraphs.run"),
    "anomaly": (lambda: [AnomalyDetection()], r"with_line stands around StepGraphs.backward"),
    "activations": (lambda: [ActivationStatistics()], r"layer '.*' has the hook ActivationStatistics.hook"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_callback_within_the_step_is_named(name):
    callbacks, text = REFUSED[name]
    learner = learner_of(tape := Counting(), callbacks=callbacks())
    before = {key: one.clone() for key, one in learner.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"(?s){text}.*one piece, without Python; leave out one of the two"): learner.fit(1)
    assert tape.ran == tape.recorded == 0
    assert all(torch.equal(one, before[key]) for key, one in learner.model.state_dict().items())


@pytest.mark.parametrize("attach", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_of_a_weight_is_refused_too(attach):
    learner = learner_of(Tape())
    getattr(learner.model[1].weight, attach)(lambda gradient: None)
    with pytest.raises(ValueError, match="weight '1.weight' has the hook"): learner.fit(1)


def test_an_attached_function_within_the_step_is_refused_too():
    learner = learner_of(Tape())
    learner.on("before_step", lambda trainer: None)
    with pytest.raises(ValueError, match="acts at before_step"): learner.fit(1)


def step_of(train):
    class Own(SupervisedStep):
        def evaluate(self, trainer, batch): return SupervisedStep.train(self, trainer, batch)

    Own.train = train
    return Own(loss_fn)


def reads(self, trainer, batch):
    output = SupervisedStep.train(self, trainer, batch)
    if output.loss > 1e9: output.loss = output.loss / 2
    return output


def draws(self, trainer, batch):
    output = SupervisedStep.train(self, trainer, batch)
    output.loss = output.loss * (1 + 0.1 * random.random())
    return output


def draws_in_numpy(self, trainer, batch):
    output = SupervisedStep.train(self, trainer, batch)
    output.loss = output.loss * np.random.rand()
    return output


def counts(self, trainer, batch):
    output = SupervisedStep.train(self, trainer, batch)
    output.loss = output.loss * min(1.0, trainer.state.batch / 10)
    return output


def logs(self, trainer, batch):
    trainer.log("one", 1.0)
    return SupervisedStep.train(self, trainer, batch)


def asks_for_ids(self, trainer, batch):
    return StepOutput(trainer.model(batch.inputs)[batch.ids].mean())


def changes_targets(self, trainer, batch):
    batch.targets = batch.targets.flip(0)
    return SupervisedStep.train(self, trainer, batch)


@pytest.mark.parametrize("train, error, text", [
    (reads, RuntimeError, "gives the host what only the device knows"), (draws, RuntimeError, "draws random numbers on the host"),
    (draws_in_numpy, RuntimeError, "draws random numbers on the host"), (counts, AttributeError, "the step asks for trainer.state"),
    (logs, AttributeError, "the step asks for trainer.log"), (asks_for_ids, AttributeError, "the step asks for batch.ids"),
    (changes_targets, ValueError, "Own.train changes the batch it was given")], ids=lambda one: getattr(one, "__name__", ""))
def test_a_step_that_a_recording_would_get_wrong_is_an_error(train, error, text):
    learner = learner_of(Tape(), step=step_of(train))
    with pytest.raises(error, match=text) as raised: learner.fit(1)
    late = {reads: 2, draws: 3, draws_in_numpy: 3}.get(train, 0)  # in the rehearsal, and when it was recorded
    assert learner.trainer.state.batch == late
    assert any("being recorded as a CUDA graph" in note for note in getattr(raised.value, "__notes__", [])) == bool(late)
    engine = learner.trainer.engine
    assert not engine.running and engine.this_fit is None and all(p.grad is None for p in learner.model.parameters())
    assert engine.slots["main"].optimizer.param_groups[0]["lr"] == LR


def test_what_fails_while_it_is_recorded_changes_nothing():
    class Breaks(Tape):
        def capture(self, fn): raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    class Before(Callback):
        def before_batch(self, trainer): self.weights = {name: one.clone() for name, one in trainer.model.state_dict().items()}

    learner = learner_of(Breaks(), callbacks=[before := Before()])
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing") as raised: learner.fit(1)
    assert any(".item()" in note for note in raised.value.__notes__)
    assert all(torch.equal(one, before.weights[name]) for name, one in learner.model.state_dict().items())
    learner.trainer.engine.capture = Tape()
    learner.fit(2)  # and it can train
    assert learner.trainer.state.ending == "finished"


def test_skip_step_is_refused_because_the_step_is_done_with_the_gradient():
    class Asks(Callback):
        def before_batch(self, trainer): trainer.skip_step("not now")

    with pytest.raises(RuntimeError, match="skip_step.'not now'. was asked"): learner_of(Tape(), callbacks=[Asks()]).fit(1)


def test_a_setting_that_changes_in_each_step_is_an_error_and_not_a_recording_each_time():
    def per_step(optimizer): return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    for every, recorded in (("1st", 0), ("6st", 7)):
        learner = learner_of(tape := Counting(), optimizer=sgd(False), callbacks=[TorchScheduler(per_step, every=every)])
        with pytest.raises(RuntimeError, match=r"a setting of the optimizer has changed 8 times.*SGD\(..., fused=True\)"): learner.fit(9)
        assert tape.recorded == recorded
    learner = learner_of(tape := Counting(), optimizer=sgd(True), callbacks=[TorchScheduler(per_step, every="1st")])
    learner.fit(5)
    assert tape.recorded == 2


def test_schedules_of_what_is_not_read_on_the_device_are_refused_before_the_first_batch():
    learner = learner_of(Tape(), optimizer=sgd(False))
    with pytest.raises(ValueError, match="schedule for the lr of SGD.*pass fused=True"): learner.fit_one_cycle(1)
    learner = learner_of(Tape())
    with pytest.raises(ValueError, match="schedule for the weight_decay of FusedAdamW.*leave out the schedule"):
        learner.fit(1, schedule={"weight_decay": lambda progress: 1 - progress})
    assert learner.trainer.state.batch == 0


def test_without_a_gpu_and_with_what_does_not_fit_the_model_stays_as_it_was():
    for options, text in (({"cuda_graph": True}, "needs a CUDA device, and the device is 'cpu'"),
                          ({"accumulate": 2}, "accumulate=2"), ({"micro_batch_size": 4}, "micro_batch_size=4"),
                          ({"precision": "fp16"}, "fp16, whose scale"), ({"compile": {"mode": "reduce-overhead"}}, "of its own"),
                          ({"optimizer": torch.optim.RMSprop}, "capturable=True"), ({"optimizer": torch.optim.LBFGS}, "LBFGS")):
        if options.get("compile") is not None: pytest.importorskip("torch._inductor")
        with pytest.raises(ValueError, match=text): learner_of(**{"cuda_graph": Tape()} | options)
    with pytest.raises(TypeError, match="cuda_graph is str 'yes'"): learner_of("yes")


def test_the_plain_engine_is_used_when_nothing_is_asked():
    assert not isinstance(learner_of(False).trainer.engine, StepGraphs)
    assert type(learner_of(False).trainer.engine) is Engine


# What is asked of torch.cuda, with a stand-in that writes it down


class Cuda:
    "Streams and graphs that do nothing and write down what they were asked"

    def __init__(self, monkeypatch, breaks=None):
        self.asked, self.current, self.mode, cuda = [], "the usual stream", 0, self
        graph_arguments = inspect.signature(torch.cuda.graph).bind  # the real one

        class Stream:
            def __init__(self, device): cuda.asked.append(f"stream on {device}")
            def wait_stream(self, other): cuda.asked.append(f"the side waits for {other}")
            def __repr__(self): return "the side"

        class Usual(str):
            def wait_stream(self, other): cuda.asked.append(f"{self} waits for {other}")

        class Graph:
            def replay(self): cuda.asked.append("replay")
            def pool(self): return "the pool"

        @contextmanager
        def on(stream):
            before, cuda.current = cuda.current, stream
            yield
            cuda.current = before

        @contextmanager
        def graph(*args, **options):
            bound = graph_arguments(*args, **options).arguments
            cuda.asked.append(f"capture on {bound['stream']}, pool {bound['pool']}, {bound['capture_error_mode']}")
            cuda.current = bound["stream"]
            try: yield
            finally:
                if breaks: raise RuntimeError("CUDA error: the capture was broken off")  # as torch does, before it puts the stream back
                cuda.current = self.usual

        self.current = self.usual = Usual("the usual stream")
        stand_ins = {"Stream": Stream, "CUDAGraph": Graph, "stream": on, "graph": graph, "current_stream": lambda device: self.current,
                     "device": lambda device: nullcontext(),
                     "set_stream": lambda stream: setattr(self, "current", stream),
                     "empty_cache": lambda: self.asked.append("empty the cache"),
                     "get_sync_debug_mode": lambda: self.mode, "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode)}
        for name, value in stand_ins.items(): monkeypatch.setattr(torch.cuda, name, value)
        side_stream.cache_clear()


def test_graphs_are_captured_on_the_stream_of_the_warm_up_and_share_a_pool(monkeypatch):
    cuda = Cuda(monkeypatch)
    graphs = CudaGraphs(torch.device("cuda:0"))
    where = []
    assert graphs.aside(lambda: where.append(str(cuda.current)) or 5) == 5
    modes = []
    assert graphs.rehearse(lambda: modes.append(cuda.mode) or 6) == 6
    replay = graphs.capture(lambda: where.append(str(cuda.current)) or "the result")
    assert (replay(), replay(), where, modes, cuda.mode) == ("the result", "the result", ["the side"] * 2, ["error"], 0)
    graphs.capture(lambda: None)
    graphs.free()
    aside = ["the side waits for the usual stream", "the usual stream waits for the side"]
    assert cuda.asked == ["stream on cuda:0", *aside, *aside, "capture on the side, pool None, thread_local", "replay", "replay",
                          "capture on the side, pool the pool, thread_local", "empty the cache"]
    assert graphs.pool is None and cuda.current is cuda.usual
    assert CudaGraphs(torch.device("cuda:0")).stream is graphs.stream
    side_stream.cache_clear()


def test_of_a_capture_that_breaks_the_first_error_is_raised_and_the_stream_is_put_back(monkeypatch):
    cuda = Cuda(monkeypatch, breaks=True)
    graphs = CudaGraphs(torch.device("cuda:0"))
    def fails(): raise ZeroDivisionError("in the step")
    with pytest.raises(ZeroDivisionError, match="in the step"): graphs.capture(fails)
    assert cuda.current is cuda.usual and graphs.pool is None
    with pytest.raises(RuntimeError, match="broken off"): graphs.capture(lambda: None)
    assert cuda.current is cuda.usual
    with pytest.raises(ZeroDivisionError): graphs.rehearse(fails)
    assert cuda.mode == 0 and cuda.asked[-1] == "the usual stream waits for the side"
    side_stream.cache_clear()


def test_a_learner_makes_graphs_on_its_device(monkeypatch):
    Cuda(monkeypatch)
    learner = learner_of(Tape())
    engine = StepGraphs(learner.model, {"main": torch.optim.SGD(learner.model.parameters())}, torch.device("cuda:0"), capture=True)
    assert isinstance(engine.capture, CudaGraphs) and engine.capture.device == torch.device("cuda:0")
    side_stream.cache_clear()
