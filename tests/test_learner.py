"""What the design says of `Learner` and `fit`, a test for each sentence."""

import inspect
import random

import numpy as np
import pytest
import torch
from helpers import arrays, conv_net, foreign_loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbdev_trainer import (
    Accuracy,
    Batch,
    Callback,
    EarlyStopping,
    JSONLines,
    Learner,
    Loaders,
    ManualStep,
    Progress,
    Recorder,
    Step,
    StepOutput,
    Trainer,
    cosine,
    from_dict,
    linear,
)
from nbdev_trainer.core.errors import OF_A_FIT, OF_A_LEARNER

LOSS = nn.CrossEntropyLoss()


def data(n=37, valid=0.25, **options):
    return Loaders.from_arrays(*arrays(n), valid=valid, batch_size=8, seed=3, **options)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))


def learner(model=None, loaders=None, loss_fn=LOSS, **options):
    options = {"device": "cpu", "default_callbacks": False, "optimizer": torch.optim.SGD, "lr": 0.1} | options
    return Learner(model or net(), loaders or data(), loss_fn, **options)


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def rates(one):
    return [group["lr"] for slot in one.trainer.engine.slots.values() for group in slot.optimizer.param_groups]


# loaders, optimizer, loss


def test_loaders_are_loaders_or_a_pair_of_any_iterables():
    train = [arrays(8)] * 3
    for loaders in (data(), (train, train), [train, None], (foreign_loader(), data().valid)):
        one = learner(loaders=loaders)
        one.fit(1)
        assert one.trainer.state.epoch == 1


def test_valid_may_be_a_dict_of_several_sets():
    train = [arrays(8)] * 3
    one = learner(loaders=(train, {"clean": train, "noisy": train[:1]}), metrics=[Accuracy()])
    assert one.validate().keys() == {"clean_loss", "clean_accuracy", "noisy_loss", "noisy_accuracy"}
    with pytest.raises(ValueError, match="2 validation sets, clean, noisy; pass one of them"):
        one.predict()


def test_a_learning_rate_beside_an_optimizer_instance_is_an_error():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3)
    with pytest.raises(ValueError, match="has its own; set it there"):
        learner(model, optimizer=sgd, lr=0.1)
    one = learner(model, optimizer=sgd, lr=None)
    assert one.trainer.engine.slots["main"].optimizer is sgd and rates(one) == [0.3]


def test_an_optimizer_factory_gets_the_parameters_and_the_rate():
    def factory(params, lr):
        return torch.optim.SGD([{"params": params[:2], "lr": lr / 10}, {"params": params[2:]}], lr=lr)

    assert rates(learner(optimizer=factory, lr=0.5)) == [0.05, 0.5]


class Manual(ManualStep):
    def train(self, trainer, batch):
        return StepOutput()


def test_optimizers_go_by_name():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    head = torch.optim.SGD(model["head"].parameters(), lr=0.3)
    one = learner(model, optimizer={"body": torch.optim.SGD, "head": head}, lr=None, step=Manual(), loss_fn=None)
    assert list(one.trainer.engine.slots) == ["body", "head"] and rates(one) == [1e-3, 0.3]


def test_the_default_is_adamw_at_a_printed_rate(capsys):
    one = learner(optimizer=None, lr=None)
    assert isinstance(one.trainer.engine.slots["main"].optimizer, torch.optim.AdamW) and rates(one) == [1e-3, 1e-3]
    assert capsys.readouterr().out == ("optimizer: FusedAdamW, lr 0.001 where fit is given none; "
                                       "weight decay 0.01, not of biases, norms, embeddings\n")


def test_each_inferred_thing_is_printed_in_one_line_and_given_ones_are_not(capsys):
    Learner(net(), data())
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["device", "loss", "optimizer"]
    learner()
    assert capsys.readouterr().out == ""
    learner(lr=None)
    assert capsys.readouterr().out == "optimizer: SGD, lr 0.001 where fit is given none\n"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [(torch.zeros(4, dtype=torch.int64), nn.CrossEntropyLoss), (torch.zeros(4), nn.MSELoss),
     (torch.zeros(4, 2, dtype=torch.float64), nn.MSELoss)],
)  # fmt: skip
def test_a_loss_is_inferred_where_there_is_no_doubt(targets, expected):
    one = learner(loaders=([(torch.zeros(4, 36), targets)], None), loss_fn=None)
    assert type(one.trainer.step.loss.loss_fn) is expected


@pytest.mark.parametrize(
    "targets", [torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int32), torch.ones(4) > 0, ["a"] * 4]
)
def test_any_other_targets_need_a_loss(targets):
    with pytest.raises(ValueError, match="no loss is obvious for targets|the targets are texts"):
        learner(loaders=([(torch.zeros(4, 36), targets)], None), loss_fn=None)


