"""How many threads a process computes with on a CPU."""

import os
from pathlib import Path

import psutil
import torch

from forge_lib.process import World, is_launched

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: "<microseconds> <period>", or "max <period>"
LAUNCHER_FLAG = "--num_cpu_threads_per_process"  # of accelerate launch


def available_cores() -> int:
    """Returns how many physical cores this process may use: by its affinity, and by its container's quota."""
    physical, logical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1, psutil.cpu_count() or 1
    cores = float(physical)
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        cores = min(cores, len(os.sched_getaffinity(0)) * physical / logical)
    if QUOTA.exists():
        quota, _, period = QUOTA.read_text().partition(" ")
        cores = cores if quota == "max" else min(cores, int(quota) / int(period))
    return max(1, round(cores))


def set_threads(world: World) -> None:
    """Gives each process of this machine its share of the cores, unless the user has set OMP_NUM_THREADS.

    Where nobody has said otherwise, torchrun gives each process one thread, and accelerate one thread or a share of
    the machine's cores that ignores containers.
    """
    if is_set_by_user():
        return
    threads = max(1, available_cores() // world.num_local_processes)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # else accelerate sets another number


def is_set_by_user() -> bool:
    """Returns whether the user, rather than the launcher, has set the number of threads."""
    if "OMP_NUM_THREADS" not in os.environ or not is_launched():
        return "OMP_NUM_THREADS" in os.environ
    try:
        launcher = psutil.Process(os.getppid())
        variables, words = launcher.environ(), launcher.cmdline()
    except (psutil.Error, OSError):
        return True
    return "OMP_NUM_THREADS" in variables or any(
        word.replace("-", "_").startswith(LAUNCHER_FLAG.replace("-", "_")) for word in words
    )
