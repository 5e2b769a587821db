"""The accelerate YAML of each machine of a cluster, and the mistakes that are found in a YAML."""

from pathlib import Path

import pytest
import yaml
from commands import ROOT
from made_configs import LAB

from forge_lib.cluster.accelerate_yaml import accelerate_config, find_config_mistakes
from forge_lib.cluster.cluster_file import Cluster, read_cluster


def read(folder: Path, text: str) -> Cluster:
    """Reads a cluster.yaml with this text."""
    (folder / "cluster.yaml").write_text(text)
    return read_cluster(folder / "cluster.yaml")


def configs_of(cluster: Cluster) -> list[dict]:
    """Returns the content of each machine's YAML."""
    return [yaml.safe_load(accelerate_config(cluster, machine)) for machine in cluster.machines]


def test_each_yaml_has_the_processes_of_its_machine_times_the_number_of_machines(tmp_path):
    """accelerate divides num_processes by num_machines: so each machine starts the number that cluster.yaml gives."""
    for rank, (config, processes) in enumerate(zip(configs_of(read(tmp_path, LAB)), (2, 1), strict=True)):
        assert config["num_processes"] // config["num_machines"] == processes
        assert (config["machine_rank"], config["main_process_ip"]) == (rank, "10.77.0.1")
        assert config["main_process_port"] == 29500
        assert (config["distributed_type"], config["use_cpu"], config["mixed_precision"]) == ("MULTI_GPU", True, "no")


@pytest.mark.parametrize(
    ("text", "device", "use_cpu"),
    [("", "auto", None), ("device: cuda", "cuda", False), ("device: cpu", "cpu", True)],
)
def test_a_machine_may_have_another_device_than_the_cluster(tmp_path, text, device, use_cpu):
    machines = "machines: [{name: x, address: h1}, {name: y, address: h2, device: cpu}]"
    cluster = read(tmp_path, f"name: a\n{text}\n{machines}")
    assert [cluster.device_of(machine) for machine in cluster.machines] == [device, "cpu"]
    assert [config.get("use_cpu") for config in configs_of(cluster)] == [use_cpu, True]


def test_an_ipv6_address_is_read_as_text(tmp_path):
    cluster = read(tmp_path, "name: a\nmachines: [{name: x, address: 'fd00::1'}, {name: y, address: y.lan}]")
    assert configs_of(cluster)[1]["main_process_ip"] == "fd00::1"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("num_machines: 2\nnum_processes: 3\nmachine_rank: 2", ["not a multiple", "from 0 to 1", "_ip is missing"]),
        (
            "num_machines: 2\nnum_processes: 2\nmain_process_ip: 127.0.0.1",
            ["a loopback address, which other machines cannot use", "_port is missing"],
        ),
        ("num_processes: 2\nrdzv_conf: timeout=60", ["unknown keys (['rdzv_conf'])"]),
        ("num_processes: 2\nfsdp_config: {fsdp_version: 2}", ["fsdp_config is given, but not used"]),
        ("num_processes: 2\nmixed_precision: fp8", ["mixed_precision is fp8"]),
        ("num_machines: 1", ["num_processes is missing"]),
        ('num_processes: "4"', ["num_processes is '4', expected a whole number"]),
        ("num_processes: 2\nmachine_rank:", ["machine_rank is None, expected a whole number"]),
        ("num_processes: 2\nnum_machines: 0", ["num_machines is 0, expected 1 or more"]),
        ("num_processes: 2\ndynamo_config: foo", ["dynamo_config"]),
        ("num_processes: 2\nmain_process_port: 99999", ["main_process_port is 99999"]),
        ("num_processes: 2\nnum_machines: 2\nmain_process_ip: 10.0.0.1:29500", ["without port and brackets"]),
        ("num_processes: 2\nnum_machines: 2\nmain_process_ip: 0.0.0.0", ["no machine's address"]),
        ("num_processes: 2\nmixed_precision: fp16", ["which needs GPUs"]),
    ],
)
def test_each_mistake_of_an_accelerate_yaml_is_reported(tmp_path, text, messages):
    (tmp_path / "a.yaml").write_text(f"distributed_type: MULTI_GPU\nuse_cpu: true\n{text}\n")
    found = "\n".join(find_config_mistakes(tmp_path / "a.yaml"))
    for message in messages:
        assert message in found


def test_no_mistake_is_found_in_a_yaml_of_the_repository_or_of_make_configs(tmp_path):
    cluster = read(tmp_path, LAB)
    for machine in cluster.machines:
        (tmp_path / f"{machine.name}.yaml").write_text(accelerate_config(cluster, machine))
    for path in (*(ROOT / "accelerate_configs").glob("*.yaml"), tmp_path / "alice.yaml", tmp_path / "bob.yaml"):
        assert find_config_mistakes(path) == [], path
