"""What training costs on a GPU beside a script written by hand: ResNet-50 and a GPT-2 of 124 million weights, in bf16. Needs a CUDA device.

    python benchmarks/gpu.py [--models resnet50 gpt2] [--steps 50] [--rounds 5] [--check]

Both sides train the same model from the same weights on the same ready batches, by the same fused AdamW, with the loss tracked; ours also with
its default callbacks, and accuracy for the ResNet, which has its channels last on both sides. They take turns in every round, and the first ten
steps of each are not timed. Shown is the median over the rounds of our throughput as a share of the script's: above 1 is faster. `--check` fails
below 0.98. The recorded step (`cuda_graph=True`) is shown beside it.

`--emulate` runs small models on a CPU, to see that it runs; those times mean nothing.
"""
import argparse
import statistics
import sys
import time
from datetime import date

import torch
from torch import nn
from torch.nn import functional as F

import nbdev_trainer
from nbdev_trainer import Accuracy, Callback, Learner, Tape

BOUND, WARM_UP = 0.98, 10


class Bottleneck(nn.Module):
    "Three convolutions beside a short way (He et al. 2016, arXiv:1512.03385), the stride in the middle one"

    def __init__(self, n_in: int, width: int, stride: int):
        super().__init__()
        def conv(n_in, n_out, size, stride=1):
            return [nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False), nn.BatchNorm2d(n_out)]
        self.long = nn.Sequential(*conv(n_in, width, 1), nn.ReLU(inplace=True), *conv(width, width, 3, stride), nn.ReLU(inplace=True),
                                  *conv(width, 4 * width, 1))
        self.short = nn.Identity() if stride == 1 and n_in == 4 * width else nn.Sequential(*conv(n_in, 4 * width, 1, stride))

    def forward(self, images): return F.relu(self.long(images) + self.short(images), inplace=True)


def resnet(depths=(3, 4, 6, 3), width: int = 64, classes: int = 1000) -> nn.Module:
    "ResNet-50, or a smaller one"
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                               nn.MaxPool2d(3, 2, 1)]
    n_in = width
    for k, depth in enumerate(depths):
        for block in range(depth):
            layers.append(Bottleneck(n_in, width << k, 2 if k and not block else 1))
            n_in = 4 * (width << k)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, classes))


class Block(nn.Module):
    "Attention to what came before, and two layers for each token (Radford et al. 2019)"

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x):  # (batch, tokens, width)
        n, length, width = x.shape
        parts = self.attention(self.norms[0](x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).reshape(n, length, width)
        x = x + self.out(found)
        return x + self.layers(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, width: int = 768, heads: int = 12, depth: int = 12, length: int = 1024, words: int = 50257):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, words, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)
        self.head.weight = self.words.weight
        self.register_buffer("positions", torch.arange(length), persistent=False)

    def forward(self, tokens): return self.head(self.blocks(self.words(tokens) + self.places(self.positions[:tokens.shape[1]])))


def by_token(scores, tokens): return F.cross_entropy(scores.flatten(0, 1), tokens.flatten())


def pictures(n: int, size: int, classes: int): return torch.randn(n, 3, size, size), torch.randint(classes, (n,))
def texts(n: int, length: int, words: int): return torch.randint(words, (n, length)), torch.randint(words, (n, length))


MODELS = {  # the model, a batch, the loss, options of the learner; and the same for a CPU
    "resnet50": ((resnet, lambda: pictures(64, 224, 1000), F.cross_entropy, {"memory_format": "channels_last", "metrics": [Accuracy()]}),
                 (lambda: resnet((1, 1), 8, 10), lambda: pictures(4, 32, 10), F.cross_entropy,
                  {"memory_format": "channels_last", "metrics": [Accuracy()]})),
    "gpt2": ((GPT, lambda: texts(8, 1024, 50257), by_token, {}), (lambda: GPT(32, 2, 2, 16, 100), lambda: texts(4, 16, 100), by_token, {})),
}


class Clock(Callback):
    "Times a fit after its warm-up"

    def __init__(self, steps: int, device: str): self.last, self.device = steps + WARM_UP, device

    def after_batch(self, trainer):
        if trainer.state.batch in (WARM_UP, self.last):
            if self.device != "cpu": torch.cuda.synchronize()
            if trainer.state.batch == WARM_UP: self.start = time.perf_counter()
            else: self.seconds = time.perf_counter() - self.start


def made(make) -> nn.Module:
    torch.manual_seed(0)
    return make()


def script(make, batches, loss_fn, options, device: str) -> float:
    "As one writes it by hand"
    model = made(make).to(device)
    if "memory_format" in options: model = model.to(memory_format=torch.channels_last)
    optimizer, total = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), torch.zeros((), device=device)
    for k, (inputs, targets) in enumerate(batches):
        if k == WARM_UP:
            if device != "cpu": torch.cuda.synchronize()
            start = time.perf_counter()
        if "memory_format" in options: inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16): loss = loss_fn(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    if device != "cpu": torch.cuda.synchronize()
    return time.perf_counter() - start


def ours(make, batches, loss_fn, options, device: str, cuda_graph=False) -> float:
    clock = Clock(len(batches) - WARM_UP, device)
    learner = Learner(made(make), (batches, None), loss_fn, lr=1e-4, device=device, precision="bf16", verbose=0, callbacks=[clock],
                      cuda_graph=cuda_graph, **options)
    learner.fit(1)
    return clock.seconds


def compare(name: str, steps: int, rounds: int, device: str) -> float:
    "Our throughput as a share of the script's"
    make, batch, loss_fn, options = MODELS[name][device == "cpu"]
    torch.manual_seed(0)
    several = [[part.to(device) for part in batch()] for _ in range(4)]
    batches = [several[k % 4] for k in range(steps + WARM_UP)]
    arguments = make, batches, loss_fn, options, device
    loops = {"script": lambda: script(*arguments), "ours": lambda: ours(*arguments),
             "ours, recorded": lambda: ours(*arguments, Tape() if device == "cpu" else True)}
    times = [[loop() / steps for loop in loops.values()] for _ in range(rounds)]
    size = sum(p.numel() for p in made(make).parameters()) / 1e6
    print(f"\n{name}, {size:.1f} million weights, batches of {len(several[0][0])}\n")
    print("| loop | ms a step | samples a second | throughput / script's | of the rounds |\n|---|---|---|---|---|")
    medians = {}
    for loop, found in zip(loops, zip(*times)):
        ratios, median = sorted(row[0] / one for one, row in zip(found, times)), statistics.median(found)
        medians[loop] = statistics.median(ratios)
        print(f"| {loop} | {1e3 * median:.1f} | {len(several[0][0]) / median:.0f} | {medians[loop]:.3f} | {ratios[0]:.3f} to "
              f"{ratios[-1]:.3f} |", flush=True)
    return medians["ours"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or options.emulate):
        sys.exit("This needs a CUDA device, and torch finds none here. --emulate runs small models on a CPU, without meaning.")
    device = "cpu" if options.emulate else "cuda"
    where = "a CPU, emulated: these times mean nothing" if options.emulate else torch.cuda.get_device_name()
    print(f"{date.today()}, nbdev_trainer {nbdev_trainer.__version__}, torch {torch.__version__}, {where}, medians of {options.rounds} "
          f"rounds of {options.steps} steps")
    ratios = {name: compare(name, options.steps, options.rounds, device) for name in options.models}
    slow = {name: round(ratio, 3) for name, ratio in ratios.items() if ratio < BOUND}
    if options.check and not options.emulate and slow: sys.exit(f"\nslower than {BOUND} of the script: {slow}")


if __name__ == "__main__":
    main()
