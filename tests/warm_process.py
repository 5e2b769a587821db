"""Runs a script, or `accelerate launch`, in a fork of a process that has imported the slow packages: it starts sooner.

The launcher sets the same environment variables, but forks its workers instead of starting Python. The scripts are the
same, and so is what they do; each kind of launcher, signals and startup are tested with real commands.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing.context import BaseContext
from pathlib import Path

import torch
from commands import BIN
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

# Imported once by the server from which all processes are forked. Nothing may compute there: threads do not survive a
# fork.
PRELOAD = ["torch", "accelerate", "transformers.models.gpt2.modeling_gpt2", "transformers.generation", "warm_imports"]
PRELOAD += ["accelerate.commands.launch", "torch.distributed.run"]
_context = multiprocessing.get_context("forkserver")


class WarmProcess:
    """A running script, with the methods of subprocess.Popen that tests use."""

    def __init__(self, words: list[str], log: Path, cwd: Path, variables: dict[str, str]):
        _context.set_forkserver_preload(PRELOAD)
        self._start(_context, words, log, cwd, os.environ | variables)

    def _start(self, context: BaseContext, words: list[str], log: Path | None, cwd: Path, environment: dict) -> None:
        self._process = context.Process(target=_run, args=(words, log, cwd, environment))
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


class _WarmWorker(WarmProcess):
    """A worker that torchrun starts: it writes to the launcher's output."""

    def __init__(self, words: list[str], environment: dict[str, str]):
        self._start(multiprocessing.get_context("fork"), words, None, Path.cwd(), environment)


def _run(words: list[str], log: Path | None, cwd: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if log:
        for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_APPEND), (2, os.O_WRONLY | os.O_APPEND)):
            file = os.open(log if descriptor else os.devnull, flags)
            os.dup2(file, descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if "OMP_NUM_THREADS" in environment:  # torch has read the variable before the fork
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if words[0] == str(BIN / "accelerate"):
        SubprocessHandler._popen = lambda self, args, env: _WarmWorker([*args[args.index("-u") + 1 :]], env)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
