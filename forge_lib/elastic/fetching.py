"""Downloads a folder from a live peer: verified, and continued after a broken connection or from another peer."""

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import numpy as np

from forge_lib.cluster.addresses import bracketed
from forge_lib.distributed.transfer_files import (
    PIECE_BYTES,
    Files,
    PartialFile,
    check_files,
    open_partial_folder,
    place_partial_folder,
    total_bytes,
)
from forge_lib.distributed.transfer_progress import ProgressMeter
from forge_lib.elastic.peer_facts import PeerFacts
from forge_lib.errors import UserError, disk_errors_as_user_errors

logger = logging.getLogger("forge")

SOCKET_SECONDS = 10
RETRY_SECONDS = 1
PATIENCE_SECONDS = 60  # without a byte; after that another peer is asked
ROUNDS = 3  # how often a file with a wrong hash is fetched again
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not reach the peers
NETWORK_ERRORS = (OSError, http.client.HTTPException)  # urllib's errors are OSErrors


class StoppedError(Exception):
    """This peer was asked to stop during a download, which can be continued later."""


class GoneError(Exception):
    """A peer no longer serves what it served: its state is that of a later round."""


class RateMeter:
    """Measures how fast the bytes of downloads arrive; the time after the last one, without an answer, does not count.

    Attributes:
        num_bytes: that have arrived.
    """

    def __init__(self) -> None:
        self.num_bytes, self._seconds = 0, 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        """Counts bytes, and the seconds since the ones before them, or since they were requested."""
        self.num_bytes, self._seconds = self.num_bytes + num_bytes, self._seconds + seconds

    def seconds_for(self, num_bytes: int) -> float:
        """Returns how long the download of that many bytes takes; 0 if none was measured."""
        return self._seconds * num_bytes / self.num_bytes if self.num_bytes else 0.0


def url_of(peer: PeerFacts, *words: str) -> str:
    """Returns the address of something that a peer serves."""
    return f"http://{bracketed(peer.address)}:{peer.http_port}/{'/'.join(map(quote, words))}"


def fetch_facts(peer: PeerFacts) -> dict:
    """Returns what a peer says about itself and its files; one of NETWORK_ERRORS if it does not answer."""
    with DIRECT.open(url_of(peer, "facts"), timeout=SOCKET_SECONDS) as response:
        return json.load(response)


def download(
    peer: PeerFacts,
    name: str,
    files: Files,
    target: Path,
    what: str,
    gives_up: Callable[[], bool],
    patience_seconds: float = PATIENCE_SECONDS,
    rate: RateMeter | None = None,
) -> None:
    """Downloads the files of a folder that a peer serves, and creates `target` with them: complete, or not at all.

    What an earlier download of the very same files has left beside `target` is kept. After a broken connection it asks
    again, for as long as `patience_seconds` without a new byte.

    Args:
        peer: serves the folder.
        name: of the folder there.
        files: that it has.
        target: path of the new folder.
        what: it is, for messages.
        gives_up: called now and then; once it returns true, the download ends, and can be continued later.
        patience_seconds: how long it waits for an answer.
        rate: measures how fast the bytes arrive.

    Raises:
        GoneError: the peer no longer serves the folder, or does not answer.
        StoppedError: `gives_up` returned true.
        UserError: `files` is not valid, the disk is full or fails, or a hash is wrong three times.
    """
    what = f"{what} from {peer.name}"
    meter, rate = ProgressMeter(f"receiving {what}", lambda text: None, to_stderr=True), rate or RateMeter()
    with disk_errors_as_user_errors(target):
        check_files(files)
        partial = open_partial_folder(target, files, what)
        parts = {each: PartialFile(partial / each, files[each], lambda count: None) for each in sorted(files)}
        meter.start_round(total_bytes(files), sum(part.num_held for part in parts.values()))
        for each, part in parts.items():
            wrong, answered_at = 0, time.monotonic()
            while part.num_held < files[each]["bytes"]:
                num_received = _receive(peer, name, each, part, files[each]["bytes"], (meter, rate), gives_up)
                if num_received:
                    answered_at = time.monotonic()
                if num_received and not part.num_held:  # it was complete, but its hash was wrong
                    wrong += 1
                if wrong == ROUNDS:
                    raise UserError(f"{what}: {each} arrived {ROUNDS} times with a wrong sha256")
                if gives_up():
                    raise StoppedError
                if time.monotonic() - answered_at > patience_seconds:
                    raise GoneError(f"{peer.name} does not answer")
                if not num_received:
                    time.sleep(RETRY_SECONDS)
        place_partial_folder(target)
    meter.end(f"received {what}")


def _receive(
    peer: PeerFacts,
    folder: str,
    name: str,
    part: PartialFile,
    size: int,
    meters: tuple[ProgressMeter, RateMeter],
    gives_up: Callable[[], bool],
) -> int:
    """Receives the rest of a file, in whole pieces, until it is complete or the connection breaks.

    Returns:
        The bytes that have arrived.
    """
    begun = time.monotonic()
    start = at = part.num_held
    request = urllib.request.Request(url_of(peer, folder, name), headers={"Range": f"bytes={start}-"})
    try:
        with DIRECT.open(request, timeout=SOCKET_SECONDS) as response:
            while at < size and not gives_up() and (piece := _read_piece(response, min(PIECE_BYTES, size - at))):
                part.write(at, np.frombuffer(piece, np.uint8))
                meters[0].add(len(piece))
                meters[1].add(len(piece), time.monotonic() - begun)
                at, begun = at + len(piece), time.monotonic()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise GoneError(f"{peer.name} no longer has {folder}") from None
    except NETWORK_ERRORS:
        pass
    return at - start


def _read_piece(response: http.client.HTTPResponse, size: int) -> bytes:
    """Returns a whole piece, or nothing if the connection ends before."""
    piece = response.read(size)
    return piece if len(piece) == size else b""
