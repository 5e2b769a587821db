"""What tests do to machines with their own network; forge_lib/benchmark/hosts.py makes them."""

import subprocess
import sys

from forge_lib.benchmark.hosts import Hosts, shape

__all__ = ["Hosts", "filter_input", "shape", "throw_garbage"]

SEND_GARBAGE = """
import os, socket, subprocess, sys
for address, ports in zip(sys.argv[1::2], sys.argv[2::2]):
    for port in map(int, ports.split(",")):
        for data in (os.urandom(1000), b"GET / HTTP/1.0\\r\\n\\r\\n", b""):
            try:
                with socket.create_connection((address, port), timeout=1) as link:
                    link.sendall(data)
                    print("sent", address, port, len(data))
            except OSError as error:
                print(address, port, error)
"""


def filter_input(machines: Hosts, n: int, rule: str) -> None:
    """Adds an nftables rule for what machine n receives. Needs nft."""
    machines.call(n, "nft add table ip t")
    machines.call(n, "nft add chain ip t c { type filter hook input priority 0 ; }")
    machines.call(n, f"nft add rule ip t c {rule}")


def throw_garbage(machines: Hosts, stranger: int, addresses: list[str]) -> None:
    """Sends garbage from a machine outside the run to every port that the machines 1, 2, … listen on."""
    words = []
    for n, address in enumerate(addresses, 1):
        listed = machines.call(n, "ss -Htln")
        ports = {line.split()[3].rpartition(":")[2] for line in listed.splitlines()}
        words += [address, ",".join(sorted(ports))]
    command = [*machines.on(stranger), sys.executable, "-c", SEND_GARBAGE, *words]
    sent = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert f"sent {addresses[0]}" in sent, sent
