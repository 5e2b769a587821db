"""p2p-llm-forge where nobody sits at the machine: `python -m forge_lib.launch.guard`, which remote.py starts over ssh.

What is wished comes by stdin; when that ends, the connection or the terminal over there is gone, which is a wish to
stop too. A program that hangs is killed here.
"""

import contextlib
import math
import multiprocessing
import os
import select
import signal
import sys
import time
from typing import Any

import psutil

from forge_lib.process import kill_process_tree

STOP, END = b"s", b"e"  # what is wished: save and stop; end at once
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # by which the program hears of it
POLL_SECONDS = 0.25
END_SECONDS = 5  # for p2p-llm-forge to end its processes itself


def serve(argv: list[str]) -> int:
    """Runs p2p-llm-forge, and does what its stdin wishes; returns its exit code. No process of it is left.

    Args:
        argv: how many seconds it may take to stop, then its flags.
    """
    patience, flags = float(argv[0]), argv[1:]
    output, theirs = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=_launch, args=(flags, theirs, os.getpid()))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the child takes none before it can
    child.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.close(theirs)
    watched, until, at_once = [0, output], math.inf, False
    while child.is_alive():
        ready = select.select(watched, [], [], POLL_SECONDS)[0]
        if output in ready and not _pass_on(output):
            watched.remove(output)
        if 0 in ready:
            wish = os.read(0, 99)
            if not wish:
                watched.remove(0)
            at_once |= END in wish
            until = min(until, time.monotonic() + (END_SECONDS if at_once else patience))
            os.kill(child.pid, signal.SIGTERM)
        if at_once:
            os.kill(child.pid, signal.SIGINT)  # one by one, since two at once may count as one
        if time.monotonic() > until:
            kill_process_tree(psutil.Process(child.pid))
    os.set_blocking(output, False)
    with contextlib.suppress(BlockingIOError):  # another process may hold the other end
        while _pass_on(output):
            pass
    return child.exitcode if child.exitcode >= 0 else 128 - child.exitcode


def _pass_on(output: int) -> bool:
    """Writes on what has been written, as long as there is someone to read it; returns whether more may come."""
    chunk = os.read(output, 1 << 16)
    with contextlib.suppress(OSError):
        os.write(1, chunk)
    return bool(chunk)


def _launch(flags: list[str], output: int, guard: int) -> None:
    """Becomes p2p-llm-forge, which stops when it is left alone."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for number in SIGNALS:
        signal.signal(number, _stop_early)  # until p2p-llm-forge listens itself
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    from forge_lib.launch import launch
    from forge_lib.process import die_with_parent

    die_with_parent(signal.SIGTERM)
    if os.getppid() == guard:
        launch.main(flags)


def _stop_early(number: int, frame: Any) -> None:
    say("stopped before training began")
    os._exit(0)


def say(line: str) -> None:
    """Writes a line of the command's own, where there is somebody to read it."""
    with contextlib.suppress(OSError):  # where the terminal is gone there is still something to stop
        print(f"p2p-llm-forge: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
