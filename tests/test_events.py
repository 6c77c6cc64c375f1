"""Events, callbacks and control: who acts when, what may be changed, what a fit leaves behind."""

import itertools
import math

import pytest
import torch
from helpers import one_thread as one_thread
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from nbdev_trainer.data.batch import Batch, StepOutput
from nbdev_trainer.data.loaders import Loaders
from nbdev_trainer.loop.callback import Callback
from nbdev_trainer.loop.engine import Precision
from nbdev_trainer.loop.events import EVALUATION_EVENTS, Event
from nbdev_trainer.loop.schedules import linear
from nbdev_trainer.loop.state import State
from nbdev_trainer.loop.steps import ManualStep, Step, SupervisedStep
from nbdev_trainer.loop.trainer import Trainer
from nbdev_trainer.metrics.classification import Accuracy

TRAINING = [event for event in Event if event not in EVALUATION_EVENTS]


def batches(n=5, size=4):
    inputs = torch.linspace(-1, 1, n * size * 2).sin().view(n, size, 2)
    return [(x, (x[:, 0] > 0).long()) for x in inputs]


def make_trainer(*callbacks, step=None, model=None, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 2))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    step = step or SupervisedStep(nn.CrossEntropyLoss())
    return Trainer(model, step, optimizer, callbacks=callbacks, **options)


def at(event, act):
    """A callback that does one thing at one event."""
    return type("Act", (Callback,), {event: lambda self, trainer: act(trainer)})()


def make_diary():
    """A callback with a method for each event; `entries` holds (event, phase)."""

    def note(event):
        return lambda self, trainer: self.entries.append((str(event), trainer.state.phase))

    diary = type("Diary", (Callback,), {event: note(event) for event in Event})()
    diary.entries = []
    return diary


def weights_of(trainer):
    return nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()


class Raising:
    """Does what it was told at the n-th call."""

    def __init__(self, n, error):
        self.n, self.error = n, error

    def __call__(self, trainer):
        self.n -= 1
        if self.n == 0:
            raise self.error


# ---- which events fire when


def test_the_events_of_a_fit_fire_in_this_order():
    diary = make_diary()
    make_trainer(diary).fit(batches(2), batches(1), n=1)
    batch = "before_batch after_predict after_loss after_backward before_step after_step after_batch".split()
    evaluation = "before_evaluate before_evaluate_batch after_evaluate_batch after_evaluate".split()
    expected = ["before_fit", "before_epoch", *batch, *batch, *evaluation, "after_validate", "after_epoch", "after_fit"]
    assert [event for event, _ in diary.entries] == expected


def test_events_of_evaluation_fire_in_evaluation_only_and_all_others_never_there():
    diary = make_diary()
    trainer = make_trainer(diary)
    trainer.fit(batches(), {"clean": batches(2), "noisy": batches(2)}, n=2, validate_every="2ba")
    trainer.evaluate(batches(2), name="test", phase="test")
    trainer.predict(batches(2))
    for event, phase in diary.entries:
        assert (phase == "train") == (event in TRAINING), (event, phase)
    assert {phase for _, phase in diary.entries} == {"train", "valid", "test", "predict"}


def test_nothing_fires_in_a_fit_without_validation_that_belongs_to_evaluation():
    diary = make_diary()
    make_trainer(diary).fit(batches(), n=1)
    assert not {event for event, _ in diary.entries} & EVALUATION_EVENTS


def test_after_backward_fires_per_micro_batch_and_steps_per_window():
    diary = make_diary()
    make_trainer(diary, accumulate=3).fit(batches(5), n=2)
    counts = [
        sum(event == name for event, _ in diary.entries)
        for name in ("after_backward", "before_step", "after_step")
    ]
    assert counts == [10, 4, 4]


class TwoParts(ManualStep):
    """The first layer learns at each batch, the last one at every other."""

    def train(self, trainer, batch):
        def loss():
            return F.cross_entropy(trainer.model(batch.inputs), batch.targets)

        trainer.optimize(loss(), "first")
        if trainer.state.batch % 2 == 0:
            trainer.optimize(loss(), "last")
        return StepOutput(loss=loss().detach())


