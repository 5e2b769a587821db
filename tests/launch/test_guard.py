"""The guard, which runs p2p-llm-forge on each machine of `--ssh`."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from commands import QUIET, ROOT, SHORT

from forge_lib.launch import guard

FLAGS = [*SHORT, *QUIET]


@pytest.mark.parametrize(("stop_seconds", "request_bytes"), [("1", b"s"), ("1", b""), ("60", b"se")])
def test_a_program_that_hangs_is_killed(monkeypatch, stop_seconds, request_bytes):
    """After a request to stop, after the connection has ended, and after a request to end at once."""

    def hang(flags: list, output: int, guard: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        os.write(output, b"hangs\n")
        time.sleep(60)

    monkeypatch.setattr(guard, "_launch", hang)
    monkeypatch.setattr(guard, "END_SECONDS", 1)
    (stdin, requests), (shown, stdout) = os.pipe(), os.pipe()

    def serve() -> None:
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.close(requests)
        sys.exit(guard.serve([stop_seconds]))

    watcher = multiprocessing.get_context("fork").Process(target=serve)
    watcher.start()
    assert os.read(shown, 99) == b"hangs\n"
    begun = time.monotonic()
    os.write(requests, request_bytes) if request_bytes else os.close(requests)
    watcher.join(30)
    assert watcher.exitcode == 137
    assert 0.9 < time.monotonic() - begun < 5


def test_a_stop_request_works_while_the_program_still_imports():
    words = [sys.executable, "-m", "forge_lib.launch.guard", "60", *FLAGS, "--output-dir", "nowhere"]
    ended = subprocess.run(words, input=b"s", capture_output=True, cwd=ROOT, timeout=60)
    assert ended.returncode == 0
    assert ended.stdout == b"p2p-llm-forge: stopped before training began\n"
