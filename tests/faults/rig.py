"""Runs of several machines with injected faults, and what each such run must fulfil afterwards.

A run ends or continues within a stated time (a); its exit code and one line name the peer and the reason (b). Then
all machines hold the same weights (c), which equal those of an undisturbed run bit for bit (d); no process remains
(e), and the newest checkpoint is complete (f). `Rig.check` verifies (c) to (f).
"""

import json
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pytest
from commands import ROOT, TINY, Finished, Running, accelerate_launcher, until
from marked_processes import processes_with, workers
from networks import Hosts
from run_folders import sha256

from forge_lib.checkpoints.verify import verify
from forge_lib.process import is_running

FAULTY = ROOT / "tests" / "faults" / "faulty.py"
STEPS = 30
FLAGS = [*TINY, "--eval-fraction", 0.05, "--sequence-length", 64, "--batch-size", 12, "--learning-rate", 1e-3]
FLAGS += ["--mixed-precision", "no", "--eval-every", 0, "--checkpoint-every", 5, "--log-every", 1]
FLAGS += ["--check-replicas-every", 10, "--keep-checkpoints", 3, "--balance", "even"]
FLAGS = [str(word) for word in FLAGS]
SLOW = {"do": "sleep", "at": "computing", "seconds": 0.2}
TIMEOUT = 6  # --timeout-seconds of runs in which a machine falls silent
DEATH_SECONDS = 6  # until the others notice that a process was killed in a step
REACTION_SECONDS = 4  # until they notice a silent one, beyond the timeout
ONE_THREAD = {"OMP_NUM_THREADS": 1}  # another number rounds differently; two processes on one machine get this one too

# Where a fault happens in a run: its phase -> (the status of the process, the step)
PHASES = {"start": ("loading the model", None), "step": ("computing", 8), "save": ("writing", 10)}
PHASES |= {"evaluation": ("evaluating", 20)}


def wait_for_end(processes: Iterable[psutil.Process], seconds: float, what: str) -> None:
    """Waits until none of these processes runs."""
    until(lambda: not any(map(is_running, processes)), seconds, what)


def in_each_phase(folder: Path, do: str, ranks: list[int], **options) -> list[dict]:
    """Returns the same fault once for each phase, on these ranks."""
    return [
        {"do": do, "at": at, "rank": rank, "once": str(folder / f"once_{phase}"), **options}
        | ({} if step is None else {"step": step})
        for (phase, (at, step)), rank in zip(PHASES.items(), ranks, strict=True)
    ]


class Mark:
    """A line that faulty.py has written: which fault happened where and when."""

    def __init__(self, line: str):
        found = re.fullmatch(r"FAULT (\w+): (.*), step (\d+), rank (\d+), pid (\d+), time ([\d.]+)", line)
        self.do, self.at = found[1], found[2]
        self.step, self.rank, self.pid = map(int, found.group(3, 4, 5))
        self.time = float(found[6])

    def seconds_ago(self) -> float:
        return time.time() - self.time


