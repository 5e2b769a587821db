"""Fixtures that all tests share. Plain helpers are in the modules beside this file."""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import BIN, QUIET, SHORT, Finished, Running, accelerate_launcher, find_free_port
from fault_table import FAULTS, FaultTable
from filelock import FileLock
from networks import Hosts

# OpenMP's threads wait without using the processor. By default they spin: two programs on the same cores, each with a
# thread per core, then take fifty times as long. It changes no result.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _keep_garbage_of_parent() -> None:
    gc.freeze()
    gc.enable()


# A forked test process never collects the garbage of its parent: the tensors in it belong to threads that it lacks,
# and to free them has crashed it. Disabled before the fork, because Python's own work after it may collect, too.
os.register_at_fork(before=gc.disable, after_in_parent=gc.enable, after_in_child=_keep_garbage_of_parent)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """Gives the tests their own home folder, without the user's caches and accelerate configuration."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("HF_HOME", str(folder / "huggingface"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def make_once(shared_folder):
    """Returns a function that runs a command unless another test, of any worker, has run it already.

    `make_once(name, words)` replaces the word OUTPUT by a folder, waits until the command succeeds, and returns that
    folder. Tests only read what is in it.
    """

    def make_once(name: str, words: list, **options) -> Path:
        folder = shared_folder / name
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                unfinished = folder.with_suffix(".unfinished")
                words = [unfinished if word == "OUTPUT" else word for word in words]
                ended = Running(words, folder.with_suffix(".log"), **options).finish()
                assert ended.code == 0, ended.output
                unfinished.rename(folder)
        return folder

    return make_once


@pytest.fixture
def start(tmp_path):
    """Starts commands, and kills those that still run when the test ends."""
    started = []

    def start(command: list, **options) -> Running:
        started.append(Running(command, tmp_path / f"command_{len(started)}.log", **options))
        return started[-1]

    yield start
    for running in started:
        running.kill()


@pytest.fixture
def run(start):
    """Runs a command until it ends."""

    def run(command: list, timeout: float = 120, **options) -> Finished:
        return start(command, **options).finish(timeout)

    return run


@pytest.fixture
def train(run, tmp_path):
    """Runs scripts/train.py with the command `launcher`; returns (its run folder, how it ended)."""

    def train(*flags, launcher: tuple = (sys.executable,), folder: str = "run", **options) -> tuple[Path, Finished]:
        words = [*launcher, "scripts/train.py", *flags, "--output-dir", tmp_path / folder]
        return tmp_path / folder, run(words, warm=launcher[0] in (sys.executable, BIN / "accelerate"), **options)

    return train


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens on."""
    return find_free_port()


@pytest.fixture
def two_processes(tmp_path, free_port) -> tuple:
    """The launcher words that start two gloo processes on this machine."""
    return accelerate_launcher(tmp_path, free_port, num_processes=2)


@pytest.fixture(scope="session")
def trained(make_once, home) -> Path:
    """The folder of a run of 50 steps in one process: a reference, and a pretrained model to start from."""
    words = [sys.executable, "scripts/train.py", *SHORT, *QUIET, "--output-dir", "OUTPUT"]
    return make_once("trained", words, warm=True)


@pytest.fixture
def hosts():
    """Makes machines with their own network: `hosts(2)`."""
    made = []

    def hosts(count: int) -> Hosts:
        made.append(Hosts(count))
        return made[-1]

    yield hosts
    for each in made:
        each.close()


@pytest.fixture
def table() -> FaultTable:
    """The table in which tests of faults record what happened; pytest prints it at the end."""
    return FAULTS


def pytest_terminal_summary(terminalreporter):
    if FAULTS.rows:
        terminalreporter.section("injected faults")
        terminalreporter.write_line("\n".join(FAULTS.lines()))


def pytest_collection_modifyitems(items):
    """Skips the tests that need network namespaces where these do not work; in CI they must run."""
    has_tools = all(map(shutil.which, ("ip", "unshare", "nsenter")))
    works = has_tools and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0
    if not works and not os.environ.get("CI"):
        for item in items:
            if item.get_closest_marker("netns"):
                item.add_marker(pytest.mark.skip(reason="needs root, iproute2 and Linux network namespaces"))
