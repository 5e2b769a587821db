"""The all-reduce of a step: its loss, and how many processes are asked to stop."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def sum_dtype(device: torch.device) -> torch.dtype:
    """Returns the widest float type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


class StepTotals:
    """Sums a step's loss over all processes, and counts the processes that are asked to stop, in one all-reduce.

    The constructor starts the all-reduce; call it on all processes.

    Args:
        losses: the loss sum of each of this process's micro-batches, scalars, in nats.
        must_stop: whether this process is asked to stop.
        times: further numbers that are summed, as many on each process.
    """

    def __init__(self, losses: list[torch.Tensor], must_stop: bool, times: Sequence[float] = ()):
        self.losses, dtype = losses, sum_dtype(losses[0].device)
        loss = torch.stack(losses).sum().to(dtype)
        stopping = torch.full_like(loss, float(must_stop))  # without a copy from main memory
        self._totals = torch.stack([loss, stopping])
        if times:
            summed = torch.zeros(len(times), dtype=dtype, device=loss.device)
            for n, value in enumerate(times):
                if value:
                    summed[n] = value  # without a copy from main memory
            self._totals = torch.cat([self._totals, summed])
        self._work = dist.all_reduce(self._totals, async_op=True) if dist.is_initialized() else None

    def wait(self, other: torch.Tensor) -> tuple[float, float, float, list[float]]:
        """Returns the loss sum, the number of processes that are asked to stop, `other`, and the sums of the times.

        `other` is a scalar of this process: on a GPU, all of them are one transfer.
        """
        if self._work:
            self._work.wait()
        loss, stopping, *times, other = torch.cat([self._totals, other.detach().to(self._totals)[None]]).tolist()
        return loss, stopping, other, times
