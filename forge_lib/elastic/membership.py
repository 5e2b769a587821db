"""Which peers take part in a round: the only file that touches torchft.

torchft's lighthouse knows which peers are alive from their heartbeats. A peer that has finished its round asks it for
a quorum; the answer comes when every living peer has asked, or all those of the last quorum, and lists what each of
them said about itself. Then those that can exchange form a process group, which lasts until the exchange is over or
has failed.

Of torchft this uses the lighthouse, its client and the process group that can be configured again. Its Manager is not
used: its heartbeats cannot pause, so that the others would wait for a late peer; its votes do not reach beyond one
peer; it unpickles what it receives; and it advertises a host name.
"""

import contextlib
import dataclasses
import http.client
import logging
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from forge_lib.distributed.peers import Peers
from forge_lib.elastic.fetching import DIRECT
from forge_lib.elastic.peer_facts import Member, PeerFacts
from forge_lib.errors import UserError, exit_code, first_line
from forge_lib.process import die_with_parent

logger = logging.getLogger("forge")

HEARTBEAT_SECONDS = 0.5
HEARTBEAT_TIMEOUT_SECONDS = 3.0  # a peer without a heartbeat for this time is lost
QUORUM_TICK_SECONDS = 0.05
REQUEST_SECONDS = 5.0  # a request for a quorum is repeated after this time
CONNECT_SECONDS = 2.0
STATUS_SECONDS = 30.0  # between two lines about what a peer waits for
OTHERS_SECONDS = 60.0  # between two looks for a second lighthouse
NO_ANSWER = (OSError, http.client.HTTPException)  # of an address where no lighthouse runs
JOIN_SECONDS = 7 * 24 * 3600  # a living peer is waited for, however long its round is: a late one stops its heartbeats
TORCHFT_FIX = "pip install 'p2p-llm-forge[elastic]' (Linux on x86-64, Python 3.10 to 3.13)"


def split_address(url: str) -> tuple[str, int]:
    """Returns host and port of a lighthouse.

    Raises:
        UserError: it is not of the form http://HOST:PORT.
    """
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:  # the port is no number, or a bracket is missing
        scheme, host, port = "", None, None
    if scheme != "http" or not host or not port:
        raise UserError(f"--lighthouse {url}: expected http://HOST:PORT, as in http://alder:29510")
    return host, port


def serve_lighthouse(port: int) -> None:
    """Serves the lighthouse on all interfaces until this process gets a signal or its parent dies.

    Raises:
        UserError: torchft is not installed, or the port is in use.
    """
    server = _import_torchft().LighthouseServer
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        lighthouse = server(
            bind=f"[::]:{port}",
            min_replicas=1,
            join_timeout_ms=JOIN_SECONDS * 1000,
            quorum_tick_ms=int(QUORUM_TICK_SECONDS * 1000),
            heartbeat_timeout_ms=int(HEARTBEAT_TIMEOUT_SECONDS * 1000),
        )
    except RuntimeError as error:
        raise UserError(f"the lighthouse cannot listen on port {port}: {first_line(error)}") from None
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    lighthouse.shutdown()


