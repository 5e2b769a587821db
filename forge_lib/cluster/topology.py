"""cluster.yaml: the machines of a cluster, and what follows for each of them.

    name: home-lab
    port: 29500                     # on the main machine
    device: auto                    # cpu, cuda, auto
    mixed_precision: auto           # no, bf16, fp16, auto
    machines:                       # the first one is the main machine
      - {name: alice, address: 10.77.0.1, processes: 2}
      - {name: bob, address: 10.77.0.2, processes: 1}
    wireguard: {subnet: 10.88.0.0/24, port: 51820}      # optional

From it comes accelerate's YAML of each machine; `forge_lib/overlay.py` makes the private network that `wireguard` asks
for.
"""

import difflib
import ipaddress
import re
import socket
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from forge_lib.errors import UserError
from forge_lib.process import MULTI_CPU_FIX

PartT = TypeVar("PartT")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "no", "bf16", "fp16")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # becomes a file's name
HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_-]+)*\.?")
MADE_BY = "Made by scripts/make_configs.py"
LOOPBACK_NAMES = ("localhost", "ip6-localhost", "localhost.localdomain")
INTERFACE_LENGTH = 15  # the longest name of a Linux network interface
PLUGINS = ("deepspeed_config", "fsdp_config", "megatron_lm_config", "parallelism_config", "fp8_config")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Machine:
    """A machine of a cluster.

    Attributes:
        name: as its files are called.
        address: IP address or host name by which the others reach it.
        processes: training processes on it.
        rank: its number, 0 for the main machine; its place in the list where it is not given.
        device: cpu, cuda or auto; empty for the cluster's.
        ssh: what `ssh` is to be told to get there; empty for its address.
        folder: of the program there, seen from the home folder; empty for the same one as here.
        python: which runs the program there, seen from that folder.
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
class Overlay:
    """A private network over WireGuard: its addresses, and the UDP port that each machine listens on."""

    subnet: str
    port: int = 51820


@dataclass(frozen=True)
class Cluster:
    """The machines, in the order of their ranks, and what holds for all of them."""

    name: str
    machines: list[Machine]
    port: int = 29500
    device: str = "auto"
    mixed_precision: str = "auto"
    wireguard: Overlay | None = None

    @property
    def main(self) -> Machine:
        """The main machine."""
        return self.machines[0]

    @property
    def num_processes(self) -> int:
        """Processes on all machines."""
        return sum(machine.processes for machine in self.machines)

    def address(self, machine: Machine) -> str:
        """Returns the address by which a run reaches a machine: the overlay's where there is one."""
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
        UserError: naming all that is wrong with it, at once.
    """
    if not path.is_file():
        raise UserError(f"--cluster {path}: no such file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    wrong: list[str] = []
    cluster = _parse(content, wrong)
    if cluster:
        wrong += _find_mistakes(cluster)
    if wrong:
        raise UserError("\n".join(f"{path}: {line}" for line in wrong))
    machines = sorted(cluster.machines, key=lambda machine: machine.rank)
    return Cluster(**vars(cluster) | {"machines": machines})


class _Loader(yaml.SafeLoader):
    """PyYAML's own, but a key that comes twice is an error: the last one would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _parse(content: Any, wrong: list[str]) -> Cluster | None:
    """Makes a cluster of the file's content; what has a wrong key or type is added to `wrong`."""
    if not isinstance(content, dict):
        wrong.append(f"expected lines of `key: value`, found {type(content).__name__}")
        return None
    content = dict(content)
    found = content.get("machines")
    if not isinstance(found, list) or not found:
        wrong.append("machines: expected a list of machines, as in `- {name: alice, address: 10.77.0.1}`")
        found = []
    machines = [_part(Machine, machine, f"machines, number {n}", wrong) for n, machine in enumerate(found, 1)]
    if all(machine and machine.rank == -1 for machine in machines):
        machines = [Machine(**vars(machine) | {"rank": rank}) for rank, machine in enumerate(machines)]
    content["machines"] = [machine for machine in machines if machine]
    if content.get("wireguard") is not None:
        content["wireguard"] = _part(Overlay, content["wireguard"], "wireguard", wrong)
    if content.get("mixed_precision") is False:
        content["mixed_precision"] = "no"  # YAML reads a bare `no` as False
    return _part(Cluster, content, "", wrong)


