"""What follows from what the peers say: whose state is the newest, and whose work of a round counts."""

import dataclasses

from forge_lib.elastic.meeting import MAX_FAILURES, connected_members, contributors_of, ready_members
from forge_lib.elastic.peer_facts import Member, PeerFacts


def member(name: str, **facts) -> Member:
    return Member(name, PeerFacts(name, "10.77.0.1", 1, 2, **{"config": {"seed": 0}, "state_hash": "x", **facts}))


def names(members: list[Member]) -> list[str]:
    return [each.id for each in members]


def test_the_newest_state_wins_and_peers_with_another_one_are_not_ready():
    members = [member("a", round=3), member("b", round=5), member("c", round=5, state_hash="y"), member("d")]
    assert names(ready_members(members)) == ["b"]
    members[2] = member("c", round=5, state_hash="y", index=0, tokens=10)
    assert names(ready_members(members)) == ["c"], "a peer that trains, rather than one that has come"


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
