"""The steps of the how-to pages, taken from the pages: each gives what a loop written out gives, and a run that was
stopped at any batch goes on bit by bit."""

import json
from pathlib import Path

import pytest
import torch
from helpers import one_thread  # noqa: F401  # a fixture for every test here
from torch import nn
from torch.nn import functional as F

from nbdev_trainer import Learner, Loaders, linear
from nbdev_trainer.data import Data, Text
from nbdev_trainer.testing import StateAt, assert_same_weights

PAGES = Path(__file__).parents[1] / "nbs" / "howto"


def page(name, *wanted):
    """What the cells of a page define that define one of the wanted names, with its imports."""
    cells = json.loads((PAGES / f"{name}.ipynb").read_text("utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    parts = [f"{kind} {one}" for one in wanted for kind in ("class", "def")]
    chosen = [one for one in sources if one.startswith(("import ", "from ")) and "#| slow" not in one]
    chosen += [one for one in sources if any(f"{part}(" in one for part in parts)]
    found = {}
    for source in chosen:
        exec(source, found)
    assert found.keys() >= set(wanted), f"the page {name} defines no {set(wanted) - found.keys()}"
    return found


# Learners with the step of a page, on made data: each call gives the same


def gan():
    names = page("20_gan", "GANStep", "Told")
    torch.manual_seed(0)
    classes = torch.arange(40) % 4
    loaders = Loaders.from_arrays(torch.randn(40, 2) + classes[:, None], classes, batch_size=8, seed=0)
    model = nn.ModuleDict({"generator": names["Told"](4, 3, 2, 8), "critic": names["Told"](4, 2, 1, 8)})
    optimizers = {name: torch.optim.Adam(part.parameters(), lr=1e-2) for name, part in model.items()}
    return model, (loaders.train, None), {"step": names["GANStep"](noise=3), "optimizer": optimizers}


def distillation():
    names = page("21_distillation", "DistillationStep")
    torch.manual_seed(0)
    inputs, teacher = torch.randn(40, 4), nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    labels = inputs[:, :3].argmax(1)
    loaders = Loaders.from_arrays(inputs, labels, valid=(inputs, labels), batch_size=8, seed=0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 3))
    return model, loaders, {"step": names["DistillationStep"](teacher)}


def translation():
    names = page("22_sequence_to_sequence", "Translator", "TeacherForcingStep", "PADDING")
    rows = [" ".join("abcd"[(i * j) % 4] for j in range(1, 2 + i % 4)) for i in range(40)]
    kind = {"tokenizer": "spaces"}
    fields = {"given": Text(None, **kind), "backwards": Text(lambda row: row[::-1], ends=True, **kind)}
    data = Data(rows, fields, inputs="given", targets="backwards")
    torch.manual_seed(0)
    model = names["Translator"](8, 8, 8, dropout=0.2)
    step = names["TeacherForcingStep"](data.fields["backwards"], [row[::-1] for row in rows], linear(1.0, 0.0))
    return model, data.loaders(8, seed=0), {"step": step}


def characters():
    names = page("23_characters", "TruncatedStep", "CharacterModel", "chunks")
    torch.manual_seed(0)
    rows = names["chunks"](torch.randint(5, (81,)), streams=4, length=4)
    loaders = Loaders.from_arrays(*rows, valid=rows, batch_size=4, shuffle=False)
    return names["CharacterModel"](5, 9), loaders, {"step": names["TruncatedStep"](streams=4)}


def cart_pole():
    names = page("24_policy_gradient", "PolicyGradientStep", "play", "push", "advantages", "policy_loss")
    torch.manual_seed(0)
    starts = torch.rand(40, 4) * 0.1
    loaders = Loaders.from_arrays(starts, valid=(starts[:3], None), batch_size=8, seed=0)
    policy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return policy, loaders, {"step": names["PolicyGradientStep"](limit=30)}


STEPS = {"gan": gan, "distillation": distillation, "translation": translation, "characters": characters,
         "cart_pole": cart_pole}  # fmt: skip


def learner_of(make, *callbacks, **options):
    model, loaders, own = make()
    return Learner(model, loaders, callbacks=callbacks, device="cpu", seed=1, verbose=0, **own, **options)


@pytest.mark.parametrize("name", STEPS)
def test_a_run_that_is_stopped_at_any_batch_ends_with_the_weights_of_an_undisturbed_one(name):
    keepers = [StateAt(batch) for batch in range(1, 10)]  # two epochs of five batches
    whole = learner_of(STEPS[name], *keepers)
    whole.fit(2, lr=None if name == "gan" else 1e-2, schedule=linear(1, 0.1))
    for keeper in keepers:
        torch.rand(7)  # what happens between two runs
        resumed = learner_of(STEPS[name])
        resumed.trainer.load_state_dict(keeper.state)
        resumed.fit(2, lr=None if name == "gan" else 1e-2, schedule=linear(1, 0.1), resume=True)
        assert_same_weights(whole.model, resumed.model)


@pytest.mark.parametrize("name", [name for name in STEPS if name != "gan"])
def test_validation_changes_neither_weights_nor_draws(name):
    with_validation, without = (learner_of(STEPS[name]) for _ in range(2))
    with_validation.fit(2, lr=1e-2, validate_every="2ba")
    without.fit(2, lr=1e-2, validate_every=None)
    assert_same_weights(with_validation.model, without.model)


# Beside loops written out


def test_a_gan_moves_as_in_a_loop_that_zeroes_by_hand():
    learner = learner_of(gan)
    learner.fit("4ba")
    model, (train, _), _ = gan()
    optimizers = {name: torch.optim.Adam(part.parameters(), lr=1e-2) for name, part in model.items()}
    torch.manual_seed(1)
    for batch in list(train.batches(0))[:4]:
        made = model["generator"](torch.randn(8, 3), batch.targets)
        real, false = (model["critic"](some, batch.targets) for some in (batch.inputs, made.detach()))
        model.zero_grad()
        (F.softplus(-real) + F.softplus(false)).mean().backward()
        optimizers["critic"].step()
        model.zero_grad()
        F.softplus(-model["critic"](made, batch.targets)).mean().backward()
        optimizers["generator"].step()
    assert_same_weights(learner.model, model, tolerance=1e-6)


def test_a_student_gets_the_gradients_of_the_formula_and_the_teacher_none():
    model, loaders, own = distillation()
    step = own["step"]
    step.share = 0.7
    student = distillation()[0]
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, student)]
    learner = Learner(student, loaders, step=step, optimizer=optimizers[1], device="cpu", seed=1, verbose=0)
    learner.fit("3ba", validate_every=None)
    torch.manual_seed(1)
    for batch in list(loaders.train.batches(0))[:3]:
        scores, wanted = model(batch.inputs), step.teacher(batch.inputs).detach()
        target, given = (wanted / 4).softmax(1), (scores / 4).log_softmax(1)
        soft = (target * (target.log() - given)).sum(1).mean() * 16
        optimizers[0].zero_grad()
        (0.7 * soft + 0.3 * F.cross_entropy(scores, batch.targets)).backward()
        optimizers[0].step()
    assert_same_weights(student, model, tolerance=1e-6)
    assert not step.teacher.training and all(p.grad is None for p in step.teacher.parameters())


