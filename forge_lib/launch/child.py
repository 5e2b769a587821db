"""The child process of one attempt, and all processes below it, as the supervisor controls them."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import psutil

from forge_lib.launch.messages import print_message
from forge_lib.process import is_running

FORK = multiprocessing.get_context("fork")  # the child starts with everything imported
LIST_SECONDS = 1  # between two searches for descendants
BARRIER_SECONDS = 10  # how long a launcher whose workers have ended may wait for the other machines' launchers
MARGIN_SECONDS = 15  # beyond --grace-seconds, before workers that should have stopped are killed
KILL_SECONDS = 10  # how long killed processes may take to end


class Child:
    """A forked process that starts others: the launcher, and the workers as its children.

    Attributes:
        process: the forked process.
    """

    def __init__(self, target: Callable[..., None], *args: Any):
        self.process = FORK.Process(target=target, args=args)
        self.process.start()
        self._descendants: set[psutil.Process] = set()
        self._listed_at = 0.0
        self._asked: set[psutil.Process] = set()  # the workers that got SIGTERM
        self._stop_deadline = self._workers_ended_at = 0.0

    def is_alive(self) -> bool:
        """Returns whether the forked process runs."""
        return self.process.is_alive()

    def watch_descendants(self) -> None:
        """Looks for new descendants, at most once a second: those of a dead process can no longer be found."""
        if time.monotonic() - self._listed_at > LIST_SECONDS:
            self._listed_at = time.monotonic()
            self._list_descendants()

    def _list_descendants(self) -> None:
        parents = [*self._descendants, *([psutil.Process(self.process.pid)] if self.is_alive() else [])]
        for process in parents:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._descendants.update(process.children(recursive=True))

    def request_stop(self, grace_seconds: float) -> int | None:
        """Sends SIGTERM to the workers; call it repeatedly. The launcher gets none, since it would kill them.

        Args:
            grace_seconds: how long the workers may take to save.

        Returns:
            The exit code if the attempt is to be ended now, else None.
        """
        workers = set(psutil.Process(self.process.pid).children())
        if not workers and not self._descendants:
            print_message("stopped before training began")
            return 0
        for worker in workers - self._asked:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.terminate()
        self._asked |= workers
        self._descendants |= workers
        now = time.monotonic()
        if not self._stop_deadline:
            self._stop_deadline = now + grace_seconds + MARGIN_SECONDS
            print_message("stopping: all machines finish the step and save; Ctrl-C again ends at once")
        if self._asked and not any(map(is_running, self._asked)):
            self._workers_ended_at = self._workers_ended_at or now
            if now - self._workers_ended_at > BARRIER_SECONDS:  # another machine's launcher may have ended already
                return 0
        if now > self._stop_deadline:
            limit = f"--grace-seconds {grace_seconds:g} and {MARGIN_SECONDS} s"
            print_message(f"not stopped within {limit}: all processes are killed")
            return 1
        return None

    def kill(self) -> None:
        """Kills the process and all its descendants, including those that live on in their own sessions."""
        if self.is_alive():
            psutil.Process(self.process.pid).suspend()  # so that it starts no more processes
        self._list_descendants()
        self.process.kill()
        self.process.join()
        for process in self._descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        deadline = time.monotonic() + KILL_SECONDS
        while any(map(is_running, self._descendants)) and time.monotonic() < deadline:
            time.sleep(0.05)
