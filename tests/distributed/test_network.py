"""The interface and the addresses that a machine uses in its network."""

import socket

import pytest

from forge_lib.distributed import network
from forge_lib.distributed.network import choose_interface, is_public, route_address
from forge_lib.errors import UserError
from forge_lib.process import World


def test_the_interface_is_the_one_that_routes_to_the_main_machine(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    world = World(num_processes=2, num_local_processes=2, main_address="127.0.0.1", main_port=29500)
    assert choose_interface(world) == ("lo", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    assert choose_interface(world)[0] == "mine0", "the user's choice is kept"


def test_a_single_process_uses_no_interface():
    assert choose_interface(World()) == ("", "")


def test_a_main_machine_whose_name_does_not_resolve_is_named():
    world = World(num_processes=2, main_address="no-such-host.invalid", main_port=29500)
    with pytest.raises(UserError, match=r"'no-such-host\.invalid' does not resolve on "):
        choose_interface(world)


def test_a_main_machine_without_a_route_is_named(monkeypatch):
    def no_route(host: str, port: int) -> str:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(network, "route_address", no_route)
    with pytest.raises(UserError, match=r"no route to the main machine 203\.0\.113\.5: Network is unreachable"):
        choose_interface(World(num_processes=2, main_address="203.0.113.5", main_port=29500))


def test_a_main_machine_whose_name_means_loopback_is_refused_if_there_are_other_machines(monkeypatch):
    monkeypatch.setattr(network, "route_address", lambda host, port: "127.0.1.1")
    world = World(num_processes=2, num_local_processes=1, main_address="alice", main_port=29500)
    with pytest.raises(UserError, match=r"'alice' resolves to the loopback address 127\.0\.1\.1"):
        choose_interface(world)


def test_the_route_probe_returns_the_own_address_and_tells_a_bad_name_from_a_missing_route():
    assert route_address("127.0.0.1", 29500) == "127.0.0.1"
    with pytest.raises(socket.gaierror):
        route_address("no-such-host.invalid", 29500)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *[(private, False) for private in ("10.1.2.3", "172.16.0.1", "192.168.1.10", "100.64.0.7", "127.0.0.1", "")],
        *[(private, False) for private in ("fd00::1", "fe80::1%eth0", "::1")],
        *[(public, True) for public in ("172.32.0.1", "203.0.113.5", "8.8.8.8", "100.128.0.1", "2001:db8::1")],
    ],
)
def test_private_and_shared_addresses_are_not_public(address, public):
    assert is_public(address) == public


def test_the_address_of_a_tunnel_is_not_public(monkeypatch, tmp_path):
    for name, kind in (("wg0", "65534"), ("eth0", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "type").write_text(f"{kind}\n")
        monkeypatch.setattr(network, "Path", lambda _: tmp_path)
        monkeypatch.setattr(network, "interface_of", lambda _, name=name: name)
        assert is_public("203.0.113.5") == (name == "eth0")
