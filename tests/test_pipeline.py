"""The data pipeline: the same samples whoever reads them, and failures that name item, stage and fix."""

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, RandomSampler

from nbdev_trainer import Accuracy, Batch, Learner
from nbdev_trainer.core.nested import tensors
from nbdev_trainer.data import (
    Apply, Array, Audio, Balanced, Boxes, Cache, Categories, Category, Data, Image, Mask, Normalize, Number, Numbers,
    PerSample, Points, Series, Split, StreamLoader, Text, Tokens, Weighted, random_split,
)
from nbdev_trainer.data.color import RandomColor
from nbdev_trainer.data.kinds import kind_from, known_kinds
from nbdev_trainer.data.transforms import Flip, RandomCrop, Resize


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Forty pictures of two classes, of different sizes."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(40):
        name = folder / ("ants", "bees")[number % 2] / f"{number:02}.jpg"
        name.parent.mkdir(exist_ok=True)
        pixels = draw.integers(0, 255, (20 + number % 7, 30, 3), np.uint8)
        pixels[..., number % 2] //= 4
        PIL.Image.fromarray(pixels).save(name)
    return sorted(folder.rglob("*.jpg"))


def jitter(value):
    """A transform that draws from all global generators."""
    shift = int(10 * random.random() + 10 * np.random.rand() + 10 * torch.rand(()).item())
    return (value.int() + shift).clamp(0, 255).byte()


def label_of(path):
    return path.parent.name


def describe_pictures(items, foreign=True, **options):
    steps = [RandomCrop(16), Flip(), RandomColor(0.2)] + ([Apply(jitter, "image")] if foreign else [])
    return Data(items, {"image": Image(), "label": Category(label_of)}, inputs="image", targets="label",
                split=random_split(valid=0.25, seed=1), transforms=[Resize(20)], train_transforms=steps,
                batch_transforms=[Normalize.imagenet()], **options)


def stream(loader, epoch=0, start=0):
    """A hash of each batch of an epoch, and the positions in it."""
    found = []
    for batch in loader.batches(epoch, start):
        parts = b"".join(one.contiguous().numpy().tobytes() for one in tensors([batch.inputs, batch.targets]))
        found.append((hashlib.sha256(parts).hexdigest(), batch.ids.tolist()))
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # there may be fewer cores
@pytest.mark.parametrize("how", [{"num_workers": 1}, {"num_workers": 2}, {"num_workers": 4}], ids=str)
def test_any_number_of_worker_processes_gives_the_same_samples(pictures, how):
    data = describe_pictures(pictures)
    here, there = data.loaders(8, seed=0), data.loaders(8, seed=0, **how)
    for epoch in (0, 1): assert stream(there.train, epoch) == stream(here.train, epoch)
    assert stream(there.valid) == stream(here.valid)
    assert stream(here.train, 0) != stream(here.train, 1)


@pytest.mark.parametrize("n", [1, 3])
def test_threads_give_the_same_samples(pictures, n):
    data = describe_pictures(pictures, foreign=False)
    here, there = data.loaders(8, seed=0), data.loaders(8, seed=0, num_workers=n, workers="threads")
    for epoch in (0, 1): assert stream(there.train, epoch) == stream(here.train, epoch)


def test_two_ranks_together_see_what_one_sees(pictures):
    loader = describe_pictures(pictures).loaders(8, seed=0).train
    for batch, *parts in zip(loader.batches(2), *(loader.shard(rank, 2).batches(2) for rank in range(2)), strict=True):
        assert torch.equal(batch.inputs, torch.cat([part.inputs for part in parts]))
        assert batch.ids.tolist() == [one for part in parts for one in part.ids.tolist()]


