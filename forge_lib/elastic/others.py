"""Who has come and gone, and whether the others train with the same flags and get the same bits."""

import logging
from collections.abc import Callable

from forge_lib.elastic.peer_facts import Member, PeerFacts
from forge_lib.errors import UserError
from forge_lib.peers_config import ElasticConfig

logger = logging.getLogger("forge")

MAX_DIFFERING = 3  # updates in a row that may give other bits than those of the others


class Others:
    """What this peer notices about the others.

    Args:
        config: every flag.
        report: called with (event, facts) for the log.

    Attributes:
        fixed: the values that must be equal on all peers.
    """

    def __init__(self, config: ElasticConfig, report: Callable[..., None]):
        self._config, self._report, self.fixed = config, report, {}
        self._present: dict[str, str] = {}  # name by identifier, at the last quorum
        self._differing = self._differed_at = 0  # updates with other bits in a row, and the round after the last one

    def note(self, members: list[Member], own: str) -> None:
        """Logs which peers have come and gone since the last quorum.

        Args:
            members: of the quorum.
            own: identifier of this peer.
        """
        now = {member.id: member.facts.name for member in members if member.facts.has_state}
        for identifier, name in now.items():
            if identifier not in self._present and identifier != own:
                logger.info(f"peer {name} has joined")
                self._report("peer_joined", peer=name)
        for identifier, name in self._present.items():
            if identifier not in now:
                logger.warning(f"peer {name} is gone")
                self._report("peer_lost", peer=name)
        self._present = now

    def check_config(self, theirs: PeerFacts) -> None:
        """Raises UserError if a peer that trains already has other flags, another model or other data."""
        differing = [name for name, value in self.fixed.items() if theirs.config.get(name) != value]
        if differing:
            lines = [f"{name}: {self.fixed[name]!r} here, {theirs.config.get(name)!r} there" for name in differing]
            raise UserError(f"this peer differs from {theirs.name}, which trains already: {'; '.join(lines)}")

    def check_bits(self, round: int, theirs: PeerFacts) -> None:
        """Raises UserError if, with --sync-every 1, this peer's updates give other bits again and again.

        Args:
            round: of this peer's state, before it has taken over theirs.
            theirs: of a peer with another state.
        """
        if self._config.sync_every != 1 or theirs.round != round:
            return
        self._differing = self._differing + 1 if round - self._differed_at <= 2 else 1
        self._differed_at = round
        if self._differing >= MAX_DIFFERING:
            raise UserError(
                f"this peer's updates give other bits than those of {theirs.name}: with --sync-every 1, all peers "
                "need the same kind of processor and the same versions; use a larger --sync-every, or train.py"
            )
