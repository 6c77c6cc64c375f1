"""Which processes of `launch` are still there, of those that this process of pytest has started; `together` keeps its own."""

import os
from pathlib import Path

from together import Together


def left():
    """Their numbers."""
    names = ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_TESTRUNUID")  # where pytest runs in several processes
    ours = [f"{name}={os.environ[name]}".encode() for name in names if name in os.environ]
    kept = {str(member.pid) for servers in Together.servers.values() for member in servers.crew.members}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue  # it has just ended, or is not ours to read
        if folder.name not in kept and b"scale.launch import work" in command and all(one in environment for one in ours):
            found.append(int(folder.name))
    return found
