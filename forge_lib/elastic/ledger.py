"""Which samples of a run are trained: each one exactly once, whatever peers join, leave or fail.

A sample is a number from 0: its place in the endless sequence of blocks that BatchPlan describes, in which each epoch
is a new permutation. In a round, peer i of n computes steps 0, 1, … of its own; step j takes the open samples

    (j n + i) b, …, (j n + i) b + b - 1        b: batch size

of those that were not committed when the round began. A commit records what each peer has really computed. What a slow
or a lost peer left out stays open, and is given out first in the next round.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Ledger:
    """The samples that are committed: part of the state that all peers share.

    Attributes:
        total: samples of the run.
        first_open: all samples before it are committed.
        committed: ranges [start, stop) of committed samples behind it, in order, which do not touch each other.
    """

    total: int
    first_open: int = 0
    committed: list[list[int]] = field(default_factory=list)

    @property
    def num_committed(self) -> int:
        """How many samples are committed."""
        return self.first_open + sum(stop - start for start, stop in self.committed)

    @property
    def is_complete(self) -> bool:
        """Whether all samples of the run are committed."""
        return self.first_open >= self.total

    def open_samples(self, count: int) -> np.ndarray:
        """Returns the first `count` open samples, int64, or fewer at the end of the run."""
        found, start = [], self.first_open
        for stop, next_start in [*self.committed, [self.total, self.total]]:
            found.append(np.arange(start, min(stop, start + count)))
            count -= len(found[-1])
            start = next_start
            if count <= 0:
                break
        return np.concatenate(found)

    def samples_of(self, index: int, num_peers: int, num_steps: int, batch_size: int) -> list[np.ndarray]:
        """Returns the samples of each step of a peer in a round that begins now; the last steps may have none.

        Args:
            index: of the peer among the peers of the round.
            num_peers: peers of the round.
            num_steps: steps that the peer computes.
            batch_size: samples of a step.
        """
        samples = self.open_samples(num_steps * num_peers * batch_size)
        starts = [(step * num_peers + index) * batch_size for step in range(num_steps)]
        return [samples[start : start + batch_size] for start in starts]

    def divide(self, batch_size: int, speeds: list[float]) -> list[np.ndarray]:
        """Returns each peer's part of the next batch, in proportion to the speeds; a part may be empty.

        With `--sync-every 1` all peers compute one batch together, the same one for any number of peers.
        """
        samples = self.open_samples(batch_size)
        edges = np.round(np.cumsum([0.0, *speeds]) / sum(speeds) * len(samples)).astype(int)
        return [samples[start:stop] for start, stop in itertools.pairwise(edges)]

    def commit(self, ranges: Sequence[Sequence[int]]) -> None:
        """Records the samples of ranges [start, stop) as committed.

        Raises:
            ValueError: one of them was before, or a range is empty; nothing is recorded.
        """
        merged = self._merged(ranges)
        self.first_open, self.committed = merged[0][1], merged[1:]

    def check(self, ranges: Sequence[Sequence[int]]) -> None:
        """Raises ValueError if `commit` would."""
        self._merged(ranges)

    def _merged(self, ranges: Sequence[Sequence[int]]) -> list[list[int]]:
        merged = [[0, self.first_open]]
        for start, stop in sorted([*self.committed, *ranges]):
            if not merged[-1][1] <= start < stop:
                raise ValueError(f"samples {start} to {stop} are committed twice, or are no range")
            if start == merged[-1][1]:
                merged[-1][1] = stop
            else:
                merged.append([start, stop])
        return merged

    def to_json(self) -> dict:
        """Returns the ledger as JSON types."""
        return {"total": self.total, "first_open": self.first_open, "committed": self.committed}
