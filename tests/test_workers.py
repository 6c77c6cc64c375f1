"""Workers: lists of tensors with few open files, hanging threads, draws of the items, and errors told once."""

import subprocess
import sys
import textwrap
import time
import traceback

import numpy as np
import pytest
import torch

from nbdev_trainer.core.nested import tensors
from nbdev_trainer.data import Array, Boxes, Category, Data, Image, Number, PerSample
from nbdev_trainer.data.batch import Batch
from nbdev_trainer.data.workers import SampleLoader

WAYS = {"threads": {"num_workers": 2, "workers": "threads"}, "processes": {"num_workers": 2}}


class Numbers:
    """Gives what `make` makes of a task; tells positions as numbers."""

    training = True

    def __init__(self, make):
        self.make = make

    def read(self, task, mark):
        mark(task.ids[0])
        return self.make(task)

    def finish(self, read, task, device):
        return Batch(read, size=len(task.ids), ids=torch.tensor(task.ids))

    def name_of(self, position):
        return f"number {position}"


def loader(make, n=8, batch_size=2, seed=0, **how):
    return SampleLoader(Numbers(make), torch.arange(n), batch_size=batch_size, shuffle=True, seed=seed, **how)


def run(program, seconds=60):
    """A program in a process of its own: what it prints, and how long it took."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - begin


def all_inputs(loader, epoch=0):
    return [batch.inputs for batch in loader.batches(epoch)]


def equal(a, b):
    """Values, types, shapes, and the order in memory; what lies between the numbers of a crop is not sent."""
    return all(
        torch.equal(x, y) and x.dtype == y.dtype and x.clone().stride() == y.clone().stride()
        for x, y in zip(tensors(a), tensors(b), strict=True)
    )


def of_many_kinds(task):
    """Lists at any depth, of tensors of different shapes, of none, and of other things."""

    def each(make):
        return [make(i) for i in task.ids]

    return {
        "boxes": each(lambda i: torch.full((i % 3, 4), i)),
        "deep": {"one": (each(lambda i: torch.tensor(i > 3)), each(lambda i: torch.rand(2, 2)[:0]))},
        "pictures": each(lambda i: torch.arange(24, dtype=torch.uint8).view(2, 4, 3).permute(2, 0, 1) + i),
        "crops": each(lambda i: torch.arange(10_000.0).view(100, 100)[i : i + 2, :3]),
        "mixed": [torch.tensor(1), torch.tensor(2.5)],
        "texts": each(str),
        "none": [],
        "one": [torch.ones(3, dtype=torch.bfloat16)],
        "stacked": torch.ones(2, 3),
    }


@pytest.mark.parametrize("way", WAYS)
def test_lists_come_out_as_they_are_read_here(way):
    here, there = all_inputs(loader(of_many_kinds)), all_inputs(loader(of_many_kinds, **WAYS[way]))
    assert len(here) == 4
    for one, other in zip(here, there, strict=True):
        assert equal(one, other)
        assert list(one) == list(other) and one["texts"] == other["texts"] and other["none"] == []
        assert [type(part) for part in other["deep"]["one"]] == [list, list]


def test_tensors_of_a_list_stay_independent():
    read = all_inputs(loader(lambda task: [torch.ones(2), torch.ones(2)], n=2, num_workers=1))[0]
    weight = torch.ones((), requires_grad=True)
    result = (read[0] * weight).sum()
    read[1].add_(1)  # what is kept for the gradient of the other is not changed by this
    result.backward()
    assert weight.grad == 2
    assert read[0].tolist() == [1, 1]


def test_lists_take_few_open_files():
    """More tensors than files may be open; without packing this dies or waits for ever."""
    told, _ = run("""
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
        import numpy as np
        from nbdev_trainer.data import Boxes, Category, Data, Image, PerSample
        items = [{"i": np.zeros((8 + i % 5, 8, 3), np.uint8), "b": [[0, 0, 3., 3]], "l": ["a"]} for i in range(512)]
        kinds = {"i": Image("i", collation="list"), "b": Boxes("b"), "l": Category("l", per="b")}
        data = Data(items, kinds, inputs="i", targets=PerSample("b", "l"))
        batches = list(data.loaders(128, seed=0, num_workers=2).train.batches(0))
        print(sum(batch.size for batch in batches), len(batches[0].inputs), batches[0].targets[0]["b"].shape[-1])
    """)
    assert told.split() == ["512", "128", "4"]


def test_detection_batches_are_the_same_from_processes():
    draw = np.random.default_rng(0)
    items = [
        {
            "i": draw.integers(0, 255, (8 + i % 5, 8, 3), np.uint8),
            "l": ["a", "b"][: i % 3],
            "b": [[0.0, 0, 3, 3 + j] for j in range(i % 3)],
        }
        for i in range(20)
    ]
    kinds = {
        "i": Image("i", collation="list"),
        "b": Boxes("b"),
        "l": Category("l", per="b", vocab=["a", "b"]),
    }
    data = Data(items, kinds, inputs="i", targets=PerSample("b", "l"))
    here, there = (list(data.loaders(6, seed=0, num_workers=n).train.batches(0)) for n in (0, 2))
    for one, other in zip(here, there, strict=True):
        assert equal((one.inputs, one.targets), (other.inputs, other.targets))


HANGING = """
    import time, torch
    from nbdev_trainer.data.batch import Batch
    from nbdev_trainer.data.workers import SampleLoader
    class Hanging:
        training = True
        def read(self, task, mark):
            mark(task.ids[0])
            if task.ids[0] >= 4: time.sleep(40)
            return torch.ones(2)
        def finish(self, read, task, device): return Batch(read, size=2)
        def name_of(self, position): return f"number {position}"
    loader = SampleLoader(Hanging(), torch.arange(8), batch_size=2, num_workers=2, workers="threads", timeout=0.2)
