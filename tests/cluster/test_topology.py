"""cluster.yaml, and what make_configs.py makes of it."""

import os
import re
import shlex
import stat
import subprocess
import sys

import pytest
import yaml
from commands import ROOT, SHORT
from run_folders import losses, rows
from test_configs import answer_wizard

from forge_lib.cluster import topology
from forge_lib.cluster import wireguard as overlay
from forge_lib.errors import UserError

LAB = """
name: home-lab
device: cpu
machines:
  - {name: alice, address: 10.77.0.1, processes: 2}
  - {name: bob, address: 10.77.0.2, processes: 1}
"""


@pytest.fixture
def read(tmp_path):
    """Reads a cluster.yaml of this text."""

    def read(text: str) -> topology.Cluster:
        (tmp_path / "cluster.yaml").write_text(text)
        return topology.read_cluster(tmp_path / "cluster.yaml")

    return read


def test_each_machine_gets_its_own_number_of_processes_times_the_machines(read):
    """accelerate divides num_processes by num_machines: so each machine starts what cluster.yaml gives it."""
    cluster = read(LAB)
    found = [yaml.safe_load(topology.accelerate_config(cluster, machine)) for machine in cluster.machines]
    for rank, (config, processes) in enumerate(zip(found, (2, 1), strict=True)):
        assert config["num_processes"] // config["num_machines"] == processes
        assert (config["machine_rank"], config["main_process_ip"], config["main_process_port"]) == (
            rank,
            "10.77.0.1",
            29500,
        )
        assert (config["distributed_type"], config["use_cpu"], config["mixed_precision"]) == ("MULTI_GPU", True, "no")


@pytest.mark.parametrize(
    ("text", "device", "use_cpu"),
    [("", "auto", None), ("device: cuda", "cuda", False), ("device: cpu", "cpu", True)],
)
def test_a_machine_of_its_own_device(read, text, device, use_cpu):
    cluster = read(
        f"name: a\n{text}\nmachines:\n  - {{name: x, address: h1}}\n  - {{name: y, address: h2, device: cpu}}\n"
    )
    assert [cluster.device_of(machine) for machine in cluster.machines] == [device, "cpu"]
    found = [yaml.safe_load(topology.accelerate_config(cluster, machine)) for machine in cluster.machines]
    assert [config.get("use_cpu") for config in found] == [use_cpu, True]


def test_names_and_ipv6_addresses_go_through(read):
    cluster = read("name: a\nmachines: [{name: x, address: 'fd00::1'}, {name: y, address: y.lan}]")
    config = yaml.safe_load(topology.accelerate_config(cluster, cluster.machines[1]))
    assert config["main_process_ip"] == "fd00::1"


def test_ranks_decide_the_order_where_they_are_given(read):
    text = "name: a\nmachines: [{name: x, address: h1, rank: 1}, {name: y, address: h2, rank: 0}]"
    assert [machine.name for machine in read(text).machines] == ["y", "x"]


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


