"""What a run measures: `evaluate.Metric` classes, evaluation over all processes, a step's times, metrics.jsonl."""

import json
import logging
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import datasets
import evaluate
import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset

from forge_lib.errors import UserError

IGNORED = -100  # the label that counts for nothing
logger = logging.getLogger("forge")


class _TokenMetric(evaluate.Metric):
    """A metric over sums: each row stands for any number of tokens, so batches and processes may differ in size."""

    description = ""
    columns: ClassVar = {"loss_sum": "float64", "num_targets": "int64"}

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="loss_sum: nats; num_targets: predicted tokens; num_correct: of them predicted right",
            features=datasets.Features({name: datasets.Value(dtype) for name, dtype in self.columns.items()}),
        )


class Loss(_TokenMetric):
    """Mean cross entropy a token, in nats."""

    description = "mean cross entropy a token, in nats"

    def _compute(self, loss_sum: list[float], num_targets: list[int]) -> dict[str, float]:
        return {"loss": float(np.sum(loss_sum) / np.sum(num_targets))}


class Perplexity(_TokenMetric):
    """exp(loss): among how many equally likely tokens the model seems to choose."""

    description = "exp of the mean cross entropy a token"

    def _compute(self, loss_sum: list[float], num_targets: list[int]) -> dict[str, float]:
        loss = np.sum(loss_sum) / np.sum(num_targets)
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf}


class BitsPerByte(_TokenMetric):
    """Bits that the model needs for a byte of UTF-8 text: comparable between tokenizers."""

    description = "bits a byte of text; tokens_per_byte: tokens of the data (with end-of-text) over its UTF-8 bytes"

    def _compute(
        self, loss_sum: list[float], num_targets: list[int], tokens_per_byte: float = math.nan
    ) -> dict[str, float]:
        return {"bits_per_byte": float(np.sum(loss_sum) / np.sum(num_targets) / math.log(2) * tokens_per_byte)}


class NextTokenAccuracy(_TokenMetric):
    """The part of the tokens for which the likeliest prediction was right."""

    description = "part of the tokens whose likeliest prediction was right"
    columns: ClassVar = {"num_correct": "int64", "num_targets": "int64"}

    def _compute(self, num_correct: list[int], num_targets: list[int]) -> dict[str, float]:
        return {"next_token_accuracy": float(np.sum(num_correct) / np.sum(num_targets))}


def check_trackers(report_to: str) -> list[str]:
    """Returns the names in `--report-to`; UserError where one is unknown or its package is not installed."""
    if report_to == "none":
        return []
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in report_to.split(","):
        if name not in ("all", *available):
            raise UserError(
                f"--report-to {name}: no such tracker, or its package is not installed; installed are "
                f"{', '.join(available) or 'none'} (pip install 'p2p-llm-forge[dashboard]' gives two)"
            )
    return report_to.split(",")


def load_metrics(names: list[str]) -> list[evaluate.Metric]:
    """Loads metrics of the evaluate package; UserError where one is not to be had."""
    loaded = []
    for name in names:
        try:
            loaded.append(evaluate.load(name))
        except Exception as error:  # an import that is missing, a Hub that is out of reach, no such name
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"--metrics {name}: cannot be loaded ({reason})") from None
    return loaded