def _part(part_class: type[PartT], content: Any, where: str, wrong: list[str]) -> PartT | None:
    """Makes a dataclass of a mapping, without the keys that are unknown or mistyped, which are added to `wrong`.

    Returns nothing where a key is missing.
    """
    where = f"{where}: " if where else ""
    if not isinstance(content, dict):
        wrong.append(f"{where}expected `key: value`, found {content!r:.99}")
        return None
    known = {field.name: field for field in fields(part_class)}
    right = {}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            wrong.append(f"{where}unknown key {key!r:.99}{f'; did you mean {near[0]}?' if near else ''}")
        elif known[key].type in (int, str) and type(value) is not known[key].type:
            kind = "a whole number" if known[key].type is int else "text"
            wrong.append(f"{where}{key} is {value!r:.99}, expected {kind}")
        else:
            right[key] = value
    missing = [name for name, field in known.items() if field.default is MISSING and name not in right]
    wrong += [f"{where}{name} is missing" for name in missing if name not in content]
    return None if missing else part_class(**right)


def _find_mistakes(cluster: Cluster) -> list[str]:
    """Returns a line for each value that cannot be."""
    wrong = []
    if not NAME.fullmatch(cluster.name):
        wrong.append(f"name is {cluster.name!r:.99}, expected letters, digits, '-', '_' and '.'")
    wrong += _not_one_of("device", cluster.device, DEVICES)
    wrong += _not_one_of("mixed_precision", cluster.mixed_precision, PRECISIONS)
    wrong += _no_port("port", cluster.port)
    addresses = [_plain_address(machine.address) for machine in cluster.machines]
    for machine, address in zip(cluster.machines, addresses, strict=True):
        who = f"machine {machine.name!r:.99}"
        if not NAME.fullmatch(machine.name):
            wrong.append(f"{who}: expected a name of letters, digits, '-', '_' and '.'")
        if not _as_ip(address) and (not HOST_NAME.fullmatch(address) or re.fullmatch(r"[0-9.]+", address)):
            wrong.append(f"{who}: address {machine.address!r:.99} is neither an IP address nor a host name")
        if (ip := _as_ip(address)) and (ip.is_unspecified or ip.is_multicast):
            wrong.append(f"{who}: {machine.address} is no machine's address; give the one that the others reach")
        if machine.processes < 1:
            wrong.append(f"{who}: processes is {machine.processes}, expected 1 or more")
        if machine.device:
            wrong += _not_one_of(f"{who}: device", machine.device, DEVICES)
    for what, values in (
        ("name", [machine.name.lower() for machine in cluster.machines]),
        ("address", addresses),
        ("rank", [machine.rank for machine in cluster.machines if machine.rank != -1]),
    ):
        for value in sorted({value for value in values if values.count(value) > 1}):
            number = values.count(value)
            wrong.append(f"{number} machines have the {what} {value}; each needs its own")
    ranks = {machine.rank for machine in cluster.machines}
    if ranks not in ({-1}, set(range(len(cluster.machines)))):
        wrong.append(f"ranks: give each machine one, from 0 to {len(cluster.machines) - 1}, or none of them")
    own = [machine for machine, address in zip(cluster.machines, addresses, strict=True) if _is_loopback(address)]
    if own and len(own) < len(cluster.machines):
        main = min(cluster.machines, key=lambda machine: machine.rank)
        wrong += [
            f"{'the main machine' if machine is main else 'machine'} {machine.name!r} has the address "
            f"{machine.address}, by which a machine reaches itself alone; give its address on the network"
            for machine in own
        ]
    return wrong + (_find_overlay_mistakes(cluster) if cluster.wireguard else [])


def _find_overlay_mistakes(cluster: Cluster) -> list[str]:
    overlay = cluster.wireguard
    try:
        network = ipaddress.ip_network(overlay.subnet)
    except ValueError as error:
        return [f"wireguard: subnet is {overlay.subnet!r:.99}, expected a network as 10.88.0.0/24 ({error})"]
    wrong = _no_port("wireguard: port", overlay.port)
    if not network.is_private or network.is_loopback or network.is_link_local:
        wrong.append(f"wireguard: subnet {network} is not private; take one of 10.0.0.0/8, as 10.88.0.0/24")
    if network.num_addresses < len(cluster.machines) + 2:
        wrong.append(f"wireguard: subnet {network} has no room for {len(cluster.machines)} machines")
    for machine in cluster.machines:
        ip = _as_ip(machine.address)
        if ip and ip in network:
            wrong.append(f"wireguard: subnet {network} has the address of {machine.name}, {ip}; take another subnet")
        if len(machine.name) > INTERFACE_LENGTH:
            wrong.append(
                f"machine {machine.name!r} gives its WireGuard interface its name, which may have "
                f"{INTERFACE_LENGTH} characters"
            )
    return wrong


