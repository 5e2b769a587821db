"""The flags of a machine of a cluster.yaml."""

import pytest

from forge_lib.cluster.cluster_file import read_cluster
from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from forge_lib.launch.config import ForgeConfig, place

LAB = """
name: home-lab
lighthouse: bob
lighthouse_port: 29700
peer_port: 29711
machines:
  - {name: alice, address: 10.77.0.1, processes: 2}
  - {name: bob, address: "fd00::2"}
"""
RUN = ["--cluster", "lab.yaml", "--model-name", "m", "--dataset-path", "d", "--output-dir", "o"]


@pytest.fixture
def lab(tmp_path):
    (tmp_path / "lab.yaml").write_text(LAB)
    return read_cluster(tmp_path / "lab.yaml")


def test_each_machine_is_a_peer_and_the_named_one_has_the_lighthouse(lab):
    config = parse_config(ForgeConfig, ["--elastic", *RUN])
    alice, bob = (place(config, lab, machine) for machine in lab.machines)
    assert alice.lighthouse == bob.lighthouse == "http://[fd00::2]:29700"
    assert (alice.serve_lighthouse, bob.serve_lighthouse) == (False, True)
    assert (alice.peer_name, alice.peer_address) == ("alice", "10.77.0.1")
    assert (alice.num_nodes, alice.processes_per_node) == (1, 2)
    assert alice.peer_port == bob.peer_port == 29711


def test_without_elastic_the_machines_are_one_world(lab):
    config = parse_config(ForgeConfig, RUN)
    bob = place(config, lab, lab.machines[1])
    assert (bob.num_nodes, bob.node_rank, bob.master_addr, bob.lighthouse) == (2, 1, "10.77.0.1", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-peers", "2"], "--min-peers: only with --elastic"),
        (["--elastic", "--num-nodes", "2"], "--num-nodes: with --elastic each machine is a peer of its own"),
        (["--elastic", "--cluster", ""], "--lighthouse is missing"),
    ],
)
def test_flags_of_the_other_mode_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse_config(ForgeConfig, [*RUN, *flags])


def test_a_number_of_nodes_with_elastic_is_one_mistake():
    with pytest.raises(UserError) as caught:
        parse_config(ForgeConfig, [*RUN, "--elastic", "--lighthouse", "http://10.77.0.1:29510", "--num-nodes", "2"])
    assert str(caught.value).count("--num-nodes") == 1


def test_a_lighthouse_on_an_unknown_machine_is_named(tmp_path):
    (tmp_path / "lab.yaml").write_text(LAB.replace("lighthouse: bob", "lighthouse: bab"))
    with pytest.raises(UserError, match="lighthouse is 'bab', expected alice, bob"):
        read_cluster(tmp_path / "lab.yaml")


def test_a_second_machine_may_replace_the_lighthouse(tmp_path):
    (tmp_path / "lab.yaml").write_text(LAB.replace("lighthouse: bob", "lighthouse: bob, alice"))
    lab = read_cluster(tmp_path / "lab.yaml")
    alice, bob = (place(parse_config(ForgeConfig, ["--elastic", *RUN]), lab, machine) for machine in lab.machines)
    assert alice.lighthouse == bob.lighthouse == "http://[fd00::2]:29700,http://10.77.0.1:29700"
    assert (alice.serve_lighthouse, bob.serve_lighthouse) == (False, True)
    replacing = place(parse_config(ForgeConfig, ["--elastic", "--serve-lighthouse", *RUN]), lab, lab.machines[0])
    assert replacing.serve_lighthouse
