"""Text in any format -> documents -> a token store (forge_lib/data/token_store.py)."""

from __future__ import annotations  # names of transformers in signatures are not imported

import hashlib
import json
import shutil
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from filelock import FileLock

from forge_lib import disk
from forge_lib.config import DataConfig, flag_name
from forge_lib.data.document_writer import DocumentWriter, HashedFile
from forge_lib.data.files import FORMATS, Source, describe_files, find_source
from forge_lib.data.reading import Reader
from forge_lib.data.token_store import (
    FORMAT_VERSION,
    STORE_FILES,
    Progress,
    TokenStore,
    is_store,
    open_store,
    stores_folder,
)
from forge_lib.data.tokenizing import (
    Encoder,
    begin_ids,
    end_id,
    splitting_fingerprint,
    tokenizer_fingerprint,
    vocabulary_size,
)
from forge_lib.errors import UserError

READER_VERSION = 2  # increase it when the same files give other documents: older stores in the cache are then unused
OPTIONS = (  # of DataConfig: they decide which tokens the same files give
    "sample_by",
    "text_column",
    "encoding_errors",
    "document_separator",
    "special_tokens_in_text",
    "begin_tokens",
)


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
    end_id(tokenizer)  # raises an error if there is none
    source = find_source(config)
    made_from = {
        "reader": READER_VERSION,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "source": source.fingerprint,
        "options": {name: getattr(config, name) for name in OPTIONS},
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
    is_old = store.manifest["format_version"] == 1
    fingerprint = splitting_fingerprint if is_old else tokenizer_fingerprint
    if made_with["fingerprint"] != fingerprint(tokenizer):
        raise UserError(
            f"the token store {store.folder} was made with the tokenizer of {made_with['name']!r} "
            f"({made_with['vocab_size']} tokens), but --model-name has that of {tokenizer.name_or_path!r} "
            f"({vocabulary_size(tokenizer)} tokens), or another begin or end of a text; make the store again with "
            f"scripts/prepare_data.py --model-name {tokenizer.name_or_path}"
        )
    if is_old and len(store.tokens) and store.tokens[-1] != tokenizer.eos_token_id:
        raise UserError(
            f"the documents of the token store {store.folder} end with token {store.tokens[-1]}, but the tokenizer of "
            f"--model-name ends them with {tokenizer.eos_token_id}; make the store again with scripts/prepare_data.py"
        )
    return store


def begins_documents(store: TokenStore) -> bool:
    """Returns whether the documents of a store begin as its tokenizer begins a text."""
    return bool(store.manifest["tokenizer"].get("begin_ids"))


def describe_store(
    store: TokenStore, tokenizer: transformers.PreTrainedTokenizerBase, config: DataConfig
) -> list[str]:
    """Returns lines for the log: which files a store was made of, and what may be unexpected about its documents."""
    source, lines = store.manifest["source"], []
    defaults = {field.name: field.default for field in fields(DataConfig)}
    given = [name for name, default in defaults.items() if getattr(config, name) != default]
    if is_store(config.dataset_path):
        made_with = store.manifest.get("options", {})
        if other := [name for name in given if name in OPTIONS and getattr(config, name) != made_with.get(name)]:
            flags = ", ".join(map(flag_name, other))
            lines.append(f"{flags}: no effect, since {config.dataset_path} is a token store that was made otherwise")
    elif other := [name for name in given if name in _options_without_effect(source.get("read", {}))]:
        flags = ", ".join(map(flag_name, other))
        lines.append(f"{flags}: no effect on the files of {config.dataset_path}")
    if "read" in source:
        lines.append(describe_files(source["path"], source))
    if found := store.manifest.get("special_tokens_in_text"):
        tokens = ", ".join(f"{token} {count:,} times" for token, count in found.items())
        how = store.manifest["options"]["special_tokens_in_text"]
        lines.append(f"special tokens written in the text of {source['path']}: {tokens} (read as: {how})")
    if store.manifest["format_version"] == 1 and (ids := begin_ids(tokenizer)):
        lines.append(
            f"{store.folder} was made by an older version: its documents lack {tokenizer.decode(ids)}, with which "
            "this tokenizer begins a text; make it again with scripts/prepare_data.py"
        )
    return lines


def _options_without_effect(kinds: Collection[str]) -> set[str]:
    """Returns the fields of DataConfig that do not matter for files of these kinds (".csv.gz"); no kind: Hub data."""
    if not kinds:
        return set()
    is_text = {FORMATS.get(kind.split(".")[1]) == "text" for kind in kinds}
    without_text = set() if True in is_text else {"sample_by", "document_separator"}
    without_columns = set() if False in is_text else {"text_column"}
    return {"dataset_config", "dataset_split"} | without_text | without_columns


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
    reader, encoder = Reader(source, config, progress), Encoder(tokenizer, config.special_tokens_in_text)
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32)
    begin = begin_ids(tokenizer) if config.begin_tokens else []
    with HashedFile(folder / "tokens.bin") as tokens, HashedFile(folder / "documents.bin") as documents:
        writer = DocumentWriter(tokens, documents, dtype, begin, end_id(tokenizer))
        writer.write(reader, encoder, config.dataset_path)
    if not writer.counts["num_documents"]:
        raise UserError(f"--dataset-path {config.dataset_path}: empty: no text except white space in it")
    return {
        "format": "p2p-llm-forge token store",
        "format_version": FORMAT_VERSION,
        "dtype": dtype.name,
        **writer.counts,
        "num_empty_documents": reader.num_empty_documents,
        "special_tokens_in_text": dict(encoder.num_special.most_common()),
        "tokenizer": {
            "name": tokenizer.name_or_path,
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": vocabulary_size(tokenizer),
            "begin_ids": begin,
            "end_id": end_id(tokenizer),
        },
        "options": {name: getattr(config, name) for name in OPTIONS},
        "source": {"path": config.dataset_path, "fingerprint": source.fingerprint, **reader.describe()},
        "files": {file.path.name: {"bytes": file.size, "sha256": file.sha256} for file in (tokens, documents)},
    }
