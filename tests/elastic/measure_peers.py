"""Measures unequal peers of train_elastic.py, and the bytes that peers send; scripts/benchmark.py measures links.

    python tests/elastic/measure_peers.py unequal --output artifacts/unequal.json
    python tests/elastic/measure_peers.py losses --output artifacts/unequal_losses.json
    python tests/elastic/measure_peers.py bytes --output artifacts/bytes.json

Needs root and network namespaces. Each machine has one core; the model has 26 million parameters, a step has 4 x 256
tokens. Nothing else should run meanwhile. The exit code is 1 if a figure is not within its bounds.

unequal  one of two peers gets a third of its core (a CPU quota): tokens/s, beside the sum of both alone.
losses   the held-out loss of two such peers and of two equal ones, after the same number of tokens: of the bundled
         model, which was trained before. (With random weights, an average of few rounds decides more than the data.)
bytes    counted at the network interface: int4 and fp32, for two and for four peers.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cpu_quota import CpuQuota  # noqa: E402
from python_library import prepare_library  # noqa: E402

from forge_lib.benchmark.model import sized_config, write_model  # noqa: E402
from forge_lib.benchmark.network import (  # noqa: E402
    BATCH_SIZE,
    FLAGS,
    Machines,
    measure_peers,
    measure_rounds,
    start_peers,
)

TINY, DATA = str(ROOT / "data" / "tiny_gpt2"), str(ROOT / "data" / "sample_corpus.txt")
SLOW = 1 / 3  # of a core
NUM_STEPS = 2000  # of both peers together, for the held-out loss


def tokens_per_second_alone(model: Path, share: float) -> float:
    """Returns the speed of one machine with a share of its core."""
    flags = [*FLAGS, "--model-name", model, "--dataset-path", DATA, "--batch-size", BATCH_SIZE, "--log-every", 4]
    with Machines(2, 0) as machines:
        process = machines.start(
            2, [sys.executable, "scripts/train.py", *flags, "--output-dir", machines.folder / "2"]
        )
        with CpuQuota(process, share):
            machines.wait(lambda: len(machines.rows("2", "loss")) >= 6)
            return statistics.median(row["tokens_per_second"] for row in machines.rows("2", "loss")[2:])


def speed_of_unequal_peers(model: Path) -> dict:
    """Returns the figures of two peers, the second with a third of its core."""
    with Machines(2, 0) as machines:
        names = start_peers(machines, model, DATA, 2, ["--sync-every", 20])
        with CpuQuota(machines.processes[1], SLOW):
            return asdict(measure_rounds(machines, names, "int4, 3 : 1", 0))


def train_model(store: Path, folder: Path) -> Path:
    """Trains the bundled model with train.py for a while; returns its folder."""
    flags = [*FLAGS, "--model-name", TINY, "--dataset-path", store, "--batch-size", 4 * BATCH_SIZE]
    flags += ["--max-steps", 1000, "--lr-scheduler", "constant_with_warmup", "--output-dir", folder]
    subprocess.run([sys.executable, "scripts/train.py", *map(str, flags)], cwd=ROOT, check=True)
    return folder / "final"


def held_out_loss(model: Path, store: Path, share: float) -> float:
    """Returns the loss after a run of two peers, the second with a share of its core."""
    flags = ["--max-steps", NUM_STEPS, "--sync-every", 20, "--warmup-steps", NUM_STEPS // 20]
    flags += ["--eval-fraction", 0.005, "--eval-every", NUM_STEPS]
    with Machines(2, 0) as machines:
        names = start_peers(machines, model, str(store), 2, flags)
        with CpuQuota(machines.processes[1], share):
            machines.wait(lambda: len(machines.rows(names[0], "eval_loss")) == 2)  # at the begin and at the end
            return machines.rows(names[0], "eval_loss")[-1]["eval_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["unequal", "losses", "bytes"])
    parser.add_argument("--output", type=Path, required=True, help="JSON file with the figures")
    args = parser.parse_args()
    model = Path(tempfile.mkdtemp())
    write_model(sized_config(TINY, 512, 8, False), TINY, model)
    figures: dict = {}
    failed: list[str] = []

    def add(name: str, found: object) -> None:
        figures[name] = found
        print(name, json.dumps(found), flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(figures, indent=1))

    def check(name: str, value: float, at_least: float, at_most: float = math.inf) -> None:
        add(name, value)
        if not at_least <= value <= at_most:
            failed.append(name)
            print(f"{name}: {value:.3f} is not between {at_least} and {at_most}", flush=True)

    if args.what == "bytes":
        for count, compression in itertools.product((2, 4), ("no", "int4")):
            flags = ["--sync-every", 10, "--outer-compression", compression]
            add(f"{count} peers, {compression}", asdict(measure_peers(model, DATA, 0, compression, count, flags)))
        for count in (2, 4):
            ratio = figures[f"{count} peers, int4"]["sent_bytes"] / figures[f"{count} peers, no"]["sent_bytes"]
            check(f"{count} peers, bytes of int4 / fp32", ratio, 0.0, 0.14)
    elif args.what == "losses":
        store = prepare_library(model / "library")
        trained = train_model(store, model / "trained")
        losses = [held_out_loss(trained, store, share) for share in (1, SLOW)]
        add("held-out loss, equal and unequal", losses)
        check("held-out loss, unequal / equal", losses[1] / losses[0], 0.98, 1.02)
    else:
        add("tokens/s alone", [tokens_per_second_alone(model, share) for share in (1, SLOW)])
        add("together", speed_of_unequal_peers(model))
        together, alone = figures["together"], sum(figures["tokens/s alone"])
        check("tokens/s / sum of both alone", together["tokens_per_second"] / alone, 0.85)
        check("utilization of the less utilized peer", min(together["utilization"]), 0.85)
    sys.exit(len(failed) > 0)


if __name__ == "__main__":
    main()
