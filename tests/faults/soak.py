"""Injects a random fault every 20 to 60 seconds into a run of two machines, until the run is complete.

    python tests/faults/soak.py --minutes 60 --seed 0

The machines are network namespaces (needs root, iproute2). `p2p-llm-forge --max-restarts 100000` trains on each; when
it ends, this program starts it again, as a person would. A newer checkpoint must appear every two minutes. After the
given minutes there are no more faults; the final weights must equal those of an undisturbed run bit for bit, the
newest checkpoints must be complete, and no process may remain. Prints the faults, and how long training paused after
each. The same seed draws the same faults. Logs and checkpoints stay in runs/soak.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.append(str(Path(__file__).parents[1]))

from commands import BIN, ROOT, Running, find_free_port
from marked_processes import processes_with
from networks import Hosts
from rig import FLAGS, Rig
from run_folders import read_lock, sha256

from forge_lib.checkpoints.verify import verify
from forge_lib.process import is_running

TIMEOUT = 8
SLEEP = 0.25  # seconds that each step sleeps, most of its time
STALLED_SECONDS = 120
PAUSE = [20, 60]  # seconds between two faults
TRAINING = 0.75  # at most this part of the time is spent in steps; restarts take the rest


class Soak:
    """Two machines, the faults that hit them, and how long training paused."""

    def __init__(self, folder: Path, port: int, num_steps: int, seed: int):
        self.random, self.num_steps, self.folder = random.Random(seed), num_steps, folder
        self.hosts = Hosts(2)
        self.num_started = 0
        self.rig = Rig(self._start, folder, port, self.hosts)
        self.machines: dict[int, Running] = {}
        self.off: set[int] = set()  # machines that stay down for now
        self.newest_step, self.newest_at = -1, time.monotonic()
        self.pauses: dict[str, list[float]] = {}
        self.codes: dict[int, int] = {}

    def _start(self, words: list, **options) -> Running:
        self.num_started += 1
        return Running(words, self.folder / f"start_{self.num_started:03}.log", **options)

    def keep_running(self) -> None:
        """Starts each machine that has ended, and checks that newer checkpoints appear."""
        for n in (1, 2):
            if n in self.machines and self.machines[n].process.poll() is not None:
                code = self.machines.pop(n).process.returncode
                self.codes[code] = self.codes.get(code, 0) + 1
                log(f"machine {n} has ended with exit code {code}")
            if n not in self.machines and n not in self.off and not self.is_complete():
                flags = ["--max-restarts", 100000, "--timeout-seconds", TIMEOUT, "--max-steps", self.num_steps]
                flags += ["--log-every", 10, "--check-replicas-every", 50]
                slow = {"do": "sleep", "at": "computing", "seconds": SLEEP}
                self.machines[n] = self.rig.start_machine(n, *flags, faults=[slow])
        steps = [int(p.name[5:]) for n in (1, 2) for p in (self.rig.run_folder(n) / "checkpoints").glob("step-*")]
        if max(steps, default=-1) > self.newest_step:
            self.newest_step, self.newest_at = max(steps), time.monotonic()
        if time.monotonic() - self.newest_at > STALLED_SECONDS:
            raise AssertionError(f"no checkpoint after step {self.newest_step} for {STALLED_SECONDS} s")

    def wait(self, seconds: float) -> None:
        """Waits, and keeps the machines running."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.is_complete():
            self.keep_running()
            time.sleep(0.25)

    def is_complete(self) -> bool:
        return (self.rig.run_folder(1) / "final" / "README.md").exists()

    def worker(self, n: int) -> psutil.Process | None:
        """Returns the training process of machine n, if it has one now."""
        return self.rig.workers().get(n - 1)

    def step(self, n: int) -> int:
        return read_lock(self.rig.run_folder(n)).get("step", -1)

    # The faults. Each returns when the machine may train again.

    def kill_worker(self, n: int) -> None:
        if worker := self.worker(n):
            worker.kill()

    def kill_machine(self, n: int) -> None:
        """Kills all its processes, supervisor and launcher too, and starts it again some seconds later."""
        self.off.add(n)
        folder = str(self.rig.run_folder(n))
        for process in processes_with(self.rig.word):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
                if any(folder in word for word in process.cmdline()):
                    process.kill()
        if n in self.machines:
            self.machines.pop(n).kill()
        self.wait(self.random.uniform(1, 10))
        self.off.discard(n)

    def cut_short(self, n: int) -> None:
        self.hosts.cut(n)
        self.wait(5)
        self.hosts.heal(n)

    def cut_long(self, n: int) -> None:
        self.hosts.cut(n)
        self.wait(20)
        self.hosts.heal(n)

    def sigterm(self, n: int) -> None:
        if n in self.machines:
            self.machines[n].process.send_signal(signal.SIGTERM)
            self.machines[n].process.wait(60)  # it finishes its step first, which does not count as training again

    def sigstop(self, n: int) -> None:
        if worker := self.worker(n):
            worker.suspend()
            self.wait(TIMEOUT + self.random.uniform(1, 6))
            if is_running(worker):
                worker.resume()

    def inject_fault(self) -> None:
        """Draws a fault and a machine; a thread measures the pause, until both machines have done two more steps."""
        kinds = [self.kill_worker, self.kill_machine, self.cut_short, self.cut_long, self.sigterm, self.sigstop]
        inject, n = self.random.choice(kinds), self.random.choice([1, 2])
        begun = time.monotonic()
        log(f"{inject.__name__} machine {n}, at step {self.step(1)} and {self.step(2)}")
        inject(n)
        threading.Thread(target=self._measure, args=(inject.__name__, begun), daemon=True).start()

    def _measure(self, name: str, begun: float) -> None:
        seen, num_more = {n: self.step(n) for n in (1, 2)}, {1: 0, 2: 0}
        while min(num_more.values()) < 2 and not self.is_complete():
            for n in (1, 2):
                step = self.step(n)
                num_more[n] += step > seen[n]
                seen[n] = step
            time.sleep(0.05)
        if not self.is_complete():
            self.pauses.setdefault(name, []).append(time.monotonic() - begun)

    # The whole run, and what it must fulfil

    def run(self, minutes: float) -> None:
        """Injects faults for `minutes`, then waits until the run is complete."""
        begun = time.monotonic()
        self.wait(self.random.uniform(*PAUSE))
        while time.monotonic() - begun < 60 * minutes and not self.is_complete():
            next_at = time.monotonic() + self.random.uniform(*PAUSE)
            self.inject_fault()
            self.wait(next_at - time.monotonic())
        log(f"no more faults after {time.monotonic() - begun:.0f} s, at step {self.step(1)} of {self.num_steps}")
        while not self.is_complete():
            self.wait(5)

    def check(self, expected: Path) -> None:
        """Compares the complete run with the undisturbed one in the folder `expected`."""
        for running in self.machines.values():
            assert running.process.wait(60) == 0, "the last exit code"
        end = time.monotonic() + 10
        while (remaining := processes_with(self.rig.word)) and time.monotonic() < end:
            time.sleep(0.2)
        assert not remaining, f"processes remain: {remaining}"
        for n in (1, 2):
            assert self.rig.newest_checkpoint(n).name == f"step-{self.num_steps:08d}"
            assert (problem := verify(self.rig.newest_checkpoint(n))) is None, problem
        hashes = [sha256(each / "final" / "model.safetensors") for each in (expected, self.rig.run_folder(1))]
        assert hashes[0] == hashes[1], f"final weights {hashes[1]}, undisturbed {hashes[0]}"

    def close(self) -> None:
        for process in processes_with(self.rig.word):
            if is_running(process):
                process.kill()
        for running in self.machines.values():
            running.kill()
        self.hosts.close()

    def print_pauses(self) -> None:
        print("\n| Fault | Times | Seconds until both trained again: least, median, most |\n|---|---|---|")
        for name, values in sorted(self.pauses.items()):
            print(
                f"| {name} | {len(values)} | {min(values):.1f}, {statistics.median(values):.1f}, {max(values):.1f} |"
            )


