"""The lock on a run folder: only one run at a time writes into it."""

import dataclasses
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from forge_lib.errors import UserError

LOCK_NAME = "run.lock"
POLL_SECONDS = 0.5
LAUNCHER_LOCK_NAME = "launcher.lock"  # of p2p-llm-forge, which waits for the other machines before the run
LOCK_BYTES = 1024
WAITING_CHARACTERS = 100
LAST_SAVE_SECONDS = 600  # the longest wait for the last save of a run that was stopped


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as run.lock describes it.

    Attributes:
        host, pid: where it runs.
        run_id: of this start of the run, the same on all machines.
        step: optimizer steps that the run has done.
        since: when it acquired the lock, in seconds since 1970; 0: not known.
        waiting_for: what it waits for; empty: it goes on.
    """

    host: str = "?"
    pid: int = 0
    run_id: str = ""
    step: int = 0
    since: float = 0.0
    waiting_for: str = ""

    @classmethod
    def read(cls, file: BinaryIO) -> "Holder":
        """Reads run.lock; a damaged file gives an unknown holder."""
        try:
            return cls(**json.loads(os.pread(file.fileno(), LOCK_BYTES, 0)))
        except (ValueError, TypeError):
            return cls()

    def write(self, file: BinaryIO) -> None:
        """Writes run.lock, always with the same number of bytes."""
        os.pwrite(file.fileno(), json.dumps(dataclasses.asdict(self)).encode().ljust(LOCK_BYTES), 0)

    def is_dead(self) -> bool:
        """Returns whether the process ran on this machine and does not exist any more."""
        return self.host == socket.gethostname() and not psutil.pid_exists(self.pid)


class RunLock:
    """The lock on a run folder; the kernel releases it when the process that holds it ends, for any reason.

    The file run.lock names the holder and, for the launcher, the step of the run. Use it as a context manager.

    Args:
        folder: the run folder.

    Attributes:
        held: whether this process holds the lock.
    """

    def __init__(self, folder: Path):
        self.folder, self.held = folder, False
        self._file: BinaryIO | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file:
            self._file.close()
            self.held = False

    def acquire(self, run_id: str) -> None:
        """Acquires the lock, unless another machine of the same run holds it, because both share the disk.

        If the holder is dead, but its last save is still being written, this waits for it.

        Args:
            run_id: of this start of the run, the same on all machines.

        Raises:
            UserError: another run holds it.
        """
        self._file = os.fdopen(os.open(self.folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        until = time.monotonic() + LAST_SAVE_SECONDS
        while not _try_lock(self._file):
            holder = Holder.read(self._file)
            if holder.run_id == run_id:
                return
            if not holder.is_dead() or time.monotonic() > until:
                raise self._in_use(holder)
            time.sleep(POLL_SECONDS)
        self.held = True
        self._own = Holder(socket.gethostname(), os.getpid(), run_id, since=time.time())
        self.set_step(0)
        os.fsync(self._file.fileno())

    def check_free(self) -> None:
        """Checks, without acquiring the lock, that no other run on this machine holds it.

        Raises:
            UserError: another run holds it.
        """
        with suppress(FileNotFoundError), open(self.folder / LOCK_NAME, "rb") as file:
            holder = Holder.read(file)
            is_free = _try_lock(file)  # the lock is released when the file is closed
            if not is_free and holder.host == socket.gethostname() and not holder.is_dead():
                raise self._in_use(holder)

    def set_step(self, step: int) -> None:
        """Writes the number of steps done into run.lock, and that the run goes on; cheap: call it each step."""
        self._write(step=step, waiting_for="")

    def set_waiting(self, what: str) -> None:
        """Writes what the run waits for into run.lock; empty: it goes on."""
        self._write(waiting_for=what[:WAITING_CHARACTERS])

    def _write(self, **facts: Any) -> None:
        if self.held:
            self._own = dataclasses.replace(self._own, **facts)
            with suppress(OSError):  # a full disk does not end the run
                self._own.write(self._file)

    def _in_use(self, holder: Holder) -> UserError:
        return UserError(
            f"--output-dir {self.folder} is in use by another run (process {holder.pid} on {holder.host}); wait until "
            "it ends, stop it, or use another --output-dir"
        )


def find_holder(path: Path) -> Holder | None:
    """Returns the process that holds a lock at the moment; None if there is none, or no such file.

    Args:
        path: of a run.lock or a launcher.lock.
    """
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with open(path, "rb") as file:
            return Holder.read(file)
    except OSError:
        pass
    return None


class LauncherLock:
    """Tells others what p2p-llm-forge waits for before a run, in launcher.lock. Use it as a context manager.

    Args:
        folder: the run folder; if it cannot be written, nothing is told.
    """

    def __init__(self, folder: Path):
        self._path = folder / LAUNCHER_LOCK_NAME
        self._file: BinaryIO | None = None
        self._own = Holder(socket.gethostname(), os.getpid(), since=time.time())

    def __enter__(self) -> "LauncherLock":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file:
            self._path.unlink(missing_ok=True)
            self._file.close()

    def set_waiting(self, what: str) -> None:
        """Writes what the launcher waits for; empty: for nothing."""
        with suppress(OSError):
            if what and not self._file:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
                if not _try_lock(file):
                    file.close()
                    return
                self._file = file
            if self._file:
                dataclasses.replace(self._own, waiting_for=what[:WAITING_CHARACTERS]).write(self._file)


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
