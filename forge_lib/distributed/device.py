"""Chooses the device that a process trains on."""

import os
import socket

import torch
from accelerate.utils import str_to_bool

from forge_lib.distributed.threads import set_threads
from forge_lib.errors import UserError
from forge_lib.process import World


def choose_device(wanted: str, world: World) -> str:
    """Returns "cuda" and makes this process's GPU the current one; or "cpu" and sets the number of threads; or "mps".

    "mps" is for one process on a Mac.

    Args:
        wanted: --device: "auto", "cpu" or "cuda".
        world: the processes of the run.

    Raises:
        UserError: `wanted` is "cuda" and there is no GPU, or this machine has fewer GPUs than processes.
    """
    use_cpu = wanted == "cpu" or bool(str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")))
    if use_cpu or not torch.cuda.is_available():
        if wanted == "cuda":
            raise UserError(f"--device cuda: torch {torch.__version__} finds no GPU on {socket.gethostname()}")
        if not use_cpu and world.num_processes == 1 and torch.backends.mps.is_available():
            return "mps"
        set_threads(world)
        return "cpu"
    if world.num_local_processes > torch.cuda.device_count():
        raise UserError(
            f"{world.num_local_processes} processes were started on {socket.gethostname()}, which has "
            f"{torch.cuda.device_count()} GPU(s); start one process per GPU (num_processes), or give --device cpu"
        )
    torch.cuda.set_device(world.local_process_index)
    return "cuda"
