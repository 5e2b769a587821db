"""What tests read in a run folder, while the run trains and after it."""

import hashlib
import json
from pathlib import Path

from commands import until


def rows(folder: Path, key: str = "loss") -> list[dict]:
    """Returns the rows of metrics.jsonl that have `key`."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def losses(folder: Path) -> list[float]:
    """Returns the loss of each step."""
    return [row["loss"] for row in rows(folder)]


def read_lock(folder: Path) -> dict:
    """Returns what run.lock contains during training (host, pid, step); empty before the run has written it."""
    try:
        return json.loads((folder / "run.lock").read_text())
    except (OSError, ValueError):
        return {}


def wait_for_step(folder: Path, step: int, seconds: float = 90) -> None:
    """Waits until the run in `folder` has finished step number `step`."""
    until(lambda: read_lock(folder).get("step", -1) >= step, seconds, f"step {step} in {folder}")


def sha256(path: Path) -> str:
    """Returns the hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
