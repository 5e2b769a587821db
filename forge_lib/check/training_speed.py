"""Measures how fast one process trains a model."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils import find_executable_batch_size
from torch import nn

from forge_lib.check.forecast import Speed
from forge_lib.check.workers import Place
from forge_lib.config import TrainConfig
from forge_lib.distributed.speed import copy_bandwidth, time_call
from forge_lib.models.loading import adapt_model, load_model
from forge_lib.models.loss import loss_sum
from forge_lib.models.optimizers import build_optimizers

PATIENCE_SECONDS = 5.0  # a slower process runs fewer sequences, and each pass only once
NUM_ROUNDS = 5


@dataclass
class ModelSpeeds:
    """How fast some processes train a model, by rank, and the bytes of each trainable parameter, in model order."""

    speeds: list[Speed]
    parameter_bytes: list[int]

    def __post_init__(self):
        self.speeds = [Speed(**each) if isinstance(each, dict) else each for each in self.speeds]


def join_speeds(parts: list[ModelSpeeds]) -> ModelSpeeds:
    """Returns the speeds of all parts in their order."""
    return ModelSpeeds([speed for part in parts for speed in part.speeds], parts[0].parameter_bytes)


def measure_model(place: Place, run: TrainConfig, micro_batch_size: int) -> Callable[[], ModelSpeeds]:
    """Loads the model of a run; returns a function that measures its speed in this worker. See `Workers.run`."""
    model = adapt_model(load_model(run, 0, run.sequence_length), run).to(place.device)
    optimizers = build_optimizers(model, run)
    parameter_bytes = [parameter.nbytes for parameter in model.parameters() if parameter.requires_grad]

    def measure() -> ModelSpeeds:
        sizes = (run.sequence_length, micro_batch_size)
        speed = measure_speed(model, optimizers, *sizes, place.device, place.mixed_precision)
        return ModelSpeeds([speed], parameter_bytes)

    return measure


def measure_speed(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    sequence_length: int,
    micro_batch_size: int,
    device: str,
    mixed_precision: str,
) -> Speed:
    """Measures how fast this process trains a model on random tokens. This changes the model's weights.

    Args:
        model: a causal language model on the device.
        optimizers: of its parameters.
        sequence_length: tokens per sequence.
        micro_batch_size: sequences per forward pass; a slow process measures fewer, and the rest is extrapolated.
        device: "cpu", "cuda" or "mps".
        mixed_precision: "no", "bf16" or "fp16".
    """

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    time_passes = partial(_time_passes, model, sequence_length, device, mixed_precision)
    time_passes(1)  # allocates memory
    once = sum(time_passes(1))
    update()
    size = min(micro_batch_size, max(2, int(PATIENCE_SECONDS / once)))

    @find_executable_batch_size(starting_batch_size=size)
    def time_size(size: int) -> int:
        time_passes(size)
        return size

    size = time_size()  # less than `size` if that does not fit into the memory of a GPU
    num_rounds = NUM_ROUNDS if once * size < PATIENCE_SECONDS / 2 else 1
    passes = {n: [time_passes(n) for _ in range(num_rounds)] for n in sorted({1, size})}
    seconds = {n: statistics.median(map(sum, pairs)) for n, pairs in passes.items()}
    per_sequence = max(0.0, (seconds[size] - seconds[1]) / (size - 1)) if size > 1 else seconds[1]
    return Speed(
        fixed=max(0.0, seconds[size] - size * per_sequence),
        per_sequence=max(per_sequence, 1e-9),
        backward=statistics.median(backward / (forward + backward) for forward, backward in passes[size]),
        optimizer=statistics.median(time_call(update, device) for _ in range(num_rounds)),
        copy_bandwidth=copy_bandwidth(device),
    )


def _time_passes(
    model: nn.Module, sequence_length: int, device: str, mixed_precision: str, num_sequences: int
) -> tuple[float, float]:
    """Returns the seconds of a forward and of a backward pass over random tokens."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (num_sequences, sequence_length), device=device)
    start = time.perf_counter()
    with torch.autocast(device, dtype, enabled=dtype is not None):
        loss = loss_sum(model, {"input_ids": ids, "labels": ids})
    loss.item()  # waits for the GPU
    forward = time.perf_counter() - start
    return forward, time_call(loss.backward, device)
