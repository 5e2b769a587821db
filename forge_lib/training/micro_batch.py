"""How many sequences a forward pass of this process has, if --micro-batch-size does not say it."""

import dataclasses
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch import nn
from torch.utils.data import Dataset

from forge_lib.config import AUTO, TrainConfig
from forge_lib.data.batches import read_batch
from forge_lib.distributed.allocator import return_freed_memory
from forge_lib.distributed.device import MICRO_BATCH_SIZE, choose_micro_batch_size
from forge_lib.errors import UserError
from forge_lib.models.loss import loss_sum
from forge_lib.training.balance import Balancer
from forge_lib.training.inputs import Inputs
from forge_lib.training.memory import PeakMemory
from forge_lib.training.session import Session

USED_SHARE = 0.8  # of the free memory; the rest is for the saver, the evaluation and other programs
MOMENTS = 2  # of AdamW, each as large as the trained weights
NOTHING_FITS = "No executable batch size found"  # the begin of accelerate's message
CGROUP_OF_PROCESS = Path("/proc/self/cgroup")  # lines with a number, controllers and a folder, separated by colons
# By controllers, of version 2 and 1: the top folder, files with the limit and the use, and the line of cached files.
CGROUPS = {
    "": (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def choose_micro_batch(
    session: Session, accelerator: Accelerator, inputs: Inputs, balancer: Balancer
) -> tuple[Session, TrainConfig]:
    """Returns the session and its configuration with a micro-batch size; call on all processes.

    With `auto` it is the largest that fits into the memory. Without the flag it is a size that is fast; on a GPU, the
    largest that fits, up to that size.

    Args:
        session, accelerator: the processes.
        inputs: the model, which is moved to the device, and the data.
        balancer: has the shares of the processes.

    Raises:
        UserError: with `auto`, not even one sequence fits into the memory of a GPU.
    """
    config, rank = session.config, accelerator.process_index
    size, share = config.micro_batch_size, max(1, balancer.shares[rank])
    measured = (accelerator, inputs.model, inputs.dataset)
    if size == AUTO:
        session.peers.set_status("measuring its memory")
        return_freed_memory()
    session.peers.barrier("memory/loaded")
    free = free_memory(session.world.num_local_processes) if size == AUTO else 0
    session.peers.barrier("memory/read")  # the passes of other processes need some of it
    if size == AUTO:
        size = largest_micro_batch(*measured, config.batch_size if balancer.is_on else share, free)
        if not size:
            raise UserError(
                f"--micro-batch-size auto: not even one sequence fits into the memory of {accelerator.device}; "
                "shorten --sequence-length, or use a smaller model"
            )
        print(f"process {rank}: micro-batches of up to {size} sequences", file=sys.stderr, flush=True)
    elif not size:
        wanted = size = _fast_size(session, share, balancer.is_on)
        if session.device == "cuda":  # at least 1: the run may need less than the measurement reserves
            size = max(1, largest_micro_batch(*measured, wanted, free))
        if size < wanted:
            print(
                f"process {rank}: micro-batches of {size} sequences, because {wanted} do not fit into the memory of "
                "its GPU",
                file=sys.stderr,
                flush=True,
            )
    config = dataclasses.replace(config, micro_batch_size=size)
    return dataclasses.replace(session, config=config), config


def _fast_size(session: Session, share: int, is_balanced: bool) -> int:
    """Returns how many sequences a pass has without the flag, if they fit."""
    config, agreement = session.config, session.agreement
    num_machines = len({process.machine for process in agreement.processes})
    size = choose_micro_batch_size(session.device, config.sequence_length, agreement.mixed_precision, num_machines)
    if session.device != "cuda":
        return size
    if config.compile and is_balanced:  # only whole micro-batches are compiled, and the share changes
        size = min(size, MICRO_BATCH_SIZE)
    return min(size, share)


def largest_micro_batch(accelerator: Accelerator, model: nn.Module, dataset: Dataset, most: int, free: int) -> int:
    """Returns how many sequences a forward and a backward pass may have, up to `most`; 0 if a GPU cannot hold one.

    On a CPU it measures the memory that one and two sequences need, and computes the rest: running out of memory would
    end other programs too. On a GPU it tries.

    Args:
        accelerator: the processes.
        model: unwrapped; it is moved to the device.
        dataset: a BlockDataset.
        most: sequences of this process in a step.
        free: bytes of main memory that this process may still allocate; not needed for a GPU.
    """
    model.to(accelerator.device)
    buffers = [each.clone() for each in model.buffers()]  # a pass may change them, as a batch norm does

    def compute(size: int) -> None:
        batch = {name: tensor.to(accelerator.device) for name, tensor in read_batch(dataset, [0] * size).items()}
        with torch.compiler.set_stance("force_eager"), accelerator.autocast():
            loss = loss_sum(model, batch)
        loss.backward()

    trained = sum(each.nbytes for each in model.parameters() if each.requires_grad)
    if accelerator.device.type == "cuda":
        size = _try_on_gpu(accelerator.device, compute, MOMENTS * trained, most)
    else:
        size = _estimate(accelerator, model, compute, most, USED_SHARE * free - (1 + MOMENTS) * trained)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return size


def _try_on_gpu(device: torch.device, compute: Callable[[int], None], moments: int, most: int) -> int:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]

    @find_executable_batch_size(starting_batch_size=most)
    def run(size: int) -> int:
        compute(size)
        return size

    reserved, size = None, 0
    try:
        # The moments of the optimizer come later, and so do the buffers of NCCL; the passes make the gradient.
        reserved = torch.empty(moments + int((1 - USED_SHARE) * free), dtype=torch.uint8, device=device)
        size = run()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not str(error).startswith(NOTHING_FITS):
            raise
    del reserved
    torch.cuda.empty_cache()
    return size


def _estimate(
    accelerator: Accelerator, model: nn.Module, compute: Callable[[int], None], most: int, free: float
) -> int:
    memory, used = PeakMemory(accelerator.device), psutil.Process().memory_info().rss
    kept = _bytes_kept(model, compute)
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
    compute(2)
    per_sequence = max(memory.pop() - used - first, kept, 1)
    return max(1, min(most, 1 + int((free - first) // per_sequence)))


def _bytes_kept(model: nn.Module, compute: Callable[[int], None]) -> int:
    """Returns how much a forward pass of one sequence keeps for the backward pass, which then runs too.

    Memory that the process has freed earlier, but still holds, hides a part of it from a measurement of the process.
    """
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute(1)
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    return sum(size for place, size in kept.items() if place not in weights)


def free_memory(num_local_processes: int = 1) -> int:
    """Returns how many bytes this process may still allocate: of the machine, of its cgroups, and by its own limit.

    Machine and cgroups are divided among the processes of this machine.
    """
    free = [each // num_local_processes for each in (psutil.virtual_memory().available, *_free_in_cgroups())]
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
