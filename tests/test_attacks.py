"""Files made to attack whoever opens them, made here and given to everything that reads files.

Each must be refused with an error that says what is wrong. Nothing of it may run or be imported, and no memory may be
taken on its word. `LOADERS` lists what a user can hand a file to; a new reader of files belongs there.
"""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from nbdev_trainer import Learner, Run, import_weights
from nbdev_trainer.apps.models import model_of_run
from nbdev_trainer.apps.predict import predict_with
from nbdev_trainer.data import Data
from nbdev_trainer.store.checkpoints import read_checkpoint
from nbdev_trainer.store.files import read_json, read_metadata, read_tensors, write_tensors
from nbdev_trainer.store.sealed import MANIFEST, sealed_text, sum_of
from nbdev_trainer.testing import tiny_loaders, tiny_model

REFUSALS = ValueError, TypeError, KeyError, FileNotFoundError  # the errors for something that was passed in


def new_learner():
    return Learner(tiny_model(), tiny_loaders(), nn.CrossEntropyLoss(), device="cpu", lr=0.1, verbose=0)


def run_with_config(path):
    """A run whose config.json is the file."""
    directory = path.with_name(f"run of {path.name}")
    directory.mkdir()
    path.rename(directory / "config.json")
    return directory


def run_with_weights(path):
    """A run of the command line whose weights are the file."""
    directory = path.with_name(f"run of {path.name}")
    directory.mkdir()
    config = {"model": "linear_model", "input_shape": [4], "n_outputs": 3, "task": "classification"}
    (directory / "config.json").write_text(json.dumps(config))
    path.rename(directory / "model.safetensors")
    return directory


LOADERS = {
    "read_tensors": read_tensors,
    "read_metadata": read_metadata,
    "read_json": read_json,
    "import_weights": import_weights,
    "Learner.load": lambda path: new_learner().load(path),
    "Learner.load, not strict": lambda path: new_learner().load(path, strict=False),
    "Run.open": lambda path: Run.open(run_with_config(path)),
    "model_of_run": lambda path: model_of_run(run_with_weights(path)),
}


@pytest.fixture
def canary(tmp_path):
    """A file that appears when an attack succeeds; at the end it must not be there, and no module be new."""
    path, modules = tmp_path / "it ran", set(sys.modules)
    yield path
    assert not path.exists()
    assert {name for name in set(sys.modules) - modules if name.split(".")[0] in NEVER_IMPORTED} == set()


NEVER_IMPORTED = {
    "antigravity",
    "this",
    "turtle",
    "idlelib",
}  # named by the files below, and used by nobody here


# programs


class Calls:
    """Pickled, it is a call of a function."""

    def __init__(self, function, *values):
        self.function, self.values = function, values

    def __reduce__(self):
        return self.function, self.values


def touch(path):
    return f"__import__('pathlib').Path({str(path)!r}).touch()"


def import_something():
    """A pickle that imports a module when it is read; written out, for pickling would import it here."""
    return b"\x80\x02}X\x01\x00\x00\x00acantigravity\nfly\ns."


def programs(canary):
    import builtins
    import os

    code = touch(canary)
    attacks = {
        "os.system": Calls(os.system, f"touch '{canary}'"),
        "builtins.eval": Calls(builtins.eval, code),
        "builtins.exec": Calls(builtins.exec, code),
        "subprocess": Calls(subprocess.call, ["touch", str(canary)]),
        "nested": {"state_dict": {"weight": torch.zeros(1), "deep": [[{"x": Calls(builtins.eval, code)}]]}},
        "optimizer": {"state_dict": {"weight": torch.zeros(1)}, "opt": Calls(builtins.eval, code)},
        "torch.load": Calls(torch.load, "elsewhere"),
        "class": torch.nn.Linear(1, 1),
    }
    for name, attack in attacks.items():
        for kind in ("zip", "legacy"):
            stream = io.BytesIO()
            torch.save(attack, stream, _use_new_zipfile_serialization=kind == "zip")
            yield f"{name} in a {kind} file", stream.getvalue()
        for protocol in (0, 2, 5):
            yield f"{name} as a pickle, protocol {protocol}", pickle.dumps(attack, protocol)
    yield "an import as a pickle", import_something()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            program = pickle.dumps(Calls(builtins.eval, code), 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(program)
            file.addfile(entry, io.BytesIO(program))
    yield "a tar file of torch 0.1", archive.getvalue()


PROGRAMS = [name for name, _ in programs(Path("nowhere"))]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".json"])
@pytest.mark.parametrize("loader", LOADERS)
def test_no_program_in_a_file_is_run_by_any_loader(loader, suffix, canary, tmp_path):
    for number, (name, content) in enumerate(programs(canary)):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(content)
        with pytest.raises(REFUSALS) as refused:
            LOADERS[loader](path)
        assert path.name in str(refused.value) or "run of" in str(refused.value), name
        assert "weights_only=False" not in str(refused.value), name
        assert not canary.exists(), name