def two_part_trainer(*callbacks, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    parts = {"first": optim.SGD(model[0].parameters(), 0.1), "last": optim.SGD(model[1].parameters(), 0.1)}
    return Trainer(model, TwoParts(), parts, callbacks=callbacks, **options)


@pytest.mark.parametrize("event", ["before_step", "after_step"])
def test_step_events_fire_per_optimizer_and_the_state_names_it(event):
    names = []
    trainer = two_part_trainer(at(event, lambda trainer: names.append(trainer.state.optimizer)))
    trainer.fit(batches(3), n=1)
    assert names == ["first", "last", "first", "first", "last"]
    assert trainer.state.step == 3, "windows, not optimizers"


def test_an_optimizer_changes_its_own_parameters_only():
    seen = []
    trainer = two_part_trainer()
    trainer.on(
        "after_backward",
        lambda trainer: seen.append([p.grad is not None for p in trainer.model.parameters()]),
    )
    trainer.fit(batches(1), n=1)
    assert seen == [[True, True, False, False], [False, False, True, True]]


class EveryOther(Precision):
    """As a gradient scaler that finds an overflow at each second step."""

    calls = 0

    def step(self, optimizer):
        self.calls += 1
        if self.calls % 2 == 0:
            return False
        return super().step(optimizer)


def test_after_step_fires_only_if_weights_changed():
    changed = []
    trainer = make_trainer(precision=EveryOther())
    trainer.on("before_step", lambda trainer: changed.append(False))
    trainer.on("after_step", lambda trainer: changed.append(True))
    trainer.fit(batches(4), n=1)
    assert changed == [False, True, False, False, True, False] and trainer.state.step == 2


def test_evaluation_precedes_after_epoch():
    seen = []
    trainer = make_trainer(
        at("after_epoch", lambda trainer: seen.append(trainer.state.metrics["valid_loss"]))
    )
    trainer.fit(batches(), batches(2), n=2)
    assert seen[1] == trainer.state.metrics["valid_loss"] != seen[0]


@pytest.mark.parametrize("event", TRAINING[:-1])
@pytest.mark.parametrize(
    "error, ending", [(KeyboardInterrupt(), "interrupted"), (ValueError("no"), "failed")]
)
def test_after_fit_always_fires_with_the_right_ending_and_the_error_comes_out(event, error, ending):
    endings = []
    trainer = make_trainer(at("after_fit", lambda trainer: endings.append(trainer.state.ending)))
    trainer.on(event, Raising(1, error))
    with pytest.raises(type(error)) as caught:
        trainer.fit(batches(2), batches(1), n=1)
    assert caught.value is error and endings == [ending]


@pytest.mark.parametrize(
    "ask, ending", [(None, "finished"), (lambda trainer: trainer.stop("enough"), "stopped")]
)
def test_after_fit_knows_whether_the_fit_was_stopped(ask, ending):
    endings = []
    trainer = make_trainer(at("after_fit", lambda trainer: endings.append(trainer.state.ending)))
    if ask:
        trainer.on("after_batch", ask)
    trainer.fit(batches(2), n=1)
    assert endings == [ending]


def test_every_after_fit_is_called_even_if_one_of_them_fails():
    called = []
    trainer = make_trainer(
        at("after_fit", Raising(1, ValueError("in after_fit"))), at("after_fit", called.append)
    )
    with pytest.raises(ValueError, match="in after_fit"):
        trainer.fit(batches(2), n=1)
    assert called == [trainer]


# ---- mistakes are found early


class Silent(Step):
    def train(self, trainer, batch):
        scores = trainer.model(batch.inputs)
        return StepOutput(loss=F.cross_entropy(scores, batch.targets), predictions=scores)


@pytest.mark.parametrize("event", ["after_predict", "after_loss"])
def test_waiting_for_an_event_that_the_step_does_not_fire_is_an_error_at_fit_start(event):
    started = []
    trainer = make_trainer(at(event, print), at("before_batch", started.append), step=Silent())
    with pytest.raises(ValueError, match=f"waits for {event}, but Silent does not fire it"):
        trainer.fit(batches(2), n=1)
    assert started == [] and trainer.plan is None


@pytest.mark.parametrize(
    "name", ["after_bach", "before_everything", "on_epoch_end", "after_epochs", "befor_fit", "afterstep"]
)
def test_a_method_that_looks_like_an_event_fails_when_the_class_is_defined(name):
    with pytest.raises(TypeError, match=f"Typo.{name} is not an event"):
        type("Typo", (Callback,), {name: lambda self, trainer: None})


def test_a_misspelt_event_is_told_which_one_was_meant():
    with pytest.raises(TypeError, match="after_batch"):
        type("Typo", (Callback,), {"after_bach": lambda self, trainer: None})


@pytest.mark.parametrize("function", [lambda self: None, lambda self, trainer, more: None, lambda: None])
def test_a_wrong_signature_fails_when_the_class_is_defined(function):
    with pytest.raises(TypeError, match=r"expected def after_step\(self, trainer\)"):
        type("Wrong", (Callback,), {"after_step": function})


def test_methods_of_other_names_and_private_ones_are_allowed():
    methods = {
        "plot": lambda self: None,
        "_after_batch": lambda self: None,
        "after_step": lambda self, t, k=1: t,
    }
    assert list(type("Fine", (Callback,), methods)().handles()) == ["after_step"]


def test_a_class_in_place_of_a_callback_is_an_error():
    with pytest.raises(TypeError, match="pass an instance"):
        make_trainer(Callback)


# ---- order


class First(Callback):
    def before_fit(self, trainer):
        trainer.order.append(type(self).__name__)


class Second(First):
    pass


class Early(First):
    runs_before = (Second,)


class Late(First):
    runs_after = (Second,)


def order_of(*callbacks):
    trainer = make_trainer(*callbacks)
    trainer.order = []
    trainer.fit(batches(1), n=1)
    return trainer.order


def test_list_order_decides_where_nothing_is_declared():
    class Third(First):
        pass

    assert order_of(Third(), Second()) == ["Third", "Second"] == order_of(Second(), Third())[::-1]


@pytest.mark.parametrize("order", list(itertools.permutations([Second, Early, Late])))
def test_declared_order_holds_for_any_list(order):
    assert order_of(*(one() for one in order)) == ["Early", "Second", "Late"]


def test_a_cycle_is_an_error_that_names_its_members():
    class Never(First):
        runs_after, runs_before = (Late,), (Early,)

    with pytest.raises(ValueError, match="Late, Never|Never, Late|Early.*Never|Never.*Early"):
        order_of(Late(), Never(), Early(), Second())


def test_callbacks_of_one_fit_act_in_that_fit_only():
    seen = []
    trainer = make_trainer()
    trainer.fit(batches(2), n=1, callbacks=[at("after_batch", seen.append)])
    trainer.fit(batches(2), n=1)
    assert len(seen) == 2


def test_handlers_are_resolved_once_per_fit():
    seen = []
    late = at("after_batch", seen.append)
    trainer = make_trainer()
    trainer.on("before_epoch", lambda trainer: trainer.callbacks.append(late), once=True)
    trainer.fit(batches(2), n=1)
    assert seen == []
    trainer.fit(batches(2), n=1)
    assert len(seen) == 2


def test_an_event_that_nobody_handles_is_an_empty_tuple():
    tables = []
    make_trainer(at("before_fit", lambda trainer: tables.append(trainer.handlers))).fit(batches(1), n=1)
    assert {event: len(getattr(tables[0], event)) for event in Event} == {
        event: int(event == "before_fit") for event in Event
    }


def test_the_plan_says_who_acts_when_in_which_order():
    shown = make_trainer(Late(), Early(), Second()).describe_callbacks()
    assert shown.split() == ["before_fit", "Early", ">", "Second", ">", "Late"]


# ---- state and what may be changed


@pytest.mark.parametrize("name", ["bacth", "loss", "epochs"])
def test_unknown_fields_of_the_state_raise(name):
    with pytest.raises(AttributeError, match=name):
        getattr(State(), name)
    with pytest.raises(AttributeError, match=name):
        setattr(State(), name, 1)


def test_what_the_events_say_may_be_changed_exists():
    assert {field for event in Event for field in event.may_change} <= set(State.__dataclass_fields__)


@pytest.mark.parametrize("size", [2, None])
@pytest.mark.parametrize("event, phase", [("before_batch", "train"), ("before_evaluate_batch", "valid")])
def test_a_batch_may_be_replaced_before_it_is_used(event, phase, size):
    seen = []

    class Looking(SupervisedStep):
        def train(self, trainer, batch):
            if trainer.state.phase == phase:
                seen.append(len(batch.inputs))
            return super().train(trainer, batch)

    def replace(trainer):
        batch = trainer.state.current_batch
        trainer.state.current_batch = Batch(batch.inputs[:2], batch.targets[:2], size)

    trainer = make_trainer(at(event, replace), step=Looking(nn.CrossEntropyLoss()), accumulate=2)
    trainer.fit(batches(3), batches(2), n=1)
    assert set(seen) == {2} and trainer.state.samples == (6 if phase == "train" else 12)


@pytest.mark.parametrize(
    "event, phase", [("after_predict", "train"), ("after_loss", "train"), ("after_evaluate_batch", "valid")]
)
def test_an_output_may_be_replaced_or_changed(event, phase):
    def replace(trainer):
        scores = torch.tensor([[9.0, 0.0]]).repeat(4, 1)  # class 0 for all
        trainer.state.output = StepOutput(loss=trainer.state.output.loss, predictions=scores)
        if event == "after_predict":
            trainer.state.output.predictions = scores + 0 * next(trainer.model.parameters()).sum()

    trainer = make_trainer(at(event, replace), metrics=[Accuracy()])
    data = [(x, torch.zeros(4).long()) for x, _ in batches(3)]
    trainer.model[3].bias.data[1] = 50.0  # so that the model itself says class 1
    trainer.fit(data, data, n=1)
    other = {"train": "valid", "valid": "train"}[phase]
    assert trainer.state.metrics[f"{phase}_accuracy"] == 1 != trainer.state.metrics[f"{other}_accuracy"]


def test_a_loss_may_be_changed_before_it_is_optimized():
    def free(trainer):
        trainer.state.output.loss = trainer.state.output.loss * 0

    trainer = make_trainer(at("after_loss", free))
    before = weights_of(trainer)
    trainer.fit(batches(), n=1)
    assert torch.equal(weights_of(trainer), before)


@pytest.mark.parametrize("event", ["after_evaluate", "after_epoch"])
def test_a_result_may_be_added(event):
    trainer = make_trainer(at(event, lambda trainer: trainer.state.metrics.update(mine=1.5)))
    trainer.fit(batches(2), batches(1), n=1)
    assert trainer.state.metrics["mine"] == 1.5


# ---- control


def test_a_skipped_batch_is_counted_but_neither_trained_nor_measured():
    def ask(trainer):
        if trainer.state.batch == 1:
            trainer.skip_batch("strange")

    skipped, without = make_trainer(at("before_batch", ask)), make_trainer()
    data = batches(3)
    torch.manual_seed(1)
    skipped.fit(data, n=1)
    torch.manual_seed(1)
    without.fit([data[0], data[2]], n=1)
    assert torch.equal(weights_of(skipped), weights_of(without))
    assert skipped.state.metrics == without.state.metrics
    assert (skipped.state.batch, skipped.state.samples, skipped.state.step) == (3, 8, 2)
    assert skipped.state.control == [{"what": "skip_batch", "why": "strange", "epoch": 0, "batch": 1}]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_drops_the_gradients_of_its_window(accumulate):
    diary = make_diary()
    trainer = make_trainer(
        at("before_step", lambda trainer: trainer.skip_step("too large")), diary, accumulate=accumulate
    )
    before = weights_of(trainer)
    trainer.fit(batches(4), n=1)
    assert torch.equal(weights_of(trainer), before) and trainer.state.step == 0 and trainer.state.batch == 4
    assert "after_step" not in [event for event, _ in diary.entries]
    assert [(one["what"], one["why"]) for one in trainer.state.control] == [("skip_step", "too large")] * (
        4 // accumulate
    )
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_skipped_step_of_one_optimizer_leaves_the_other_alone():
    def ask(trainer):
        if trainer.state.optimizer == "first":
            trainer.skip_step("frozen for now")

    trainer = two_part_trainer(at("before_step", ask))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.fit(batches(2), n=1)
    changed = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters())]
    assert changed == [False, False, True, True]


