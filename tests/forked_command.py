"""The command p2p-llm-forge in a fork of the test's process: it starts at once, because everything is imported."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import ROOT, Finished

from forge_lib.launch import command, supervisor
from forge_lib.process import kill_process_tree

assert supervisor  # the command imports it late; here it is imported before the fork


class ForkedCommand:
    """A running command in its own session, with its output in a file. Patches of the test's process apply to it."""

    def __init__(self, flags: list, log: Path):
        self.log, self.begun = log, time.monotonic()
        self._process = multiprocessing.get_context("fork").Process(target=_run, args=([*map(str, flags)], log))
        self._process.start()

    def send_signal(self, number: int) -> None:
        """Sends a signal to the supervisor only."""
        os.kill(self._process.pid, number)

    def finish(self, timeout: float = 120) -> Finished:
        """Waits until the command ends; after `timeout` seconds kills all its processes and fails the test."""
        self._process.join(max(1, self.begun + timeout - time.monotonic()))
        if self._process.is_alive():
            self.kill()
            pytest.fail(f"did not end within {timeout} s:\n{self.output()[-4000:]}")
        return Finished(self._process.exitcode, self.output(), time.monotonic() - self.begun)

    def output(self) -> str:
        """Returns what it has printed."""
        return self.log.read_text() if self.log.exists() else ""

    def kill(self) -> None:
        """Kills the command and all its descendants."""
        if self._process.is_alive():
            kill_process_tree(psutil.Process(self._process.pid))
            self._process.join()


def _run(flags: list[str], log: Path) -> None:
    os.setsid()
    os.chdir(ROOT)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    command.main(flags)
