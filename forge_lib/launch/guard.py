"""Runs p2p-llm-forge on a machine of `--ssh`: ssh.py starts `python -m forge_lib.launch.guard` there.

Stop requests arrive on stdin. When stdin ends, the connection or the user's terminal is gone; that counts as a stop
request, too. The guard kills a program that hangs. It imports nothing slow, so that it reacts while the command still
imports torch.
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

from forge_lib.launch.messages import END, print_message
from forge_lib.process import die_with_parent, kill_process_tree, shell_exit_code

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # the guard passes on requests with these
POLL_SECONDS = 0.25
END_SECONDS = 5  # how long p2p-llm-forge may take to end its processes itself


def serve(argv: list[str]) -> int:
    """Runs p2p-llm-forge, obeys the requests on stdin, and returns the exit code. Then none of its processes is left.

    Args:
        argv: how many seconds p2p-llm-forge may take to stop, then its flags.
    """
    stop_seconds, flags = float(argv[0]), argv[1:]
    output, child_output = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=_launch, args=(flags, child_output, os.getpid()))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child has its handlers
    child.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.close(child_output)
    watched, deadline, at_once = [0, output], math.inf, False
    while child.is_alive():
        ready = select.select(watched, [], [], POLL_SECONDS)[0]
        if output in ready and not _forward(output):
            watched.remove(output)
        if 0 in ready:
            request = os.read(0, 99)
            if not request:
                watched.remove(0)
            at_once |= END in request
            deadline = min(deadline, time.monotonic() + (END_SECONDS if at_once else stop_seconds))
            os.kill(child.pid, signal.SIGTERM)
        if at_once:
            os.kill(child.pid, signal.SIGINT)  # once per poll: two signals at the same time may count as one
        if time.monotonic() > deadline:
            kill_process_tree(psutil.Process(child.pid))
    os.set_blocking(output, False)
    with contextlib.suppress(BlockingIOError):  # another process may still hold the other end
        while _forward(output):
            pass
    return shell_exit_code(child.exitcode)


def _forward(output: int) -> bool:
    """Copies available output to stdout, if anyone still reads that; returns whether more may come."""
    chunk = os.read(output, 1 << 16)
    with contextlib.suppress(OSError):
        os.write(1, chunk)
    return bool(chunk)


def _launch(flags: list[str], output: int, guard: int) -> None:
    """Runs p2p-llm-forge in this process; it stops if the guard dies."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for number in SIGNALS:
        signal.signal(number, _stop_early)  # until p2p-llm-forge sets its own handlers
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    from forge_lib.launch import command  # slow

    die_with_parent(signal.SIGTERM)
    if os.getppid() == guard:
        command.main(flags)


def _stop_early(number: int, frame: Any) -> None:
    print_message("stopped before training began")
    os._exit(0)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
