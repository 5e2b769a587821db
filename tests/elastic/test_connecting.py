"""Which lighthouse runs, and which peers can be reached."""

import socket
import sys

import pytest
from commands import find_free_port, until
from elastic_peers import peer_config

from forge_lib.elastic import membership
from forge_lib.elastic.connecting import find_unreachable, is_listening, own_address, should_serve
from forge_lib.elastic.membership import Membership, split_address
from forge_lib.elastic.peer import Peer
from forge_lib.elastic.peer_facts import Member, PeerFacts
from forge_lib.errors import UserError


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_lighthouse_is_not_started_while_another_one_of_the_list_runs(listener):
    own, other = "http://127.0.0.1:9", f"http://127.0.0.1:{listener}"
    assert should_serve([own]) == 9
    assert should_serve([own, "http://127.0.0.1:10"]) == 9
    assert should_serve([own, other]) == 0


def test_the_lighthouse_of_another_machine_is_not_started_here():
    with pytest.raises(
        UserError, match=r"no address in --lighthouse http://203\.0\.113\.1:9,.* is one of this machine"
    ):
        should_serve(["http://203.0.113.1:9", "http://203.0.113.2:9"])


def test_peers_whose_server_does_not_answer_are_unreachable(listener):
    members = [Member(str(port), PeerFacts("x", "127.0.0.1", 1, port)) for port in (listener, 9)]
    assert find_unreachable(members) == ["9"]
    assert find_unreachable([]) == []


@pytest.mark.parametrize("url", ["alder:1", "http://alder", "http://alder:x", "http://[fd00::1:29510", "http://:1"])
def test_an_address_of_another_form_is_a_mistake_of_the_user(url):
    with pytest.raises(UserError, match=r"expected http://HOST:PORT, as in http://alder:29510$"):
        split_address(url)
    assert split_address("http://[fd00::1]:29510") == ("fd00::1", 29510)


def test_the_address_of_another_machine_is_reported_before_anything_is_connected(free_port):
    """A connection to 203.0.113.1, which nobody has, would be tried for minutes."""
    config = peer_config("--peer-address", "203.0.113.1", "--peer-port", free_port)
    peer = Peer(config, lambda event, **facts: None, lambda: False)
    message = rf"203\.0\.113\.1, port {free_port + 1} \(--peer-port \+ 1\), cannot be used"
    with pytest.raises(UserError, match=message), peer:
        pytest.fail("it has begun")


@pytest.mark.parametrize(("wanted", "flag"), [("no-such.invalid", "--peer-address"), ("", "--lighthouse")])
def test_a_name_without_an_address_is_reported_with_its_flag(wanted, flag):
    with pytest.raises(UserError, match=f"no route to no-such.invalid: .*; correct {flag}$"):
        own_address(wanted, ["http://no-such.invalid:29510"])


@pytest.fixture
def lighthouses(start):
    """The addresses of two lighthouses, once they answer."""
    ports = [find_free_port() for _ in range(2)]
    for port in ports:
        start([sys.executable, "-m", "forge_lib.elastic.membership", port])
    for port in ports:
        until(lambda port=port: is_listening(port), 60, f"a lighthouse on port {port}")
    return [f"http://127.0.0.1:{port}" for port in ports]


def test_two_lighthouses_are_reported_but_not_one_with_two_addresses(lighthouses, monkeypatch, caplog):
    monkeypatch.setattr(membership, "OTHERS_SECONDS", 0.2)
    used, other = lighthouses
    same, nobody = used.replace("127.0.0.1", "localhost"), "http://127.0.0.1:9"
    facts = PeerFacts("alder", "127.0.0.1", 1, 2)
    with Membership([used, same, nobody], "alder") as alder:
        assert alder.quorum(facts, lambda: False)
        assert alder.find_other() == ""
    with Membership([used, same, nobody, other], "alder") as alder:
        assert alder.find_other() == "", "it has not found any yet"
        assert alder.quorum(facts, lambda: False)
        assert alder.find_other() == other
        until(lambda: f"two lighthouses run: {used} and {other}" in caplog.text, 60, "the warning")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("failed to connect to http://a:1: transport error: tcp connect error: Connection refused (os error 111)",
         "Connection refused (os error 111)"),
        ('status: Cancelled, message: "Timeout expired", details: [], metadata: MetadataMap { headers: {} }',
         "Timeout expired"),
        ("no lighthouse is named", "no lighthouse is named"),
    ],
)  # fmt: skip
def test_of_the_messages_of_torchft_the_part_that_says_the_reason_is_logged(text, reason):
    assert membership._reason(RuntimeError(text)) == reason