class Rig:
    """Machines 1, 2, … that train one run through faulty.py, each in its own run folder.

    With `hosts` each has its own network namespace and hostname; otherwise all run on this machine.
    """

    def __init__(
        self,
        start: Callable[..., Running],
        folder: Path,
        port: int,
        hosts: Hosts | None = None,
        num_machines: int = 2,
    ):
        self.start, self.folder, self.port, self.hosts, self.num_machines = start, folder, port, hosts, num_machines
        self.word = f"rig-{uuid.uuid4().hex}"  # in the environment of every process of the run
        self.running: list[Running] = []

    # Start

    def start_all(self, *flags, **options) -> list[Running]:
        """Starts all machines."""
        return [self.start_machine(n, *flags, **options) for n in range(1, self.num_machines + 1)]

    def start_machine(
        self,
        n: int,
        *flags,
        faults: list = (),
        launcher: str = "forge",
        rank: int | None = None,
        num_machines: int = 0,
        main: int = 1,
        environment: dict | None = None,
        **options,
    ) -> Running:
        """Starts machine n as number `rank` of `num_machines`; machine `main` is the main machine."""
        rank, num_machines = n - 1 if rank is None else rank, num_machines or self.num_machines
        address = f"10.77.0.{main}" if self.hosts else "127.0.0.1"
        if launcher == "forge":
            words = [sys.executable, FAULTY, "p2p-llm-forge", "--num-nodes", num_machines, "--node-rank", rank]
            words += ["--master-addr", address, "--master-port", self.port, "--processes-per-node", 1]
        else:
            topology = {"num_machines": num_machines, "machine_rank": rank, "num_processes": num_machines}
            words = [*accelerate_launcher(self.folder, self.port, main_process_ip=address, **topology), FAULTY]
        words += ["--output-dir", self.run_folder(n), *FLAGS, "--max-steps", STEPS, *flags]
        options["prefix"] = self._prefix(n, list(faults), environment or {})
        self.running.append(self.start(words, **options))
        return self.running[-1]

    def _prefix(self, n: int, faults: list, environment: dict) -> list[str]:
        """Returns the words that run a command on machine n with these faults."""
        words = []
        if self.hosts:
            named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name(n)]
            words = [*self.hosts.on(n), *named]
        settings = {"FAULTS": json.dumps(faults), "RIG": self.word, **ONE_THREAD, **environment}
        return [*words, "env", *(f"{name}={value}" for name, value in settings.items())]

    # What the machines have and do

    def run_folder(self, n: int) -> Path:
        return self.folder / f"machine{n}"

    def name(self, n: int) -> str:
        return f"machine{n}" if self.hosts else socket.gethostname()

    def newest_checkpoint(self, n: int) -> Path:
        return max((self.run_folder(n) / "checkpoints").glob("step-*"))

    def output(self) -> str:
        """Returns the output of all machines."""
        return "\n".join(each.log.read_text(errors="replace") for each in self.running)

    def workers(self) -> dict[int, psutil.Process]:
        """Returns the running training processes, by rank."""
        return workers(self.word)

    def marks(self) -> list[Mark]:
        """Returns the faults that have happened so far, in order."""
        found = [Mark(line) for line in self.output().splitlines() if line.startswith("FAULT ")]
        return sorted(found, key=lambda mark: mark.time)

    # Wait and check

    def wait_for_mark(self, number: int = 0, seconds: float = 90) -> Mark:
        """Waits until the fault of this number, from 0, has happened."""

        def find() -> Mark | None:
            marks = self.marks()
            if len(marks) <= number and all(each.process.poll() is not None for each in self.running):
                pytest.fail(f"all ended before fault {number}:\n{self.output()[-6000:]}")
            return marks[number] if len(marks) > number else None

        return until(find, seconds, f"fault {number} in\n{self.output()[-6000:]}")

    def finish(self, running: list[Running], *codes: int, timeout: float = 120) -> list[Finished]:
        """Waits until these machines end, and compares their exit codes."""
        ended = [each.finish(timeout) for each in running]
        assert [each.code for each in ended] == list(codes), "\n=====\n".join(each.output[-4000:] for each in ended)
        return ended

    def check_no_process_remains(self, seconds: float = 10) -> None:
        until(lambda: not processes_with(self.word), seconds, f"no process remains, but {processes_with(self.word)}")

    def check(self, expected: Path | None) -> None:
        """Checks a run that has ended; `expected` is the folder of the undisturbed run, if this one is complete."""
        self.check_no_process_remains()
        newest = [self.newest_checkpoint(n) for n in range(1, self.num_machines + 1)]
        assert {path.name for path in newest} == {newest[0].name}
        assert len({(path / "manifest.json").read_text() for path in newest}) == 1
        for path in newest:
            assert verify(path) is None
            assert not list(path.parent.glob(".*")), "something remains of a save"
        if expected:
            final = self.run_folder(1) / "final" / "model.safetensors"
            assert sha256(final) == sha256(expected / "final" / "model.safetensors")