def test_all_mistakes_of_a_file_are_named_at_once(read):
    with pytest.raises(UserError) as error:
        read(WRONG)
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
        "the main machine 'alice' has the address 127.0.0.1",
        "wireguard: port is 0",
        "subnet 10.77.0.0/30 has no room for 4 machines",
        "subnet 10.77.0.0/30 has the address of carol",
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
            "machine 'y' has the address",
        ),
        ("name: a\nmachines: [{name: x, address: 0.0.0.0}]", "is no machine's address"),
        ("name: a\nmachines: [{name: x, address: 999.1.1.1}]", "neither an IP address nor a host name"),
        ("name: a\nmachines: [{name: x, address: h}]\nname: b", "'name' is given twice"),
        ("name: a\nmachines: [{name: x, address: h}, {name: y, address: ip6-localhost}]", "reaches itself alone"),
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
    ],
)
def test_a_mistake_in_the_file_is_named(read, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(text)


def test_this_machine_is_found_by_its_addresses(read, monkeypatch):
    monkeypatch.setattr(topology, "own_addresses", lambda: {"127.0.0.1", "10.77.0.2"})
    cluster = read(LAB)
    assert topology.find_machine(cluster, "auto").name == "bob"
    assert topology.find_machine(cluster, "alice").name == "alice"
    with pytest.raises(UserError, match="no such machine; it has alice, bob"):
        topology.find_machine(cluster, "carol")
    monkeypatch.setattr(topology, "own_addresses", lambda: {"127.0.0.1", "192.168.7.7"})
    with pytest.raises(UserError, match=r"192.168.7.7\) has no address of the cluster \(alice 10.77.0.1, bob"):
        topology.find_machine(cluster, "auto")
    monkeypatch.setattr(topology, "own_addresses", lambda: {"10.77.0.1", "10.77.0.2"})
    with pytest.raises(UserError, match="at once; give --machine NAME"):
        topology.find_machine(cluster, "auto")


def test_a_machine_behind_a_router_is_found_by_its_address_in_the_private_network(read, monkeypatch):
    monkeypatch.setattr(topology, "own_addresses", lambda: {"127.0.0.1", "192.168.1.5", "10.88.0.2"})
    assert topology.find_machine(read(f"{LAB}wireguard: {{subnet: 10.88.0.0/24}}"), "auto").name == "bob"


def test_files_that_are_not_its_own_stay(tmp_path):
    """A machine's YAML would have the name of another file, cluster.yaml itself among them; .gitignore grows."""
    (tmp_path / "cluster.yaml").write_text("name: a\nmachines: [{name: cluster, address: 10.77.0.1}]")
    ended = make_configs(tmp_path / "cluster.yaml", "--output-dir", tmp_path)
    assert (ended.returncode, "is there already, and not by this program" in ended.stderr) == (2, True)
    assert (tmp_path / "cluster.yaml").read_text().startswith("name: a")


def make_configs(*flags, prefix=()) -> subprocess.CompletedProcess:
    words = [*prefix, sys.executable, "scripts/make_configs.py", *map(str, flags)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def commands(output: str) -> list[list[str]]:
    """The commands that it has printed."""
    return [shlex.split(line) for line in output.splitlines() if line and not line.startswith("#")]


def test_a_wizards_yaml_is_told_what_is_wrong_with_it(tmp_path):
    """As it is for CPUs, and what else can be wrong for several machines."""
    path = tmp_path / "wizard.yaml"
    answer_wizard(path)
    ended = make_configs("--check", path)
    assert ended.returncode == 2
    assert "distributed_type is MULTI_CPU" in ended.stderr and "use_cpu: true" in ended.stderr
    text = re.sub("^distributed_type: .*$", "distributed_type: MULTI_GPU", path.read_text(), flags=re.MULTILINE)
    path.write_text(text)
    ended = make_configs("--check", path)
    assert (ended.returncode, "nothing is wrong" in ended.stdout) == (0, True), ended.stderr


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("num_machines: 2\nnum_processes: 3\nmachine_rank: 2", ["not a multiple", "from 0 to 1", "_ip is missing"]),
        (
            "num_machines: 2\nnum_processes: 2\nmain_process_ip: 127.0.0.1",
            ["reaches itself alone", "_port is missing"],
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
def test_each_mistake_of_an_accelerate_yaml_is_named(tmp_path, text, messages):
    (tmp_path / "a.yaml").write_text(f"distributed_type: MULTI_GPU\nuse_cpu: true\n{text}\n")
    found = "\n".join(topology.find_config_mistakes(tmp_path / "a.yaml"))
    for message in messages:
        assert message in found


def test_every_yaml_of_the_repository_and_of_make_configs_passes_its_own_check(tmp_path, read):
    cluster = read(LAB)
    for machine in cluster.machines:
        (tmp_path / f"{machine.name}.yaml").write_text(topology.accelerate_config(cluster, machine))
    for path in (*(ROOT / "accelerate_configs").glob("*.yaml"), tmp_path / "alice.yaml", tmp_path / "bob.yaml"):
        assert topology.find_config_mistakes(path) == [], path


@pytest.mark.skipif(not any(map(os.path.exists, ("/usr/bin/wg", "/usr/local/bin/wg"))), reason="needs wireguard-tools")
def test_each_machine_makes_its_own_key_and_only_public_ones_are_collected(tmp_path):
    """Each runs the same line with an output folder of its own; the last to come makes the circle complete."""
    (tmp_path / "cluster.yaml").write_text(LAB + "wireguard: {subnet: 10.88.0.0/24}\n")
    keys = tmp_path / "keys"

    def make(name: str) -> str:
        flags = (tmp_path / "cluster.yaml", "--output-dir", tmp_path / name, "--keys", keys, "--machine", name)
        ended = make_configs(*flags)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert "no public key of bob yet" in make("alice")
    assert not (tmp_path / "alice" / "alice.conf").exists()
    private = (tmp_path / "alice" / "alice.key").read_text()
    make("bob")
    make("alice")
    assert (tmp_path / "alice" / "alice.key").read_text() == private, "a key that is there stays"
    assert sorted(path.name for path in keys.iterdir()) == ["alice.pub", "bob.pub"]
    for name, other in (("alice", "bob"), ("bob", "alice")):
        folder = tmp_path / name
        for secret in (f"{name}.key", f"{name}.conf"):
            assert stat.S_IMODE((folder / secret).stat().st_mode) == 0o600
        text = (folder / f"{name}.conf").read_text()
        assert f"PublicKey = {(keys / f'{other}.pub').read_text().strip()}" in text
        assert (tmp_path / other / f"{other}.key").read_text().strip() not in text
        assert "main_process_ip: 10.88.0.1" in (folder / f"{name}.yaml").read_text()
    assert "Endpoint = 10.77.0.2:51820" in (tmp_path / "alice" / "alice.conf").read_text()
    assert "AllowedIPs = 10.88.0.2/32" in (tmp_path / "alice" / "alice.conf").read_text()
    (keys / "bob.pub").write_text((keys / "alice.pub").read_text())
    with pytest.raises(UserError, match="have the same key"):
        overlay.read_public_keys(topology.read_cluster(tmp_path / "cluster.yaml"), keys)


@pytest.mark.netns
@pytest.mark.timeout(200)
def test_the_printed_lines_check_the_cluster_and_train_on_it(hosts, start, tmp_path, trained):
    """2 + 1 processes on two machines whose own names mean 127.0.1.1, as on many laptops: as it is printed."""
    machines = hosts(2)
    (tmp_path / "cluster.yaml").write_text(LAB + "mixed_precision: no\n")
    ended = make_configs(tmp_path / "cluster.yaml", "--output-dir", tmp_path / "lab")
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 alice bob\n")
    script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'

    def on_both(lines: list[list[str]], *flags) -> list:
        running = []
        for n, (name, words) in enumerate(zip(("alice", "bob"), lines, strict=True), 1):
            prefix = [*machines.on(n), "env", "OMP_NUM_THREADS=1", "unshare", "--uts", "--mount", "sh", "-c", script]
            running.append(start([*words, *flags], prefix=[*prefix, name, str(tmp_path / "hosts")]))
        return [each.finish(120) for each in running]

    check, first, second, same, _ = commands(ended.stdout)
    checked = on_both([[sys.executable, *check[1:]]] * 2)
    assert [each.code for each in checked] == [0, 0], checked[0].output + checked[1].output
    assert "home-lab: all is well" in checked[1].output
    flags = [*SHORT, "--batch-size", "12", "--max-steps", "20", "--log-every", "1", "--eval-every", "0"]
    one = start([sys.executable, "scripts/train.py", *flags, "--output-dir", tmp_path / "one"]).finish()
    assert one.code == 0, one.output
    for number, lines in enumerate(([first, second], [same] * 2)):
        folder = tmp_path / f"run{number}"
        ends = on_both(lines, *flags, "--output-dir", folder)
        assert [each.code for each in ends] == [0, 0], ends[0].output + ends[1].output
        assert rows(folder)[-1]["num_processes"] == 3
        assert losses(folder) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
