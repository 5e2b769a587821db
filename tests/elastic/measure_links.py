"""Measures train_elastic.py and train.py between two machines of one core each, over links of several rates.

    python tests/elastic/measure_links.py --output artifacts/links.json
    python tests/elastic/measure_links.py --unequal --output artifacts/unequal.json
    python tests/elastic/measure_links.py --bytes --output artifacts/bytes.json

Needs root and network namespaces. Each machine has one core (taskset); the model has 26 million parameters, a step has
4 x 256 tokens. Bytes are counted at the network interface. With --unequal one peer gets a third of its core (a CPU
quota), and the link is not limited. --bytes compares int4 with fp32, for two and four peers. Nothing else should run
meanwhile.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from transformers import AutoTokenizer, GPT2Config

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from commands import accelerate_launcher  # noqa: E402
from networks import Hosts, shape  # noqa: E402
from run_folders import rows  # noqa: E402

from forge_lib.process import kill_process_tree  # noqa: E402

RATES = (5, 20, 100, 1000)  # Mbit/s
WARM_ROUNDS = 2  # not counted: speeds and the exchange are not known yet
ROUNDS = 4
FLAGS = ["--dataset-path", "data/sample_corpus.txt", "--sample-by", "paragraph", "--sequence-length", "256"]
FLAGS += ["--max-steps", "100000", "--learning-rate", "3e-4", "--mixed-precision", "no", "--device", "cpu"]
FLAGS += ["--eval-every", "0", "--checkpoint-every", "0"]


def make_model(folder: Path) -> Path:
    """Writes a model of 26 million parameters, with the bundled tokenizer."""
    AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2").save_pretrained(folder)
    GPT2Config(vocab_size=2048, n_positions=256, n_embd=512, n_layer=8, n_head=8).save_pretrained(folder)
    return folder


def sent_bytes(machines: Hosts, n: int) -> int:
    """Returns how many bytes a machine has sent."""
    link = json.loads(machines.call(n, "ip -json -statistics link show e0"))[0]
    return link["stats64"]["tx"]["bytes"]


class Machines:
    """Machines of one core each, and the programs that run on them; more than two share the two cores."""

    def __init__(self, folder: Path, rate: int | None, count: int = 2):
        self.folder, self.hosts = folder, Hosts(count)
        self.running: list[subprocess.Popen] = []
        if rate:
            for n in range(1, count + 1):
                shape(self.hosts, n, f"{rate}mbit")

    def start(self, n: int, words: list) -> psutil.Process:
        """Starts a program on a machine."""
        prefix = [*self.hosts.on(n), "taskset", "-c", str((n - 1) % 2), "env", "OMP_NUM_THREADS=1"]
        with open(self.folder / f"{n}.log", "wb") as log:
            process = subprocess.Popen([*prefix, *map(str, words)], cwd=ROOT, stdout=log, stderr=log)
        self.running.append(process)
        return psutil.Process(process.pid)

    def __enter__(self) -> "Machines":
        return self

    def __exit__(self, *_) -> None:
        for process in self.running:
            kill_process_tree(psutil.Process(process.pid))
            process.wait()
        self.hosts.close()

    def wait(self, condition, seconds: float) -> None:
        """Waits until a condition holds; raises TimeoutError with the end of the logs."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or any(process.poll() for process in self.running):
                logs = [path.read_text()[-2000:] for path in self.folder.glob("*.log")]
                raise TimeoutError("\n\n".join(logs))
            time.sleep(0.2)


def round_rows(folder: Path) -> list[dict]:
    """Returns the rows of the rounds that a peer has logged."""
    return rows(folder, "weights_hash") if (folder / "metrics.jsonl").exists() else []


def measure_peers(model: Path, rate: int | None, *flags: str, quota: float = 0.0, count: int = 2) -> dict:
    """Returns the figures of some peers, as medians over some rounds after the first ones.

    Args:
        model: folder of the model.
        rate: of each link, in Mbit/s; None: not limited.
        flags: of both peers.
        quota: share of its core that the second peer gets; 0: all of it.
        count: of the peers.
    """
    folder = Path(tempfile.mkdtemp())
    words = [sys.executable, "scripts/train_elastic.py", *FLAGS, "--model-name", model, "--batch-size", "4", *flags]
    words += ["--lighthouse", "http://10.77.0.1:29510", "--min-peers", str(count)]
    names = "abcd"[:count]
    with Machines(folder, rate, count) as machines:
        started = [
            machines.start(n, [*words, *serves, "--peer-name", name, "--output-dir", folder / name])
            for n, (name, serves) in enumerate(zip(names, [["--serve-lighthouse"], *[[]] * 3], strict=False), 1)
        ]
        with CpuQuota(started[1], quota):
            machines.wait(lambda: len(round_rows(folder / "a")) >= WARM_ROUNDS, 1200)
            begun, before = len(round_rows(folder / "a")), sent_bytes(machines.hosts, count)
            machines.wait(lambda: len(round_rows(folder / "a")) >= begun + ROUNDS, 2400)
            after, ended = sent_bytes(machines.hosts, count), len(round_rows(folder / "a"))
            machines.wait(lambda: all(len(round_rows(folder / name)) >= ended for name in names), 60)
            found = [round_rows(folder / name)[begun:ended] for name in names]
    tokens = sum(stop - start for row in found[0] for start, stop in row["samples"]) * 256
    return {
        "tokens_per_second": tokens / sum(row["round_seconds"] for row in found[0]),
        "utilization": [statistics.median(row["utilization"] for row in each) for each in found],
        "round_seconds": statistics.median(row["round_seconds"] for row in found[0]),
        "exchange_seconds": statistics.median(row["sync_seconds"] for row in found[0]),
        "steps": [sum(p["steps"] for p in row["participants"]) for row in found[0]],
        "sent_bytes_per_round": (after - before) / (ended - begun),
        "counted_bytes_per_round": statistics.median(row["bytes_sent"] for row in found[0]),
        "loss": found[0][-1]["loss"],
    }


