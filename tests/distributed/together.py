"""Processes that run one function after another: to start them takes longer than most of these functions.

What must be new in new processes is tested by `launch`, or after `together.end()`. The group is there when a function begins, so the
timeout of its own `join` counts for nothing; what it prints may come after its answer.
"""

import pickle
import tempfile
import time
from itertools import count
from pathlib import Path

import pytest
from restore import restored

from nbdev_trainer.scale.launch import Crew, as_sent, first_error, leave, no_answer, sent
from nbdev_trainer.scale.processes import join


def serve(folder):
    """What each of them does: wait for a call, answer it, wait for the next."""
    processes = join(timeout="60s")
    for number in count():
        call, began = Path(folder) / f"call-{number}", time.monotonic()
        while not call.exists():
            time.sleep(0.005 if time.monotonic() < began + 1 else 0.05)  # many wait while tests of others run
        fn, args, by_name = pickle.loads(call.read_bytes())
        with restored():
            answer = fn(*args, **by_name)
        processes.gather("done")
        if processes.rank == 0:
            leave(Path(folder) / f"answer-{number}", (answer, None), lambda failed: (None, no_answer(failed)))


def raised_by(fn, *args, **by_name):
    """The error of each rank, in order, where all raise one at the same point; the same processes can go on after it."""
    found = None
    try:
        fn(*args, **by_name)
    except Exception as error:
        found = error.with_traceback(None)
    return join().gather(found and as_sent(found))


class Servers:
    """So many processes, for one call after another."""

    def __init__(self, processes):
        self.folder, self.calls = tempfile.TemporaryDirectory(), count()
        (Path(self.folder.name) / "call").write_bytes(sent(serve, (self.folder.name,), {}))
        self.crew = Crew(self.folder.name, processes)

    def end(self):
        self.crew.end()
        self.folder.cleanup()

    def call(self, fn, args, by_name, within):
        folder, number = Path(self.folder.name), next(self.calls)
        call = folder / f"call-{number}"
        call.with_suffix(".new").write_bytes(sent(fn, args, by_name))
        call.with_suffix(".new").replace(call)
        answer, until = folder / f"answer-{number}", time.monotonic() + within
        while not answer.exists():
            if any(one.poll() is not None for one in self.crew.members):
                codes = self.crew.wait(failed=time.monotonic())
                raise first_error(folder, codes, self.crew.failed) if any(codes) else RuntimeError("all have ended")
            if time.monotonic() > until:
                raise TimeoutError(f"{fn} did not answer within {within} seconds")
            time.sleep(0.005)
        found, error = pickle.loads(answer.read_bytes())
        if error is not None:
            raise error
        return found


class Together:
    """`together(fn, *args, processes=2)` is `launch`, in processes that are there already; after an error in new ones."""

    servers = {}

    def __call__(self, fn, *args, processes=2, within=120, **by_name):
        if processes not in self.servers:
            self.servers[processes] = Servers(processes)
        try:
            return self.servers[processes].call(fn, args, by_name, within)
        except BaseException:
            self.end(processes)
            raise

    def end(self, *processes):
        """End so many; all of them, if it is not said."""
        for number in processes or list(self.servers):
            self.servers.pop(number).end()


@pytest.fixture(scope="session")
def together():
    """Processes for the tests of all files."""
    from left_over import left

    yield Together()
    Together().end()
    assert left() == []
