"""Reports the progress of a transfer: to a callback, and as lines on stderr."""

import sys
import time
from collections.abc import Callable

from forge_lib.progress import format_seconds

CALL_SECONDS = 0.25  # between two calls of the callback
LINE_SECONDS = 5.0  # between two lines on stderr

Progress = Callable[[str], None]


class ProgressMeter:
    """Measures one transfer.

    Args:
        what: the start of each text, such as "receiving step-00000100 from alice".
        progress: receives a text at most every CALL_SECONDS.
        to_stderr: whether to print a line at the start, every LINE_SECONDS, and at the end.
    """

    def __init__(self, what: str, progress: Progress, to_stderr: bool = False):
        self._what, self._progress, self._to_stderr = what, progress, to_stderr
        self._start = self._last_call = self._last_line = self._last_hash_report = time.monotonic()
        self._total = self._done = self._transferred = self._hashed = 0

    def add_hashed(self, num_bytes: int) -> bool:
        """Counts bytes from an earlier transfer that were hashed; returns whether it reported, every LINE_SECONDS."""
        self._hashed += num_bytes
        is_due = time.monotonic() - self._last_hash_report > LINE_SECONDS
        if is_due:
            self._last_hash_report = time.monotonic()
            self._progress(f"{self._what}: verified {format_bytes(self._hashed)} from an earlier transfer")
        return is_due

    def start_round(self, num_bytes: int, num_held: int) -> None:
        """Starts a round in which `num_held` of all bytes need no transfer."""
        self._total, self._done = num_bytes, num_held
        if not self._transferred:
            self._start = time.monotonic()
        held = f", {format_bytes(num_held)} of it already here" if num_held else ""
        text = f"{self._what}: {format_bytes(num_bytes)}{held}"
        self._progress(text)
        self._print(text)

    def add(self, num_bytes: int) -> None:
        """Counts transferred bytes."""
        self._done, self._transferred = self._done + num_bytes, self._transferred + num_bytes
        now = time.monotonic()
        if now - self._last_call < CALL_SECONDS:
            return
        self._last_call = now
        speed = self._transferred / (now - self._start)
        left = format_seconds((self._total - self._done) / speed)
        text = f"{self._what}: {100 * self._done // self._total} % of {format_bytes(self._total)}"
        text += f", {format_bytes(speed)}/s, {left} left"
        self._progress(text)
        if now - self._last_line >= LINE_SECONDS:
            self._print(text)

    def end(self, what: str) -> None:
        """Prints the total and the mean rate."""
        seconds = max(time.monotonic() - self._start, 1e-3)
        rate = format_bytes(self._transferred / seconds)
        self._print(f"{what}: {format_bytes(self._transferred)} in {seconds:.1f} s, {rate}/s")

    def _print(self, text: str) -> None:
        if self._to_stderr:
            self._last_line = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def format_bytes(num_bytes: float) -> str:
    """Returns a number of bytes in MB, or in GB from 10 GB on."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e10 else f"{num_bytes / 1e6:.1f} MB"