def test_the_programs_would_run_if_somebody_unpickled_them(tmp_path):
    for number, (name, content) in enumerate(programs(canary := tmp_path / "it ran")):
        if "pickle" in name and any(part in name for part in ("system", "eval", "exec", "subprocess")):
            pickle.loads(content)
            assert canary.exists(), name
            canary.unlink()
    assert number > 30


@pytest.mark.parametrize(
    ("program", "named"),
    [
        ("builtins.eval in a zip file", "would import (builtins|__builtin__).eval"),
        ("subprocess in a legacy file", "would import (subprocess|commands).call"),
        ("class in a zip file", "would import torch.nn.modules.linear.Linear"),
        ("optimizer in a zip file", "would import (builtins|__builtin__).eval"),
        ("builtins.eval as a pickle, protocol 5", "neither a zip archive nor a pickle of torch.save"),
        ("builtins.eval as a pickle, protocol 2", "cannot be read to its end|would import"),
        ("a tar file of torch 0.1", "neither a zip archive nor a pickle of torch.save"),
    ],
)
def test_the_importer_says_what_a_file_would_have_imported(program, named, canary, tmp_path):
    (path := tmp_path / "weights.pt").write_bytes(dict(programs(canary))[program])
    with pytest.raises(ValueError, match=named) as refused:
        import_weights(path)
    assert refused.value.__cause__ is None and "Nothing was" in str(refused.value)


def test_what_comes_after_the_weights_in_a_legacy_file_is_looked_at_too(canary, tmp_path):
    torch.save({"w": torch.ones(2)}, path := tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    good = path.read_bytes()
    keys = good.rindex(b"\x80\x02")  # the last of the five pickles
    end = good.index(b".", keys) + 1
    path.write_bytes(good[:keys] + pickle.dumps(Calls(eval, touch(canary)), 2) + good[end:])
    with pytest.raises(ValueError, match="would import __builtin__.eval"):
        import_weights(path)


def test_a_zip_behind_a_pickle_does_not_hide_the_pickle(canary, tmp_path):
    torch.save({"w": torch.ones(2)}, path := tmp_path / "w.pt")
    legacy = io.BytesIO()
    torch.save(Calls(eval, touch(canary)), legacy, _use_new_zipfile_serialization=False)
    path.write_bytes(legacy.getvalue() + path.read_bytes())
    assert zipfile.is_zipfile(path)
    with pytest.raises(ValueError, match="would import __builtin__.eval"):
        import_weights(path)


def test_torch_is_not_asked_when_the_names_are_refused(canary, tmp_path, monkeypatch):
    (path := tmp_path / "w.pt").write_bytes(dict(programs(canary))["builtins.eval in a zip file"])
    monkeypatch.setattr(torch, "load", lambda *values, **options: pytest.fail("torch.load was called"))
    with pytest.raises(ValueError, match="would import"):
        import_weights(path)


def test_torch_is_asked_for_weights_only_and_once(tmp_path, monkeypatch):
    calls = []

    def refuse(*values, **options):
        calls.append(options)
        raise RuntimeError("Re-running torch.load with weights_only set to False will likely succeed")

    torch.save({"w": torch.ones(2)}, path := tmp_path / "w.pt")
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(ValueError, match="was made to mislead") as refused:
        import_weights(path)
    assert [one["weights_only"] for one in calls] == [True]
    assert "weights_only" not in str(refused.value)


def test_an_old_torch_imports_nothing(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2)}, path := tmp_path / "w.pt")
    monkeypatch.setattr("nbdev_trainer.store.foreign.check_torch.__defaults__", ("2.9.1",))
    with pytest.raises(RuntimeError, match="CVE-2026-24747"):
        import_weights(path)


