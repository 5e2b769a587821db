"""What a run writes about itself: metrics.jsonl, run.json, and the first lines of its log."""

import json
import logging
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forge_lib.config import TrainConfig
from forge_lib.data.batches import BatchPlan
from forge_lib.disk import partial_path
from forge_lib.training.session import Session

logger = logging.getLogger("forge")


def to_json(row: dict) -> dict:
    """Returns a row with numbers that JSON has: numpy's become Python's, and inf and nan become null, at any depth."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [convert(each) for each in value]
        if isinstance(value, np.ndarray | np.generic | torch.Tensor):
            return convert(value.tolist())
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return convert(row)


class MetricsLog:
    """metrics.jsonl in the run folder: one JSON object per line, written by the main process as the run proceeds.

    Args:
        folder: the run folder.
        enabled: False on all processes except the main one, where nothing is written.
    """

    def __init__(self, folder: Path, enabled: bool):
        self._path = folder / "metrics.jsonl" if enabled else None
        if enabled and self._path.exists():
            text = self._path.read_bytes()
            if not text.endswith(b"\n"):  # the last line of a run that was killed is incomplete
                os.truncate(self._path, text.rfind(b"\n") + 1)

    def write(self, **row) -> None:
        """Appends a row; events and training rows get the time, in seconds since 1970. A full disk loses the row only.

        Floats that JSON lacks (inf, nan) become null.
        """
        if not self._path:
            return
        if "event" in row or "tokens_per_second" in row:
            row["time"] = round(time.time(), 3)
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(to_json(row), ensure_ascii=False) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._path, size)  # remove the incomplete row
            logger.warning(f"{self._path} cannot be written: {error.strerror}; the run continues")


def write_run_json(folder: Path, content: dict) -> None:
    """Writes run.json, which describes the run for people and programs. Call on the main process.

    If the disk is full, the file stays as it was.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path = folder / "run.json"
    try:
        partial_path(path).write_text(text, encoding="utf-8")
        partial_path(path).replace(path)  # a reader never finds half of it
    except OSError as error:
        logger.warning(f"{path} cannot be written: {error.strerror}; the run continues")


def describe_batches(config: TrainConfig, plan: BatchPlan, shares: list[int]) -> str:
    """Returns the batch arithmetic as one line for the log."""
    parts = f"{len(shares)} x {shares[0]}" if len(set(shares)) == 1 else " + ".join(map(str, shares))
    micro = max(-(-share // config.micro_batch_size) for share in shares)
    return (
        f"batch of {config.batch_size} sequences = {parts}, in up to {micro} micro-batch(es) of "
        f"{config.micro_batch_size}; x {config.sequence_length} tokens = "
        f"{config.batch_size * config.sequence_length:,} tokens per step; {plan.num_steps:,} steps = "
        f"{plan.num_samples(plan.num_steps) / plan.num_blocks:.2f} epochs of {plan.num_blocks:,} sequences"
    )


def describe_evaluation(results: dict[str, float]) -> str:
    """Returns the results of an evaluation for the log."""
    return (
        f"held-out loss {results['eval_loss']:.4f}  perplexity {results['perplexity']:,.2f}  "
        f"{results['bits_per_byte']:.3f} bits/byte  accuracy {results['next_token_accuracy']:.1%}"
    )


def log_begin(log: MetricsLog, step: int, plan: BatchPlan, session: Session, changed: list[str] | None) -> None:
    """Logs that a run begins, or that it continues.

    Args:
        log, plan: of the run.
        step: completed steps.
        session: the processes.
        changed: a line for each setting that differs from the checkpoint's; None: there is no checkpoint.
    """
    facts: dict[str, Any] = {"num_processes": len(session.hosts), "hosts": session.machine_names()}
    if changed is None:
        log.write(step=step, event="start", **facts)
    else:
        logger.info("; ".join([f"resuming after step {step} of {plan.num_steps}", *changed]))
        log.write(step=step, event="resume", **facts, changed=changed)
