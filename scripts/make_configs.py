r"""Writes the files of each machine of a cluster, and prints what to type on each.

    python scripts/make_configs.py cluster.yaml --output-dir accelerate_configs/home-lab

forge_lib/topology.py says what stands in cluster.yaml. For each machine it writes the YAML that `accelerate launch
--config_file` takes. Where cluster.yaml has `wireguard`, run it on each machine: it makes the key pair of that one,
whose private half stays there, and with the public keys of all, collected in one folder, the configuration of the
private network and its firewall:

    python scripts/make_configs.py cluster.yaml --output-dir accelerate_configs/home-lab --keys shared/keys

What is wrong with an accelerate YAML, such as the wizard writes:

    python scripts/make_configs.py --check ~/.cache/huggingface/accelerate/default_config.yaml
"""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from forge_lib.cluster import topology
from forge_lib.cluster import wireguard as overlay
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

    cluster: str = flag("", "the cluster's file; the flag's name may be left out", "FILE")
    output_dir: str = flag("", "folder of the files; accelerate_configs/ and the cluster's name", "FOLDER")
    keys: str = flag("", "folder of the machines' public keys; the output folder if empty", "FOLDER")
    machine: str = flag("auto", "which machine this is: auto (by its addresses) or its name", "NAME")
    check: str = flag("", "say what is wrong with this accelerate YAML, and do nothing else", "FILE")


@dataclass(kw_only=True)
class MakeConfig(FilesConfig):
    """Everything that this script reads."""

    def __post_init__(self):
        if bool(self.cluster) == bool(self.check):
            raise UserError("give either a cluster.yaml, or --check and an accelerate YAML")


def main(config: MakeConfig) -> None:
    """Writes the files, or checks one."""
    if config.check:
        check(Path(config.check).expanduser())
        return
    cluster = topology.read_cluster(Path(config.cluster).expanduser())
    folder = Path(config.output_dir or f"accelerate_configs/{cluster.name}").expanduser()
    keys = Path(config.keys).expanduser() if config.keys else folder
    folder.mkdir(parents=True, exist_ok=True)
    for machine in cluster.machines:
        path = folder / f"{machine.name}.yaml"
        if path.exists() and topology.MADE_BY not in path.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{path} is there already, and not by this program; name another --output-dir")
        path.write_text(topology.accelerate_config(cluster, machine), encoding="utf-8")
    if cluster.wireguard:
        write_overlay(cluster, topology.find_machine(cluster, config.machine), folder, keys)
    print_commands(cluster, Path(config.cluster), folder)


def check(path: Path) -> None:
    """Prints that a file is right, or raises a UserError with all that is wrong with it."""
    if wrong := topology.find_config_mistakes(path):
        raise UserError("\n".join(f"{path}: {line}" for line in wrong))
    print(f"{path}: nothing is wrong with it")


def write_overlay(cluster: topology.Cluster, own: topology.Machine, folder: Path, keys: Path) -> None:
    """Makes this machine's keys and, once those of all are there, its WireGuard configuration and firewall."""
    kind = Path("/sys/class/net") / own.name / "type"
    if kind.exists() and kind.read_text().strip() != ARPHRD_NONE:
        raise UserError(
            f"machine {own.name!r} has a network interface of that name already, which would be that of WireGuard; "
            "give the machine another name in cluster.yaml"
        )
    private = folder / f"{own.name}.key"
    ignored = folder / ".gitignore"
    if not ignored.exists() or "*.key" not in ignored.read_text().splitlines():
        with open(ignored, "a", encoding="utf-8") as file:
            file.write("*.key\n*.conf\n")
    overlay.make_key(private, keys / f"{own.name}.pub")
    (folder / f"{own.name}.nft").write_text(overlay.firewall(cluster, own), encoding="utf-8")
    public_keys = overlay.read_public_keys(cluster, keys)
    if missing := [machine.name for machine in cluster.machines if machine.name not in public_keys]:
        print(f"# {keys} has no public key of {', '.join(missing)} yet: run this there too, bring each machine's")
        print(f"# NAME.pub to all the others ({own.name}'s is {keys / f'{own.name}.pub'}), and run this again")
        return
    key, firewall = private.read_text().strip(), folder / f"{own.name}.nft"
    text = overlay.wireguard_config(cluster, own, key, public_keys, firewall)
    path = folder / f"{own.name}.conf"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    print(f"# on {own.name}, as root: the private network, and with it the firewall that closes a run to all others;")
    print("# `wg-quick down` and the same path takes both away, as before a change")
    print(shlex.join(["wg-quick", "up", str(path.resolve())]))
    print()


def print_commands(cluster: topology.Cluster, path: Path, folder: Path) -> None:
    """Prints what to type on each machine; a line each, that works as it is."""
    example = f"{EXAMPLE} --batch-size {SEQUENCES_PER_PROCESS * cluster.num_processes}"
    example += " --mixed-precision no" if cluster.mixed_precision == "no" else ""
    flags = f"{example} --output-dir {shlex.quote(f'runs/{cluster.name}')}"
    quoted = shlex.quote(str(path))
    print("# on each machine, the same line: can they reach each other, and what will they do?")
    print(f"python scripts/check_cluster.py {quoted}")
    print()
    for machine in cluster.machines:
        config_file = shlex.quote(str(folder / f"{machine.name}.yaml"))
        print(f"# on {machine.name}")
        print(f"accelerate launch --config_file {config_file} scripts/train.py {flags}")
    print()
    print("# from the folder of the program, as all of these; or, the same line on each machine")
    print(f"p2p-llm-forge --cluster {quoted} {flags}")
    if len(cluster.machines) > 1:
        print("# or all of them from here, over ssh")
        print(f"p2p-llm-forge --cluster {quoted} --ssh {flags}")
    if any(cluster.device_of(machine) == "auto" for machine in cluster.machines):
        print("# On machines without a GPU write `device: cpu`, or accelerate gives each process one thread.")


if __name__ == "__main__":
    with report_errors("make_configs.py"):
        main(parse_config(MakeConfig, sys.argv[1:], description=__doc__, positional="cluster"))
