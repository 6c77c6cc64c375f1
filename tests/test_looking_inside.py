"""What looks inside of a training: right numbers, no trace left behind, and the same weights as without."""

import itertools
import json

import pytest
import torch
from torch import nn

from nbdev_trainer import (
    ActivationStatistics,
    AnomalyDetection,
    Batch,
    Callback,
    FusedAdamW,
    GradientNorms,
    Learner,
    ManualStep,
    NonFinite,
    NonFiniteError,
    Profiler,
    Recorder,
    StepOutput,
    SupervisedStep,
    TimeSplit,
    Trainer,
)
from nbdev_trainer.callbacks.culprits import in_step, torch_rng
from nbdev_trainer.callbacks.stopping import FiniteLoss
from nbdev_trainer.core.wrapping import wrap
from nbdev_trainer.scale.precision import Autocast, Scaled
from nbdev_trainer.testing import assert_same_weights, tiny_loaders, tiny_model, tiny_trainer

TOOLS = {
    "TimeSplit": TimeSplit,
    "Profiler": lambda: Profiler(start=1, batches=2),
    "ActivationStatistics": lambda: ActivationStatistics(every=2),
    "GradientNorms": lambda: GradientNorms("part", every=2),
    "NonFinite": NonFinite,
    "NonFinite, read later": lambda: NonFinite(every=4),
    "AnomalyDetection": AnomalyDetection,
}


def all_tools():
    return [make() for make in TOOLS.values()]