@pytest.mark.parametrize("event", ["before_batch", "after_loss", "before_step", "after_step", "after_batch"])
def test_an_epoch_that_is_ended_ends_after_its_batch_and_is_evaluated(event):
    def ask(trainer):
        if trainer.state.epoch_batch + (event != "after_batch") == 2:
            trainer.end_epoch("long enough")

    evaluated = []
    trainer = make_trainer(
        at(event, ask), at("after_evaluate", lambda trainer: evaluated.append(trainer.state.batch))
    )
    trainer.fit(batches(5), batches(1), n=3)
    assert (trainer.state.epoch, trainer.state.batch, evaluated) == (3, 6, [2, 4, 6])
    assert [(one["what"], one["why"]) for one in trainer.state.control] == [("end_epoch", "long enough")] * 3


STOPS = {"before_fit": 0, "before_epoch": 1, "after_evaluate": 5, "after_validate": 5, "after_epoch": 5}  # batches done; else 1


@pytest.mark.parametrize("event", TRAINING[:-1] + ["after_evaluate"])
def test_stopping_ends_the_fit_after_the_batch_or_epoch(event):
    trainer = make_trainer(at(event, lambda trainer: trainer.stop("good enough")))
    trainer.fit(batches(5), batches(1), n=3)
    assert trainer.state.batch == STOPS.get(event, 1)
    assert [(one["what"], one["why"]) for one in trainer.state.control] == [("stop", "good enough")]


