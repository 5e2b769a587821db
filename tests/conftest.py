"""What the tests share: commands run as a user runs them, free ports, tiny models, and hosts in network namespaces."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TINY = ["--model-name", "data/tiny_gpt2", "--dataset-path", "data/sample_corpus.txt", "--sample-by", "paragraph"]
SHORT = [*TINY, "--sequence-length", "64", "--batch-size", "8", "--max-steps", "50", "--learning-rate", "1e-3"]
SHORT += ["--mixed-precision", "no"]
QUIET = ["--eval-every", "0", "--checkpoint-every", "0", "--log-every", "1"]


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """Keeps every cache, and the user's own accelerate configuration, out of the tests."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("HF_HOME", str(folder / "huggingface"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield folder


@dataclass
class Finished:
    """How a command ended."""

    code: int
    output: str
    seconds: float


class Running:
    """A command in a process group of its own, its output in a file."""

    def __init__(self, command: list, log: Path, cwd: Path = ROOT, prefix: list | None = None):
        self.log, self.begun = log, time.monotonic()
        words = [*(prefix or []), *map(str, command)]
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                words,
                cwd=cwd,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def finish(self, timeout: float = 120) -> Finished:
        """Waits for its end; past the time limit all its processes are killed and the test fails."""
        try:
            code = self.process.wait(max(1, self.begun + timeout - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"did not end within {timeout} s:\n{self.log.read_text()[-4000:]}")
        return Finished(code, self.log.read_text(), time.monotonic() - self.begun)

    def kill(self) -> None:
        """Kills the command and what it has started: launchers start their processes in sessions of their own."""
        if self.process.poll() is None:
            own = psutil.Process(self.process.pid)
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()


@pytest.fixture
def start(tmp_path):
    """Starts commands that are killed at the latest when the test ends."""
    begun = []

    def start(command: list, **options) -> Running:
        begun.append(Running(command, tmp_path / f"command_{len(begun)}.log", **options))
        return begun[-1]

    yield start
    for running in begun:
        running.kill()


@pytest.fixture
def run(start):
    """Runs a command to its end."""

    def run(command: list, timeout: float = 120, **options) -> Finished:
        return start(command, **options).finish(timeout)

    return run


@pytest.fixture
def train(run, tmp_path, free_port):
    """Runs scripts/train.py; returns (its run folder, how it ended). `launcher` words come before the script."""

    def train(*flags, launcher: tuple = (sys.executable,), folder: str = "run", **options):
        words = [*launcher, "scripts/train.py", *flags, "--output-dir", tmp_path / folder]
        return tmp_path / folder, run(words, **options)

    return train


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def two_processes(tmp_path, free_port) -> tuple:
    """The launcher words that start two gloo processes on this machine."""
    return processes(tmp_path, free_port, num_processes=2)


def processes(folder: Path, port: int, **topology) -> tuple:
    """Writes an accelerate YAML and returns the launcher words that use it."""
    config = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_machines": 1, "machine_rank": 0}
    config |= {"main_process_ip": "127.0.0.1", "main_process_port": port, **topology}
    path = folder / f"accelerate_{len(list(folder.glob('accelerate_*')))}.yaml"
    path.write_text(yaml.safe_dump(config))
    return (BIN / "accelerate", "launch", "--config_file", path)


def until(condition, seconds: float, what: str):
    """Returns what `condition` returns as soon as it is true; past the time limit the test fails, saying for what."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds:g} s in vain: {what}")
        time.sleep(0.05)
    return found


def wait_for_step(folder: Path, step: int, seconds: float = 90) -> None:
    """Waits until the run in a folder has done so many steps."""
    until(lambda: lock_of(folder).get("step", -1) >= step, seconds, f"step {step} in {folder}")


def lock_of(folder: Path) -> dict:
    """What the run in a folder says of itself while it trains: host, pid and step; nothing before it has begun."""
    try:
        return json.loads((folder / "run.lock").read_text())
    except (OSError, ValueError):
        return {}


def is_running(process: psutil.Process) -> bool:
    """Whether it lives: a container's first process may leave those that have ended as they are."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def environment(process: psutil.Process) -> dict[str, str]:
    """A living process's environment, empty where it has just ended."""
    with contextlib.suppress(psutil.Error, OSError):
        return process.environ() if is_running(process) else {}
    return {}


def processes_with(word: str) -> list[psutil.Process]:
    """The living processes that have a word in their environment: orphans are found by what they have inherited."""
    return [process for process in psutil.process_iter() if word in environment(process).values()]


def workers(word: str) -> dict[int, psutil.Process]:
    """Those of them that train, by rank: launchers have no rank, and what a worker has forked has its own."""
    found = {}
    for process in processes_with(word):
        with contextlib.suppress(psutil.Error):
            rank = environment(process).get("RANK")
            if rank is not None and "RANK" not in environment(process.parent() or psutil.Process(1)):
                found[int(rank)] = process
    return found


def sha256(path: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def tmpfs(path: Path, size: str):
    """A disk of its own, of so many bytes ("8m"), at a folder that is made; needs root."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def rows(folder: Path, key: str = "loss") -> list[dict]:
    """The rows of metrics.jsonl that have `key`."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def losses(folder: Path) -> list[float]:
    """The loss of each step."""
    return [row["loss"] for row in rows(folder)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, home) -> Path:
    """The folder of a run of 50 steps in one process: a reference, and a pretrained model to start from."""
    folder = tmp_path_factory.mktemp("trained")
    words = [sys.executable, "scripts/train.py", *SHORT, *QUIET, "--output-dir", folder / "run"]
    ended = Running(words, folder / "log").finish()
    assert ended.code == 0, ended.output
    return folder / "run"


class Hosts:
    """Machines with addresses 10.77.0.1, .2, … on one switch, as unnamed network namespaces."""

    def __init__(self, count: int):
        self._holders = [subprocess.Popen(["unshare", "-n", "sleep", "3600"]) for _ in range(count + 1)]
        switch = self._enter(0)
        for holder in self._holders:
            self._wait(holder)
        for words in ("ip link add br0 type bridge", "ip link set br0 up"):
            subprocess.run([*switch, *words.split()], check=True)
        for n in range(1, count + 1):
            pid, inside = self._holders[n].pid, self._enter(n)
            subprocess.run([*switch, *f"ip link add v{n} type veth peer name e0 netns {pid}".split()], check=True)
            subprocess.run([*switch, *f"ip link set v{n} master br0 up".split()], check=True)
            for words in (f"addr add 10.77.0.{n}/24 dev e0", "link set e0 up", "link set lo up"):
                subprocess.run([*inside, "ip", *words.split()], check=True)

    def _enter(self, n: int) -> list[str]:
        return ["nsenter", "-t", str(self._holders[n].pid), "-n"]

    @staticmethod
    def _wait(holder: subprocess.Popen) -> None:
        """Until the holder is in a namespace of its own."""
        own = os.readlink("/proc/self/ns/net")
        until = time.monotonic() + 5
        while os.readlink(f"/proc/{holder.pid}/ns/net") == own and time.monotonic() < until:
            time.sleep(0.01)

    def on(self, n: int) -> list[str]:
        """The words before a command that run it on machine n, from 1."""
        return self._enter(n)

    def cut(self, n: int) -> None:
        """Cuts the link of machine n, silently."""
        subprocess.run([*self._enter(0), *f"ip link set v{n} down".split()], check=True)

    def heal(self, n: int) -> None:
        """Mends it again."""
        subprocess.run([*self._enter(0), *f"ip link set v{n} up".split()], check=True)

    def close(self) -> None:
        """Removes the machines."""
        for holder in self._holders:
            holder.kill()
            holder.wait()


@pytest.fixture
def hosts():
    """Makes machines: `hosts(2)`."""
    made = []

    def make(count: int) -> Hosts:
        made.append(Hosts(count))
        return made[-1]

    yield make
    for each in made:
        each.close()


class FaultTable:
    """What was tried and what happened, for a person to read at the end."""

    def __init__(self):
        self.rows: dict[tuple[str, str], list[float | None]] = {}

    def add(self, fault: str, happened: str, seconds: float | None = None) -> None:
        """One trial: the time from the fault to what happened, where it was taken."""
        self.rows.setdefault((fault, happened), []).append(seconds)

    def lines(self) -> list[str]:
        """A Markdown table."""
        lines = ["| Fault | Times | What happened | Seconds |", "|---|---|---|---|"]
        for (fault, happened), trials in self.rows.items():
            seconds = sorted(trial for trial in trials if trial is not None)
            span = " to ".join(dict.fromkeys(f"{s:.1f}" for s in (*seconds[:1], *seconds[-1:]))) or "-"
            lines.append(f"| {fault} | {len(trials)} | {happened} | {span} |")
        return lines


FAULTS = FaultTable()


@pytest.fixture
def table() -> FaultTable:
    """Where a test of a fault notes what happened; printed at the end."""
    return FAULTS


def pytest_terminal_summary(terminalreporter):
    if FAULTS.rows:
        terminalreporter.section("what was tried")
        terminalreporter.write_line("\n".join(FAULTS.lines()))


def pytest_collection_modifyitems(items):
    """Skips the tests that need network namespaces where there can be none; in CI they must run."""
    tools = all(map(shutil.which, ("ip", "unshare", "nsenter")))
    able = tools and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0
    if not able and not os.environ.get("CI"):
        for item in items:
            if item.get_closest_marker("netns"):
                item.add_marker(pytest.mark.skip(reason="needs root, iproute2 and Linux network namespaces"))