NEW_PROCESS = """
import sys; sys.path.insert(0, {tests!r})
from test_pipeline import describe_pictures, stream
from pathlib import Path
loader = describe_pictures(sorted(Path({folder!r}).rglob("*.jpg"))).loaders(8, seed=0, num_workers={workers}).train
for start in range(len(loader) + 1): print(stream(loader, 3, start))
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_at_every_batch_in_a_new_process_gives_the_rest_of_the_epoch(pictures, workers):
    program = NEW_PROCESS.format(tests=str(Path(__file__).parent), folder=str(pictures[0].parent.parent), workers=workers)
    output = subprocess.check_output([sys.executable, "-c", program], text=True, timeout=120)
    expected = stream(describe_pictures(pictures).loaders(8, seed=0).train, 3)
    assert [eval(line) for line in output.splitlines()] == [expected[start:] for start in range(len(expected) + 1)]


def test_validation_and_other_readers_change_nothing(pictures):
    data = describe_pictures(pictures)
    alone = stream(data.loaders(8, seed=0).train)
    loaders = data.loaders(8, seed=0)
    batches, found = loaders.train.batches(0), []
    for batch in batches:
        list(loaders.valid.batches(0))
        list(loaders.train.batches(1))
        found.append(batch.ids.tolist())
    assert found == [ids for _, ids in alone]
    assert stream(loaders.train) == alone


def test_global_generators_are_as_before(pictures):
    def drawn(): return random.random(), np.random.rand(), torch.rand(()).item()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    data = describe_pictures(pictures)
    for how in ({}, {"num_workers": 1}): stream(data.loaders(8, seed=0, **how).train)
    assert drawn() == expected


def test_what_is_kept_changes_nothing(pictures, tmp_path):
    expected = stream(describe_pictures(pictures).loaders(8, seed=0).train, 1)
    for cache in (Cache("10MB"), Cache("10kB"), Cache("10MB", tmp_path / "kept")):
        loader = describe_pictures(pictures, cache=cache).loaders(8, seed=0).train
        stream(loader, 0)
        assert stream(loader, 1) == expected
    assert len(list((tmp_path / "kept").iterdir())) == 30


def test_a_fit_goes_on_at_any_batch_with_the_samples_it_would_have_seen(pictures):
    def learner():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(768, 2))
        loaders = describe_pictures(pictures).loaders(8, seed=0)
        loaders.valid_sets = {}
        return Learner(model, loaders, optimizer=torch.optim.SGD(model.parameters(), 0.01), verbose=0, seed=0,
                       default_callbacks=False)

    states, whole = [], learner()
    whole.on("after_batch", lambda trainer: states.append(trainer.state_dict()))
    whole.fit(2)
    assert len(states) == 8
    for state in states:
        again = learner()
        again.on("after_batch", lambda trainer: None)
        again.trainer.load_state_dict(state)
        again.fit(2, resume=True)
        for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_learner_takes_the_loss_from_the_kind_and_trains(pictures, capsys):
    data = describe_pictures(pictures)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 2))
    learner = Learner(model, data.loaders(8, seed=0, num_workers=2), metrics=[Accuracy()], lr=1e-2, seed=0)
    learner.fit(4)
    assert "loss: CrossEntropyLoss(), for the kind of the targets" in capsys.readouterr().out
    assert learner.history["valid_accuracy"][-1] >= 0.9
    assert len(learner.predict(data.loader(pictures)).predictions) == 40


HOW = {"here": {}, "processes": {"num_workers": 2}, "threads": {"num_workers": 2, "workers": "threads"}}


def failing(items, fields, how, **options):
    data = Data(items, fields, inputs=next(iter(fields)), **options)
    start = time.perf_counter()
    with pytest.raises(Exception) as caught: list(data.loaders(4, seed=0, **HOW[how]).train.batches(0))
    assert time.perf_counter() - start < 10  # seconds of a busy machine; two of a quiet one
    return "\n".join([f"{type(caught.value).__name__}: {caught.value}", *getattr(caught.value, "__notes__", [])])


@pytest.mark.parametrize("how", HOW)
def test_each_failure_names_item_stage_and_fix(pictures, tmp_path, how):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(pictures[0].read_bytes()[:300])
    text = failing([*pictures[:3], broken], {"image": Image()}, how, transforms=[Resize(8)])
    assert "truncated" in text.lower() and f"item 3 '{broken}': encoding the field 'image' as Image failed" in text
    assert "on_error='skip' passes them over" in text
    text = failing([tmp_path / "missing.jpg"], {"image": Image()}, how)
    assert "FileNotFoundError" in text and "item 0 " in text and "missing.jpg" in text
    text = failing([{"label": "wasp"}], {"label": Category("label", vocab=["ant", "bee"])}, how)
    assert "the label 'wasp' is not in the vocabulary" in text and "vocab=[...]" in text and "item 0" in text
    text = failing(pictures[:4], {"image": Image()}, how)
    assert "To stack them they must be equal: bring them to one size by a transform such as Resize" in text
    assert "collating the field 'image' failed: sample 0 is item" in text
    text = failing([{"age": 3}, {"year": 4}], {"age": Number("age")}, how)
    assert "KeyError" in text and "the item has no 'age'. Known fields: 'year'" in text and "item 1" in text
    text = failing([{"age": float("nan")}], {"age": Number("age")}, how)
    assert "no finite number" in text and "missing='median'" in text and "item 0" in text
    if how != "threads":
        text = failing(pictures[:2], {"image": Image()}, how, transforms=[Resize(8), Apply(torch.linalg.inv, "image")])
        assert "the transform Apply" in text and "uint8 (3, 8, 8)" in text


class Deadly(Array):
    """A kind whose values end or hold up whoever reads them."""

    def encode(self, raw):
        if raw == "die": os._exit(3)
        if raw == "hang": time.sleep(20)
        return torch.tensor(0.0)


def test_a_worker_that_dies_is_told_with_what_it_was_reading():
    text = failing(["x"] * 5 + ["die"], {"value": Deadly()}, "processes")
    assert "a worker process died" in text and "item 5 'die'" in text and "num_workers=0" in text


@pytest.mark.parametrize("how", ["processes", "threads"])
def test_a_worker_that_hangs_is_told_within_the_timeout(how):
    data = Data(["hang"], {"value": Deadly()}, inputs="value")
    loader, start = data.loaders(4, seed=0, timeout=1, **HOW[how]).train, time.perf_counter()
    for _ in range(2):  # those who are lost are not asked again
        with pytest.raises((RuntimeError, TimeoutError), match="(?s)'hang'.*timeout="): list(loader.batches(0))
    assert time.perf_counter() - start < 10  # two timeouts


@pytest.mark.parametrize("how", HOW)
def test_what_cannot_be_read_is_passed_over_counted_and_limited(pictures, tmp_path, how):
    broken = tmp_path / "ants" / "broken.jpg"
    broken.parent.mkdir()
    broken.write_bytes(b"no picture")
    items = [*pictures[:19], broken]

    def data(limit):
        return Data(items, {"image": Image(), "label": Category(label_of, vocab=["ants", "bees"])}, inputs="image",
                    targets="label", transforms=[Resize(8)], on_error="skip", skip_limit=limit,
                    split=Split(torch.arange(20), torch.arange(0)))

    forgiving = data(0.1)
    loader = forgiving.loaders(8, seed=0, **HOW[how]).train
    assert [len(batch.ids) for batch in loader.batches(0)] == [8, 8, 4]
    assert list(forgiving.skipped) == [19] and "UnidentifiedImageError" in forgiving.skipped[19]
    assert [len(batch.ids) for batch in loader.in_order().batches(0)] == [8, 8, 3]
    assert stream(loader) == stream(data(0.1).loaders(8, seed=0).train)
    with pytest.raises(RuntimeError, match="(?s)1 of 20 samples could not be read.*skip_limit=0.01.*broken.jpg"):
        list(data(0.01).loaders(8, seed=0, **HOW[how]).train.batches(0))


EXAMPLES = {  # of each kind: a kind, a raw value, and what decoding the encoded value gives (None: the raw value)
    "Array": (Array(), np.arange(6.0).reshape(2, 3), None),
    "Number": (Number(), 2.5, None),
    "Numbers": (Numbers(), [1.0, -2.0, 3.5], None),
    "Category": (Category(vocab=["a", "b"]), "b", None),
    "Categories": (Categories(vocab=["a", "b", "c"]), ["a", "c"], None),
    "Image": (Image(), np.random.default_rng(0).integers(0, 255, (5, 4, 3), np.uint8), None),
    "Mask": (Mask(classes=["x", "y"], ignore_index=255), np.array([[0, 1], [255, 0]], np.uint8), None),
    "Boxes": (Boxes(format="cxcywh"), [[10.0, 20.0, 4.0, 6.0]], None),
    "Points": (Points(), [[1.5, 2.0], [3.0, 4.0]], None),
    "Tokens": (Tokens(), [5, 0, 7], None),
    "Text": (Text(tokenizer="characters", vocab=["<pad>", "<unknown>", "<start>", "<end>", *"abc ."]), "a cab.", None),
    "Series": (Series(), np.ones((2, 5), np.float32), None),
    "Audio": (Audio(sample_rate=8000), (np.ones((1, 5), np.float32), 8000), None),
}


@pytest.mark.parametrize("name", sorted(one.__name__ for one in known_kinds() if one.__module__.startswith("nbdev_trainer.")))
def test_decoding_what_was_encoded_gives_the_raw_value(name):
    kind, raw, _ = EXAMPLES[name]
    for one in (kind, kind_from(kind.describe())):
        back = one.decode(one.encode(raw))
        for value, expected in zip(back, raw) if isinstance(raw, tuple) else [(back, raw)]:
            np.testing.assert_array_equal(np.asarray(value), np.asarray(expected))
    assert kind.text(kind.encode(raw))


def test_detection_batches_are_lists_and_targets_one_dict_for_each_sample(pictures):
    draw = np.random.default_rng(0)
    items = [{"path": path, "boxes": [[1, 2, 12, 15], [3, 3, 20, 18]][:1 + i % 2], "labels": ["ant", "bee"][:1 + i % 2]}
             for i, path in enumerate(pictures)]
    data = Data(items, {"image": Image("path", collation="list"), "boxes": Boxes("boxes"),
                        "labels": Category("labels", per="boxes")},
                inputs="image", targets=PerSample("boxes", "labels"), train_transforms=[Flip()], split=random_split(seed=0))
    batch = next(iter(data.loaders(6, seed=int(draw.integers(9)), num_workers=1).train))
    assert isinstance(batch, Batch) and batch.size == 6 and len({one.shape for one in batch.inputs}) > 1
    assert batch.inputs[0].dtype == torch.float32
    for image, target in zip(batch.inputs, batch.targets, strict=True):
        assert list(target) == ["boxes", "labels"] and len(target["boxes"]) == len(target["labels"]) > 0
        assert (target["boxes"] >= 0).all() and (target["boxes"][:, 2] <= image.shape[2]).all()


def test_samplers_compose_the_training_batches(pictures):
    data = describe_pictures(pictures)
    labels = [path.parent.name == "bees" for path in pictures]
    loader = data.loaders(8, seed=0, sampler=Balanced(labels)).train
    counts = torch.cat([batch.targets for batch in loader.batches(0)]).bincount()
    assert abs(int(counts[0] - counts[1])) <= 1


class Drawing(Dataset):
    """A data set that draws while it is read, from all global generators."""

    def __len__(self): return 20

    def __getitem__(self, i): return np.array([i + random.random(), np.random.rand(), torch.rand(()).item()]), i % 2


def test_items_that_draw_are_the_same_whoever_reads_them():
    data = Data(Drawing(), {"x": Array(0), "label": Category(1)}, inputs="x", targets="label", split=random_split(seed=0))
    here = data.loaders(6, seed=0)
    before = torch.get_rng_state()
    first = stream(here.train), stream(here.valid)
    assert torch.equal(before, torch.get_rng_state())
    for n in (1, 2):
        there = data.loaders(6, seed=0, num_workers=n)
        assert (stream(there.train), stream(there.valid)) == first
    assert stream(here.train, 0, 1) == first[0][1:] and stream(here.train, 1) != first[0]
    parts = [here.train.shard(rank, 2) for rank in range(2)]
    for whole, *halves in zip(here.train.batches(0), *(one.batches(0) for one in parts), strict=True):
        assert torch.equal(whole.inputs, torch.cat([one.inputs for one in halves]))


def numbered(epoch):
    for number in range(50): yield {"x": [float(number), epoch]} if number != 31 else {"y": 0}


def stream_of_numbers(**options):
    noise = Apply(lambda value, random: value + random.random(), "x", random=True)
    return StreamLoader(numbered, {"x": Array(read_x)}, inputs="x", batch_size=8, transforms=[noise], seed=3,
                        on_error="skip", **options)


def read_x(item):
    return np.array(item["x"], np.float32)


@pytest.mark.parametrize("how", [{"num_workers": 1}, {"num_workers": 2}], ids=str)
def test_a_stream_is_the_same_in_workers_and_for_ranks(how):
    here, there = stream_of_numbers(), stream_of_numbers(**how)
    assert [len(ids) for _, ids in stream(here, 1)] == [8] * 6 + [2]
    assert stream(there, 1) == stream(here, 1) and list(there.source.skipped) == [31]
    for start in range(8): assert stream(there, 1, start) == stream(here, 1)[start:]
    ranks = [stream_of_numbers(rank=rank, world_size=2, **how).batches(1) for rank in range(2)]
    for whole, *halves in zip(here.batches(1), *ranks, strict=True):
        assert torch.equal(whole.inputs, torch.cat([one.inputs for one in halves]))


@pytest.mark.parametrize("how", HOW)
def test_a_broken_item_of_a_stream_is_named(how):
    loader = StreamLoader(numbered, {"x": Array(read_x)}, inputs="x", batch_size=8, **HOW[how])
    with pytest.raises(KeyError) as caught: list(loader.batches(0))
    assert "item 31" in str(caught.value.__notes__) and "reading the field 'x'" in str(caught.value.__notes__)


def test_a_stream_of_which_too_much_is_broken_stops():
    loader = StreamLoader(lambda epoch: [{"x": [1.0]}, {}] * 100, {"x": Array(read_x)}, inputs="x", batch_size=8,
                          on_error="skip", skip_limit=0.1)
    with pytest.raises(RuntimeError, match="(?s)12 of 24 samples could not be read, more than skip_limit=0.1"):
        list(loader.batches(0))


@pytest.mark.parametrize("how", HOW)
def test_what_stands_in_for_a_broken_item_is_one_that_the_sampler_would_take(how):
    items = [{"x": float(i)} if i != 5 else {} for i in range(40)]
    weights = [0.0] * 4 + [1.0] * 4 + [0.0] * 32
    data = Data(items, {"x": Number("x")}, inputs="x", on_error="skip", skip_limit=0.5)
    loader = data.loaders(8, seed=0, sampler=Weighted(weights), **HOW[how]).train
    seen = {one for epoch in range(3) for batch in loader.batches(epoch) for one in batch.ids.tolist()}
    assert seen == {4, 6, 7} and list(data.skipped) == [5]
    with pytest.raises(TypeError, match="sampler is .*RandomSampler; expected one of nbdev_trainer.data"):
        data.loaders(8, sampler=RandomSampler(items))
