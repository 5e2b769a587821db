"""Checks an installation in about a minute: trains the bundled tiny model for one epoch at most, on the CPU.

    python tests/smoke_single_node.py
    uv run tests/smoke_single_node.py

Two processes train over gloo, started by `accelerate launch` as in the README. The results are in artifacts/smoke/.
The last line states what was checked; the exit code is 0 if all of it holds.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "artifacts" / "smoke"
FLAGS = ["--model-name", "data/tiny_gpt2", "--dataset-path", "data/sample_corpus.txt", "--sample-by", "paragraph"]
FLAGS += ["--sequence-length", "128", "--batch-size", "16", "--epochs", "1", "--learning-rate", "3e-3"]
FLAGS += ["--warmup-steps", "10", "--eval-every", "0", "--checkpoint-every", "50", "--log-every", "10"]
FLAGS += ["--device", "cpu", "--backend", "gloo", "--output-dir", str(FOLDER)]


def main() -> str:
    """Trains, checks the results, and returns a sentence that states what was checked."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    config = "accelerate_configs/cpu_2_processes.yaml"
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "scripts/train.py", *FLAGS]
    code = subprocess.run(words, cwd=ROOT).returncode
    if code:
        raise SystemExit(f"smoke test FAILED: training ended with exit code {code}; the lines above say why")
    rows = [json.loads(line) for line in (FOLDER / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row and "event" not in row]
    first, last = training[0]["loss"], training[-1]["loss"]
    if not last < first - 1:
        raise SystemExit(f"smoke test FAILED: the loss went from {first:.3f} to {last:.3f}; expected at least 1 less")
    if training[-1]["num_processes"] != 2:
        raise SystemExit(f"smoke test FAILED: {training[-1]['num_processes']} process(es) trained; expected 2")
    text = generate(FOLDER / "final")
    return (
        f"smoke test passed: in {training[-1]['step']} steps of 2 processes the loss fell from {first:.2f} to "
        f"{last:.2f}, a checkpoint was written, and the final model loads and writes {text!r}"
    )


def generate(folder: Path) -> str:
    """Returns what the final model writes, loaded as any HuggingFace model is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not list(folder.with_name("checkpoints").glob("step-*/manifest.json")):
        raise SystemExit("smoke test FAILED: there is no checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The harbour", return_tensors="pt")
    output = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


if __name__ == "__main__":
    print(main())
