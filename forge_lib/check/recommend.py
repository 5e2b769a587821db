"""Forecasts a run on the machines of a cluster and on others like them, and recommends flags."""

import math
from dataclasses import dataclass

from forge_lib.check.forecast import (
    Network,
    Speed,
    Step,
    buckets,
    fitting_shares,
    forecast_ddp,
    forecast_every,
    mean_speed,
)
from forge_lib.config import TrainConfig
from forge_lib.elastic.compression import CODECS

NUMBERS_OF_MACHINES = (2, 4, 8, 16, 32, 64)
GAIN = 1.1  # a flag is recommended if it makes a step faster by this factor
NETWORK_FRACTION = 0.2  # a note is added if the network takes a larger part of a step
ELASTIC_GAIN = 1.5  # a note recommends train_elastic.py if it is faster by this factor
FP32_BYTES = 4


@dataclass(frozen=True)
class Estimate(Step):
    """The forecast of one step with its throughput over all processes."""

    tokens_per_second: float


@dataclass(frozen=True)
class Estimates:
    """One step of train.py with gradients in fp32, with gradients in fp16, and one of train_elastic.py."""

    ddp: Estimate
    ddp_fp16: Estimate
    every: Estimate


@dataclass(frozen=True)
class Forecast:
    """What check_cluster.py forecasts; these names are keys of its --json.

    Attributes:
        here: for the machines of the cluster, with the given flags.
        such_machines: by number of machines like these; None if the batch is too small for that many.
        sync_every: --sync-every of train_elastic.py; 0: derived.
        flags: recommended flags of scripts/train.py.
        with_flags: for the machines of the cluster with these flags.
        notes: sentences for the user.
    """

    here: Estimates
    such_machines: dict[int, Estimates | None]
    sync_every: int
    flags: str
    with_flags: Estimate
    notes: list[str]


@dataclass(frozen=True)
class Workload:
    """What is the same in all forecasts of a run.

    Attributes:
        run: gives the batch and its sequences; its micro-batch size is 0 if train.py chooses it.
        micro_batch_size: that one, or the chosen one.
        network: between the processes.
        parameter_bytes: bytes of each trainable parameter in fp32, in the model's order.
        sync_every: --sync-every of train_elastic.py; 0: derived.
    """

    run: TrainConfig
    micro_batch_size: int
    network: Network
    parameter_bytes: list[int]
    sync_every: int

    def estimate(self, speeds: list[Speed], shares: list[int]) -> Estimates:
        """Forecasts a step of processes with these speeds and shares, by rank."""
        run = self.run
        given = (speeds, shares, self.micro_batch_size, self.network)
        bucket_bytes = buckets(self.parameter_bytes)
        num_bytes = CODECS["int4"].num_bytes(sum(self.parameter_bytes) // FP32_BYTES)
        every = forecast_every(speeds, run.batch_size, self.micro_batch_size, self.network, num_bytes, self.sync_every)
        steps = (forecast_ddp(*given, bucket_bytes), forecast_ddp(*given, bucket_bytes, fp16=True), every)
        batches = (1, 1, len(speeds))  # of one step of all processes
        num_tokens = run.batch_size * run.sequence_length
        return Estimates(
            *(
                Estimate(**vars(step), tokens_per_second=count * num_tokens / step.seconds)
                for step, count in zip(steps, batches, strict=True)
            )
        )


def make_forecast(workload: Workload, num_machines: int, speeds: list[Speed], shares: list[int]) -> Forecast:
    """Forecasts a run.

    Args:
        workload: of the run.
        num_machines: of the cluster.
        speeds: of the processes, by rank.
        shares: sequences of the processes, by rank, with the given flags.
    """
    here = workload.estimate(speeds, shares)
    such_machines = {}
    for count in NUMBERS_OF_MACHINES if num_machines > 1 else ():
        num_processes = count * max(1, round(len(speeds) / num_machines))
        such_machines[count] = _estimate_equal_processes(workload, speeds, num_processes)
    flags, with_flags = _recommend(workload, speeds, here)
    notes = []
    if num_machines > 1 and not workload.run.shares and len(set(shares)) > 1:
        notes.append(f"train.py divides a batch into {' + '.join(map(str, shares))} sequences (--balance auto).")
    if with_flags.sync > NETWORK_FRACTION * with_flags.seconds:
        fraction = with_flags.sync / with_flags.seconds
        notes.append(
            f"The processes wait for the network in {fraction:.0%} of a step. With a larger --batch-size, they "
            "synchronize less often."
        )
    if here.every.tokens_per_second > ELASTIC_GAIN * with_flags.tokens_per_second:
        notes.append(
            f"train_elastic.py trains {here.every.tokens_per_second / with_flags.tokens_per_second:.1f} times as many "
            "tokens per second here: see docs/slow-links.md."
        )
    return Forecast(here, such_machines, workload.sync_every, " ".join(flags), with_flags, notes)


def _estimate_equal_processes(workload: Workload, speeds: list[Speed], num_processes: int) -> Estimates | None:
    """Forecasts a step of processes that all have the mean of these speeds and equal shares."""
    if num_processes > workload.run.batch_size:
        return None
    share = math.ceil(workload.run.batch_size / num_processes)
    return workload.estimate([mean_speed(speeds)] * num_processes, [share] * num_processes)


def _recommend(workload: Workload, speeds: list[Speed], here: Estimates) -> tuple[list[str], Estimate]:
    """Returns the recommended flags, and the forecast of a step with them."""
    run = workload.run
    flags = [f"--batch-size {run.batch_size}"]
    if run.micro_batch_size:
        flags.append(f"--micro-batch-size {run.micro_batch_size}")
    best = here
    fitting = fitting_shares(speeds, run.batch_size)
    with_fitting = workload.estimate(speeds, fitting)
    if with_fitting.ddp.seconds * GAIN < here.ddp.seconds:
        parts = [share // math.gcd(*fitting) for share in fitting]
        flags.append(f"--shares {':'.join(map(str, parts))}")
        best = with_fitting
    elif run.shares:
        flags.append(f"--shares {run.shares}")
    if best.ddp_fp16.seconds * GAIN < best.ddp.seconds:
        return [*flags, "--gradient-compression fp16"], best.ddp_fp16
    return flags, best.ddp
