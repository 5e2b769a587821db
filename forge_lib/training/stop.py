"""How a run is asked to stop: by a signal, or by a file in its folder."""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from forge_lib.process import stop_signals

LOOK_SECONDS = 0.5  # how often to look for the stop file


class StopRequest:
    """Notices a signal to stop and a file `stop` in the run folder; use it as a context manager, in the main thread.

    Until `defer` is called a signal raises `error` at once, since nothing is lost then. From then on it is noted, and
    the training loop asks for it. A second SIGINT ends the process at once.

    Args:
        error: the class of what is raised.
    """

    def __init__(self, error: type[BaseException]):
        self._error, self._deferred, self._file, self._looked = error, False, None, 0.0
        self._reason, self._begun = "", time.time()
        self._timer: threading.Timer | None = None

    def __enter__(self):
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        if self._timer:
            self._timer.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self, folder: Path | None) -> None:
        """From now on requests are noted; `folder` is the run folder, where this process looks for the stop file.

        A stop file that an earlier run has left is removed.
        """
        self._deferred = True
        if folder:
            self._file = folder / "stop"
            if self._file.exists() and self._file.stat().st_mtime < self._begun:
                self._file.unlink()

    def reason(self) -> str:
        """Returns why the run shall stop, and nothing while it shall not; cheap, to be called each step."""
        now = time.monotonic()
        if self._file and not self._reason and now - self._looked > LOOK_SECONDS:
            self._looked = now
            if self._file.exists():
                self._reason = f"the file {self._file}"
        return f"{self._reason} on {socket.gethostname()}" if self._reason else ""

    def limit(self, seconds: float) -> None:
        """From now on the run has so long to save and to leave: then this process ends with exit code 1."""

        def end() -> None:
            print(f"error: not saved within --grace-seconds {seconds:g}", file=sys.stderr, flush=True)
            os._exit(1)

        self._timer = threading.Timer(seconds, end)
        self._timer.daemon = True
        self._timer.start()

    def done(self) -> None:
        """Removes the stop file: the next start shall not find it."""
        if self._file:
            self._file.unlink(missing_ok=True)

    def _note(self, number: int, _frame) -> None:
        name = signal.Signals(number).name
        if self._reason and number == signal.SIGINT:
            os._exit(128 + number)
        self._reason = self._reason or name
        if not self._deferred:
            raise self._error(f"{name} before the first step")
