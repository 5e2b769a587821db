"""Serves what a joining peer needs over HTTP: model, token stores, the shared state, the updates of the last rounds.

Only files that are listed with size and sha256 are served, from any byte on, so that a broken download continues.
There is no authentication: like the process group, it trusts the network.
"""

import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from forge_lib.distributed.transfer_files import Files
from forge_lib.errors import UserError

PIECE_BYTES = 1 << 20
SOCKET_SECONDS = 30


@dataclass
class Shared:
    """What a peer serves.

    Attributes:
        facts: JSON types, at /facts.
        folders: at /NAME/FILE, the folder and its files by name.
        served_at: when a piece of a file was last sent, by time.monotonic.
    """

    facts: dict = field(default_factory=dict)
    folders: dict[str, tuple[Path, Files]] = field(default_factory=dict)
    served_at: float = 0.0

    def describe(self) -> dict:
        """Returns the facts, and the files of each folder."""
        return self.facts | {"folders": {name: files for name, (_, files) in dict(self.folders).items()}}


class StateServer:
    """The HTTP server of a peer, in a thread. Use it as a context manager.

    Args:
        address: this peer's IP address; the server listens on no other.
        port: of the server.
        shared: what it serves; may change while it runs.

    Raises:
        UserError: the port is in use.
    """

    def __init__(self, address: str, port: int, shared: Shared):
        handler = type("Handler", (_Handler,), {"shared": shared})
        family = ThreadingHTTPServer
        if ":" in address:
            family = type("Server6", (ThreadingHTTPServer,), {"address_family": 10})
        try:
            self._server = family((address, port), handler)
        except OSError as error:
            raise UserError(f"{address}, port {port} (--peer-port + 1), cannot be used: {error.strerror}") from None
        self._server.daemon_threads = True

    def __enter__(self) -> "StateServer":
        threading.Thread(target=self._server.serve_forever, name="state server", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    shared: Shared
    timeout = SOCKET_SECONDS
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        words = [unquote(word) for word in self.path.removeprefix("/").split("/")]
        if words == ["facts"]:
            self._send(200, json.dumps(self.shared.describe()).encode())
            return
        folder, files = self.shared.folders.get(words[0], (None, {}))
        if folder is None or len(words) != 2 or words[1] not in files:
            self._send(404, b"no such file")
            return
        size = files[words[1]]["bytes"]
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
        if not match:
            self._send(400, b"expected Range: bytes=N-")
            return
        start = int(match[1])
        try:
            with open(folder / words[1], "rb") as file:
                file.seek(start)
                self.send_response(206)
                self.send_header("Content-Length", str(max(0, size - start)))
                self.end_headers()
                while piece := file.read(PIECE_BYTES):
                    self.wfile.write(piece)
                    self.shared.served_at = time.monotonic()
        except OSError:  # the file is gone, or the other peer: it asks again
            self.close_connection = True

    def _send(self, status: int, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the other peer is gone
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: the peers' own lines say what happens."""
