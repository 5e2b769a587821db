"""What the peers tell each other when they ask the lighthouse for a quorum."""

from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class PeerFacts:
    """What a peer tells all others when it asks for a quorum.

    Attributes:
        name: of the peer, for people.
        address: its IP address, as the others reach it.
        store_port, http_port: where it accepts the process group's rendezvous, and where it serves its state.
        round: rounds that its state contains; -1: it has no state yet.
        state_hash: of that state.
        index, group_size: its place among the peers that began this round together, and their number; -1 and 0: it
            came later, and has computed nothing.
        plan: identifies the quorum that planned its work of this round; empty: it has none.
        steps, tokens: steps and predicted tokens that it has computed in this round.
        loss: sum over its targets in this round, in nats.
        step_seconds, exchange_seconds: of a step and of the last exchange; 0: not known.
        update_seconds: that the slowest peer which catches up needs to download one update; 0: not known.
        compute_seconds, busy_seconds: of this round: in steps, and from its begin to this request.
        committed: samples that its state contains.
        failures: exchanges of this round that have failed.
        unreachable: identifiers of members to which it could not connect after exchanges had failed.
        has_exchanged: whether it has exchanged with another peer since its start.
        is_leaving: whether it was asked to stop: it computes nothing in the next round.
        is_complete: whether its run is complete.
        wanted: how many peers it wants to be there before a round begins that nobody has begun yet.
        sums: of its part of an evaluation; empty: none.
        config: the flags that must be equal, and the fingerprints of model and data.
    """

    name: str
    address: str
    store_port: int
    http_port: int
    round: int = -1
    state_hash: str = ""
    index: int = -1
    group_size: int = 0
    plan: str = ""
    steps: int = 0
    tokens: int = 0
    loss: float = 0.0
    step_seconds: float = 0.0
    exchange_seconds: float = 0.0
    update_seconds: float = 0.0
    compute_seconds: float = 0.0
    busy_seconds: float = 0.0
    committed: int = 0
    failures: int = 0
    unreachable: list = field(default_factory=list)
    has_exchanged: bool = False
    is_leaving: bool = False
    is_complete: bool = False
    wanted: int = 1
    sums: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: dict) -> "PeerFacts | None":
        """Returns the facts that another peer has sent; None if they are not of this version of the program."""
        kinds = {each.name: each.type for each in fields(cls)}
        number = {int: (int,), float: (int, float)}
        same = set(content) == set(kinds) and all(
            isinstance(value, number.get(kinds[name], kinds[name])) for name, value in content.items()
        )
        return cls(**content) if same else None

    @property
    def has_state(self) -> bool:
        """Whether it has the state of a round."""
        return self.round >= 0


@dataclass(frozen=True)
class Member:
    """A peer in a quorum: its identifier, which is new each time it starts, and what it tells about itself."""

    id: str
    facts: PeerFacts
