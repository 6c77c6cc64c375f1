"""Mixup and CutMix: beside loops written out, from any batch on, and without a trace when the fit is over."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nbdev_trainer import Accuracy, Batch, Callback, CutMix, Learner, Loaders, Mixup, MixOneOf, SupervisedStep, Trainer
from nbdev_trainer.callbacks.mixing import draws_for, partners, rectangle
from nbdev_trainer.core.seeding import rng_state
from nbdev_trainer.loop.steps import CountedLoss
from nbdev_trainer.testing import StateAt, same_state

torch.manual_seed(0)
INPUTS = torch.randn(26, 4, dtype=torch.float64)
CLASSES = INPUTS[:, :3].argmax(1)
CLASSES[::7] = -1  # does not count
SAMPLE_WEIGHTS = torch.rand(26, dtype=torch.float64) + 0.5
CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(size=6, weights=None):
    "Uneven: the last one is short"
    parts = torch.arange(26).split(size)
    return [Batch(INPUTS[ids], CLASSES[ids], weights=None if weights is None else weights[ids]) for ids in parts]


def trainer_of(model, loss_fn, *callbacks, lr=0.1, **options):
    step = loss_fn if isinstance(loss_fn, SupervisedStep) else SupervisedStep(loss_fn)
    return Trainer(model, step, torch.optim.SGD(model.parameters(), lr=lr), callbacks=callbacks, **options)


def same(one, other, tolerance=1e-12):
    return all(torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance) for a, b in
               zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "sample weights"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_mixup_trains_what_a_loop_written_out_would(accumulate, weighted):
    model, by_hand = network(), network()
    loss_fn = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=-1, label_smoothing=0.1)
    data = batches(weights=SAMPLE_WEIGHTS if weighted else None)
    trainer_of(model, loss_fn, Mixup(0.8, seed=3), accumulate=accumulate).fit(data, n=2)

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    number = 0
    for _ in range(2):
        for window in [data[i:i + accumulate] for i in range(0, len(data), accumulate)]:
            total, counted = 0.0, 0.0
            for batch in window:
                draws = draws_for(3, number)
                number += 1
                draws.random()  # whether it is mixed
                order = partners(batch.size or len(batch.inputs), draws)
                share = draws.betavariate(0.8, 0.8)
                scores = by_hand(share * batch.inputs + (1 - share) * batch.inputs[order])
                for part, chosen in ((share, slice(None)), (1 - share, order)):
                    targets = batch.targets[chosen]
                    weights = torch.ones(len(targets)).double() if batch.weights is None else batch.weights[chosen]
                    losses = F.cross_entropy(scores, targets, CLASS_WEIGHTS, reduction="none", ignore_index=-1,
                                             label_smoothing=0.1)
                    total = total + part * (losses * weights).sum()
                counted += (CLASS_WEIGHTS[batch.targets.clamp(min=0)] * (batch.targets >= 0) * weights[
                    order.argsort()]).sum()  # back in the order of the batch
            optimizer.zero_grad()
            (total / counted).backward()
            optimizer.step()
    assert same(model, by_hand)


def test_cutmix_trains_what_a_loop_written_out_would():
    images = torch.randn(20, 2, 6, 5, dtype=torch.float64)
    labels = torch.arange(20) % 3
    def convolution():
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(48, 3)).double()
    model, by_hand = convolution(), convolution()
    data = [(images[i:i + 8], labels[i:i + 8]) for i in range(0, 20, 8)]
    trainer_of(model, nn.CrossEntropyLoss(), CutMix(seed=5)).fit(data, n=4)

    optimizer, number, dominated = torch.optim.SGD(by_hand.parameters(), lr=0.1), 0, 0
    for _ in range(4):
        for inputs, targets in data:
            draws = draws_for(5, number)
            number += 1
            draws.random()
            order = partners(len(inputs), draws)
            rows, columns = rectangle(6, 5, draws.betavariate(1, 1), draws)
            mixed = inputs.clone()
            mixed[:, :, rows, columns] = inputs[order][:, :, rows, columns]
            share = (mixed == inputs).flatten(1).double().mean(1).min().item()  # of a sample with another partner
            dominated += share < 0.5
            scores = by_hand(mixed)
            optimizer.zero_grad()
            (share * F.cross_entropy(scores, targets) + (1 - share) * F.cross_entropy(scores, targets[order])).backward()
            optimizer.step()
    assert same(model, by_hand)
    assert 0 < dominated < 12  # both cases were there: the sample, or its partner, has the larger part


def test_metrics_compare_with_the_sample_that_has_the_larger_part():
    class Seen(Callback):
        runs_after = (Mixup,)
        found = ()
        def before_batch(self, trainer):
            batch = trainer.state.current_batch
            self.found += ((batch.inputs, batch.targets, batch.ids, batch.weights),)

    loaders = Loaders.from_arrays(torch.eye(32), torch.arange(32), batch_size=16, seed=0)
    model = nn.Linear(32, 32)
    seen = Seen()
    trainer_of(model, nn.CrossEntropyLoss(), Mixup(1.0, seed=0), seen).fit(loaders.train, n=4)
    assert len(seen.found) == 8
    for inputs, targets, ids, _ in seen.found:  # inputs are shares of one-hot rows: the largest tells the sample
        assert torch.equal(inputs.argmax(1), targets) and torch.equal(ids, targets)


def test_evaluation_its_loss_and_its_data_are_untouched():
    loaders = Loaders.from_arrays(INPUTS.float(), CLASSES.clamp(min=0), valid=0.3, batch_size=5, seed=0)
    model = network().float()
    learner = Learner(model, loaders, nn.CrossEntropyLoss(), metrics=[Accuracy()], callbacks=[Mixup(seed=1)],
                      device="cpu", verbose=0)
    seen = []
    learner.on("before_evaluate_batch", lambda trainer: seen.append(trainer.state.current_batch.inputs))
    learner.fit(2, validate_every="2ba")
    mid, last = seen[0], learner.trainer.state.metrics["valid_loss"]
    whole = torch.cat([batch.inputs for batch in loaders.valid])
    assert torch.equal(torch.cat(seen[-2:]), whole) and torch.equal(mid, whole[:5])
    assert learner.validate()["loss"] == last


def test_seeded_draws_leave_the_global_generators_alone():
    trainer = trainer_of(network(), nn.CrossEntropyLoss(ignore_index=-1), Mixup(seed=0))
    before = rng_state()
    trainer.fit(batches(), n=2)
    assert same_state(before, rng_state())


def test_unseeded_draws_follow_from_the_seed_of_the_program():
    def run(seed, mixing):
        torch.manual_seed(seed)
        trainer = trainer_of(model := network().train(), nn.CrossEntropyLoss(ignore_index=-1), mixing)
        torch.manual_seed(seed)
        random.seed(0)
        trainer.fit(batches(), n=1)
        return model
    assert same(run(1, Mixup()), run(1, Mixup()), tolerance=0)
    assert not same(run(1, Mixup()), run(2, Mixup()))


@pytest.mark.parametrize("make", [lambda: Mixup(0.4), lambda: MixOneOf(Mixup(0.2), Mixup(2.0), p=0.7)],
                         ids=["Mixup", "MixOneOf"])
def test_resuming_at_any_batch_gives_the_same_weights(make):
    def run(stop_at=0, state=None, seed=9):
        keeper = StateAt(stop_at)
        trainer = trainer_of(model := network(), nn.CrossEntropyLoss(ignore_index=-1), make(), keeper, accumulate=2)
        if state is not None: trainer.load_state_dict(state)
        torch.manual_seed(seed)
        trainer.fit(batches(), n=2, resume=True)
        return model, keeper.state
    whole, _ = run()
    for stop_at in range(1, 10):
        _, state = run(stop_at)
        resumed, _ = run(state=state, seed=77)  # another seed: what counts is saved
        assert same(whole, resumed, tolerance=0), stop_at


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("event", ["before_fit", "before_batch", "after_backward"])
def test_the_loss_of_the_step_is_its_own_again_after_an_error(event, error):
    step = SupervisedStep(nn.CrossEntropyLoss(ignore_index=-1))
    trainer = trainer_of(network(), step, Mixup(seed=0))
    own = step.loss
    def fail(trainer): raise error("stop here")
    trainer.on(event, fail)
    with pytest.raises(error): trainer.fit(batches(), n=1)
    assert step.loss is own and type(own) is CountedLoss
    del trainer.callbacks[1]
    trainer.fit(batches(), n=1)  # and it trains on
    assert step.loss is own


def test_a_callback_of_the_fit_mixes_in_that_fit_only():
    model, by_hand = network(), network()
    for one, extra in ((model, [Mixup(seed=4)]), (by_hand, [])):
        trainer = trainer_of(one, nn.CrossEntropyLoss(ignore_index=-1))
        trainer.fit(batches(), n=1)
        if extra: trainer.fit(batches(), n=1, callbacks=extra)
    assert not same(model, by_hand)


def test_a_last_batch_of_one_is_trained_as_it_is():
    model, by_hand = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    by_hand.load_state_dict(model.state_dict())
    mixed_first = [Batch(INPUTS[:4], CLASSES[:4].clamp(min=0)), Batch(INPUTS[4:5], CLASSES[4:5].clamp(min=0))]
    trainer_of(model, nn.CrossEntropyLoss(), Mixup(seed=0)).fit(mixed_first, n=1)
    trainer_of(by_hand, nn.CrossEntropyLoss(), Mixup(seed=0)).fit(mixed_first[:1], n=1)
    trainer_of(by_hand, nn.CrossEntropyLoss()).fit(mixed_first[1:], n=1)
    assert same(model, by_hand, tolerance=0)


def test_a_skipped_batch_leaves_nothing_for_the_next():
    trainer = trainer_of(network(), nn.CrossEntropyLoss(ignore_index=-1), Mixup(seed=0))
    trainer.on("after_predict", lambda trainer: trainer.skip_batch("for a test"), every="2ba")
    trainer.on("before_batch", lambda trainer: trainer.skip_batch("for a test"), once=True)
    trainer.fit(batches(), n=2)
    assert len(trainer.state.control) >= 4 and trainer.state.batch == 10


def test_inputs_may_be_a_dict_and_targets_numbers():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 1).double()
        def forward(self, inputs): return self.head(torch.cat([inputs["a"], inputs["b"]], 1))
    torch.manual_seed(3)
    model, by_hand = Sum(), Sum()
    by_hand.load_state_dict(model.state_dict())
    inputs = {"a": INPUTS[:8], "b": SAMPLE_WEIGHTS[:8, None]}
    targets = INPUTS[:8, :1]
    trainer_of(model, nn.MSELoss(), Mixup(seed=0)).fit([(inputs, targets)], n=1)

    draws = draws_for(0, 0)
    draws.random()
    order, share = partners(8, draws), draws.betavariate(0.4, 0.4)
    mixed = {name: share * one + (1 - share) * one[order] for name, one in inputs.items()}
    predictions = by_hand(mixed)
    loss = share * F.mse_loss(predictions, targets) + (1 - share) * F.mse_loss(predictions, targets[order])
    loss.backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()
    assert same(model, by_hand)


def test_the_train_loss_is_the_mixed_loss():
    seen = []
    trainer = trainer_of(network(), nn.CrossEntropyLoss(), Mixup(seed=0))
    trainer.on("after_loss", lambda trainer: seen.append(trainer.state.output.loss.item()))
    trainer.fit([(INPUTS[:8], CLASSES[:8].clamp(min=0))] * 3, n=1)
    assert trainer.state.metrics["train_loss"] == pytest.approx(sum(seen) / 3)


@pytest.mark.parametrize("precision", ["bf16", "64"])
def test_mixing_works_in_other_precisions(precision):
    loaders = Loaders.from_arrays(INPUTS.float(), CLASSES.clamp(min=0), batch_size=8, seed=0)
    learner = Learner(network().float(), loaders, nn.CrossEntropyLoss(), callbacks=[Mixup(seed=0)], lr=1e-2,
                      precision=precision, device="cpu", verbose=0)
    learner.fit(2)
    assert learner.history["train_loss"][-1] > 0


@pytest.mark.parametrize(("inputs", "targets", "message"), [
    ([torch.zeros(3, 5), torch.zeros(4, 5)], torch.tensor([0, 1]), "resize or pad them"),
    (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]), r"images.float\(\) / 255"),
    ({"ids": torch.zeros(4, 7, dtype=torch.int64)}, torch.tensor([0, 1, 2, 0]), "mix what the embedding gives"),
])
def test_what_cannot_be_mixed_is_told_with_what_to_do(inputs, targets, message):
    trainer = trainer_of(network(), nn.CrossEntropyLoss(), Mixup(seed=0))
    with pytest.raises((ValueError, TypeError), match=message): trainer.fit([(inputs, targets)], n=1)


def test_a_dry_run_leaves_a_mixing_callback_as_it_was():
    loaders = Loaders.from_arrays(INPUTS.float(), CLASSES.clamp(min=0), valid=0.3, batch_size=5, seed=0)
    mixing = Mixup()
    learner = Learner(network().float(), loaders, nn.CrossEntropyLoss(), callbacks=[mixing], device="cpu", verbose=0)
    learner.dry_run()
    assert mixing.seed is None and type(learner.trainer.step.loss) is CountedLoss


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "sample weights"])
@pytest.mark.parametrize("accumulate, part", [(1, 2), (1, 4), (2, 1), (2, "auto")])
def test_a_mixed_batch_trained_in_parts_is_trained_as_a_whole(accumulate, part, weighted):
    def run(micro_batch_size, mixer):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        loss_fn = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=-1)
        trainer = trainer_of(model, loss_fn, mixer, accumulate=accumulate, micro_batch_size=micro_batch_size)
        trainer.fit(batches(weights=SAMPLE_WEIGHTS if weighted else None), n=2)
        return model, trainer.state.metrics["train_loss"]

    for mixer in (lambda: Mixup(0.8, seed=3), lambda: MixOneOf(Mixup(0.2), Mixup(2.0), p=0.7, seed=3)):
        (whole, loss), (divided, same_loss) = run(None, mixer()), run(part, mixer())
        assert same(whole, divided) and abs(loss - same_loss) < 1e-12


def test_a_part_with_targets_of_its_own_has_no_known_partners():
    class OwnTargets(SupervisedStep):
        def train(self, trainer, batch):
            output = super().predict(trainer, batch)
            output.targets = batch.targets
            self.loss(output, batch)
            return output

    trainer = trainer_of(network(), OwnTargets(nn.CrossEntropyLoss(ignore_index=-1)), Mixup(seed=0), micro_batch_size=2)
    with pytest.raises(RuntimeError, match="let the loss have the targets of the batch"):
        trainer.fit(batches())