def test_gradients_end_where_a_chunk_begins_and_the_memory_does_not():
    (model, loaders, own), (trained, _, _) = characters(), characters()
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.5) for one in (model, trained)]
    Learner(trained, loaders, step=own["step"], optimizer=optimizers[1], device="cpu", seed=1, verbose=0).fit(2)
    for _ in range(2):
        memory = None  # the text begins again
        for batch in loaders.train.batches(0):
            scores, memory = model(batch.inputs, memory)
            optimizers[0].zero_grad()
            F.cross_entropy(scores.flatten(0, 1), batch.targets.flatten()).backward()
            optimizers[0].step()
            memory = memory.detach()
    assert_same_weights(trained, model, tolerance=1e-6)
    torch.testing.assert_close(own["step"].memory, memory)


def test_reading_a_text_in_chunks_gives_the_scores_of_reading_it_at_once():
    learner = learner_of(characters)
    model, loaders, _ = characters()
    in_chunks = learner.predict(loaders.valid).predictions  # (batches * streams, characters, length)
    streams = torch.cat([batch.inputs for batch in loaders.valid.batches(0)]).view(5, 4, 4).transpose(0, 1).flatten(1)
    with torch.no_grad():
        at_once, _ = model(streams)
    joined = in_chunks.view(5, 4, 5, 4).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(joined, at_once)
    torch.testing.assert_close(learner.predict(loaders.valid).predictions, in_chunks)  # a pass forgets the one before


def test_the_loss_of_a_translation_is_a_mean_over_words_whatever_the_batches():
    whole, halves = (learner_of(translation, accumulate=n) for n in (1, 2))
    gradients = []
    for learner in (whole, halves):
        learner.trainer.model.dropout.p = 0.0
        learner.trainer.step.forcing = linear(1.0, 1.0)
        size = 16 // learner.trainer.engine.accumulate
        learner.on("before_step", lambda trainer: gradients.append([p.grad.clone() for p in trainer.model.parameters()]))
        loaders = translation()[1].data.loaders(size, seed=0)
        learner.trainer.fit(loaders.train, n="1st", validate_every=None)
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_falling_probability_is_followed_word_by_word():
    model, loaders, own = translation()
    model.eval()
    batch = next(iter(loaders.train))
    wanted, told = batch.targets[:, 1:], []
    real = torch.where

    def where(condition, one, other):
        told.append(condition.float().mean())
        return real(condition, one, other)

    torch.where = where
    try:
        torch.manual_seed(0)
        for _ in range(100):
            model(batch.inputs, wanted, 0.3)
    finally:
        torch.where = real
    assert abs(torch.stack(told).mean() - 0.3) < 0.03


def test_the_gradient_of_a_policy_is_that_of_the_mean_return_over_all_paths():
    names = page("24_policy_gradient", "policy_loss", "advantages", "play", "push", "PolicyGradientStep")
    torch.manual_seed(0)
    table = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)  # scores at two times, for two actions
    rewards = torch.tensor([[1.0, 3.0], [2.0, -1.0]], dtype=torch.float64)  # of each action at each time
    first, second = table.softmax(1)
    exact = torch.autograd.grad((first * rewards[0]).sum() + (second * rewards[1]).sum(), table, retain_graph=True)[0]
    found = torch.zeros_like(table)
    for one in range(2):
        for two in range(2):
            later = rewards[1, two]
            returns = torch.stack([rewards[0, one] + later, later])[:, None]
            loss = names["policy_loss"](table[:, None], torch.tensor([[one], [two]]), returns)
            found -= (first[one] * second[two]).detach() * torch.autograd.grad(loss, table)[0]
    torch.testing.assert_close(found, exact)


def test_nothing_is_learnt_from_what_comes_after_the_fall():
    names = page("24_policy_gradient", "advantages", "policy_loss")
    stands = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    found = names["advantages"](stands, discount=0.5)
    left = torch.tensor([[1.75, 1.5, 1.0], [1.5, 1.0, 0.0], [1.0, 0.0, 0.0]])
    usual = torch.tensor([[4.25 / 3], [1.25], [1.0]])
    torch.testing.assert_close(found, (left - usual) * stands)
