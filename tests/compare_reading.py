"""Compares how fast this tree and an older one read and tokenize 25 MB, and this tree's memory at 25 MB and at 250 MB.

    python tests/compare_reading.py --base HEAD~1

Each format is measured in turn by both trees, three times; the best time of each counts. Memory is the peak of a
process that only reads and tokenizes.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from commands import ROOT

from forge_lib.data.streams import zstd

MEGABYTES, GROWTH, REPEATS = 25, 10, 3
PROGRAM = """
import re, sys, time
from forge_lib.config import DataConfig
from forge_lib.data.corpus import prepare_store
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("data/tiny_gpt2")
config = DataConfig(dataset_path=sys.argv[1], sample_by="paragraph")
start = time.perf_counter()
tokens = prepare_store(config, tokenizer, sys.argv[2]).manifest["num_tokens"]
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print(seconds, peak / 1024, tokens)
"""


def write(folder: Path, megabytes: int) -> list[Path]:
    """Writes paragraphs of the sample corpus in every format; returns the files."""
    paragraphs = (ROOT / "data" / "sample_corpus.txt").read_text().split("\n\n")
    size = sum(len(text.encode()) + 2 for text in paragraphs)
    texts = paragraphs * max(1, megabytes * 1_000_000 // size)
    lines = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()
    frame = pd.DataFrame({"id": range(len(texts)), "text": texts})
    (folder / "x.txt").write_text("\n\n".join(texts))
    (folder / "x.jsonl").write_bytes(lines)
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines, 6))
    (folder / "x.jsonl.zst").write_bytes(zstd.compress(lines))
    frame.to_json(folder / "x.json", orient="records")
    frame.to_csv(folder / "x.csv", index=False)
    frame.to_parquet(folder / "x.parquet", index=False)
    return sorted(folder.iterdir())


def measure(tree: Path, path: Path) -> tuple[float, float, int]:
    """Returns seconds, peak memory in MB, and the number of tokens."""
    with tempfile.TemporaryDirectory() as store:
        words = [sys.executable, "-c", PROGRAM, path, Path(store) / "store"]
        ended = subprocess.run(
            [*map(str, words)], cwd=tree, env={"PYTHONPATH": str(tree)}, capture_output=True, text=True
        )
    if ended.returncode:
        raise SystemExit(f"{path.name} in {tree}: {ended.stderr[-2000:]}")
    seconds, memory, tokens = ended.stdout.split()
    return float(seconds), float(memory), int(tokens)


def main(base: str) -> None:
    """Prints a row per format."""
    with tempfile.TemporaryDirectory() as folder:
        old, small, large = (Path(folder) / name for name in ("base", "small", "large"))
        subprocess.run(["git", "worktree", "add", "--detach", old, base], cwd=ROOT, check=True, capture_output=True)
        try:
            for each in (small, large):
                each.mkdir()
            names = [path.name for path in write(small, MEGABYTES)]
            write(large, MEGABYTES * GROWTH)
            print(f"{'format':12} {'before s':>9} {'now s':>7} {'ratio':>6} {'MB':>6} {f'MB at x {GROWTH}':>11}")
            for name in names:
                before, now = [], []
                for _ in range(REPEATS):
                    before.append(measure(old, small / name))
                    now.append(measure(ROOT, small / name))
                assert {tokens for *_, tokens in (*before, *now)} == {now[0][2]}, "the trees read different tokens"
                seconds, memory = min(now)[0], min(memory for _, memory, _ in now)
                ratio = seconds / min(before)[0]
                grown = measure(ROOT, large / name)[1]
                print(
                    f"{name:12} {min(before)[0]:9.2f} {seconds:7.2f} {ratio:6.2f} {memory:6.0f} {grown:11.0f}",
                    flush=True,
                )
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old], cwd=ROOT, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="an older commit")
    main(parser.parse_args().base)