def traces(trainer):
    """Everything that a tool might leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "trainer": sorted(name for name, value in vars(trainer).items() if type(value).__name__ == "Wrapped"),
        "engine": sorted(vars(trainer.engine)),
        "precision": sorted(vars(trainer.engine.precision)),
        "metrics": sorted(vars(trainer.train_metrics)),
        "hooks": [len(getattr(module, name)) for module in trainer.model.modules() for name in hooks],
        "modes": [module.training for module in trainer.model.modules()],
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "profiler": torch.autograd.profiler._is_profiler_enabled,
    }


class Raise(Callback):
    """Raises at the n-th call of an event."""

    def __init__(self, event, error, at=3):
        self.event, self.error, self.at = event, error, at

    def handles(self):
        calls = itertools.count(1)

        def handler(trainer):
            if next(calls) == self.at:
                raise self.error

        from nbdev_trainer import Event

        return {Event[self.event]: handler}


def fit(tools=(), n=2, **options):
    torch.manual_seed(1)
    loaders, trainer = tiny_loaders(), tiny_trainer(tools, **options)
    trainer.fit(loaders.train, loaders.valid, n=n)
    return trainer


@pytest.mark.parametrize("name", TOOLS)
def test_weights_and_generators_are_those_of_a_run_without(name):
    plain = fit(accumulate=2, clip_norm=0.5)
    state = torch.get_rng_state()
    looked = fit([TOOLS[name]()], accumulate=2, clip_norm=0.5)
    assert_same_weights(plain.model, looked.model)
    assert torch.get_rng_state().equal(state)
    assert traces(looked) == traces(plain)


def test_all_of_them_together_change_nothing_with_the_fused_optimizer():
    models = []
    for tools in ([], all_tools()):
        torch.manual_seed(1)
        model, loaders = tiny_model(), tiny_loaders()
        optimizer = FusedAdamW(model.parameters(), lr=0.05)
        trainer = Trainer(model, SupervisedStep(nn.CrossEntropyLoss()), optimizer, callbacks=tools)
        trainer.fit(loaders.train, loaders.valid, n=3)
        models.append(trainer.model)
    assert_same_weights(*models)


@pytest.mark.parametrize("error", [ZeroDivisionError("planned"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize(
    ("event", "at"), [("before_fit", 1), ("before_batch", 3), ("after_backward", 3), ("after_step", 2), ("after_fit", 1)])
def test_nothing_is_left_after_a_fit_that_failed(event, at, error):
    before = traces(tiny_trainer())
    for tools in ([*all_tools(), Raise(event, error, at)], [Raise(event, error, at), *all_tools()]):
        loaders, trainer = tiny_loaders(), tiny_trainer(tools)
        with pytest.raises(type(error)):
            trainer.fit(loaders.train, loaders.valid, n=1)
        assert traces(trainer) == before
        trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, Raise)]
        trainer.fit(loaders.train, loaders.valid, n=1)  # the tools work again
        assert traces(trainer) == before


def test_wrappings_of_one_method_leave_in_any_order():
    class Owner:
        def number(self):
            return 1

    for order in itertools.permutations(range(3)):
        owner = Owner()
        undo = [wrap(owner, "number", lambda number, k=k: number() * (k + 2)) for k in range(3)]
        assert owner.number() == 2 * 3 * 4
        for k in order:
            undo[k]()
        assert owner.number() == 1 and not vars(owner)


# TimeSplit


class Clock:
    """A clock that only moves when something takes time."""

    now = 0.0

    def __call__(self):
        return self.now

    def takes(self, seconds):
        self.now += seconds


def test_each_second_of_a_fit_is_in_the_part_it_was_spent_in():
    clock = Clock()

    class SlowLoader(list):
        def __iter__(self):
            for batch in super().__iter__():
                clock.takes(5.0)
                yield batch

    class SlowModel(nn.Linear):
        def forward(self, inputs):
            clock.takes(0.5 if not self.training else 3.0)
            return super().forward(inputs)

    class SlowOptimizer(torch.optim.SGD):
        def step(self, closure=None):
            clock.takes(0.25)
            return super().step(closure)

    class SlowCallback(Callback):
        def after_backward(self, trainer):
            clock.takes(2.0)

        def after_epoch(self, trainer):
            clock.takes(10.0)

    def slow_batch(raw):
        clock.takes(0.125)
        return Batch(*raw)

    torch.manual_seed(0)
    train = SlowLoader([(torch.randn(2, 4), torch.randn(2, 1)) for _ in range(4)])
    model, split = SlowModel(4, 1), TimeSplit(clock=clock)
    trainer = Trainer(model, SupervisedStep(nn.MSELoss()), SlowOptimizer(model.parameters(), lr=0.1),
                      callbacks=[SlowCallback(), split], as_batch=slow_batch, accumulate=2)
    trainer.fit(train, [(torch.randn(2, 4), torch.randn(2, 1))] * 3, n=2)
    seconds = split.summary().seconds
    assert seconds == {"data": 8 * 5.125, "copy": 0, "forward": 8 * 3.0, "backward": 0, "step": 4 * 0.25, "metrics": 0,
                       "callbacks": 8 * 2.0 + 2 * 10.0, "validation": 2 * 3 * (0.5 + 0.125), "rest": 0}
    assert sum(seconds.values()) == clock.now == split.summary().total
    assert split.summary().batches == 8


def test_time_of_a_manual_step_is_divided_too():
    clock = Clock()

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            clock.takes(7.0)
            return gradient

    class Manual(ManualStep):
        def train(self, trainer, batch):
            clock.takes(1.0)
            loss = Backward.apply(trainer.model(batch.inputs)).mean()
            trainer.optimize(loss)
            return StepOutput(loss=loss)

    model, split = nn.Linear(2, 1), TimeSplit(clock=clock)
    trainer = Trainer(model, Manual(), torch.optim.SGD(model.parameters(), lr=0.1), callbacks=[split])
    trainer.fit([(torch.ones(2, 2), torch.ones(2, 1))] * 3)
    assert (split.summary().seconds["forward"], split.summary().seconds["backward"]) == (3.0, 21.0)


# Profiler


def test_only_the_batches_of_the_window_are_in_the_trace(tmp_path):
    profiler = Profiler("3ba", 2, path=tmp_path / "trace.json", memory=True, shapes=True)
    fit([profiler])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events]
    assert names.count("batch") == names.count("forward") == names.count("backward") == 2
    assert {one.name: one.calls for one in profiler.summary().operators}["aten::addmm"] == 2 * 2
    assert any(one.memory for one in profiler.summary().operators)


def test_a_window_at_the_end_of_a_fit_is_ended_with_it(tmp_path):
    profiler = Profiler(start=10, batches=50, path=tmp_path / "trace.json.gz")
    fit([profiler])  # 12 batches
    assert profiler.heard.batches == 2 and profiler.written.stat().st_size > 0


# Statistics


def test_numbers_of_activations_are_those_of_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))
    with torch.no_grad():
        model[0].bias[2] = -100.0  # one unit of five is dead
    batches = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(4)]
    expected = {}
    inside = model[:2]
    trainer = Trainer(model, SupervisedStep(nn.MSELoss()), torch.optim.SGD(model.parameters(), lr=0.1),
                      callbacks=[statistics := ActivationStatistics("1", every=3)])
    trainer.on("before_batch", lambda trainer: expected.update(
        {trainer.state.batch: inside(trainer.state.current_batch.inputs).detach()}))
    trainer.fit(batches)
    assert [row["batch"] for row in statistics.rows] == [0, 3]
    for row in statistics.rows:
        values = expected[row["batch"]]
        assert row["mean"] == pytest.approx(values.mean().item(), rel=1e-5)
        assert row["std"] == pytest.approx(values.std(correction=0).item(), rel=1e-5)
        assert row["near_zero"] == pytest.approx((values.abs() <= 0.05).float().mean().item())
        assert row["dead"] == pytest.approx((values.amax(0) == values.amin(0)).float().mean().item())
    assert statistics.rows[0]["dead"] >= 0.2


def test_validation_is_not_among_the_statistics():
    statistics = ActivationStatistics(every=1)

    class Evaluates(Callback):
        def before_step(self, trainer):
            trainer.evaluate(tiny_loaders().valid)

    fit([statistics, Evaluates()], n=1)
    assert len(statistics.rows) == 6 * 5  # batches, modules without parts


def test_norms_are_those_before_clipping_of_the_whole_window():
    loaders = tiny_loaders()
    clipped = GradientNorms("parameter", every=1)
    trainer = tiny_trainer([clipped], accumulate=2, clip_norm=1e-4)
    trainer.model[3].p = 0.0
    whole = tiny_model().double().train()
    whole[3].p = 0.0
    batches = [*loaders.train.batches(0)][:2]
    trainer.fit([(batch.inputs, batch.targets) for batch in batches], n=1)
    losses = [nn.functional.cross_entropy(whole(batch.inputs.double()), batch.targets) for batch in batches]
    torch.stack(losses).mean().backward()
    norms = {row["part"]: row["gradient"] for row in clipped.rows}
    assert norms == {name: pytest.approx(p.grad.norm().item(), rel=1e-4, abs=1e-6)
                     for name, p in whole.named_parameters()}


def test_the_size_of_updates_is_what_the_step_has_changed():
    norms = GradientNorms("parameter", every=1)
    trainer = fit([norms], n=1)
    torch.manual_seed(1)
    loaders, again = tiny_loaders(), tiny_trainer()
    before, after = {}, {}
    copy = lambda model: {name: p.detach().clone() for name, p in model.named_parameters()}  # noqa: E731
    again.on("before_step", lambda trainer: before.update(copy(trainer.model)))
    again.on("after_step", lambda trainer: after.update(copy(trainer.model)))
    again.fit(loaders.train, loaders.valid, n=1)
    last = [row for row in norms.rows if row["step"] == trainer.state.step]
    assert len(last) == len(before)
    for row in last:
        moved = (after[row["part"]] - before[row["part"]]).norm().item()
        assert row["update"] == pytest.approx(moved, rel=1e-4)
        assert row["ratio"] == pytest.approx(moved / before[row["part"]].norm().item(), rel=1e-4)


class TwoParts(ManualStep):
    """Two optimizers, the second at every third batch only."""

    def train(self, trainer, batch):
        loss = nn.functional.cross_entropy(trainer.model(batch.inputs), batch.targets)
        trainer.optimize(loss, "often", retain_graph=True)
        if trainer.state.batch % 3 == 0:
            trainer.optimize(nn.functional.cross_entropy(trainer.model(batch.inputs), batch.targets), "seldom")
        return StepOutput(loss=loss)


def test_each_optimizer_has_its_own_looks():
    model, norms, recorder = tiny_model(), GradientNorms(every="2st"), Recorder()
    optimizers = {"often": torch.optim.SGD(model[:2].parameters(), lr=0.1),
                  "seldom": torch.optim.SGD(model[4].parameters(), lr=0.1)}
    trainer = Trainer(model, TwoParts(), optimizers, callbacks=[norms, recorder, *all_tools()])
    trainer.fit(tiny_loaders().train, n=2)  # 12 batches
    seen = {name: [row["step"] for row in norms.rows if row["optimizer"] == name] for name in optimizers}
    assert seen == {"often": [1, 3, 5, 7, 9, 11], "seldom": [1, 3]}
    assert all(row["update"] > 0 for row in norms.rows)
    assert {"gradient_norm_often", "gradient_norm_seldom"} <= set(recorder.history.columns)
    assert not norms.state_dict()["records"][0]["gradient"]["group 0"].requires_grad


def test_a_step_that_is_left_out_has_no_update():
    norms = GradientNorms(every=1)
    trainer = tiny_trainer([norms])
    trainer.on("before_step", lambda trainer: trainer.skip_step("planned"), once=True)
    trainer.fit(tiny_loaders().train, n=1)
    assert [row["update"] is None for row in norms.rows] == [True] + [False] * 5


# NonFinite


class Spoil(Callback):
    """Puts a value into the first input of one batch."""

    def __init__(self, at, value):
        self.at, self.value = at, value

    def before_batch(self, trainer):
        if trainer.state.batch == self.at:
            trainer.state.current_batch.inputs = trainer.state.current_batch.inputs.clone()
            trainer.state.current_batch.inputs[2, 1] = self.value


@pytest.mark.parametrize("every", [None, 1, 4, 100])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_broken_batch_is_named_whenever_the_host_looks(every, value):
    nonfinite = NonFinite(every=every)
    trainer = tiny_trainer([Spoil(5, value), nonfinite])
    with pytest.raises(NonFiniteError, match="of batch 5 with the samples") as caught:
        trainer.fit(tiny_loaders().train, n=3)
    error = caught.value
    assert (error.number, error.culprit.kind) == (5, "inputs")
    assert str([int(error.batch.ids[2])]) in error.culprit.text
    assert error is nonfinite.error and not error.batch.inputs[2, 1].isfinite()


def test_looked_at_in_time_the_weights_are_those_before_the_batch():
    good = tiny_trainer()
    torch.manual_seed(1)
    good.fit(tiny_loaders().train, n="5ba")
    broken = tiny_trainer([Spoil(5, float("nan")), NonFinite()])
    torch.manual_seed(1)
    with pytest.raises(NonFiniteError):
        broken.fit(tiny_loaders().train, n=1)
    assert_same_weights(nn.Sequential(good.model[0], good.model[4]), nn.Sequential(broken.model[0], broken.model[4]))


class Fragile(nn.Module):
    """Breaks where it is told to."""

    def __init__(self, where):
        super().__init__()
        self.where, self.body, self.head, self.scale = where, nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.ones(3))
        self.part = Broken() if where == "part" else nn.Identity()
        if where == "parameter":
            self.scale.data[1] = float("inf")
        if where == "infinite slope":
            self.scale.data.zero_()

    def forward(self, x):
        x = self.part(self.body(x))
        if self.where == "between":
            x = x / (x - x)
        x = self.head(x)
        if self.where == "end":
            x = x * float("nan")
        if self.where == "slope":
            x = (x * 0).abs().sqrt() + x
        return x + self.scale.sqrt() if self.where == "infinite slope" else x * self.scale


class Broken(nn.Module):
    def forward(self, x):
        return x.log()


@pytest.mark.parametrize(("where", "kind", "name", "text"), [
    ("part", "module", "part", r"Module 'part' \(Broken\) was the first"),
    ("between", "module", "head", "made in the forward of 'the model itself', between its parts"),
    ("end", "module", "", "in its own forward and not in one of its parts"),
    ("parameter", "parameter", "scale", "The parameter 'scale' was broken before this batch"),
    ("slope", "gradient", "body.weight", "sqrt"),
    ("infinite slope", "gradient", "scale", "The first parameter whose gradient is not finite is 'scale'"),
])
@pytest.mark.parametrize("every", [1, 3])
def test_the_one_who_made_it_is_named(where, kind, name, text, every):
    torch.manual_seed(0)
    model = Fragile(where)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(model, SupervisedStep(nn.CrossEntropyLoss()), optimizer, callbacks=[NonFinite(every=every)])
    with pytest.raises(NonFiniteError, match=text) as caught:
        trainer.fit(tiny_loaders().train, n=1)
    assert (caught.value.culprit.kind, caught.value.culprit.name, caught.value.number) == (kind, name, 0)


def test_a_loss_function_that_breaks_is_named():
    model = nn.Linear(4, 3)
    loss_fn = lambda predictions, targets: (predictions - predictions.detach()).log().mean()  # noqa: E731
    trainer = Trainer(model, SupervisedStep(loss_fn), torch.optim.SGD(model.parameters(), lr=0.1),
                      callbacks=[NonFinite()])
    with pytest.raises(NonFiniteError, match="All modules gave finite numbers") as caught:
        trainer.fit(tiny_loaders().train)
    assert caught.value.culprit.kind == "loss"


def test_dropout_drops_the_same_when_the_batch_is_run_again():
    class DividesByKept(nn.Module):
        def __init__(self):
            super().__init__()
            self.line, self.drop = nn.Linear(4, 3), nn.Dropout(0.5)

        def forward(self, x):
            kept = self.drop(torch.ones(1))
            return self.line(x) / kept  # infinite in half of the batches

    for seed in range(6):
        torch.manual_seed(seed)
        model = DividesByKept()
        trainer = Trainer(model, SupervisedStep(nn.CrossEntropyLoss()), torch.optim.SGD(model.parameters(), lr=0.1),
                          callbacks=[NonFinite()])
        with pytest.raises(NonFiniteError, match="the model itself"):
            trainer.fit(tiny_loaders().train, n=9)


def test_running_a_batch_again_leaves_no_trace():
    trainer, loaders = tiny_trainer(), tiny_loaders()
    trainer.fit(loaders.train, n=1)
    batch = next(iter(loaders.train.batches(0)))
    weights = {name: one.clone() for name, one in trainer.model.state_dict().items()}
    state, before = torch.get_rng_state(), traces(trainer)
    trainer.model.train()
    assert in_step(trainer, batch, torch_rng(trainer.device)) is None
    trainer.model.eval()
    assert all(torch.equal(one, weights[name]) for name, one in trainer.model.state_dict().items())
    assert torch.get_rng_state().equal(state) and traces(trainer) == {**before, "modes": traces(trainer)["modes"]}
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_batch_without_anything_that_counts_is_no_error_where_the_engine_leaves_it_out():
    model = nn.Linear(4, 3)
    step = SupervisedStep(nn.CrossEntropyLoss(ignore_index=9), count=lambda output, batch: int((batch.targets != 9).sum()))
    batches = [(torch.randn(2, 4), torch.tensor([0, 1])), (torch.randn(2, 4), torch.tensor([9, 9]))] * 2
    trainer = Trainer(model, step, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=2,
                      callbacks=[watching := NonFinite()])
    FiniteLoss.look, look = lambda self, trainer: None, FiniteLoss.look  # the mean of the epoch is NaN, as it says
    try:
        trainer.fit(batches)
    finally:
        FiniteLoss.look = look
    assert watching.error is None and trainer.state.step == 2


def test_infinite_gradients_under_a_scaler_are_left_to_it():
    class Everyday(Scaled):
        def __init__(self):
            Autocast.__init__(self, torch.device("cpu"), torch.bfloat16)
            self.device, self.start, self.scalers, self.names = torch.device("cpu"), 2.0**127, {}, {}

    torch.manual_seed(0)  # of the dropout: by some draws no gradient is that large
    trainer = tiny_trainer([watching := NonFinite()], precision=Everyday())
    trainer.fit(tiny_loaders().train, n=1)
    assert watching.error is None and trainer.state.step < 6  # some steps were left out


def test_it_takes_the_place_of_the_default_look_at_the_loss():
    learner = Learner(tiny_model(), tiny_loaders(), callbacks=[NonFinite()], verbose=0)
    assert [type(one) for one in learner.trainer.callbacks if isinstance(one, FiniteLoss)] == [NonFinite]


def test_an_anomaly_names_the_line_of_the_model():
    model = Fragile("slope")
    trainer = Trainer(model, SupervisedStep(nn.CrossEntropyLoss()), torch.optim.SGD(model.parameters(), lr=0.1),
                      callbacks=[AnomalyDetection()])
    with pytest.raises(RuntimeError, match="returned nan values") as caught:
        trainer.fit(tiny_loaders().train)
    notes = " ".join(caught.value.__notes__)
    assert "test_looking_inside.py, line" in notes and "x = (x * 0).abs().sqrt() + x" in notes


def test_tools_that_are_not_used_cost_no_call():
    loaders, trainer = tiny_loaders(), tiny_trainer()
    kinds = set()
    trainer.on("after_batch", lambda trainer: kinds.update(
        type(value).__name__ for owner in (trainer, trainer.engine, trainer.engine.precision)
        for value in vars(owner).values()))
    trainer.fit(loaders.train, n=1)
    assert "Wrapped" not in kinds
