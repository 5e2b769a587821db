"""cluster.yaml: the machines of a cluster.

    name: home-lab
    port: 29500                     # on the main machine
    device: auto                    # cpu, cuda, auto
    mixed_precision: auto           # no, bf16, fp16, auto
    lighthouse: alice, bob          # with --elastic: alice runs the lighthouse, bob may replace it; else: main machine
    lighthouse_port: 29510
    peer_port: 29511                # with --elastic: of each machine; the next one is used too
    machines:                       # the first one is the main machine
      - {name: alice, address: 10.77.0.1, processes: 2}
      - {name: bob, address: 10.77.0.2, processes: 1}
    wireguard: {subnet: 10.88.0.0/24, port: 51820}      # optional

accelerate_yaml.py turns it into one accelerate YAML per machine, and wireguard.py sets up the private network that the
key `wireguard` asks for.
"""

import difflib
import ipaddress
import socket
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

from forge_lib.cluster.addresses import as_ip, normalized
from forge_lib.cluster.mistakes import find_mistakes
from forge_lib.errors import UserError
from forge_lib.peers_config import PEER_PORT

SectionT = TypeVar("SectionT")


@dataclass(frozen=True)
class Machine:
    """A machine of a cluster.

    Attributes:
        name: also names its files.
        address: IPv4, IPv6 or host name that other machines use.
        processes: number of training processes on it.
        rank: its number, 0 for the main machine; its place in the list if no machine has the key.
        device: cpu, cuda or auto; empty for that of the cluster.
        ssh: destination for `ssh`; empty for its address.
        folder: where the program is on that machine, relative to the home folder; empty for the same folder as here.
        python: the Python interpreter on that machine, relative to `folder`.
    """

    name: str
    address: str
    processes: int = 1
    rank: int = -1
    device: str = ""
    ssh: str = ""
    folder: str = ""
    python: str = ".venv/bin/python"


@dataclass(frozen=True)
class WireGuard:
    """A private network over WireGuard: its addresses, and the UDP port that each machine listens on."""

    subnet: str
    port: int = 51820


@dataclass(frozen=True)
class Cluster:
    """The machines, in the order of their ranks, and the settings that they share."""

    name: str
    machines: list[Machine]
    port: int = 29500
    device: str = "auto"
    mixed_precision: str = "auto"
    lighthouse: str = ""
    lighthouse_port: int = 29510
    peer_port: int = PEER_PORT
    wireguard: WireGuard | None = None

    @property
    def main(self) -> Machine:
        """The main machine."""
        return self.machines[0]

    @property
    def lighthouse_machines(self) -> list[Machine]:
        """The machine that runs the lighthouse of train_elastic.py, and those that may replace it."""
        by_name = {each.name: each for each in self.machines}
        return [by_name[name.strip()] for name in self.lighthouse.split(",")] if self.lighthouse else [self.main]

    @property
    def num_processes(self) -> int:
        """Number of processes on all machines."""
        return sum(machine.processes for machine in self.machines)

    def address(self, machine: Machine) -> str:
        """Returns the address at which a run reaches a machine: its WireGuard address if there is one."""
        if not self.wireguard:
            return machine.address
        return str(ipaddress.ip_network(self.wireguard.subnet)[machine.rank + 1])

    def device_of(self, machine: Machine) -> str:
        """Returns cpu, cuda or auto."""
        return machine.device or self.device


# Reading the file