# names of code in plain data


CODE = ["antigravity.fly", "os.system", "this:s", "idlelib.idle", "torch.hub.load"]
KEYS = ["_target_", "_instantiator", "class_path", "__class__", "model", "py/object", "module", "type"]


@pytest.mark.parametrize("key", KEYS)
def test_names_of_classes_in_the_config_of_a_run_are_only_texts(key, canary, tmp_path):
    for name in CODE:
        directory = tmp_path / name.replace(":", " ")
        directory.mkdir()
        config = {"model": "linear_model", "input_shape": [4], "n_outputs": 3, "task": "classification"}
        config |= {key: name, "config": {key: {"_target_": name, "_args_": ["x"]}}}
        (directory / "config.json").write_text(json.dumps(config))
        write_tensors(
            directory / "model.safetensors", tiny_model().state_dict(), {key: name, "_target_": name}
        )
        run = Run.open(directory)
        assert run.config[key] == name and run.config["config"][key]["_target_"] == name
        assert name in repr(run)
        with pytest.raises(ValueError, match="do not fit the model|was not made by"):
            model_of_run(directory)


@pytest.mark.parametrize(
    "network", ["timm:hf-hub:somebody/net", "torchvision:../../net", "timm:", "eval:x", "torch:hub"]
)
def test_the_name_of_a_network_in_a_run_is_looked_up_and_nothing_is_fetched(network, tmp_path, monkeypatch):
    known = type("Package", (), {"list_models": staticmethod(lambda: ["resnet18"])})
    monkeypatch.setattr("nbdev_trainer.apps.networks.require", lambda *values, **options: known)
    config = {"model": network, "input_shape": [3, 8, 8], "n_outputs": 3, "task": "classification"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path / "model.safetensors", {})
    with pytest.raises(ValueError, match="there is no network|was not made by"):
        model_of_run(tmp_path)


