"""What a peer computes in a round, and what it learns when it meets the others."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from forge_lib.elastic.meeting import Exchanged
from forge_lib.elastic.peer_facts import Member


@dataclass
class Work:
    """What this peer has computed in the current round, and what it still has to.

    Attributes:
        index, group_size: its place among the peers of the round, and their number; -1 and 0 before its first round.
        plan: identifies the quorum that planned it.
        todo: the samples of each step that it computes; none of them is empty.
        batch: with --sync-every 1, the samples of all peers in the step; else None.
        planned_seconds: that the steps of the round should take; 0: not known.
        num_planned: steps of all peers in this round.
        planned_tokens: (name, tokens) by identifier, of each peer of the round in their order; at most so much each
            computes.
        speeds: of each peer of the round in their order, in steps per second; equal ones if not known.
        begun_at: when the first step began, by time.monotonic; 0: not yet.
        steps, targets, loss, compute_seconds: computed: steps, predicted tokens, the sum of their loss in nats,
            seconds.
    """

    index: int = -1
    group_size: int = 0
    plan: str = ""
    todo: list[np.ndarray] = field(default_factory=list)
    batch: np.ndarray | None = None
    planned_seconds: float = 0.0
    num_planned: int = 0
    planned_tokens: dict[str, tuple[str, int]] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    begun_at: float = 0.0
    steps: int = 0
    targets: int = 0
    loss: float = 0.0
    compute_seconds: float = 0.0

    @property
    def busy_seconds(self) -> float:
        """Seconds since the first step began."""
        return time.monotonic() - self.begun_at if self.begun_at else 0.0

    def missing(self, contributors: list[str]) -> list[tuple[str, int]]:
        """Returns the name and planned tokens of each peer of the round whose work is not in the round's commit.

        Args:
            contributors: identifiers of those whose work is; without this peer, the commit is of another plan.
        """
        planned = list(self.planned_tokens.items())
        if not planned or planned[self.index][0] not in contributors:
            return []
        return [facts for identifier, facts in planned if identifier not in contributors and facts[1]]


@dataclass(frozen=True)
class Met:
    """What a peer learns when it meets the others.

    Attributes:
        work: of the next round, without steps if the run is complete; None if this peer is asked to stop.
        exchanges: that were committed meanwhile, with what the members had said.
        lost_targets: predicted tokens that this peer had computed, and which were dropped.
        changed: whether the weights have changed.
    """

    work: Work | None
    exchanges: list[tuple[Exchanged, list[Member]]]
    lost_targets: int
    changed: bool


@dataclass(frozen=True)
class Summed:
    """The sum of the gradients of a step.

    Attributes:
        exchanged: what the log says about it.
        gradient: [total] fp32, the sum.
        group: the peers of the step, with what they said.
        is_alone: whether no other peer is there that waits to join.
    """

    exchanged: Exchanged
    gradient: torch.Tensor
    group: list[Member]
    is_alone: bool
