"""Progress of slow work: one bar on a terminal, and plain lines with the time left elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

LINE_SECONDS = 10.0  # between two lines, and before the first one


class ProgressBar:
    """Shows how far some work is. Use it as a context manager.

    Args:
        what: the work, such as "tokenizing".
        total: its units; 0: not known.
        unit: of the work, such as "B" for bytes.
        enabled: whether this process shows it.
    """

    def __init__(self, what: str, total: int, unit: str, enabled: bool = True):
        self._what, self._total, self._done, self._enabled = what, total, 0, enabled
        self._start = self._last_line = time.monotonic()
        self._is_terminal = enabled and sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(
            desc=what, total=total or None, unit=unit, unit_scale=True, disable=not self._is_terminal, leave=False
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, count: int = 1) -> None:
        """Counts units of work that are done."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._enabled and not self._is_terminal and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            print(self.line(now - self._start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Returns the progress after some seconds as a line."""
        if not self._total or not self._done:
            return f"{self._what}: {seconds:.0f} s"
        share = min(1.0, self._done / self._total)
        return f"{self._what}: {share:.0%}, {format_seconds(seconds / share - seconds)} left"


def format_seconds(seconds: float) -> str:
    """Returns a time span in the two largest units that it needs: 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


@contextmanager
def progress_bar(num_steps: int, step: int, is_main: bool) -> Iterator[tqdm]:
    """Shows the bar of a training run on the main process, if stderr is a terminal; log lines are printed above it."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    is_quiet = None if is_main else True  # None: quiet unless stderr is a terminal
    with tqdm(total=num_steps, initial=step, unit="step", disable=is_quiet) as bar, logging_redirect_tqdm():
        yield bar
