"""The end of a round: which peers meet, whose changes are averaged, and whether all of them have the same result."""

import math
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from forge_lib.elastic import averaging
from forge_lib.elastic.outer import SPARSE_ERROR_DECAY, default_rates
from forge_lib.elastic.peer_facts import Member
from forge_lib.elastic.peer_group import PeerGroup
from forge_lib.elastic.shared_state import Commit, SharedState
from forge_lib.peers_config import ElasticConfig

FIRST_TIMEOUT_SECONDS = 120.0  # of a phase, before any exchange was measured
FIRST_BYTES_PER_SECOND = 250_000  # 2 Mbit/s: before any exchange was measured, no link is slower than that
MAX_DOUBLINGS = 6  # of the time limit, after failed exchanges
TIMEOUT_FLOOR_SECONDS = 5.0
TIMEOUT_FACTOR = 4  # times the slowest of the last exchanges
CONNECT_SECONDS = 10.0
MAX_FAILURES = 4  # of the exchange of a round; then peers are left out although nobody knows which link is broken


def ready_members(members: list[Member]) -> list[Member]:
    """Returns the members with the newest state, among those with the configuration of the peers that train.

    The newest state is the one with the most committed samples, not the one with the most rounds: a peer that was left
    alone makes many short rounds.
    """
    if not members:
        return []

    def age(member: Member) -> tuple:
        return member.facts.committed, member.facts.round, member.facts.index >= 0, member.facts.tokens

    trains = [member for member in members if member.facts.index >= 0]
    config = max(trains or members, key=age).facts.config
    alike = [member for member in members if member.facts.config == config]
    newest = max(alike, key=age).facts
    return [m for m in alike if (m.facts.round, m.facts.state_hash) == (newest.round, newest.state_hash)]


def connected_members(members: list[Member]) -> list[Member]:
    """Returns the members that can exchange with each other, as far as they know.

    Of members that do not reach each other, one that lacks the newest state is left out first: were it one that has
    this state, the rounds since then would be lost. Among equals, the one with the most broken links is left out; if
    there are several, one that has not exchanged yet. After some failures without a broken link that anyone has found
    (a firewall may let through only the port that is tested), those that have not exchanged yet are left out; if that
    is all or none of them, one after the other.
    """
    left, ready = list(members), {member.id for member in ready_members(members)}
    while True:
        ids = {member.id for member in left}
        broken = [(member.id, other) for member in left for other in member.facts.unreachable if other in ids]
        if not broken:
            break
        degree = Counter(each for link in broken for each in link)
        linked = [member for member in left if degree[member.id]]
        left.remove(max(linked, key=lambda m: (m.id not in ready, degree[m.id], not m.facts.has_exchanged, m.id)))
    trying = [member for member in left if member.id in ready]  # the others do not exchange
    failures = max((member.facts.failures for member in trying), default=0)
    if failures < MAX_FAILURES or len(trying) == 1:
        return left
    unproven = [member for member in trying if not member.facts.has_exchanged]
    if not 0 < len(unproven) < len(trying):
        unproven = [trying[failures % len(trying)]]
    return [member for member in left if member not in unproven]


def contributors_of(ready: list[Member]) -> list[Member]:
    """Returns the members whose work of the round counts: all of it was planned together, so no sample is in it twice.

    If several quorums have planned the same round (a peer was cut off and is back), the plan with the most work
    counts.
    """
    work: dict[str, int] = {}
    for member in ready:
        work[member.facts.plan] = work.get(member.facts.plan, 0) + member.facts.tokens
    plan = max(sorted(work), key=work.__getitem__)
    return [member for member in ready if member.facts.plan == plan and member.facts.tokens]


def to_ranges(samples: np.ndarray) -> list[list[int]]:
    """Returns sorted samples as ranges [start, stop)."""
    edges = np.flatnonzero(np.diff(samples) != 1) + 1
    return [[int(part[0]), int(part[-1]) + 1] for part in np.split(samples, edges) if len(part)]


@dataclass(frozen=True)
class Exchanged:
    """What the log says about an exchange: seconds that it took, and bytes that this peer sent."""

    commit: Commit
    seconds: float
    num_bytes: int


