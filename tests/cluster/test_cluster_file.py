"""cluster.yaml: how it is read, which mistakes are found in it, and how a machine finds itself."""

import re
from pathlib import Path

import pytest
from made_configs import LAB

from forge_lib.cluster import cluster_file
from forge_lib.cluster.cluster_file import Cluster, find_machine, read_cluster
from forge_lib.errors import UserError


def read(folder: Path, text: str) -> Cluster:
    """Reads a cluster.yaml with this text."""
    (folder / "cluster.yaml").write_text(text)
    return read_cluster(folder / "cluster.yaml")


def test_given_ranks_decide_the_order_of_the_machines(tmp_path):
    text = "name: a\nmachines: [{name: x, address: h1, rank: 1}, {name: y, address: h2, rank: 0}]"
    assert [machine.name for machine in read(tmp_path, text).machines] == ["y", "x"]


WRONG = """
name: my lab
port: 99999
device: tpu
mixed_precision: fp8
colour: blue
machines:
  - {name: alice, address: 127.0.0.1, processes: 0, rank: 0}
  - {name: alice, address: 10.77.0.2, proceses: 2, rank: 1}
  - {name: carol, address: 10.77.0.2, rank: 1}
  - {name: dave, address: "10.77.0,4", rank: 3, processes: two}
wireguard: {subnet: 10.77.0.0/30, port: 0}
"""


def test_all_mistakes_of_a_file_are_reported_together(tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, WRONG)
    for message in (
        "name is 'my lab'",
        "port is 99999",
        "device is 'tpu', expected auto, cpu, cuda",
        "mixed_precision is 'fp8'",
        "unknown key 'colour'",
        "number 2: unknown key 'proceses'; did you mean processes?",
        "number 4: processes is 'two', expected a whole number",
        "machine 'alice': processes is 0, expected 1 or more",
        "2 machines have the name alice",
        "2 machines have the address 10.77.0.2",
        "2 machines have the rank 1",
        "machine 'dave': address '10.77.0,4' is neither an IP address nor a host name",
        "the main machine 'alice' has the loopback address 127.0.0.1",
        "wireguard: port is 0",
        "subnet 10.77.0.0/30 has no room for 4 machines",
        "subnet 10.77.0.0/30 contains the address of carol",
    ):
        assert message in str(error.value), message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "expected lines of `key: value`"),
        ("name: [", "not readable as YAML"),
        ("name: a", "machines: expected a list"),
        ("name: a\nmachines: [{name: x}]", "number 1: address is missing"),
        ("machines: [{name: x, address: y}]", "name is missing"),
        (
            "name: a\nmachines: [{name: x, address: 10.0.0.1}, {name: y, address: '::1'}]",
            "machine 'y' has the loopback address ::1, which other machines cannot use",
        ),
        (
            "name: a\nmachines: [{name: x, address: h}, {name: y, address: ip6-localhost}]",
            "machine 'y' has the loopback address ip6-localhost",
        ),
        ("name: a\nmachines: [{name: x, address: 0.0.0.0}]", "is no machine's address"),
        ("name: a\nmachines: [{name: x, address: 999.1.1.1}]", "neither an IP address nor a host name"),
        ("name: a\nmachines: [{name: x, address: h}]\nname: b", "'name' is given twice"),
        (
            "name: a\nmachines: [{name: x, address: 10.0.0.1}, {name: y, address: '::ffff:10.0.0.1'}]",
            "2 machines have the address 10.0.0.1",
        ),
        ("name: a\nmachines: [{name: x, address: h}]\nwireguard: {subnet: 8.8.8.0/24}", "is not private"),
        ("name: a\nmachines: [{name: ../x, address: h}]", "expected a name of letters"),
        ("name: a\nmachines: [{name: x, address: h, rank: 1}]", "from 0 to 0, or none"),
        ("name: a\nmachines: [{name: x, address: h}]\nwireguard: {subnet: 10.0.0.5/24}", "host bits set"),
        (
            "name: a\nmachines: [{name: x, address: 10.0.0.1}]\nwireguard: {subnet: 10.0.0.0/24}",
            "take another subnet",
        ),
        (
            "name: a\nmachines: [{name: a-name-of-16-char, address: h}]\nwireguard: {subnet: 10.0.0.0/24}",
            "give it a shorter name",
        ),
    ],
)
def test_a_mistake_in_the_file_is_reported(tmp_path, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path, text)


def test_this_machine_is_found_by_its_addresses(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_file, "own_addresses", lambda: {"127.0.0.1", "10.77.0.2"})
    cluster = read(tmp_path, LAB)
    assert find_machine(cluster, "auto").name == "bob"
    assert find_machine(cluster, "alice").name == "alice"
    with pytest.raises(UserError, match="no such machine; it has alice, bob"):
        find_machine(cluster, "carol")
    monkeypatch.setattr(cluster_file, "own_addresses", lambda: {"127.0.0.1", "192.168.7.7"})
    with pytest.raises(UserError, match=r"192.168.7.7\) has no address of the cluster \(alice 10.77.0.1, bob"):
        find_machine(cluster, "auto")
    monkeypatch.setattr(cluster_file, "own_addresses", lambda: {"10.77.0.1", "10.77.0.2"})
    with pytest.raises(UserError, match=r"the addresses of alice \(10.77.0.1\), bob .*; give --machine NAME"):
        find_machine(cluster, "auto")


def test_a_machine_behind_a_router_is_found_by_its_wireguard_address(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_file, "own_addresses", lambda: {"127.0.0.1", "192.168.1.5", "10.88.0.2"})
    cluster = read(tmp_path, f"{LAB}wireguard: {{subnet: 10.88.0.0/24}}")
    assert find_machine(cluster, "auto").name == "bob"
