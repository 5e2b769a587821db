"""Which network interface and IP address this machine uses towards another machine, and whether that is public."""

import ipaddress
import os
import socket
from pathlib import Path

import psutil

from forge_lib.errors import UserError
from forge_lib.process import World

# Networks that are not reachable from the internet: private, shared (as Tailscale uses), link-local and loopback.
PRIVATE_NETWORKS = [
    ipaddress.ip_network(network)
    for network in (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "169.254.0.0/16",
        "127.0.0.0/8",
        "fc00::/7",
        "fe80::/10",
        "::1/128",
    )
]
ARPHRD_NONE = "65534"  # Linux's type of an interface without a link layer: WireGuard and other tunnels


def route_address(host: str, port: int) -> str:
    """Returns this machine's IP address on the route to a host. It asks the kernel and sends nothing to the host.

    Args:
        host: a name or an IP address.
        port: any UDP port.

    Raises:
        socket.gaierror: the name does not resolve on this machine (an OSError too).
        OSError: this machine has no route to the host.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # a UDP socket only looks up the route
        return probe.getsockname()[0]


def choose_interface(world: World) -> tuple[str, str]:
    """Makes gloo and NCCL use the interface that routes to the main machine, unless the user has named another one.

    By default gloo binds to the address that this machine's own hostname resolves to, which is often wrong.

    Returns:
        (name of the interface, this machine's IP address on that route), both empty for a single process.

    Raises:
        UserError: the main machine's name does not resolve or resolves to loopback, or there is no route to it.
    """
    if world.num_processes == 1:
        return "", ""
    name = world.main_address
    try:
        own = route_address(name, world.main_port)
    except socket.gaierror:
        raise UserError(
            f"the main machine's name {name!r} does not resolve on {socket.gethostname()}; give its IP address "
            "instead (main_process_ip, or --master-addr)"
        ) from None
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} has no route to the main machine {name}: {error.strerror}; connect the network, "
            "or correct the address (main_process_ip, or --master-addr)"
        ) from None
    several_machines = world.num_local_processes < world.num_processes
    if several_machines and own.startswith("127.") and name not in ("localhost", own) and not name.startswith("127."):
        raise UserError(
            f"the main machine's name {name!r} resolves to the loopback address {own} on {socket.gethostname()}, "
            "which other machines cannot reach; give its IP address on the network (main_process_ip, or "
            "--master-addr)"
        )
    interface = interface_of(own)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    return os.environ.get("GLOO_SOCKET_IFNAME", interface), own


def interface_of(address: str) -> str:
    """Returns the name of this machine's network interface that has an IP address, or an empty string."""
    nics = psutil.net_if_addrs().items()
    return next((nic for nic, addresses in nics if any(a.address.split("%")[0] == address for a in addresses)), "")


def is_public(address: str) -> bool:
    """Returns whether one of this machine's IP addresses is neither private nor on a tunnel such as WireGuard."""
    if not address:
        return False
    ip = ipaddress.ip_address(address.split("%")[0])
    kind = Path("/sys/class/net") / interface_of(address) / "type"
    is_tunnel = kind.is_file() and kind.read_text().strip() == ARPHRD_NONE
    return not is_tunnel and not any(ip in network for network in PRIVATE_NETWORKS)


def public_address_warning(address: str, port: int) -> str:
    """Returns the warning for a main machine with a public IP address."""
    return (
        f"anyone who can reach {address} port {port} can join this run and read its data, because that IP address is "
        "public; close the port with a firewall, or train over WireGuard (docs/clusters.md)"
    )
