"""What a step and an import cost: ours beside other libraries.

    python -m venv peers && peers/bin/pip install -r benchmarks/peers.txt -e .
    peers/bin/python benchmarks/peers.py [--steps 300] [--rounds 11] [--only Lightning] [--imports]

Each library lives in a process of its own, and the processes take turns in every round, so a machine that is busy for a
while is busy for all. All train the model of `loop.py` (32-64-10, ReLU) on the same list of ready batches of 32, on one
thread, with torch's fused Adam, which is the best a user can give them. Keras brings layers and an optimizer of its own.
All track loss and accuracy of the epoch, by the cheapest way that the library has, and show progress as they do it by
themselves, on a terminal that nobody looks at; nothing is written to disk. Only the call that trains is timed, what it
does once before and after its steps included. The ratios are medians over the rounds of the ratio within a round. A
library that is not installed is left out, and said so.
"""

import argparse
import io
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from tempfile import TemporaryDirectory

steps_before = 50  # to warm up


class Screen(io.StringIO):
    "A terminal that nobody looks at, so that progress is really drawn"

    def isatty(self) -> bool:
        return True


def ours(optimizer=None):
    from loop import ours as measured

    return lambda batches: measured(batches, optimizer)


def ours_fused():
    from loop import fused_adam

    return ours(fused_adam)


def bare():
    from loop import bare as measured

    return measured


def lightning():
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import TQDMProgressBar
    from loop import loss_fn, make_model
    from torchmetrics.classification import MulticlassAccuracy

    class Ready:  # a list would be taken for a list of loaders
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            return iter(self.batches)

        def __len__(self):
            return len(self.batches)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make_model()
            self.accuracy = MulticlassAccuracy(10, average="micro", validate_args=False)

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            predictions = self.model(inputs)
            loss = loss_fn(predictions, targets)
            self.accuracy(predictions, targets)
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=32)
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True, batch_size=32)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)

    def run(batches):
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                             enable_model_summary=False, callbacks=[TQDMProgressBar()])  # the rich one costs more
        module, loader = Module(), Ready(batches)
        start = time.perf_counter()
        trainer.fit(module, loader)
        return time.perf_counter() - start

    return run


def ignite():
    import torch
    from ignite.engine import create_supervised_trainer
    from ignite.handlers.tqdm_logger import ProgressBar
    from ignite.metrics import Accuracy, Average
    from loop import loss_fn, make_model

    def run(batches):
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        trainer = create_supervised_trainer(
            model, optimizer, loss_fn, output_transform=lambda x, y, predictions, loss: (predictions, y, loss))
        Accuracy(output_transform=lambda output: output[:2]).attach(trainer, "accuracy")
        Average(output_transform=lambda output: output[2]).attach(trainer, "loss")
        ProgressBar().attach(trainer)
        start = time.perf_counter()
        trainer.run(batches, max_epochs=1)
        return time.perf_counter() - start

    return run


def accelerate():
    import torch
    from accelerate import Accelerator
    from loop import loss_fn, make_model
    from tqdm import tqdm

    def run(batches):
        accelerator, model = Accelerator(cpu=True), make_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        start, total, right = time.perf_counter(), 0.0, 0
        for inputs, targets in tqdm(batches):
            optimizer.zero_grad()
            predictions = model(inputs)
            loss = loss_fn(predictions, targets)
            accelerator.backward(loss)
            optimizer.step()
            total += loss.detach()
            right += (predictions.argmax(1) == targets).sum()
        total.item(), right.item()
        return time.perf_counter() - start

    return run


def keras():
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    from keras import layers

    class Ready(keras.utils.PyDataset):
        def __init__(self, batches):
            super().__init__()
            self.batches = batches

        def __len__(self):
            return len(self.batches)

        def __getitem__(self, i):
            return self.batches[i]

    def run(batches):
        model = keras.Sequential([layers.Input((32,)), layers.Dense(64, activation="relu"), layers.Dense(10)])
        model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                      metrics=["accuracy"])
        start = time.perf_counter()
        model.fit(Ready(batches), epochs=1, shuffle=False)
        return time.perf_counter() - start

    return run


def skorch():
    import torch
    from loop import loss_fn, make_model
    from skorch import NeuralNet
    from skorch.callbacks import PassthroughScoring, ProgressBar

    class Ready:
        def __init__(self, dataset, **options):
            self.batches = dataset

        def __iter__(self):
            return iter(self.batches)

        def __len__(self):
            return len(self.batches)

    class Net(NeuralNet):
        def train_step_single(self, batch, **fit_params):
            step = super().train_step_single(batch, **fit_params)
            right = (step["y_pred"].argmax(1) == batch[1]).float().mean()
            self.history.record_batch("train_accuracy", right.item())
            return step

        def get_dataset(self, X, y=None):
            return X

    def run(batches):
        net = Net(make_model(), loss_fn, optimizer=torch.optim.Adam, optimizer__fused=True, lr=1e-3, max_epochs=1,
                  train_split=None, iterator_train=Ready, batch_size=32, verbose=1,
                  callbacks=[ProgressBar(batches_per_epoch=len(batches)),
                             ("accuracy", PassthroughScoring("train_accuracy", on_train=True))])
        start = time.perf_counter()
        net.fit(batches, None)
        return time.perf_counter() - start

    return run


