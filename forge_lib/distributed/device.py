"""Chooses the device that a process trains on."""

import os
import socket

import torch
from accelerate.utils import str_to_bool

from forge_lib.distributed.allocator import keep_freed_memory
from forge_lib.distributed.threads import set_threads
from forge_lib.errors import UserError
from forge_lib.process import World

MICRO_BATCH_SIZE = 8
CPU_TOKENS = 1024  # of a forward pass on a CPU
CPU_TOKENS_BF16 = 2048  # each pass rounds the weights to bf16
GPU_TOKENS = 16_384  # fewer do not fill a GPU


def choose_device(wanted: str, world: World) -> str:
    """Returns "cuda" and makes this process's GPU the current one; or "cpu" and sets threads and allocator; or "mps".

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
        keep_freed_memory()
        return "cpu"
    if world.num_local_processes > torch.cuda.device_count():
        raise UserError(
            f"{world.num_local_processes} processes were started on {socket.gethostname()}, which has "
            f"{torch.cuda.device_count()} GPU(s); start one process per GPU (num_processes), or give --device cpu"
        )
    torch.cuda.set_device(world.local_process_index)
    return "cuda"


def choose_micro_batch_size(device: str, sequence_length: int, precision: str, num_machines: int = 1) -> int:
    """Returns how many sequences a forward pass has, if the user does not say it and they fit into the memory.

    A GPU needs many tokens per pass. A CPU is fastest, and needs least memory, if its cache holds what a layer
    computes. But with several machines, only the last backward pass of a step hides the exchange of the gradients:
    then it should be long.

    Args:
        device: "cpu", "cuda" or "mps".
        sequence_length: tokens per sequence.
        precision: "no", "bf16" or "fp16".
        num_machines: that train together.
    """
    if device == "cuda":
        return max(1, GPU_TOKENS // sequence_length)
    if device != "cpu" or num_machines > 1:
        return MICRO_BATCH_SIZE
    tokens = CPU_TOKENS_BF16 if precision == "bf16" else CPU_TOKENS
    return min(MICRO_BATCH_SIZE, max(1, tokens // sequence_length))
