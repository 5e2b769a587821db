"""Continues a run from the newest checkpoint that any of its machines has."""

from dataclasses import dataclass
from pathlib import Path

import torch

from forge_lib.checkpoints import restore
from forge_lib.checkpoints.format import step_path
from forge_lib.checkpoints.retention import sweep
from forge_lib.errors import UserError
from forge_lib.training.fetch import fetch
from forge_lib.training.inputs import Inputs
from forge_lib.training.session import Session
from forge_lib.training.state import warn_about_dropout


@dataclass(frozen=True)
class FoundCheckpoint:
    """The checkpoint that a machine would continue from (step -1: none), and lines about the others that it has."""

    step: int
    sha256: str
    path: str
    lines: list[str]
    foreign: list[str]  # checkpoints of another run


def resume(session: Session, inputs: Inputs, optimizers: list[torch.optim.Optimizer]) -> tuple[dict | None, list[str]]:
    """Loads the newest checkpoint of any machine into the model and the optimizers. Call on all processes.

    Returns:
        The checkpoint's state, or None without a checkpoint; and lines for the log.

    Raises:
        UserError: `--resume` cannot be followed, or all checkpoints belong to another run.
    """
    config, folder = session.config, session.folder / "checkpoints"
    session.peers.set_status("verifying its checkpoints")
    found = session.peers.all_gather(find_own(session, inputs), "checkpoints")
    lines = [line for each in found for line in each.lines]
    foreign = [line for each in found for line in each.foreign]
    best = max(found, key=lambda each: each.step)
    if best.step < 0:
        if foreign:
            raise UserError(f"{'; '.join(dict.fromkeys(foreign))}. Keep the old values, or name another --output-dir")
        if config.resume not in ("auto", "never"):
            raise UserError(f"--resume {config.resume}: no machine has this checkpoint")
        return None, lines
    lines += [f"skipped: {line}" for line in foreign]
    own = found[session.world.machine]  # of the first process on this machine
    target = step_path(folder, best.step)
    held = Path(own.path) if own.sha256 == best.sha256 else None
    fetch(session, f"checkpoint {target.name}", held, target)
    if best.step > inputs.plan.num_steps:
        raise UserError(
            f"{best.path} is at step {best.step}, but the run ends at step {inputs.plan.num_steps}; raise "
            "--max-steps or --epochs, or name another --output-dir"
        )
    state = restore.load(held or target, inputs.model, optimizers)
    session.peers.barrier("checkpoint, loaded")
    if session.lock.held and config.resume != "auto":  # the named checkpoint becomes the newest of this run
        set_aside = restore.set_aside(folder, best.step)
        lines += [f"{name}, which is newer than {best.path}, was renamed" for name in set_aside]
        restore.adopt(held or target, folder, best.step)
    return state, lines + warn_about_dropout(config.dropout, state)


def find_own(session: Session, inputs: Inputs) -> FoundCheckpoint:
    """Returns what this machine's first process finds in the run folder; the others on the machine find nothing."""
    folder, lines = session.folder / "checkpoints", []
    if not session.world.is_local_main:
        return FoundCheckpoint(-1, "", "", [], [])
    if session.lock.held:
        lines += sweep(folder)
    found = restore.find(folder, session.config.resume, inputs.identity)
    lines = [f"{session.peers.host}: {line}" for line in (*lines, *found.skipped)]
    if not found.path:
        return FoundCheckpoint(-1, "", "", lines, found.foreign)
    return FoundCheckpoint(found.step, found.sha256, str(found.path), lines, found.foreign)
