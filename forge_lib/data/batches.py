"""Blocks -> the global batch of each step -> this process's share of it -> micro-batches.

The samples of step k are a pure function of (seed, data, batch size, k): the blocks of all epochs form one endless
sequence, with a new permutation in each epoch, and step k takes the next `batch_size` of them. Nothing here depends on
the number of processes, and any step is found in constant time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch.utils.data import default_collate

from forge_lib.data.blocks import EMPTY_BLOCK, BlockDataset
from forge_lib.data.permutation import permute
from forge_lib.errors import UserError


def divide_batch(batch_size: int, shares: str, num_processes: int) -> list[int]:
    """Returns how many sequences of a global batch each process computes, by rank.

    Args:
        batch_size: sequences in a global batch.
        shares: --shares, as in "3:1"; empty: equal shares.
        num_processes: number of processes.

    Raises:
        UserError: the shares are not whole numbers, not one per process, or do not divide the batch.
    """
    try:
        parts = [int(part) for part in shares.replace(",", ":").split(":")] if shares else [1] * num_processes
    except ValueError:
        raise UserError(f"--shares {shares}: expected whole numbers, as in 3:1") from None
    if len(parts) != num_processes:
        raise UserError(f"--shares {shares} names {len(parts)} processes, but the run has {num_processes}")
    if min(parts) < 1:
        raise UserError(f"--shares {shares}: each process needs a share of at least 1")
    if batch_size % sum(parts):
        below = batch_size // sum(parts) * sum(parts)
        near = " or ".join(str(size) for size in (below, below + sum(parts)) if size)
        raise UserError(
            f"--batch-size {batch_size} cannot be divided among {num_processes} processes in shares of "
            f"{':'.join(map(str, parts))}; use --batch-size {near}, or other --shares"
        )
    return [batch_size * part // sum(parts) for part in parts]


def fit_shares(seconds_per_sequence: Sequence[float], batch_size: int) -> list[int]:
    """Returns the shares of a global batch with which the slowest process is done as early as possible, by rank.

    Each process gets at least one sequence, if there are enough: it takes part in each step anyway.

    Args:
        seconds_per_sequence: of each process.
        batch_size: sequences in the global batch.
    """
    rates = [1 / seconds for seconds in seconds_per_sequence]
    least = 1 if batch_size >= len(rates) else 0
    shares = [max(least, math.floor(batch_size * rate / sum(rates))) for rate in rates]
    while sum(shares) < batch_size:
        shares[min(range(len(shares)), key=lambda n: (shares[n] + 1) / rates[n])] += 1
    while sum(shares) > batch_size:
        shares[max(range(len(shares)), key=lambda n: (shares[n] > least) * shares[n] / rates[n])] -= 1
    return shares


def micro_batches(batch: dict[str, torch.Tensor], size: int) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
    """Splits a batch into micro-batches of up to `size` sequences, without a copy.

    Args:
        batch: tensors of [sequences, ...], among them `labels`.
        size: sequences of a micro-batch; the last one may have fewer.

    Yields:
        A micro-batch, and whether it is the last one.
    """
    num_sequences = len(batch["labels"])
    for start in range(0, num_sequences, size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}, start + size >= num_sequences


@dataclass(frozen=True)
class BatchPlan:
    """Which blocks each step takes: the same on every process, for any number of processes.

    Attributes:
        num_blocks: blocks per epoch.
        batch_size: blocks per step.
        num_steps: steps of the run.
        seed: selects the permutations.
        epochs: if given, the run ends after this many passes, and its last batch may be short.
    """

    num_blocks: int
    batch_size: int
    num_steps: int
    seed: int
    epochs: float | None = None

    @classmethod
    def of_run(cls, num_blocks: int, batch_size: int, max_steps: int, epochs: float, seed: int) -> "BatchPlan":
        """Plans a run of `max_steps` steps or, if that is 0, of `epochs` passes over the blocks."""
        if max_steps:
            return cls(num_blocks, batch_size, max_steps, seed)
        num_steps = max(1, ceil(round(epochs * num_blocks) / batch_size))
        return cls(num_blocks, batch_size, num_steps, seed, epochs)

    def batch(self, step: int) -> np.ndarray:
        """Returns the block indices of the global batch of `step` (from 0), int64, in order."""
        return self.blocks(np.arange(self.num_samples(step), self.num_samples(step + 1)))

    def batches(self, first_step: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (step, block indices of its global batch) from `first_step` until the end of the run."""
        return ((step, self.batch(step)) for step in range(first_step, self.num_steps))

    def blocks(self, samples: np.ndarray) -> np.ndarray:
        """Returns the block index of each sample, int64; sample s is the s-th block of the endless sequence."""
        if not len(samples):
            return np.zeros(0, np.int64)
        epochs, positions = np.divmod(samples, self.num_blocks)
        keys = {epoch: (int(epoch) << 64) + self.seed % (1 << 64) for epoch in np.unique(epochs)}
        return np.concatenate(
            [permute(positions[epochs == epoch], self.num_blocks, key) for epoch, key in keys.items()]
        )

    def num_samples(self, step: int) -> int:
        """Returns how many blocks the first `step` steps take."""
        samples = step * self.batch_size
        return samples if self.epochs is None else min(samples, max(1, round(self.epochs * self.num_blocks)))


def share_of(blocks: np.ndarray, shares: list[int], process_index: int) -> list[int]:
    """Returns the blocks of a global batch that one process computes.

    Its share of a short last batch may be empty. The process then takes the empty block, because every process takes
    part in the all-reduce.

    Args:
        blocks: [n] int64, of `BatchPlan.batch`.
        shares: of `divide_batch`.
        process_index: the process.
    """
    start = sum(shares[:process_index])
    return blocks[start : start + shares[process_index]].tolist() or [EMPTY_BLOCK]


def read_batch(dataset: BlockDataset, indices: list[int], pin_memory: bool = False) -> dict[str, torch.Tensor]:
    """Returns blocks as tensors of [len(indices), sequence_length] int64, in pinned memory if a GPU will copy them."""
    batch = default_collate([dataset[index] for index in indices])
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if pin_memory else batch
