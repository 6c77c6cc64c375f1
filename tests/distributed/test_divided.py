"""Runs whose weights are divided over processes: saved in parts, resumed by any number, joined into plain files."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import divided_runs
import layered_runs
import pytest
import torch
from safetensors.torch import load_file
from test_ranks_equal_one import assert_close
from together import raised_by

from nbdev_trainer import Run, launch, read_checkpoint
from nbdev_trainer.store.sealed import DamagedError, verify


@pytest.fixture(scope="module")
def undisturbed():
    torch.set_num_threads(1)
    return divided_runs.train(None, accumulate=3)


@pytest.fixture(scope="module")
def in_processes(together):
    def train(number, strategy, **options):
        run = partial(divided_runs.train, strategy, accumulate=3, **options)
        return run() if number == 1 else together(run, processes=number)

    return train


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, in_processes):
    """Runs that ended in the middle of a window of three batches, each begun once."""
    begun = {}

    def copied(first, to):
        if first not in begun:
            begun[first] = tmp_path_factory.mktemp("stopped") / "run"
            in_processes(*first, run_dir=begun[first], stop=11)
        shutil.copytree(begun[first], to)

    return copied


@pytest.mark.parametrize("first, then", [((2, "fsdp"), (1, None)), ((2, "fsdp"), (3, "fsdp")), ((2, "fsdp"), (2, "ddp")),
                                         ((2, "ddp"), (2, "fsdp")), ((1, None), (2, "fsdp"))])
def test_a_run_goes_on_with_other_processes_and_another_strategy(undisturbed, stopped, in_processes, tmp_path, first, then):
    stopped(first, tmp_path / "run")
    assert Run.open(tmp_path / "run").checkpoints[-1].name == "ba-000010"  # in the middle of a window of three batches
    assert_close(undisturbed, in_processes(*then, run_dir=tmp_path / "run", resume=True), f"{first} then {then}")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_window_in_which_nothing_counted_on_rank_0_is_saved_and_goes_on(together, tmp_path, processes):
    one = divided_runs.nothing_for_rank_0(None)
    together(partial(divided_runs.nothing_for_rank_0, "fsdp", tmp_path / "run", stop=5))
    assert Run.open(tmp_path / "run").checkpoints[-1].name == "ba-000004"  # one batch of a window of three
    again = partial(divided_runs.nothing_for_rank_0, "fsdp" if processes > 1 else None, tmp_path / "run", resume=True)
    assert_close(one, again() if processes == 1 else together(again), f"resumed by {processes}")


def test_as_many_processes_go_on_bit_for_bit(together, tmp_path):
    whole = together(divided_runs.whole_then_stopped, tmp_path / "run")
    together.end(2)  # it goes on in new ones
    again = together(partial(divided_runs.train, "fsdp", run_dir=tmp_path / "run", resume=True))
    for name, one in whole["weights"].items():
        assert torch.equal(one, again["weights"][name]), name
    assert whole["metrics"] == again["metrics"] and whole["counters"] == again["counters"]


class KilledInSaving:
    """Kills the second process when it writes its part of a checkpoint."""

    def __init__(self, batch):
        self.batch = batch

    def __call__(self, run_dir):
        from nbdev_trainer.store import writers

        write = writers.write_pieces

        def killing(path, pieces):
            if f"ba-{self.batch:06}" in str(path) and "00002-of" in path.name:
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, pieces)

        writers.write_pieces = killing
        return divided_runs.train("fsdp", run_dir, average=False)


def test_a_process_killed_in_saving_leaves_the_checkpoint_before(together, tmp_path):
    whole = together(partial(divided_runs.train, "fsdp", average=False))
    with pytest.raises(RuntimeError, match="rank 1"):
        launch(KilledInSaving(6), tmp_path / "run")
    checkpoints = Run.open(tmp_path / "run").checkpoints
    assert checkpoints[-1].name == "ba-000004"
    for one in checkpoints:
        verify(one)
    again = together(partial(divided_runs.train, "fsdp", run_dir=tmp_path / "run", resume=True, average=False))
    assert all(torch.equal(one, again["weights"][name]) for name, one in whole["weights"].items())
    assert not [one for one in (tmp_path / "run" / "checkpoints").iterdir() if one.name.startswith(".")]


@pytest.fixture(scope="module")
def saved(together, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("divided") / "run"
    return run_dir, together(partial(divided_runs.train, "fsdp", run_dir=run_dir))


def test_a_checkpoint_in_parts_is_sealed_and_read_whole(saved):
    run_dir, result = saved
    newest = Run.open(run_dir).checkpoints[-1]
    files = verify(newest)["files"]
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "state.json"} <= set(files)
    assert {one.name for one in newest.iterdir()} == {*files, "manifest.json"}
    assert all(one.suffix in (".safetensors", ".json") for one in newest.iterdir())  # nothing that is unpickled
    for name, one in read_checkpoint(newest)["model"]["state"].items():
        assert torch.equal(one, result["weights"][name]), name


def test_weights_in_parts_become_a_plain_file(saved, tmp_path):
    run_dir, result = saved
    learner = divided_runs.learner_for(None)
    learner.load(Run.open(run_dir).checkpoints[-1])
    learner.save(tmp_path / "model.safetensors")
    plain = load_file(tmp_path / "model.safetensors")
    for name, one in result["weights"].items():
        assert torch.equal(plain[name], one), name
    for name, one in result["averages"][0].items():
        assert any(torch.equal(other, one) for key, other in plain.items() if key.endswith(name) and key != name), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_and_joins_the_parts_by_itself(saved, tmp_path):
    from torch.distributed import checkpoint

    run_dir, result = saved
    newest = Run.open(run_dir).checkpoints[-1]
    target = {name: torch.zeros_like(one) for name, one in result["weights"].items()}
    checkpoint.load(target, storage_reader=checkpoint.HuggingFaceStorageReader(str(newest)), no_dist=True)
    for name, one in result["weights"].items():
        assert torch.equal(target[name], one), name


@pytest.mark.parametrize("harm", ["changed", "missing", "exchanged"])
def test_a_harmed_part_is_named(saved, harm):
    run_dir, _ = saved
    newest = Run.open(run_dir).checkpoints[-1]
    part, other = (newest / f"model-0000{k}-of-00002.safetensors" for k in (2, 1))
    before = part.read_bytes()
    try:
        if harm == "changed":
            part.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        elif harm == "missing":
            part.unlink()
        else:
            part.write_bytes(other.read_bytes())
        with pytest.raises(DamagedError, match="model-00002-of-00002.safetensors"):
            read_checkpoint(newest)
    finally:
        part.write_bytes(before)
    verify(newest)


def test_a_pickle_is_never_read(tmp_path):
    """A checkpoint as torch.distributed.checkpoint writes it by default has one; it is refused by name."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x04cos\nsystem\n(S'touch here'\ntR.")
    (tmp_path / "__0_0.distcp").write_bytes(b"PK")
    with pytest.raises(ValueError, match="pickle"):
        divided_runs.learner_for(None).load(tmp_path)


