"""Figures of a training step: its random seed, throughput, memory, loss spikes and stragglers."""

import math
import resource
import sys
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn


def step_seed(seed: int, step: int, process_index: int) -> int:
    """Returns the seed of torch's random generator (for dropout) in one step of one process, from 0 to 2^63 - 1.

    numpy's SeedSequence hashes the three numbers: its result is documented to stay the same on all platforms and
    versions.
    """
    sequence = np.random.SeedSequence((seed % (1 << 64), step, process_index))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def sum_dtype(device: torch.device) -> torch.dtype:
    """Returns the widest float type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak memory of this process: of the GPU if it trains on one, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def model_flops_per_token(model: nn.Module, sequence_length: int) -> float:
    """Returns the FLOPs of a training step per token: 6 per parameter, plus 12 L d T for attention.

    Chowdhery et al., "PaLM", 2022, appendix B. Frozen parameters, as with LoRA, take 4 instead of 6.
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
    """Tokens per second of all processes, and model FLOP/s utilization.

    Args:
        model: unwrapped.
        sequence_length: tokens per sequence.
        peak_flops: FLOP/s of a large matrix product, summed over all processes.
    """

    def __init__(self, model: nn.Module, sequence_length: int, peak_flops: float):
        self._flops_per_token, self._peak_flops = model_flops_per_token(model, sequence_length), peak_flops
        self._tokens, self._seconds = 0, 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Counts a step."""
        self._tokens += num_tokens
        self._seconds += seconds

    def pop(self) -> tuple[float, float]:
        """Returns tokens per second and model FLOP/s utilization since the last call."""
        speed = self._tokens / self._seconds
        self._tokens, self._seconds = 0, 0.0
        return speed, speed * self._flops_per_token / self._peak_flops


class SpikeDetector:
    """Finds losses far above the previous ones.

    A spike is more than `num_deviations` above the median of the last `window` losses, in units of their median
    absolute deviation (times 1.4826: the standard deviation of a normal distribution).
    """

    def __init__(self, window: int = 50, num_deviations: float = 8.0):
        self._losses, self._num_deviations = deque(maxlen=window), num_deviations

    def usual_loss(self, loss: float) -> float | None:
        """Records the loss of a step; returns the usual loss if this one is a spike, else None."""
        usual = None
        if len(self._losses) == self._losses.maxlen:
            median = float(np.median(self._losses))
            deviation = 1.4826 * float(np.median(np.abs(np.array(self._losses) - median)))
            if loss > median + self._num_deviations * max(deviation, 1e-3 * abs(median)):
                usual = median
        if math.isfinite(loss):
            self._losses.append(loss)
        return usual


@dataclass(frozen=True)
class Straggler:
    """A process that the others wait for, and how many times longer it takes than they do."""

    process: int
    ratio: float


def find_straggler(seconds: list[float]) -> Straggler | None:
    """Returns the slowest process if it takes more than twice as long as the others usually do.

    Args:
        seconds: by rank, the time that each process has computed.
    """
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = sorted(seconds[:slowest] + seconds[slowest + 1 :])
    usual = others[(len(others) - 1) // 2] if others else math.inf
    return Straggler(slowest, seconds[slowest] / usual) if seconds[slowest] > 2 * usual else None
