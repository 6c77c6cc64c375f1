"""The command, as torchrun starts it: several times."""

import io
from contextlib import redirect_stdout

from nbdev_trainer import Run
from nbdev_trainer.cli import main
from nbdev_trainer.scale.processes import join


def commanded(words):
    """The exit code, and what is printed, of each process."""
    with redirect_stdout(io.StringIO()) as said:
        code = main(words)
    return join().gather((code, said.getvalue()))


def test_the_command_trains_with_several_processes_and_the_first_one_speaks(together, tmp_path):
    words = ["fit", "--epochs", "2", "--device", "cpu", "--out"]
    (code, said), (other_code, unsaid) = together(commanded, [*words, str(tmp_path / "two")])
    assert (code, other_code, unsaid) == (0, 0, "")
    assert "data: digits" in said and said.endswith(f"run: {tmp_path / 'two'}\n")
    history = Run.open(tmp_path / "two").history
    assert history["samples"] == [1438, 2876] and history["valid_accuracy"][-1] > 0.9
    assert {"model.safetensors", "curves.svg"} <= {path.name for path in (tmp_path / "two").iterdir()}
    assert [code for code, _ in together(commanded, [*words, str(tmp_path / "two")])] == [2, 2]
