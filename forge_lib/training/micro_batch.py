"""The largest micro-batch that a process can hold: `--micro-batch-size auto`."""

import dataclasses
import logging
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch import nn

from forge_lib.config import AUTO, TrainConfig
from forge_lib.models.loss import loss_sum
from forge_lib.training.balance import Balancer
from forge_lib.training.memory import PeakMemory
from forge_lib.training.session import Session

logger = logging.getLogger("forge")

USED_SHARE = 0.8  # of the free memory; the rest is for the saver, the evaluation and other programs
STATES = 3  # vectors as large as the trained weights: gradient, and two moments of AdamW
CGROUP_OF_PROCESS = Path("/proc/self/cgroup")  # lines with a number, controllers and a folder, separated by colons
# By controllers, of version 2 and 1: the top folder, files with the limit and the use, and the line of cached files.
CGROUPS = {
    "": (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def largest_micro_batch(accelerator: Accelerator, model: nn.Module, sequence_length: int, most: int) -> int:
    """Returns how many sequences a forward and a backward pass may have, from 1 to `most`.

    On a CPU it measures the memory that one and two sequences need, and computes the rest: running out of memory would
    end other programs too. On a GPU it tries.

    Args:
        accelerator: the processes.
        model: unwrapped; it is moved to the device.
        sequence_length: tokens per sequence.
        most: sequences of this process in a step.
    """
    model.to(accelerator.device)
    buffers = [each.clone() for each in model.buffers()]  # a pass may change them, as a batch norm does
    if accelerator.device.type == "cuda":
        size = _try_on_gpu(accelerator, model, sequence_length, most)
    else:
        size = _estimate(accelerator, model, sequence_length, most)
    model.zero_grad(set_to_none=True)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return size


def choose_micro_batch(
    session: Session, accelerator: Accelerator, model: nn.Module, balancer: Balancer
) -> tuple[Session, TrainConfig]:
    """Returns the session and its configuration, with the measured micro-batch size if the flag is auto.

    Args:
        session, accelerator: the processes.
        model: unwrapped.
        balancer: has the shares of the processes; one that changes later needs no other size.
    """
    if session.config.micro_batch_size != AUTO:
        return session, session.config
    most = session.config.batch_size if balancer.is_on else balancer.shares[accelerator.process_index]
    size = largest_micro_batch(accelerator, model, session.config.sequence_length, most)
    print(f"process {accelerator.process_index}: micro-batches of up to {size} sequences", file=sys.stderr, flush=True)
    config = dataclasses.replace(session.config, micro_batch_size=size)
    return dataclasses.replace(session, config=config), config


def _pass(accelerator: Accelerator, model: nn.Module, sequence_length: int, size: int) -> None:
    ids = torch.zeros(size, sequence_length, dtype=torch.int64, device=accelerator.device)
    with accelerator.autocast():
        loss = loss_sum(model, {"input_ids": ids, "labels": ids})
    loss.backward()


def _try_on_gpu(accelerator: Accelerator, model: nn.Module, sequence_length: int, most: int) -> int:
    states = STATES * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    reserved = torch.empty(states, dtype=torch.uint8, device=accelerator.device)  # those of the optimizer come later

    @find_executable_batch_size(starting_batch_size=most)
    def run(size: int) -> int:
        _pass(accelerator, model, sequence_length, size)
        return size

    size = run()
    del reserved
    torch.cuda.empty_cache()
    return size


def _estimate(accelerator: Accelerator, model: nn.Module, sequence_length: int, most: int) -> int:
    memory, used = PeakMemory(accelerator.device), psutil.Process().memory_info().rss
    states = STATES * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    free = USED_SHARE * free_memory() - states
    kept = _bytes_kept(accelerator, model, sequence_length)
    first = max(memory.pop() - used, kept)
    if free < first:
        print(
            f"process {accelerator.process_index}: one sequence needs about {first / 1e6:,.0f} MB, and "
            f"{max(0.0, free) / 1e6:,.0f} MB are free; shorten --sequence-length, or end other programs",
            file=sys.stderr,
            flush=True,
        )
    if most == 1 or free < 2 * first:
        return 1
    _pass(accelerator, model, sequence_length, 2)
    per_sequence = max(memory.pop() - used - first, kept, 1)
    return max(1, min(most, 1 + int((free - first) // per_sequence)))


def _bytes_kept(accelerator: Accelerator, model: nn.Module, sequence_length: int) -> int:
    """Returns how much a forward pass of one sequence keeps for the backward pass, which then runs too.

    Memory that the process has freed earlier, but still holds, hides a part of it from a measurement of the process.
    """
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _pass(accelerator, model, sequence_length, 1)
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    return sum(size for place, size in kept.items() if place not in weights)


def free_memory() -> int:
    """Returns how many bytes this process may still allocate: of the machine, of its cgroups, and by its own limit."""
    free = [psutil.virtual_memory().available, *_free_in_cgroups()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(free))


def _free_in_cgroups() -> Iterator[int]:
    """Yields what is left of each limit on this process: of its cgroup, and of those that contain it."""
    lines = CGROUP_OF_PROCESS.read_text().splitlines() if CGROUP_OF_PROCESS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in CGROUPS:
            continue
        root, limit, use, cache = CGROUPS[controllers]
        folder = root / path.lstrip("/")
        for each in (folder, *folder.parents):
            if each.is_relative_to(root) and (each / limit).exists():
                words = (each / limit).read_text().strip()
                if words.isdigit():  # else it is "max"
                    counts = dict(line.split() for line in (each / "memory.stat").read_text().splitlines())
                    yield int(words) - int((each / use).read_text()) + int(counts.get(cache, 0))
