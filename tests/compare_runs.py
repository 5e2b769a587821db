"""Shows that a change of the code changes no result: the same runs by an older commit and by the working tree.

    python tests/compare_runs.py --base 764f1e3

Five runs of 50 steps, each by both trees on this machine: AdamW on one process, AdamW on two with shares 3:1,
Adafactor with LoRA, Muon on two processes, and bf16 with --mask-documents. All losses, gradient norms, held-out losses
and the sha256 of the final weights must be equal to the last digit. Then the working tree continues a run of the older
commit from its checkpoint of step 25, and must end with the same weights. Exit code 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--model-name", "data/tiny_gpt2", "--dataset-path", "data/sample_corpus.txt", "--sample-by", "paragraph"]
FLAGS += ["--sequence-length", "64", "--batch-size", "8", "--max-steps", "50", "--learning-rate", "1e-3"]
FLAGS += ["--eval-fraction", "0.02", "--eval-every", "25", "--checkpoint-every", "25", "--log-every", "1"]
FP32 = ["--mixed-precision", "no"]
RUNS = {  # name: (processes, flags)
    "adamw, 1 process": (1, FP32),
    "adamw, 2 processes, shares 3:1": (2, [*FP32, "--shares", "3:1", "--micro-batch-size", "4"]),
    "adafactor, lora": (1, [*FP32, "--optimizer", "adafactor", "--lora-rank", "4"]),
    "muon, 2 processes": (2, [*FP32, "--optimizer", "muon"]),
    "bf16, masked documents": (1, ["--mixed-precision", "bf16", "--mask-documents"]),
}
COLUMNS = ("loss", "grad_norm", "eval_loss")


def train(tree: Path, folder: Path, num_processes: int, flags: list[str], port: int) -> dict:
    """Runs scripts/train.py of a tree in the run folder; returns its figures and the hash of its final weights."""
    config = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_machines": 1, "machine_rank": 0}
    config |= {"num_processes": 2, "main_process_ip": "127.0.0.1", "main_process_port": port}
    path = folder.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", path] if num_processes == 2 else []
    words = [sys.executable, *launcher, "scripts/train.py", *FLAGS, *flags, "--output-dir", folder]
    environment = dict(os.environ, PYTHONPATH=str(tree), HF_HUB_OFFLINE="1")
    ended = subprocess.run([*map(str, words)], cwd=tree, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{tree}: exit code {ended.returncode}\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = {name: [row[name] for row in rows if name in row and "event" not in row] for name in COLUMNS}
    final = (folder / "final" / "model.safetensors").read_bytes()
    return figures | {"final": hashlib.sha256(final).hexdigest()}


def main() -> int:
    """Prints one line per run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the older commit")
    parser.add_argument("--port", type=int, default=29611, help="a free port of this machine")
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        base, runs = Path(temporary, "base"), Path(temporary, "runs")
        subprocess.run(["git", "worktree", "add", "--detach", base, arguments.base], cwd=ROOT, check=True)
        try:
            for name, (count, flags) in RUNS.items():
                key = name.replace(", ", "_").replace(" ", "_").replace(":", "_")
                old = train(base, runs / f"{key}_base", count, flags, arguments.port)
                new = train(ROOT, runs / f"{key}_new", count, flags, arguments.port)
                differing = [column for column in old if old[column] != new[column]]
                failed += bool(differing)
                verdict = f"DIFFERENT in {', '.join(differing)}" if differing else "equal"
                print(f"{name}: {verdict}; final {old['final'][:16]} and {new['final'][:16]}", flush=True)
                if key == "adamw_1_process":
                    failed += not continue_run(runs / f"{key}_base", old, arguments.port)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", base], cwd=ROOT, check=True)
    return 1 if failed else 0


def continue_run(folder: Path, old: dict, port: int) -> bool:
    """Continues an old run from its checkpoint of step 25 with the working tree; returns whether it ends the same."""
    half = folder.with_name("continued")
    shutil.copytree(folder / "checkpoints" / "step-00000025", half / "checkpoints" / "step-00000025")
    new = train(ROOT, half, 1, FP32, port)
    is_equal = new["final"] == old["final"] and new["loss"] == old["loss"][25:]
    print(f"continued from a checkpoint of the base: {'equal' if is_equal else 'DIFFERENT'}", flush=True)
    return is_equal


if __name__ == "__main__":
    sys.exit(main())