def test_an_epoch_that_was_stopped_stays_open_for_the_next_fit():
    seen, diary = [], make_diary()
    trainer = make_trainer(
        at("before_batch", lambda trainer: seen.append(trainer.state.current_batch.ids.tolist()))
    )
    loader = Loaders.from_arrays(torch.randn(20, 2), torch.zeros(20).long(), batch_size=4, seed=1).train
    trainer.fit(loader, n=1, callbacks=[at("after_batch", lambda trainer: trainer.stop("enough for today"))])
    assert (trainer.state.epoch, trainer.state.epoch_batch) == (0, 1)
    trainer.fit(loader, n=1, callbacks=[diary])
    assert seen == [batch.ids.tolist() for batch in loader.batches(0)] and trainer.state.epoch == 1
    assert "before_epoch" not in [event for event, _ in diary.entries], "it goes on inside the epoch"


def test_stopping_at_the_last_batch_of_an_epoch_leaves_no_empty_epoch_to_the_next_fit():
    def ask(trainer):
        if trainer.state.batch == 3:
            trainer.stop("now")

    trainer = make_trainer(at("after_batch", ask))
    trainer.fit(batches(3), n=5)
    trainer.fit(batches(3), n=1)
    assert trainer.state.batch == 6


@pytest.mark.parametrize("request_", ["skip_batch", "skip_step", "end_epoch", "stop"])
@pytest.mark.parametrize("why", ["", None, 3])
def test_every_request_needs_a_reason(request_, why):
    trainer = make_trainer()
    with pytest.raises(ValueError, match=f"{request_} got the reason"):
        getattr(trainer, request_)(why)


