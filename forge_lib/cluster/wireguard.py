"""A private network for machines that meet over others' networks: WireGuard, and a firewall around a run."""

import base64
import ipaddress
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from forge_lib.cluster.topology import Cluster, Machine
from forge_lib.errors import UserError

KEEPALIVE_SECONDS = 25  # a home router forgets a silent UDP link after about 30 s
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def make_key(private: Path, public: Path) -> None:
    """Makes a WireGuard key pair with `wg`; a private key that is there already stays.

    Args:
        private: its file, which its owner alone may read; it never leaves this machine.
        public: its file, for all machines.

    Raises:
        UserError: `wg` is not installed, or a file cannot be written.
    """
    if not shutil.which("wg"):
        raise UserError(
            "wireguard in cluster.yaml needs the program `wg` (Debian, Ubuntu: apt install wireguard-tools)"
        )
    try:
        if not private.exists():
            key = subprocess.run(["wg", "genkey"], capture_output=True, text=True, check=True).stdout
            with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(key)
        private.chmod(0o600)
        found = subprocess.run(["wg", "pubkey"], input=private.read_text(), capture_output=True, text=True)
        if found.returncode:
            raise UserError(f"{private} is no WireGuard key: {found.stderr.strip()}")
        public.parent.mkdir(parents=True, exist_ok=True)
        public.write_text(found.stdout)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None


def read_public_keys(cluster: Cluster, folder: Path) -> dict[str, str]:
    """Returns the public keys that are in a folder, by machine.

    Raises:
        UserError: a file holds no key, or two machines have the same one.
    """
    keys: dict[str, str] = {}
    for machine in cluster.machines:
        path = folder / f"{machine.name}.pub"
        if not path.exists():
            continue
        key = path.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch("[A-Za-z0-9+/]{43}=", key) or len(base64.b64decode(key)) != 32:
            raise UserError(f"{path} holds no WireGuard public key")
        for other, its_key in keys.items():
            if its_key == key:
                raise UserError(f"{path}: {machine.name} and {other} have the same key; each machine makes its own")
        keys[machine.name] = key
    return keys


def wireguard_config(
    cluster: Cluster, machine: Machine, private_key: str, public_keys: dict[str, str], firewall_path: Path
) -> str:
    """Returns the text of a `wg-quick` configuration; it holds the private key, and takes the firewall up and away."""
    overlay = cluster.wireguard
    network = ipaddress.ip_network(overlay.subnet)
    lines = [
        f"# {machine.name} in {cluster.name}. It holds a private key: it stays on {machine.name}.",
        "[Interface]",
        f"Address = {cluster.address(machine)}/{network.prefixlen}",
        f"ListenPort = {overlay.port}",
        f"PrivateKey = {private_key}",
        f"PostUp = nft -f {shlex.quote(str(firewall_path.resolve()))}",
        f"PostDown = nft delete table {_table(cluster)}",
    ]
    for peer in cluster.machines:
        if peer is machine:
            continue
        host = f"[{peer.address}]" if ":" in peer.address else peer.address
        lines += [
            "",
            f"# {peer.name}",
            "[Peer]",
            f"PublicKey = {public_keys[peer.name]}",
            f"Endpoint = {host}:{overlay.port}",
            f"AllowedIPs = {cluster.address(peer)}/{network.max_prefixlen}",
            f"PersistentKeepalive = {KEEPALIVE_SECONDS}",
        ]
    return "\n".join(lines) + "\n"


def _table(cluster: Cluster) -> str:
    return f"inet p2p_llm_forge_{re.sub('[^A-Za-z0-9_]', '_', cluster.name)}"


def firewall(cluster: Cluster, machine: Machine) -> str:
    """Returns an nftables file that lets connections to the ports of a run in over the overlay alone.

    gloo, NCCL and the launcher listen on ports that the kernel chooses; those are closed too, and with them whatever
    other program listens there.
    """
    first, last = map(int, EPHEMERAL_PORTS.read_text().split()) if EPHEMERAL_PORTS.exists() else (32768, 60999)
    ports = f"{first}-{last}" if first <= cluster.port <= last else f"{cluster.port}, {first}-{last}"
    table = _table(cluster)
    return f"""#!/usr/sbin/nft -f
# {machine.name} in {cluster.name}: the ports of a run are open to its WireGuard interface alone. So are those of any
# other program in the same range. `wg-quick` takes this up and away with the network: {machine.name}.conf.
table {table}
delete table {table}
table {table} {{
    chain input {{
        type filter hook input priority -10; policy accept;
        iifname {{ "lo", "{machine.name}" }} accept
        # New connections to the main port, and to those that the kernel gives to gloo and NCCL.
        tcp flags & (fin | syn | rst | ack) == syn tcp dport {{ {ports} }} drop
    }}
}}
"""
