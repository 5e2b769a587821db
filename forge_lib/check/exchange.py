"""Exchanges records between the machines of a check, over TCP, before any launcher runs.

Every machine listens on the cluster's port and sends a message to each other machine about once a second; the receiver
answers with its own message. A message contains all records that its sender knows. So each machine learns what the
others see, even of a machine that it cannot reach itself. Messages are JSON of a fixed form and a limited size. Anyone
who can reach the port can disturb the check, and a run too; nothing from a message is executed or written to a file.
"""

import dataclasses
import errno
import ipaddress
import json
import socket
import socketserver
import statistics
import threading
import time
import uuid
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from forge_lib.check.machine_facts import PROTOCOL, Message, Record, parse_message
from forge_lib.cluster.cluster_file import own_addresses
from forge_lib.distributed.network import route_address
from forge_lib.errors import explain_connection_error

ASK_SECONDS = 1.0  # pause between two messages to the same machine
CONNECT_SECONDS = 4.0  # longer than the 3 s after which the kernel reports that no machine has an address
ANSWER_SECONDS = 4.0
FRESH_SECONDS = 8.0  # a machine whose record has not changed for this time is missing
SETTLE_SECONDS = 3.0  # for this time after a restart, other machines may still pass on the old record
NUM_CLOCK_SAMPLES = 5
MAX_CLOCK_SAMPLE_SECONDS = 2.0  # a slower answer measures the other clock too inaccurately
MAX_MESSAGE_BYTES = 1 << 20


@dataclass
class Received:
    """The newest record with one id, and when (monotonic clock) it was first received and last changed."""

    record: Record
    first_at: float
    changed_at: float


