"""Programs whose time and memory are measured."""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Finished:
    """How programs ended.

    Attributes:
        output: what the first of them has printed to stdout.
        seconds: until the last one has ended.
        peak_bytes: largest resident memory of any of their processes.
    """

    output: str
    seconds: float
    peak_bytes: int


def run_programs(commands: Sequence[Sequence[object]], variables: Sequence[dict[str, str]] | None = None) -> Finished:
    """Runs programs at the same time, and waits for all of them.

    Args:
        commands: their words; the program `python` is this one.
        variables: environment variables of each, in addition to this process's.

    Raises:
        RuntimeError: one of them has failed; with the end of what it printed to stderr.
    """
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for n, words in enumerate(commands):
            words = [sys.executable if word == "python" else str(word) for word in words]
            environment = os.environ | (variables[n] if variables else {})
            with open(f"{folder}/{n}.out", "wb") as out, open(f"{folder}/{n}.err", "wb") as err:
                running.append(psutil.Popen(words, cwd=ROOT, stdout=out, stderr=err, env=environment))
        while any(process.poll() is None for process in running):
            peak = max(peak, *map(_peak_bytes, running))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - start
        for n, process in enumerate(running):
            if process.returncode:
                error = Path(folder, f"{n}.err").read_text()[-3000:]
                raise RuntimeError(f"{' '.join(map(str, commands[n]))}\n{error}")
        return Finished(Path(folder, "0.out").read_text(), seconds, peak)


def _peak_bytes(process: psutil.Process) -> int:
    """Returns the largest peak of resident memory of a process and its descendants, in bytes; Linux only."""
    peaks = [0]
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for each in family:
        try:
            lines = Path(f"/proc/{each.pid}/status").read_text().splitlines()
        except OSError:
            continue
        peaks += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return max(peaks)
