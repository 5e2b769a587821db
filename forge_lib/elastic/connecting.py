"""How a peer starts: its own address, and the lighthouse if this machine runs it."""

import contextlib
import ipaddress
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from forge_lib.distributed.network import route_address
from forge_lib.errors import UserError

FREE_SECONDS = 5.0  # how long a lighthouse of an earlier start may take to end
LIGHTHOUSE_SECONDS = 60.0  # how long the lighthouse may take to start


def own_address(wanted: str, host: str, port: int) -> str:
    """Returns the IP address at which the others reach this peer.

    Args:
        wanted: --peer-address; empty: the address on the route to the lighthouse.
        host, port: of the lighthouse.

    Raises:
        UserError: the name does not resolve, there is no route, or it is a loopback address, which others cannot use.
    """
    name = wanted or host
    try:
        address = route_address(host, port)
        if wanted:
            address = socket.getaddrinfo(wanted, port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise UserError(f"this machine has no route to {name}: {error.strerror}; correct --lighthouse") from None
    is_local = host == "localhost" or host.startswith("127.") or host == "::1"
    if ipaddress.ip_address(address.split("%")[0]).is_loopback and not is_local:
        raise UserError(
            f"{name} resolves to {address} on this machine, which other machines cannot reach: give this machine's IP "
            "address on the network with --peer-address, or in cluster.yaml"
        )
    return address


@contextlib.contextmanager
def running_lighthouse(port: int) -> Iterator[None]:
    """Runs the lighthouse in a child process; it ends with this process.

    Raises:
        UserError: it did not start.
    """
    until = time.monotonic() + FREE_SECONDS
    while is_listening(port):
        if time.monotonic() > until:
            raise UserError(f"the lighthouse cannot listen on port {port}: another program uses it")
        time.sleep(0.1)
    words = [sys.executable, "-m", "forge_lib.elastic.membership", str(port), "--with-parent"]
    process = subprocess.Popen(words, start_new_session=True)
    try:
        until = time.monotonic() + LIGHTHOUSE_SECONDS
        while process.poll() is None and time.monotonic() < until and not is_listening(port):
            time.sleep(0.05)
        if process.poll() is not None:
            raise UserError(f"the lighthouse on port {port} did not start; its own message gives the reason")
        yield
    finally:
        process.terminate()
        process.wait()


def is_listening(port: int) -> bool:
    """Returns whether a program on this machine listens on a port."""
    try:
        socket.create_connection(("localhost", port), timeout=1).close()
    except OSError:
        return False
    return True
