"""The TCP ports that runs on a cluster use."""

from dataclasses import dataclass
from pathlib import Path

from forge_lib.cluster.cluster_file import Cluster

KERNEL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True)
class Port:
    """A port on which the machines of a cluster accept connections.

    Attributes:
        first, last: its number, or a range of numbers from which the kernel chooses.
        machine: name of the machine that uses it; empty: all machines.
        purpose: what uses it.
        setting: what changes its number.
    """

    first: int
    last: int
    machine: str
    purpose: str
    setting: str


def kernel_ports() -> tuple[int, int]:
    """Returns the range from which the kernel chooses a port for a program that asks for any; both are included."""
    first, last = KERNEL_PORTS.read_text().split() if KERNEL_PORTS.exists() else (32768, 60999)
    return int(first), int(last)


def used_ports(cluster: Cluster) -> list[Port]:
    """Returns the ports that train.py and train_elastic.py use on the machines of a cluster."""
    lighthouse, peer = cluster.lighthouse_port, cluster.peer_port
    return [
        Port(cluster.port, cluster.port, cluster.main.name, "train.py", "port in cluster.yaml"),
        *(
            Port(
                lighthouse,
                lighthouse,
                machine.name,
                "lighthouse of train_elastic.py",
                "lighthouse_port in cluster.yaml",
            )
            for machine in cluster.lighthouse_machines
        ),
        Port(peer, peer + 1, "", "peers of train_elastic.py", "peer_port in cluster.yaml"),
        Port(*kernel_ports(), "", "gloo and NCCL", "sysctl net.ipv4.ip_local_port_range"),
    ]
