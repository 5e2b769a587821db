"""The store of the rendezvous on the main machine's port, with a time limit for every operation."""

import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from forge_lib.config import LaunchConfig
from forge_lib.errors import UserError, first_line

T = TypeVar("T")
ANSWER_SECONDS = 20  # how long the store may take to answer
READ_SECONDS = 3  # how long the others may take to read a mistake before the store closes
MISTAKE_KEY = "error"


class UnavailableError(UserError):
    """A machine is missing or cannot be reached: a user mistake or, with --max-restarts, a reason to try again."""


class RendezvousStore:
    """A few keys that the machines read and write before any launcher starts.

    Every operation raises dist.DistError if the store is gone, TimeoutError if it does not answer in time.
    """

    def __init__(self, config: LaunchConfig, open_seconds: float, is_master: bool = False):
        """Opens the store on the main machine, or connects to it.

        Raises:
            UnavailableError: it cannot listen or connect, or another program uses the port.
        """

        def connect() -> dist.Store:
            return dist.TCPStore(
                config.master_addr,
                config.master_port,
                is_master=is_master,
                timeout=timedelta(seconds=open_seconds),
                wait_for_workers=False,
            )

        where = f"{config.master_addr}:{config.master_port}"
        try:
            self._whole_store = _with_timeout(connect, open_seconds)
        except (dist.DistError, TimeoutError) as error:
            reason = first_line(error)
            if is_master:
                raise UnavailableError(f"cannot listen on {where}: {reason}; give another --master-port") from None
            raise UnavailableError(
                f"{where} answers, but not as a main machine does: is it the port of another program? ({reason})"
            ) from None
        self._store = dist.PrefixStore("forge-roll", self._whole_store)

    def has(self, key: str) -> bool:
        """Returns whether a key exists."""
        return self._ask(self._store.check, [key])

    def get(self, key: str) -> str:
        """Returns the value of an existing key."""
        return self._ask(self._store.get, key).decode()

    def set(self, key: str, value: str) -> None:
        """Sets a key."""
        self._ask(self._store.set, key, value)

    def set_first(self, key: str, value: str) -> str:
        """Sets a key unless it exists; returns its value."""
        return self._ask(self._store.compare_set, key, "", value).decode()

    def wait(self, keys: list[str], seconds: float) -> None:
        """Waits until all keys exist."""
        _with_timeout(lambda: self._store.wait(keys, timedelta(seconds=seconds)), 2 * seconds)

    def report_mistake(self, mistake: str) -> None:
        """Stores a mistake for all machines, and waits a moment until they have read it."""
        self.set(MISTAKE_KEY, mistake)
        self.let_others_read()

    def reported_mistake(self) -> str:
        """Returns the mistake that a machine has stored, or an empty text."""
        return self.get(MISTAKE_KEY) if self.has(MISTAKE_KEY) else ""

    def let_others_read(self) -> None:
        """Waits a moment before this process ends: its store ends with it."""
        time.sleep(READ_SECONDS)

    def call(self, operation: Callable[[dist.Store], T]) -> T:
        """Returns the result of an operation on the whole store, which also has the launchers' keys."""
        return self._ask(operation, self._whole_store)

    @staticmethod
    def _ask(operation: Callable[..., T], *args: Any) -> T:
        return _with_timeout(lambda: operation(*args), ANSWER_SECONDS)


def _with_timeout(operation: Callable[[], T], seconds: float) -> T:
    """Returns the result of an operation, or raises TimeoutError.

    The operation runs in a thread that may never end: torch waits forever for a link that falls silent, and for a
    program that accepts the connection but never answers.
    """
    outcome: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((operation(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer for {seconds:g} s") from None
    if error:
        raise error
    return value
