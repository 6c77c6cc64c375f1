"""float8 beside a loop written out with torchao, and what it leaves as it was; emulated, and on a GPU that has it."""

import copy

import pytest
import torch
from helpers import one_thread as one_thread
from safetensors.torch import load_file
from torch import nn

from nbdev_trainer import EMA, Accuracy, Callback, Learner, Loaders, launch
from nbdev_trainer.core.errors import MissingPackage
from nbdev_trainer.scale.float8 import Float8

torch.manual_seed(0)
INPUTS, TARGETS = torch.randn(44, 16), torch.randint(3, (44,))  # the last batch has 4 samples
emulated = Float8(emulate=True)


def network():
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    return nn.Sequential(body, nn.Linear(32, 3))


def learner_of(precision, model=None, **options):
    loaders = Loaders.from_arrays(INPUTS, TARGETS, valid=(INPUTS, TARGETS), batch_size=8, seed=0)
    options = {"device": "cpu", "verbose": 0, "metrics": [Accuracy()], "lr": 1e-2, "default_callbacks": False} | options
    return Learner(network() if model is None else model, loaders, nn.CrossEntropyLoss(), precision=precision, **options)


def sgd(params, lr): return torch.optim.SGD(params, lr=lr, momentum=0.9)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.float8", reason="torchao is optional: nbdev_trainer[float8]")


def test_a_device_without_it_is_told_before_anything_is_changed():
    model = network()
    for one in ("float8", "fp8", Float8()):
        with pytest.raises(ValueError, match="needs a GPU of compute capability 8.9 or later.*the device is 'cpu'"):
            learner_of(one, model)
    assert all(type(one) is nn.Linear for one in (model[0][0], model[0][3], model[1]))


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    def missing(name): raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
    monkeypatch.setattr("nbdev_trainer.core.errors.importlib.import_module", missing)
    with pytest.raises(MissingPackage, match=r'pip install "nbdev_trainer\[float8\]"'): learner_of(emulated)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_it_trains_what_a_loop_with_torchao_would(torchao, recipe):
    learner, by_hand = learner_of(Float8(recipe=recipe, emulate=True), optimizer=sgd), network()
    learner.fit(2)
    config = torchao.Float8LinearConfig.from_recipe_name(recipe)
    config = type(config)(**{**vars(config), "emulate": True, "pad_inner_dim": True})
    torchao.convert_to_float8_training(by_hand, config=config, module_filter_fn=lambda one, name: name != "1")
    optimizer = sgd(by_hand.parameters(), 1e-2)
    for epoch in range(2):
        for batch in learner.loaders.train.batches(epoch):
            with torch.autocast("cpu", torch.bfloat16): loss = nn.functional.cross_entropy(by_hand(batch.inputs), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert equal(learner.model, by_hand) and by_hand[1].weight.dtype == torch.float32
    in_bf16 = learner_of("bf16", optimizer=sgd)
    in_bf16.fit(2)
    assert not equal(learner.model, in_bf16.model)


def test_parameters_names_and_modes_are_those_of_the_plain_model(torchao, tmp_path):
    model = network()
    model[0].eval()
    before, names = list(model.parameters()), list(model.state_dict())
    learner = learner_of(emulated, model)
    assert learner.model is model and not model[0][0].training and model[1].training
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    slot = learner.trainer.engine.slots["main"]
    assert {id(p) for p in slot.params} == {id(p) for p in before}
    learner.fit(1)
    learner.save(path := tmp_path / "model.safetensors")
    assert sorted(load_file(path)) == sorted(names)
    plain = network()
    plain.load_state_dict(load_file(path))
    assert equal(plain, model)
    assert 0 < abs(learner_of("32", plain).validate()["loss"] - learner.validate()["loss"]) < 0.1


def test_layers_are_chosen_by_name_pattern_or_class(torchao):
    for layers, expected in [(None, ["0.0", "0.3"]), ("0.3", ["0.3"]), ("0.*", ["0.0", "0.3"]), (nn.Linear, ["0.0", "0.3"])]:
        precision = Float8(layers, emulate=True)
        model = learner_of(precision).model
        found = [name for name, one in model.named_modules() if type(one).__name__ == "Float8Linear"]
        assert found == precision.converted == expected
    with pytest.raises(ValueError, match="Sequential has none in '1'"): learner_of(Float8("1", emulate=True))
    with pytest.raises(ValueError, match="matches no module of Sequential"): learner_of(Float8("head", emulate=True))


@pytest.mark.parametrize("stop", [1, 5, 6, 11])
def test_it_goes_on_at_any_batch(torchao, stop):
    saved = []

    class Save(Callback):
        def after_batch(self, trainer):
            if trainer.state.batch == stop: saved.append(copy.deepcopy(trainer.state_dict()))

    whole = learner_of(Float8(emulate=True), accumulate=2, clip_norm=1.0, callbacks=[EMA(0.9), Save()])
    whole.fit(2)
    again = learner_of(Float8(emulate=True), accumulate=2, clip_norm=1.0, callbacks=[EMA(0.9)])
    again.trainer.load_state_dict(saved[0])
    again.fit(2, resume=True)
    assert equal(again.model, whole.model) and again.validate() == whole.validate()


def test_a_run_with_other_layers_is_refused(torchao, tmp_path):
    learner_of(Float8(emulate=True), run_dir=tmp_path, default_callbacks=True).fit(1)
    other = learner_of(Float8("0.3", emulate=True), run_dir=tmp_path, default_callbacks=True)
    with pytest.raises(ValueError, match="layers"): other.fit(2, resume=True)


@pytest.mark.parametrize("look", [
    lambda one: one.check(), lambda one: one.overfit(steps=5), lambda one: one.dry_run(), lambda one: one.summary(),
    lambda one: one.lr_find(steps=20)], ids=["check", "overfit", "dry_run", "summary", "lr_find"])
def test_what_looks_before_a_fit_changes_nothing(torchao, look):
    learner, other = (learner_of(Float8(emulate=True)) for _ in range(2))
    look(learner)
    for one in (learner, other): one.fit(1)
    assert equal(learner.model, other.model)


def trained(strategy):
    learner = learner_of(Float8(emulate=True), strategy=strategy, optimizer=sgd)
    learner.fit(1)
    parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in learner.model.parameters()]
    return [p.detach().clone() for p in parts]


def test_two_processes_train_nearly_what_one_does_with_whole_and_with_divided_weights(torchao):
    whole, divided, alone = launch(trained, "ddp"), launch(trained, "fsdp"), trained(None)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(whole, divided, strict=True))
    for a, b, start in zip(whole, alone, network().parameters(), strict=True):  # each rounds its own part of a batch
        assert (a - b).norm() < 0.4 * (b - start).norm()


@pytest.mark.gpu
def test_on_a_gpu_that_has_it_products_are_nearly_those_of_bf16(torchao):
    if torch.cuda.get_device_capability() < (8, 9): pytest.skip("this GPU has no float8")
    before = network()
    learner, in_bf16 = (learner_of(one, device="cuda", optimizer=sgd) for one in ("float8", "bf16"))
    for one in (learner, in_bf16): one.fit(2)
    pairs = zip(learner.model.parameters(), in_bf16.model.parameters(), before.parameters(), strict=True)
    assert max(((a - b).norm() / (b - start.cuda()).norm()).item() for a, b, start in pairs) < 0.3
    assert not equal(learner.model, in_bf16.model)