@pytest.mark.parametrize("step", CODE)
def test_the_description_of_a_pipeline_names_only_known_steps(step, canary, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    description = {
        "fields": {"image": {"kind": step, "name": step, "class": step}},
        "inputs": "image",
        "targets": None,
        "transforms": [{"name": step, "class": step, "step": step, "settings": {}}],
        "batch_transforms": [],
    }
    config = {"model": "linear_model", "input_shape": [4], "n_outputs": 3, "task": "classification"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pipeline": description}))
    write_tensors(tmp_path / "model.safetensors", model_state())
    with pytest.raises(REFUSALS):
        Data.from_description(description, [tmp_path / "a.png"], {"image": None})
    with pytest.raises(REFUSALS):
        predict_with(tmp_path, tmp_path / "a.png")


def model_state():
    from nbdev_trainer.apps.models import make_model

    return make_model("linear_model", torch.zeros(2, 4), 3).state_dict()


def test_names_that_lead_elsewhere_are_only_names(tmp_path):
    names = ["../outside", "/etc/passwd", "..\\outside", "C:outside", "a/../../outside"]
    torch.save({name: torch.ones(1) for name in names}, path := tmp_path / "w.pt")
    before = sorted(tmp_path.parent.iterdir())
    assert list(import_weights(path)) == names
    write_tensors(own := tmp_path / "w.safetensors", import_weights(path))
    with pytest.raises(ValueError, match=r"\.\./outside is not in the model"):
        new_learner().load(own)
    assert sorted(tmp_path.iterdir()) == sorted([path, own]) and sorted(tmp_path.parent.iterdir()) == before


# sizes


def safetensors_file(header, n_bytes=0, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(n_bytes)


def tensor(shape, end=4, dtype="F32", start=0):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


TWICE = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}'
SAFETENSORS = {
    "a shape bomb": (safetensors_file({"a": tensor([2**40])}, 4), "invalid shape"),
    "a product that overflows": (safetensors_file({"a": tensor([2**62, 2**62])}, 4), "overflow"),
    "a negative size": (safetensors_file({"a": tensor([-1])}, 4), "-1"),
    "a negative place": (safetensors_file({"a": tensor([1], 0, start=-4)}, 4), "-4"),
    "bytes beyond the file": (
        safetensors_file({"a": tensor([2**20], 2**22)}, 4),
        "not fully covered|incomplete",
    ),
    "an unknown type": (safetensors_file({"a": tensor([1], dtype="F33")}, 4), "F33"),
    "a type of another size": (safetensors_file({"a": tensor([1], dtype="F64")}, 4), "invalid shape"),
    "an object for a type": (
        safetensors_file({"a": tensor([1], dtype={"_target_": "os.system"})}, 4),
        "header",
    ),
    "tensors over each other": (safetensors_file({"a": tensor([1]), "b": tensor([1])}, 4), "offset"),
    "a hole": (safetensors_file({"a": tensor([1], 8, start=4)}, 8), "offset"),
    "bytes of nobody": (safetensors_file({"a": tensor([1])}, 8), "not fully covered"),
    "a header of a gigabyte": (safetensors_file(b"{}", length=10**9), "too large"),
    "a header of 2**63": (safetensors_file(b"{}", length=2**63), "too large"),
    "a header beyond the file": (safetensors_file(b"{}", length=10**6), "header"),
    "no header": (b"", "header"),
    "a deep header": (safetensors_file(b'{"a":' + b"[" * 100_000), "header"),
    "a name twice": (safetensors_file(TWICE, 4), "twice|offset"),
    "a hundred thousand dimensions": (safetensors_file({"a": tensor([1] * 100_000)}, 4), "at most 64"),
    "second names of nothing": (
        safetensors_file({"__metadata__": {"nbdev_trainer.aliases": '{"a": "b"}'}}),
        "second names to tensors that it does not hold",
    ),
    "second names that are no names": (
        safetensors_file({"__metadata__": {"nbdev_trainer.aliases": "[" * 100_000}}),
        "second names to tensors that it does not hold",
    ),
}


@pytest.mark.parametrize("attack", SAFETENSORS)
@pytest.mark.parametrize("loader", ["read_tensors", "import_weights", "Learner.load", "model_of_run"])
def test_a_header_that_lies_is_refused(attack, loader, tmp_path):
    content, words = SAFETENSORS[attack]
    (path := tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=words) as refused:
        LOADERS[loader](path)
    assert "safetensors'" in str(refused.value)


JSON_FILES = {
    "deep lists": (b"[" * 1_000_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 1_000_000, "nested too deeply"),
    "a number of a million digits": (b"1" * 1_000_000, "4300 digits"),
    "a name twice": (b'{"lr": 1, "lr": 2}', "the name 'lr' comes twice"),
    "no text": (b"\xff\xfe", "not UTF-8"),
    "code": (b"__import__('os').system('true')", "Expecting value"),
    "yaml": (b"!!python/object/apply:os.system [true]", "Expecting value"),
    "nothing": (b"", "Expecting value"),
}


@pytest.mark.parametrize("attack", JSON_FILES)
@pytest.mark.parametrize("loader", ["read_json", "Run.open"])
def test_json_that_was_made_to_harm_is_refused(attack, loader, tmp_path):
    content, words = JSON_FILES[attack]
    (path := tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        LOADERS[loader](path)


def test_numbers_that_are_none_are_still_read(tmp_path):
    (path := tmp_path / "a.json").write_text('{"loss": NaN, "best": -Infinity}')
    assert str(read_json(path)) == "{'loss': nan, 'best': -inf}"


def torch_file(change=lambda name, content: content, compression=zipfile.ZIP_STORED, extra=()):
    """A file of torch.save with other bytes in its entries."""
    stream, made = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.ones(77)}, stream)
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(made, "w", compression) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, change(entry.filename, source.read(entry)))
        for name, content in extra:
            target.writestr(name, content)
    return made.getvalue()