def test_a_request_of_one_fit_does_not_reach_into_the_next():
    trainer = make_trainer()
    trainer.fit(batches(3), n=2, callbacks=[at("after_batch", lambda trainer: trainer.stop("once"))])
    trainer.fit(batches(3), n="4ba")
    assert trainer.state.batch == 5 and trainer.state.ending == "finished"


# ---- log


@pytest.mark.parametrize("make", [float, lambda value: torch.tensor(float(value))])
def test_what_is_logged_is_averaged_over_the_epoch(make):
    trainer = make_trainer(at("after_step", lambda trainer: trainer.log("turn", make(trainer.state.batch))))
    trainer.fit(batches(4), n=2)
    assert trainer.state.metrics["turn"] == (4 + 5 + 6 + 7) / 4


@pytest.mark.parametrize("event", ["before_epoch", "after_batch", "after_evaluate", "after_epoch"])
def test_what_is_logged_at_any_event_of_an_epoch_is_recorded(event):
    trainer = make_trainer(at(event, lambda trainer: trainer.log("mine", 2.0)))
    trainer.fit(batches(2), batches(1), n=1)
    assert [value for name, value in trainer.state.metrics.items() if name.endswith("mine")] == [2.0]


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("loss", 1.0, "a metric has that name"),
        ("train_mine", 1.0, "a result or a counter has that name"),
        ("valid_mine", 1.0, "a result or a counter has that name"),
        ("epoch", 1.0, "a result or a counter has that name"),
        ("mine", torch.ones(2), "scalar"),
    ],
)
def test_what_cannot_be_logged_is_an_error(name, value, text):
    trainer = make_trainer(at("after_batch", lambda trainer: trainer.log(name, value)))
    with pytest.raises(ValueError, match=text):
        trainer.fit(batches(2), batches(1), n=1)


def test_logging_outside_of_a_fit_is_an_error():
    with pytest.raises(RuntimeError, match="outside of a fit"):
        make_trainer().log("mine", 1.0)


def test_logs_of_the_step_are_results_on_both_sets():
    class Chatty(SupervisedStep):
        def train(self, trainer, batch):
            output = super().train(trainer, batch)
            output.logs = {"size": torch.tensor(3.0)}
            return output

    trainer = make_trainer(step=Chatty(nn.CrossEntropyLoss()))
    trainer.fit(batches(2), batches(1), n=1)
    assert trainer.state.metrics["train_size"] == 3 == trainer.state.metrics["valid_size"]


# ---- on(event, fn)

BATCHES_AT = {  # options, and after how many of 12 batches (3 epochs of 4, 2 batches a step) it is called
    "after_batch": [
        ({}, range(1, 13)),
        ({"every": "5ba"}, [5, 10]),
        ({"once": True}, [1]),
        ({"after": "9ba"}, [10, 11, 12]),
        ({"before": "2ba"}, [1, 2]),
        ({"every": "4ba", "after": "4ba", "before": "8ba"}, [8]),
        ({"every": "2st"}, [4, 8, 12]),
        ({"after": "9ba", "once": True}, [10]),
        ({"after": "2ep"}, [9, 10, 11, 12]),
        ({"every": "30m"}, []),
    ],
    "after_epoch": [({"every": 2}, [8]), ({"every": "2ep", "after": "2ep"}, []), ({"once": True}, [4])],
    "after_step": [({"every": "3st"}, [5, 11]), ({"before": "1st"}, [1])],
}


@pytest.mark.parametrize(
    "event, options, expected", [(e, o, x) for e, rows in BATCHES_AT.items() for o, x in rows]
)
def test_an_attached_function_is_called_when_its_conditions_hold(event, options, expected):
    seen = []
    trainer = make_trainer(accumulate=2)
    trainer.on(event, lambda trainer: seen.append(trainer.state.batch), **options)
    trainer.fit(batches(4), n=3)
    assert seen == list(expected)