"""


def test_a_hanging_thread_does_not_keep_the_program():
    told, seconds = run(
        HANGING
        + """
    try: list(loader.batches(0))
    except TimeoutError as error: print(error)
    """
    )
    assert "reading number 4 took more than timeout=0.2 seconds" in told
    assert seconds < 30


def test_a_program_may_end_in_the_middle_of_an_epoch():
    told, seconds = run(
        HANGING
        + """
    batches = loader.batches(0)
    print(next(batches).size)
    """
    )
    assert told.split() == ["2"]
    assert seconds < 30


def test_closing_an_epoch_stops_its_threads():
    begun = []

    def slow(task):
        begun.append(task)
        time.sleep(0.05)
        return torch.ones(2)

    batches = loader(slow, n=200, num_workers=2, workers="threads", ahead=20).batches(0)
    next(batches)
    batches.close()
    done = len(begun)
    time.sleep(0.4)
    assert len(begun) <= done + 2  # what they had begun, and not the forty that were waiting


def draws(task):
    return torch.tensor([np.random.rand(), torch.rand(()).item()])


def drawn(n, seed=0, epoch=0):
    return torch.stack(all_inputs(loader(draws, seed=seed, num_workers=n), epoch))


def test_draws_of_items_follow_the_seed_and_the_epoch_and_not_the_workers():
    once = drawn(2)
    assert len(once.unique()) == once.numel()
    assert torch.equal(once, drawn(2)) and torch.equal(once, drawn(1))
    assert not torch.equal(once, drawn(2, seed=1)) and not torch.equal(once, drawn(2, epoch=1))


def test_draws_of_items_leave_the_generators_here_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn(2)
    assert torch.equal(torch.rand(3), expected)


def broken(task):
    error = ValueError("the picture is broken")
    error.add_note("number 3: reading failed")
    raise error


def caused(task):
    try:
        {}["missing"]
    except KeyError as cause:
        raise ValueError("the picture is broken") from cause


def test_an_error_from_a_process_is_told_once():
    with pytest.raises(ValueError, match="the picture is broken") as caught:
        all_inputs(loader(broken, num_workers=1))
    told = "".join(traceback.format_exception(caught.value))
    assert told.count("number 3: reading failed") == 1
    assert told.count("ValueError: the picture is broken") == 1
    first, where = caught.value.__notes__
    assert first == "number 3: reading failed"
    assert where.startswith("in a worker process:") and "in broken" in where


def test_the_cause_of_an_error_from_a_process_is_told():
    with pytest.raises(ValueError, match="the picture is broken") as caught:
        all_inputs(loader(caused, num_workers=1))
    (note,) = caught.value.__notes__
    assert "KeyError: 'missing'" in note and "in caused" in note and "the picture is broken\n" not in note


@pytest.mark.parametrize("how", [{}, *WAYS.values()])
def test_stop_iteration_is_an_error_that_names_the_place(how):
    def ends(task):
        return next(iter([]))

    with pytest.raises(RuntimeError, match=r"StopIteration in a batch of 2 samples from number \d on"):
        all_inputs(loader(ends, **how))


class Stopping:
    def __getitem__(self, position):
        return next(iter([])) if position == 5 else {"x": 1.0}

    def __len__(self):
        return 8


@pytest.mark.parametrize("how", [{}, *WAYS.values()])
def test_stop_iteration_of_an_item_names_it(how):
    data = Data(Stopping(), {"x": Number("x", mean=0, std=1)}, inputs="x")
    with pytest.raises(RuntimeError, match="StopIteration in a batch of") as caught:
        list(data.loaders(4, **how).train.batches(0))
    assert any("item 5" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("how", [{}, *WAYS.values()])
def test_a_device_may_be_a_text(how):
    made = loader(lambda task: torch.tensor(task.ids), **how)
    assert [batch.inputs.tolist() for batch in made.batches(0, device="cpu")] == [
        batch.inputs.tolist() for batch in made.batches(0)
    ]


def test_a_rank_whose_samples_are_all_left_out_yields_an_empty_batch():
    rows = [{"x": [1.0]}, {"x": [2.0]}, {"x": "broken"}, {"x": "broken"}, {"x": [5.0]}]
    x = Array(lambda row: np.array(row["x"], np.float32))
    data = Data(rows, {"x": x}, inputs="x", on_error="skip", skip_limit=1.0)
    loader = data.loader(rows, batch_size=4, on_error="skip")
    ranks = [[batch.ids.tolist() for batch in loader.shard(rank, 2).batches(0)] for rank in range(2)]
    assert ranks == [[[0, 1], [4]], [[], []]]
    assert [batch.ids.tolist() for batch in loader.batches(0)] == [[0, 1], [4]]


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{}, {"num_workers": 2}, {"num_workers": 2, "workers": "threads"}], ids=str)
def test_batches_copied_ahead_to_a_gpu_are_those_of_the_cpu(how):
    rows = [{"x": [float(number), number + 0.5]} for number in range(50)]
    x = Array(lambda row: np.array(row["x"], np.float32))
    loaders = Data(rows, {"x": x}, inputs="x").loaders(8, seed=0, **how)
    expected = [batch.inputs for batch in loaders.train.batches(0)]
    found = []
    for batch in loaders.train.batches(0, device="cuda"):
        assert batch.inputs.is_cuda
        torch.cuda._sleep(10_000_000)  # the model is busy while the next batch is copied
        found.append(batch.inputs * 1)
    assert all(torch.equal(one, other.cpu()) for one, other in zip(expected, found, strict=True))