class Meeting:
    """Averages the changes of the peers at the end of a round, and applies the result to the shared state.

    Args:
        config: the flags.
        state: of this peer.
        group: connects it to the others.
        own: identifier of this peer.
    """

    def __init__(self, config: ElasticConfig, state: SharedState, group: PeerGroup, own: str):
        self._config, self._state, self._group, self._own = config, state, group, own
        self._owner_error: tuple[tuple[int, int], torch.Tensor] | None = None  # (shard, number of shards), numbers
        self._change: torch.Tensor | None = None  # of this round, kept if its exchange fails
        self._sent: tuple[int, list[torch.Tensor]] | None = None  # (number of shards, bytes)
        self._slowest = 0.0  # seconds of the exchanges so far, the older ones count less

    def describe(self, ready: list[Member]) -> Commit:
        """Returns the commit of a round: the same on all members, because it follows from what they said."""
        compression, batch_size = self._config.compression, self._config.batch_size
        contributors = contributors_of(ready)
        num_peers = max(member.facts.group_size for member in contributors)
        learning_rate, momentum = default_rates(num_peers, compression)
        if self._config.outer_learning_rate:
            learning_rate = self._config.outer_learning_rate
        if self._config.outer_momentum >= 0:
            momentum = self._config.outer_momentum
        samples = [
            each
            for facts in (member.facts for member in contributors)
            for each in self._state.ledger.samples_of(facts.index, facts.group_size, facts.steps, batch_size)
        ]
        return Commit(
            round=self._state.round,
            compression=compression,
            num_shards=len(ready),
            learning_rate=learning_rate,
            momentum=momentum,
            samples=to_ranges(np.sort(np.concatenate(samples))),
            num_targets=sum(member.facts.tokens for member in contributors),
            contributors=[member.id for member in contributors],
        )

    def exchange(self, ready: list[Member]) -> tuple[Exchanged, list[torch.Tensor]]:
        """Averages the changes of the members and applies the result. Call on all of them.

        Returns:
            What the log says about it, and the bytes of the averaged change, by shard.

        Raises:
            RuntimeError: a member is lost or too slow. Nothing has changed; the round can be exchanged again with
                other members.
        """
        start = time.monotonic()
        commit, outer = self.describe(ready), self._state.outer
        shards = self._state.shards(commit.compression, len(ready))
        if self._own in commit.contributors:
            self._change = outer.change() if self._change is None else self._change
            if self._sent is None or self._sent[0] != len(ready):
                self._sent = (len(ready), [shards.encode(self._change, index) for index in range(len(ready))])
        weights = [m.facts.tokens / commit.num_targets if m.id in commit.contributors else 0.0 for m in ready]
        result = self._average(ready, commit, self._sent[1] if self._sent else [], weights)
        self._group.close()
        self._apply(commit, result.data)
        return Exchanged(commit, self._seconds_since(start, ready), result.num_bytes), result.data

    def sum_gradients(self, ready: list[Member], samples: np.ndarray) -> tuple[Exchanged, torch.Tensor]:
        """Adds up the gradients of the members: `--sync-every 1`. Call on all of them.

        Args:
            ready: the members; each has computed the gradient of its part of a batch.
            samples: of the batch.

        Returns:
            What the log says about it, and the sum, [total] fp32.

        Raises:
            RuntimeError: a member is lost or too slow. Nothing has changed.
        """
        start = time.monotonic()
        outer, contributors = self._state.outer, [member.id for member in ready if member.facts.tokens]
        num_targets = sum(member.facts.tokens for member in ready)
        ranges = to_ranges(np.sort(samples))
        commit = Commit(
            self._state.round, self._config.compression, len(ready), 1.0, 0.0, ranges, num_targets, contributors
        )
        shards = self._state.shards(commit.compression, len(ready))
        gradient = torch.empty(outer.flat.total)
        outer.flat.read_gradients(gradient)
        gradient += outer.error
        if not torch.isfinite(gradient).all():
            gradient.fill_(math.nan)  # fp16 would send an infinite number as a large one
        sent = [shards.encode(gradient, index) for index in range(len(ready))]
        weights = [float(member.id in contributors) for member in ready]
        result = self._average(ready, commit, sent, weights)
        if not shards.codec.is_exact and self._own in contributors and torch.isfinite(gradient).all():
            outer.keep_error(gradient, sent, shards, self._decay(commit))
        total = torch.empty(outer.flat.total)
        for index, data in enumerate(result.data):
            shards.decode_into(total, data, index)
        return Exchanged(commit, self._seconds_since(start, ready), result.num_bytes), total

    def _average(
        self, ready: list[Member], commit: Commit, sent: list[torch.Tensor], weights: list[float]
    ) -> averaging.Result:
        """Connects the members and averages their vectors; RuntimeError if not all of them have the same result."""
        shards = self._state.shards(commit.compression, len(ready))
        timeout = self._timeout(ready, sum(map(shards.num_bytes, range(len(ready)))))
        attempt = repr([(member.id, member.facts.failures) for member in ready]).encode()
        name = f"{commit.round}/{xxhash.xxh3_64_hexdigest(attempt)}"  # of a group that was never there before
        self._group.connect(ready, self._own, name, CONNECT_SECONDS)
        place = (self._group.rank, len(ready))
        error = torch.zeros(sum(each.stop - each.start for each in shards.ranges(self._group.rank)))
        if self._owner_error and self._owner_error[0] == place and not shards.codec.is_exact:
            error = self._owner_error[1]
        result = averaging.average(self._group, shards, sent, weights, error, timeout)
        digest = xxhash.xxh3_128_digest(b"".join([each.numpy().tobytes() for each in result.data]))
        if not averaging.have_equal_hash(self._group, digest, timeout):
            raise RuntimeError("the peers have received different results")
        error = result.owner_error.mul_(self._decay(commit))
        if torch.isfinite(error).all():  # one sum that is not finite must not make all later ones so, too
            self._owner_error = (place, error)
        return result

    def is_finite(self) -> bool:
        """Returns whether this peer's change of the round can be sent: all its numbers are finite."""
        self._change = self._state.outer.change() if self._change is None else self._change
        return math.isfinite(torch.linalg.vector_norm(self._change, math.inf).item())

    def _seconds_since(self, start: float, ready: list[Member]) -> float:
        seconds = time.monotonic() - start
        if len(ready) > 1:  # nothing is sent by one peer alone
            self._slowest = max(seconds, 0.8 * self._slowest)
        return seconds

    @staticmethod
    def _decay(commit: Commit) -> float:
        return SPARSE_ERROR_DECAY if commit.compression == "sparse" else 1.0

    def apply_missed(self, commit: Commit, data: list[torch.Tensor]) -> bool:
        """Applies a round that others have committed; returns whether this peer's change is in it."""
        self._apply(commit, data)
        self._owner_error = None  # if this peer owned a shard of it, it is in the update already
        return self._own in commit.contributors

    def drop(self) -> None:
        """Forgets this round's change, and gives the model the shared weights again."""
        self._change = self._sent = None
        self._state.outer.restore()

    def close(self) -> None:
        """Closes the connections to the others."""
        self._group.close()

    def _apply(self, commit: Commit, data: list[torch.Tensor]) -> None:
        outer = self._state.outer
        if self._own in commit.contributors and self._change is not None and self._sent:
            shards = self._state.shards(commit.compression, self._sent[0])
            if not shards.codec.is_exact:
                outer.keep_error(self._change, self._sent[1], shards, self._decay(commit))
        elif self._own in commit.contributors:
            outer.error.zero_()  # it was sent, and what rounding then left out was dropped with the change
        self._change = self._sent = None
        self._state.apply(commit, data)

    def _timeout(self, ready: list[Member], num_bytes: int) -> float:
        """Returns the time limit of a phase: from the slowest of the last exchanges, and twice as long per failure."""
        if self._config.exchange_timeout_seconds:
            return self._config.exchange_timeout_seconds
        slowest = max([self._slowest, *(member.facts.exchange_seconds for member in ready)])
        seconds = max(TIMEOUT_FLOOR_SECONDS, TIMEOUT_FACTOR * slowest)
        if not slowest:
            seconds = max(FIRST_TIMEOUT_SECONDS, num_bytes / FIRST_BYTES_PER_SECOND)
        return seconds * 2 ** min(MAX_DOUBLINGS, max(member.facts.failures for member in ready))
