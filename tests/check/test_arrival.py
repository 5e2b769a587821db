"""The machines of a cluster meet: several of them in this process, at addresses of the loopback network."""

import json
import re
import socket
import threading
import time
from contextlib import ExitStack, suppress

import pytest
from commands import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge_lib.check import arrival, links
from forge_lib.check.arrival import Arrival

ADDRESSES = {"alice": "127.0.1.1", "bob": "127.0.1.2", "carol": "127.0.1.3"}


@pytest.fixture
def machines(free_port, monkeypatch):
    """Starts the parts of machines; returns those that are running, by name."""
    monkeypatch.setattr(arrival, "ASK_SECONDS", 0.1)
    monkeypatch.setattr(arrival, "STEADY_SECONDS", 0.1)
    monkeypatch.setattr(arrival, "FATAL_SECONDS", 1.5)
    monkeypatch.setattr(arrival, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(arrival, "FRESH_SECONDS", 2.0)
    with pytest.MonkeyPatch.context() as patch:  # Linux has all of 127.0.0.0/8 on lo, but lists one address
        nics = {"lo": [type("Address", (), {"address": address}) for address in ADDRESSES.values()]}
        patch.setattr(arrival.psutil, "net_if_addrs", lambda: nics)
        with ExitStack() as running:

            def machines(*names: str, facts: dict | None = None, **options) -> dict[str, Arrival]:
                made = {}
                for name in names:
                    options.setdefault("cluster", "the same")
                    made[name] = running.enter_context(Arrival(name, ADDRESSES, free_port, **options))
                    made[name].tell(facts=(facts or {}).get(name, {"is": name}))
                return made

            yield machines


def wait_for_all(found: dict[str, Arrival], seconds: float = 10) -> tuple[dict, dict]:
    """What each of them ends with, and what it has said."""
    outcomes, said = {}, {name: [] for name in found}

    def wait(name: str) -> None:
        outcomes[name] = found[name].wait(seconds, said[name].append)

    threads = [threading.Thread(target=wait, args=(name,)) for name in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes, said


def test_all_go_on_together_with_the_facts_of_all(machines):
    outcomes, said = wait_for_all(machines(*ADDRESSES))
    for name, outcome in outcomes.items():
        assert outcome.complete and not outcome.problems
        assert outcome.facts == {name: {"is": name} for name in ADDRESSES}
        assert said[name][-1] == "3 of 3 machines are here: alice, bob, carol"
        assert max(map(abs, outcome.clocks.values())) < 0.1


def test_who_is_missing_is_named_by_all_until_it_comes(machines):
    found = machines("alice", "bob")
    threads = [threading.Thread(target=lambda: outcomes.append(wait_for_all(found)))]
    outcomes = []
    threads[0].start()
    expected = re.compile(r"carol \(127.0.1.3\) is missing: alice finds its port \d+ refused: .*; bob finds its port")
    until(lambda: all(expected.search(str(each.problems())) for each in found.values()), 5, "both name it")
    late = machines("carol")
    assert wait_for_all(late)[0]["carol"].complete
    threads[0].join()
    assert all(outcome.complete for outcome in outcomes[0][0].values())


def test_it_ends_by_itself(machines):
    begun = time.monotonic()
    outcomes, said = wait_for_all(machines("bob", "carol"), seconds=1)
    assert time.monotonic() - begun < 4
    assert [outcome.complete for outcome in outcomes.values()] == [False, False]
    assert any("alice (127.0.1.1) is missing" in line for line in said["carol"])


def test_two_of_one_name_are_told_to_all(machines, free_port):
    """The second one has no address to listen on, but asks: so all hear of it."""
    found = machines("alice", "bob", "carol")
    second = machines("bob")["bob"]
    outcomes, _ = wait_for_all({**found, "second": second})
    for outcome in outcomes.values():
        assert not outcome.complete
        assert any("2 machines were started as bob" in problem.text for problem in outcome.problems)


def test_a_machine_that_was_started_again_is_one(machines):
    found = machines("alice", "carol")
    with Arrival("bob", ADDRESSES, found["alice"].port, "the same"):
        until(lambda: "bob" in found["alice"]._fresh(), 5, "it has come")
    again = machines("bob")
    outcomes, _ = wait_for_all({**found, **again})
    assert all(outcome.complete for outcome in outcomes.values())


def test_another_cluster_file_and_facts_that_must_not_differ_are_named(machines):
    def compare(facts: dict[str, dict]) -> list[tuple[str, str]]:
        return [(name, f"{name} has another version") for name, theirs in facts.items() if theirs["version"] != 1]

    facts = {name: {"version": 2 if name == "carol" else 1} for name in ADDRESSES}
    found = machines("alice", "carol", facts=facts, compare=compare)
    found |= machines("bob", facts=facts, compare=compare, cluster="another")
    outcomes, _ = wait_for_all(found)
    for name, outcome in outcomes.items():
        texts = [problem.text for problem in outcome.problems]
        assert "carol has another version" in texts
        assert any("has another cluster.yaml than" in text for text in texts), name


def test_a_clock_that_is_off_is_named_and_keeps_nobody():
    """As the main machine sees it, in the middle of what it has seen."""
    alice, bob = (
        Arrival(name, {"alice": "127.0.1.1", "bob": "127.0.1.2"}, 1, "the same") for name in ("alice", "bob")
    )
    for each in (alice, bob):
        each.tell(facts={"is": each.name})
        each._ways = dict.fromkeys(each.others, "")
    alice._clocks["bob"].extend([300.2, 300.0, 250.0])
    alice._merge(json.loads(bob._message()))
    bob._merge(json.loads(alice._message()))
    for each in (alice, bob):
        (problem,) = each.problems()
        assert problem.text == "the clock of bob is 300 s ahead of that of alice"
        assert each._goes([problem])  # the main machine first
        bob._merge(json.loads(alice._message()))


def test_an_address_of_another_machine_and_a_taken_port_are_named(machines, free_port):
    with socket.create_server(("127.0.1.2", free_port)):
        found = machines("alice", "bob", "carol")
        text = f"bob: port {free_port} is taken by another program"
        until(lambda: all(text in str(each.problems()) for each in found.values()), 10, "all name the port")
    lost = Arrival("alice", {**ADDRESSES, "alice": "192.0.2.7"}, free_port, "the same")
    assert "192.0.2.7 is none of its addresses (none)" in lost._find_own()[2]


def test_a_machine_that_ends_tells_why_and_the_others_end_with_it(machines):
    found = machines("alice", "bob", "carol")
    until(lambda: len(found["bob"]._fresh()) == 3, 5, "they meet")
    found["bob"]._me["facts"] = {}  # it is still looking at its data, which turns out to be none
    found["bob"].tell("looking at its data")
    outcomes = []
    others = {name: found[name] for name in ("alice", "carol")}
    thread = threading.Thread(target=lambda: outcomes.append(wait_for_all(others)[0]))
    thread.start()
    found["bob"].leave("--dataset-path corpus: the folder holds no file of a known kind")
    thread.join()
    for outcome in outcomes[0].values():
        assert not outcome.complete
        expected = "bob: --dataset-path corpus: the folder holds no file of a known kind"
        assert expected in [problem.text for problem in outcome.problems]


def record(**changes) -> dict:
    """What bob might say."""
    bob = Arrival("bob", ADDRESSES, 1, "the same")
    bob.tell(facts={"versions": {"torch": "2"}})
    return json.loads(bob._message())["records"][0] | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"facts": {"host": "\x1b]0;owned\x07"}},
        {"facts": {"versions": {"torch\x1b[31m": 1}}},
        {"doing": "\x1b[2J"},
        {"clocks": {"alice": 10**400}},
        {"clocks": {"alice": "late"}},
        {"facts": {"x": "y" * 20_000}},
        {"name": "mallory"},
        {"name": 7},
        {"ways": {"alice": ["x"]}},
    ],
)
def test_a_record_that_is_too_large_or_cannot_be_printed_is_left_out(changes):
    alice = Arrival("alice", ADDRESSES, 1, "the same")
    alice._merge({"records": [record(**changes)]})
    assert list(alice._fresh()) == ["alice"]
    alice._merge({"records": [record()] * 1000})
    assert list(alice._fresh()) == ["alice", "bob"]


