"""How fast a cluster will train: a step's time from what was measured of its machines and links.

The model, for P processes of which process r computes the gradient of its share of the batch in C_r seconds, the last
backward pass among them in B_r, and for a gradient of S bytes in buckets of b_i bytes:

    all-reduce    t(b) = 2 (P - 1) latency + 2 (P - 1) / P * b / bandwidth     a ring, as gloo and NCCL run it
    ready         r_i  = max over r of C_r - B_r (1 - (b_1 + ... + b_i) / S)   DDP sends behind the backward pass
    sent          e_i  = max(e_(i-1), r_i) + t(b_i)                            one bucket after the other
    DDP           step = max(max C_r, e_last) + optimizer
    DDP in fp16   the same with half the bytes, and two more passes over the gradient in memory
    every H steps step = max C_r + optimizer + t(S) / H                        parameters travel, all at once

Sources: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009; Li et al.,
"PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020; Douillard et al., "DiLoCo", 2023. What
it leaves out: other traffic, other programs, and that sending takes processor time from computing.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from forge_lib.distributed.speed import copy_bandwidth, time_call

FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20  # of DDP
PATIENCE_SECONDS = 5.0  # a pass that takes longer is not repeated with more sequences
ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """What one process needs to compute, in seconds.

    Attributes:
        fixed: of a forward and a backward pass, whatever the number of sequences.
        per_sequence: and for each sequence of it.
        backward: the backward pass's part of both, from 0 to 1.
        optimizer: of clipping and the optimizer's step.
        copy_bandwidth: bytes per second that pass through its memory.
    """

    fixed: float
    per_sequence: float
    backward: float
    optimizer: float
    copy_bandwidth: float

    def gradient_seconds(self, num_sequences: int, micro_batch_size: int) -> tuple[float, float]:
        """Returns the seconds of the gradient of so many sequences, and of the last backward pass among them."""
        sizes = [min(micro_batch_size, num_sequences - at) for at in range(0, num_sequences, micro_batch_size)]
        seconds = [self.fixed + self.per_sequence * size for size in sizes]
        return sum(seconds), seconds[-1] * self.backward


def measure_speed(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    sequence_length: int,
    micro_batch_size: int,
    device: str,
    mixed_precision: str,
) -> Speed:
    """Measures how fast this process trains a model, on random tokens; the model is another one afterwards.

    Args:
        model: on the device.
        optimizers: of the model.
        loss: of logits [n, sequence_length, vocabulary] and labels [n, sequence_length].
        sequence_length: tokens per sequence.
        micro_batch_size: sequences of a forward pass; a slow process takes fewer, and the rest is extrapolated.
        device: "cpu", "cuda" or "mps".
        mixed_precision: "no", "bf16" or "fp16".
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    vocabulary = model.get_input_embeddings().num_embeddings

    def times(size: int) -> tuple[float, float]:
        ids = torch.randint(0, vocabulary, (size, sequence_length), device=device)
        start = time.perf_counter()
        with torch.autocast(device, dtype, enabled=dtype is not None):
            logits = model(ids, use_cache=False).logits
        found = loss(logits.float(), ids)
        found.item()  # waits for the GPU
        forward = time.perf_counter() - start
        backward = time_call(found.backward, device)
        return forward, backward

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    times(1)  # allocates
    once = sum(times(1))
    update()
    size = min(micro_batch_size, max(2, int(PATIENCE_SECONDS / once)))
    rounds = ROUNDS if once * size < PATIENCE_SECONDS / 2 else 1
    measured = {}
    for number in sorted({1, size}):
        measured[number] = [times(number) for _ in range(rounds)]
    seconds = {number: statistics.median(map(sum, pairs)) for number, pairs in measured.items()}
    backward = statistics.median(back / (front + back) for front, back in measured[size])
    per_sequence = max(0.0, (seconds[size] - seconds[1]) / (size - 1)) if size > 1 else seconds[1]
    return Speed(
        fixed=max(0.0, seconds[size] - size * per_sequence),
        per_sequence=max(per_sequence, 1e-9),
        backward=backward,
        optimizer=statistics.median(time_call(update, device) for _ in range(rounds)),
        copy_bandwidth=copy_bandwidth(device),
    )


@dataclass(frozen=True)
class Network:
    """Seconds and bytes per second of one transfer of the ring."""

    latency: float
    bandwidth: float

    def all_reduce_seconds(self, num_bytes: float, num_processes: int) -> float:
        """Returns how long a ring of so many processes needs for so many bytes."""
        n = num_processes
        return 2 * (n - 1) * (self.latency + num_bytes / n / self.bandwidth) if n > 1 else 0.0


