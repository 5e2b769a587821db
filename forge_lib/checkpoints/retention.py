"""Deletes old checkpoints, and what interrupted saves have left.

Beside the checkpoints there may be, for a moment or after a crash: `.partial-…`, being written or received;
`.replaced-…`, an old checkpoint while the new one of the same step is renamed; `.deleted-…`, being deleted.
"""

import math
import os
from pathlib import Path

from forge_lib import disk
from forge_lib.checkpoints.format import describe_error, list_steps, step_path
from forge_lib.checkpoints.verify import DAMAGE, read_json


def prune(folder: Path, step: int, keep: int, keep_best: bool = False) -> None:
    """Deletes all checkpoints up to `step` except the newest `keep`, and the best one if `keep_best` is set.

    Newer ones stay, and do not count: they were skipped when the run resumed.

    Args:
        folder: the run's `checkpoints` folder.
        step: that of the newest checkpoint of this run.
        keep: number of checkpoints to keep, at least 1.
        keep_best: also keeps the one with the lowest `eval_loss` in its state.

    Raises:
        OSError: a folder cannot be deleted.
    """
    for leftover in (disk.replaced_path(step_path(folder, step)), *folder.glob(".partial-*")):
        disk.remove(leftover)
    paths = [path for number, path in list_steps(folder) if number <= step]
    kept = set(paths[:keep])
    if keep_best:
        losses = {path: loss for path in paths if (loss := _eval_loss(path)) is not None}
        kept.update(sorted(losses, key=losses.__getitem__)[:1])
    for path in paths:
        if path not in kept:
            deleted = path.with_name(f".deleted-{path.name}")
            disk.remove(deleted)
            path.rename(deleted)
            disk.remove(deleted)


def sweep(folder: Path) -> list[str]:
    """Restores or removes what an interrupted save has left; returns one line for each action. Call before a run."""
    lines = []
    for path in sorted(folder.glob(".*")):
        kind, _, name = path.name.partition("-")
        target = folder / name
        try:
            if kind == ".replaced" and not os.path.lexists(target):
                disk.restore(target)
                lines.append(f"restored checkpoint {name}: the save that should have replaced it did not finish")
            elif (path / disk.LIST_NAME).exists():
                continue  # a transfer from another machine will continue it
            elif kind in (".partial", ".deleted", ".replaced"):
                disk.remove(path)
                lines.append(f"removed {path.name}, left by an interrupted save")
        except OSError as error:
            lines.append(f"{path.name}, left by an interrupted save, could not be removed: {describe_error(error)}")
    return lines


def _eval_loss(path: Path) -> float | None:
    """Returns the held-out loss at a checkpoint's step; None if there is none or it cannot be read."""
    try:
        loss = read_json(path / "state.json").get("eval_loss")
    except DAMAGE:
        return None
    return loss if isinstance(loss, (int, float)) and math.isfinite(loss) else None
