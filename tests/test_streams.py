"""Streams: one place that counts, whoever reads ahead; what fails is told in its turn; the next epoch is whole."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from nbdev_trainer import Learner
from nbdev_trainer.data import Apply, Array, Data, Numbers, StreamLoader, random_split

HOW = {"here": {}, "threads": {"num_workers": 2, "workers": "threads"}, "processes": {"num_workers": 2}}
by_how = pytest.mark.parametrize("how", HOW)


class Counter:
    """Knows its place, and begins anew with each epoch."""

    def __init__(self, n=40, broken=None): self.n, self.at, self.broken, self.told = n, 0, broken, None

    def __iter__(self):
        start, self.told = self.told or 0, None
        for self.at in range(start + 1, self.n + 1):
            if self.at - 1 == self.broken: raise OSError("the line is dead")
            yield {"x": [float(self.at - 1)]}

    def state_dict(self): return {"at": self.at}

    def load_state_dict(self, state): self.told = self.at = state["at"]


def read_x(item): return np.array(item["x"], np.float32)


def loader_of(stream, how="here", **options):
    return StreamLoader(stream, {"x": Array(read_x)}, inputs="x", **{"batch_size": 4} | options, **HOW[how])


def values(batches): return [batch.inputs[:, 0].tolist() for batch in batches]


WHOLE = [[4.0 * i + j for j in range(4)] for i in range(10)]


@by_how
@pytest.mark.parametrize("used", [0, 1, 3, 9, 10])
def test_what_is_saved_is_where_the_training_is(how, used):
    loader = loader_of(Counter(), how)
    batches = loader.batches(0)
    for _ in range(used): next(batches)
    saved = copy.deepcopy(loader.state_dict())
    again = loader_of(Counter(), how)
    again.load_state_dict(saved)
    assert values(again.batches(0, used)) == WHOLE[used:]
    assert values(again.batches(1)) == WHOLE
    batches.close()
    assert values(loader.batches(0, used)) == WHOLE[used:]  # the same object goes on as well
    assert values(loader.batches(1)) == WHOLE


@by_how
def test_after_an_error_in_the_first_batch_nothing_is_lost(how):
    loader = loader_of(Counter(), how, transforms=[Apply(broken, "x", foreign=False)])
    with pytest.raises(ArithmeticError): list(loader.batches(0))
    again = loader_of(Counter(), how)
    again.load_state_dict(loader.state_dict())
    assert values(again.batches(0)) == WHOLE


def broken(value): raise ArithmeticError("no")


@by_how
def test_a_stream_that_fails_is_told_after_what_was_read_before(how):
    loader, seen = loader_of(Counter(broken=30), how), []
    with pytest.raises(OSError, match="the line is dead") as caught:
        for batch in loader.batches(0): seen += batch.inputs[:, 0].tolist()
    assert seen == [float(i) for i in range(28)]
    assert "the stream failed in epoch 0, after item 27" in str(caught.value.__notes__)
    assert not loader.processes or not loader.processes[0].busy


def test_an_item_that_cannot_be_sent_to_a_process_is_told_at_once():
    def items(epoch):
        for i in range(20): yield {"x": [float(i)]} | ({"f": lambda: 0} if i == 9 else {})
    loader, seen = loader_of(items, "processes"), []
    with pytest.raises((AttributeError, pickle.PicklingError)) as caught:
        for batch in loader.batches(0): seen += batch.inputs[:, 0].tolist()
    assert seen == [float(i) for i in range(8)] and "after item 7" in str(caught.value.__notes__)


def test_tensors_in_items_stay_what_they_are():
    every = torch.arange(40.0)[:, None]
    loader = loader_of(lambda epoch: ({"x": one} for one in every), "processes")
    assert values(loader.batches(0)) == WHOLE and not every.is_shared()


@by_how
def test_a_last_batch_of_broken_items_is_left_out(how):
    def items(epoch):
        for i in range(9): yield {"x": [float(i)]} if i != 8 else {}
    loader = loader_of(items, how, on_error="skip")
    assert values(loader.batches(0)) == WHOLE[:2] and list(loader.source.skipped) == [8]
    ranks = [list(loader_of(items, how, on_error="skip", rank=rank, world_size=2).batches(0)) for rank in range(2)]
    assert [[batch.size for batch in batches] for batches in ranks] == [[2, 2, 0], [2, 2, 0]]  # in step


@by_how
def test_a_batch_that_was_left_out_is_not_counted_and_not_forgotten(how):
    def items(epoch):
        for i in range(9): yield {"x": [float(i)]} if i != 3 else {}

    def made(): return loader_of(items, how, on_error="skip", batch_size=1)
    loader = made()
    batches = loader.batches(0)
    assert [next(batches).inputs.item() for _ in range(5)] == [0.0, 1.0, 2.0, 4.0, 5.0]
    again = made()
    again.load_state_dict(loader.state_dict())
    batches.close()
    for one in (loader, again):
        assert values(one.batches(0, 5)) == [[6.0], [7.0], [8.0]]
        assert len(values(one.batches(1))) == 8


@by_how
def test_one_good_item_of_a_batch_stands_in_for_all_others(how):
    def items(epoch):
        for i in range(16): yield {"x": [float(i)]} if i % 8 == 5 else {}
    loader = loader_of(items, how, on_error="skip", skip_limit=1.0, batch_size=8)
    assert values(loader.batches(0)) == [[5.0] * 8, [13.0] * 8]


def test_as_validation_data_a_stream_leaves_out_what_it_cannot_read():
    def items(epoch):
        for i in range(9): yield {"x": [float(i)]} if i != 3 else {}
    ids = [batch.ids.tolist() for batch in loader_of(items, on_error="skip").in_order().batches(0)]
    assert ids == [[0, 1, 2], [4, 5, 6, 7], [8]]


class Shuffling(IterableDataset):
    """Draws from the global generator while it is read."""

    def __iter__(self):
        numbers = list(range(40))
        random.shuffle(numbers)
        for number in numbers: yield {"x": [number + torch.rand(()).item()]}


@by_how
def test_a_stream_that_draws_is_the_same_whoever_reads_ahead(how):
    def run(how, start=0):
        loader, found = loader_of(Shuffling(), how), []
        for batch in loader.batches(1, start):
            found.append(batch.inputs[:, 0].tolist())
            random.random(), torch.rand(3)  # as a training step does
        return found
    torch.manual_seed(0)
    expected = run("here")
    state = torch.get_rng_state(), random.getstate()
    assert run(how) == expected and run(how, 4) == expected[4:]
    torch.set_rng_state(state[0]), random.setstate(state[1])
    list(loader_of(Shuffling(), how).batches(0))
    assert torch.equal(state[0], torch.get_rng_state()) and random.getstate() == state[1]


def test_a_fit_that_was_interrupted_trains_on_whole_epochs():
    def learner():
        torch.manual_seed(0)
        loader = StreamLoader(Counter(), {"x": Array(read_x), "y": Numbers(lambda item: [item["x"][0] / 40])}, inputs="x",
                              targets="y", batch_size=4)
        return Learner(nn.Linear(1, 1), (loader, None), nn.MSELoss(), device="cpu", verbose=0, lr=1e-3)
    whole = learner()
    whole.fit("30ba")
    for stop in (3, 10, 13):
        first, again = learner(), learner()
        first.fit(f"{stop}ba")
        first.check()
        again.trainer.load_state_dict(first.trainer.state_dict())
        for one in (first, again):
            one.fit(f"{30 - stop}ba")
            assert torch.equal(one.model.weight, whole.model.weight), stop


class Drawn(Dataset):
    def __len__(self): return 8

    def __getitem__(self, i): return np.array([i + random.random()], np.float32)


def test_reading_into_memory_and_learning_leave_the_generators_alone():
    learnt = set()
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed)
        state = torch.get_rng_state(), random.getstate()
        data = Data(Drawn(), {"x": Numbers(standardize=True)}, inputs="x", split=random_split(valid=0.25, seed=0))
        batch = next(iter(data.loaders(6, seed=0, in_memory=True).train))
        assert torch.equal(state[0], torch.get_rng_state()) and random.getstate() == state[1]
        raw = batch.inputs[:, 0] * data.fields["x"].std[0] + data.fields["x"].mean[0]
        assert len({round(float(one) % 1, 4) for one in raw}) == 6  # each has a draw of its own
        learnt.add(data.fields["x"].mean[0])
    assert len(learnt) == 1


def test_a_copy_of_a_loader_has_processes_of_its_own():
    loader = loader_of(Counter(), "processes")
    next(batches := loader.batches(0))
    other = copy.copy(loader)
    assert loader.processes and not other.processes and not pickle.loads(pickle.dumps(copy.deepcopy(loader.source))).skipped
    batches.close()
