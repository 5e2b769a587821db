"""Machines wait for each other: several of them in this process, at addresses of the loopback network."""

import re
import socket
import threading
import time
from contextlib import ExitStack

import pytest
from commands import until
from exchanges import ADDRESSES, facts_of, make_arrival

from forge_lib.check import arrival, exchange
from forge_lib.check.arrival import Arrival, Outcome


@pytest.fixture
def machines(free_port, monkeypatch):
    """Starts the exchange of machines; returns their Arrivals, by name."""
    for module, name, seconds in (
        (exchange, "ASK_SECONDS", 0.1),
        (exchange, "SETTLE_SECONDS", 0.3),
        (exchange, "FRESH_SECONDS", 2.0),
        (arrival, "FRESH_SECONDS", 2.0),
        (arrival, "STEADY_SECONDS", 0.1),
        (arrival, "FATAL_SECONDS", 1.5),
    ):
        monkeypatch.setattr(module, name, seconds)
    # Linux has all of 127.0.0.0/8 on lo, but lists only one address of it.
    monkeypatch.setattr(exchange, "own_addresses", lambda: set(ADDRESSES.values()))
    with ExitStack() as running:

        def machines(*names: str, **changes) -> dict[str, Arrival]:
            made = {name: make_arrival(name, free_port, **changes) for name in names}
            for each in made.values():
                running.enter_context(each.exchange)
            return made

        yield machines


def wait_for_all(machines: dict[str, Arrival], seconds: float = 10) -> tuple[dict[str, Outcome], dict[str, list[str]]]:
    """Lets all machines wait at the same time; returns their outcomes and the lines that they printed."""
    outcomes, lines = {}, {name: [] for name in machines}

    def wait(name: str) -> None:
        outcomes[name] = machines[name].wait(seconds, lines[name].append)

    threads = [threading.Thread(target=wait, args=(name,)) for name in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes, lines


def problems_of(machine: Arrival) -> str:
    return str(machine.find_problems(machine.exchange.records()))


def test_all_machines_continue_together_with_the_facts_of_all(machines):
    outcomes, lines = wait_for_all(machines(*ADDRESSES))
    for name, outcome in outcomes.items():
        assert outcome.complete and not outcome.problems
        assert outcome.facts == {each: facts_of(each) for each in ADDRESSES}
        assert lines[name][-1] == "3 of 3 machines are up: alice, bob, carol"
        assert max(map(abs, outcome.clocks.values())) < 0.1


def test_all_machines_name_a_missing_one_until_it_is_up(machines):
    found = machines("alice", "bob")
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(wait_for_all(found)))
    thread.start()
    expected = re.compile(
        r"carol \(127.0.1.3\) is missing; alice reports: connection refused at port \d+: .*; "
        r"bob reports: connection refused at port"
    )
    until(lambda: all(expected.search(problems_of(each)) for each in found.values()), 5, "both name it")
    late = machines("carol")
    assert wait_for_all(late)[0]["carol"].complete
    thread.join()
    assert all(outcome.complete for outcome in outcomes[0][0].values())


def test_the_wait_ends_at_the_timeout(machines):
    begun = time.monotonic()
    outcomes, lines = wait_for_all(machines("bob", "carol"), seconds=1)
    assert time.monotonic() - begun < 4
    assert [outcome.complete for outcome in outcomes.values()] == [False, False]
    assert any("alice (127.0.1.1) is missing" in line for line in lines["carol"])


def test_all_machines_report_two_that_were_started_under_one_name(machines):
    """The second one has no address to listen on, but its own messages reach the others."""
    found = machines("alice", "bob", "carol")
    second = machines("bob")["bob"]
    outcomes, _ = wait_for_all({**found, "second": second})
    for outcome in outcomes.values():
        assert not outcome.complete
        assert any("2 machines were started as bob" in problem.text for problem in outcome.problems)


def test_a_machine_that_was_restarted_counts_once(machines):
    found = machines("alice", "carol")
    with make_arrival("bob", found["alice"].exchange.port).exchange:
        until(lambda: "bob" in found["alice"].exchange.records(), 5, "bob is up")
    restarted = machines("bob")
    outcomes, _ = wait_for_all({**found, **restarted})
    assert all(outcome.complete for outcome in outcomes.values())


def test_all_machines_report_another_cluster_file_and_another_version(machines):
    found = machines("alice") | machines("carol", versions=facts_of("carol").versions | {"accelerate": "1.3.0"})
    found |= machines("bob", cluster="another")
    outcomes, _ = wait_for_all(found)
    for name, outcome in outcomes.items():
        texts = [problem.text for problem in outcome.problems]
        assert any(text.startswith("carol has accelerate 1.3.0, alice has ") for text in texts), name
        assert any("has another cluster.yaml than" in text for text in texts), name


def test_a_wrong_clock_is_reported_and_does_not_end_the_check():
    """The main machine measured it three times; the median counts."""
    two = {name: ADDRESSES[name] for name in ("alice", "bob")}
    alice, bob = (make_arrival(name, addresses=two) for name in two)
    for machine in (alice, bob):
        machine.exchange._links = dict.fromkeys(machine.exchange.others, "")
    alice.exchange._clocks["bob"].extend([300.2, 300.0, 250.0])
    alice.exchange.receive(bob.exchange.message())
    bob.exchange.receive(alice.exchange.message())
    for machine in (alice, bob):  # the main machine decides first
        records = machine.exchange.records()
        (problem,) = machine.find_problems(records)
        assert problem.text == "the clock of bob is 300 s ahead of that of alice"
        assert machine._decide(records, [problem])
        bob.exchange.receive(alice.exchange.message())


def test_all_machines_report_a_port_in_use(machines, free_port):
    with socket.create_server(("127.0.1.2", free_port)):
        found = machines("alice", "bob", "carol")
        text = f"bob: port {free_port} is in use"
        until(lambda: all(text in problems_of(each) for each in found.values()), 10, "all name the port")


def test_a_mistake_on_one_machine_ends_the_check_on_all(machines):
    found = machines("alice", "bob", "carol")
    until(lambda: len(found["bob"].exchange.records()) == 3, 5, "all are up")
    found["bob"].exchange.update(facts=None, status="reading its data")
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
