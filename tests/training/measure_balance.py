"""Measures --balance of train.py on machines of unequal speeds.

    python tests/training/measure_balance.py speed --output artifacts/balance
    python tests/training/measure_balance.py all --output artifacts/balance

Needs root: each machine is a network namespace with one core, and a CPU quota makes it slower. Nothing else should run
meanwhile. Writes one JSON file for each part:

speed    machines of 1 : 1/3, 1 : 1/2 and 1 : 1/5 of a core, and three of 1 : 2 : 3: tokens/s with `auto`, with `even`,
         the sum of each machine alone, and the sum of the speeds of the forward and backward passes in the run.
moves    the quota goes to the other machine twice: after how many steps the shares follow, and whether they stay; the
         losses compared with those of one process.
equal    two equal machines, 200 steps, `auto` and `even` in turn; then with another program that runs at times.
link     two machines with links of 100 Mbit/s, equal and 1 : 1/3: the measured speeds, and the shares.
memory   the memory of one of two machines is limited: the micro-batches of `--micro-batch-size auto`, and the losses.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cpu_quota import CpuQuota  # noqa: E402

from forge_lib.benchmark.network import Machines  # noqa: E402

PROGRAM = Path(sys.executable).with_name("p2p-llm-forge")
BATCH = 36  # sequences
SEQUENCE_LENGTH = 256
ROUNDS = 2  # of `speed`; the machine is noisy, so all programs run in turn
FLAGS = ["--model-name", "data/tiny_gpt2", "--dataset-path", "data/sample_corpus.txt", "--sample-by", "paragraph"]
FLAGS += ["--sequence-length", SEQUENCE_LENGTH, "--batch-size", BATCH, "--mixed-precision", "no", "--device", "cpu"]
FLAGS += ["--learning-rate", "1e-3", "--eval-every", "0", "--checkpoint-every", "0", "--log-every", "1"]
FLAGS += ["--write-report", "false", "--micro-batch-size", "8"]
SPEEDS = {"1 : 1/3": [1, 1 / 3], "1 : 1/2": [1, 1 / 2], "1 : 1/5": [1, 1 / 5], "1 : 2 : 3": [0.2, 0.4, 0.6]}
CGROUPS_V1 = Path("/sys/fs/cgroup/memory")


class Training:
    """A run on machines with quotas; use it in a `with` statement.

    Args:
        quotas: of each machine, in cores; they apply after the first step.
        flags: more of them.
        rate: of the links, in Mbit/s; 0: not limited.
        num_steps: of the run.
    """

    def __init__(self, quotas: list[float], flags: list, rate: int = 0, num_steps: int = 10_000):
        self._stack = ExitStack()
        self.machines = self._stack.enter_context(Machines(len(quotas), rate))
        for n in range(1, len(quotas) + 1):
            place = ["--num-nodes", len(quotas), "--node-rank", n - 1, "--master-addr", "10.77.0.1"]
            output = ["--max-steps", num_steps, "--output-dir", self.machines.folder / str(n)]
            words = [PROGRAM, *place] if len(quotas) > 1 else [sys.executable, "scripts/train.py"]
            self.machines.start(n, [*words, *FLAGS, *flags, *output])
        self.wait_for_step(1)
        self._quotas = [
            self._stack.enter_context(CpuQuota(process, quota))
            for process, quota in zip(self.machines.processes, quotas, strict=True)
        ]

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def set_quotas(self, quotas: list[float]) -> int:
        """Changes the quotas; returns the step in which that happens."""
        for quota, share in zip(self._quotas, quotas, strict=True):
            quota.set(share)
        return len(self.rows())

    def rows(self, key: str = "loss") -> list[dict]:
        """Returns the rows of metrics.jsonl with a key."""
        return self.machines.rows("1", key)

    def changes(self) -> list[dict]:
        """Returns the changes of the shares."""
        return [row for row in self.rows("event") if row["event"] == "shares"]

    def wait_for_step(self, step: int) -> None:
        """Waits until the machines have done so many steps."""
        self.machines.wait(lambda: len(self.rows()) >= step)

    def tokens_per_second(self, first: int) -> float:
        """Returns the speed from a step on."""
        return statistics.median(row["tokens_per_second"] for row in self.rows()[first:])


def measure_speed(name: str, quotas: list[float]) -> dict:
    """Returns tokens/s with equal shares and with fitting ones, and those of each machine alone: medians of rounds."""
    rounds: dict[str, list] = {"even": [], "auto": [], "alone": [], "own": []}
    changes = []
    for _ in range(ROUNDS):
        with Training(quotas, ["--balance", "even"]) as training:
            training.wait_for_step(8)
            rounds["even"].append(training.tokens_per_second(2))
        with Training(quotas, ["--balance", "auto"]) as training:
            training.wait_for_step(40)
            rounds["auto"].append(training.tokens_per_second(25))
            speeds = [sum(row["sequences_per_second"]) for row in training.rows()[25:] if row["sequences_per_second"]]
            rounds["own"].append(SEQUENCE_LENGTH * statistics.median(speeds))
            changes.append([[row["step"], row["shares"]] for row in training.changes()])
        alone = []
        for quota in quotas:
            with Training([quota], []) as training:
                training.wait_for_step(6)
                alone.append(training.tokens_per_second(2))
        rounds["alone"].append(sum(alone))
    even, auto, alone, own = (statistics.median(values) for values in rounds.values())
    found = {"speeds": name, "gain": auto / even, "of_sum": auto / alone, "of_own_speeds": auto / own}
    found |= {"rounds": rounds, "changes": changes}
    print(json.dumps(found), flush=True)
    return found


def measure_moves() -> dict:
    """Returns after how many steps the shares follow a quota that goes to the other machine."""
    moves = {}
    flags = ["--batch-size", 16]
    with Training([1, 1 / 3], ["--balance", "auto", *flags], num_steps=240) as training:
        for step, quotas in ((80, [1 / 3, 1]), (160, [1, 1 / 3])):
            training.wait_for_step(step)
            moves[training.set_quotas(quotas)] = quotas
        training.wait_for_step(240)
        changes = [[row["step"], row["shares"]] for row in training.changes()]
        losses = [row["loss"] for row in training.rows()]
        warned = [
            line for line in (training.machines.folder / "1.log").read_text().splitlines() if "as before" in line
        ]
    with Training([1], flags, num_steps=240) as training:
        training.wait_for_step(240)
        expected = [row["loss"] for row in training.rows()]
    difference = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    return {"moves": moves, "changes": changes, "largest_relative_difference_of_losses": difference, "warned": warned}


def measure_equal(is_busy: bool) -> list[dict]:
    """Returns the median step of `auto` and `even` in turn, and how often the shares change."""
    found = []
    for how in ("even", "auto", "even", "auto"):
        with Training([1, 1], ["--balance", how, "--batch-size", 12]) as training:
            other = start_busy_program() if is_busy else None
            training.wait_for_step(201)
            if other:
                other.kill()
                other.wait()
            seconds = statistics.median(row["step_seconds"] for row in training.rows()[1:])
            found.append({"balance": how, "seconds": seconds, "changes": len(training.changes())})
    return found


def start_busy_program() -> subprocess.Popen:
    """Starts a program that computes for up to 0.3 s about once per second."""
    code = "import random, time\nwhile True:\n end = time.time() + random.uniform(0, 0.3)\n"
    code += " while time.time() < end: pass\n time.sleep(random.uniform(0.3, 1.2))"
    return subprocess.Popen([sys.executable, "-c", code])


def measure_link(quotas: list[float]) -> dict:
    """Returns the measured speeds of machines that exchange over 100 Mbit/s."""
    with Training(quotas, ["--balance", "auto"], rate=100) as training:
        training.wait_for_step(60)
        row = training.rows()[-1]
        changes = [[row["step"], row["shares"]] for row in training.changes()]
    names = ("shares", "sequences_per_second", "step_seconds", "compute_seconds", "sync_seconds")
    return {name: row[name] for name in names} | {"quotas": quotas, "changes": changes}


def measure_memory(limit: int) -> dict:
    """Returns the micro-batches of two machines, of which the second may use so many bytes, and how losses differ.

    Raises:
        SystemExit: this system has no cgroups of version 1 for memory.
    """
    if not CGROUPS_V1.exists():
        raise SystemExit(f"{CGROUPS_V1} is missing")
    folder = CGROUPS_V1 / "forge-measure"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(str(limit))
    try:
        with Machines(2, 0) as machines:
            for n in (1, 2):
                place = ["--num-nodes", 2, "--node-rank", n - 1, "--master-addr", "10.77.0.1", "--max-steps", 30]
                output = ["--micro-batch-size", "auto", "--batch-size", 96, "--output-dir", machines.folder / str(n)]
                process = machines.start(n, [PROGRAM, *place, *FLAGS, *output])
                if n == 2:
                    (folder / "cgroup.procs").write_text(str(process.pid))
            machines.wait(lambda: len(machines.rows("1", "loss")) >= 30)
            losses = [row["loss"] for row in machines.rows("1", "loss")]
            logs = "".join((machines.folder / f"{n}.log").read_text() for n in (1, 2))
            peak = int((folder / "memory.max_usage_in_bytes").read_text())
            while any(process.is_running() and process.status() != "zombie" for process in machines.processes):
                time.sleep(0.2)
        with Training([1], ["--batch-size", 96], num_steps=30) as training:
            training.wait_for_step(30)
            expected = [row["loss"] for row in training.rows()]
    finally:
        time.sleep(1)
        folder.rmdir()
    difference = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    sizes = re.findall(r"process \d: micro-batches of up to \d+ sequences", logs)
    return {"limit": limit, "peak": peak, "sizes": sizes, "largest_relative_difference_of_losses": difference}


def main() -> None:
    parts = {
        "speed": lambda: [measure_speed(name, quotas) for name, quotas in SPEEDS.items()],
        "moves": measure_moves,
        "equal": lambda: {"quiet": measure_equal(False), "busy": measure_equal(True)},
        "link": lambda: [measure_link([1, 1]), measure_link([1, 1 / 3])],
        "memory": lambda: measure_memory(1_000_000_000),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*parts, "all"])
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in parts if args.part == "all" else [args.part]:
        figures = parts[name]()
        print(name, json.dumps(figures, indent=1), flush=True)
        (args.output / f"{name}.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