def read_cluster(path: Path) -> Cluster:
    """Reads and checks a cluster.yaml.

    Raises:
        UserError: lists all mistakes in the file.
    """
    if not path.is_file():
        raise UserError(f"--cluster {path}: no such file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    mistakes: list[str] = []
    cluster = _parse(content, mistakes)
    if cluster:
        mistakes += find_mistakes(cluster)
    if mistakes:
        raise UserError("\n".join(f"{path}: {line}" for line in mistakes))
    return replace(cluster, machines=sorted(cluster.machines, key=lambda machine: machine.rank))


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, but with an error for a key that occurs twice; PyYAML silently uses the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _parse(content: Any, mistakes: list[str]) -> Cluster | None:
    """Returns the cluster without its keys that are unknown or have a wrong type; adds a line to `mistakes` for each.

    Returns None if a required key is missing.
    """
    if not isinstance(content, dict):
        mistakes.append(f"expected lines of `key: value`, found {type(content).__name__}")
        return None
    content = dict(content)
    found = content.get("machines")
    if not isinstance(found, list) or not found:
        mistakes.append("machines: expected a list of machines, as in `- {name: alice, address: 10.77.0.1}`")
        found = []
    machines = [_parse_section(Machine, each, f"machines, number {n}: ", mistakes) for n, each in enumerate(found, 1)]
    if all(machine and machine.rank == -1 for machine in machines):
        machines = [replace(machine, rank=rank) for rank, machine in enumerate(machines)]
    content["machines"] = [machine for machine in machines if machine]
    if content.get("wireguard") is not None:
        content["wireguard"] = _parse_section(WireGuard, content["wireguard"], "wireguard: ", mistakes)
    if content.get("mixed_precision") is False:
        content["mixed_precision"] = "no"  # YAML reads an unquoted `no` as False
    return _parse_section(Cluster, content, "", mistakes)


def _parse_section(section: type[SectionT], content: Any, prefix: str, mistakes: list[str]) -> SectionT | None:
    if not isinstance(content, dict):
        mistakes.append(f"{prefix}expected `key: value`, found {content!r:.99}")
        return None
    known = {field.name: field for field in fields(section)}
    values = {}
    for key, value in content.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            mistakes.append(f"{prefix}unknown key {key!r:.99}{f'; did you mean {close[0]}?' if close else ''}")
        elif known[key].type in (int, str) and type(value) is not known[key].type:
            expected = "a whole number" if known[key].type is int else "text"
            mistakes.append(f"{prefix}{key} is {value!r:.99}, expected {expected}")
        else:
            values[key] = value
    missing = [name for name, field in known.items() if field.default is MISSING and name not in values]
    mistakes += [f"{prefix}{name} is missing" for name in missing if name not in content]
    return None if missing else section(**values)


# Which machine this is


def find_machine(cluster: Cluster, wanted: str) -> Machine:
    """Returns the machine of that name or, for "auto", the one whose address this machine has.

    Raises:
        UserError: there is none, or more than one.
    """
    if wanted != "auto":
        for machine in cluster.machines:
            if machine.name == wanted:
                return machine
        names = ", ".join(machine.name for machine in cluster.machines)
        raise UserError(f"--machine {wanted}: the cluster has no such machine; it has {names}")
    own = own_addresses()
    found = [each for each in cluster.machines if _is_own(each.address, own) or cluster.address(each) in own]
    if len(found) == 1:
        return found[0]
    if found:
        matches = ", ".join(f"{machine.name} ({machine.address})" for machine in found)
        raise UserError(
            f"--machine auto: this machine has the addresses of {matches}; give --machine NAME, or correct the "
            "addresses in cluster.yaml"
        )
    listed = ", ".join(sorted(address for address in own if not ipaddress.ip_address(address).is_loopback))
    expected = ", ".join(f"{machine.name} {machine.address}" for machine in cluster.machines)
    raise UserError(
        f"--machine auto: this machine ({socket.gethostname()}, {listed or 'no address'}) has no address of the "
        f"cluster ({expected}); correct cluster.yaml, or give --machine NAME"
    )


def own_addresses() -> set[str]:
    """Returns the IP addresses of this machine's interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {a.address.split("%")[0] for nic in psutil.net_if_addrs().values() for a in nic if a.family in families}


def _is_own(address: str, own: set[str]) -> bool:
    """Returns whether an address or name is that of this machine.

    Many systems map their own host name to 127.0.1.1. So this machine's host name is compared as text, and a loopback
    address that a name resolves to does not count.
    """
    if ip := as_ip(address):
        return str(ip) in own or ip.is_loopback
    if normalized(address) in (socket.gethostname().lower(), "localhost"):
        return True
    try:
        found = {entry[4][0].split("%")[0] for entry in socket.getaddrinfo(address, None)}
    except OSError:
        return False
    return any(each in own and not ipaddress.ip_address(each).is_loopback for each in found)
