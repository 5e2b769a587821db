"""Text in any format -> documents -> a token store (forge_lib/data/token_store.py)."""

from __future__ import annotations  # names of transformers in signatures are not imported

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from filelock import FileLock

from forge_lib import disk
from forge_lib.config import DataConfig
from forge_lib.data.files import Source, find_source
from forge_lib.data.reading import Piece, read_pieces
from forge_lib.data.token_store import (
    FORMAT_VERSION,
    STORE_FILES,
    Progress,
    TokenStore,
    is_store,
    open_store,
    stores_folder,
)
from forge_lib.errors import UserError

BATCH_CHARACTERS = 1 << 20  # tokenized at a time; a token in the tokenizer takes about 100 bytes of memory
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


def tokenizer_fingerprint(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Returns a sha256 of everything that decides how the tokenizer splits text."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.update(padding=None, truncation=None)
    else:
        state = [type(tokenizer).__name__, tokenizer.get_vocab()]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def prepare_store(
    config: DataConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: str | Path | None = None,
    progress: Progress = lambda text: None,
) -> TokenStore:
    """Opens the token store of `config.dataset_path`; makes it first if it does not exist or its input has changed.

    If several processes of a machine ask for the same store, one of them makes it and the others wait.

    Args:
        config: what to read, and how.
        tokenizer: splits the documents; its end-of-text token joins them.
        folder: of the store. None: a folder in the cache of `datasets`, whose name follows from the input, the
            tokenizer and the options.
        progress: called with a line of text while the store is made.

    Raises:
        UserError: the input is missing, empty, not text, or lacks the column; it is a store of another tokenizer; or
            `folder` has other files.
    """
    if is_store(config.dataset_path):
        return _check_tokenizer(open_store(config.dataset_path), tokenizer)
    source = find_source(config)
    made_from = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "source": source.fingerprint,
        "options": {name: getattr(config, name) for name in ("sample_by", "text_column", "encoding_errors")},
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    folder = Path(folder) if folder else stores_folder() / key[:16]
    folder = folder.resolve() if folder.is_symlink() else folder  # the link stays
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        disk.restore(folder)
        if is_store(folder) and (store := open_store(folder)).manifest.get("made_from") == key:
            return store
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if names - STORE_FILES or (names and not is_store(folder)):
            raise UserError(f"--output-dir {folder} has other files; name an empty or a new folder")
        _make_store(folder, key, source, config, tokenizer, progress)
    return open_store(folder)


def _check_tokenizer(store: TokenStore, tokenizer: transformers.PreTrainedTokenizerBase) -> TokenStore:
    made_with = store.manifest["tokenizer"]
    if made_with["fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"the token store {store.folder} was made with the tokenizer of {made_with['name']!r} "
            f"({made_with['vocab_size']} tokens), but --model-name has that of {tokenizer.name_or_path!r} "
            f"({len(tokenizer)} tokens); make the store again with scripts/prepare_data.py --model-name "
            f"{tokenizer.name_or_path}"
        )
    return store


def _make_store(
    folder: Path,
    key: str,
    source: Source,
    config: DataConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    progress: Progress,
) -> None:
    """Writes a store under a temporary name, and renames it when it is complete; `key` identifies its input."""
    partial = disk.partial_path(folder)
    disk.remove(partial)
    partial.mkdir()
    try:
        manifest = _write_store(partial, source, config, tokenizer, progress)
        source.check_unchanged()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    manifest["made_from"] = key
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    disk.flush_all(partial)
    disk.place(folder)


def _write_store(
    folder: Path,
    source: Source,
    config: DataConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    progress: Progress,
) -> dict[str, Any]:
    """Writes tokens.bin and documents.bin, and returns the manifest."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-text token to join documents with")
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    pieces = read_pieces(source, config, progress)
    with _HashedFile(folder / "tokens.bin") as tokens, _HashedFile(folder / "documents.bin") as documents:
        counts = _write_documents(tokens, documents, pieces, tokenizer, dtype, config.dataset_path)
    if not counts["num_documents"]:
        raise UserError(f"--dataset-path {config.dataset_path}: empty: no text except white space in it")
    return {
        "format": "p2p-llm-forge token store",
        "format_version": FORMAT_VERSION,
        "dtype": dtype.name,
        **counts,
        "tokenizer": {
            "name": tokenizer.name_or_path,
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
        },
        "source": {
            "path": config.dataset_path,
            "fingerprint": source.fingerprint,
            "num_files": len(source.files),
            "num_empty_files": source.num_empty,
        },
        "files": {file.path.name: {"bytes": file.size, "sha256": file.sha256} for file in (tokens, documents)},
    }


def _write_documents(
    tokens: _HashedFile,
    documents: _HashedFile,
    pieces: Iterable[Piece],
    tokenizer: transformers.PreTrainedTokenizerBase,
    dtype: np.dtype,
    dataset_path: str,
) -> dict[str, int]:
    """Tokenizes the documents into both files, and returns the counts for the manifest."""
    num_tokens = num_documents = num_text_bytes = 0
    last_line = time.monotonic()
    documents.write(np.zeros(1, np.uint64))
    for texts, ends in _batches(pieces):
        for ids, is_end in zip(_encode(tokenizer, texts), ends, strict=True):
            if is_end:
                ids = [*ids, tokenizer.eos_token_id]
            num_tokens += len(ids)
            tokens.write(np.asarray(ids, dtype))
            if is_end:
                num_documents += 1
                documents.write(np.asarray([num_tokens], np.uint64))
        num_text_bytes += sum(len(text.encode()) for text in texts)
        if not sys.stderr.isatty() and time.monotonic() - last_line >= LINE_SECONDS:  # a terminal has a progress bar
            last_line = time.monotonic()
            state = f"{num_text_bytes / 1e6:.1f} MB of text, {num_tokens} tokens so far"
            print(f"tokenizing {dataset_path}: {state}", file=sys.stderr, flush=True)
    return {"num_tokens": num_tokens, "num_documents": num_documents, "num_text_bytes": num_text_bytes}


class _HashedFile:
    """A file that is written once, from start to end, and hashed meanwhile."""

    def __init__(self, path: Path):
        self.path, self.size, self._hash = path, 0, hashlib.sha256()

    def __enter__(self) -> _HashedFile:
        self._file = open(self.path, "wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _encode(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # some models' tokenizers are saved with truncation or padding
        tokenizer.backend_tokenizer.no_padding()
        return [each.ids for each in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


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
