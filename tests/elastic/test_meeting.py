"""What follows from what the peers say: whose state is the newest, and whose work of a round counts."""

import dataclasses
import math

import numpy as np
import torch
from elastic_peers import peer_config

from forge_lib.elastic.flat import FlatParameters
from forge_lib.elastic.ledger import Ledger
from forge_lib.elastic.meeting import MAX_FAILURES, Meeting, connected_members, contributors_of, ready_members
from forge_lib.elastic.outer import OuterOptimizer
from forge_lib.elastic.peer_facts import Member, PeerFacts
from forge_lib.elastic.shared_state import SharedState


def member(name: str, **facts) -> Member:
    return Member(name, PeerFacts(name, "10.77.0.1", 1, 2, **{"config": {"seed": 0}, "state_hash": "x", **facts}))


def names(members: list[Member]) -> list[str]:
    return [each.id for each in members]


def test_the_newest_state_wins_and_peers_with_another_one_are_not_ready():
    members = [member("a", round=3), member("b", round=5), member("c", round=5, state_hash="y"), member("d")]
    assert names(ready_members(members)) == ["b"]
    members[2] = member("c", round=5, state_hash="y", index=0, tokens=10)
    assert names(ready_members(members)) == ["c"], "a peer that trains, rather than one that has come"


def test_the_newest_state_is_that_with_the_most_committed_samples_not_with_the_most_short_rounds():
    alone = member("d", round=78, committed=154_000, index=0, tokens=10)
    assert names(ready_members([member("a", round=50, committed=160_000), alone])) == ["a"]


def test_a_peer_of_another_run_does_not_count_however_far_it_is():
    members = [member("a", round=3, index=0, tokens=5), member("b", round=99, config={"seed": 1})]
    assert names(ready_members(members)) == ["a"]
    assert names(ready_members(members[1:])) == ["b"]


def test_work_that_was_planned_twice_counts_once():
    """a and b had planned a round; c was there when they were cut off, and has planned the same samples alone."""
    two = [member(name, round=3, index=i, plan="a b", tokens=10) for i, name in enumerate("ab")]
    other = member("c", round=3, index=0, plan="c", tokens=15)
    joiner = member("d", round=3)
    assert names(contributors_of([*two, other, joiner])) == ["a", "b"]
    assert names(contributors_of([two[0], other, joiner])) == ["c"]


def test_facts_of_another_version_are_not_taken_for_those_of_a_peer():
    facts = dataclasses.asdict(member("a", round=1, loss=2).facts)
    assert PeerFacts.from_json(facts) == PeerFacts(**facts)
    for wrong in (facts | {"round": "1"}, facts | {"more": 1}, {"round": 1}, {}):
        assert PeerFacts.from_json(wrong) is None


def test_of_peers_that_do_not_reach_each_other_the_one_with_the_most_broken_links_is_left_out():
    """c reaches nobody, but only a and b have found out; then a joiner and a peer that trains miss each other."""
    three = [member(name, round=3, has_exchanged=True) for name in "abc"]
    assert connected_members(three) == three
    three[0] = member("a", round=3, has_exchanged=True, unreachable=["c"])
    three[1] = member("b", round=3, has_exchanged=True, unreachable=["c", "gone"])
    assert names(connected_members(three)) == ["a", "b"]
    two = [member("z"), member("a", round=3, has_exchanged=True, unreachable=["z"])]
    assert names(connected_members(two)) == ["a"], "the joiner waits"


def test_if_exchanges_fail_and_nobody_knows_why_the_peers_that_never_exchanged_are_left_out():
    """A firewall may let through the port that is tested, and not those of gloo."""

    def members(failures: int, *proven: str) -> list[Member]:
        return [member(name, failures=failures, has_exchanged=name in proven) for name in "abc"]

    assert names(connected_members(members(MAX_FAILURES - 1, "a", "b"))) == ["a", "b", "c"]
    assert names(connected_members(members(MAX_FAILURES, "a", "b"))) == ["a", "b"]
    tried = [names(connected_members(members(MAX_FAILURES + n))) for n in range(3)]
    assert sorted(tried) == [["a", "b"], ["a", "c"], ["b", "c"]], "all have begun together: one after the other"
    assert names(connected_members([member("c", failures=9)])) == ["c"]