def fastai():
    from functools import partial

    import torch
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.optimizer import OptimWrapper
    from loop import loss_fn, make_model

    class Ready(list):
        device = torch.device("cpu")

    def run(batches):
        adam = partial(OptimWrapper, opt=torch.optim.Adam, fused=True)
        loaders = DataLoaders(Ready(batches), Ready(batches[:1]))  # it always validates: on one batch
        learner = Learner(loaders, make_model(), loss_func=loss_fn, opt_func=adam, lr=1e-3, metrics=accuracy)
        learner.recorder.train_metrics = True
        assert any(isinstance(callback, ProgressCallback) for callback in learner.cbs)
        start = time.perf_counter()
        learner.fit(1)
        return time.perf_counter() - start

    return run


# label: how to make it, its package, what must be imported to use it
libraries = {
    "bare loop, fused Adam, nothing tracked": (bare, "torch", "torch"),
    "**ours**, default optimizer": (ours, "nbdev_trainer", "nbdev_trainer"),
    "**ours**, fused Adam": (ours_fused, "nbdev_trainer", "nbdev_trainer"),
    "Accelerate, loop by hand": (accelerate, "accelerate", "accelerate"),
    "skorch": (skorch, "skorch", "skorch"),
    "Ignite": (ignite, "pytorch-ignite", "ignite.engine"),
    "fastai": (fastai, "fastai", "fastai.learner"),
    "Lightning": (lightning, "lightning", "lightning.pytorch"),
    "Keras on torch, its own Adam": (keras, "keras", "keras"),
}


def child(label: str, steps: int) -> None:
    "Train one epoch for each line that arrives, and answer with its seconds"
    answers = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr = Screen()  # what the library draws
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        import torch
        from loop import make_batches

        torch.set_num_threads(1)
        run, batches = libraries[label][0](), make_batches(steps)
        run(batches[:steps_before])
    except Exception as error:
        return print(f"{type(error).__name__}: {error}".splitlines()[0], file=answers, flush=True)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        print(run(batches), file=answers, flush=True)


def is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def chosen(only: list[str]) -> dict[str, tuple]:
    "The libraries that are wanted and installed; the bare loop and ours always"
    found = {}
    for label, library in libraries.items():
        wanted = not only or library[1] in ("torch", "nbdev_trainer") or any(
            name.lower() in (label.lower(), library[1], label.split(",")[0].split()[0].lower()) for name in only)
        if not wanted:
            continue
        if is_installed(library[1]):
            found[label] = library
        else:
            print(f"{label}: {library[1]} is not installed, left out\n")
    return found


def measure(labels: list[str], steps: int, rounds: int) -> dict[str, list[float]]:
    "Microseconds a step, for each library in each round"
    environment = os.environ | {"KERAS_BACKEND": "torch"}
    children = {}
    for label in labels:
        words = [sys.executable, __file__, "--child", label, "--steps", str(steps)]
        children[label] = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           stderr=subprocess.DEVNULL, text=True, env=environment)
    for label, process in list(children.items()):
        answer = process.stdout.readline().strip()
        if answer != "ready":
            print(f"{label} did not start, left out: {answer}\n")
            process.wait()
            del children[label]
    times: dict[str, list[float]] = {label: [] for label in children}
    try:
        for _ in range(rounds):
            for label, process in children.items():
                process.stdin.write("go\n")
                process.stdin.flush()
                times[label].append(float(process.stdout.readline()) / steps * 1e6)
    finally:
        for process in children.values():
            process.stdin.close()
            process.wait(20)
    return times


def import_times(modules: list[str], rounds: int) -> dict[str, float]:
    "Seconds that each import takes in a fresh process, after torch; the imports take turns"
    program = "import time, torch; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times: dict[str, list[float]] = {module: [] for module in modules}
    with TemporaryDirectory() as folder:  # for what Python compiles in the round that is not counted
        environment |= {"KERAS_BACKEND": "torch", "PYTHONPYCACHEPREFIX": folder}
        for _ in range(rounds + 1):
            for module in modules:
                words = [sys.executable, "-W", "ignore", "-c", program.format(module)]
                said = subprocess.run(words, text=True, capture_output=True, env=environment, check=True).stdout
                times[module].append(float(said.split()[-1]))
    return {module: statistics.median(found[1:]) for module, found in times.items()}


def print_steps(found: dict[str, tuple], steps: int, rounds: int) -> None:
    times = measure(list(found), steps, rounds)
    medians = {label: statistics.median(values) for label, values in times.items()}
    print(f"{rounds} rounds of {steps} steps\n")
    print("| library | version | µs a step | / ours | / ours, fused Adam |\n|---|---|---|---|---|")
    for label, median in medians.items():
        number = version(found[label][1]).split("+")[0]
        ratios = [statistics.median(a / b for a, b in zip(times[label], times[ours]))
                  for ours in ("**ours**, default optimizer", "**ours**, fused Adam")]
        print(f"| {label} | {number} | {median:.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def print_imports(found: dict[str, tuple], rounds: int) -> None:
    modules = list(dict.fromkeys(module for _, package, module in found.values() if package != "torch"))
    print(f"medians of {rounds} imports\n")
    print("| import, after torch | seconds |\n|---|---|")
    for module, seconds in import_times(modules, rounds).items():
        print(f"| `{module}` | {seconds:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps of each library in a round")
    parser.add_argument("--rounds", type=int, default=11, help="times that all libraries take their turn")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="such as Lightning; beside ours")
    parser.add_argument("--imports", action="store_true", help="time the imports instead of the steps")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.steps)
    found = chosen(arguments.only)
    print(f"{date.today()}, Python {platform.python_version()}, torch {version('torch')}, one thread, ", end="")
    if arguments.imports:
        print_imports(found, arguments.rounds)
    else:
        print_steps(found, arguments.steps, arguments.rounds)


if __name__ == "__main__":
    main()
