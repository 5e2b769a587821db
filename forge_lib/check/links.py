"""Measures the links between machines: round-trip time and bandwidth over plain TCP, on ports that the kernel chooses.

gloo and NCCL use such ports too, so this also finds a firewall that opens only the cluster's port.
"""

import socket
import statistics
import time
from collections import deque
from dataclasses import dataclass, field, replace

from forge_lib.distributed.peers import Peers
from forge_lib.errors import explain_connection_error

CONNECT_SECONDS = 5.0
SILENT_SECONDS = 20.0  # a link that carries nothing for this time is broken
NUM_PINGS = 20
WARM_SECONDS = 0.5  # not measured: TCP starts slowly, and routers let the first data pass at once
STREAM_SECONDS = 2.0
CHUNK_BYTES = 1 << 18


class LinkError(OSError):
    """A link between two machines does not work; the message describes the failure."""


@dataclass(frozen=True)
class Link:
    """The link from one machine to another, as measured; `error` is empty if it works.

    Attributes:
        sender, receiver: names of the machines.
        bytes_per_second: data that arrives at the receiver, without the headers of TCP and IP.
        round_trip_seconds: until an answer of one byte arrives at the sender.
        error: how the link fails.
    """

    sender: str
    receiver: str
    bytes_per_second: float | None = None
    round_trip_seconds: float | None = None
    error: str | None = None


@dataclass
class MeasuredLinks:
    """What one machine measured at its end of its links; the machines send this to each other."""

    links: list[Link] = field(default_factory=list)

    def __post_init__(self):
        self.links = [Link(**each) if isinstance(each, dict) else each for each in self.links]


@dataclass(frozen=True)
class Listener:
    """The port on which a machine waits for the streams of the others."""

    port: int


def measure_links(names: list[str], addresses: list[str], peers: Peers) -> list[Link]:
    """Measures the links between all pairs of machines in both directions; call on all machines.

    Pairs without a common machine are measured at the same time.

    Args:
        names: of the machines, by rank.
        addresses: IP addresses of the machines, by rank.
        peers: one process per machine.
    """
    if len(names) == 1:
        return []
    own, measured = peers.world.process_index, MeasuredLinks()
    with listen(addresses[own]) as listener:
        ports = [each.port for each in peers.all_gather(Listener(listener.getsockname()[1]), "ports")]
        for number, pairs in enumerate(rounds(len(names))):
            for direction, turn in enumerate((pairs, [(b, a) for a, b in pairs])):
                peers.set_status("measuring its links")
                peers.barrier(f"links/{number}/{direction}")
                for sender, receiver in turn:
                    link = Link(names[sender], names[receiver])
                    try:
                        if own == sender:
                            seconds = send(addresses[receiver], ports[receiver])
                            measured.links.append(replace(link, round_trip_seconds=seconds))
                        elif own == receiver:
                            measured.links.append(replace(link, bytes_per_second=receive(listener)))
                    except LinkError as error:
                        measured.links.append(replace(link, error=str(error)))
        gathered = peers.all_gather(measured, "links")
    ends = [{(link.sender, link.receiver): link for link in each.links} for each in gathered]
    pairs = [(a, b) for a in range(len(names)) for b in range(len(names)) if a != b]
    return [_join_ends(*(ends[n][names[a], names[b]] for n in (a, b))) for a, b in pairs]


def _join_ends(sent: Link, received: Link) -> Link:
    """Returns a link with what its sender and what its receiver measured."""
    return replace(received, round_trip_seconds=sent.round_trip_seconds, error=sent.error or received.error)


def describe_failure(link: Link, port: int) -> str:
    """Returns a sentence about a broken link between machines that reached each other at the cluster's port."""
    return (
        f"{link.sender} cannot reach {link.receiver}: {link.error} at a port that the kernel chooses, although port "
        f"{port} is open; gloo and NCCL need all TCP ports between the machines"
    )


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Returns rounds of (sender, receiver) that contain each pair of machines once, and no machine twice in a round.

    The circle method of tournaments: count - 1 rounds, or count if that is odd.
    """
    ring = deque(range(count + count % 2))  # the last one of an odd count stays without a partner
    found = []
    for _ in range(len(ring) - 1):
        pairs = [(ring[i], ring[-1 - i]) for i in range(len(ring) // 2)]
        found.append([pair for pair in pairs if max(pair) < count])
        first = ring.popleft()
        ring.rotate(1)
        ring.appendleft(first)
    return found


def listen(address: str) -> socket.socket:
    """Returns a socket that listens on an IP address, on a port that the kernel chooses."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family)


def send(address: str, port: int) -> float:
    """Sends pings and a stream to a machine that calls `receive`; returns the median round-trip time in seconds.

    Raises:
        LinkError: no connection is possible, or the link breaks or carries nothing.
    """
    try:
        connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
    except OSError as error:
        raise LinkError(explain_connection_error(error)[0]) from None
    with connection:
        _prepare(connection)
        try:
            seconds = [_ping(connection) for _ in range(NUM_PINGS)]
        except OSError as error:
            raise LinkError(str(error)) from None
        chunk = bytes(CHUNK_BYTES)
        try:
            while True:
                connection.sendall(chunk)
        except TimeoutError:
            raise LinkError(f"no data passes for {SILENT_SECONDS:g} s") from None
        except OSError:
            return statistics.median(seconds)  # the receiver has measured enough, and closed the connection


def _ping(connection: socket.socket) -> float:
    start = time.perf_counter()
    connection.sendall(b".")
    if not connection.recv(1):
        raise LinkError("the connection breaks")
    return time.perf_counter() - start


def receive(listener: socket.socket) -> float:
    """Receives what one `send` sends; returns the bytes per second that arrive, without the headers of TCP and IP.

    Raises:
        LinkError: no connection arrives, or the link breaks or carries nothing.
    """
    listener.settimeout(CONNECT_SECONDS + 1)
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        raise LinkError("no connection arrives") from None
    with connection:
        _prepare(connection)
        try:
            for _ in range(NUM_PINGS):
                if not connection.recv(1):
                    raise LinkError("the connection breaks")
                connection.sendall(b".")
            return _receive_stream(connection)
        except TimeoutError:
            raise LinkError(f"no data arrives for {SILENT_SECONDS:g} s") from None
        except LinkError:
            raise
        except OSError as error:
            raise LinkError(error.strerror or str(error)) from None


def _receive_stream(connection: socket.socket) -> float:
    buffer, num_bytes, begun = bytearray(CHUNK_BYTES), 0, None
    while True:
        size = connection.recv_into(buffer)
        now = time.perf_counter()
        if not size:
            raise LinkError("the connection breaks")
        begun = begun or now
        if now - begun < WARM_SECONDS:
            first = now
            continue
        num_bytes += size
        if now - begun > STREAM_SECONDS:
            return num_bytes / (now - first)


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(SILENT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