def test_inferring_a_loss_changes_no_generator():
    states = []
    for loss_fn in (None, LOSS):
        torch.manual_seed(0)
        loader = foreign_loader(generator=5)
        learner(net(), (loader, None), loss_fn)
        states.append((torch.get_rng_state(), loader.generator.get_state()))
    assert all(torch.equal(a, b) for a, b in zip(*states))


# n, and one fit after another


def test_a_fit_trains_n_more():
    one = learner(default_callbacks=True)
    for n in (2, "1ep", "7ba", "3st"):
        one.fit(n)
    assert (one.trainer.state.epoch, one.trainer.state.batch, one.trainer.state.step) == (5, 22, 22)
    assert one.history["batch"] == [4, 8, 12, 16, 19, 20, 22]


def test_two_fits_are_one_longer_fit():
    ends = []
    for parts in ((4,), (1, 3), ("5ba", "11ba")):
        one = learner(optimizer=torch.optim.Adam, lr=0.01)
        for n in parts:
            one.fit(n)
        ends.append(weights(one.model))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_the_schedule_begins_anew_with_each_fit():
    one = learner(default_callbacks=True, callbacks=[Recorder(every="1st"), Progress()])
    for _ in range(2):
        one.fit(1, schedule=linear(1.0, 0.0))
    lrs = [record["lr"] for record in one.history.steps]
    assert lrs[:4] == lrs[4:] == pytest.approx([0.1, 0.2 / 3, 0.1 / 3, 0]) and rates(one) == [0.1]


def test_a_loader_without_a_length_needs_a_duration_in_batches():
    def stream():
        while True:
            yield arrays(8)

    one = learner(loaders=(stream(), None))
    with pytest.raises(ValueError, match="no length or can be read only once"):
        one.fit(1)
    one.fit("5ba")
    assert one.trainer.state.batch == 5


def test_schedules_are_factors_of_each_groups_rate():
    model, seen = net(), []
    groups = [{"params": model[1].parameters(), "lr": 0.01}, {"params": model[3].parameters()}]
    one = learner(model, optimizer=torch.optim.SGD(groups, lr=1.0), lr=None)
    one.on("before_step", lambda trainer: seen.append(rates(one)))
    one.fit(2, schedule=cosine())
    assert all(low == pytest.approx(high / 100) for low, high in seen) and seen[0] == [0.01, 1.0]


def test_a_pair_of_rates_spreads_geometrically_over_the_groups():
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), []
    groups = [{"params": [model[1].weight]}, {"params": [model[1].bias]}]
    one = learner(model, optimizer=torch.optim.SGD(groups, lr=0.5), lr=None)
    one.on("before_step", lambda trainer: seen.append(rates(one)))
    one.fit("1ba", lr=(1e-5, 1e-3))
    assert seen == [pytest.approx([1e-5, 1e-3])]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_a_rate_for_one_fit_is_gone_after_it_however_it_ends(error):
    def raise_it(trainer):
        if error and trainer.state.batch == 3:
            raise error

    one = learner()
    one.on("after_batch", raise_it)
    try:
        one.fit(1, lr=0.7, schedule=linear())
    except (KeyboardInterrupt, RuntimeError):
        pass
    assert rates(one) == [0.1]


def test_a_fit_takes_callbacks_limits_and_validation_intervals():
    class Count(Callback):
        batches = evaluations = 0

        def after_batch(self, trainer):
            self.batches += 1

        def after_evaluate(self, trainer):
            self.evaluations += 1

    one, count = learner(), Count()
    one.fit_one_cycle(2, limit_batches=2, validate_every="1ba", callbacks=[count])
    one.fit(1)
    assert (count.batches, count.evaluations) == (4, 4)


# seeds


def test_without_a_seed_global_generators_are_left_alone():
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    train = [arrays(8)] * 2
    one = learner(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), (train, train), metrics=[Accuracy()])
    torch.set_rng_state(before[0])  # the model drew its weights
    one = learner(one.model, (train, train), metrics=[Accuracy()], default_callbacks=True)
    one.fit(2), one.validate(), one.predict(train)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and np.random.get_state()[1].tolist() == before[2]


def test_without_a_seed_training_draws_what_the_plain_loop_draws():
    model, loader = conv_net(), foreign_loader()
    torch.manual_seed(5)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(2):
        for inputs, targets in loader:
            sgd.zero_grad()
            LOSS(model(inputs), targets).backward()
            sgd.step()
    plain, drawn = weights(model), torch.rand(1)

    model, loader = conv_net(), foreign_loader()
    torch.manual_seed(5)
    one = learner(model, (loader, foreign_loader()), None, metrics=[Accuracy()], default_callbacks=True)
    one.fit(2)
    assert torch.equal(weights(model), plain) and torch.equal(torch.rand(1), drawn)


