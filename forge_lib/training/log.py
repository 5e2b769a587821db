"""What a run writes about itself: metrics.jsonl, run.json, and the first lines of its log."""

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.tracking import get_available_trackers
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from forge_lib.config import TrainConfig
from forge_lib.data.batches import BatchPlan
from forge_lib.disk import partial_path
from forge_lib.errors import UserError

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
        """Appends a row; floats that JSON lacks (inf, nan) become null. A full disk loses the row only."""
        if not self._path:
            return
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(to_json(row), ensure_ascii=False) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._path, size)  # remove the incomplete row
            logger.warning(f"{self._path} cannot be written: {error.strerror}; the run continues")


def check_trackers(report_to: str) -> list[str]:
    """Returns the names in `--report-to`; raises UserError if one is unknown or its package is not installed."""
    if report_to == "none":
        return []
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in report_to.split(","):
        if name not in ("all", *available):
            raise UserError(
                f"--report-to {name}: no such tracker, or its package is not installed; installed are "
                f"{', '.join(available) or 'none'} (pip install 'p2p-llm-forge[dashboard]' installs two)"
            )
    return report_to.split(",")


def write_run_json(folder: Path, content: dict) -> None:
    """Writes run.json, which describes the run for people and programs. Call on the main process."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path = folder / "run.json"
    partial_path(path).write_text(text, encoding="utf-8")
    partial_path(path).replace(path)  # a reader never finds half of it


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


def log_resume(log: MetricsLog, step: int, plan: BatchPlan, changed: list[str]) -> None:
    """Logs that a run continues.

    Args:
        log, plan: of the run.
        step: of its checkpoint.
        changed: a line for each setting that differs from the checkpoint's.
    """
    logger.info("; ".join([f"resuming after step {step} of {plan.num_steps}", *changed]))
    log.write(step=step, event="resume", num_processes=PartialState().num_processes, changed=changed)


@contextmanager
def progress_bar(num_steps: int, step: int, is_main: bool) -> Iterator[tqdm]:
    """Shows a progress bar on the main process, if stderr is a terminal; log lines are printed above it."""
    is_quiet = None if is_main else True  # None: quiet unless stderr is a terminal
    with tqdm(total=num_steps, initial=step, unit="step", disable=is_quiet) as bar, logging_redirect_tqdm():
        yield bar