def test_weights_are_saved_together_and_loaded_in_parts(together, tmp_path):
    one, other = together(divided_runs.save_and_load, tmp_path / "model.safetensors")
    assert_close(one["weights"], other["weights"], "weights")
    assert_close(one["averages"][0], {name: other["averages"][0][name] for name in one["averages"][0]}, "averages")
    assert_close(divided_runs.train(None, epochs=1), one, "as one process")


def test_looking_into_a_run_with_divided_weights_works(together):
    assert together(divided_runs.looks) == {"parameters": 7 * 5 + 7 + 7 * 7 + 7 + 3 * 7 + 3, "findings": []}


def test_loaded_averages_are_divided_and_go_on(together, tmp_path):
    found = together(divided_runs.goes_on_from_loaded_averages, tmp_path / "model.safetensors")
    assert all(one.isfinite().all() for one in found["averages"][0].values())
    assert {name: one.shape for name, one in found["averages"][0].items()} == {
        name: one.shape for name, one in found["weights"].items()}


@pytest.mark.parametrize("what, error, why", [("second", ValueError, "divided already, by another learner"),
                                              ("Adafactor", ValueError, "Adafactor does not go together"),
                                              ("run", FileNotFoundError, "the directory of the checkpoints is gone")])
def test_what_cannot_be_is_an_error_with_its_reason(together, what, error, why, tmp_path):
    for found in together(raised_by, divided_runs.refused, tmp_path / what if what == "run" else what):
        with pytest.raises(error, match=why):
            raise found


