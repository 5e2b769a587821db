"""What a machine of a check accepts from the network, and how it finds its own address."""

import json
from contextlib import suppress

import pytest
from exchanges import ADDRESSES, make_arrival
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge_lib.check import exchange
from forge_lib.check.exchange import Exchange
from forge_lib.check.machine_facts import PROTOCOL


def message(*records, time: float = 0.0) -> bytes:
    """A message with these records, as it arrives from the network."""
    return json.dumps({"check_cluster": PROTOCOL, "records": records, "time": time}).encode()


def record_of_bob(facts: dict | None = None, **changes) -> dict:
    """A record that bob could send, with changes in it and in its facts."""
    record = json.loads(make_arrival("bob").exchange.message())["records"][0]
    return record | {"facts": record["facts"] | (facts or {})} | changes


@pytest.fixture
def alice() -> Exchange:
    return make_arrival("alice").exchange


@pytest.mark.parametrize(
    "changes",
    [
        {"facts": {"host": "\x1b]0;owned\x07"}},
        {"facts": {"versions": {"torch\x1b[31m": "1"}}},
        {"facts": {"flags": {"x": "y" * 20_000}}},
        {"status": "\x1b[2J"},
        {"clocks": {"alice": 10**400}},
        {"clocks": {"alice": "late"}},
        {"clocks": {"alice": float("nan")}},
        {"heartbeat": 10**400},
        {"heartbeat": True},
        {"name": "mallory"},
        {"name": 7},
        {"links": {"alice": ["x"]}},
        {"another": "field"},
    ],
)
def test_a_record_that_is_too_large_or_not_printable_or_has_another_form_is_ignored(alice, changes):
    alice.receive(message(record_of_bob(**changes)))
    assert list(alice.records()) == ["alice"]
    alice.receive(message(*[record_of_bob()] * 1000))
    assert list(alice.records()) == ["alice", "bob"]


@pytest.mark.parametrize(
    "facts",
    [{"cores": "two"}, {"memory_bytes": 10**400}, {"versions": {}}, {"flags": {"batch_size": [1]}}, {"new": 1}],
)
def test_facts_of_another_form_end_the_check_on_all_machines_with_one_sentence(facts):
    alice, carol = make_arrival("alice"), make_arrival("carol")
    alice.exchange.receive(message(record_of_bob(facts=facts)))
    carol.exchange.receive(alice.exchange.message())
    for machine in (alice, carol):
        problems = machine.find_problems(machine.exchange.records())
        expected = "bob: its facts have another form; install the same version of this program on all machines"
        assert [problem.text for problem in problems if problem.kind == "fatal"] == [expected]


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.0\r\n",
        b"[" * 100_000,
        json.dumps({"check_cluster": PROTOCOL - 1, "records": [], "time": 0}).encode(),
        json.dumps({"check_cluster": PROTOCOL, "records": {}, "time": 0}).encode(),
        json.dumps({"check_cluster": PROTOCOL, "records": []}).encode(),
        message(time=float("inf")),
    ],
)
def test_a_message_of_another_program_or_version_is_a_value_error(alice, line):
    with pytest.raises(ValueError):
        alice.receive(line)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=200),
        st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)).map(
            message
        ),
        st.fixed_dictionaries(
            {"id": st.text(), "name": st.sampled_from(["bob", "x"]), "heartbeat": st.integers()}
        ).map(message),
    )
)
def test_a_message_from_a_stranger_changes_nothing(data):
    machine = make_arrival("alice").exchange
    with suppress(ValueError):
        machine.receive(data)
    assert list(machine.records()) == ["alice"]


def test_an_address_that_belongs_to_another_machine_is_reported(monkeypatch):
    monkeypatch.setattr(exchange, "own_addresses", lambda: {"127.0.0.1", "10.77.0.1"})
    lost = Exchange("alice", {**ADDRESSES, "alice": "192.0.2.7"}, 1, "the same")
    assert "192.0.2.7 is not an address of this machine (10.77.0.1)" in lost._find_listen_address()[2]
