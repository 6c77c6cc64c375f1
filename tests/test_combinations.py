"""Techniques together: what a loop written out in this file computes, in double precision to the last digits."""

import itertools

import pytest
import torch
from torch import nn

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdev_trainer import EMA, Batch, Learner, ManualStep, StepOutput, SupervisedStep, Trainer, linear, one_cycle

torch.manual_seed(0)
N, SIZE = 37, 5  # the last batch has two samples
INPUTS, TARGETS = torch.randn(N, 6, dtype=torch.float64), torch.randint(3, (N,))
WEIGHTS = torch.rand(N, dtype=torch.float64)
EPOCHS = 2


def network():
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh())  # a bias there has no gradient
    return nn.ModuleDict({"body": body, "middle": nn.Linear(8, 8), "head": nn.Linear(8, 3)}).double()


def forward(model, inputs): return model["head"](torch.tanh(model["middle"](model["body"](inputs))))


def batches(weighted):
    for start in range(0, N, SIZE):
        part = slice(start, start + SIZE)
        yield Batch(INPUTS[part], TARGETS[part], len(INPUTS[part]), weights=WEIGHTS[part] if weighted else None)


class Data:
    """A loader in the same order each epoch."""

    def __init__(self, weighted): self.weighted = weighted

    def __len__(self): return -(-N // SIZE)

    def __iter__(self): return batches(self.weighted)


RATES = {"body": 1e-3, "middle": 1e-2, "head": 3e-2}


def by_hand(accumulate, clip, scheduled, frozen, weighted, autocast):
    model = network()
    if frozen:
        model["body"].requires_grad_(False)
        model["body"].eval()
    parts = [name for name in RATES if not (frozen and name == "body")]
    optimizer = torch.optim.AdamW([{"params": model[name].parameters(), "lr": RATES[name]} for name in parts])
    schedule, n_windows = one_cycle(), -(-len(Data(False)) // accumulate)
    step, total, averages = 0, EPOCHS * n_windows, {}
    for _ in range(EPOCHS):
        whole = list(batches(weighted))
        for first in range(0, len(whole), accumulate):
            window = whole[first:first + accumulate]
            count = sum(one.weights.sum() if weighted else one.size for one in window)
            for one in window:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    each = nn.functional.cross_entropy(forward(model, one.inputs), one.targets, reduction="none")
                ((each * one.weights).sum() if weighted else each.sum()).div(count).backward()
            if clip: nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            for group, name in zip(optimizer.param_groups, parts):
                group["lr"] = RATES[name] * (schedule(step / (total - 1)) if scheduled else 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            average(averages, {name: one for part in RATES for name, one in tensors_of(model, part)}, step)
    return model, averages


def tensors_of(model, part):
    return [(f"{part}.{name}", one) for name, one in model[part].state_dict().items() if one.is_floating_point()]


def average(averages, tensors, n):
    decay = min(0.9, (1 + n) / (10 + n))
    for name, one in tensors.items(): averages[name] = decay * averages.get(name, one) + (1 - decay) * one


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("autocast", [False, True], ids=["64", "bf16"])
def test_any_combination_trains_what_the_loop_written_out_does(accumulate, autocast):
    for clip, scheduled, frozen, weighted in itertools.product([False, True], repeat=4):
        model, ema = network(), EMA(0.9)
        in_parts = 2 if frozen and not autocast else None  # where no batch norm looks at the batch
        learner = Learner(model, (Data(weighted), None), nn.CrossEntropyLoss(), forward=forward, device="cpu", verbose=0,
                          optimizer=torch.optim.AdamW(model.parameters(), lr=1.0), accumulate=accumulate,
                          clip_norm=0.3 if clip else None, precision="bf16" if autocast else "32", callbacks=[ema],
                          micro_batch_size=in_parts)
        if frozen: learner.freeze("body")
        learner.fit(EPOCHS, lr=RATES, schedule=one_cycle() if scheduled else None)
        expected, averages = by_hand(accumulate, clip, scheduled, frozen, weighted, autocast)
        which = f"clip {clip}, schedule {scheduled}, frozen {frozen}, weights {weighted}"
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if autocast else {"rtol": 1e-12, "atol": 1e-13}
        for one, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other, **tolerance, msg=lambda text: f"{which}: {text}")
        assert ema.averages.keys() == averages.keys()
        for name, one in averages.items(): torch.testing.assert_close(ema.averages[name], one, **tolerance, msg=name)


def loss_of(model, batch): return nn.functional.cross_entropy(forward(model, batch.inputs), batch.targets)


class Alternating(ManualStep):
    """The middle in every second batch, the head in each."""

    def train(self, trainer, batch):
        if trainer.state.epoch_batch % 2 == 0: trainer.optimize(2 * loss_of(trainer.model, batch), "middle")
        trainer.optimize(loss_of(trainer.model, batch), "head")
        return StepOutput()


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_several_optimizers_with_their_own_cadence_one_schedule_and_averages(accumulate, clip):
    def made(model): return {name: torch.optim.SGD(model[name].parameters(), lr=0.1, momentum=0.9) for name in ("middle", "head")}
    model, expected, ema = network(), network(), EMA(0.9)
    Learner(model, (Data(False), None), step=Alternating(), optimizer=made(model), device="cpu", verbose=0,
            accumulate=accumulate, clip_norm=clip, callbacks=[ema]).fit(EPOCHS, schedule=linear())

    optimizers, averages, steps, n_steps = made(expected), {}, 0, {"middle": 0, "head": 0}
    total = EPOCHS * -(-len(Data(False)) // accumulate)
    for _ in range(EPOCHS):
        whole = list(enumerate(batches(False)))
        for first in range(0, len(whole), accumulate):
            window, sums, counts = whole[first:first + accumulate], {}, {"middle": 0, "head": 0}

            def step(name):
                params = list(expected[name].parameters())
                optimizers[name].param_groups[0]["lr"] = 0.1 * (1 - steps / (total - 1))
                for one, summed in zip(params, sums.pop(name), strict=True): one.grad = summed / counts[name]
                if clip: nn.utils.clip_grad_norm_(params, clip)
                optimizers[name].step()
                n_steps[name] += 1
                average(averages, dict(tensors_of(expected, name)), n_steps[name])

            for number, one in window:
                for name, factor in ([("middle", 2)] if number % 2 == 0 else []) + [("head", 1)]:
                    params = list(expected[name].parameters())
                    found = torch.autograd.grad(factor * one.size * loss_of(expected, one), params)
                    sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * len(params)), found)]
                    counts[name] += one.size
                    if number == window[-1][0]: step(name)
            for name in list(sums): step(name)  # had no part in the last batch
            steps += 1
    for one, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    for name, one in averages.items(): torch.testing.assert_close(ema.averages[name], one, rtol=1e-12, atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 12), part=st.integers(1, 14), accumulate=st.integers(1, 3), kind=st.sampled_from(["mean", "classes", "rows"]),
       seed=st.integers(0, 99))
def test_any_split_of_a_batch_gives_the_same_gradient(size, part, accumulate, kind, seed):
    draw = torch.Generator().manual_seed(seed)
    def batch():
        targets = torch.randint(3, (size,), generator=draw)
        if kind == "classes": targets[torch.rand(size, generator=draw) < 0.4] = -100  # left out; perhaps all of a part
        weights = torch.rand(size, generator=draw, dtype=torch.float64) if kind == "rows" else None
        return torch.randn(size, 4, generator=draw, dtype=torch.float64), targets, weights
    made = [batch() for _ in range(accumulate)]
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double() if kind == "classes" else None)
    found = []
    for micro_batch_size in (None, part):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        trainer = Trainer(model, SupervisedStep(loss_fn), torch.optim.SGD(model.parameters(), lr=1.0), accumulate=accumulate,
                          micro_batch_size=micro_batch_size)
        with torch.no_grad(): before = [p.clone() for p in model.parameters()]
        trainer.fit([Batch(inputs, targets, size, weights=weights) for inputs, targets, weights in made])
        found.append([p.detach() - one for p, one in zip(model.parameters(), before)])
    for one, other in zip(*found): torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