class Exchange:
    """One machine's part in the exchange of records; use it as a context manager.

    Args:
        name: of this machine.
        addresses: of all machines, by name; the first one is the main machine.
        port: on which each of them listens.
        cluster: fingerprint of cluster.yaml, which must be the same on all machines.
    """

    def __init__(self, name: str, addresses: dict[str, str], port: int, cluster: str):
        self.name, self.addresses, self.port = name, addresses, port
        self.main = next(iter(addresses))
        self.others = [other for other in addresses if other != name]
        self._own = Record(id=uuid.uuid4().hex, name=name, host=socket.gethostname(), cluster=cluster)
        self._address_mistake = ""  # what is wrong with its address or port
        self._links: dict[str, str] = {}
        self._clocks: dict[str, deque[float]] = {other: deque(maxlen=NUM_CLOCK_SAMPLES) for other in self.others}
        self._answered: dict[str, float] = {}  # when the last message that each machine answered was sent
        self._received: dict[str, Received] = {}  # by id
        self._lock, self._done = threading.Lock(), threading.Event()
        self._server: _Server | None = None

    def __enter__(self):
        targets = [self._listen, *(lambda other=other: self._keep_asking(other) for other in self.others)]
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        if self._server:
            self._server.shutdown()
            self._server.server_close()
        for thread in self._threads:
            thread.join(CONNECT_SECONDS + ANSWER_SECONDS)

    def update(self, **fields: Any) -> None:
        """Changes fields of this machine's record."""
        with self._lock:
            self._own = dataclasses.replace(self._own, **fields)

    def leave(self, mistake: str) -> None:
        """Reports to the others that this machine ends the check, and the mistake that caused it, if any."""
        with self._lock:
            mistakes = [*self._own.mistakes, mistake] if mistake else self._own.mistakes
            self._own = dataclasses.replace(self._own, mistakes=mistakes, has_left=True)

    def has_answered(self, other: str, since: float) -> bool:
        """Returns whether a machine has answered a message that was sent after a time (monotonic clock)."""
        return self._answered.get(other, 0.0) > since

    def is_link_broken(self, other: str) -> bool:
        """Returns whether the last message to a machine failed."""
        return bool(self._links.get(other))

    def records(self) -> dict[str, list[Record]]:
        """Returns the records of the machines that are up, by name, in the cluster's order.

        Usually there is one record per name. There are more if several machines were started under one name.
        """
        now = time.monotonic()
        with self._lock:
            found: dict[str, list[Record]] = {name: [] for name in self.addresses}
            found[self.name].append(self._own_record())
            newest: dict[str, Received] = {}
            for received in self._received.values():
                name = received.record.name
                if name not in newest or received.first_at > newest[name].first_at:
                    newest[name] = received
            for received in self._received.values():
                latest = newest[received.record.name]
                was_replaced = received is not latest and received.changed_at < latest.first_at + SETTLE_SECONDS
                if now - received.changed_at < FRESH_SECONDS and not was_replaced:
                    found[received.record.name].append(received.record)
        return {name: sorted(records, key=lambda record: record.id) for name, records in found.items() if records}

    def own_address(self) -> str:
        """Returns this machine's IP address in the cluster's network, or an empty text if it has no route there."""
        if self._server:
            return self._server.server_address[0]
        for other in self.others:
            with suppress(OSError):
                return route_address(self.addresses[other], self.port)
        return ""

    # Messages

    def _own_record(self) -> Record:
        return dataclasses.replace(
            self._own,
            heartbeat=time.monotonic_ns(),
            address=self.own_address(),
            mistakes=[*([self._address_mistake] if self._address_mistake else []), *self._own.mistakes],
            links=dict(self._links),
            clocks={other: statistics.median(seconds) for other, seconds in self._clocks.items() if seconds},
        )

    def message(self) -> bytes:
        """Returns a message with all records that this machine knows, as one line of JSON."""
        now = time.monotonic()
        with self._lock:
            records = [r.record for r in self._received.values() if now - r.changed_at < FRESH_SECONDS]
            records = [dataclasses.asdict(record) for record in (self._own_record(), *records)]
            content = {"check_cluster": PROTOCOL, "records": records, "time": time.time()}
        return json.dumps(content).encode() + b"\n"

    def receive(self, line: bytes) -> Message:
        """Takes over the records of a message that are newer than those known, and returns the message.

        Raises:
            ValueError: the line is not a message of this program and version.
        """
        message, now = parse_message(line, 4 * len(self.addresses)), time.monotonic()
        with self._lock:
            for record in message.records:
                if not record or record.name not in self.addresses or record.id == self._own.id:
                    continue
                known = self._received.get(record.id)
                if not known and len(self._received) < 8 * len(self.addresses):
                    self._received[record.id] = Received(record, now, now)
                elif known and record.heartbeat > known.record.heartbeat:
                    known.record, known.changed_at = record, now
        return message

    # The thread that listens

    def _listen(self) -> None:
        """Answers messages. If this machine cannot listen on its address, tries again and again."""
        while not self._done.is_set():
            family, address, mistake = self._find_listen_address()
            try:
                if not mistake:
                    self._server = _Server(self, family, address)
            except OSError as error:
                mistake = f"cannot listen on {address} port {self.port}: {error.strerror}"
                if error.errno == errno.EADDRINUSE:
                    mistake = f"port {self.port} is in use; end the program there, or change `port` in cluster.yaml"
            self._address_mistake = mistake
            if not mistake:
                self._server.serve_forever(poll_interval=0.1)
                return
            self._done.wait(ASK_SECONDS)

    def _find_listen_address(self) -> tuple[int, str, str]:
        """Returns (address family, IP address of this machine to listen on, what is wrong with it)."""
        given, own = self.addresses[self.name], own_addresses()
        fix = "give its IP address in cluster.yaml"
        try:
            infos = socket.getaddrinfo(given, self.port, type=socket.SOCK_STREAM)
        except OSError:
            return socket.AF_INET, "", f"its own name {given} does not resolve there; {fix}"
        for family, *_, (address, *_) in infos:
            is_loopback = ipaddress.ip_address(address.split("%")[0]).is_loopback
            if address in own and (not is_loopback or len(self.addresses) == 1 or given == address):
                return family, address, ""
            if is_loopback and (self.name != self.main or given == "localhost"):
                return family, self.own_address() or address, ""  # a run uses only the main machine's name
            if is_loopback:
                mistake = f"its own name {given} resolves to {address} there, often by a line in /etc/hosts; {fix}"
                return family, "", mistake
        ips = {address: ipaddress.ip_address(address) for address in own}
        usable = sorted(address for address, ip in ips.items() if not ip.is_loopback and not ip.is_link_local)
        has = ", ".join(usable) or "no address"
        mistake = f"{given} is not an address of this machine ({has}); correct cluster.yaml, or connect the network"
        return socket.AF_INET, "", mistake

    # The threads that ask, one for each other machine

    def _keep_asking(self, other: str) -> None:
        while not self._done.is_set():
            begun = time.monotonic()
            self._links[other] = self._ask(other)
            self._done.wait(max(0.1, begun + ASK_SECONDS - time.monotonic()))

    def _ask(self, other: str) -> str:
        """Exchanges messages with another machine; returns why that fails, or an empty text."""
        begun = time.monotonic()
        try:
            connection = socket.create_connection((self.addresses[other], self.port), timeout=CONNECT_SECONDS)
        except OSError as error:
            return self._explain(other, error, time.monotonic() - begun)
        with connection:
            expected = self.own_address()
            used = connection.getsockname()[0]
            failure = self._exchange_messages(other, connection)
        if not failure and self._server and used != expected and not ipaddress.ip_address(expected).is_loopback:
            return f"the route from {self.name} starts at {used}, not at {expected}: the wrong network interface"
        return failure

    def _exchange_messages(self, other: str, connection: socket.socket) -> str:
        where = f"port {self.port}"
        try:
            connection.settimeout(ANSWER_SECONDS)
            sent_at, begun = time.time(), time.monotonic()
            connection.sendall(self.message())
            line = connection.makefile("rb").readline(MAX_MESSAGE_BYTES)
            seconds = time.monotonic() - begun
            answer = self.receive(line)
        except TimeoutError:
            return (
                f"{where} is open, but no answer arrives: the link drops full-size packets (MTU), or the program at "
                "that port hangs"
            )
        except OSError:
            return f"{where} is open, but the connection breaks"
        except ValueError:
            return f"another program, or another version of this one, answers at {where}"
        self._answered[other] = begun
        if seconds < MAX_CLOCK_SAMPLE_SECONDS:
            self._clocks[other].append(answer.time - sent_at - seconds / 2)
        sender = answer.records[0].name if answer.records and answer.records[0] else "another program"
        return "" if sender == other else f"{sender} answers at {self.addresses[other]}: correct cluster.yaml"

    def _explain(self, other: str, error: OSError, seconds: float) -> str:
        """Returns why the connection to another machine failed after `seconds`."""
        address, is_up = self.addresses[other], other in self.records()
        if isinstance(error, socket.gaierror):
            return f"{address} does not resolve on {self.name}"
        if isinstance(error, ConnectionRefusedError | TimeoutError):
            what, cause = explain_connection_error(error)
            if is_up and isinstance(error, TimeoutError):
                cause = "but the check runs there: a firewall between them drops the packets"
            elif is_up:
                cause = f"but the check runs there: a firewall on {other} rejects the connection"
            return f"{what} at port {self.port}{', ' if is_up else ': '}{cause}"
        try:
            route_address(address, self.port)
        except OSError:
            return f"no route to {address}"
        if error.errno != errno.EHOSTUNREACH:
            return f"{address}: {error.strerror or error}"
        # The kernel searches for three seconds for a machine with this address; a faster error comes from a firewall.
        if seconds < 1:
            but = ", but the check runs there" if is_up else ""
            return f"port {self.port} is rejected{but}: a firewall between them prohibits the connection"
        return f"no machine has the address {address}: {other} is off, or has another address"


class _Answer(socketserver.StreamRequestHandler):
    timeout = ANSWER_SECONDS

    def handle(self):
        with suppress(OSError, ValueError):  # another program's message, or a broken connection
            self.server.exchange.receive(self.rfile.readline(MAX_MESSAGE_BYTES))
            self.wfile.write(self.server.exchange.message())


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, exchange: Exchange, family: int, address: str):
        self.exchange, self.address_family = exchange, family
        super().__init__((address, exchange.port), _Answer)

    def handle_error(self, *_):
        pass  # a stranger's connection must not print a traceback
