"""Random faults, one every 20 to 60 seconds, against a run of two machines, until it is through.

    python tests/faults/soak.py --minutes 60 --seed 0

The machines are network namespaces (root, iproute2). On each `p2p-llm-forge --max-restarts 100000` trains; where it
has ended it is started again, as a person would. Each two minutes there must be a newer checkpoint. Once the minutes
are over the run is left in peace; its weights must then be those of a run that nothing disturbed, bit for bit, its
newest checkpoints whole, and no process left. Prints what was done and how long training stood still after it. The
same seed draws the same faults. Messages and checkpoints stay in runs/soak.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from conftest import BIN, ROOT, Hosts, Running, is_running, lock_of, processes_with, sha256
from test_faults import FLAGS, Rig

from forge_lib.checkpoints import format as checkpoint

TIMEOUT = 8
SLEEP = 0.25  # in each step: what a step takes, about
STALLED_SECONDS = 120
EACH = [20, 60]  # seconds between two faults
TRAINING = 0.75  # of the time, at the most, goes into steps; the rest into starting again


class Soak:
    """Two machines, what is done to them, and what that cost."""

    def __init__(self, folder: Path, port: int, num_steps: int, seed: int):
        self.random, self.num_steps, self.folder = random.Random(seed), num_steps, folder
        self.hosts = Hosts(2)
        self.started = 0
        self.rig = Rig(self._start, folder, port, self.hosts)
        self.machines: dict[int, Running] = {}
        self.off: set[int] = set()  # machines without power
        self.newest, self.newest_at = -1, time.monotonic()
        self.pauses: dict[str, list[float]] = {}
        self.codes: dict[int, int] = {}

    def _start(self, words: list, **options) -> Running:
        self.started += 1
        return Running(words, self.folder / f"start_{self.started:03}.log", **options)

    def keep(self) -> None:
        """Starts what has ended, and looks whether the run comes on."""
        for n in (1, 2):
            ended = n in self.machines and self.machines[n].process.poll() is not None
            if ended:
                code = self.machines.pop(n).process.returncode
                self.codes[code] = self.codes.get(code, 0) + 1
                say(f"machine {n} has ended with exit code {code}")
            if n not in self.machines and n not in self.off and not self.is_done():
                flags = ["--max-restarts", 100000, "--timeout-seconds", TIMEOUT, "--max-steps", self.num_steps]
                flags += ["--log-every", 10, "--check-replicas-every", 50]
                slow = {"do": "sleep", "at": "computing", "seconds": SLEEP}
                self.machines[n] = self.rig.machine(n, *flags, faults=[slow])
        steps = [int(p.name[5:]) for n in (1, 2) for p in (self.rig.run_folder(n) / "checkpoints").glob("step-*")]
        if max(steps, default=-1) > self.newest:
            self.newest, self.newest_at = max(steps), time.monotonic()
        if time.monotonic() - self.newest_at > STALLED_SECONDS:
            raise AssertionError(f"no checkpoint after step {self.newest} for {STALLED_SECONDS} s")

    def wait(self, seconds: float, goes_on: bool = True) -> None:
        """Waits, keeping the machines up."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.is_done():
            if goes_on:
                self.keep()
            time.sleep(0.25)

    def is_done(self) -> bool:
        return (self.rig.run_folder(1) / "final" / "README.md").exists()

    def worker(self, n: int):
        """The training process of machine n, if there is one now."""
        return self.rig.workers().get(n - 1)

    # The faults. Each returns when the machines are as they should be again.

    def kill_worker(self, n: int) -> None:
        if worker := self.worker(n):
            worker.kill()

    def kill_machine(self, n: int) -> None:
        """All its processes, supervisor and launcher too; it is started again a little later."""
        self.off.add(n)
        folder = str(self.rig.run_folder(n))
        for process in processes_with(self.rig.word):
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
            self.machines[n].process.wait(60)  # --grace-seconds; it finishes its step: that is no sign of training on

    def sigstop(self, n: int) -> None:
        if worker := self.worker(n):
            worker.suspend()
            self.wait(TIMEOUT + self.random.uniform(1, 6))
            if is_running(worker):
                worker.resume()

    def fault(self) -> None:
        """Draws one, and measures until both machines have done two steps more."""
        kinds = [self.kill_worker, self.kill_machine, self.cut_short, self.cut_long, self.sigterm, self.sigstop]
        do, n = self.random.choice(kinds), self.random.choice([1, 2])
        begun = time.monotonic()
        say(f"{do.__name__} machine {n}, at step {self.step(1)} and {self.step(2)}")
        do(n)
        threading.Thread(target=self.measure, args=(do.__name__, begun), daemon=True).start()

    def measure(self, name: str, begun: float) -> None:
        seen, more = {n: self.step(n) for n in (1, 2)}, {1: 0, 2: 0}
        while min(more.values()) < 2 and not self.is_done():
            for n in (1, 2):
                step = self.step(n)
                more[n] += step > seen[n]
                seen[n] = step
            time.sleep(0.05)
        if not self.is_done():
            self.pauses.setdefault(name, []).append(time.monotonic() - begun)

    def step(self, n: int) -> int:
        return lock_of(self.rig.run_folder(n)).get("step", -1)

    def close(self) -> None:
        for process in processes_with(self.rig.word):
            if is_running(process):
                process.kill()
        for running in self.machines.values():
            running.kill()
        self.hosts.close()


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def undisturbed(folder: Path, port: int, num_steps: int) -> tuple[Path, float]:
    """Returns the folder of a run of two processes on this machine, and its seconds a step."""
    words = [BIN / "p2p-llm-forge", "--processes-per-node", 2, "--master-port", port, *FLAGS]
    words += ["--max-steps", num_steps, "--log-every", 10, "--checkpoint-every", 0, "--output-dir", folder / "run"]
    ended = Running(words, folder / "log", prefix=["env", "OMP_NUM_THREADS=1"]).finish(120 + num_steps)
    assert ended.code == 0, ended.output
    return folder / "run", ended.seconds


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    num_steps = max(50, int(arguments.minutes * 60 * TRAINING / (SLEEP + 0.05)))
    say(f"seed {arguments.seed}, {arguments.minutes:g} minutes, {num_steps} steps; messages in {folder}")
    expected, seconds = undisturbed(folder / "undisturbed", port, num_steps)
    say(f"undisturbed: {seconds:.0f} s")
    soak = Soak(folder, port, num_steps, arguments.seed)
    failed = ""
    begun = time.monotonic()
    try:
        soak.wait(soak.random.uniform(*EACH))
        while time.monotonic() - begun < 60 * arguments.minutes and not soak.is_done():
            next_at = time.monotonic() + soak.random.uniform(*EACH)
            soak.fault()
            soak.wait(next_at - time.monotonic())
        say(f"no more faults after {time.monotonic() - begun:.0f} s, at step {soak.step(1)} of {num_steps}")
        while not soak.is_done():
            soak.wait(5)
        for running in soak.machines.values():
            assert running.process.wait(60) == 0, "the last exit code"
        until = time.monotonic() + 10
        while (left := processes_with(soak.rig.word)) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left, f"processes are left: {left}"
        for n in (1, 2):
            assert soak.rig.newest(n).name == f"step-{num_steps:08d}"
            assert (problem := checkpoint.verify(soak.rig.newest(n))) is None, problem
        hashes = [sha256(each / "final" / "model.safetensors") for each in (expected, soak.rig.run_folder(1))]
        assert hashes[0] == hashes[1], f"final weights {hashes[1]}, undisturbed {hashes[0]}"
    except AssertionError as error:
        failed = str(error)
        for n in soak.machines:
            say(f"machine {n}:\n{soak.machines[n].log.read_text()[-4000:]}")
    finally:
        soak.close()
    print("\n| Fault | Times | Seconds until both trained on: least, median, most |\n|---|---|---|")
    for name, values in sorted(soak.pauses.items()):
        print(f"| {name} | {len(values)} | {min(values):.1f}, {statistics.median(values):.1f}, {max(values):.1f} |")
    print(f"\nsupervisors ended with codes {soak.codes}; {time.monotonic() - begun:.0f} s; seed {arguments.seed}")
    print(f"FAILED: {failed}" if failed else f"the weights are those of the undisturbed run, {num_steps} steps")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
