"""The timeout of the process group, derived from the run: its pauses, its largest transfer and a floor."""

from datetime import timedelta

import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from forge_lib.distributed.speed import all_reduce_bandwidth

GROUP_START_SECONDS = 600  # timeout of the process group until the first step is done
NCCL_MARGIN_SECONDS = 15
DDP_BUCKET_BYTES = 250 << 20  # DDP's first broadcast sends at most this many bytes at once


class GroupTimeout:
    """The seconds after which a collective of the process group fails. Create and use it on all processes.

    It is the largest of: twice the longest pause so far in which processes waited for another one (a save, an
    evaluation); four times the duration of the largest transfer; and a floor. gloo applies it to each operation.

    Args:
        accelerator: holds the process group.
        model: unwrapped.
        floor_seconds: the floor after the first step; before, it is ten minutes, because compiling is slow.

    Attributes:
        seconds: the current timeout; 0 for a single process.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, floor_seconds: float):
        # NCCL ends the process at its timeout and names no peer. The margin lets the heartbeat name the peer first.
        self.floor_seconds = floor_seconds + (NCCL_MARGIN_SECONDS if accelerator.device.type == "cuda" else 0)
        self.pause_seconds, self.seconds, self._minimum_seconds = 0.0, 0.0, GROUP_START_SECONDS
        self.num_bytes = min(sum(p.nbytes for p in model.parameters()), DDP_BUCKET_BYTES)
        num_processes = accelerator.num_processes
        self.bandwidth = all_reduce_bandwidth(num_processes, accelerator.device) if num_processes > 1 else 0.0
        self._apply()

    def first_step_done(self) -> None:
        """Replaces the ten minutes of the start by the floor. Call after the first step."""
        self._minimum_seconds = self.floor_seconds
        self._apply()

    def paused(self, seconds: float) -> None:
        """Records how long a pause took."""
        if seconds > self.pause_seconds:
            self.pause_seconds = seconds
            self._apply()

    def describe(self) -> dict[str, float]:
        """Returns the timeout and what it is computed from, for run.json."""
        return {
            "seconds": self.seconds,
            "floor_seconds": self.floor_seconds,
            "largest_transfer_bytes": self.num_bytes,
            "bytes_per_second": self.bandwidth,
            "longest_pause_seconds": self.pause_seconds,
        }

    def _apply(self) -> None:
        if self.bandwidth:
            self.seconds = max(self._minimum_seconds, 4 * self.num_bytes / self.bandwidth, 2 * self.pause_seconds)
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.seconds), dist.group.WORLD)
