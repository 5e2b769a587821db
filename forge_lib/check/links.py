"""Latency and bandwidth of the links between machines, over plain TCP on ports that the kernel chooses.

gloo and NCCL listen on such ports too: a firewall that opens the cluster's port alone is found here.
"""

import socket
import statistics
import time
from collections import deque

CONNECT_SECONDS = 5.0
SILENT_SECONDS = 20.0  # a link that gives nothing for so long is cut
NUM_PINGS = 20
WARM_SECONDS = 0.5  # of a stream: TCP's start, and what a router passes on at once
STREAM_SECONDS = 2.0
CHUNK_BYTES = 1 << 18


class LinkError(OSError):
    """A link between two machines does not carry; the message says how it fails."""


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Returns rounds of (sender, receiver), in which each takes part once at the most, so that each pair meets once.

    The circle method of tournaments: count - 1 rounds, or count where that is odd.
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
    """Returns a socket that listens on this address, on a port that the kernel chooses."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family)


def send(address: str, port: int) -> float:
    """Measures the way to a machine that calls `receive`; returns the seconds there and back, of a byte.

    Raises:
        LinkError: it cannot be reached there, or falls silent.
    """
    try:
        link = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
    except ConnectionRefusedError:
        raise LinkError("refused") from None
    except TimeoutError:
        raise LinkError("no answer") from None
    except OSError as error:
        raise LinkError(error.strerror or str(error)) from None
    with link:
        link.settimeout(SILENT_SECONDS)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        seconds = []
        try:
            for _ in range(NUM_PINGS):
                start = time.perf_counter()
                link.sendall(b".")
                if not link.recv(1):
                    raise LinkError("the link breaks")
                seconds.append(time.perf_counter() - start)
        except OSError as error:
            raise LinkError(str(error)) from None
        try:
            chunk = bytes(CHUNK_BYTES)
            while True:
                link.sendall(chunk)
        except TimeoutError:
            raise LinkError(f"nothing passes for {SILENT_SECONDS:g} s") from None
        except OSError:
            return statistics.median(seconds)  # the receiver has seen enough, and has closed it


def receive(listener: socket.socket) -> float:
    """Takes what one `send` sends; returns the bytes per second that arrive, without TCP's and IP's own.

    Raises:
        LinkError: nobody comes, or the link falls silent.
    """
    listener.settimeout(CONNECT_SECONDS + 1)
    try:
        link, _ = listener.accept()
    except TimeoutError:
        raise LinkError("nothing arrives") from None
    with link:
        link.settimeout(SILENT_SECONDS)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = bytearray(CHUNK_BYTES)
        try:
            for _ in range(NUM_PINGS):
                if not link.recv(1):
                    raise LinkError("the link breaks")
                link.sendall(b".")
            begun, count = None, 0
            while True:
                size = link.recv_into(buffer)
                now = time.perf_counter()
                if not size:
                    raise LinkError("the link breaks")
                begun = begun or now
                if now - begun < WARM_SECONDS:
                    first = now
                    continue
                count += size
                if now - begun > STREAM_SECONDS:
                    return count / (now - first)
        except TimeoutError:
            raise LinkError(f"nothing arrives for {SILENT_SECONDS:g} s") from None
        except LinkError:
            raise
        except OSError as error:
            raise LinkError(error.strerror or str(error)) from None
