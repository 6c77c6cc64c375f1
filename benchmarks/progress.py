"""What the live table and curve of a notebook add to a step of one millisecond.

    python benchmarks/progress.py [--steps 2000] [--rounds 9]

A real Jupyter kernel trains, and this program listens to it, as a browser would. Each step computes for one millisecond,
so what is measured is what comes on top. Fits with and without `Progress` take turns; both record the history. Epochs
of 20 steps are the hard case: fifty rows a second. Shown are medians over the rounds:

- processor time with `Progress` over that without, all threads of the kernel together, which other programs on the
  machine hardly disturb;
- the time on the clock that was spent inside of `Progress`, as a share of a fit without it;
- the time on the clock with it over that without, and beside it the same ratio for two fits without it. A difference
  that is smaller than what the latter is away from 1 says nothing.
"""
import argparse
import platform
import statistics
import subprocess
import sys
from datetime import date

MEASURE = '''
import sys, time
import torch
from torch import nn
import nbdev_trainer
from nbdev_trainer import Accuracy, Progress, Recorder, StepOutput, SupervisedStep, Trainer

class OneMillisecond(SupervisedStep):
    "The given step, and then computing until a millisecond of this thread is used up"
    def train(self, trainer, batch):
        until = time.thread_time() + 1e-3
        output = super().train(trainer, batch)
        while time.thread_time() < until: pass
        return output

torch.set_num_threads(1)
inputs = torch.randn(32, 32)
batch = inputs, inputs[:, :10].argmax(1)

inside = 0.0

def timed(handler):
    "The handler, which adds the time it takes to `inside`"
    def call(self, trainer):
        global inside
        start = time.perf_counter()
        try: handler(self, trainer)
        finally: inside += time.perf_counter() - start
    return call

class Timed(Progress):
    "Progress that knows how long it took"
    def before_fit(self, trainer): timed(Progress.before_fit)(self, trainer)
    def after_batch(self, trainer): timed(Progress.after_batch)(self, trainer)
    def after_evaluate_batch(self, trainer): timed(Progress.after_evaluate_batch)(self, trainer)
    def after_evaluate(self, trainer): timed(Progress.after_evaluate)(self, trainer)
    def after_epoch(self, trainer): timed(Progress.after_epoch)(self, trainer)
    def after_fit(self, trainer): timed(Progress.after_fit)(self, trainer)

def seconds(n_batches, epochs, *callbacks):
    model = nn.Linear(32, 10)
    step, optimizer = OneMillisecond(nn.CrossEntropyLoss()), torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, step, optimizer, metrics=[Accuracy()], callbacks=[Recorder(), *callbacks])
    start = time.process_time(), time.perf_counter()
    trainer.fit([batch] * n_batches, [batch], epochs)
    return time.process_time() - start[0], time.perf_counter() - start[1]

def ratios(n_batches, epochs, rounds):
    global inside
    seconds(n_batches, 1, Timed())
    for turn in range(rounds):
        without = seconds(n_batches, epochs)
        inside = 0.0
        shown, share = seconds(n_batches, epochs, Timed()), inside / without[1]
        again = seconds(n_batches, epochs)
        print(shown[0] / without[0], share, shown[1] / without[1], again[1] / without[1])
'''


def in_kernel(code: str, timeout: float = 600) -> tuple[str, int]:
    "What some code prints in a Jupyter kernel, and how many outputs it has shown or changed"
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", stderr=subprocess.DEVNULL)
    printed, displays = [], 0

    def listen(message):
        nonlocal displays
        content = message["content"]
        if message["msg_type"] == "stream":
            printed.append(content["text"])
        elif message["msg_type"] in ("display_data", "update_display_data"):
            displays += 1
        elif message["msg_type"] == "error":
            sys.exit("\n".join(content["traceback"]))

    try:
        client.execute_interactive(code, timeout=timeout, output_hook=listen)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return "".join(printed), displays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="in each fit")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    import nbdev_trainer
    import torch

    print(f"nbdev_trainer {nbdev_trainer.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
          f"{platform.system()} {platform.machine()}, {date.today()}\n")
    print("| epochs of | processor time, with / without | inside of it | clock, with / without | without / without "
          "| outputs sent a second |")
    print("|---:|---:|---:|---:|---:|---:|")
    for n_batches in (20, 200, options.steps):
        epochs = options.steps // n_batches
        printed, displays = in_kernel(MEASURE + f"ratios({n_batches}, {epochs}, {options.rounds})")
        numbers = [float(text) for text in printed.split()]
        processor, inside, clock, noise = (statistics.median(numbers[kind::4]) for kind in range(4))
        per_second = displays / (options.rounds * options.steps / 1000)
        print(f"| {n_batches} steps | {processor:.4f} | {inside:.2%} | {clock:.4f} | {noise:.4f} | {per_second:.1f} |",
              flush=True)


if __name__ == "__main__":
    main()
