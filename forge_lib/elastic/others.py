"""Who has come and gone, and whether the others train with the same flags and get the same bits."""

import logging
from collections.abc import Callable

from forge_lib.elastic.connecting import find_unreachable
from forge_lib.elastic.peer_facts import Member, PeerFacts
from forge_lib.errors import UserError, first_line
from forge_lib.peers_config import ElasticConfig

logger = logging.getLogger("forge")

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 15.0, 300.0  # of a peer that the others have left out
MAX_DIFFERING = 3  # updates in a row that may give other bits than those of the others


class Others:
    """What this peer notices about the others.

    Args:
        config: every flag.
        report: called with (event, facts) for the log.

    Attributes:
        fixed: the values that must be equal on all peers.
        failures: exchanges of this round that have failed.
        unreachable: identifiers of members to which this peer could not connect after that.
    """

    def __init__(self, config: ElasticConfig, report: Callable[..., None]):
        self._config, self._report, self.fixed = config, report, {}
        self.failures, self.unreachable, self._num_left_out = 0, [], 0
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

    def exchange_failed(self, round: int, error: Exception, members: list[Member], own: str) -> None:
        """Logs that an exchange has failed, and finds out to which members this peer can connect.

        Args:
            round: that it ends, from 1.
            error: why it has failed.
            members: of the exchange.
            own: identifier of this peer.
        """
        self.failures += 1
        logger.warning(f"the exchange of round {round} has failed: {first_line(error)}; trying again")
        self._report("exchange_failed", round=round, error=first_line(error))
        self.probe(members, own)

    def exchanged(self) -> None:
        """Records that an exchange with others has succeeded."""
        self.failures = self._num_left_out = 0

    def left_out(self, round: int, members: list[Member], own: str) -> float:
        """Logs that the others go on without this peer, because exchanges with it have failed.

        Args:
            round: of this peer's state.
            members: of the quorum.
            own: identifier of this peer.

        Returns:
            The seconds until it should try again; each failed attempt costs the others some time.
        """
        self.failures = 0
        self._num_left_out += 1
        self.probe(members, own)
        names = ", ".join(member.facts.name for member in members if member.id != own)
        logger.warning(
            f"the exchange with {names} fails: they go on without this peer, which tries again; check the firewall "
            "and --peer-address on this machine"
        )
        self._report("left_out", round=round)
        return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (self._num_left_out - 1))

    def probe(self, members: list[Member], own: str) -> None:
        """Finds out to which of the members this peer cannot connect."""
        others = [member for member in members if member.id != own]
        self.unreachable = find_unreachable(others)
        names = [member.facts.name for member in others if member.id in self.unreachable]
        if names:
            logger.warning(
                f"cannot connect to {', '.join(names)}: the peers with the newest state and the most connections go on"
            )

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
