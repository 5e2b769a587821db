"""WireGuard: a private network over untrusted networks, and a firewall for a run's ports."""

import base64
import ipaddress
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from forge_lib.cluster.cluster_file import Cluster, Machine
from forge_lib.cluster.ports import kernel_ports, used_ports
from forge_lib.errors import UserError, as_user_error

KEEPALIVE_SECONDS = 25  # a home router drops an idle UDP mapping after about 30 s


def make_key(private: Path, public: Path) -> None:
    """Makes a WireGuard key pair with the program `wg`. An existing private key is kept.

    Args:
        private: file of the private key. Only its owner may read it, and it never leaves this machine.
        public: file of the public key, for all machines.

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
            raise UserError(f"{private} is not a WireGuard key: {found.stderr.strip()}")
        public.parent.mkdir(parents=True, exist_ok=True)
        public.write_text(found.stdout)
    except OSError as error:
        raise as_user_error(error) from None


def read_public_keys(cluster: Cluster, folder: Path) -> dict[str, str]:
    """Returns the public keys in a folder, by machine name; machines without a file are left out.

    Raises:
        UserError: a file does not hold a key, or two machines have the same key.
    """
    keys: dict[str, str] = {}
    for machine in cluster.machines:
        path = folder / f"{machine.name}.pub"
        if not path.exists():
            continue
        key = path.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch("[A-Za-z0-9+/]{43}=", key) or len(base64.b64decode(key)) != 32:
            raise UserError(f"{path} does not hold a WireGuard public key")
        for other, other_key in keys.items():
            if other_key == key:
                raise UserError(f"{path}: {machine.name} and {other} have the same key; each machine makes its own")
        keys[machine.name] = key
    return keys


def wireguard_config(
    cluster: Cluster, machine: Machine, private_key: str, public_keys: dict[str, str], firewall_path: Path
) -> str:
    """Returns the text of a `wg-quick` configuration, which contains the private key and also sets up the firewall."""
    wireguard = cluster.wireguard
    network = ipaddress.ip_network(wireguard.subnet)
    lines = [
        f"# {machine.name} in {cluster.name}. It contains a private key: keep it on {machine.name}.",
        "[Interface]",
        f"Address = {cluster.address(machine)}/{network.prefixlen}",
        f"ListenPort = {wireguard.port}",
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
            f"Endpoint = {host}:{wireguard.port}",
            f"AllowedIPs = {cluster.address(peer)}/{network.max_prefixlen}",
            f"PersistentKeepalive = {KEEPALIVE_SECONDS}",
        ]
    return "\n".join(lines) + "\n"


def _table(cluster: Cluster) -> str:
    return f"inet p2p_llm_forge_{re.sub('[^A-Za-z0-9_]', '_', cluster.name)}"


def firewall(cluster: Cluster, machine: Machine) -> str:
    """Returns an nftables file that accepts connections to a run's ports only over the WireGuard network.

    gloo, NCCL and the launcher listen on ports that the kernel chooses. The whole range of such ports is closed, also
    for other programs that listen there, and so are the ports of train.py and train_elastic.py.
    """
    first, last = kernel_ports()
    others = [port for port in used_ports(cluster) if not first <= port.first <= port.last <= last]
    ranges = [(port.first, port.last) for port in others] + [(first, last)]
    ports = ", ".join(str(start) if start == stop else f"{start}-{stop}" for start, stop in ranges)
    table = _table(cluster)
    return f"""#!/usr/sbin/nft -f
# {machine.name} in {cluster.name}: the ports of a run are open only to its WireGuard interface, and so are those of
# any other program in the same range. `wg-quick up` loads this file, `wg-quick down` removes it: {machine.name}.conf.
table {table}
delete table {table}
table {table} {{
    chain input {{
        type filter hook input priority -10; policy accept;
        iifname {{ "lo", "{machine.name}" }} accept
        # New connections to the ports of train.py and train_elastic.py, and to those that gloo and NCCL get.
        tcp flags & (fin | syn | rst | ack) == syn tcp dport {{ {ports} }} drop
    }}
}}
"""