def _not_one_of(what: str, value: str, expected: tuple[str, ...]) -> list[str]:
    return [] if value in expected else [f"{what} is {value!r:.99}, expected {', '.join(expected)}"]


def _no_port(what: str, value: int) -> list[str]:
    return [] if 0 < value < 1 << 16 else [f"{what} is {value}, expected a number from 1 to 65535"]


def _as_ip(address: str) -> Address | None:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip


def _plain_address(address: str) -> str:
    """Returns an address in the one form in which it can be compared."""
    ip = _as_ip(address)
    return str(ip) if ip else address.lower().rstrip(".")


def _is_loopback(address: str) -> bool:
    ip = _as_ip(address)
    return ip.is_loopback if ip else address.lower().rstrip(".") in LOOPBACK_NAMES


# Which machine this is


def find_machine(cluster: Cluster, wanted: str) -> Machine:
    """Returns the machine of that name or, for "auto", the one whose address this machine has.

    Raises:
        UserError: there is none, or more than one.
    """
    names = ", ".join(machine.name for machine in cluster.machines)
    if wanted != "auto":
        found = [machine for machine in cluster.machines if machine.name == wanted]
        if not found:
            raise UserError(f"--machine {wanted}: the cluster has no such machine; it has {names}")
        return found[0]
    own = own_addresses()
    found = [
        machine for machine in cluster.machines if _is_own(machine.address, own) or cluster.address(machine) in own
    ]
    if len(found) == 1:
        return found[0]
    addresses = ", ".join(sorted(address for address in own if not ipaddress.ip_address(address).is_loopback))
    if found:
        those = ", ".join(f"{machine.name} ({machine.address})" for machine in found)
        raise UserError(f"--machine auto: this machine is {those} at once; give --machine NAME, or other addresses")
    theirs = ", ".join(f"{machine.name} {machine.address}" for machine in cluster.machines)
    raise UserError(
        f"--machine auto: this machine ({socket.gethostname()}, {addresses or 'no address'}) has no address of the "
        f"cluster ({theirs}); correct cluster.yaml, or give --machine NAME"
    )


def own_addresses() -> set[str]:
    """Returns the IP addresses of this machine's interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {a.address.split("%")[0] for nic in psutil.net_if_addrs().values() for a in nic if a.family in families}


def _is_own(address: str, own: set[str]) -> bool:
    """Tells whether an address or name is this machine's, whatever its own name means here."""
    if ip := _as_ip(address):
        return str(ip) in own or ip.is_loopback
    host = socket.gethostname()
    if address.lower().rstrip(".") in (host.lower(), "localhost"):
        return True
    try:
        found = {entry[4][0].split("%")[0] for entry in socket.getaddrinfo(address, None)}
    except OSError:
        return False
    return any(one in own and not ipaddress.ip_address(one).is_loopback for one in found)


# accelerate's YAML