def log(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def train_undisturbed(folder: Path, port: int, num_steps: int) -> Path:
    """Returns the folder of a run of two processes on this machine, without faults."""
    words = [BIN / "p2p-llm-forge", "--processes-per-node", 2, "--master-port", port, *FLAGS]
    words += ["--max-steps", num_steps, "--log-every", 10, "--checkpoint-every", 0, "--output-dir", folder / "run"]
    ended = Running(words, folder / "log", prefix=["env", "OMP_NUM_THREADS=1"]).finish(120 + num_steps)
    assert ended.code == 0, ended.output
    log(f"undisturbed: {ended.seconds:.0f} s")
    return folder / "run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = ROOT / "runs" / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "undisturbed").mkdir(parents=True)
    home = tempfile.mkdtemp()
    os.environ |= {"HOME": home, "HF_HOME": f"{home}/hf", "HF_HUB_OFFLINE": "1"}
    num_steps = max(50, int(arguments.minutes * 60 * TRAINING / (SLEEP + 0.05)))
    log(f"seed {arguments.seed}, {arguments.minutes:g} minutes, {num_steps} steps; logs in {folder}")
    expected = train_undisturbed(folder / "undisturbed", find_free_port(), num_steps)
    soak = Soak(folder, find_free_port(), num_steps, arguments.seed)
    failure, begun = "", time.monotonic()
    try:
        soak.run(arguments.minutes)
        soak.check(expected)
    except AssertionError as error:
        failure = str(error)
        for n in soak.machines:
            log(f"machine {n}:\n{soak.machines[n].log.read_text()[-4000:]}")
    finally:
        soak.close()
    soak.print_pauses()
    print(f"\nexit codes {soak.codes}; {time.monotonic() - begun:.0f} s; seed {arguments.seed}")
    print(f"FAILED: {failure}" if failure else f"the weights equal those of the undisturbed run, {num_steps} steps")
    sys.exit(bool(failure))


if __name__ == "__main__":
    main()
