"""On a GPU: mixed precision beside exact arithmetic, steps in which the host waits for nothing, copies made ahead, recorded steps."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nbdev_trainer import AUROC, EMA, Accuracy, Callback, Checkpoint, Learner, Loaders, SupervisedStep, launch, one_cycle
from nbdev_trainer.callbacks.checkpoint import Copies
from nbdev_trainer.data.sending import copied_ahead
from nbdev_trainer.scale.precision import Scaled

pytestmark = [pytest.mark.gpu,  # torch warns of what is capturable and not recorded, as the plain learner beside a recorded one
              pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True:UserWarning")]
DEVICE = "cuda"

torch.manual_seed(0)
IMAGES = torch.randn(160, 3, 8, 8)
LABELS = IMAGES[:, :, :4].mean((2, 3)).argmax(1)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(256, 3))


def sgd(params, lr): return torch.optim.SGD(params, lr=lr, momentum=0.9)


def trained(device, **options):
    loaders = Loaders.from_arrays(IMAGES, LABELS, valid=(IMAGES, LABELS), batch_size=16, seed=0)
    learner = Learner(network(), loaders, nn.CrossEntropyLoss(), device=device, optimizer=sgd, lr=0.01, verbose=0,
                      metrics=[Accuracy()], default_callbacks=False, **options)
    learner.fit(2)
    return learner


def fp16(): return Scaled(torch.device(DEVICE), start=2.0**8)  # no step is left out at the beginning


BF16 = {"precision": "bf16"}
PRECISIONS = {
    "64": ({"precision": "64"}, 1e-8), "32": ({"precision": "32"}, 0.05), "tf32": ({"precision": "tf32"}, 0.05),  # cuDNN rounds in "32", too
    "bf16": (BF16, 0.1), "fp16": ({"precision": fp16}, 0.1), "bf16, channels last": (BF16 | {"memory_format": "channels_last"}, 0.1),
    "bf16, accumulated": (BF16 | {"accumulate": 2}, 0.1), "fp16, clipped": ({"precision": fp16, "clip_norm": 0.5}, 0.1),
    "64, recorded": ({"precision": "64", "cuda_graph": True}, 1e-8), "32, recorded": ({"precision": "32", "cuda_graph": True}, 0.05),
    "64, recorded and clipped": ({"precision": "64", "cuda_graph": True, "clip_norm": 0.1}, 1e-8),
    "bf16, recorded": (BF16 | {"cuda_graph": True}, 0.1),
    "bf16, channels last, recorded": (BF16 | {"memory_format": "channels_last", "cuda_graph": True}, 0.1)}


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_fit_goes_where_exact_arithmetic_goes(name):
    options, tolerance = PRECISIONS[name]
    exact = trained("cpu", **{**options, "precision": "64", "memory_format": None, "cuda_graph": False})
    options = {key: value() if value is fp16 else value for key, value in options.items()}
    learner = trained(DEVICE, **options)
    parameters = zip(learner.model.parameters(), exact.model.parameters(), network().double().parameters(), strict=True)
    for ours, right, start in parameters:
        assert ours.device.type == DEVICE
        assert (ours.detach().cpu().double() - right).norm() < tolerance * (right - start).norm()
    assert abs(learner.validate()["loss"] - exact.validate()["loss"]) < tolerance


class Forbidden(Callback):
    "From the fifth batch to the tenth, when a step has been recorded, whatever waits for the device is an error of torch"

    def __init__(self): self.steps = 0

    def after_batch(self, trainer):
        if trainer.state.batch == 5: torch.cuda.set_sync_debug_mode("error")
        self.steps += torch.cuda.get_sync_debug_mode() == 2
        if trainer.state.batch == 10: torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def forbidden():
    yield Forbidden()
    torch.cuda.set_sync_debug_mode("default")


def fit_under(forbidden, callbacks=(), **options):
    batches = [(IMAGES[:16].pin_memory(), LABELS[:16].pin_memory()) for _ in range(12)]
    learner = Learner(network(), (batches, None), nn.CrossEntropyLoss(), device=DEVICE, lr=0.01, verbose=0,
                      callbacks=[*callbacks, forbidden], **{"default_callbacks": False} | options)
    learner.fit(1, schedule=one_cycle())


OPTIONS = {"plain": {}, "bf16": {"precision": "bf16"}, "accumulated and clipped": {"accumulate": 2, "clip_norm": 1.0},
           "channels last": {"memory_format": "channels_last"}, "averaged": {"metrics": [Accuracy()], "callbacks": [EMA(0.9)]},
           "with history": {"default_callbacks": True}, "recorded": {"cuda_graph": True},
           "recorded with all": {"cuda_graph": True, "precision": "bf16", "memory_format": "channels_last", "clip_norm": 1.0,
                                 "metrics": [Accuracy()], "callbacks": [EMA(0.9)], "default_callbacks": True}}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_host_waits_for_nothing_in_a_step(forbidden, name):
    fit_under(forbidden, **OPTIONS[name])
    assert forbidden.steps == 6


def test_a_callback_that_waits_is_found(forbidden):
    class Reads(Callback):
        def after_batch(self, trainer): trainer.state.output.loss.item()

    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"): fit_under(forbidden, [Reads()])


# Copies to the device that are made while the batch before is used


def test_what_is_copied_ahead_arrives_whole_and_the_host_does_not_wait_for_the_step():
    device = torch.device(DEVICE, 0)
    read = [(k, {"x": torch.full((256, 1024), float(k)), "names": [str(k)]}) for k in range(12)]
    sums, busy = [], 0
    for task, batch in copied_ahead(iter(read), device):
        assert batch["x"].device == device and batch["names"] == [str(task)]
        torch.cuda._sleep(20_000_000)  # a step of some milliseconds
        busy += not torch.cuda.current_stream(device).query()
        sums.append((batch["x"] - task).abs().sum())
        del batch  # its memory may be used for the next copy only when the sum is done
    assert len(sums) == 12 and busy == 12
    assert torch.stack(sums).tolist() == [0.0] * 12


# The whole step as one CUDA graph; what is around it is tested without a GPU, in test_cuda_graph.py


def flat_network(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.LayerNorm(64), nn.Dropout(dropout), nn.ReLU(), nn.Linear(64, 3))


def flat_learner(cuda_graph, model=None, **options):
    loaders = Loaders.from_arrays(IMAGES[:150], LABELS[:150], valid=(IMAGES, LABELS), batch_size=16, seed=0)  # an uneven last batch
    options = {"device": DEVICE, "lr": 2.0**-7, "verbose": 0, "default_callbacks": False, "metrics": [Accuracy()]} | options
    return Learner(flat_network() if model is None else model, loaders, nn.CrossEntropyLoss(), cuda_graph=cuda_graph, **options)


def far_apart(one, other):
    return max((p - q).norm() / q.norm().clamp_min(1e-3) for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True))


def adam(kind, **options): return lambda params, lr: kind(params, lr=lr, **options)


OPTIMIZERS = {"default": None, "SGD": adam(torch.optim.SGD, momentum=0.9, fused=True),
              "Adam": adam(torch.optim.Adam, capturable=True), "fused Adam": adam(torch.optim.Adam, fused=True, capturable=True),
              "AdamW": adam(torch.optim.AdamW, capturable=True)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_recorded_step_follows_the_schedule_of_the_plain_one(name):
    plain, recorded = (flat_learner(one, precision="64", optimizer=OPTIMIZERS[name]) for one in (False, True))
    for learner in (plain, recorded): learner.fit_one_cycle(5)
    assert far_apart(recorded, plain) < 1e-5  # the rate has 32 bits
    assert abs(plain.validate()["loss"] - recorded.validate()["loss"]) < 1e-5


@pytest.mark.parametrize("name", ["RMSprop", "NAdam", "RAdam", "Adamax"])
def test_capturable_optimizers_of_torch_take_the_same_steps(name):
    make = adam(getattr(torch.optim, name), capturable=True)
    plain, recorded = (flat_learner(one, precision="64", optimizer=make) for one in (False, True))
    for learner in (plain, recorded): learner.fit(3)
    assert far_apart(recorded, plain) < 1e-5


def test_dropout_draws_what_it_would_have_drawn():
    learners = [flat_learner(one, flat_network(0.5), precision="64") for one in (False, True)]
    for learner in learners:
        torch.manual_seed(3)
        learner.fit(4)
    assert far_apart(*learners) < 1e-6


def test_a_resumed_run_of_recorded_steps_ends_with_the_same_bits():
    class Keep(Callback):
        def after_batch(self, trainer):
            if trainer.state.batch == 17: self.state = trainer.state_dict()

    whole = flat_learner(True, flat_network(0.3), callbacks=[keep := Keep()])
    torch.manual_seed(3)
    whole.fit_one_cycle(4)
    resumed = flat_learner(True, flat_network(0.3), callbacks=[Keep()])
    resumed.trainer.load_state_dict(keep.state)
    resumed.fit_one_cycle(4, resume=True)
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_what_is_frozen_and_unfrozen_between_two_steps_is_recorded_again():
    def train(learner):
        learner.on("after_batch", lambda trainer: learner.freeze("1"), once=True, after="12ba")
        learner.on("after_batch", lambda trainer: learner.unfreeze(), once=True, after="28ba")
        learner.fit(5)
        return learner

    assert far_apart(*(train(flat_learner(one, precision="64")) for one in (True, False))) < 1e-6


def test_who_keeps_a_gradient_is_in_nobodys_way_when_the_step_is_recorded_again():
    class Keeps(Callback):
        def after_step(self, trainer): self.gradient = trainer.model[1].weight.grad  # in the pool of a recording

    learner = flat_learner(True, callbacks=[keeps := Keeps()])
    learner.on("after_batch", lambda trainer: setattr(keeps, "first", keeps.gradient), once=True, after="12ba")
    learner.on("after_batch", lambda trainer: learner.freeze("1"), once=True, after="12ba")
    learner.fit(5)  # torch has an assertion against a pool whose recordings are gone and whose memory is not
    assert learner.trainer.state.ending == "finished" and keeps.first is not None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_recording_on_another_device_leaves_the_current_one():
    learner = flat_learner(True, device="cuda:1")
    learner.fit(2)
    assert torch.cuda.current_device() == 0


def test_the_memory_of_recordings_is_given_back():
    learner = flat_learner(True)
    sizes = []
    for _ in range(4):
        learner.fit(2)
        gc.collect()
        torch.cuda.empty_cache()
        sizes.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert sizes[1:] == sizes[:1] * 3


def test_batches_pinned_by_another_thread_may_come_while_a_step_is_recorded():
    data = torch.utils.data.TensorDataset(IMAGES, LABELS)
    loader = torch.utils.data.DataLoader(data, batch_size=16, pin_memory=True, num_workers=1, persistent_workers=False)
    learner = Learner(flat_network(), (loader, None), nn.CrossEntropyLoss(), device=DEVICE, lr=0.01, verbose=0, cuda_graph=True)
    learner.fit(3)
    assert learner.trainer.state.batch == 30


def test_what_waits_while_a_step_is_recorded_is_an_error_that_leaves_all_as_it_was():
    class Reads(SupervisedStep):
        def train(self, trainer, batch):
            output = super().train(trainer, batch)
            if output.loss.item() > 1e9: output.loss = output.loss / 2
            return output

    class Before(Callback):
        def before_batch(self, trainer): self.weights = [p.detach().clone() for p in trainer.model.parameters()]

    loaders = Loaders.from_arrays(IMAGES, LABELS, batch_size=16, seed=0)
    learner = Learner(flat_network(), loaders, step=Reads(nn.CrossEntropyLoss()), device=DEVICE, lr=0.01, verbose=0, cuda_graph=True,
                      default_callbacks=False, callbacks=[before := Before()])
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError) as raised: learner.fit(1)
    assert any("no .item()" in note for note in raised.value.__notes__) and learner.trainer.state.batch == 2  # the rehearsal
    assert torch.cuda.current_stream() == stream
    assert all(torch.equal(p, q) for p, q in zip(learner.model.parameters(), before.weights, strict=True))
    plain = Learner(learner.model, loaders, step=Reads(nn.CrossEntropyLoss()), device=DEVICE, lr=0.01, verbose=0)
    plain.fit(1)
    assert plain.trainer.state.ending == "finished"


def test_a_fit_goes_on_from_a_file_within_an_epoch(tmp_path):
    class Breaks(Callback):
        def after_batch(self, trainer):
            if trainer.state.batch == 13: raise OSError("cut off")

    def make(directory, *callbacks):
        return flat_learner(False, flat_network(0.3), run_dir=directory, seed=0, metrics=[Accuracy(), AUROC("multiclass", 3)],
                            callbacks=[EMA(0.9), Checkpoint(every="6ba"), *callbacks], default_callbacks=True)

    whole = make(tmp_path / "whole")
    whole.fit_one_cycle(2)
    with pytest.raises(OSError, match="cut off"): make(tmp_path / "cut", Breaks()).fit_one_cycle(2)
    again = make(tmp_path / "cut")
    again.fit_one_cycle(2, resume=True)  # from batch 12, with what was measured of the epoch on the host
    assert all(torch.equal(p, q) for p, q in zip(again.model.parameters(), whole.model.parameters(), strict=True))
    assert again.history["train_accuracy"] == whole.history["train_accuracy"]


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
def test_what_is_copied_from_another_gpu_has_arrived():
    weights = torch.zeros(2**24, device="cuda:1")
    with torch.cuda.device(1): torch.cuda._sleep(100_000_000)
    weights += 1
    assert torch.cuda.current_device() == 0 and Copies().take({"weights": weights})["weights"].min() == 1


def train_on_own_gpu(strategy):
    learner = flat_learner(False, precision="bf16", strategy=strategy, device="auto")
    learner.fit(1)
    own = int(os.environ["LOCAL_RANK"])
    assert {p.device for p in learner.model.parameters()} == {torch.device("cuda", own)} and torch.cuda.current_device() == own
    assert "cuda:nccl" in str(torch.distributed.get_backend_config())
    return learner.trainer.state.batch


@two_gpus
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_process_trains_on_a_gpu_of_its_own(strategy): assert launch(train_on_own_gpu, strategy, processes=2) == 10


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["cuda_graph.py", "--models", "tiny"], ["gpu.py"]], ids=lambda one: one[0])
def test_the_bounds_of_the_benchmarks_hold(arguments):
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, root / "benchmarks" / arguments[0], *arguments[1:], "--check"], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
