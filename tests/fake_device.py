"""Fits on a device that is not there. Its tensors know their shape and their device, and no number: torch's FakeTensorMode refuses what
would mix devices, and what would make the host wait is noted. Run by test_fake_device.py in a process of its own, for it takes over the one
kind of device that torch leaves to others."""

import json
import traceback
from collections import Counter

import torch
from torch import nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import nbdev_trainer
from nbdev_trainer import (
    AUROC, EMA, SAM, Accuracy, ActivationStatistics, Batch, Callback, EarlyStopping, F1Score, FocalLoss, GradientNorms, Learner, LogLoss, Mixup)
from nbdev_trainer.core.nested import map_tensors, tensors
from nbdev_trainer.data.loaders import fetch_rows
from nbdev_trainer.loop import plan, snapshot, trainer
from nbdev_trainer.loop.optimizers import FusedAdamW

NAME, aten = "fake", torch.ops.aten
INDEXING = aten.index.Tensor, aten.index_put.default, aten.index_put_.default
ASKS = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape


def makes_wait(operation, args, kwargs):
    "Whether the host waits until the device has come so far"
    kinds = {one.device.type for one in tensors((args, kwargs))}
    if kwargs.get("device") is not None: kinds.add(torch.device(kwargs["device"]).type)
    if NAME not in kinds: return False
    if operation is aten._to_copy.default: return len(kinds) > 1 and not kwargs.get("non_blocking")
    if operation is aten.copy_.default: return len(kinds) > 1 and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    if operation in INDEXING: return any(one.dtype is torch.bool or one.is_cpu for one in tensors(args[1]))
    return any(tag in operation.tags for tag in ASKS)


class Device(TorchDispatchMode):
    "Notes by which lines of ours the host waits, and answers zero to what nobody knows"

    def __init__(self):
        super().__init__()
        self.waits, self.fakes = Counter(), FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self):
        self.fakes.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fakes.__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if makes_wait(operation, args, kwargs):
            ours = [one for one in traceback.extract_stack() if one.filename.startswith(nbdev_trainer.__path__[0])]
            self.waits[f"{ours[-1].name}: {ours[-1].line}" if ours else str(operation)] += 1
        for one in tensors((args, kwargs)): one.constant = None  # which torch would carry to the device
        if operation is aten._local_scalar_dense.default: return 0.0 if args[0].is_floating_point() else 0
        return operation(*args, **kwargs)

    def take(self, module, where):
        "Move a module here; to exchange what its parameters hold, as torch does, fails for fake ones"
        for one in module.modules():
            for kind in (one._parameters, one._buffers):
                for name, there in kind.items():
                    if there is None or there.device.type == NAME: continue
                    moved = self.fakes.from_tensor(there.detach()).to(where)
                    kind[name] = nn.Parameter(moved, there.requires_grad) if kind is one._parameters else moved
        return module


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def learner_of(n_batches, callbacks=lambda: [], metrics=lambda: [], **options):
    batches = [(torch.zeros(8, 3, 4), torch.zeros(8, dtype=torch.int64)) for _ in range(n_batches)]
    options = {"loss_fn": nn.CrossEntropyLoss(), "optimizer": lambda params, lr: FusedAdamW(params, lr)} | options
    return Learner(network(), (batches, batches[:2]), device=NAME, lr=0.01, verbose=0, callbacks=callbacks(), metrics=metrics(), **options)


def waits_per_batch(device, **options):
    "The lines where a fit of more batches makes the host wait more often"
    found = []
    for n_batches in (2, 8):
        learner, before = learner_of(n_batches, **options), Counter(device.waits)
        learner.fit_one_cycle(1)
        found.append(device.waits - before)
    return {line: n for line, n in (found[1] - found[0]).items() if n > 1}  # the history has a few points more


class Keep(Callback):
    "The state of the third batch, as a file gives it back: on the host"

    def after_batch(self, trainer):
        if trainer.state.batch == 3: self.state = map_tensors(lambda one: one.to("cpu"), trainer.state_dict())


