"""A token store -> a stream of tokens -> blocks of `sequence_length` tokens."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from forge_lib.config import IGNORED_LABEL
from forge_lib.data.permutation import permute
from forge_lib.errors import UserError

EMPTY_BLOCK = -1  # the index of a block without targets


class TokenStream:
    """Some documents of a token store as one sequence of tokens, without a copy of them.

    Args:
        tokens: [num_tokens] the store's tokens.
        documents: [num_documents + 1] uint64, where in `tokens` each document starts and the last one ends.
        runs: [n, 2] the documents of this stream, as ranges of document numbers: the first one, and the one after the
            last. None: all documents.

    Attributes:
        num_tokens, num_documents: of this stream.
    """

    def __init__(self, tokens: np.ndarray, documents: np.ndarray, runs: np.ndarray | None = None):
        self._tokens, self._documents = tokens, documents
        runs = np.array([[0, len(documents) - 1]]) if runs is None else runs
        self._run_starts, run_stops = (
            np.asarray(documents[runs[:, side]], np.int64) for side in (0, 1)
        )  # in `tokens`
        self._run_offsets = np.concatenate([[0], np.cumsum(run_stops - self._run_starts)])  # in this stream
        self.num_tokens = int(self._run_offsets[-1])
        self.num_documents = int((runs[:, 1] - runs[:, 0]).sum())

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens [start, stop), int64, and the positions among them at which documents start, int64."""
        tokens, document_starts = [], []
        for offset, store_start, store_stop in self._parts(start, stop):
            tokens.append(self._tokens[store_start:store_stop])
            document_starts.append(self._starts(store_start, store_stop).astype(np.int64) - store_start + offset)
        return np.concatenate(tokens).astype(np.int64), np.concatenate(document_starts)

    def num_starts(self, start: int, stop: int) -> int:
        """Returns at how many of the positions [start, stop) documents start; reads no tokens."""
        return sum(len(np.unique(self._starts(*part))) for _, *part in self._parts(start, stop))

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yields the parts of [start, stop) that are contiguous in the store.

        Each is (offset from `start`, first token in the store, the one after its last token in the store).
        """
        run = int(np.searchsorted(self._run_offsets, start, side="right")) - 1
        position = start
        while position < stop:
            end = min(stop, int(self._run_offsets[run + 1]))
            store_start = int(self._run_starts[run]) + position - int(self._run_offsets[run])
            yield position - start, store_start, store_start + end - position
            position, run = end, run + 1

    def _starts(self, store_start: int, store_stop: int) -> np.ndarray:
        """Returns where documents start among tokens of the store; empty documents repeat a position."""
        limits = np.array([store_start, store_stop], np.uint64)  # another type would make numpy convert all documents
        first, last = np.searchsorted(self._documents, limits)
        return self._documents[first:last]


def split_documents(
    tokens: np.ndarray, documents: np.ndarray, eval_fraction: float, seed: int
) -> tuple[TokenStream, TokenStream]:
    """Splits a store's documents at random into a training stream and a held-out stream.

    Args:
        tokens, documents: of the store, as for TokenStream.
        eval_fraction: fraction of the documents that is held out, at least one and never all of them.
        seed: selects them.

    Raises:
        UserError: the store has a single document.
    """
    num_documents = len(documents) - 1
    if num_documents < 2:
        raise UserError(
            f"--eval-fraction {eval_fraction} needs at least two documents, but the data has {num_documents}; "
            "split the text with --sample-by paragraph, or give --eval-dataset-path"
        )
    num_held_out = min(max(1, round(eval_fraction * num_documents)), num_documents - 1)
    held_out = np.zeros(num_documents, bool)
    held_out[permute(np.arange(num_held_out), num_documents, seed % (1 << 64))] = True
    edges = np.concatenate([[0], np.flatnonzero(np.diff(held_out)) + 1, [num_documents]])
    runs = np.stack([edges[:-1], edges[1:]], axis=1)
    train, evaluation = (TokenStream(tokens, documents, runs[held_out[runs[:, 0]] == side]) for side in (False, True))
    return train, evaluation


class BlockDataset(Dataset):
    """The blocks of a token stream, in order.

    An item is a dict of [sequence_length] int64 tensors:
        `input_ids`: the tokens.
        `labels`: the same tokens, which the loss shifts by one; -100 where a token is no target.
        `position_ids`: with `mask_documents`; they restart at each document, and transformers builds a block-diagonal
            attention mask from them. The first token of a document is then no target, since nothing precedes it.

    Args:
        stream: the tokens.
        sequence_length: tokens per block.
        mask_documents: no attention between the documents of a block.
        keep_tail: whether the tokens after the last whole block form a block too, padded with tokens that are no
            targets. Training leaves them out.

    Raises:
        UserError: the stream is shorter than one block.
    """

    def __init__(
        self, stream: TokenStream, sequence_length: int, mask_documents: bool = False, keep_tail: bool = False
    ):
        self.stream, self.sequence_length, self.mask_documents = stream, sequence_length, mask_documents
        num_tokens = stream.num_tokens
        self.num_blocks = -(-num_tokens // sequence_length) if keep_tail else num_tokens // sequence_length
        if self.num_blocks == 0:
            raise UserError(
                f"the data has {num_tokens} tokens in {stream.num_documents} documents, too few for one block "
                f"of --sequence-length {sequence_length}; give more text, or a lower --sequence-length"
            )

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = max(index, 0) * self.sequence_length
        tokens, document_starts = self.stream.read(start, min(start + self.sequence_length, self.stream.num_tokens))
        padding = (0, self.sequence_length - len(tokens))
        labels = np.pad(tokens, padding, constant_values=IGNORED_LABEL)
        item = {"input_ids": torch.from_numpy(np.pad(tokens, padding)), "labels": torch.from_numpy(labels)}
        if self.mask_documents:
            labels[document_starts] = IGNORED_LABEL
            positions = np.arange(self.sequence_length)
            positions -= np.maximum.accumulate(np.where(np.isin(positions, document_starts), positions, 0))
            item["position_ids"] = torch.from_numpy(positions)
        if index == EMPTY_BLOCK:
            labels[:] = IGNORED_LABEL
        return item

    def num_targets(self, indices: np.ndarray) -> int:
        """Returns how many tokens of these blocks (none of them EMPTY_BLOCK) are predicted; reads no tokens.

        All but the first token of each block and, with `mask_documents`, the first token of each document.
        """
        starts = np.asarray(indices, np.int64) * self.sequence_length
        stops = np.minimum(starts + self.sequence_length, self.stream.num_tokens)
        num_targets = int((stops - starts - 1).sum())
        if self.mask_documents:
            spans = zip((starts + 1).tolist(), stops.tolist(), strict=True)
            num_targets -= sum(self.stream.num_starts(start, stop) for start, stop in spans)
        return num_targets
