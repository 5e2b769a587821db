"""What each peer computes in a round: it follows from what all of them have said."""

import dataclasses

import pytest
from elastic_peers import peer_config

from forge_lib.elastic.ledger import Ledger
from forge_lib.elastic.peer_facts import Member, PeerFacts
from forge_lib.elastic.planning import plan_work, remembered, slowest_update


def member(name: str, **facts) -> Member:
    return Member(name, PeerFacts(name, "10.77.0.1", 1, 2, **{"step_seconds": 0.1, **facts}))


@pytest.mark.parametrize("sync_every", ["1", "4"])
def test_a_peer_that_is_asked_to_stop_gets_no_samples_and_its_tokens_are_not_planned(sync_every):
    members = [member("a"), member("b", is_leaving=True), member("c")]
    config = peer_config("--sync-every", sync_every)
    works = {m.id: plan_work(config, Ledger(1000), 5, members, m.id, 0.0) for m in members}
    assert not works["b"].todo and works["b"].plan == works["a"].plan == works["c"].plan
    assert (works["a"].index, works["c"].index, works["a"].group_size) == (0, 1, 2)
    assert list(works["a"].planned_tokens) == ["a", "c"]
    given_out = [sample for name in "ac" for step in works[name].todo for sample in step.tolist()]
    assert sorted(given_out) == list(range(8 if sync_every == "1" else 2 * 4 * 8)), "nothing is left out"


def test_what_a_slow_joiner_has_measured_is_repeated_by_all_and_forgotten_slowly():
    seconds = slowest_update([member("a"), member("b", update_seconds=10.0)])
    assert 8 < seconds < 10
    for _ in range(100):
        seconds = slowest_update([member("a", update_seconds=seconds), member("b")])
    assert seconds < 0.1


def test_rounds_soon_have_their_usual_length_again_when_the_slow_peer_is_up_to_date_or_gone():
    assert slowest_update([member("a", update_seconds=1e6)]) <= 150, "a round never lasts longer than 600 s for it"
    seconds = 150.0
    for _ in range(4):
        seconds = remembered(slowest_update([member("a", update_seconds=seconds)]), is_serving=True)
    assert seconds > 90, "it still downloads"
    for _ in range(4):
        seconds = remembered(slowest_update([member("a", update_seconds=seconds)]), is_serving=False)
    assert seconds < 10


def test_the_parts_of_an_evaluation_follow_the_speeds():
    from forge_lib.elastic.shared_evaluation import part_edges

    members = [member("a", step_seconds=0.3), member("b")]
    assert part_edges(100, plan_work(peer_config(), Ledger(1000), 1, members, "a", 0.0).speeds) == [0, 25, 100]
    unknown = [dataclasses.replace(m, facts=dataclasses.replace(m.facts, step_seconds=0.0)) for m in members]
    assert part_edges(5, plan_work(peer_config(), Ledger(1000), 1, unknown, "b", 0.0).speeds) == [0, 2, 5]
