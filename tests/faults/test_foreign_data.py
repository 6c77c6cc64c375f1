"""Data of other makers: what can be taken up in the middle of an epoch ends with the same bits, the rest says so."""

import signal

import fault_program
import pytest
from children import children as children
from children import nursery as nursery
from fault_program import KillAt, compare

OPTIONS = {"epochs": 2, "rich": False}


@pytest.mark.fault("a loader that is not ours", "killed inside an epoch and at its end: a DataLoader, with a generator, over an "
                   "IterableDataset, a list, a loader with a state", "every tensor, the history")  # fmt: skip
@pytest.mark.parametrize("data", fault_program.FOREIGN)
def test_foreign_data_is_taken_up(children, tmp_path, data):
    assert children.run(fault_program.train, tmp_path / "undisturbed", data=data, **OPTIONS) == 0
    for batch in (5, 12, 18):
        killed = children.run(fault_program.train, tmp_path / "run", KillAt(batch), data=data, **OPTIONS)
        assert killed == -signal.SIGKILL
    assert children.run(fault_program.train, tmp_path / "run", data=data, **OPTIONS) == 0
    compare(tmp_path / "run", tmp_path / "undisturbed")


class Interrupt(fault_program.Callback):
    """Somebody presses Ctrl-C, once, in the middle of a batch."""

    def __init__(self, batch):
        self.batch = batch

    def before_batch(self, trainer):
        if trainer.state.batch == self.batch:
            self.batch = None
            raise KeyboardInterrupt


@pytest.mark.fault("Ctrl-C in the middle of a batch", "in each kind of foreign data, also in the first batch of an epoch; resumed "
                   "in the same process and in a new learner", "every tensor, the history")  # fmt: skip
@pytest.mark.parametrize("batch", [0, 4, 12])
@pytest.mark.parametrize("data", fault_program.FOREIGN)
def test_a_batch_that_was_cut_off_is_read_again(tmp_path, data, batch):
    fault_program.train(tmp_path / "undisturbed", data=data, **OPTIONS)
    one = fault_program.learner(tmp_path / "run", Interrupt(batch), data=data, rich=False)
    with pytest.raises(KeyboardInterrupt):
        one.fit_one_cycle(2, lr=0.01, resume=True)
    if batch == 4:  # go on with the same learner: what it has in memory
        one.fit_one_cycle(2, lr=0.01, resume=True)
    else:
        fault_program.train(tmp_path / "run", Interrupt(None), data=data, **OPTIONS)
    assert fault_program.differences(weights(tmp_path / "run"), weights(tmp_path / "undisturbed")) == []


def weights(run_dir):
    return fault_program.final_state(run_dir)["model"]


@pytest.mark.fault("a loader with a state", "resumed in the middle of an epoch", "only the batches that are left are read")
def test_a_loader_with_a_state_reads_no_batch_twice(children, tmp_path):
    assert children.run(fault_program.train, tmp_path / "run", KillAt(20), data="a loader with a state", **OPTIONS) == -9
    one = fault_program.train(tmp_path / "run", data="a loader with a state", **OPTIONS)
    assert one.loaders.train.read == 2 * 12 - 20


@pytest.mark.fault("an iterator", "fit(resume=True) with one", "told when the run is saved first; refused when it is to go on")
def test_an_iterator_is_told_and_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(fault_program.FOREIGN, "an iterator", lambda: iter(fault_program.FOREIGN["a list"]()))
    one = fault_program.learner(tmp_path / "run", data="an iterator", rich=False)
    one.trainer.shown = True
    one.fit("5ba")
    assert capsys.readouterr().out.count("an iterator, which a new process cannot begin in the middle") == 1
    with pytest.raises(ValueError, match="an iterator, which a new process cannot begin"):
        fault_program.learner(tmp_path / "run", data="an iterator", rich=False).fit("9ba", resume=True)
