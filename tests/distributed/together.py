"""Two processes that run one function after another: to start them takes longer than most of these functions.

What must be new in new processes is tested by `launch`, or after `together.end()`. The group is there when a function begins, so the
timeout of its own `join` counts for nothing; what it prints may come after its answer.
"""

import pickle
import tempfile
import time
from itertools import count
from pathlib import Path

import pytest

from nbdev_trainer.scale.launch import Crew, first_error, launch, leave, no_answer, sent
from nbdev_trainer.scale.processes import join


def serve(folder):
    """What each of the two does: wait for a call, answer it, wait for the next."""
    processes = join(timeout="60s")
    for number in count():
        call = Path(folder) / f"call-{number}"
        while not call.exists():
            time.sleep(0.005)
        fn, args, by_name = pickle.loads(call.read_bytes())
        answer = fn(*args, **by_name)
        processes.gather("done")
        if processes.rank == 0:
            leave(Path(folder) / f"answer-{number}", (answer, None), lambda failed: (None, no_answer(failed)))


class TwoProcesses:
    """`together(fn, *args)` is `launch(fn, *args)`, in processes that are there already; after an error in new ones."""

    crew = None

    def start(self):
        self.folder, self.calls = tempfile.TemporaryDirectory(), count()
        (Path(self.folder.name) / "call").write_bytes(sent(serve, (self.folder.name,), {}))
        self.crew = Crew(self.folder.name, 2)

    def end(self):
        if self.crew is not None:
            self.crew.end()
            self.folder.cleanup()
        self.crew = None

    def __call__(self, fn, *args, processes=2, within=120, **by_name):
        if processes != 2:
            return launch(fn, *args, processes=processes, **by_name)
        if self.crew is None:
            self.start()
        folder, number = Path(self.folder.name), next(self.calls)
        call = folder / f"call-{number}"
        call.with_suffix(".new").write_bytes(sent(fn, args, by_name))
        call.with_suffix(".new").replace(call)
        answer, until = folder / f"answer-{number}", time.monotonic() + within
        try:
            while not answer.exists():
                if any(one.poll() is not None for one in self.crew.members):
                    codes = self.crew.wait(failed=time.monotonic())
                    raise first_error(folder, codes, self.crew.failed) if any(codes) else RuntimeError("both have ended")
                if time.monotonic() > until:
                    raise TimeoutError(f"{fn} did not answer within {within} seconds")
                time.sleep(0.005)
            found, error = pickle.loads(answer.read_bytes())
        except BaseException:
            self.end()
            raise
        if error is not None:
            raise error
        return found


@pytest.fixture(scope="module")
def together():
    """Two processes for the tests of one file."""
    two = TwoProcesses()
    yield two
    two.end()