HUGE = b"\x8a\x08" + struct.pack("<q", 2**40)


def in_pickle(old, new, count=-1):
    return lambda name, content: content.replace(old, new, count) if name.endswith("data.pkl") else content


class Large:
    def __reduce__(self):
        return bytearray, (2**36,)


def saved(value, **options):
    torch.save(value, stream := io.BytesIO(), **options)
    return stream.getvalue()


TORCH_FILES = {
    "compressed numbers": (torch_file(compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "a zip bomb": (
        torch_file(compression=zipfile.ZIP_DEFLATED, extra=[("x/bomb", bytes(10**8))]),
        "is compressed",
    ),
    "a storage of a terabyte": (torch_file(in_pickle(b"K\x4d", HUGE, 1)), "made to mislead"),
    "a shape of a terabyte": (torch_file(in_pickle(b"K\x4d", HUGE)), "made to mislead"),
    "a view of a terabyte": (saved({"w": torch.zeros(1).expand(2**40)}), "only 4 bytes"),
    "a legacy storage of a terabyte": (
        saved({"w": torch.ones(77)}, _use_new_zipfile_serialization=False).replace(b"K\x4d", HUGE),
        "made to mislead",
    ),
    "a byte array of 64 GB": (saved({"w": Large()}), "would import (builtins|__builtin__).bytearray"),
    "a legacy byte array of 64 GB": (
        saved({"w": Large()}, _use_new_zipfile_serialization=False),
        "would import (builtins|__builtin__).bytearray",
    ),
    "a negative size": (
        torch_file(in_pickle(b"K\x4d\x85", b"J\xff\xff\xff\xff\x85")),
        "made to mislead|bytes of its own",
    ),
    "numbers that are cut": (
        torch_file(lambda n, c: c[:-4] if n.endswith("/data/0") else c),
        "made to mislead",
    ),
    "no numbers": (torch_file(lambda n, c: b"" if n.endswith("/data/0") else c), "made to mislead"),
    "a name twice, in capitals": (
        torch_file(extra=[("archive/DATA.PKL", b"\x80\x02}.")]),
        "a name comes twice",
    ),
    "two pickles": (torch_file(extra=[("other/data.pkl", b"\x80\x02}.")]), "2 files data.pkl"),
    "a program of TorchScript": (torch_file(extra=[("archive/code/net.py", b"import os")]), "TorchScript"),
    "a pickle of nothing": (
        torch_file(lambda n, c: b"" if n.endswith("data.pkl") else c),
        "to its end|mislead",
    ),
    "deep lists": (
        torch_file(lambda n, c: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"." if "pkl" in n else c),
        "holds list of 1: .* expected names with tensors",
    ),
    "an empty zip": (b"PK\x05\x06" + bytes(18), "neither a zip archive nor a pickle"),
    "sparse numbers": (saved({"w": torch.eye(3).to_sparse()}), "would import"),
}


@pytest.mark.parametrize("attack", TORCH_FILES)
def test_a_torch_file_that_lies_about_its_size_is_refused(attack, tmp_path):
    content, words = TORCH_FILES[attack]
    (path := tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        import_weights(path)


def test_every_cut_of_a_torch_file_is_refused(tmp_path):
    good = saved({"w": torch.arange(500.0)})
    old = saved({"w": torch.arange(500.0)}, _use_new_zipfile_serialization=False)
    for content in (good, old):
        for size in range(0, len(content), 97):
            (path := tmp_path / "cut.pt").write_bytes(content[:size])
            with pytest.raises(ValueError, match="holds no weights that can be imported"):
                import_weights(path)


def test_the_largest_attacks_take_no_memory(tmp_path):
    files = {f"{n}.safetensors": content for n, (content, _) in enumerate(SAFETENSORS.values())}
    files |= {f"{n}.pt": content for n, (content, _) in enumerate(TORCH_FILES.values())}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(2**33)
    config = {"model": "linear_model", "input_shape": [4], "n_outputs": 2**26, "task": "classification"}
    for number, shape in enumerate([[4], [2**26], [2**40], [2**13, 2**13], [-4], [10**30]]):
        (run := tmp_path / f"run {number}").mkdir()
        (run / "config.json").write_text(json.dumps(config | {"input_shape": shape}))
        write_tensors(run / "model.safetensors", {"model.1.bias": torch.zeros(3)})
    program = f"""
import resource, sys, torch
from pathlib import Path
from nbdev_trainer import Run, import_weights
from nbdev_trainer.apps.models import model_of_run
from nbdev_trainer.store.files import read_json, read_tensors
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, refused = peak(), 0
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    for read in (model_of_run,) if path.is_dir() else (read_json, read_tensors, import_weights):
        try: read(path)
        except ValueError: refused += 1
print(refused, peak() - before)
"""
    output = subprocess.check_output([sys.executable, "-c", program], text=True, timeout=100)
    refused, megabytes = map(int, output.split())
    assert refused == 3 * (len(files) + 1) + 6
    assert megabytes < 200  # what torch takes for its first tensors; the files ask for terabytes


def test_the_importer_takes_no_more_than_the_file_has(tmp_path):
    torch.save(
        {"w": torch.ones(1000), "view": torch.ones(1000)[:10], "tied": (one := torch.ones(5)), "same": one},
        tmp_path / "w.pt",
    )
    tensors = import_weights(tmp_path / "w.pt")
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors.values()}
    assert sum(storages.values()) < (tmp_path / "w.pt").stat().st_size


# what is good is still taken


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_of_every_type_come_through_the_importer(legacy, tmp_path):
    types = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
    ]
    types += [torch.int8, torch.uint8, torch.bool, torch.complex64]
    weights = {str(one): torch.ones(3, 2).to(one) for one in types}
    torch.save(weights, path := tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    read = import_weights(path)
    assert all(
        torch.equal(read[name], one) and read[name].dtype == one.dtype for name, one in weights.items()
    )


def test_checkpoints_of_others_are_understood(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(6, 4)).sum().backward()
    optimizer.step()
    weights = model.state_dict()
    lightning = {
        "epoch": 3, "global_step": 100, "pytorch-lightning_version": "2.6.6", "loops": {"fit_loop": {"state_dict": {}}},
        "state_dict": {f"model.{name}": one for name, one in weights.items()} | {"loss.weight": torch.ones(3)},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [], "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "_instantiator": "os.system"},
    }  # fmt: skip
    files = {"lightning.ckpt": (lightning, {"prefix": "model."}), "plain.pt": (weights, {}),
             "fastai.pth": ({"model": weights, "opt": optimizer.state_dict()}, {}),
             "tutorial.tar": ({"model_state_dict": weights, "optimizer_state_dict": optimizer.state_dict(), "loss": 0.1}, {}),
             "two.pt": ({"model": weights, "state_dict": weights}, {"key": "model"})}  # fmt: skip
    for name, (content, options) in files.items():
        torch.save(content, tmp_path / name)
        with torch.no_grad():
            (learner := new_learner()).model[0].weight.zero_()
        report = learner.load(import_weights(tmp_path / name, **options))
        assert report.complete and torch.equal(learner.model[0].weight, weights["0.weight"]), name


def test_a_name_that_is_known_elsewhere_sends_to_the_importer(tmp_path):
    torch.save(tiny_model().state_dict(), path := tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"learner.load\(import_weights\("):
        new_learner().load(path)
    path.rename(renamed := tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="import_weights"):
        new_learner().load(renamed)
    assert import_weights(renamed).keys() == tiny_model().state_dict().keys()


def test_a_load_that_is_refused_changes_nothing(tmp_path):
    learner = new_learner()
    before = {name: one.clone() for name, one in learner.model.state_dict().items()}
    good = {name: one + 1 for name, one in before.items()}
    for wrong in (
        {**good, "0.weight": torch.ones(2, 2)},
        {**good, "extra": torch.ones(1)},
        {name: one for name, one in good.items() if name != "4.bias"},
        {**good, "1.num_batches_tracked": torch.tensor(0.5)},
        {**good, "0.bias": good["0.bias"].to(torch.complex64)},
    ):
        with pytest.raises(ValueError, match="do not fit the model"):
            learner.load(wrong)
        assert all(torch.equal(one, before[name]) for name, one in learner.model.state_dict().items())
    report = learner.load({**good, "0.weight": torch.ones(2, 2)}, strict=False)
    assert list(report.mismatched) == ["0.weight"] and torch.equal(learner.model[0].bias, good["0.bias"])
    assert torch.equal(learner.model[0].weight, before["0.weight"])


# Directories of state: a reader of them joins LOADERS, and its files join these, by the loader and the name in it.
def sealed_by_an_attacker(files):
    """Makes a checkpoint whose manifest is right: who writes one can seal it too."""

    def make(folder, canary):
        checkpoint = folder / "run" / "checkpoints" / "ba-000001"
        checkpoint.mkdir(parents=True)
        for name, content in files.items():
            (checkpoint / name).write_bytes(content(canary) if callable(content) else content)
        listed = {one.name: {"size": one.stat().st_size, "sha256": sum_of(one)} for one in checkpoint.iterdir()}
        facts = {"schema": 1, "batch": 1, "versions": {"nbdev_trainer": "0.1.0"}}
        (checkpoint / MANIFEST).write_text(sealed_text({**facts, "files": listed}))
        return checkpoint

    return make


def state_json(value):
    return {"state.json": json.dumps(value).encode()}


def listed_elsewhere(folder, canary):
    checkpoint = sealed_by_an_attacker(state_json({}))(folder, canary)
    (folder / "secret").write_text("not yours")
    listed = {name: {"size": 9, "sha256": ""} for name in ("../../../secret", "/etc/passwd")}
    (checkpoint / MANIFEST).write_text(sealed_text({"schema": 1, "files": listed}))
    return checkpoint


BAD_STATES = {
    "a call": {"$call": ["os.system", "true"]},
    "a class": {"model": {"$tensor": ["os", "system"]}},
    "a float that is a program": {"$float": "__import__('os')"},
    "pairs that are none": {"$items": [1, 2]},
    "a key that is a dict": {"$items": [[{"a": 1}, 2]]},
    "a tensor by a negative place": {"$tensor": [-1, -1]},
}
SEALED = {
    "a pickle for tensors": (
        sealed_by_an_attacker({"model.safetensors": lambda canary: pickle.dumps(Calls(os.system, f"touch '{canary}'")),
                               "state.json": b"{}"}), read_checkpoint, "not a readable safetensors file"),
    "a shape bomb": (
        sealed_by_an_attacker({"model.safetensors": safetensors_file({"a": tensor([2**40])}, 4), "state.json": b"{}"}),
        read_checkpoint, "not a readable safetensors file|bytes"),
    "a path out of the directory": (listed_elsewhere, read_checkpoint, "no name of a file"),
    "nested deeply": (
        sealed_by_an_attacker({"state.json": b'{"a":' + b"[" * 700 + b"]" * 700 + b"}"}), read_checkpoint, "nested too deeply"),
    "nested very deeply": (
        sealed_by_an_attacker({"state.json": b"[" * 200_000}), read_checkpoint, "nested too deeply"),
    "no state": (sealed_by_an_attacker({"model.safetensors": b""}), read_checkpoint, "state.json|readable"),
    **{name: (sealed_by_an_attacker(state_json(value)), read_checkpoint, "the state (holds|refers)|unhashable")
       for name, value in BAD_STATES.items()},
}  # fmt: skip


def test_names_of_classes_in_a_state_are_texts(canary, tmp_path):
    named = {"_target_": "os.system", "class_path": "antigravity.fly", "__class__": "this.s"}
    assert read_checkpoint(sealed_by_an_attacker(state_json(named))(tmp_path, canary)) == named


@pytest.mark.parametrize("attack", SEALED)
def test_a_directory_of_state_that_was_made_to_harm_is_refused(attack, canary, tmp_path):
    make, read, words = SEALED[attack]
    with pytest.raises(REFUSALS, match=words):
        read(make(tmp_path, canary))
