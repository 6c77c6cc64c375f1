"""What each technique costs beside the loop that one would write for it by hand.

    python benchmarks/craft.py [--steps 200] [--rounds 11] [--only SAM EMA]

A network of three layers (64-256-256-10, batches of 128) on ready batches, on one thread. For each technique our learner and the
loop written out take turns in every round, both with torch's fused AdamW or what the technique needs instead, and nothing
tracked. Shown is the median of the ratios of the rounds; at most 1.05 is what we hold ourselves to.
"""
import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import nbdev_trainer
from nbdev_trainer import (EMA, SAM, ActivationCheckpointing, Learner, ManualStep, Mixup, StepOutput, cosine, linear,
                           weight_decay_groups)

loss_fn = nn.CrossEntropyLoss()
torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)


def ours(batches, optimizer: Callable | None = adamw, fit: dict | None = None, prepare: Callable | None = None, **options) -> float:
    "Seconds of a fit with a technique"
    model = copy.deepcopy(MODEL)
    if optimizer is not None: options["optimizer"] = optimizer(model)
    elif "optimizer" not in options: options["lr"] = 1e-3
    learner = Learner(model, (batches, None), None if "step" in options else loss_fn, device="cpu", default_callbacks=False,
                      verbose=0, **options)
    if prepare is not None: prepare(learner)
    start = time.perf_counter()
    learner.fit(1, **fit or {})
    return time.perf_counter() - start


def by_hand(batches, optimizer: Callable = adamw, *, before: Callable | None = None, context: Callable = nullcontext,
            clip: Callable | None = None, after: Callable | None = None, accumulate: int = 1, forward: Callable | None = None,
            prepare: Callable | None = None) -> float:
    "Seconds of the loop written out, with what a technique adds to it"
    model = copy.deepcopy(MODEL)
    if prepare is not None: prepare(model)
    opt = optimizer(model)
    extra = after(model, opt, len(batches)) if after is not None else None
    start = time.perf_counter()
    for number, (inputs, targets) in enumerate(batches, 1):
        with context():
            predictions = model(inputs) if forward is None else forward(model, inputs)
            loss = loss_fn(predictions, targets)
        (loss / accumulate if accumulate > 1 else loss).backward()
        if number % accumulate and number < len(batches): continue
        if clip is not None: clip(list(model.parameters()))
        opt.step()
        opt.zero_grad()
        if extra is not None: extra()
    return time.perf_counter() - start


def adaptive_clip(params) -> None:
    "As timm has it"
    for p in params:
        def norm(x): return x.norm(2.0) if x.ndim <= 1 else x.norm(2.0, dim=tuple(range(1, x.ndim)), keepdim=True)
        weights, gradient = p.detach(), p.grad.detach()
        largest, size = norm(weights).clamp_(min=1e-3).mul_(0.01), norm(gradient)
        p.grad.detach().copy_(torch.where(size < largest, gradient, gradient * (largest / size.clamp(min=1e-6))))


def averaging(model, optimizer, n):
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    return lambda: averaged.update_parameters(model)


def scheduling(model, optimizer, n):
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=n + 1)
    return scheduler.step