@dataclass(frozen=True)
class Step:
    """A forecast of one step, in seconds.

    Attributes:
        seconds: of the step.
        compute: of the fastest process's own work, the optimizer's included.
        waiting: of that process for the slowest one.
        sync: of all for what is not hidden behind the backward pass.
    """

    seconds: float
    compute: float
    waiting: float
    sync: float


def fit_network(num_processes: int, measured: dict[int, float]) -> Network:
    """Returns the network on which a ring takes the measured seconds, by bytes: two sizes or more."""
    n = num_processes
    small, large = min(measured), max(measured)
    per_byte = max(measured[large] - measured[small], 1e-3 * measured[large]) / (large - small)
    latency = max(0.0, measured[small] - small * per_byte) / (2 * (n - 1))
    return Network(latency, 2 * (n - 1) / n / per_byte)


def buckets(sizes: Iterable[int]) -> list[int]:
    """Returns the bytes of DDP's buckets, in the order in which they travel.

    Args:
        sizes: bytes of the trainable parameters, in the model's order; their gradients come in the opposite one.
    """
    found, limit = [0], FIRST_BUCKET_BYTES
    for size in reversed(list(sizes)):
        if found[-1] >= limit:
            found.append(0)
            limit = BUCKET_BYTES
        found[-1] += size
    return found


def forecast_ddp(
    speeds: list[Speed],
    shares: list[int],
    micro_batch_size: int,
    network: Network,
    bucket_bytes: list[int],
    fp16: bool = False,
) -> Step:
    """Forecasts a step of scripts/train.py.

    Args:
        speeds: of each process.
        shares: sequences of each process.
        micro_batch_size: sequences of a forward pass.
        network: between the processes.
        bucket_bytes: of the gradient in fp32.
        fp16: whether it travels as fp16.
    """
    gradients = [speed.gradient_seconds(share, micro_batch_size) for speed, share in zip(speeds, shares, strict=True)]
    optimizer = max(speed.optimizer for speed in speeds)
    slowest = max(seconds for seconds, _ in gradients)
    total, done, end = sum(bucket_bytes), 0, 0.0
    for size in bucket_bytes if len(speeds) > 1 else []:
        done += size
        ready = max(seconds - last * (1 - done / total) for seconds, last in gradients)
        cast = max(2 * size / speed.copy_bandwidth for speed in speeds) if fp16 else 0.0
        end = max(end, ready) + cast + network.all_reduce_seconds(size / 2 if fp16 else size, len(speeds))
    return _step(gradients, optimizer, slowest, max(slowest, end) - slowest)


def forecast_every(
    speeds: list[Speed], shares: list[int], micro_batch_size: int, network: Network, num_bytes: int, every: int
) -> Step:
    """Forecasts a step where parameters of `num_bytes` are averaged `every` so many steps."""
    gradients = [speed.gradient_seconds(share, micro_batch_size) for speed, share in zip(speeds, shares, strict=True)]
    optimizer = max(speed.optimizer for speed in speeds)
    slowest = max(seconds for seconds, _ in gradients)
    return _step(gradients, optimizer, slowest, network.all_reduce_seconds(num_bytes, len(speeds)) / every)


def _step(gradients: list[tuple[float, float]], optimizer: float, slowest: float, sync: float) -> Step:
    fastest = min(seconds for seconds, _ in gradients)
    return Step(slowest + sync + optimizer, fastest + optimizer, slowest - fastest, sync)


def mean_speed(speeds: list[Speed]) -> Speed:
    """Returns the speed of a process that computes as much as these do on average."""
    count = len(speeds)
    values = {name: sum(getattr(speed, name) for speed in speeds) / count for name in ("backward", "optimizer")}
    rates = {
        name: count / sum(1 / max(getattr(speed, name), 1e-12) for speed in speeds)
        for name in ("fixed", "per_sequence")
    }
    return Speed(**rates, **values, copy_bandwidth=min(speed.copy_bandwidth for speed in speeds))


def fitting_shares(speeds: list[Speed], batch_size: int) -> list[int]:
    """Returns the parts of the batch, one a process, with which all processes are done at about the same time.

    Each gets a part in proportion to its speed, at least one sequence; what rounding leaves goes to whom it costs
    least.
    """
    rates = [1 / speed.per_sequence for speed in speeds]
    shares = [max(1, math.floor(batch_size * rate / sum(rates))) for rate in rates]
    while sum(shares) < batch_size:
        shares[min(range(len(shares)), key=lambda n: (shares[n] + 1) / rates[n])] += 1
    while sum(shares) > batch_size and max(shares) > 1:
        shares[max(range(len(shares)), key=lambda n: (shares[n] > 1) * shares[n] / rates[n])] -= 1
    return shares
