"""Writes tokenized documents into the two files of a token store."""

import hashlib
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from forge_lib.data.reading import Piece
from forge_lib.data.tokenizing import Encoder
from forge_lib.errors import disk_errors_as_user_errors

BATCH_CHARACTERS = 1 << 20  # tokenized at a time; a token in the tokenizer takes about 100 bytes of memory
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


class HashedFile:
    """A file that is written once, from start to end, and hashed meanwhile; a full disk is a UserError."""

    def __init__(self, path: Path):
        self.path, self.size, self._hash = path, 0, hashlib.sha256()

    def __enter__(self) -> "HashedFile":
        self._file = open(self.path, "wb")
        return self

    def __exit__(self, *_: object) -> None:
        with disk_errors_as_user_errors(self.path):
            self._file.close()

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        with disk_errors_as_user_errors(self.path):
            self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class DocumentWriter:
    """Writes documents into the two files of a store.

    Args:
        tokens, documents: tokens.bin and documents.bin.
        dtype: of the tokens, uint16 or uint32.
        begin, end: the ids with which each document begins and ends.

    Attributes:
        counts: for the manifest: tokens, documents, bytes of text, tokens of the longest and the shortest document.
    """

    def __init__(self, tokens: HashedFile, documents: HashedFile, dtype: np.dtype, begin: list[int], end: int):
        self.counts = {"num_tokens": 0, "num_documents": 0, "num_text_bytes": 0}
        self.counts |= {"longest_document": 0, "shortest_document": 0}  # in tokens
        self._tokens, self._documents, self._dtype, self._begin, self._end = tokens, documents, dtype, begin, end
        self._start = 0  # of the document that is written

    def write(self, pieces: Iterable[Piece], encoder: Encoder, dataset_path: str) -> None:
        """Tokenizes and writes all documents."""
        last_line, is_begun = time.monotonic(), False
        self._documents.write(np.zeros(1, np.uint64))
        for texts, ends in _batches(_join_pieces(pieces, encoder)):
            continued = [is_begun, *(not is_end for is_end in ends[:-1])]
            is_begun = not ends[-1]
            self._write_batch(*encoder.encode(texts, continued), np.array(continued), np.array(ends))
            self.counts["num_text_bytes"] += sum(len(text.encode()) for text in texts)
            # a terminal has a progress bar
            if not sys.stderr.isatty() and time.monotonic() - last_line >= LINE_SECONDS:
                last_line = time.monotonic()
                state = f"{self.counts['num_text_bytes'] / 1e6:.1f} MB of text, {self.counts['num_tokens']} tokens"
                print(f"tokenizing {dataset_path}: {state} so far", file=sys.stderr, flush=True)

    def _write_batch(self, ids: np.ndarray, lengths: np.ndarray, continued: np.ndarray, ends: np.ndarray) -> None:
        """Writes texts with the tokens that begin and end a document.

        Args:
            ids: of all texts.
            lengths: [num_texts] the number of ids of each text.
            continued: [num_texts] bool, whether the text continues a document.
            ends: [num_texts] bool, whether a document ends with the text.
        """
        lengths = lengths + len(self._begin) * ~continued + ends
        stops = np.cumsum(lengths)
        begin_at = ((stops - lengths)[~continued, None] + np.arange(len(self._begin))).ravel()
        end_at = stops[ends] - 1
        tokens, is_text = np.empty(stops[-1], self._dtype), np.ones(stops[-1], bool)
        is_text[begin_at] = is_text[end_at] = False
        tokens[is_text], tokens[end_at] = ids, self._end
        tokens[begin_at] = np.tile(self._begin, np.count_nonzero(~continued))
        self._tokens.write(tokens)
        document_stops = self.counts["num_tokens"] + stops[ends]
        self._documents.write(document_stops.astype(np.uint64))
        self._count(document_stops)
        self.counts["num_tokens"] += len(tokens)

    def _count(self, stops: np.ndarray) -> None:
        """Counts the documents that end at these tokens of the store, and their lengths."""
        if not len(stops):
            return
        lengths = np.diff(stops, prepend=self._start)
        self._start = int(stops[-1])
        longest, shortest = int(lengths.max()), int(lengths.min())
        if self.counts["num_documents"]:
            longest = max(longest, self.counts["longest_document"])
            shortest = min(shortest, self.counts["shortest_document"])
        self.counts |= {"longest_document": longest, "shortest_document": shortest}
        self.counts["num_documents"] += len(stops)


def _join_pieces(pieces: Iterable[Piece], encoder: Encoder) -> Iterator[Piece]:
    """Joins pieces of a document that would have other tokens if they were encoded one by one."""
    parts: list[str] = []
    for text, is_end in pieces:
        if parts and encoder.can_cut_before(text):
            yield "".join(parts), False
            parts = []
        parts.append(text)
        if is_end:
            yield "".join(parts), True
            parts = []


def _batches(pieces: Iterable[Piece]) -> Iterator[tuple[list[str], list[bool]]]:
    """Collects pieces into batches of about BATCH_CHARACTERS: enough for the tokenizer's threads, little in memory."""
    texts, ends, num_characters = [], [], 0
    for text, is_end in pieces:
        texts.append(text)
        ends.append(is_end)
        num_characters += len(text) + 1
        if num_characters >= BATCH_CHARACTERS:
            yield texts, ends
            texts, ends, num_characters = [], [], 0
    if texts:
        yield texts, ends