@pytest.mark.parametrize(
    "event, options, error, text",
    [
        ("after_bach", {}, ValueError, "after_batch"),
        ("after_batch", {"every": "5 parsecs"}, ValueError, "duration"),
        ("after_batch", {"before": "5m"}, ValueError, "before='5m' is a time"),
    ],
)
def test_attaching_with_a_mistake_is_an_error_at_once(event, options, error, text):
    with pytest.raises(error, match=text):
        make_trainer().on(event, print, **options)


def test_attaching_during_a_fit_is_an_error():
    trainer = make_trainer(at("after_batch", lambda trainer: trainer.on("after_batch", print)))
    with pytest.raises(RuntimeError, match="attach functions before it"):
        trainer.fit(batches(1), n=1)


# ---- errors say where


def test_an_error_in_a_callback_names_callback_event_epoch_and_batch():
    trainer = make_trainer(
        type("Clumsy", (Callback,), {"after_batch": lambda self, t, r=Raising(5, KeyError("k")): r(t)})()
    )
    with pytest.raises(KeyError) as caught:
        trainer.fit(batches(3), n=2)
    notes = " ".join(caught.value.__notes__)
    for text in ("Clumsy", "after_batch", "epoch 1", "batches done: 5", "phase train"):
        assert text in notes


def test_an_error_in_the_model_says_which_batch_was_in_hand():
    data = [*batches(2), (torch.zeros(4, 3), torch.zeros(4).long())]
    with pytest.raises(RuntimeError) as caught:
        make_trainer().fit(data, n=1)
    notes = " ".join(caught.value.__notes__)
    assert (
        "epoch 0" in notes
        and "batches done: 2" in notes
        and "4, 3" in notes.replace("×", ", ").replace("x", ", ")
    )


def test_an_error_in_validation_says_so():
    trainer = make_trainer(at("after_evaluate_batch", Raising(1, KeyError("k"))))
    with pytest.raises(KeyError) as caught:
        trainer.fit(batches(3), batches(2), n=2)
    assert any("phase valid" in note for note in caught.value.__notes__)


def test_a_fit_inside_a_fit_is_an_error():
    trainer = make_trainer(at("after_batch", lambda trainer: trainer.fit(batches(1))))
    with pytest.raises(RuntimeError, match="during a fit"):
        trainer.fit(batches(1), n=1)


# ---- what a fit leaves behind