def test_a_peer_with_the_newest_state_is_never_left_out_for_one_with_an_older_state():
    """A link was cut, and both ends know it; one end has committed rounds meanwhile. Only the other one waits."""

    def member_of(name: str, round: int, *unreachable: str, **facts) -> Member:
        return member(name, round=round, unreachable=list(unreachable), has_exchanged=True, **facts)

    assert names(connected_members([member_of("a", 3, "b"), member_of("b", 5, "a")])) == ["b"]
    assert names(connected_members([member_of("a", 5, "b"), member_of("b", 3, "a")])) == ["a"]
    newest = [member_of("c", 5, "a", "b"), member_of("d", 5, "a", "b")]
    older = [member_of("a", 3, "c", "d"), member_of("b", 3, "c", "d")]
    assert names(connected_members([*older, *newest])) == ["c", "d"]
    three = [member_of("a", 5), member_of("b", 5, "c"), member_of("c", 5, "b"), member_of("d", 5, "c")]
    late = [member_of("e", 3), member_of("f", 3, "a")]
    assert names(connected_members([*three, *late])) == ["a", "b", "d", "e"], "e lacks the state, but no link"
    another_run = member("z", round=99, config={"seed": 1}, unreachable=["a"])
    assert names(connected_members([member_of("a", 5, "z", index=0), another_run])) == ["a"]


def test_failures_that_nobody_can_explain_leave_out_only_peers_with_the_newest_state():
    newest = member("z", round=5, index=0)
    older = member("a", round=3, index=0, has_exchanged=True, failures=MAX_FAILURES)
    assert names(connected_members([older, newest])) == ["a", "z"], "z alone exchanges, and a catches up"
    two = [member("b", round=5, failures=MAX_FAILURES, has_exchanged=True), newest]
    assert names(connected_members([older, *two])) == ["a", "b"]


class OnePeer:
    """The group of a peer alone."""

    rank, size = 0, 1

    def connect(self, *_) -> None:
        """Has nobody to connect to."""

    def transfer(self, sent: dict, received: dict, tag: int, timeout_seconds: float) -> None:
        """Has nobody to send anything to."""
        assert not sent and not received

    def close(self) -> None:
        """Has no connections."""


def meeting_of(*flags) -> tuple[Meeting, SharedState]:
    torch.manual_seed(0)
    state = SharedState(OuterOptimizer(FlatParameters(torch.nn.Linear(64, 64))), Ledger(1000))
    return Meeting(peer_config(*flags), state, OnePeer(), "a"), state


def test_a_gradient_that_is_not_finite_does_not_change_the_sums_after_it():
    """Also what rounding has left out before is still added: on the sender's side and on that of the sum's owner."""
    ready = [member("a", tokens=10)]
    gradients = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(1))

    def sums(values: list[torch.Tensor]) -> list[torch.Tensor]:
        meeting, state = meeting_of("--sync-every", 1, "--outer-compression", "int4")
        weight, found = state.outer.flat.parameters[0], []
        for each in values:
            weight.grad = each.clone()
            found.append(meeting.sum_gradients(ready, np.arange(8))[1])
        return found

    expected = sums([*gradients])
    first, broken, *rest = sums([gradients[0], gradients[1] * math.nan, *gradients[1:]])
    assert torch.equal(first, expected[0]) and not torch.isfinite(broken).any()
    assert all(torch.equal(a, b) for a, b in zip(rest, expected[1:], strict=True))
    assert not torch.equal(expected[1], sums([gradients[1]])[0]), "the feedback counts"


def test_error_feedback_that_the_others_have_committed_is_not_sent_again():
    """The peer had dropped its change when it found that the others had received it in time."""
    meeting, state = meeting_of()
    with torch.no_grad():
        state.outer.flat.parameters[0].add_(torch.randn(64, 64))
    members = [member("a", round=0, index=0, group_size=1, plan="a", steps=1, tokens=8)]
    exchanged, data = meeting.exchange(members)
    assert state.outer.error.any()
    missed = dataclasses.replace(exchanged.commit, round=1, samples=[[100, 108]])
    meeting.drop()
    assert not meeting.apply_missed(dataclasses.replace(missed, contributors=["b"]), data)
    assert state.outer.error.any(), "it was not in the change of another peer"
    assert meeting.apply_missed(dataclasses.replace(missed, round=2, samples=[[200, 208]]), data)
    assert not state.outer.error.any()
