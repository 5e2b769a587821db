"""How a peer starts: its own address, and the lighthouse if this machine runs it."""

import contextlib
import ipaddress
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil

from forge_lib.distributed.network import route_address
from forge_lib.elastic.membership import split_address
from forge_lib.elastic.peer_facts import Member
from forge_lib.errors import UserError

logger = logging.getLogger("forge")

FREE_SECONDS = 5.0  # how long a lighthouse of an earlier start may take to end
LIGHTHOUSE_SECONDS = 60.0  # how long the lighthouse may take to start
PROBE_SECONDS = 3.0  # to connect to another machine


def own_address(wanted: str, urls: Sequence[str]) -> str:
    """Returns the IP address at which the others reach this peer.

    Args:
        wanted: --peer-address; empty: the address on the route to a lighthouse.
        urls: of --lighthouse; the first one to which there is a route counts.

    Raises:
        UserError: the name does not resolve, there is no route, or it is a loopback address, which others cannot use.
    """
    address, failed = "", ""
    for host, port in map(split_address, urls):
        name = wanted or host
        try:
            address = route_address(host, port) if not wanted else _resolve(wanted, port)
            break
        except OSError as error:
            flag = "--peer-address" if wanted else "--lighthouse"
            failed = failed or f"this machine has no route to {name}: {error.strerror}; correct {flag}"
    if not address:
        raise UserError(failed)
    is_local = host == "localhost" or host.startswith("127.") or host == "::1"
    if ipaddress.ip_address(address.split("%")[0]).is_loopback and not is_local:
        raise UserError(
            f"{name} resolves to {address} on this machine, which other machines cannot reach: give this machine's IP "
            "address on the network with --peer-address, or in cluster.yaml"
        )
    return address


def _resolve(name: str, port: int) -> str:
    return socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][4][0]


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
        if not is_listening(port):
            raise UserError(f"the lighthouse on port {port} did not start; its own message gives the reason")
        yield
    finally:
        process.terminate()
        process.wait()


def is_listening(port: int, host: str = "localhost", timeout_seconds: float = 1.0) -> bool:
    """Returns whether a program listens on a port of a machine; False too if the machine cannot be reached."""
    try:
        socket.create_connection((host, port), timeout_seconds).close()
    except OSError:
        return False
    return True


def find_unreachable(members: Sequence[Member]) -> list[str]:
    """Returns the identifiers of the members to whose server of the state this machine cannot connect."""
    if not members:
        return []
    with ThreadPoolExecutor(len(members)) as pool:
        calls = [pool.submit(is_listening, m.facts.http_port, m.facts.address, PROBE_SECONDS) for m in members]
    return [member.id for member, call in zip(members, calls, strict=True) if not call.result()]


def should_serve(urls: Sequence[str]) -> int:
    """Returns the port of the lighthouse that this machine serves; 0: another one of the addresses has one already.

    Two lighthouses at the same time would divide the peers into two groups that do not know of each other.

    Args:
        urls: of --lighthouse; if there are several, one of them is an address of this machine.

    Raises:
        UserError: none of them is.
    """
    if len(urls) == 1:
        host, port = split_address(urls[0])
        if not is_own(host):
            logger.warning(
                f"--serve-lighthouse: {host} of --lighthouse is no address of this machine: the peers find its "
                "lighthouse only if something forwards that address to it"
            )
        return port
    own_port, running = 0, ""
    for url in urls:
        host, port = split_address(url)
        if not own_port and is_own(host):
            own_port = port
        elif is_listening(port, host, PROBE_SECONDS):
            running = running or url
    if not own_port:
        raise UserError(
            f"--serve-lighthouse: no address in --lighthouse {','.join(urls)} is one of this machine; name the "
            "address at which the others reach it"
        )
    if running:
        logger.info(f"the lighthouse {running} runs already; this machine starts none")
        return 0
    return own_port


def is_own(host: str) -> bool:
    """Returns whether a name or an IP address is this machine's."""
    try:
        found = {each[4][0].split("%")[0] for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    own = {each.address.split("%")[0] for addresses in psutil.net_if_addrs().values() for each in addresses}
    return bool(found & own) or any(ipaddress.ip_address(each).is_loopback for each in found)