def test_a_seed_seeds_python_numpy_and_torch_at_the_first_fit_only():
    drawn = []

    def draw(trainer):
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))

    for _ in range(2):
        one = learner(seed=7)
        random.random(), np.random.rand(), torch.rand(3)
        one.on("before_epoch", draw)
        one.fit(1), one.fit(1)
    assert drawn[:2] == drawn[2:] and drawn[0] != drawn[1]


def test_looking_leaves_all_generators_as_they_were():
    one = learner(conv_net(), (foreign_loader(), foreign_loader()))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    one.validate(), one.predict()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and np.random.get_state()[1].tolist() == before[2]


# predict


def test_predict_gives_predictions_targets_ids_and_losses_in_the_order_of_the_data():
    one = learner()
    images, labels = arrays()
    answer = one.predict(data().train)
    assert answer.ids.tolist() == sorted(answer.ids.tolist()) and torch.equal(answer.targets, labels[answer.ids])
    with torch.no_grad():
        torch.testing.assert_close(answer.predictions, one.model(images[answer.ids]))
    each = nn.CrossEntropyLoss(reduction="none")(answer.predictions, answer.targets)
    torch.testing.assert_close(answer.losses, each)


def test_predict_takes_data_loaders_and_bare_inputs():
    one, (images, labels) = learner(), arrays()
    with torch.no_grad():
        expected = one.model(images)
    pairs = one.predict(DataLoader(TensorDataset(images, labels), batch_size=10))
    torch.testing.assert_close(pairs.predictions, expected)
    assert torch.equal(pairs.targets, labels) and pairs.ids is None
    bare = one.predict(DataLoader(images, batch_size=10))
    torch.testing.assert_close(bare.predictions, expected)
    assert bare.targets is None and bare.losses is None
    with pytest.raises(TypeError, match="expected a loader"):
        one.predict(images)


def test_predict_extends_lists_keeps_dicts_and_lists_what_differs_in_size():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, images):
            return {"same": torch.stack([x.sum() for x in images]), "each": [x * self.scale for x in images]}

    ragged = [Batch([torch.ones(2), torch.ones(3)]), Batch([torch.ones(4)])]
    answer = learner(Model(), (ragged, None)).predict(ragged).predictions
    assert answer["same"].tolist() == [2, 3, 4] and [len(x) for x in answer["each"]] == [2, 3, 4]
    differing = learner(nn.Linear(1, 1).requires_grad_(), (ragged, None), forward=lambda model, x: model.weight * x)
    sizes = differing.predict([torch.ones(2, 3), torch.ones(1, 5)]).predictions
    assert [tuple(one.shape) for one in sizes] == [(3,), (3,), (5,)]


def test_a_forward_of_ones_own_and_a_reader_of_batches():
    images, labels = arrays(8)
    train = [{"x": images, "y": labels}] * 2
    one = learner(loaders=(train, train), loss_fn=None, as_batch=from_dict("x", targets="y"),
                  forward=lambda model, x: model(x) * 2)  # fmt: skip
    one.fit(1)
    with torch.no_grad():
        torch.testing.assert_close(one.predict().predictions[:8], one.model(images) * 2)


# save and load


def test_saved_weights_come_back_and_tied_ones_stay_tied(tmp_path):
    def tied():
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 36), nn.Linear(36, 36), nn.BatchNorm1d(36))
        model[2].weight = model[1].weight
        return model

    first, second = learner(tied()), learner(tied())
    first.fit(1)
    first.save(tmp_path / "a.safetensors")
    second.load(tmp_path / "a.safetensors")
    for (name, a), b in zip(first.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(a, b), name
    assert second.model[2].weight is second.model[1].weight


def test_loading_into_another_dtype_or_after_training_keeps_the_parameters(tmp_path):
    one = learner()
    one.save(tmp_path / "a.safetensors")
    other = learner(net().double(), data())
    parameter = other.model[1].weight
    with torch.no_grad():
        parameter.zero_()
    other.load(tmp_path / "a.safetensors")
    assert other.model[1].weight is parameter and parameter.dtype == torch.float64
    assert torch.equal(parameter.float(), one.model[1].weight)


@pytest.mark.gpu
def test_weights_saved_on_one_device_load_on_another(tmp_path):
    one = learner(device="cuda")
    one.fit(1)
    one.save(tmp_path / "a.safetensors")
    other = learner()
    other.load(tmp_path / "a.safetensors")
    assert torch.equal(weights(other.model), weights(one.model).cpu())


def test_what_does_not_fit_is_named_all_at_once_and_changes_nothing(tmp_path):
    learner(nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3))).save(tmp_path / "a.safetensors")
    one = learner()
    before = weights(one.model)
    with pytest.raises(ValueError) as error:
        one.load(tmp_path / "a.safetensors")
    lines = str(error.value).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["1.weight", "1.bias", "3.weight"]
    assert "(5, 36) in the file and (8, 36) in the model" in lines[1]
    assert torch.equal(weights(one.model), before)
    with pytest.raises(FileNotFoundError, match="Did you mean 'a.safetensors'"):
        one.load(tmp_path / "b.safetensors")


