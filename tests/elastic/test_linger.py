"""How long a peer whose run is complete serves it to the others."""

import time
from types import SimpleNamespace

import pytest
from elastic_peers import peer_config

from forge_lib.elastic import peer as peer_module
from forge_lib.elastic.peer import Peer
from forge_lib.elastic.peer_facts import Member, PeerFacts


def member(name: str, round: int, is_complete: bool) -> Member:
    return Member(name, PeerFacts(name, "10.77.0.2", 1, 2, round=round, is_complete=is_complete))


@pytest.fixture
def lingering(monkeypatch):
    """Returns a function that lets a peer linger while the quorums are as given; returns how many it asked for."""
    monkeypatch.setattr(peer_module, "RETRY_SECONDS", 0.0)

    def linger(quorums: list[list[Member]], served_seconds_ago: float, behind: dict | None = None) -> int:
        peer = Peer(peer_config(), lambda event, **facts: None, lambda: False)
        left = iter(quorums)
        peer.membership = SimpleNamespace(
            quorum=lambda facts, gives_up: next(left), lost_at=0.0, leave=lambda: None, expect=lambda seconds: None
        )
        peer.address = "10.77.0.1"
        peer.files = SimpleNamespace(serve_snapshot=lambda: None)
        peer.shared.served_at = time.monotonic() - served_seconds_ago
        peer._behind, peer._behind_at = behind or {}, time.monotonic() if behind else 0.0
        peer.linger()
        return len(quorums) - len(list(left))

    return linger


ALICE = member("alice", 9, is_complete=True)
LATE_BOB, COMPLETE_BOB = member("bob", 8, is_complete=False), member("bob", 9, is_complete=True)


def test_a_complete_peer_ends_at_once_if_nobody_is_behind(lingering):
    assert lingering([[ALICE, COMPLETE_BOB]] * 3, served_seconds_ago=0.0) == 1


def test_a_complete_peer_ends_as_soon_as_the_late_one_is_complete(lingering):
    """While it downloads, the late peer is not in the quorum."""
    quorums = [[ALICE, LATE_BOB], [ALICE], [ALICE], [ALICE, COMPLETE_BOB], [ALICE]]
    assert lingering(quorums, served_seconds_ago=0.0) == 4


def test_a_complete_peer_does_not_wait_for_ever_for_a_late_one_that_is_gone(lingering, monkeypatch):
    monkeypatch.setattr(peer_module, "LINGER_SECONDS", 0.0)
    assert lingering([[ALICE, LATE_BOB], [ALICE], [ALICE]], served_seconds_ago=1000.0) <= 2


def test_a_complete_peer_waits_for_one_that_could_not_fetch_the_state_yet(lingering):
    """It pauses after a failed download: it is not in the quorum, and nothing was served to it."""
    quorums = [[ALICE], [ALICE], [ALICE, LATE_BOB], [ALICE, COMPLETE_BOB], [ALICE]]
    assert lingering(quorums, served_seconds_ago=1000.0, behind={"bob": 6}) == 4