def resumed(device, callbacks=lambda: [], **options):
    "A fit that goes on with a state from the host"
    whole, again = (learner_of(4, callbacks=lambda: [*callbacks(), Keep()], **options) for _ in range(2))
    whole.fit(1)
    again.trainer.load_state_dict(next(one.state for one in whole.trainer.callbacks if isinstance(one, Keep)))
    again.fit(1, resume=True)
    return {} if again.trainer.state.batch == 4 else {"not finished": 1}


class Logs(Callback):
    "One name for numbers and for tensors"

    def after_batch(self, trainer): trainer.log("now and then", 0.0 if trainer.state.batch % 2 else trainer.state.output.loss)


def largest(predictions, targets): return predictions.max()
def metrics(): return [Accuracy(), Accuracy("kept", ignore_index=1), F1Score("multiclass", 3), LogLoss("multiclass", 3), AUROC("multiclass", 3), largest]
def weighted(batch): return Batch(*batch, weights=torch.zeros(8))
def with_ids(batch): return Batch(*batch, ids=torch.zeros(8, dtype=torch.int64))
def sgd(params, lr): return optim.SGD(params, lr=lr, momentum=0.9)


class Reads(Callback):
    def after_batch(self, trainer): self.seen = trainer.state.output.loss.item() if self.by_item else trainer.state.output.loss.to("cpu")

    def __init__(self, by_item): self.by_item = by_item


class Mixes(Callback):
    def after_batch(self, trainer): self.seen = trainer.state.output.predictions + torch.zeros(8, 3)


def in_memory(device):
    "Arrays that are on the device themselves"
    fetch, before = fetch_rows(torch.zeros(8, 3, 4, device=NAME), torch.zeros(8, device=NAME)), Counter(device.waits)
    assert fetch(torch.zeros(4, dtype=torch.int64)).inputs.device.type == NAME
    return device.waits - before


OPTIONS = {
    "plain": {}, "metrics": {"metrics": metrics}, "accumulated and clipped": {"accumulate": 3, "clip_norm": 1.0},
    "clipped by value": {"clip_value": 0.1}, "clipped adaptively": {"clip_adaptive": 0.1}, "in parts": {"micro_batch_size": 3},
    "sample weights": {"accumulate": 2, "as_batch": weighted}, "averaged": {"callbacks": lambda: [EMA(0.9)]}, "SGD": {"optimizer": sgd},
    "class weights": {"loss_fn": nn.CrossEntropyLoss(torch.ones(3), ignore_index=1), "accumulate": 2},
    "another loss": {"loss_fn": FocalLoss(weight=torch.ones(3))}, "mixed samples": {"callbacks": lambda: [Mixup(seed=0)], "as_batch": with_ids},
    "mixed names": {"callbacks": lambda: [Logs()]}, "looks again": {"optimizer": lambda params, lr: SAM(sgd(params, lr))},
    "watched": {"callbacks": lambda: [GradientNorms(), ActivationStatistics(), EarlyStopping("valid_loss", patience=3, restore_best=True)]}}

CASES = {**{f"fit: {name}": (waits_per_batch, options) for name, options in OPTIONS.items()},
         **{f"resumed: {name}": (resumed, OPTIONS[name]) for name in OPTIONS},
         "arrays": (in_memory, {}),
         "planted: item": (waits_per_batch, {"callbacks": lambda: [Reads(True)]}), "planted: copy": (waits_per_batch, {"callbacks": lambda: [Reads(False)]}),
         "planted: devices": (waits_per_batch, {"callbacks": lambda: [Mixes()]})}


def main():
    _setup_privateuseone_for_python_backend(NAME)
    device = Device()
    nn.Module.to = lambda module, where: device.take(module, where)
    for module in (plan, snapshot, trainer): module.set_rng_state = lambda state: None  # whose numbers are not known either
    answers = {}
    with device:
        for name, (case, options) in CASES.items():
            try: answers[name] = case(device, **options)
            except Exception as error: answers[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(answers))


if __name__ == "__main__": main()