def accelerate_config(cluster: Cluster, machine: Machine) -> str:
    """Returns the text of a YAML for `accelerate launch --config_file`."""
    count, own = len(cluster.machines), machine.processes
    lines = [
        f"# {machine.name}, machine {machine.rank} of {count} in {cluster.name}.",
        f"# {MADE_BY}: change cluster.yaml, and make it anew.",
    ]
    if count * own == 1:
        lines += ["distributed_type: 'NO'"]
    else:
        lines += ["# accelerate's word for torchrun, on CPUs too.", "distributed_type: MULTI_GPU"]
    if cluster.device_of(machine) != "auto":
        lines += [f"use_cpu: {str(cluster.device_of(machine) == 'cpu').lower()}"]
    lines += [f"num_machines: {count}", f"machine_rank: {machine.rank}"]
    if count > 1:
        lines += [f"# The {own} of this machine times num_machines, by which accelerate divides it."]
    lines += [f"num_processes: {own * count}"]
    if count > 1:
        lines += [f"main_process_ip: {_quoted(cluster.address(cluster.main))}"]
    lines += [f"main_process_port: {cluster.port}"]
    precision = cluster.mixed_precision
    lines += [f"mixed_precision: {_quoted('no' if precision == 'auto' else precision)}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A YAML scalar that is text, also where it looks like something else (an IPv6 address, `no`)."""
    return yaml.safe_dump(text, default_flow_style=True).removesuffix("...\n").strip()


def find_config_mistakes(path: Path) -> list[str]:
    """Returns what is wrong with an accelerate YAML, such as the wizard writes, for a run of this project.

    Each line names the keys, and what they should be.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        keys = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--check {path}: cannot be read: {reason}") from None
    if not isinstance(keys, dict):
        return ["expected lines of `key: value`"]
    try:
        config = load_config_from_file(str(path))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return [f"accelerate does not take it: {error}"]
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    if "compute_environment" in keys and keys["compute_environment"] != "LOCAL_MACHINE":
        return [f"compute_environment is {keys['compute_environment']}, expected LOCAL_MACHINE"]
    numbers = ("num_processes", "num_machines", "machine_rank", "main_process_port")
    wrong = [
        f"{name} is {keys[name]!r:.99}, expected a whole number"
        for name in numbers
        if name in keys and type(keys[name]) is not int and (keys[name] is not None or name == "machine_rank")
    ]
    if config.num_machines is None or not isinstance(config.dynamo_config, dict):
        wrong.append("num_machines and dynamo_config: expected a whole number, and lines of `key: value`")
    if wrong:
        return wrong
    several = config.num_machines > 1
    if config.num_machines < 1:
        return [f"num_machines is {config.num_machines}, expected 1 or more"]
    if kind == "MULTI_CPU":
        wrong.append(f"distributed_type is MULTI_CPU: {MULTI_CPU_FIX}")
    elif kind not in ("MULTI_GPU", "NO"):
        wrong.append(f"distributed_type is {kind}; training here is data-parallel, on GPUs or CPUs: MULTI_GPU")
    elif kind == "NO" and (several or config.num_processes > 1):
        wrong.append(
            f"distributed_type is NO, which starts one process; with num_machines {config.num_machines} and "
            f"num_processes {config.num_processes} it must be MULTI_GPU"
        )
    wrong += [
        f"{name} is given, but not used: training here is data-parallel alone" for name in PLUGINS if keys.get(name)
    ]
    if kind.startswith("MULTI") and config.num_processes < 1:
        wrong.append("num_processes is missing: the processes of all machines together")
    elif several and config.num_processes % config.num_machines:
        wrong.append(
            f"num_processes {config.num_processes} is not a multiple of num_machines {config.num_machines}; each "
            "machine starts their quotient: give the number of its own processes times num_machines"
        )
    if not 0 <= config.machine_rank < config.num_machines:
        wrong.append(
            f"machine_rank is {config.machine_rank}; with num_machines {config.num_machines} it is from 0 to "
            f"{config.num_machines - 1}"
        )
    if several and not config.main_process_ip:
        wrong.append("main_process_ip is missing: the main machine's address")
    elif several and _is_loopback(str(config.main_process_ip)):
        wrong.append(
            f"main_process_ip is {config.main_process_ip}, by which a machine reaches itself alone: give the main "
            "machine's address on the network"
        )
    address = str(config.main_process_ip or "")
    ip = _as_ip(address)
    if several and address and not ip and (not HOST_NAME.fullmatch(address) or re.fullmatch(r"[0-9.]+", address)):
        wrong.append(
            f"main_process_ip is {address!r:.99}, expected an IP address or a name, without port and brackets"
        )
    if several and ip and ip.is_unspecified:
        wrong.append(f"main_process_ip is {address}, which is no machine's address: give the main machine's")
    if config.main_process_port and not 0 < config.main_process_port < 1 << 16:
        wrong.append(f"main_process_port is {config.main_process_port}, expected a number from 1 to 65535")
    if str(config.mixed_precision) == "fp16" and config.use_cpu:
        wrong.append("mixed_precision is fp16, which needs GPUs; with use_cpu it is no or bf16")
    if several and not config.main_process_port:
        wrong.append("main_process_port is missing: a free port of the main machine, the same on each machine")
    if several and config.rdzv_backend != "static":
        wrong.append(f"rdzv_backend is {config.rdzv_backend}, which accelerate reads from no file: take the line out")
    if str(config.mixed_precision) not in ("None", "no", "bf16", "fp16", "False"):
        wrong.append(f"mixed_precision is {config.mixed_precision}, expected no, bf16 or fp16")
    dynamo = config.dynamo_config.get("dynamo_backend", "NO")
    if dynamo != "NO":
        wrong.append(f"dynamo_config asks for {dynamo}, which is not used; train.py has --compile")
    return wrong
