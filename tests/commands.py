"""Commands that tests run as a user types them, and the flags, ports and launchers for them."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import yaml

from forge_lib.process import kill_process_tree

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TINY = ["--model-name", "data/tiny_gpt2", "--dataset-path", "data/sample_corpus.txt", "--sample-by", "paragraph"]
SHORT = [*TINY, "--sequence-length", "64", "--batch-size", "8", "--max-steps", "50", "--learning-rate", "1e-3"]
SHORT += ["--mixed-precision", "no", "--write-report", "false", "--balance", "even"]  # also on several machines
QUIET = ["--eval-every", "0", "--checkpoint-every", "0", "--log-every", "1"]

FIRST_PORT, PORTS_PER_WORKER, MAX_WORKERS = 20_000, 3_000, 4  # below 32,768: the kernel does not give these to clients
T = TypeVar("T")
_numbers = itertools.count(os.getpid())


@dataclass
class Finished:
    """How a command ended."""

    code: int
    output: str
    seconds: float


class Running:
    """A command in its own process group, with its output in a file; `warm`: a Python script, see warm_process.py."""

    def __init__(
        self,
        command: list,
        log: Path,
        cwd: Path = ROOT,
        prefix: list | None = None,
        warm: bool = False,
        variables: dict[str, str] | None = None,
    ):
        self.log, self.begun = log, time.monotonic()
        if warm:
            from warm_process import WarmProcess

            log.touch()
            self.process = WarmProcess(
                [str(word) for word in command if word != sys.executable], log, cwd, variables or {}
            )
            return
        words = [*(prefix or []), *map(str, command)]
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                words,
                cwd=cwd,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | (variables or {}),
            )

    def finish(self, timeout: float = 120) -> Finished:
        """Waits until the command ends; after `timeout` seconds kills all its processes and fails the test."""
        try:
            code = self.process.wait(max(1, self.begun + timeout - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"did not end within {timeout} s:\n{self.log.read_text()[-4000:]}")
        return Finished(code, self.log.read_text(), time.monotonic() - self.begun)

    def kill(self) -> None:
        """Kills the command and all its descendants, also those that a launcher started in their own session."""
        if self.process.poll() is None:
            kill_process_tree(psutil.Process(self.process.pid))
            self.process.wait()


def find_free_port() -> int:
    """Returns a TCP port that nothing uses, a different one each time; pytest-xdist's workers never share one."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % MAX_WORKERS
    for number in _numbers:
        port = FIRST_PORT + PORTS_PER_WORKER * worker + number % PORTS_PER_WORKER
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise AssertionError("unreachable: the numbers do not end")


def accelerate_launcher(folder: Path, port: int, **topology) -> tuple:
    """Writes an accelerate YAML into `folder`; returns the words that start a script with it."""
    config = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_machines": 1, "machine_rank": 0}
    config |= {"main_process_ip": "127.0.0.1", "main_process_port": port, **topology}
    path = folder / f"accelerate_{len(list(folder.glob('accelerate_*')))}.yaml"
    path.write_text(yaml.safe_dump(config))
    return (BIN / "accelerate", "launch", "--config_file", path)


def until(condition: Callable[[], T], seconds: float, what: str) -> T:
    """Calls `condition` until it returns something true, and returns that; after `seconds` fails the test."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds:g} s without success: {what}")
        time.sleep(0.05)
    return found
