"""Techniques together: what a loop written out in this file computes, in double precision to the last digits."""

import itertools

import pytest
import torch
from torch import nn

from nbdev_trainer import Batch, Learner, ManualStep, StepOutput, one_cycle

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
    step, total = 0, EPOCHS * n_windows
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
    return model


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("autocast", [False, True], ids=["64", "bf16"])
def test_any_combination_trains_what_the_loop_written_out_does(accumulate, autocast):
    for clip, scheduled, frozen, weighted in itertools.product([False, True], repeat=4):
        model = network()
        learner = Learner(model, (Data(weighted), None), nn.CrossEntropyLoss(), forward=forward, device="cpu", verbose=0,
                          optimizer=torch.optim.AdamW(model.parameters(), lr=1.0), accumulate=accumulate,
                          clip_norm=0.3 if clip else None, precision="bf16" if autocast else "32")
        if frozen: learner.freeze("body")
        learner.fit(EPOCHS, lr=RATES, schedule=one_cycle() if scheduled else None)
        expected = by_hand(accumulate, clip, scheduled, frozen, weighted, autocast)
        which = f"clip {clip}, schedule {scheduled}, frozen {frozen}, weights {weighted}"
        for one, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
            tolerance = {"rtol": 1e-2, "atol": 1e-3} if autocast else {"rtol": 1e-12, "atol": 1e-13}
            torch.testing.assert_close(one, other, **tolerance, msg=lambda text: f"{which}: {text}")


def loss_of(model, batch): return nn.functional.cross_entropy(forward(model, batch.inputs), batch.targets)


class Alternating(ManualStep):
    """The middle in every second batch, the head in each."""

    def train(self, trainer, batch):
        if trainer.state.epoch_batch % 2 == 0: trainer.optimize(2 * loss_of(trainer.model, batch), "middle")
        trainer.optimize(loss_of(trainer.model, batch), "head")
        return StepOutput()


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_several_optimizers_with_their_own_cadence(accumulate, clip):
    def made(model): return {name: torch.optim.SGD(model[name].parameters(), lr=0.1, momentum=0.9) for name in ("middle", "head")}
    model, expected = network(), network()
    Learner(model, (Data(False), None), step=Alternating(), optimizer=made(model), device="cpu", verbose=0,
            accumulate=accumulate, clip_norm=clip).fit(EPOCHS)

    optimizers = made(expected)
    for _ in range(EPOCHS):
        whole = list(enumerate(batches(False)))
        for first in range(0, len(whole), accumulate):
            window, sums, counts = whole[first:first + accumulate], {}, {"middle": 0, "head": 0}

            def step(name):
                params = list(expected[name].parameters())
                for one, total in zip(params, sums.pop(name), strict=True): one.grad = total / counts[name]
                if clip: nn.utils.clip_grad_norm_(params, clip)
                optimizers[name].step()

            for number, one in window:
                for name, factor in ([("middle", 2)] if number % 2 == 0 else []) + [("head", 1)]:
                    params = list(expected[name].parameters())
                    found = torch.autograd.grad(factor * one.size * loss_of(expected, one), params)
                    sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * len(params)), found)]
                    counts[name] += one.size
                    if number == window[-1][0]: step(name)
            for name in list(sums): step(name)  # had no part in the last batch
    for one, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
