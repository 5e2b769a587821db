"""How a run is asked to stop: by a signal, or by a file named `stop` in its folder."""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from forge_lib.process import stop_signals

POLL_SECONDS = 0.5  # how often to look for the stop file


class StopRequest:
    """Notices a signal or a stop file; use it as a context manager, in the main thread.

    Until `defer` is called, a signal raises `error` at once, since nothing is lost then. From then on it is recorded,
    and the training loop asks for it in every step. A second SIGINT ends the process at once.

    Args:
        error: the class of the error to raise.
    """

    def __init__(self, error: type[BaseException]):
        self._error, self._is_deferred = error, False
        self._reason, self._created = "", time.time()
        self._file: Path | None = None
        self._last_poll = 0.0
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._timer:
            self._timer.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self, folder: Path | None) -> None:
        """Records requests from now on; a stop file that is older than this object is deleted.

        Args:
            folder: the run folder, if this process is the one that looks for the stop file.
        """
        self._is_deferred = True
        if folder:
            self._file = folder / "stop"
            if self._file.exists() and self._file.stat().st_mtime < self._created:
                self._file.unlink()

    def reason(self) -> str:
        """Returns what asked the run to stop, or an empty string; cheap enough for every step."""
        now = time.monotonic()
        if self._file and not self._reason and now - self._last_poll > POLL_SECONDS:
            self._last_poll = now
            if self._file.exists():
                self._reason = f"the file {self._file}"
        return f"{self._reason} on {socket.gethostname()}" if self._reason else ""

    def set_time_limit(self, seconds: float) -> None:
        """Ends this process with exit code 1 if it still runs after `seconds`."""

        def end() -> None:
            print(f"error: not saved within --grace-seconds {seconds:g}", file=sys.stderr, flush=True)
            os._exit(1)

        self._timer = threading.Timer(seconds, end)
        self._timer.daemon = True
        self._timer.start()

    def done(self) -> None:
        """Deletes the stop file, so that the next start does not find it."""
        if self._file:
            self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if self._reason and number == signal.SIGINT:
            os._exit(128 + number)
        self._reason = self._reason or name
        if not self._is_deferred:
            raise self._error(f"{name} before the first step")
