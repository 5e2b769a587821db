"""How a run is told to stop, and how it keeps out of others' way: signals, the stop file, the run folder's lock."""

import ctypes
import errno
import fcntl
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import psutil

from forge_lib.config import UserError, World

PR_SET_PDEATHSIG = 1
LOOK_SECONDS = 0.5  # how often the stop file is looked for
LOCK_BYTES = 512
LAST_SAVE_SECONDS = 600  # how long the save of a run that was stopped is waited for


def die_with_launcher(world: World) -> None:
    """Has the kernel end this process when its launcher dies; it would train on alone. Linux only.

    One of several processes is killed. A single one, which accelerate's simple launcher does not even tell of its own
    end, is asked to stop, and saves.
    """
    if world.num_processes > 1 or "ACCELERATE_MIXED_PRECISION" in os.environ:
        die_with_parent(signal.SIGKILL if world.num_processes > 1 else signal.SIGTERM)


def die_with_parent(number: int) -> None:
    """Has the kernel send this process a signal when its parent dies; nothing happens but on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Has a closed terminal, a pipe without a reader or a full disk cost lines on stdout and stderr, and nothing else.

    An error of a write would end a run before it is saved. Ctrl-C ends the `tee` behind a program first.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_lasting, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO | None) -> TextIO:
    if stream is None:  # it was closed when the program began
        return open(os.devnull, "w")
    stream.flush()
    file = io.BufferedWriter(_LastingFile(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True)


class _LastingFile(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EPIPE):  # nobody reads any more, whoever writes
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, self.fileno())
                os.close(nothing)
            return memoryview(data).nbytes


def stop_signals() -> list[signal.Signals]:
    """Returns the signals by which a person wishes a stop: SIGTERM, SIGINT and, but under nohup, SIGHUP."""
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_nohup else [signal.SIGHUP])]


class Wishes:
    """What a person wishes of a command that has others run; to be inherited.

    Attributes:
        stopping: it shall stop, and save.
        at_once: it shall end without that: after a second Ctrl-C.
    """

    stopping = at_once = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals meanwhile; call it in the main thread."""
        before = {number: signal.signal(number, self._take_signal) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take_signal(self, number: int, frame: Any) -> None:
        # A window that is closed sends SIGHUP twice: Ctrl-C alone is more than the same wish again.
        self.at_once |= self.stopping and number == signal.SIGINT
        self.stopping = True


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
            time.sleep(LOOK_SECONDS)
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
