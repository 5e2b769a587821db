"""Measures the speed of a device (matrix products, memory copies) and of the process group (all-reduces)."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

MATMUL_SECONDS = 0.05  # after this time a matrix product is not repeated again
SLOW_SECONDS = 0.5  # an operation that takes longer is not repeated at all
COPY_BYTES = 1 << 27
ALL_REDUCE_BYTES = (1 << 16, 1 << 20, 1 << 23)


def time_call(call: Callable[[], object], device: str | torch.device) -> float:
    """Returns the seconds that a call takes, the work that it starts on the device included."""
    start = time.perf_counter()
    call()
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def matmul_flops(device: str, dtype: torch.dtype, size: int) -> float:
    """Returns the best measured speed, in FLOP/s, of a product of two [size, size] matrices.

    It runs the product two to six times; once if it is very slow.
    """
    left, right = (torch.rand(size, size).to(device, dtype) for _ in range(2))
    time_call(lambda: left[:8] @ right[:, :8], device)  # the first product of a process also loads libraries
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 6 and sum(seconds) < MATMUL_SECONDS):
        seconds.append(time_call(lambda: left @ right, device))
        if seconds[-1] > SLOW_SECONDS:
            break
    return 2 * size**3 / min(seconds)


def reliable_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float | None:
    """Returns the speed of large matrix products, in FLOP/s, or None if other work has disturbed the measurement.

    Call on all processes of a machine at the same time: they share its memory and its power.

    Args:
        device, dtype: of the matrices.
        seconds: how long it measures. The speed is that of the fastest product; another one must be as fast, to 5 %.
    """
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    time_call(lambda: left @ right, device)
    taken: list[float] = []
    while sum(taken) < seconds or len(taken) < 3:
        taken.append(time_call(lambda: left @ right, device))
        if taken[-1] > seconds:
            break
    fastest, *others = sorted(taken)
    return 2 * size**3 / fastest if others and others[0] < 1.05 * fastest else None


def copy_bandwidth(device: str) -> float:
    """Returns the bytes per second that a large copy in the device's memory reads and writes: the best of five."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / min(time_call(lambda: target.copy_(source), device) for _ in range(5))


def all_reduce_seconds(tensor: torch.Tensor) -> float:
    """Returns the seconds that one all-reduce of `tensor` takes on the slowest process; call on all processes."""
    own = time_call(lambda: dist.all_reduce(tensor), tensor.device)
    slowest = torch.tensor([own], device=tensor.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def all_reduce_bandwidth(num_processes: int, device: torch.device) -> float:
    """Returns the bytes per second that each process sends in an all-reduce; call on all processes, two or more.

    It sends little over a slow link: 64 KiB, then 1 MiB and 8 MiB only if the size before took less than 0.2 s.
    """
    for size in ALL_REDUCE_BYTES:
        seconds = all_reduce_seconds(torch.zeros(size // 4, device=device))
        if seconds > 0.2:
            break
    return 2 * (num_processes - 1) / num_processes * size / seconds
