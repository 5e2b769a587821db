"""The number of threads: each process gets its share of the cores, unless the user has said otherwise."""

import os

import psutil
import pytest
import torch

from forge_lib.distributed import threads
from forge_lib.process import World


class Launcher:
    """A parent process."""

    def __init__(self, variables: dict[str, str], *words: str):
        self.environ, self.cmdline = lambda: variables, lambda: list(words)


@pytest.fixture(autouse=True)
def keep_threads(monkeypatch):
    """Restores the number of threads, and the variable."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # it is restored, whatever a test does
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "own, launcher, is_users",
    [
        ({}, Launcher({}), False),
        ({"OMP_NUM_THREADS": "3"}, Launcher({}), True),
        ({"OMP_NUM_THREADS": "1"}, Launcher({}), True),  # nothing launched it
        ({"OMP_NUM_THREADS": "1", "RANK": "0"}, Launcher({}, "accelerate", "launch"), False),
        ({"OMP_NUM_THREADS": "32", "RANK": "0"}, Launcher({}, "accelerate", "launch"), False),  # of a container's host
        ({"OMP_NUM_THREADS": "1", "RANK": "0"}, Launcher({"OMP_NUM_THREADS": "1"}), True),
        ({"OMP_NUM_THREADS": "1", "RANK": "0"}, Launcher({}, "--num-cpu-threads-per-process=1"), True),
        ({"OMP_NUM_THREADS": "1", "RANK": "0"}, Launcher({}, "--num_cpu_threads_per_process", "1"), True),
    ],
)
def test_only_the_launchers_default_is_changed(monkeypatch, own, launcher, is_users):
    for name in [name for name in os.environ if name == "RANK" or name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(psutil, "Process", lambda pid: launcher)
    monkeypatch.setattr(threads, "available_cores", lambda: 7)
    torch.set_num_threads(1)
    assert threads.is_set_by_user() == is_users
    threads.set_threads(World(num_processes=3, num_local_processes=3))
    assert torch.get_num_threads() == (1 if is_users else 2)


def test_a_quota_limits_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    assert threads.available_cores() == 6
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads.available_cores() == 6
    (tmp_path / "cpu.max").write_text("350000 100000\n")
    assert threads.available_cores() == 4