@torch.no_grad()
def evaluate_model(
    accelerator: Accelerator,
    model: nn.Module,
    dataset: Dataset,
    batch_size: int,
    tokens_per_byte: float,
    meet: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Returns loss, perplexity, bits_per_byte, next_token_accuracy and eval_tokens over all blocks of `dataset`.

    Every target counts once, whatever the number of processes. Call on all processes; all get the same result.

    Args:
        accelerator: the processes.
        model: prepared or not.
        dataset: blocks as of batches.BlockDataset; each process takes every num_processes-th.
        batch_size: sequences per forward pass.
        tokens_per_byte: tokens of the data over its UTF-8 bytes.
        meet: waits for the other processes before the sums are gathered, however long the slowest one takes.
    """
    was_training = model.training
    model = accelerator.unwrap_model(model)
    model.eval()
    mine = Subset(dataset, range(accelerator.process_index, len(dataset), accelerator.num_processes))
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in DataLoader(mine, batch_size=batch_size):
        inputs = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")[:, 1:]
        with accelerator.autocast():
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        correct = (logits.argmax(-1) == labels).sum()  # IGNORED is never predicted
        sums += torch.tensor([loss.item(), (labels != IGNORED).sum().item(), correct.item()], dtype=torch.float64)
    model.train(was_training)
    meet()
    rows = gather(sums.to(accelerator.device, sum_dtype(accelerator.device))[None]).cpu().double()
    columns = {
        "loss_sum": rows[:, 0].tolist(),
        "num_targets": rows[:, 1].long().tolist(),
        "num_correct": rows[:, 2].long().tolist(),
    }
    results = {"eval_tokens": sum(columns["num_targets"])}
    for metric in (Loss, Perplexity, BitsPerByte, NextTokenAccuracy):
        inputs = {name: columns[name] for name in metric.columns}
        options = {"tokens_per_byte": tokens_per_byte} if metric is BitsPerByte else {}
        results |= metric(keep_in_memory=True).compute(**inputs, **options)
    return results


def sum_dtype(device: torch.device) -> torch.dtype:
    """Returns the widest float type that the device has."""
    return torch.float32 if device.type == "mps" else torch.float64


class GradientSync:
    """Measures DDP's synchronisation of gradients: bytes, and the time that hides behind no computation.

    It wraps DDP's own all-reduce in a communication hook, which changes no value; with `fp16`, torch's hook that sends
    fp16 and gives back what arrives in the gradient's own type. Without DDP all figures are 0.

    Args:
        model: as `Accelerator.prepare` returns it.
        fp16: whether gradients travel as fp16.
    """

    def __init__(self, model: nn.Module, fp16: bool = False):
        self.num_bytes, self.fp16 = 0, fp16
        self._exposed = 0.0
        self._events = None
        if isinstance(model, DistributedDataParallel):
            self._on_gpu = next(model.parameters()).is_cuda
            model.register_comm_hook(self, _measured_allreduce)

    def own_gradients_done(self) -> None:
        """Is called by the hook when this process's last gradient is computed and only the others' are missing."""
        self._events = [_mark(self._on_gpu)]

    def backward_done(self) -> None:
        """Call after the backward pass that synchronises."""
        if self._events:
            self._events.append(_mark(self._on_gpu))

    def take(self) -> tuple[float, float]:
        """Returns the step's exposed seconds, and the bytes that this process sent in it; begins anew.

        A ring all-reduce of S bytes over n processes sends 2 (n - 1) / n S from each. On a GPU it waits for the step.
        """
        seconds = 0.0
        if self._events:
            start, end = self._events
            if self._on_gpu:
                end.synchronize()
                seconds = start.elapsed_time(end) / 1000
            else:
                seconds = end - start
        n = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        num_bytes = 2 * (n - 1) / n * self.num_bytes
        self.num_bytes, self._events = 0, None
        return seconds, num_bytes


def _measured_allreduce(sync: GradientSync, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    sync.num_bytes += 2 * bucket.buffer().numel() if sync.fp16 else bucket.buffer().nbytes
    if bucket.is_last():
        sync.own_gradients_done()
    return (fp16_compress_hook if sync.fp16 else allreduce_hook)(dist.group.WORLD, bucket)


def _mark(on_gpu: bool) -> float | torch.cuda.Event:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory that this process has held: the GPU's where it trains on one, else the main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def model_flops_per_token(model: nn.Module, sequence_length: int) -> float:
    """Returns the FLOPs of a training step for one token: 6 a parameter, and the attention's 12 L d T.

    Chowdhery et al., "PaLM", 2022, appendix B. Frozen parameters, as under LoRA, take 4 instead of 6.
    """
    config = model.config.get_text_config()
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    used_twice = {id(p) for p in head.parameters()} if head is not None else set()
    flops = sum(
        (6 if p.requires_grad else 4) * p.numel()
        for p in model.parameters()
        if id(p) not in embeddings or id(p) in used_twice
    )
    layers, width = (getattr(config, name, 0) for name in ("num_hidden_layers", "hidden_size"))
    return flops + 12 * layers * width * sequence_length


class Throughput:
    """Tokens per second of all processes, and the part of their measured speed that it is.

    Args:
        model: unwrapped.
        sequence_length: tokens per sequence.
        peak_flops: FLOP/s of a large matrix product, of all processes together.
    """

    def __init__(self, model: nn.Module, sequence_length: int, peak_flops: float):
        self._flops_per_token, self._peak_flops = model_flops_per_token(model, sequence_length), peak_flops
        self._tokens, self._seconds = 0, 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Counts a step."""
        self._tokens += num_tokens
        self._seconds += seconds

    def take(self) -> tuple[float, float]:
        """Returns tokens per second and model FLOP/s utilization since it was last asked."""
        speed = self._tokens / self._seconds
        self._tokens, self._seconds = 0, 0.0
        return speed, speed * self._flops_per_token / self._peak_flops


class SpikeDetector:
    """Finds losses that lie far above those before them.

    A spike lies more than `num_deviations` above the median of the last `window` losses, in units of their median
    absolute deviation (times 1.4826: the standard deviation of a normal distribution).
    """

    def __init__(self, window: int = 50, num_deviations: float = 8.0):
        self._losses, self._num_deviations = deque(maxlen=window), num_deviations

    def usual(self, loss: float) -> float | None:
        """Notes a step's loss; returns the usual one where this one is a spike, else nothing."""
        usual = None
        if len(self._losses) == self._losses.maxlen:
            median = float(np.median(self._losses))
            deviation = 1.4826 * float(np.median(np.abs(np.array(self._losses) - median)))
            if loss > median + self._num_deviations * max(deviation, 1e-3 * abs(median)):
                usual = median
        if math.isfinite(loss):
            self._losses.append(loss)
        return usual


class MetricsLog:
    """metrics.jsonl in the run folder: one JSON object a line, written by the main process as it happens.

    Args:
        folder: the run folder.
        enabled: False on all processes but the main one: nothing is written there.
    """

    def __init__(self, folder: Path, enabled: bool):
        self._path = folder / "metrics.jsonl" if enabled else None
        if enabled and self._path.exists():
            text = self._path.read_bytes()
            if not text.endswith(b"\n"):  # a line that a killed run has not finished
                os.truncate(self._path, text.rfind(b"\n") + 1)

    def write(self, **row) -> None:
        """Appends a row; floats that JSON does not know (inf, nan) become null. A full disk is no reason to stop."""
        if not self._path:
            return
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._path, size)  # half a row is none
            logger.warning(f"{self._path} cannot be written to: {error.strerror}; the run goes on")