class Membership:
    """This peer's connection to the lighthouse. Use it as a context manager: inside, a thread sends its heartbeats.

    Args:
        lighthouses: addresses http://HOST:PORT; the first one that answers is used.
        name: of this peer.

    Attributes:
        on_wait: called with what this peer waits for, and with an empty text when it goes on.
    """

    def __init__(self, lighthouses: list[str], name: str):
        self.id = f"{name}:{uuid.uuid4().hex[:8]}"
        self._urls, self._url = lighthouses, ""  # the one that is used
        self.on_wait: Callable[[str], None] = lambda what: None
        self._client: Any = None
        self._strange: set[str] = set()  # identifiers of other programs
        self._beats = threading.Event()
        self._until = float("inf")  # no heartbeats after this time
        self._lost_at = 0.0  # when the lighthouse was lost; 0: it is there
        self._is_loss_logged = False
        self._torchft = _import_torchft()

    def __enter__(self) -> "Membership":
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="heartbeats", daemon=True)
        self._thread.start()
        if len(self._urls) > 1:
            threading.Thread(target=self._watch_for_others, name="lighthouses", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ends.set()
        self._thread.join(2 * CONNECT_SECONDS)  # Python's exit may hang with a thread inside of torchft
        Peers.has_stuck_thread |= self._thread.is_alive()

    @property
    def lost_at(self) -> float:
        """When the lighthouse was lost, by time.monotonic; 0: it is there."""
        return self._lost_at

    def expect(self, seconds: float = float("inf")) -> None:
        """Promises to ask for a quorum within `seconds`: at that time, the last heartbeat of a late peer is too old.

        The others then go on without it.
        """
        self._until = time.monotonic() + seconds - HEARTBEAT_TIMEOUT_SECONDS + HEARTBEAT_SECONDS
        self._beats.set()

    def leave(self) -> None:
        """Stops the heartbeats: the others no longer wait for this peer."""
        self._beats.clear()

    def quorum(self, facts: PeerFacts, gives_up: Callable[[], bool]) -> list[Member] | None:
        """Waits until every living peer asks for a quorum; returns them in the order of their identifiers.

        While the lighthouse does not answer, this waits for it, and says so in the log.

        Args:
            facts: what this peer tells the others.
            gives_up: called now and then; once it returns true, this returns None.
        """
        self.expect()
        begun = noted = time.monotonic()
        while not gives_up():
            try:
                members = self._request(facts)
            except (RuntimeError, TimeoutError) as error:
                noted = self._note_failure(error, begun, noted)
                continue
            self.on_wait("")
            return members
        return None

    def _request(self, facts: PeerFacts) -> list[Member]:
        client = self._client or self._connect()
        if self._lost_at:
            if self._is_loss_logged:
                logger.info(f"the lighthouse {self._url} is back after {time.monotonic() - self._lost_at:.0f} s")
            self._lost_at, self._is_loss_logged = 0.0, False
            time.sleep(HEARTBEAT_TIMEOUT_SECONDS)  # a new lighthouse hears of all peers before it decides
        quorum = client.quorum(
            replica_id=self.id,
            timeout=timedelta(seconds=REQUEST_SECONDS),
            address=facts.address,
            step=max(0, facts.round),
            data=dataclasses.asdict(facts),
        )
        found = {each.replica_id: PeerFacts.from_json(each.data or {}) for each in quorum.participants}
        for strange in {name for name, facts in found.items() if facts is None} - self._strange:
            self._strange.add(strange)
            logger.warning(f"{strange} at the lighthouse is not a peer of this version of the program: it is ignored")
        return [Member(name, facts) for name, facts in sorted(found.items()) if facts]

    def _connect(self) -> Any:
        error: Exception = RuntimeError("no lighthouse is named")
        for url in self._urls:
            try:
                client = self._torchft.LighthouseClient(url, timedelta(seconds=CONNECT_SECONDS))
                client.heartbeat(self.id, timedelta(seconds=CONNECT_SECONDS))
            except (RuntimeError, TimeoutError) as caught:
                error = caught
            else:
                self._client, self._url = client, url
                return client
        raise error

    def _note_failure(self, error: Exception, begun: float, noted: float) -> float:
        """Handles a request that was not answered; returns when the last line about it was logged."""
        now = time.monotonic()
        is_lost = not (isinstance(error, TimeoutError) and self._beat())
        if is_lost:
            self._client = None
            time.sleep(HEARTBEAT_SECONDS)
            self._lost_at = self._lost_at or now  # the heartbeats may have found out before
        what = f"the lighthouse {' or '.join(self._urls)}" if self._lost_at else "the other peers"
        if now - begun > REQUEST_SECONDS or is_lost:
            self.on_wait(what)
        if is_lost and not self._is_loss_logged:
            self._is_loss_logged = True
            logger.warning(f"waiting for the lighthouse {' or '.join(self._urls)}: {_reason(error)}")
            return now
        if now - noted > STATUS_SECONDS:
            logger.info(f"waiting for {what} since {now - begun:.0f} s")
            return now
        return noted

    def _send_heartbeats(self) -> None:
        while not self._ends.wait(HEARTBEAT_SECONDS):
            if not self._beats.is_set() or time.monotonic() > self._until:
                continue
            if not self._client:
                with contextlib.suppress(RuntimeError, TimeoutError):
                    self._connect()
            elif not self._beat():  # the next request waits until all peers have found the new lighthouse
                self._client, self._lost_at = None, self._lost_at or time.monotonic()

    def _watch_for_others(self) -> None:
        """Warns once if a second lighthouse runs. A thread of its own: a heartbeat must not wait for the answer."""
        while not self._ends.wait(OTHERS_SECONDS):
            if other := self.find_other():
                logger.warning(
                    f"two lighthouses run: {self._url} and {other}; stop one of them: its peers then join the others, "
                    "and of the two states, the one with fewer samples is dropped"
                )
                return

    def find_other(self) -> str:
        """Returns the address of a lighthouse that does not know this peer, or an empty text.

        One that knows it is the one that is used, under another address.
        """
        for url in self._urls if self._client else []:
            if url == self._url:
                continue
            request = f"{url.rstrip('/')}/status"
            with contextlib.suppress(*NO_ANSWER), DIRECT.open(request, timeout=CONNECT_SECONDS) as response:
                if self.id.rpartition(":")[2] not in response.read().decode(errors="replace"):
                    return url
        return ""

    def _beat(self) -> bool:
        """Sends a heartbeat; returns whether the lighthouse has answered."""
        client = self._client
        try:
            client.heartbeat(self.id, timedelta(seconds=CONNECT_SECONDS))
        except (RuntimeError, TimeoutError, AttributeError):  # the other thread may just have lost it
            return False
        return True


def _reason(error: Exception) -> str:
    """Returns the last part of torchft's message, which is exact: the parts before it repeat the address."""
    text = first_line(error)
    message = re.search(r'message: "([^"]+)"', text)
    return message[1] if message else text.rpartition(": ")[2]


def new_gloo_group(timeout_seconds: float) -> Any:
    """Returns torchft's gloo group, not connected yet; the time limit is that of connecting and of each message."""
    _import_torchft()
    from torchft.process_group import ProcessGroupGloo

    return ProcessGroupGloo(timeout=timedelta(seconds=timeout_seconds))


def _import_torchft() -> Any:
    os.environ.setdefault("OTEL_SDK_DISABLED", "true")  # torchft sets up telemetry and a logger when it is imported
    os.environ.setdefault("RUST_LOG", "error")
    try:
        from torchft import coordination
    except ImportError:
        raise UserError(f"train_elastic.py needs torchft: {TORCHFT_FIX}") from None
    return coordination


def main(words: list[str]) -> None:
    """Serves a lighthouse: `python -m forge_lib.elastic.membership 29510`; exits with 2 after a user mistake."""
    try:
        if not words or not words[0].isdigit():
            raise UserError(
                "expected the port of the lighthouse, as in `python -m forge_lib.elastic.membership 29510`"
            )
        if "--with-parent" in words:
            die_with_parent(signal.SIGTERM)
        serve_lighthouse(int(words[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main(sys.argv[1:])