def sam_by_hand(batches) -> float:
    model = copy.deepcopy(MODEL)
    params, optimizer = list(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    start = time.perf_counter()
    for inputs, targets in batches:
        loss_fn(model(inputs), targets).backward()
        with torch.no_grad():
            before = [p.clone() for p in params]
            norm = torch.stack([p.grad.norm() for p in params]).norm()
            for p in params: p.add_(p.grad * (0.05 / (norm + 1e-12)))
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        with torch.no_grad():
            for p, one in zip(params, before): p.copy_(one)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


class Both(ManualStep):
    "One loss for two optimizers, each with its half of the network"

    def train(self, trainer, batch):
        loss = loss_fn(trainer.model(batch.inputs), batch.targets)
        trainer.optimize(loss, "front", retain_graph=True)
        trainer.optimize(loss, "back")
        return StepOutput()


def halves(model): return {"front": torch.optim.AdamW(model[:3].parameters(), lr=1e-3, fused=True),
                           "back": torch.optim.AdamW(model[3:].parameters(), lr=1e-3, fused=True)}


def halves_by_hand(batches) -> float:
    model = copy.deepcopy(MODEL)
    front, back = halves(model).values()
    first, last = list(model[:3].parameters()), list(model[3:].parameters())
    start = time.perf_counter()
    for inputs, targets in batches:
        loss = loss_fn(model(inputs), targets)
        loss.backward(retain_graph=True, inputs=first)
        front.step()
        front.zero_grad()
        loss.backward(inputs=last)
        back.step()
        back.zero_grad()
    return time.perf_counter() - start


def in_parts(batches) -> float:
    model = copy.deepcopy(MODEL)
    optimizer = adamw(model)
    start = time.perf_counter()
    for inputs, targets in batches:
        for rows in range(0, 128, 32):
            (loss_fn(model(inputs[rows:rows + 32]), targets[rows:rows + 32]) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def mixed_by_hand(batches) -> float:
    model, draw = copy.deepcopy(MODEL), torch.distributions.Beta(0.4, 0.4)
    optimizer = adamw(model)
    start = time.perf_counter()
    for inputs, targets in batches:
        share, order = float(draw.sample()), torch.randperm(len(inputs))
        predictions = model(share * inputs + (1 - share) * inputs[order])
        (share * loss_fn(predictions, targets) + (1 - share) * loss_fn(predictions, targets[order])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def autocast(): return torch.autocast("cpu", torch.bfloat16)
def frozen(model): model[0].requires_grad_(False)


def grouped(model): return torch.optim.AdamW(weight_decay_groups(model), lr=1e-3, fused=True)


techniques: dict[str, tuple[Callable, Callable]] = {
    "nothing": (ours, by_hand),
    "weight decay of some (the default)": (lambda b: ours(b, None), lambda b: by_hand(b, grouped)),
    "one cycle": (lambda b: ours(b, fit={"schedule": cosine()}), lambda b: by_hand(b, after=scheduling)),
    "and of the momentum": (lambda b: ours(b, fit={"schedule": {"lr": cosine(), "momentum": linear(1, 0.9)}}),
                            lambda b: by_hand(b, after=scheduling)),
    "accumulate=4": (lambda b: ours(b, accumulate=4), lambda b: by_hand(b, accumulate=4)),
    "micro_batch_size=32": (lambda b: ours(b, micro_batch_size=32), in_parts),
    "clip_norm": (lambda b: ours(b, clip_norm=1.0), lambda b: by_hand(b, clip=lambda p: nn.utils.clip_grad_norm_(p, 1.0))),
    "clip_value": (lambda b: ours(b, clip_value=0.1), lambda b: by_hand(b, clip=lambda p: nn.utils.clip_grad_value_(p, 0.1))),
    "clip_adaptive": (lambda b: ours(b, clip_adaptive=0.01), lambda b: by_hand(b, clip=adaptive_clip)),
    "bf16": (lambda b: ours(b, precision="bf16"), lambda b: by_hand(b, context=autocast)),
    "EMA": (lambda b: ours(b, callbacks=[EMA(0.999)]), lambda b: by_hand(b, after=averaging)),
    "freeze": (lambda b: ours(b, prepare=lambda learner: learner.freeze("0")), lambda b: by_hand(b, prepare=frozen)),
    "ActivationCheckpointing": (lambda b: ours(b, callbacks=[ActivationCheckpointing("0", "1", "2")]),
                                lambda b: by_hand(b, forward=lambda model, inputs: model[3:](
                                    each_checkpointed(model[:3], inputs)))),
    "SAM": (lambda b: ours(b, lambda model: SAM(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))), sam_by_hand),
    "two optimizers": (lambda b: ours(b, halves, step=Both()), halves_by_hand),
    "Mixup": (lambda b: ours(b, callbacks=[Mixup(0.4)]), mixed_by_hand),
}


def each_checkpointed(layers, inputs):
    for layer in layers: inputs = checkpoint(layer, inputs, use_reentrant=False)
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="training steps in a round")
    parser.add_argument("--rounds", type=int, default=11, help="times that the two take their turn")
    parser.add_argument("--only", nargs="+", choices=techniques, default=list(techniques), help="names of techniques")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(arguments.steps, 128, 64, generator=generator)
    batches = [(batch, batch[:, :10].argmax(1)) for batch in inputs]
    print(f"{date.today()}, nbdev_trainer {nbdev_trainer.__version__}, torch {torch.__version__}, Python "
          f"{platform.python_version()}, one thread, {arguments.rounds} rounds of {arguments.steps} steps\n")
    print("| technique | µs a step by hand | ours / by hand | at most 1.05 |\n|---|---|---|---|")
    for name in arguments.only:
        one, other = techniques[name]
        one(batches[:20]), other(batches[:20])
        times = [(one(batches), other(batches)) for _ in range(arguments.rounds)]
        ratio = statistics.median(a / b for a, b in times)
        hand = statistics.median(b for _, b in times) / len(batches) * 1e6
        print(f"| {name} | {hand:.0f} | {ratio:.2f} | {'held' if ratio <= 1.05 else 'missed'} |", flush=True)


if __name__ == "__main__":
    main()
