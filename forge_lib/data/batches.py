"""A token store -> blocks of `sequence_length` tokens -> this process's share of each global batch.

The samples of step k are a pure function of (seed, data, batch size, k): the blocks of all epochs form one endless
sequence, a new permutation each epoch, and step k takes the next `batch_size` of them. None of it depends on how many
processes there are, and any step is reached in constant time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from forge_lib.errors import UserError

IGNORED = -100  # the label that torch's and transformers' cross entropy leave out
EMPTY_BLOCK = -1  # the index of a block that has no labels
FEISTEL_ROUNDS = 6


def permute(positions: np.ndarray, length: int, key: int) -> np.ndarray:
    """Maps positions to their places in a pseudo-random permutation of range(length), in constant memory.

    A Feistel network over the next even power of two, walked along its cycles until it lands inside the range
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002); the round function is splitmix64's finalizer.

    Args:
        positions: [n] integers in range(length).
        length: size of the permuted range.
        key: selects the permutation.

    Returns:
        [n] int64 in range(length), all different where the positions are.
    """
    half_bits = max(1, ceil(max(length - 1, 1).bit_length() / 2))
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)
    values = np.asarray(positions, np.uint64).copy()
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> shift, values[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        values[outside] = (left << shift) | right
        outside = values >= length
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class TokenStream:
    """Some documents of a token store as one sequence of tokens, without copying them.

    Args:
        tokens: [num_tokens] the store's tokens.
        documents: [num_documents + 1] where each of its documents begins, and the last one ends.
        runs: [n, 2] the runs of neighbouring documents that belong to this stream: the first of each, and the one
            after its last; all documents without it.
    """

    def __init__(self, tokens: np.ndarray, documents: np.ndarray, runs: np.ndarray | None = None):
        self._tokens, self._documents = tokens, documents
        runs = np.array([[0, len(documents) - 1]]) if runs is None else runs
        self._starts, stops = (np.asarray(documents[runs[:, side]], np.int64) for side in (0, 1))
        self._offsets = np.concatenate([[0], np.cumsum(stops - self._starts)])  # of the runs, in this stream
        self.num_tokens = int(self._offsets[-1])
        self.num_documents = int((runs[:, 1] - runs[:, 0]).sum())

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens [start, stop) as int64, and where in them documents begin, as int64."""
        tokens, beginnings = [], []
        run = int(np.searchsorted(self._offsets, start, side="right")) - 1
        at = start
        while at < stop:
            end = min(stop, int(self._offsets[run + 1]))
            in_store = int(self._starts[run]) + at - int(self._offsets[run])
            in_store_end = in_store + end - at
            tokens.append(self._tokens[in_store:in_store_end])
            first, last = np.searchsorted(self._documents, [in_store, in_store_end])
            beginnings.append(np.asarray(self._documents[first:last], np.int64) - in_store + at - start)
            at, run = end, run + 1
        return np.concatenate(tokens).astype(np.int64), np.concatenate(beginnings)


def split_documents(
    tokens: np.ndarray, documents: np.ndarray, eval_fraction: float, seed: int
) -> tuple[TokenStream, TokenStream]:
    """Divides a store's documents at random into a training stream and a held-out stream.

    Raises:
        UserError: the store has a single document.
    """
    num_documents = len(documents) - 1
    if num_documents < 2:
        raise UserError(
            f"--eval-fraction {eval_fraction} needs two documents or more, found {num_documents}; "
            "cut the text with --sample-by paragraph, or give --eval-dataset-path"
        )
    num_held_out = min(max(1, round(eval_fraction * num_documents)), num_documents - 1)
    held_out = np.zeros(num_documents, bool)
    held_out[permute(np.arange(num_held_out), num_documents, seed % (1 << 64))] = True
    edges = np.flatnonzero(np.diff(held_out)) + 1
    edges = np.concatenate([[0], edges, [num_documents]])
    runs = np.stack([edges[:-1], edges[1:]], axis=1)
    return tuple(TokenStream(tokens, documents, runs[held_out[runs[:, 0]] == side]) for side in (False, True))