def test_facts_of_another_form_end_the_check_with_a_sentence():
    alice = Arrival("alice", ADDRESSES, 1, "the same", lambda facts: [facts["bob"]["no such fact"]])
    alice._merge({"records": [record()]})
    assert any("tells facts of another form" in problem.text for problem in alice.problems())


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=200),
        st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)).map(
            lambda value: json.dumps({"check_cluster": 1, "records": [value], "time": 0}).encode()
        ),
        st.fixed_dictionaries({"id": st.text(), "name": st.sampled_from(["bob", "x"]), "beat": st.integers()}).map(
            lambda value: json.dumps({"check_cluster": 1, "records": [value], "time": 0}).encode()
        ),
    )
)
def test_what_a_stranger_sends_changes_nothing(data):
    """It is left out where it has not the form of a record; nothing raises but what the listener expects."""
    machine = Arrival("alice", ADDRESSES, 1, "the same")
    with suppress(ValueError, KeyError, TypeError):
        machine._merge(arrival._parse(data))
    assert list(machine._fresh()) == ["alice"]


@pytest.mark.parametrize("count", range(2, 9))
def test_each_pair_of_machines_meets_once_and_none_twice_at_a_time(count):
    rounds = links.rounds(count)
    pairs = [frozenset(pair) for each in rounds for pair in each]
    assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
    for each in rounds:
        busy = [machine for pair in each for machine in pair]
        assert len(busy) == len(set(busy))


def test_a_link_is_measured_from_both_ends_and_one_that_is_closed_is_named(monkeypatch):
    monkeypatch.setattr(links, "WARM_SECONDS", 0.05)
    monkeypatch.setattr(links, "STREAM_SECONDS", 0.2)
    monkeypatch.setattr(links, "CONNECT_SECONDS", 0.3)
    with links.listen("127.0.0.1") as listener:
        port, rates = listener.getsockname()[1], []
        thread = threading.Thread(target=lambda: rates.append(links.receive(listener)))
        thread.start()
        assert 0 < links.send("127.0.0.1", port) < 0.1
        thread.join()
        assert rates[0] > 1e7, "loopback carries more than 10 MB/s"
        with pytest.raises(links.LinkError, match="nothing arrives"):
            links.receive(listener)
    with pytest.raises(links.LinkError, match="refused"):
        links.send("127.0.0.1", port)