def measure_alone(model: Path, quota: float = 0.0) -> float:
    """Returns the tokens per second of one peer alone."""
    folder = Path(tempfile.mkdtemp())
    words = [
        sys.executable,
        "scripts/train.py",
        *FLAGS,
        "--model-name",
        model,
        "--batch-size",
        "4",
        "--log-every",
        "4",
    ]
    with Machines(folder, None) as machines:
        process = machines.start(2, [*words, "--output-dir", folder / "a"])
        with CpuQuota(process, quota):
            machines.wait(lambda: (folder / "a" / "metrics.jsonl").exists() and len(rows(folder / "a")) >= 6, 900)
            return statistics.median(row["tokens_per_second"] for row in rows(folder / "a")[2:])


def measure_train(model: Path, rate: int) -> dict:
    """Returns the figures of train.py on two machines, with the same batch per machine."""
    folder = Path(tempfile.mkdtemp())
    flags = [*FLAGS, "--model-name", model, "--batch-size", "8", "--log-every", "1"]
    with Machines(folder, rate) as machines:
        for n in (1, 2):
            topology = {"num_machines": 2, "machine_rank": n - 1, "num_processes": 2}
            launcher = accelerate_launcher(folder, 29500, main_process_ip="10.77.0.1", **topology)
            machines.start(n, [*launcher, "scripts/train.py", *flags, "--output-dir", folder / str(n)])
        machines.wait(lambda: (folder / "1" / "metrics.jsonl").exists() and len(rows(folder / "1")) >= 5, 2400)
        found = rows(folder / "1")[2:]
    return {
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in found),
        "bytes_sent_per_step": statistics.median(row["bytes_sent"] for row in found),
    }


class CpuQuota:
    """Limits a process and its children to a share of one core, with a cgroup; a context manager."""

    def __init__(self, process: psutil.Process, share: float):
        self._process, self._share = process, share
        self._is_v2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        base = Path("/sys/fs/cgroup") if self._is_v2 else Path("/sys/fs/cgroup/cpu")
        self._folder = base / f"forge-{process.pid}"

    def __enter__(self) -> None:
        if not self._share:
            return
        self._folder.mkdir()
        quota = int(100_000 * self._share)
        if self._is_v2:
            (self._folder / "cpu.max").write_text(f"{quota} 100000")
        else:
            (self._folder / "cpu.cfs_period_us").write_text("100000")
            (self._folder / "cpu.cfs_quota_us").write_text(str(quota))
        for each in (self._process, *self._process.children(recursive=True)):
            (self._folder / "cgroup.procs").write_text(str(each.pid))

    def __exit__(self, *_) -> None:
        if self._share:
            for line in (self._folder / "cgroup.procs").read_text().split():
                (self._folder.parent / "cgroup.procs").write_text(line)
            self._folder.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file with the figures")
    parser.add_argument("--unequal", action="store_true", help="peers with speeds 3 : 1 instead of link rates")
    parser.add_argument("--bytes", action="store_true", help="bytes of int4 and fp32 instead of link rates")
    parser.add_argument("--rates", type=int, nargs="*", default=RATES, help="Mbit/s")
    parser.add_argument("--compressions", nargs="*", default=["int4", "fp16"])
    args = parser.parse_args()
    model = make_model(Path(tempfile.mkdtemp()))
    figures: dict[str, dict] = {}

    def add(name: str, found: dict) -> None:
        figures[name] = found
        print(name, json.dumps(found), flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(figures, indent=1))

    if args.bytes:
        for count, compression in itertools.product((2, 4), ("no", "int4")):
            flags = ["--sync-every", "10", "--outer-compression", compression]
            add(f"{count} peers, {compression}", measure_peers(model, None, *flags, count=count))
        return
    if args.unequal:
        add("alone", {"tokens_per_second": [measure_alone(model), measure_alone(model, 1 / 3)]})
        add("together", measure_peers(model, None, "--sync-every", "20", quota=1 / 3))
        return
    for rate in args.rates:
        for compression in args.compressions:
            add(f"{compression}, {rate} Mbit/s", measure_peers(model, rate, "--outer-compression", compression))
        add(f"train.py, {rate} Mbit/s", measure_train(model, rate))


if __name__ == "__main__":
    main()