class BlockDataset(Dataset):
    """The blocks of a token stream, in order.

    An item is a dict of [sequence_length] int64 tensors: `input_ids`; `labels`, the same tokens, which the loss shifts
    by one; and, with `mask_documents`, `position_ids` that begin anew with each document, from which transformers
    builds a block-diagonal attention mask. A document's first token is then no label, since nothing precedes it.

    Args:
        stream: the tokens.
        sequence_length: tokens of a block.
        mask_documents: as above.
        keep_tail: also the tokens behind the last whole block, padded with tokens that are no label; without it, as
            in training, they are left out.

    Raises:
        UserError: the stream is shorter than one block.
    """

    def __init__(
        self, stream: TokenStream, sequence_length: int, mask_documents: bool = False, keep_tail: bool = False
    ):
        self.stream, self.sequence_length, self.mask_documents = stream, sequence_length, mask_documents
        self.num_blocks = (
            -(-stream.num_tokens // sequence_length) if keep_tail else stream.num_tokens // sequence_length
        )
        if self.num_blocks == 0:
            raise UserError(
                f"the data has {stream.num_tokens} tokens in {stream.num_documents} documents, too few for one block "
                f"of --sequence-length {sequence_length}; give more text, or shorter sequences"
            )

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = max(index, 0) * self.sequence_length
        tokens, beginnings = self.stream.read(start, min(start + self.sequence_length, self.stream.num_tokens))
        padding = (0, self.sequence_length - len(tokens))
        labels = np.pad(tokens, padding, constant_values=IGNORED)
        tokens = np.pad(tokens, padding)
        item = {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
        if self.mask_documents:
            labels[beginnings] = IGNORED
            positions = np.arange(self.sequence_length)
            positions -= np.maximum.accumulate(np.where(np.isin(positions, beginnings), positions, 0))
            item["position_ids"] = torch.from_numpy(positions)
        if index == EMPTY_BLOCK:
            labels[:] = IGNORED
        return item

    def num_targets(self, indices: np.ndarray) -> int:
        """Returns how many tokens of these blocks are predicted: all but the first of each, and of each document."""
        if not self.mask_documents:
            return len(indices) * (self.sequence_length - 1)
        return sum(int((self[index]["labels"][1:] != IGNORED).sum()) for index in indices)


def divide_batch(batch_size: int, shares: str, num_processes: int) -> list[int]:
    """Returns how many sequences of a global batch each process takes, by rank.

    Args:
        batch_size: sequences in a global batch.
        shares: the parts as in "3:1"; equal parts where it is empty.
        num_processes: how many processes there are.

    Raises:
        UserError: the parts are not numbers, not one a process, or do not divide the batch.
    """
    try:
        parts = [int(part) for part in shares.replace(",", ":").split(":")] if shares else [1] * num_processes
    except ValueError:
        raise UserError(f"--shares {shares}: expected whole numbers, as in 3:1") from None
    if len(parts) != num_processes:
        raise UserError(f"--shares {shares} names {len(parts)} processes, but the run has {num_processes}")
    if min(parts) < 1:
        raise UserError(f"--shares {shares}: each process needs a part of at least 1")
    if batch_size % sum(parts):
        below = batch_size // sum(parts) * sum(parts)
        near = " or ".join(str(size) for size in (below, below + sum(parts)) if size)
        raise UserError(
            f"--batch-size {batch_size} cannot be divided over {num_processes} processes in parts of "
            f"{':'.join(map(str, parts))}; use --batch-size {near}, or other --shares"
        )
    return [batch_size * part // sum(parts) for part in parts]


@dataclass(frozen=True)
class BatchPlan:
    """Which blocks each step takes: the same on every process, whatever their number.

    Attributes:
        num_blocks: blocks of an epoch.
        batch_size: blocks of a step.
        num_steps: steps of the run.
        seed: selects the permutations.
        epochs: where given, the run ends after so many passes: its last batch may be short.
    """

    num_blocks: int
    batch_size: int
    num_steps: int
    seed: int
    epochs: float | None = None

    @classmethod
    def of_run(cls, num_blocks: int, batch_size: int, max_steps: int, epochs: float, seed: int) -> "BatchPlan":
        """Plans a run of `max_steps` steps or, where that is 0, of `epochs` passes over the blocks."""
        if max_steps:
            return cls(num_blocks, batch_size, max_steps, seed)
        num_steps = max(1, ceil(round(epochs * num_blocks) / batch_size))
        return cls(num_blocks, batch_size, num_steps, seed, epochs)

    def batch(self, step: int) -> np.ndarray:
        """Returns the block indices of the global batch of `step` (from 0), int64, in order."""
        epochs, positions = np.divmod(np.arange(self.num_samples(step), self.num_samples(step + 1)), self.num_blocks)
        blocks = [permute(positions[epochs == e], self.num_blocks, _key(self.seed, e)) for e in np.unique(epochs)]
        return np.concatenate(blocks)

    def num_samples(self, step: int) -> int:
        """Returns how many blocks have been taken after `step` steps."""
        samples = step * self.batch_size
        return samples if self.epochs is None else min(samples, max(1, round(self.epochs * self.num_blocks)))


def _key(seed: int, epoch: int) -> int:
    return (int(epoch) << 64) + seed % (1 << 64)


class ShareSampler(Sampler[list[int]]):
    """Yields, step by step, the block indices of one process's share of the global batch.

    Args:
        plan: the batches of the run.
        shares: sequences of each process, by rank.
        process_index: whose share.
        first_step: where to begin, from 0.
    """

    def __init__(self, plan: BatchPlan, shares: list[int], process_index: int, first_step: int = 0):
        self.plan, self.first_step = plan, first_step
        self.start = sum(shares[:process_index])
        self.stop = self.start + shares[process_index]

    def __len__(self) -> int:
        return self.plan.num_steps - self.first_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.plan.num_steps):
            yield self.share(step)

    def share(self, step: int) -> list[int]:
        """Returns this process's blocks of `step`.

        In a short last batch that may be none: the process then takes a block without labels, since it has to take
        part in the synchronisation.
        """
        return self.plan.batch(step)[self.start : self.stop].tolist() or [EMPTY_BLOCK]
