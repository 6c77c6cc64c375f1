"""Two hosts, each a network namespace with an address of its own; torchrun on both."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fault_runs
import pytest
import torch

NET = f"10.{os.getpid() % 200 + 10}.77"  # not that of another run of the tests


def command(*words):
    return subprocess.run(words, capture_output=True, text=True, timeout=20)


@pytest.fixture(scope="module")
def hosts():
    """Names of two namespaces that are joined by a cable, and of the ends of the cable."""
    if shutil.which("ip") is None or command("unshare", "-n", "true").returncode:
        pytest.skip("network namespaces need the program ip and the right to make them")
    names = [f"nt{os.getpid()}{end}" for end in "ab"]
    made = [command("ip", "netns", "add", name) for name in names]
    made.append(command("ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1]))
    if any(one.returncode for one in made):
        for name in names:
            command("ip", "netns", "delete", name)
        pytest.skip(f"network namespaces cannot be made here: {made[-1].stderr}")
    for k, name in enumerate(names):
        command("ip", "link", "set", name, "netns", name)
        inside = ["ip", "netns", "exec", name, "ip"]
        command(*inside, "addr", "add", f"{NET}.{k + 1}/24", "dev", name)
        command(*inside, "link", "set", name, "up")
        command(*inside, "link", "set", "lo", "up")
    yield names
    for name in names:
        command("ip", "netns", "delete", name)


@pytest.fixture
def start(hosts, tmp_path):
    started = []

    def on(k, *arguments, log):
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        words = ["ip", "netns", "exec", hosts[k], sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                 "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-id", "hosts",
                 "--rdzv-endpoint", f"{NET}.1:29411", "--local-addr", f"{NET}.{k + 1}", "--monitor-interval", "0.1",
                 "--rdzv-conf", f"is_host={1 - k},join_timeout=40,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3",
                 fault_runs.__file__, *map(str, arguments)]
        options = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": hosts[k],
                   "FAULT_TIMEOUT": "5s", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        file = open(tmp_path / log, "w")
        started.append((subprocess.Popen(words, stdout=file, stderr=file, env=options, start_new_session=True), file))
        return started[-1][0]

    yield on
    for name in hosts:
        kill_host(name)
    for one, file in started:
        one.wait(10)
        file.close()


def logs(folder):
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    found = fault_runs.train(str(folder / "run"), slow=0.0)
    return found[0]


def assert_same(path, undisturbed):
    found = torch.load(path, weights_only=True)
    for name in undisturbed:
        assert (found[name] - undisturbed[name]).abs().max().item() < 1e-12, name


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def test_two_hosts_train_what_one_process_trains(start, tmp_path, undisturbed):
    both = [start(k, tmp_path / "run", tmp_path / "weights.pt", "plain", log=f"{k}.log") for k in (0, 1)]
    assert [one.wait(50) for one in both] == [0, 0], logs(tmp_path)
    assert_same(tmp_path / "weights.pt", undisturbed)


def kill_host(name):
    """Everything that runs on it, workers and their starter."""
    for number in command("ip", "netns", "pids", name).stdout.split():
        os.kill(int(number), signal.SIGKILL)


@pytest.mark.fault(
    "one of two hosts is lost",
    "all processes of a network namespace are killed, torchrun is started there again",
    "the weights of an undisturbed run, to 1e-12",
)
def test_a_host_that_is_killed_comes_back_and_the_run_goes_on(start, hosts, tmp_path, undisturbed):
    run, weights = tmp_path / "run", tmp_path / "weights.pt"
    first, second = [start(k, run, weights, "slow", log=f"{k}.log") for k in (0, 1)]
    wait_for(lambda: (run / "checkpoints").exists() and any((run / "checkpoints").glob("ba-00000[4-9]*")))
    kill_host(hosts[1])
    assert second.wait(10) != 0
    time.sleep(4)  # longer than torchrun takes to miss it
    again = start(1, run, weights, "slow", log="1-again.log")
    assert [first.wait(60), again.wait(60)] == [0, 0], logs(tmp_path)
    assert "going on from" in logs(tmp_path)
    assert_same(weights, undisturbed)


@pytest.mark.fault(
    "one of two hosts is cut off",
    "its network is taken down, and up again",
    "likewise",
)
def test_a_host_that_was_cut_off_starts_again_and_the_run_goes_on(start, hosts, tmp_path, undisturbed):
    run, weights = tmp_path / "run", tmp_path / "weights.pt"
    first, second = [start(k, run, weights, "slow", log=f"{k}.log") for k in (0, 1)]
    wait_for(lambda: (run / "checkpoints").exists() and any((run / "checkpoints").glob("ba-00000[4-9]*")))
    inside = "ip", "netns", "exec", hosts[1], "ip", "link", "set", hosts[1]
    command(*inside, "down")
    wait_for(lambda: "waited for a process that has ended or hangs" in (tmp_path / "0.log").read_text())
    kill_host(hosts[1])  # somebody looks after it, and starts it again
    second.wait(10)
    command(*inside, "up")
    again = start(1, run, weights, "slow", log="1-again.log")
    assert [first.wait(60), again.wait(60)] == [0, 0], logs(tmp_path)
    assert_same(weights, undisturbed)
