"""A forked child that finishes its work even if this process and its launcher are killed."""

import gc
import os
import signal
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

MAX_SECONDS = 600  # after that the child is killed


def call_in_child(function: Callable[[], bytes]) -> bytes:
    """Runs a function in a forked child, waits, and returns its result; empty if the child dies.

    The child has its own session, so that no signal to this process or its group reaches it. It keeps the files that
    are open here, locks among them, but no sockets and pipes. Call on the main thread.
    """
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        _run_child(function, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    return result


def _run_child(function: Callable[[], bytes], writing: int) -> NoReturn:
    """Detaches the child from its parent's session, sockets and pipes, and writes the function's result to a pipe."""
    try:
        os.setsid()
        gc.disable()  # collecting garbage could free GPU memory, which a forked child must not touch
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(MAX_SECONDS)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(null, standard)
        for descriptor in map(int, os.listdir("/dev/fd")):
            with suppress(OSError):
                # the other end of an open socket or pipe would not notice that the parent has died
                mode = os.fstat(descriptor).st_mode
                if descriptor != writing and (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)):
                    os.close(descriptor)
        os.write(writing, function())
    finally:
        os._exit(0)
