"""The token store: a corpus as tokens, in a folder.

    tokens.bin      the tokens of all documents, each document followed by the end-of-text token (uint16 or uint32)
    documents.bin   where each document begins in tokens.bin, and where the last one ends (uint64, documents + 1)
    manifest.json   format version, tokenizer and source fingerprints, counts, size and sha256 of both files

It does not depend on the sequence length, is read by memory map, and appears under its name only when it is complete.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from forge_lib import disk
from forge_lib.errors import UserError

FORMAT_VERSION = 1
STORE_FILES = {"tokens.bin", "documents.bin", "manifest.json"}
MANIFEST_BYTES = 1 << 24
OFFSETS_READ = 1 << 17  # at a time, to check them

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TokenStore:
    """A token store on disk; its arrays are memory maps.

    Attributes:
        folder: where it lies.
        manifest: the content of manifest.json.
        tokens: [num_tokens] uint16 or uint32.
        documents: [num_documents + 1] uint64, where in `tokens` each document begins and the last one ends.
        seen: file name -> what tells that the file is still the one that was opened.
    """

    folder: Path
    manifest: dict
    tokens: np.ndarray
    documents: np.ndarray
    seen: dict[str, tuple]

    @property
    def fingerprint(self) -> str:
        """sha256 over the tokens and the document offsets: equal stores, wherever they were made, have equal ones."""
        files = self.manifest["files"]
        return hashlib.sha256("".join(files[name]["sha256"] for name in sorted(files)).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Checks that the files are those that were opened; cheap, to be called before each read of the arrays.

        Reading a memory map of a truncated file kills the process with SIGBUS, and no error can be caught then. A file
        of the right size that has been written or replaced is hashed again, once.

        Raises:
            UserError: naming the file that is gone, truncated or changed.
        """
        for name, facts in self.manifest["files"].items():
            path, expected = self.folder / name, facts["bytes"]
            cure = "while the run was reading it; restore it and start again: the run goes on from its last checkpoint"
            try:
                found = disk.stamp(path)
                if found == self.seen[name]:
                    continue
                if found[0] != expected:
                    how = "truncated" if found[0] < expected else "changed"
                    raise UserError(f"{path} was {how} {cure} ({found[0]} bytes, expected {expected})")
                if disk.sha256(path) != facts["sha256"]:
                    raise UserError(f"{path} was changed {cure} ({expected} bytes as before, but another sha256)")
            except OSError as error:
                raise UserError(f"{path} was taken away {cure} ({error.strerror})") from None
            self.seen[name] = found


def is_store(path: str | Path) -> bool:
    """Tells whether `path` is a complete token store."""
    return (Path(path).expanduser() / "manifest.json").is_file()


def received_folder(fingerprint: str) -> Path:
    """Returns where a token store of this fingerprint lies that has come from a peer.

    Raises:
        UserError: the peer's fingerprint is no sha256.
    """
    if not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise UserError(f"{fingerprint!r:.99} is no fingerprint of a token store")
    return stores_folder() / f"received-{fingerprint[:16]}"


def stores_folder() -> Path:
    """Returns where stores lie that nobody has given a place: in the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "token_stores"


def open_store(folder: str | Path) -> TokenStore:
    """Opens a token store by memory map.

    Raises:
        UserError: the manifest is not one of ours, of a newer format, or does not fit the files beside it.
    """
    folder = Path(folder).expanduser()
    manifest = _read_manifest(folder)
    dtype = np.dtype(manifest["dtype"])
    num_tokens, num_documents = manifest["num_tokens"], manifest["num_documents"]
    fitting = {"tokens.bin": num_tokens * dtype.itemsize, "documents.bin": (num_documents + 1) * 8}
    seen = {}
    for name, size in fitting.items():
        path, stated = folder / name, manifest["files"][name]["bytes"]
        if path.is_file():  # or a link to one
            seen[name] = disk.stamp(path)
        found = seen[name][0] if name in seen else 0
        if found != stated or stated != size:
            raise UserError(f"{path} has {found} bytes, its manifest says {stated}; {_cure(folder)}")
    return TokenStore(
        folder=folder,
        manifest=manifest,
        tokens=np.memmap(folder / "tokens.bin", dtype=dtype, mode="r") if num_tokens else np.zeros(0, dtype),
        documents=np.memmap(folder / "documents.bin", dtype=np.uint64, mode="r"),
        seen=seen,
    )


def _read_manifest(folder: Path) -> dict:
    """Reads a manifest and trusts nothing in it: all that the program uses of it has the right type afterwards."""
    path = folder / "manifest.json"
    try:
        if not path.is_file() or path.stat().st_size > MANIFEST_BYTES:
            raise ValueError(f"not a file of at most {MANIFEST_BYTES} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if _count(manifest["format_version"]) > FORMAT_VERSION:
            raise UserError(
                f"{folder}: token store of format {manifest['format_version']}, but this program reads up to "
                f"{FORMAT_VERSION}; update it, or make the store again elsewhere with scripts/prepare_data.py"
            )
        if manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {manifest['dtype']!r}")
        if set(manifest["files"]) != {"tokens.bin", "documents.bin"}:
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error!r:.200}); {_cure(folder)}") from None
    return manifest


def _cure(folder: Path) -> str:
    return f"remove {folder}, and make the store again or copy it again"


def _count(value: int) -> int:
    """Returns `value` if it is a count: an integer from 0, no bool, in 63 bits."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.50} where a count is expected")
    return value


def verify_store(store: TokenStore, progress: Progress = lambda text: None) -> None:
    """Reads all of a token store and compares it with its manifest; about 1.7 GB/s, and no memory to speak of.

    `progress` is told now and then how far it is.

    Raises:
        UserError: naming the file whose content is not what the manifest says, or the document that ends before it
            begins, and what to do.
    """
    cure = _cure(store.folder)
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
                f"{store.folder / name} is damaged: its sha256 is {found[:12]}…, its manifest says "
                f"{facts['sha256'][:12]}…; {cure}"
            )
    _check_offsets(store.folder / "documents.bin", store.manifest["num_tokens"], cure)


def _check_offsets(path: Path, num_tokens: int, cure: str) -> None:
    """Checks that documents begin at 0, never end before they begin, and end with the tokens."""
    last, number = 0, 0
    with open(path, "rb") as file:
        while len(offsets := np.fromfile(file, np.uint64, OFFSETS_READ)):
            if not number and offsets[0]:
                raise UserError(f"{path}: the first document begins at token {offsets[0]}, expected 0; {cure}")
            before = np.concatenate([np.asarray([last], np.uint64), offsets[:-1]])
            if (wrong := np.flatnonzero(offsets < before)).size:
                at = wrong[0]
                raise UserError(
                    f"{path}: entry {number + at} is {offsets[at]}, but the one before {before[at]}; {cure}"
                )
            last, number = int(offsets[-1]), number + len(offsets)
    if last != num_tokens:
        raise UserError(f"{path}: the last document ends at token {last}, expected {num_tokens}; {cure}")
