"""The lock on a run folder, which keeps a second run out of it."""

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import psutil

from forge_lib.errors import UserError

POLL_SECONDS = 0.5
LOCK_BYTES = 512
LAST_SAVE_SECONDS = 600  # how long to wait for the last save of a run that was stopped


class RunLock:
    """The lock on a run folder: the kernel lets it go when the process that holds it ends, however that happens.

    The file `run.lock` says who holds it and, for the launcher, at which step the run is. Use it as a context manager.

    Attributes:
        held: whether this process holds it.
    """

    def __init__(self, folder: Path):
        self.folder, self.held, self._file = folder, False, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file:
            self._file.close()
            self.held = False

    def take(self, run_id: str) -> None:
        """Takes the lock, unless another machine of the same run has it: the folder lies on a disk that they share.

        Args:
            run_id: of this start of the run, the same on all machines.

        Raises:
            UserError: another run holds it.
        """
        self._file = os.fdopen(os.open(self.folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        self._facts = {"host": socket.gethostname(), "pid": os.getpid(), "run_id": run_id}
        until = time.monotonic() + LAST_SAVE_SECONDS
        while not self._try():
            holder = self._holder()
            if holder["run_id"] == run_id:
                return
            dead = holder["host"] == socket.gethostname() and not psutil.pid_exists(holder["pid"])
            if not dead or time.monotonic() > until:  # of a dead one, only the last save is still being written
                raise self._in_use(holder)
            time.sleep(POLL_SECONDS)
        self.held = True
        self.at(0)
        os.fsync(self._file.fileno())

    def check_free(self) -> None:
        """Looks, without taking it, whether another run on this machine holds it: UserError then."""
        with suppress(FileNotFoundError), open(self.folder / "run.lock", "rb") as self._file:
            holder = self._holder()
            free = self._try()  # let go when the file is closed
            if not free and holder["host"] == socket.gethostname() and psutil.pid_exists(holder["pid"]):
                raise self._in_use(holder)
        self._file = None

    def _in_use(self, holder: dict) -> UserError:
        return UserError(
            f"--output-dir {self.folder} is in use by another run (process {holder['pid']} on {holder['host']}); wait "
            "for its end, stop it, or name another folder"
        )

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _holder(self) -> dict:
        try:
            return json.loads(os.pread(self._file.fileno(), LOCK_BYTES, 0))
        except ValueError:
            return {"host": "?", "pid": 0, "run_id": ""}

    def at(self, step: int) -> None:
        """Notes the step that is done; cheap, to be called each step."""
        if self.held:
            text = json.dumps(self._facts | {"step": step}).encode()
            with suppress(OSError):  # a full disk is no reason to stop
                os.pwrite(self._file.fileno(), text.ljust(LOCK_BYTES), 0)
