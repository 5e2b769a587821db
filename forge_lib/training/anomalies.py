"""Finds loss spikes, and processes that the others wait for."""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np


class SpikeDetector:
    """Finds losses far above the previous ones.

    A spike is more than `num_deviations` above the median of the last `window` losses, in units of their median
    absolute deviation (times 1.4826: the standard deviation of a normal distribution).
    """

    def __init__(self, window: int = 50, num_deviations: float = 8.0):
        self._losses, self._num_deviations = deque(maxlen=window), num_deviations

    def usual_loss(self, loss: float) -> float | None:
        """Records the loss of a step; returns the usual loss if this one is a spike, else None."""
        usual = None
        if len(self._losses) == self._losses.maxlen:
            median = float(np.median(self._losses))
            deviation = 1.4826 * float(np.median(np.abs(np.array(self._losses) - median)))
            if loss > median + self._num_deviations * max(deviation, 1e-3 * abs(median)):
                usual = median
        if math.isfinite(loss):
            self._losses.append(loss)
        return usual


@dataclass(frozen=True)
class Straggler:
    """A process that the others wait for, and how many times longer it takes than they do."""

    process: int
    ratio: float


def find_straggler(seconds: list[float]) -> Straggler | None:
    """Returns the slowest process if it takes more than twice as long as the others usually do.

    Args:
        seconds: by rank, the time that each process has computed.
    """
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = sorted(seconds[:slowest] + seconds[slowest + 1 :])
    usual = others[(len(others) - 1) // 2] if others else math.inf
    return Straggler(slowest, seconds[slowest] / usual) if seconds[slowest] > 2 * usual else None