# callbacks, history, plan


def test_a_callback_of_the_class_of_a_default_one_replaces_it():
    recorder = Recorder(every="1st")
    one = learner(default_callbacks=True, callbacks=[recorder])
    one.fit(1)
    kinds = [type(callback) for callback in one.trainer.callbacks]
    assert sorted(kind.__name__ for kind in kinds) == ["FiniteLoss", "Interruptions", "Progress", "Recorder"]
    assert one.history is recorder.history and len(one.history.steps) == 4


def test_no_default_callbacks_drops_all_and_a_lone_progress_asks_for_a_recorder():
    assert learner().trainer.callbacks == []
    with pytest.raises(ValueError, match="no Recorder"):
        learner().history
    with pytest.raises(ValueError, match=r"Progress takes the rows of a Recorder.*add Recorder\(\)"):
        learner(callbacks=[Progress()]).fit(1)


def test_plan_prints_optimizer_step_device_and_who_acts_when(capsys):
    one = learner(default_callbacks=True, callbacks=[EarlyStopping()])
    one.plan()
    out = capsys.readouterr().out
    assert "main optimizer: SGD, 323 parameters at lr 0.1" in out and "device: cpu" in out
    line = next(line for line in out.splitlines() if line.startswith("after_epoch"))
    assert line.split()[1:] == ["EarlyStopping", ">", "Recorder", ">", "FiniteLoss", ">", "Progress", ">", "Interruptions"]


def test_an_attached_function_is_called(capsys):
    one, calls = learner(), []
    one.on("after_step", calls.append, every="3ba")
    one.fit(2)
    assert len(calls) == 2 and calls[0] is one.trainer
    with pytest.raises(ValueError, match="Did you mean"):
        one.on("after_steps", print)


@pytest.mark.parametrize("every", ["1ep", "2ba", "3ep"])
def test_rows_on_screen_in_files_and_in_the_history_are_the_same(every, tmp_path, capsys):
    one = learner(default_callbacks=True, callbacks=[JSONLines(tmp_path / "rows.jsonl")], metrics=[Accuracy()])
    one.fit(2, validate_every=every)
    one.validate()
    one.fit("6ba", validate_every=every)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    shown = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "epoch" not in line]
    rows = [[str(epoch), str(batch)] for epoch, batch in zip(one.history["epoch"], one.history["batch"])]
    assert shown == rows and len(lines) == len(rows) == len(set(one.history["batch"]))
    assert [line.count("valid_accuracy") for line in lines] == [v is not None for v in one.history["valid_accuracy"]]


def test_a_learner_of_a_step_without_evaluation_says_so_before_training():
    class Silent(ManualStep):
        def train(self, trainer, batch):
            return StepOutput()

    with pytest.raises(ValueError, match="defines no evaluate"):
        learner(step=Silent(), loss_fn=None).fit(1)
    learner(step=Silent(), loss_fn=None, loaders=(data().train, None)).fit(1)


def test_arguments_that_cannot_work_fail_when_the_learner_is_made():
    with pytest.raises(TypeError, match="expected an instance of torch.nn.Module"):
        learner(lambda x: x)
    with pytest.raises(TypeError, match=r"expected Loaders, or a pair \(train, valid\)"):
        learner(loaders=[1, 2, 3])
    with pytest.raises(ValueError, match="leave out loss_fn and forward"):
        learner(step=Step())
    with pytest.raises(ValueError, match="so there is nothing to train; unfreeze"):
        learner(net().requires_grad_(False))
    with pytest.raises(ValueError, match="this machine has no device"):
        learner(device="cuda:99")
    with pytest.raises(TypeError, match="has no argument .epochs."):
        learner(epochs=3)


def test_what_is_said_in_another_place_can_be_said_there():
    made, fit = (inspect.signature(one).parameters for one in (Learner.__init__, Learner.fit))
    assert {answer.partition("=")[0] for answer in OF_A_LEARNER.values()} <= set(made)
    assert set(OF_A_FIT) <= set(fit)
    with pytest.raises(TypeError, match=r"Trainer\(\) has no argument 'run_dir'. Known arguments: "):
        Trainer(net(), None, None, run_dir="runs/1")
