"""How fast two machines train together over links of several rates, and what they send.

Each machine is a network namespace with one core of this machine. Compared are train.py, which sends the gradient of
each step, and train_elastic.py, which sends the change of the weights after each round.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from forge_lib.benchmark.hosts import Hosts, shape
from forge_lib.benchmark.report import Report
from forge_lib.errors import UserError
from forge_lib.process import kill_process_tree

ROOT = Path(__file__).resolve().parents[2]
BATCH_SIZE, SEQUENCE_LENGTH = 4, 256  # of a step of one machine
WARM_ROUNDS, ROUNDS = 2, 4  # the first rounds are not counted: speeds and the exchange are not known yet
WARM_STEPS, STEPS = 2, 3
LIMIT_SECONDS = 3600.0
FLAGS = [
    *("--sample-by", "paragraph", "--sequence-length", str(SEQUENCE_LENGTH), "--max-steps", "100000"),
    *("--learning-rate", "3e-4", "--mixed-precision", "no", "--device", "cpu"),
    *("--eval-every", "0", "--checkpoint-every", "0"),
]
MODES = {
    "train.py": [],
    "train.py, fp16": ["--gradient-compression", "fp16"],
    "train_elastic.py, fp16": ["--outer-compression", "fp16"],
    "train_elastic.py, int4": ["--outer-compression", "int4"],
}


@dataclass(frozen=True)
class NetworkFigure:
    """Two machines over a link; medians, but means of the bytes and of the tokens/s of train_elastic.py.

    Attributes:
        mode: a key of MODES.
        rate: of the link of each machine, in Mbit/s.
        tokens_per_second: of both together.
        sent_bytes: of one machine per step or round, counted at its network interface.
        utilization: part of the time in which a machine computes, for each machine; train_elastic.py only.
        round_seconds, exchange_seconds: of a round; train_elastic.py only.
    """

    mode: str
    rate: int
    tokens_per_second: float
    sent_bytes: float
    utilization: Sequence[float] = ()
    round_seconds: float = 0.0
    exchange_seconds: float = 0.0


def check_rights() -> None:
    """Raises UserError if this process may not create machines."""
    if os.geteuid():
        raise UserError("the links between machines are Linux network namespaces: run this as root")


class Machines:
    """Machines with one core each, and the programs that run on them; more than two share two cores.

    Args:
        count: of the machines.
        rate: of their links, in Mbit/s; 0: not limited.

    Attributes:
        folder: for the run folders and the logs; it is not removed.
        processes: that were started, in their order.
    """

    def __init__(self, count: int, rate: int):
        self.folder = Path(tempfile.mkdtemp())
        self.hosts = Hosts(count)
        self._running: list[subprocess.Popen] = []
        self.processes: list[psutil.Process] = []
        for n in range(1, count + 1) if rate else ():
            shape(self.hosts, n, f"{rate}mbit")

    def __enter__(self) -> "Machines":
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self._running:
            if process.poll() is None:
                kill_process_tree(psutil.Process(process.pid))
            process.wait()
        self.hosts.close()

    def start(self, n: int, words: Sequence[Any]) -> psutil.Process:
        """Starts a program on machine n, from 1."""
        core = str((n - 1) % len(os.sched_getaffinity(0)))
        prefix = [*self.hosts.on(n), "taskset", "-c", core, "env", "OMP_NUM_THREADS=1"]
        with open(self.folder / f"{n}.log", "wb") as log:
            process = subprocess.Popen([*prefix, *map(str, words)], cwd=ROOT, stdout=log, stderr=log)
        self._running.append(process)
        self.processes.append(psutil.Process(process.pid))
        return self.processes[-1]

    def rows(self, name: str, key: str) -> list[dict]:
        """Returns the rows with a key from the metrics.jsonl of the run folder `name`."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [row for row in map(json.loads, lines) if key in row]

    def wait(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition holds.

        Raises:
            RuntimeError: a program has failed, or all have ended, or an hour has passed; with the end of their logs.
        """
        end = time.monotonic() + LIMIT_SECONDS
        while True:
            codes = [process.poll() for process in self._running]
            if condition():
                return
            if any(codes) or None not in codes or time.monotonic() > end:
                raise RuntimeError("\n\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log")))
            time.sleep(0.2)

    def sent_bytes(self, n: int) -> int:
        """Returns how many bytes machine n has sent."""
        link = json.loads(self.hosts.call(n, "ip -json -statistics link show e0"))[0]
        return link["stats64"]["tx"]["bytes"]


def measure_links(
    model: Path, num_parameters: int, dataset: str, rates: Sequence[int], modes: Sequence[str]
) -> Report:
    """Measures all modes over links of all rates, and prints each figure as soon as it is there.

    Args:
        model: folder of the model, with that many parameters.
        dataset: path of the training data.
        rates: Mbit/s.
        modes: keys of MODES.
    """
    figures = []
    for rate in rates:
        for mode in modes:
            measure = measure_peers if mode.startswith("train_elastic.py") else measure_train
            figures.append(measure(model, dataset, rate, mode))
            print(json.dumps(asdict(figures[-1])), file=sys.stderr, flush=True)
    return report_links(figures, num_parameters)


def report_links(figures: Sequence[NetworkFigure], num_parameters: int) -> Report:
    """Returns the table and the plot of tokens/s over the rate of the links."""

    def plot(axes: Any) -> None:
        for mode in MODES:
            points = sorted((each.rate, each.tokens_per_second) for each in figures if each.mode == mode)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=mode)
        rates = sorted({each.rate for each in figures})
        axes.set_xscale("log")
        axes.set_xticks(rates, [str(rate) for rate in rates])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("link of each machine, Mbit/s")
        axes.set_ylabel("tokens/s of both machines")
        axes.grid(alpha=0.3)
        axes.legend()

    columns = ["program", "Mbit/s", "tokens/s", "MB sent per step or round", "utilization", "round", "exchange"]
    rows = [
        [
            each.mode, str(each.rate), f"{each.tokens_per_second:,.0f}", f"{each.sent_bytes / 1e6:.1f}",
            " and ".join(f"{share:.2f}" for share in each.utilization),
            f"{each.round_seconds:.0f} s" if each.round_seconds else "",
            f"{each.exchange_seconds:.1f} s" if each.exchange_seconds else "",
        ]
        for each in figures
    ]  # fmt: skip
    title = f"Two machines of one core each, {num_parameters / 1e6:.0f} M parameters"
    return Report("network", title, columns, rows, [asdict(each) for each in figures], plot)


def measure_train(model: Path, dataset: str, rate: int, mode: str) -> NetworkFigure:
    """Measures train.py on two machines."""
    program = Path(sys.executable).with_name("p2p-llm-forge")
    flags = [*FLAGS, *MODES[mode], "--model-name", model, "--dataset-path", dataset, "--log-every", 1]
    with Machines(2, rate) as machines:
        for n in (1, 2):
            place = ["--num-nodes", 2, "--node-rank", n - 1, "--master-addr", "10.77.0.1"]
            output = ["--batch-size", 2 * BATCH_SIZE, "--output-dir", machines.folder / str(n)]
            machines.start(n, [program, *flags, *place, *output])
        machines.wait(lambda: len(machines.rows("1", "loss")) >= WARM_STEPS)
        before, begun = machines.sent_bytes(2), len(machines.rows("1", "loss"))
        machines.wait(lambda: len(machines.rows("1", "loss")) >= begun + STEPS)
        after, found = machines.sent_bytes(2), machines.rows("1", "loss")[begun:]
    speed = statistics.median(row["tokens_per_second"] for row in found)
    return NetworkFigure(mode, rate, speed, (after - before) / len(found))


def measure_peers(
    model: Path, dataset: str, rate: int, mode: str, count: int = 2, flags: Sequence[Any] = ()
) -> NetworkFigure:
    """Measures train_elastic.py on some machines.

    Args:
        model, dataset: as for `measure_links`.
        rate: Mbit/s; 0: not limited.
        mode: a key of MODES, or any name.
        count: of the peers.
        flags: in addition to those of the mode.
    """
    with Machines(count, rate) as machines:
        names = start_peers(machines, model, dataset, count, [*MODES.get(mode, []), *flags])
        return measure_rounds(machines, names, mode, rate)


def start_peers(machines: Machines, model: Path, dataset: str, count: int, flags: Sequence[Any]) -> list[str]:
    """Starts a peer on each machine, and a lighthouse on the first; returns the names of their run folders."""
    words = [sys.executable, "scripts/train_elastic.py", *FLAGS, *flags, "--model-name", model]
    words += ["--dataset-path", dataset, "--batch-size", BATCH_SIZE]
    words += ["--lighthouse", "http://10.77.0.1:29510", "--min-peers", count]
    names = [str(n) for n in range(1, count + 1)]
    for n, name in enumerate(names, 1):
        serves = ["--serve-lighthouse"] if n == 1 else []
        machines.start(n, [*words, *serves, "--peer-name", name, "--output-dir", machines.folder / name])
    return names


def measure_rounds(machines: Machines, names: Sequence[str], mode: str, rate: int) -> NetworkFigure:
    """Measures some rounds of peers that run, after the first ones."""

    def num_rounds(name: str) -> int:
        return len(machines.rows(name, "weights_hash"))

    first, last = names[0], len(names)
    machines.wait(lambda: num_rounds(first) >= WARM_ROUNDS)
    before, begun = machines.sent_bytes(last), num_rounds(first)
    machines.wait(lambda: num_rounds(first) >= begun + ROUNDS)
    after, ended = machines.sent_bytes(last), num_rounds(first)
    machines.wait(lambda: all(num_rounds(name) >= ended for name in names))
    found = [machines.rows(name, "weights_hash")[begun:ended] for name in names]
    num_samples = sum(stop - start for row in found[0] for start, stop in row["samples"])
    return NetworkFigure(
        mode,
        rate,
        num_samples * SEQUENCE_LENGTH / sum(row["round_seconds"] for row in found[0]),
        (after - before) / (ended - begun),
        [statistics.median(row["utilization"] for row in rows) for rows in found],
        statistics.median(row["round_seconds"] for row in found[0]),
        statistics.median(row["sync_seconds"] for row in found[0]),
    )
