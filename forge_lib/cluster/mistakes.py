"""Finds values in a cluster.yaml that cannot work, each with its fix."""

import ipaddress
import re
from typing import TYPE_CHECKING

from forge_lib.cluster.addresses import as_ip, is_address, is_loopback, is_valid_port, normalized

if TYPE_CHECKING:
    from forge_lib.cluster.cluster_file import Cluster, Machine

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "no", "bf16", "fp16")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # also a file name
INTERFACE_LENGTH = 15  # characters in the name of a Linux network interface, at most


def find_mistakes(cluster: "Cluster") -> list[str]:
    """Returns a line for each value of a cluster that cannot work. Types and unknown keys are checked before."""
    mistakes = []
    if not NAME.fullmatch(cluster.name):
        mistakes.append(f"name is {cluster.name!r:.99}, expected letters, digits, '-', '_' and '.'")
    mistakes += _check_choice("device", cluster.device, DEVICES)
    mistakes += _check_choice("mixed_precision", cluster.mixed_precision, PRECISIONS)
    for name in ("port", "lighthouse_port", "peer_port"):
        mistakes += _check_port(name, getattr(cluster, name))
    for name in cluster.lighthouse.split(",") if cluster.lighthouse else ():
        mistakes += _check_choice("lighthouse", name.strip(), tuple(each.name for each in cluster.machines))
    for machine in cluster.machines:
        mistakes += _check_machine(machine)
    mistakes += _check_differences(cluster.machines)
    mistakes += _check_loopback(cluster.machines)
    return mistakes + (_check_wireguard(cluster) if cluster.wireguard else [])


def _check_machine(machine: "Machine") -> list[str]:
    mistakes, who = [], f"machine {machine.name!r:.99}"
    if not NAME.fullmatch(machine.name):
        mistakes.append(f"{who}: expected a name of letters, digits, '-', '_' and '.'")
    ip = as_ip(machine.address)
    if not is_address(normalized(machine.address)):
        mistakes.append(f"{who}: address {machine.address!r:.99} is neither an IP address nor a host name")
    if ip and (ip.is_unspecified or ip.is_multicast):
        mistakes.append(f"{who}: {machine.address} is no machine's address; give the one that other machines use")
    if machine.processes < 1:
        mistakes.append(f"{who}: processes is {machine.processes}, expected 1 or more")
    if machine.device:
        mistakes += _check_choice(f"{who}: device", machine.device, DEVICES)
    return mistakes


def _check_differences(machines: "list[Machine]") -> list[str]:
    """Checks that no two machines share a name, an address or a rank."""
    mistakes = []
    for what, values in (
        ("name", [machine.name.lower() for machine in machines]),
        ("address", [normalized(machine.address) for machine in machines]),
        ("rank", [machine.rank for machine in machines if machine.rank != -1]),
    ):
        for value in sorted({value for value in values if values.count(value) > 1}):
            mistakes.append(f"{values.count(value)} machines have the {what} {value}; each needs its own")
    ranks = {machine.rank for machine in machines}
    if ranks not in ({-1}, set(range(len(machines)))):
        mistakes.append(f"ranks: give each machine one, from 0 to {len(machines) - 1}, or none of them")
    return mistakes


def _check_loopback(machines: "list[Machine]") -> list[str]:
    found = [machine for machine in machines if is_loopback(machine.address)]
    if len(found) == len(machines):  # a cluster on one machine, for a test
        return []
    main = min(machines, key=lambda machine: machine.rank)
    return [
        f"{'the main machine' if machine is main else 'machine'} {machine.name!r} has the loopback address "
        f"{machine.address}, which other machines cannot use; give its address on the network"
        for machine in found
    ]


def _check_wireguard(cluster: "Cluster") -> list[str]:
    wireguard = cluster.wireguard
    try:
        network = ipaddress.ip_network(wireguard.subnet)
    except ValueError as error:
        return [f"wireguard: subnet is {wireguard.subnet!r:.99}, expected a network such as 10.88.0.0/24 ({error})"]
    mistakes = _check_port("wireguard: port", wireguard.port)
    if not network.is_private or network.is_loopback or network.is_link_local:
        mistakes.append(f"wireguard: subnet {network} is not private; take one inside 10.0.0.0/8, as 10.88.0.0/24")
    if network.num_addresses < len(cluster.machines) + 2:
        mistakes.append(f"wireguard: subnet {network} has no room for {len(cluster.machines)} machines")
    for machine in cluster.machines:
        ip = as_ip(machine.address)
        if ip and ip in network:
            mistakes.append(
                f"wireguard: subnet {network} contains the address of {machine.name}, {ip}; take another subnet"
            )
        if len(machine.name) > INTERFACE_LENGTH:
            mistakes.append(
                f"machine {machine.name!r}: its WireGuard interface has the same name, which may have at most "
                f"{INTERFACE_LENGTH} characters; give it a shorter name"
            )
    return mistakes


def _check_choice(what: str, value: str, expected: tuple[str, ...]) -> list[str]:
    return [] if value in expected else [f"{what} is {value!r:.99}, expected {', '.join(expected)}"]


def _check_port(what: str, value: int) -> list[str]:
    return [] if is_valid_port(value) else [f"{what} is {value}, expected a number from 1 to 65535"]
