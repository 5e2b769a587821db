"""Compares the forecast of scripts/check_cluster.py with the speed of scripts/train.py, on links of several speeds.

    .venv/bin/python tests/check/forecast.py --rates 20 100 1000 --processes 1 1

The machines are network namespaces on this machine (needs root and iproute2). They share its processor, both for the
forecast and for training. Prints a Markdown table. Run nothing else at the same time.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from commands import BIN, TINY, Running
from networks import Hosts, shape

FLAGS = ["--mixed-precision", "no", "--micro-batch-size", "4"]
QUIET = ["--eval-every", "0", "--checkpoint-every", "0", "--check-replicas-every", "0", "--log-every", "1"]
NAMES = ("alice", "bob", "carol", "dave")
MODES = {"ddp": [], "ddp_fp16": ["--gradient-compression", "fp16"]}


def main() -> None:
    """Prints a row for each rate, with gradients in fp32 and in fp16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, nargs="+", default=[20, 100, 1000], help="Mbit/s of the links")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 1], help="number on each machine")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sequence-length", default="128")
    parser.add_argument("--batch-size", default="12")
    parser.add_argument("--model-name", default=TINY[1])
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    print(
        "| Mbit/s | gradients | forecast, tokens/s | train.py, tokens/s | forecast / train.py |\n|---|---|---|---|---|"
    )
    machines = Hosts(len(args.processes))
    try:
        with tempfile.TemporaryDirectory() as folder:
            for rate in args.rates:
                for n in range(1, len(args.processes) + 1):
                    shape(machines, n, f"{rate}mbit")
                compare(machines, Path(folder) / str(rate), rate, args)
    finally:
        machines.close()


def compare(machines: Hosts, folder: Path, rate: int, args: argparse.Namespace) -> None:
    """Prints the rows of one rate."""
    folder.mkdir()
    listed = [
        f"  - {{name: {name}, address: 10.77.0.{n}, processes: {count}}}"
        for n, (name, count) in enumerate(zip(NAMES, args.processes, strict=False), 1)
    ]
    (folder / "cluster.yaml").write_text("\n".join(["name: lab", "device: cpu", "machines:", *listed]))
    run = ["--model-name", args.model_name, "--sequence-length", args.sequence_length, "--batch-size", args.batch_size]

    def on_all(name: str, command: list) -> list[str]:
        running = []
        for n in range(1, len(args.processes) + 1):
            words = [str(word).replace("MACHINE", str(n)) for word in command]
            running.append(Running(words, folder / f"{name}{n}.log", prefix=machines.on(n)))
        ended = [each.finish(600) for each in running]
        assert not any(each.code for each in ended), "\n".join(each.output for each in ended)
        return [each.output for each in ended]

    check = [sys.executable, "scripts/check_cluster.py", folder / "cluster.yaml", "--json", *run, *FLAGS]
    output = on_all("check", check)[0]
    forecast = json.loads(output[output.index("{\n") :])["forecast"]["here"]
    for mode, flags in MODES.items():
        command = [
            "p2p-llm-forge",
            "--cluster",
            folder / "cluster.yaml",
            *TINY[2:],
            *run,
            *FLAGS,
            *QUIET,
            "--balance",
            "even",
            *flags,
        ]
        on_all(mode, [*command, "--max-steps", args.steps, "--output-dir", folder / mode / "MACHINE"])
        lines = (folder / mode / "1" / "metrics.jsonl").read_text().splitlines()
        speeds = [row["tokens_per_second"] for row in map(json.loads, lines) if "loss" in row][2:]  # warm
        real, expected = statistics.harmonic_mean(speeds), forecast[mode]["tokens_per_second"]
        print(f"| {rate} | {mode} | {expected:,.0f} | {real:,.0f} | {expected / real:.2f} |", flush=True)


if __name__ == "__main__":
    main()
