"""The token store: a corpus as tokens, in a folder.

    tokens.bin      the tokens of all documents, each document followed by the end-of-text token (uint16 or uint32)
    documents.bin   where each document starts in tokens.bin, and where the last one ends (uint64, documents + 1)
    manifest.json   format version, tokenizer and source fingerprints, counts, size and sha256 of both files

It does not depend on the sequence length, is read through a memory map, and gets its name only when it is complete.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forge_lib import disk
from forge_lib.errors import UserError

FORMAT_VERSION = 2  # 1: without begin tokens, and with another fingerprint of the tokenizer; still read
DATA_FILES = {"tokens.bin", "documents.bin"}
STORE_FILES = {*DATA_FILES, "manifest.json"}
MANIFEST_BYTES = 1 << 24  # a larger file is not a manifest
OFFSETS_READ = 1 << 17  # document offsets that are checked at a time

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TokenStore:
    """A token store on disk; its arrays are memory maps.

    Attributes:
        folder: its path.
        manifest: the content of manifest.json.
        tokens: [num_tokens] uint16 or uint32.
        documents: [num_documents + 1] uint64, where in `tokens` each document starts and the last one ends.
        stamps: file name -> `disk.stamp` of the file when it was opened.
    """

    folder: Path
    manifest: dict[str, Any]
    tokens: np.ndarray
    documents: np.ndarray
    stamps: dict[str, tuple[int, int, int]]

    @property
    def fingerprint(self) -> str:
        """sha256 over the tokens and document offsets: equal for stores with equal content, on any machine."""
        files = self.manifest["files"]
        return hashlib.sha256("".join(files[name]["sha256"] for name in sorted(files)).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Checks that the files are still those that were opened. It is cheap: call it before each read of the arrays.

        If a memory-mapped file is truncated, reading it kills the process with SIGBUS, and no error can be caught. A
        file of the right size that was written or replaced is hashed again, once.

        Raises:
            UserError: names the file that is missing, truncated or changed.
        """
        for name, facts in self.manifest["files"].items():
            path, expected = self.folder / name, facts["bytes"]
            fix = (
                "while the run was reading it; restore it and start again: the run continues from its last checkpoint"
            )
            try:
                found = disk.stamp(path)
                if found == self.stamps[name]:
                    continue
                if found[0] != expected:
                    change = "truncated" if found[0] < expected else "changed"
                    raise UserError(f"{path} was {change} {fix} ({found[0]} bytes, expected {expected})")
                if disk.sha256(path) != facts["sha256"]:
                    raise UserError(f"{path} was changed {fix} ({expected} bytes as before, but another sha256)")
            except OSError as error:
                raise UserError(f"{path} was removed {fix} ({error.strerror})") from None
            self.stamps[name] = found


def is_store(path: str | Path) -> bool:
    """Returns whether `path` is a token store: a folder of text may have a manifest.json of its own."""
    folder = Path(path).expanduser()
    return (folder / "manifest.json").is_file() and any((folder / name).exists() for name in DATA_FILES)


