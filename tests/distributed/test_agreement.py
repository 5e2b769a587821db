"""What the processes settle before they train."""

import copy

import pytest

from forge_lib.config import WorldConfig
from forge_lib.distributed import agreement as cluster
from forge_lib.errors import UserError
from forge_lib.process import World

PEER = {
    "host": "alice",
    "address": "10.0.0.1",
    "interface": "eth0",
    "port": 29500,
    "is_public": False,
    "cores": 2,
    "num_local_processes": 1,
    "device": "cpu",
    "device_name": "cpu",
    "flops": {"fp32": 1e11},
    "launcher_mixed_precision": "no",
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "accelerate": "1.15.0", "transformers": "5.23.0"},
    "config": {"learning_rate": 1e-3, "mixed_precision": "auto"},
    "threads": 2,
    "instructions": "AVX2",
    "fingerprints": {"--dataset-path": "a" * 64},
    "weights": "c" * 32,
    "random_weights": False,
}


def two(**changes) -> list[dict]:
    """The facts of two processes, the second with other values: `path__to__key=value`."""
    other = copy.deepcopy(PEER) | {"host": "bob", "address": "10.0.0.2"}
    for path, value in changes.items():
        *folders, key = path.split("__")
        place = other
        for folder in folders:
            place = place[folder]
        place[key] = value
    return [copy.deepcopy(PEER), other]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config__learning_rate": 2e-3}, "bob (process 1) differs from alice (process 0) in --learning-rate: 0.002"),
        (
            {"fingerprints": {"--dataset-path": "b" * 64}},
            "in its --dataset-path: fingerprint bbbbbbbbbbbb against aaaa",
        ),
        ({"versions__torch": "2.14.0"}, "in the version of torch: 2.14.0 against 2.13.0+cpu"),
        ({"weights": "d" * 32}, "in the model's weights: hash dddddddddddd against cccccccccccc"),
    ],
)
def test_a_difference_names_the_peer_and_the_field(changes, message):
    with pytest.raises(UserError) as error:
        cluster.agree(two(**changes), WorldConfig())
        cluster.compare(two(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"versions__torch": "2.13.1+cu128"}, {"weights": "d" * 32, "random_weights": True}]
)
def test_a_difference_that_does_no_harm_is_a_warning(changes):
    peers = two(**changes)
    peers[0]["random_weights"] = "random_weights" in changes
    warnings = cluster.agree(peers, WorldConfig()).warnings + cluster.compare(peers)
    assert "bob (process 1) differs" in warnings[0]
    assert not cluster.agree(two(versions__torch="2.13.0"), WorldConfig()).warnings


def test_bf16_is_taken_only_where_every_process_runs_it_faster():
    fast = {"fp32": 1e11, "bf16": 3e11}
    assert cluster.agree(two(flops=fast), WorldConfig()).mixed_precision == "no"
    peers = two(flops=fast)
    peers[0]["flops"] = fast
    assert cluster.agree(peers, WorldConfig()).mixed_precision == "bf16"


def test_the_flag_decides_the_precision_before_the_yaml_and_says_so():
    peers = two()
    for peer in peers:
        peer["launcher_mixed_precision"] = "bf16"
    assert cluster.agree(peers, WorldConfig()).mixed_precision == "bf16"
    for peer in peers:
        peer["config"]["mixed_precision"] = "no"
    agreement = cluster.agree(peers, WorldConfig())
    assert agreement.mixed_precision == "no"
    assert "overrides mixed_precision: bf16 of the YAML" in agreement.warnings[0]


def test_the_backend_is_nccl_where_every_process_has_a_gpu():
    gpu = two(device="cuda")
    assert cluster.agree(gpu, WorldConfig()).backend == "gloo"
    with pytest.raises(UserError, match="--backend nccl needs a GPU for every process, alice has none"):
        cluster.agree(gpu, WorldConfig(backend="nccl"))
    gpu[0]["device"] = "cuda"
    assert cluster.agree(gpu, WorldConfig()).backend == "nccl"
    assert cluster.agree(gpu, WorldConfig(backend="gloo")).backend == "gloo"


def test_a_launcher_that_gives_no_rank_is_refused_with_the_lines_to_change(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    with pytest.raises(UserError) as error:
        World.from_environment()
    assert "distributed_type: MULTI_GPU\n    use_cpu: true" in str(error.value)


def test_a_yaml_for_another_kind_of_training_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="asks for FSDP"):
        World.from_environment()


def test_a_world_that_came_up_smaller_is_refused():
    cluster.check_world(World(), 1)
    with pytest.raises(UserError, match="meant a world of 2 processes, but 1 came up"):
        cluster.check_world(World(num_processes=2), 1)


def test_the_interface_is_the_one_that_routes_to_the_main_machine(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    world = World(num_processes=2, num_local_processes=2, main_address="127.0.0.1", main_port=29500)
    assert cluster.choose_interface(world) == ("lo", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    assert cluster.choose_interface(world)[0] == "mine0", "the user's choice stands"


def test_a_main_machine_whose_name_does_not_resolve_is_named():
    world = World(num_processes=2, main_address="no-such-host.invalid", main_port=29500)
    with pytest.raises(UserError, match=r"'no-such-host\.invalid' does not resolve"):
        cluster.choose_interface(world)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *[(private, False) for private in ("10.1.2.3", "172.16.0.1", "192.168.1.10", "100.64.0.7", "127.0.0.1", "")],
        *[(private, False) for private in ("fd00::1", "fe80::1%eth0", "::1")],
        *[(public, True) for public in ("172.32.0.1", "203.0.113.5", "8.8.8.8", "100.128.0.1", "2001:db8::1")],
    ],
)
def test_private_and_shared_addresses_are_not_public(address, public):
    assert cluster.is_public(address) == public


def test_an_overlays_address_is_not_public(monkeypatch, tmp_path):
    """An interface without a link layer is a tunnel's, whatever its address."""
    for name, kind in (("wg0", "65534"), ("eth0", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "type").write_text(f"{kind}\n")
        monkeypatch.setattr(cluster, "Path", lambda _: tmp_path)
        monkeypatch.setattr(cluster, "interface_of", lambda _, name=name: name)
        assert cluster.is_public("203.0.113.5") == (name == "eth0")


def test_a_public_main_address_and_idle_cores_are_warned_of_once():
    peers = two(cores=8)
    peers[0]["is_public"] = True
    public, idle = cluster.agree([*peers, peers[1]], WorldConfig()).warnings
    assert "anybody who reaches 10.0.0.1 port 29500 can join this run and read it" in public
    assert "bob computes with 2 of its 8 cores: say `use_cpu: true` in the YAML" in idle
    assert cluster.agree([PEER, PEER], WorldConfig()).warnings == []
