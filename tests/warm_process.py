"""Runs a script, or `accelerate launch`, in a fork of a process that has imported the slow packages: it starts sooner.

The scripts are the same, and so is what they do; each kind of launcher, signals and startup are tested with real
commands.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

from commands import ROOT

# Imported once by the server from which all processes are forked. Nothing may compute there: threads do not survive a
# fork.
PRELOAD = ["torch", "accelerate", "transformers.models.gpt2.modeling_gpt2", "transformers.generation", "warm_imports"]
PRELOAD += ["accelerate.commands.launch", "torch.distributed.run"]
_context = multiprocessing.get_context("forkserver")


class WarmProcess:
    """A running script, with the methods of subprocess.Popen that tests use."""

    def __init__(self, words: list[str], log: Path, cwd: Path = ROOT):
        _context.set_forkserver_preload(PRELOAD)
        self._process = _context.Process(target=_run, args=(words, log, cwd, dict(os.environ)))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Returns the exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Waits until it ends; raises subprocess.TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("script", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends it a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it."""
        self.send_signal(signal.SIGKILL)


def _run(words: list[str], log: Path, cwd: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_APPEND), (2, os.O_WRONLY | os.O_APPEND)):
        file = os.open(log if descriptor else os.devnull, flags)
        os.dup2(file, descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
