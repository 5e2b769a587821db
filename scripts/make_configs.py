r"""Writes the files of each machine of a cluster, and prints the commands to type on each.

    python scripts/make_configs.py cluster.yaml --output-dir accelerate_configs/home-lab

forge_lib/cluster/cluster_file.py describes cluster.yaml. For each machine, this writes the YAML for `accelerate launch
--config_file`. If cluster.yaml has `wireguard`, run it on each machine. It makes that machine's key pair; the private
key never leaves the machine. Collect the public keys of all machines in one folder; then it also writes the machine's
configuration of the private network and its firewall:

    python scripts/make_configs.py cluster.yaml --output-dir accelerate_configs/home-lab --keys shared/keys

To find what is wrong with an accelerate YAML, such as the wizard writes:

    python scripts/make_configs.py --check ~/.cache/huggingface/accelerate/default_config.yaml
"""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from forge_lib.cluster.accelerate_yaml import MADE_BY, accelerate_config, find_config_mistakes
from forge_lib.cluster.cluster_file import Cluster, Machine, find_machine, read_cluster
from forge_lib.cluster.wireguard import firewall, make_key, read_public_keys, wireguard_config
from forge_lib.config import flag
from forge_lib.distributed.network import ARPHRD_NONE
from forge_lib.distributed.reporting import report_errors
from forge_lib.errors import UserError
from forge_lib.flags import parse_config

EXAMPLE = "--model-name data/tiny_gpt2 --dataset-path data/sample_corpus.txt --sample-by paragraph "
EXAMPLE += "--sequence-length 128 --max-steps 100"
SEQUENCES_PER_PROCESS = 4  # of the example


@dataclass(kw_only=True)
class FilesConfig:
    """What is read and written."""

    _argument_group_name = "files"

    cluster: str = flag("", "cluster.yaml; may be given without its flag", "FILE")
    output_dir: str = flag("", "folder of the files; empty: accelerate_configs/ and the cluster's name", "FOLDER")
    keys: str = flag("", "folder of the machines' public keys; empty: the output folder", "FOLDER")
    machine: str = flag("auto", "which machine this is: auto (by its addresses) or its name", "NAME")
    check: str = flag("", "only print what is wrong with this accelerate YAML", "FILE")


@dataclass(kw_only=True)
class MakeConfig(FilesConfig):
    """All flags of this script."""

    def __post_init__(self):
        if bool(self.cluster) == bool(self.check):
            raise UserError("give either a cluster.yaml, or --check and an accelerate YAML")


def main(config: MakeConfig) -> None:
    """Writes the files, or checks one."""
    if config.check:
        check(Path(config.check).expanduser())
        return
    cluster = read_cluster(Path(config.cluster).expanduser())
    folder = Path(config.output_dir or f"accelerate_configs/{cluster.name}").expanduser()
    keys = Path(config.keys).expanduser() if config.keys else folder
    folder.mkdir(parents=True, exist_ok=True)
    for machine in cluster.machines:
        path = folder / f"{machine.name}.yaml"
        if path.exists() and MADE_BY not in path.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{path} exists, and this program did not write it; give another --output-dir")
        path.write_text(accelerate_config(cluster, machine), encoding="utf-8")
    if cluster.wireguard:
        write_wireguard(cluster, find_machine(cluster, config.machine), folder, keys)
    print_commands(cluster, Path(config.cluster), folder)


def check(path: Path) -> None:
    """Prints that an accelerate YAML is correct, or raises a UserError that lists its mistakes."""
    if mistakes := find_config_mistakes(path):
        raise UserError("\n".join(f"{path}: {line}" for line in mistakes))
    print(f"{path}: no mistakes")


def write_wireguard(cluster: Cluster, own: Machine, folder: Path, keys: Path) -> None:
    """Writes this machine's keys and firewall and, once all public keys are there, its WireGuard configuration."""
    interface_type = Path("/sys/class/net") / own.name / "type"
    if interface_type.exists() and interface_type.read_text().strip() != ARPHRD_NONE:
        raise UserError(
            f"machine {own.name!r} already has a network interface with that name, which WireGuard would use; give "
            "the machine another name in cluster.yaml"
        )
    private_path, public_path = folder / f"{own.name}.key", keys / f"{own.name}.pub"
    firewall_path, config_path = folder / f"{own.name}.nft", folder / f"{own.name}.conf"
    ignore_secrets(folder / ".gitignore")
    make_key(private_path, public_path)
    firewall_path.write_text(firewall(cluster, own), encoding="utf-8")
    public_keys = read_public_keys(cluster, keys)
    if missing := [machine.name for machine in cluster.machines if machine.name not in public_keys]:
        print(f"# {keys} has no public key of {', '.join(missing)} yet: run this there too, copy each machine's")
        print(f"# NAME.pub to all the others ({own.name}'s is {public_path}), and run this again")
        return
    text = wireguard_config(cluster, own, private_path.read_text().strip(), public_keys, firewall_path)
    config_path.unlink(missing_ok=True)
    with os.fdopen(os.open(config_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    print(f"# on {own.name}, as root: starts the private network and the firewall that closes a run to all others;")
    print("# `wg-quick down` and the same path stops both; do that before a change")
    print(shlex.join(["wg-quick", "up", str(config_path.resolve())]))
    print()


def ignore_secrets(path: Path) -> None:
    """Adds the files with private keys to a .gitignore, which may already have other lines."""
    if not path.exists() or "*.key" not in path.read_text().splitlines():
        with open(path, "a", encoding="utf-8") as file:
            file.write("*.key\n*.conf\n")


def print_commands(cluster: Cluster, path: Path, folder: Path) -> None:
    """Prints the commands for each machine, one per line, ready to use."""
    example = f"{EXAMPLE} --batch-size {SEQUENCES_PER_PROCESS * cluster.num_processes}"
    example += " --mixed-precision no" if cluster.mixed_precision == "no" else ""
    flags = f"{example} --output-dir {shlex.quote(f'runs/{cluster.name}')}"
    quoted = shlex.quote(str(path))
    print("# on each machine, the same line: can the machines reach each other, and how fast will they train?")
    print(f"python scripts/check_cluster.py {quoted}")
    print()
    for machine in cluster.machines:
        config_file = shlex.quote(str(folder / f"{machine.name}.yaml"))
        print(f"# on {machine.name}")
        print(f"accelerate launch --config_file {config_file} scripts/train.py {flags}")
    print()
    print("# or the same line on each machine; run all of these lines in the folder of the program")
    print(f"p2p-llm-forge --cluster {quoted} {flags}")
    if len(cluster.machines) > 1:
        print("# or all machines from here, over ssh")
        print(f"p2p-llm-forge --cluster {quoted} --ssh {flags}")
    if any(cluster.device_of(machine) == "auto" for machine in cluster.machines):
        print("# On machines without a GPU write `device: cpu`, or accelerate gives each process one thread.")


if __name__ == "__main__":
    with report_errors("make_configs.py"):
        main(parse_config(MakeConfig, sys.argv[1:], description=__doc__, positional="cluster"))