def stores_folder() -> Path:
    """Returns the folder of stores if the user named none: it is in the cache of `datasets`.

    The path follows from the environment by the rules of `datasets`, which would be slow to import.
    """
    cache = os.path.join(os.getenv("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    home = os.path.expanduser(os.getenv("HF_HOME", cache))
    return Path(os.getenv("HF_DATASETS_CACHE", os.path.join(home, "datasets"))) / "token_stores"


def received_folder(fingerprint: str) -> Path:
    """Returns the folder for a token store that another machine sends.

    Raises:
        UserError: the fingerprint, which the other machine sent, is not a sha256.
    """
    if not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise UserError(f"{fingerprint!r:.99} is not the fingerprint of a token store")
    return stores_folder() / f"received-{fingerprint[:16]}"


def open_store(folder: str | Path) -> TokenStore:
    """Opens a token store through a memory map.

    Raises:
        UserError: the manifest is damaged, of a newer format, or does not match the files beside it.
    """
    folder = Path(folder).expanduser()
    manifest = _read_manifest(folder)
    dtype = np.dtype(manifest["dtype"])
    num_tokens, num_documents = manifest["num_tokens"], manifest["num_documents"]
    sizes = {"tokens.bin": num_tokens * dtype.itemsize, "documents.bin": (num_documents + 1) * 8}
    stamps = {}
    for name, size in sizes.items():
        path, stated = folder / name, manifest["files"][name]["bytes"]
        if path.is_file():  # or a link to one; opening a pipe would block
            stamps[name] = disk.stamp(path)
        found = stamps[name][0] if name in stamps else 0
        if found != stated or stated != size:
            raise UserError(f"{path} has {found} bytes, but its manifest says {stated}; {_fix(folder)}")
    return TokenStore(
        folder=folder,
        manifest=manifest,
        tokens=np.memmap(folder / "tokens.bin", dtype=dtype, mode="r") if num_tokens else np.zeros(0, dtype),
        documents=np.memmap(folder / "documents.bin", dtype=np.uint64, mode="r"),
        stamps=stamps,
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Reads an untrusted manifest: afterwards, each value that the program uses has the right type."""
    path = folder / "manifest.json"
    try:
        if not path.is_file() or path.stat().st_size > MANIFEST_BYTES:
            raise ValueError(f"not a file of at most {MANIFEST_BYTES} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if _count(manifest["format_version"]) > FORMAT_VERSION:
            raise UserError(
                f"{folder}: token store of format {manifest['format_version']}, but this program reads up to format "
                f"{FORMAT_VERSION}; update it, or make the store again in another folder with scripts/prepare_data.py"
            )
        _check_manifest(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r:.200}); {_fix(folder)}") from None
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError for a manifest with a wrong value."""
    if manifest["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"dtype {manifest['dtype']!r}")
    if set(manifest["files"]) != DATA_FILES:
        raise ValueError(f"files {sorted(manifest['files'])}")
    for facts in manifest["files"].values():
        _count(facts["bytes"])
        if not re.fullmatch("[0-9a-f]{64}", facts["sha256"]):
            raise ValueError(f"sha256 {facts['sha256']!r}")
    tokenizer = manifest["tokenizer"]
    for count in (manifest["num_tokens"], manifest["num_documents"], manifest["num_text_bytes"]):
        _count(count)
    _count(tokenizer["vocab_size"])
    if not isinstance(tokenizer["name"], str) or not isinstance(tokenizer["fingerprint"], str):
        raise ValueError("tokenizer without a name or a fingerprint")
    if manifest["format_version"] == 1:
        return
    for count in (manifest["num_empty_documents"], manifest["longest_document"], manifest["shortest_document"]):
        _count(count)
    for count in (*manifest["special_tokens_in_text"].values(), *tokenizer["begin_ids"], tokenizer["end_id"]):
        _count(count)
    source = manifest["source"]
    for count, example in (*source["read"].values(), *source["empty"].values(), *source["skipped"].values()):
        _count(count)
        if not isinstance(example, str):
            raise ValueError(f"files {example!r:.50}")
    if not isinstance(source["path"], str) or not isinstance(manifest["options"]["special_tokens_in_text"], str):
        raise ValueError("no path of the source, or no options")


def _count(value: Any) -> int:
    """Returns `value` if it is an integer (no bool) from 0 that fits in 63 bits; raises ValueError if not."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.50} where a count is expected")
    return value


def _fix(folder: Path) -> str:
    return f"remove {folder}, and make the store again or copy it again"


def verify_store(store: TokenStore, progress: Progress = lambda text: None) -> None:
    """Reads a whole token store and compares it with its manifest, at about 1.7 GB/s, in constant memory.

    Args:
        store: the store.
        progress: called for each percent, with a line of text.

    Raises:
        UserError: names the file that differs from the manifest, or the document that ends before it starts.
    """
    files = store.manifest["files"]
    total, done = sum(facts["bytes"] for facts in files.values()), 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        before, done = done, done + num_bytes
        if 100 * before // total != 100 * done // total:
            progress(f"verifying the token store: {100 * done // total} %")

    for name, facts in files.items():
        found = disk.sha256(store.folder / name, advance)
        if found != facts["sha256"]:
            raise UserError(
                f"{store.folder / name} is damaged: its sha256 is {found[:12]}…, but its manifest says "
                f"{facts['sha256'][:12]}…; {_fix(store.folder)}"
            )
    _check_offsets(store)


def _check_offsets(store: TokenStore) -> None:
    """Checks that the first document starts at 0, no offset decreases, and the last document ends with the tokens."""
    path, fix = store.folder / "documents.bin", _fix(store.folder)
    last = number = 0
    with open(path, "rb") as file:
        while len(offsets := np.fromfile(file, np.uint64, OFFSETS_READ)):
            if not number and offsets[0]:
                raise UserError(f"{path}: the first document starts at token {offsets[0]}, expected 0; {fix}")
            before = np.concatenate([np.asarray([last], np.uint64), offsets[:-1]])
            if (wrong := np.flatnonzero(offsets < before)).size:
                at = wrong[0]
                raise UserError(
                    f"{path}: entry {number + at} is {offsets[at]}, but the one before is {before[at]}; {fix}"
                )
            last, number = int(offsets[-1]), number + len(offsets)
    num_tokens = store.manifest["num_tokens"]
    if last != num_tokens:
        raise UserError(f"{path}: the last document ends at token {last}, expected {num_tokens}; {fix}")