def snapshot_of_settings(trainer):
    model = trainer.model
    return (
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [group["lr"] for slot in trainer.engine.slots.values() for group in slot.optimizer.param_groups],
        vars(trainer.handlers),
        trainer.state.phase,
        trainer.plan,
        trainer.state.current_batch,
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize(
    "event", ["before_fit", "after_loss", "after_step", "after_evaluate_batch", "after_fit"]
)
@pytest.mark.parametrize("how", ["finished", "stopped", "interrupted", "failed"])
def test_what_a_fit_changed_for_itself_is_restored_however_it_ends(how, event):
    trainer = make_trainer()
    trainer.model[1].eval()  # on purpose, as one freezes batch norm
    trainer.model[0].weight.requires_grad_(False)
    before = snapshot_of_settings(trainer)
    act = {
        "finished": print,
        "stopped": lambda trainer: trainer.stop("enough"),
        "interrupted": Raising(1, KeyboardInterrupt()),
        "failed": Raising(1, ValueError("no")),
    }[how]
    callback = at(event, act if how != "finished" else lambda trainer: None)
    try:
        trainer.fit(batches(3), batches(2), n=2, schedule=linear(), callbacks=[callback])
    except (KeyboardInterrupt, ValueError):
        assert how in ("interrupted", "failed")
    assert snapshot_of_settings(trainer) == before


@pytest.mark.parametrize("method", ["evaluate", "predict"])
@pytest.mark.parametrize("error", [None, ValueError("no")])
def test_an_evaluation_leaves_modes_generators_and_gradients_as_they_were(method, error):
    trainer = make_trainer()
    trainer.model[1].eval()
    if error:
        trainer.on("after_evaluate_batch", Raising(2, error))
    trainer.on("before_evaluate_batch", lambda trainer: torch.rand(3))
    before, drawn = snapshot_of_settings(trainer), torch.get_rng_state()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    try:
        getattr(trainer, method)(batches(3))
    except ValueError:
        assert error
    assert snapshot_of_settings(trainer) == before and torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_learning_rate_in_a_tensor_follows_the_schedule_and_is_restored():
    model, seen = nn.Linear(2, 2), []
    lr = torch.tensor(0.5)
    trainer = Trainer(model, SupervisedStep(nn.CrossEntropyLoss()), optim.SGD(model.parameters(), lr=lr))
    trainer.on("before_step", lambda trainer: seen.append(lr.item()))
    trainer.fit(batches(3), n=1, schedule=linear())
    assert seen == [0.5, 0.25, 0.0] and lr.item() == 0.5


# ---- counters and names


def test_counters_count_the_whole_run():
    trainer, data = make_trainer(accumulate=2), batches(5)
    counters = []
    trainer.on(
        "after_fit",
        lambda trainer: counters.append(
            [getattr(trainer.state, name) for name in ("epoch", "batch", "step", "samples", "epoch_batch")]
        ),
    )
    trainer.fit(data, n=2)
    trainer.fit(data, n="7ba")
    trainer.fit(data, n=1)
    assert counters == [[2, 10, 6, 40, 0], [3, 17, 10, 68, 2], [4, 20, 12, 80, 0]]


def test_an_open_epoch_belongs_to_its_data_and_other_data_begins_one():
    trainer = make_trainer()
    trainer.fit(batches(5), n="2ba")
    trainer.fit(batches(3), n=1)
    assert (trainer.state.batch, trainer.state.epoch_batch) == (5, 0)


@pytest.mark.parametrize("data", [batches(5), iter(batches(5))], ids=["known length", "unknown length"])
def test_an_accumulation_window_ends_with_its_fit(data):
    trainer = make_trainer(accumulate=4)
    steps = []
    trainer.on("before_step", lambda trainer: steps.append(trainer.state.batch))
    trainer.fit(data, n="5ba")
    assert trainer.state.step == 2 and all(p.grad is None for p in trainer.model.parameters())


def test_an_accumulation_window_that_is_stopped_still_steps():
    def ask(trainer):
        if trainer.state.batch == 2:
            trainer.stop("enough")

    trainer = make_trainer(at("after_batch", ask), accumulate=4)
    before = weights_of(trainer)
    trainer.fit(batches(5), n=1)
    assert trainer.state.step == 1 and not torch.equal(weights_of(trainer), before)


def test_results_are_named_after_set_and_metric_and_are_floats():
    trainer = make_trainer(metrics=[Accuracy()])
    trainer.fit(batches(3), batches(2), n=1)
    assert set(trainer.state.metrics) == {"train_loss", "valid_loss", "train_accuracy", "valid_accuracy"}
    assert all(type(value) is float and math.isfinite(value) for value in trainer.state.metrics.values())


def test_named_validation_sets_have_their_names_and_their_own_metrics():
    wrong = [(x, 1 - y) for x, y in batches(2)]
    trainer = make_trainer(metrics=[Accuracy()])
    seen = []
    trainer.on(
        "after_evaluate", lambda trainer: seen.append((trainer.state.loader, dict(trainer.state.metrics)))
    )
    trainer.fit(batches(3), {"clean": batches(2), "noisy": wrong}, n=1)
    metrics = trainer.state.metrics
    assert metrics["clean_accuracy"] == pytest.approx(1 - metrics["noisy_accuracy"])
    assert [name for name, _ in seen] == ["clean", "noisy"] and "clean_loss" in seen[0][1]
    assert "noisy_loss" not in seen[0][1] and "noisy_loss" in seen[1][1] and "valid_loss" not in metrics


def test_evaluation_counts_each_sample_once():
    inputs, targets = torch.randn(7, 2), torch.tensor([0, 1, 0, 1, 0, 1, 1])
    trainer = make_trainer(metrics=[Accuracy()])
    loader = Loaders.from_arrays(inputs, targets, batch_size=3, shuffle=True, drop_last=True, seed=0).train
    results = trainer.evaluate(loader)
    trainer.model.eval()
    with torch.no_grad():
        scores = trainer.model(inputs)
    assert results["loss"] == pytest.approx(F.cross_entropy(scores, targets).item(), rel=1e-6)
    assert results["accuracy"] == pytest.approx((scores.argmax(1) == targets).float().mean().item())


# ---- how long


def test_several_fits_go_on_with_the_order_of_the_data():
    seen = []
    trainer = make_trainer(
        at("before_batch", lambda trainer: seen.append(trainer.state.current_batch.ids.tolist()))
    )
    loader = Loaders.from_arrays(torch.randn(20, 2), torch.zeros(20).long(), batch_size=4, seed=1).train
    for duration in (1, "3ba", "4ba", 1, 1):
        trainer.fit(loader, n=duration)
    expected = [batch.ids.tolist() for epoch in range(4) for batch in loader.batches(epoch)]
    assert seen == expected[: len(seen)] and (trainer.state.epoch, trainer.state.epoch_batch) == (4, 0)


@pytest.mark.parametrize(
    "n, batches_done, steps", [(2, 10, 6), ("2ep", 10, 6), ("7ba", 7, 4), ("4st", 7, 4), ("5ba", 5, 3)]
)
def test_a_duration_has_a_unit(n, batches_done, steps):
    trainer = make_trainer(accumulate=2)
    trainer.fit(batches(5), n=n)
    assert (trainer.state.batch, trainer.state.step) == (batches_done, steps)


def test_a_duration_of_time_ends():
    trainer = make_trainer()
    trainer.fit(batches(5), n="0.05s", schedule=linear())
    assert trainer.state.batch >= 1 and trainer.state.ending == "finished"


@pytest.mark.parametrize(
    "every, at_batches",
    [
        ("1ep", [5, 10]),
        ("2ep", [10]),
        (None, []),
        ("3ba", [3, 6, 9, 10]),
        ("5ba", [5, 10]),
        ("2st", [4, 8, 10]),
    ],
)
def test_validation_comes_as_often_as_asked_and_at_the_end(every, at_batches):
    seen = []
    trainer = make_trainer(
        at("after_evaluate", lambda trainer: seen.append(trainer.state.batch)), accumulate=2
    )
    trainer.fit(batches(5), batches(1), n=2, validate_every=every)
    if every == "2st":  # steps at 2, 4, 5 and 7, 9, 10
        at_batches = [4, 7, 10]
    assert seen == at_batches


def test_validation_by_steps_waits_for_a_step():
    seen = []
    trainer = make_trainer(
        at("after_evaluate", lambda trainer: seen.append((trainer.state.batch, trainer.state.step)))
    )
    trainer.on("before_step", lambda trainer: trainer.skip_step("too large"), before="3ba")
    trainer.fit(batches(6), batches(1), n="6ba", validate_every="2st")
    assert seen == [(5, 2), (6, 3)]


def test_validation_by_steps_waits_for_a_step_of_this_fit():
    """The steps of a fit without validation were no reason to validate in the middle of a window of the next."""
    seen = []
    trainer = make_trainer(at("after_evaluate", lambda trainer: seen.append(trainer.state.batch)), accumulate=2)
    trainer.fit(batches(20), None, n=1)
    trainer.fit(batches(20), batches(1), n=1, validate_every="5st")
    assert seen == [30, 40]


@pytest.mark.parametrize("n", [1, "3ba"])
def test_nothing_is_validated_without_a_validation_set_and_the_training_is_measured(n):
    seen = []
    trainer = make_trainer(at("after_validate", lambda trainer: seen.append(trainer.state.batch)))
    trainer.fit(batches(5), None, n=n)
    assert seen == [] and "train_loss" in trainer.state.metrics


def test_limit_batches_shortens_epochs_and_validation():
    seen = []
    trainer = make_trainer(at("after_evaluate_batch", lambda trainer: seen.append(trainer.state.batch)))
    trainer.fit(batches(5), batches(4), n=2, limit_batches=2)
    assert (trainer.state.epoch, trainer.state.batch, seen) == (2, 4, [2, 2, 4, 4])


class Stream(IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter([(x, y) for x, y in batches(self.n)])


def test_a_loader_without_a_length_needs_a_duration_in_batches():
    with pytest.raises(ValueError, match="500ba"):
        make_trainer().fit(DataLoader(Stream(3), batch_size=None), n=2)


def test_a_loader_without_a_length_is_read_again_for_each_epoch():
    trainer = make_trainer(accumulate=2)
    trainer.fit(DataLoader(Stream(3), batch_size=None), n="8ba")
    assert (trainer.state.batch, trainer.state.epoch, trainer.state.step) == (8, 2, 5)


def test_a_limit_gives_a_loader_without_a_length_one():
    trainer = make_trainer()
    trainer.fit(DataLoader(Stream(9), batch_size=None), n=2, limit_batches=4)
    assert (trainer.state.epoch, trainer.state.batch) == (2, 8)


def generate(n):
    yield from batches(n)


@pytest.mark.parametrize(
    "make", [lambda: iter(batches(6)), lambda: generate(6)], ids=["iterator", "generator"]
)
def test_a_one_shot_iterator_is_used_up_fit_by_fit(make):
    trainer, data = make_trainer(), make()
    trainer.fit(data, n="2ba")
    trainer.fit(data, n="4ba")
    assert trainer.state.batch == 6 and list(data) == []


def test_a_one_shot_iterator_that_is_too_short_is_an_error():
    with pytest.raises(ValueError, match="can be read only once"):
        make_trainer().fit(iter(batches(3)), n="5ba")


def test_a_one_shot_iterator_cannot_be_trained_by_epochs_or_validate():
    with pytest.raises(ValueError, match="500ba"):
        make_trainer().fit(iter(batches(3)), n=1)
    with pytest.raises(TypeError, match="read again"):
        make_trainer().fit(batches(3), iter(batches(3)), n=1)


def test_looking_at_a_loader_before_a_fit_does_not_read_it():
    class Counting(list):
        opened = 0

        def __iter__(self):
            self.opened += 1
            return super().__iter__()

    data = Counting(batches(3))
    make_trainer().fit(data, n=2)
    assert data.opened == 2