@pytest.mark.parametrize("clip_norm", [pytest.param(None, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("shape", [(1, 2), (2, 2)])
def test_layers_divided_further_train_as_whole_ones(together, shape, clip_norm):
    one = layered_runs.train(None, clip_norm=clip_norm)
    divided = together(layered_runs.layers_divided, shape, clip_norm=clip_norm, processes=shape[0] * shape[1])
    assert_close(one, divided, shape)


def test_copies_of_divided_weights_train_as_whole_ones(together):
    one = layered_runs.train(None, clip_norm=1.0)
    assert_close(one, together(layered_runs.in_copies_of_shards, clip_norm=1.0, processes=4), "replicate and shard")


def test_losses_are_those_of_replicas_also_on_the_host_and_nearly_in_bfloat16(together):
    found = together(layered_runs.of_three_kinds)
    expected = found["whole"]["metrics"]["valid_loss"]
    assert found["divided"]["metrics"]["valid_loss"] == pytest.approx(expected, rel=1e-6)
    assert found["on the host"]["metrics"]["valid_loss"] == pytest.approx(expected, rel=1e-6)
    half = found["bfloat16"]["metrics"]["valid_loss"]
    assert half == pytest.approx(expected, rel=0.02) and half != expected
    assert all(one.dtype == torch.float32 for one in found["bfloat16"]["weights"].values())


def test_batch_norms_train_between_layers_that_compute_in_bfloat16(together):
    found = together(layered_runs.norms_in_bfloat16)
    expected = found["whole"]["metrics"]["valid_loss"]
    for name in ("divided", "in blocks"):
        assert found[name]["metrics"]["valid_loss"] == pytest.approx(expected, rel=0.02) and found[name]["weights"].keys() == found["whole"]["weights"].keys()
        assert torch.allclose(found[name]["weights"]["0.1.running_var"], found["whole"]["weights"]["0.1.running_var"], rtol=0.03)
    assert found["divided"]["metrics"]["valid_loss"] != expected
    assert found["not synced"]["metrics"]["valid_loss"] == pytest.approx(expected, rel=0.3)


def test_the_facts_of_a_run_in_parts_are_plain(saved):
    run_dir, _ = saved
    config = json.loads((Path(run_dir) / "config.json").read_text())
    assert "FSDP" not in json.dumps(config)


def test_a_model_built_without_numbers_is_filled_part_by_part_the_same_by_any_number_of_processes(together):
    found = {n: together(layered_runs.built, "meta", processes=n) for n in (1, 2, 3)}
    for n in (2, 3):
        assert_close(found[1], found[n], f"{n} processes")
    numbers = sum(one.numel() for one in found[1]["weights"].values())
    assert 0 < found[2].pop("most") < numbers * 0.6  # of 5 parts
    fresh = layered_runs.Deep().state_dict()  # torch's layers are filled as torch fills them
    assert {name: one.shape for name, one in fresh.items()} == {name: one.shape for name, one in found[2]["weights"].items()}


def test_the_weights_of_the_first_process_count_where_the_others_have_none(together):
    one = layered_runs.built("cpu", shards=False)
    assert_close(one, together(layered_runs.built, ["cpu", "meta"]), "built on rank 0 alone")


def test_a_weight_that_nobody_fills_is_an_error_on_all_processes(together):
    assert "ValueError: Position has 'shift' of its own, built on the device 'meta'" in together(layered_runs.nobody_fills)
    told = together(layered_runs.one_fails, 1)
    assert told == ["RuntimeError: rank 1 could not fill the model: KeyError: 'no table of positions'",
                    "KeyError: 'no table of positions'"]


def test_a_model_that_fills_its_parts_does_so_before_they_are_divided_or_is_an_error(together):
    numbers = sum(one.numel() for one in layered_runs.Rescaled().parameters())
    assert together(partial(layered_runs.fills_its_parts, wrap=())) == pytest.approx(0.25 * numbers)
    assert "ValueError: Rescaled fills weights of parts that are divided already" in together(layered_runs.fills_its_parts)


@pytest.mark.parametrize("processes", [1, 2])
def test_several_optimizers_get_each_its_own_gradients(together, processes):
    one = layered_runs.two_optimizers(False)
    assert_close(one, together(layered_runs.two_optimizers, True, processes=processes), f"{processes} processes")
