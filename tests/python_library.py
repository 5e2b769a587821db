"""Real text that every machine has: the sources of Python's own library."""

import json
import os
import subprocess
import sys
from pathlib import Path

from commands import ROOT


def prepare_library(folder: Path) -> Path:
    """Returns a new token store in a folder: 23 million tokens of the bundled tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in Path(os.__file__).parent.rglob("*.py") if "site-packages" not in path.parts)
    with open(folder / "library.jsonl", "w") as file:
        for path in files:
            file.write(json.dumps({"text": path.read_text(errors="replace")}) + "\n")
    words = [sys.executable, "scripts/prepare_data.py", "--model-name", "data/tiny_gpt2"]
    words += ["--dataset-path", folder / "library.jsonl", "--output-dir", folder / "store"]
    subprocess.run([*map(str, words)], cwd=ROOT, check=True)
    return folder / "store"
