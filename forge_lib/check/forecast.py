"""Forecasts how long a training step takes, from the measured speed of the processes and of the network.

The model has P processes. Process r computes the gradient of its share of the batch in C_r seconds, of which its last
backward pass takes B_r. The gradient has S bytes, in buckets of b_i bytes:

    all-reduce      t(b) = 2 (P - 1) latency + 2 (P - 1) / P * b / bandwidth     a ring, as in gloo and NCCL
    bucket ready    r_i  = max over r of C_r - B_r (1 - (b_1 + ... + b_i) / S)   DDP sends during the backward pass
    bucket sent     e_i  = max(e_(i-1), r_i) + t(b_i)                            one bucket after the other
    DDP             step = max(max C_r, e_last) + optimizer
    DDP in fp16     the same with half the bytes, and two more passes over the gradient in memory
    train_elastic   step = P / sum of 1 / (C_r + optimizer) + t(Q) / H           a round of H steps, Q bytes at its end

In train_elastic.py nobody waits for the slowest process: each one makes as many steps as it can in a round, each with
the whole batch, so P batches are trained in one step of each. Q is the size of all parameters in int4. Each process
counts as a peer of its own.

Sources: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009; Li et al.,
"PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020; Douillard et al., "DiLoCo", 2023. The
model ignores other traffic, other programs, and the processor time that sending takes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from forge_lib.data.batches import fit_shares
from forge_lib.elastic.pace import plan_round

FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20  # of DDP


@dataclass(frozen=True)
class Speed:
    """How fast one process trains a model.

    Attributes:
        fixed: seconds of a forward and a backward pass that do not depend on the number of sequences.
        per_sequence: seconds of a forward and a backward pass per sequence, in addition.
        backward: the fraction of both that the backward pass takes, from 0 to 1.
        optimizer: seconds of gradient clipping and the optimizer's step.
        copy_bandwidth: bytes per second that memory copies read and write.
    """

    fixed: float
    per_sequence: float
    backward: float
    optimizer: float
    copy_bandwidth: float

    def gradient_seconds(self, num_sequences: int, micro_batch_size: int) -> tuple[float, float]:
        """Returns the seconds that the gradient of some sequences takes, and those of its last backward pass."""
        sizes = [min(micro_batch_size, num_sequences - at) for at in range(0, num_sequences, micro_batch_size)]
        seconds = [self.fixed + self.per_sequence * size for size in sizes]
        return sum(seconds), seconds[-1] * self.backward


@dataclass(frozen=True)
class Network:
    """The latency in seconds and the bandwidth in bytes per second of one transfer in a ring all-reduce."""

    latency: float
    bandwidth: float

    def all_reduce_seconds(self, num_bytes: float, num_processes: int) -> float:
        """Returns how long a ring all-reduce of that many bytes takes."""
        n = num_processes
        return 2 * (n - 1) * (self.latency + num_bytes / n / self.bandwidth) if n > 1 else 0.0


@dataclass(frozen=True)
class Step:
    """The forecast of one training step, in seconds.

    Attributes:
        seconds: the whole step.
        compute: what the fastest process computes, including the optimizer.
        waiting: how long the fastest process waits for the slowest one.
        sync: how long all processes wait for the network, apart from what overlaps with the backward pass.
    """

    seconds: float
    compute: float
    waiting: float
    sync: float


def fit_network(num_processes: int, measured: dict[int, float]) -> Network:
    """Returns the network that explains the measured seconds of all-reduces, by bytes; two sizes or more."""
    n = num_processes
    small, large = min(measured), max(measured)
    per_byte = max(measured[large] - measured[small], 1e-3 * measured[large]) / (large - small)
    latency = max(0.0, measured[small] - small * per_byte) / (2 * (n - 1))
    return Network(latency, 2 * (n - 1) / n / per_byte)


def buckets(sizes: Iterable[int]) -> list[int]:
    """Returns the bytes of DDP's buckets, in the order in which DDP sends them.

    Args:
        sizes: bytes of the trainable parameters, in the model's order; their gradients are ready in reverse order.
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
        speeds: of the processes, by rank.
        shares: sequences of the processes, by rank.
        micro_batch_size: sequences per forward pass.
        network: between the processes.
        bucket_bytes: bytes of the gradient in fp32, by bucket.
        fp16: whether the gradient is sent in fp16.
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
    speeds: list[Speed], batch_size: int, micro_batch_size: int, network: Network, num_bytes: int, every: int
) -> Step:
    """Forecasts a step of a peer of scripts/train_elastic.py, on average over the peers.

    Args:
        speeds: of the peers.
        batch_size: sequences of a step of one peer.
        micro_batch_size: sequences per forward pass.
        network: between the peers.
        num_bytes: of all parameters, as they are sent after a round.
        every: --sync-every, the steps of a round; 0: derived, as train_elastic.py does.
    """
    seconds = [speed.gradient_seconds(batch_size, micro_batch_size)[0] + speed.optimizer for speed in speeds]
    compute = len(seconds) / sum(1 / each for each in seconds)
    exchange = network.all_reduce_seconds(num_bytes, len(speeds))
    sync = exchange * compute / plan_round(seconds, exchange, every).seconds
    return Step(compute + sync, compute, 0.0, sync)


def _step(gradients: list[tuple[float, float]], optimizer: float, slowest: float, sync: float) -> Step:
    fastest = min(seconds for seconds, _ in gradients)
    return Step(slowest + sync + optimizer, fastest + optimizer, slowest - fastest, sync)


def mean_speed(speeds: list[Speed]) -> Speed:
    """Returns the speed of a process that computes as much per second as these do on average."""
    count = len(speeds)
    values = {name: sum(getattr(speed, name) for speed in speeds) / count for name in ("backward", "optimizer")}
    rates = {
        name: count / sum(1 / max(getattr(speed, name), 1e-12) for speed in speeds)
        for name in ("fixed", "per_sequence")
    }
    return Speed(**rates, **values, copy_bandwidth=min(speed.copy_bandwidth for speed in speeds))


def fitting_shares(speeds: list[Speed], batch_size: int) -> list[int]:
    """Returns the share of the batch for each process with which all finish at about the same time, as `--balance`."""
    return fit_shares([speed.per_sequence for speed in speeds], batch_size)
