"""The files of a transfer: which ones may be transferred, and how each side reads or writes them."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from forge_lib import disk
from forge_lib.disk import LIST_NAME
from forge_lib.errors import UserError

PIECE_BYTES = 1 << 20
FLUSH_BYTES = 1 << 26  # a power cut loses at most this, and the last fsync is short
MAX_FILES, MAX_BYTES = 10_000, 1 << 50
# Nothing that Python would run or unpickle is transferred. Of .bin files, only the two of a token store are.
SUFFIXES = {".json", ".jsonl", ".txt", ".md", ".jinja", ".safetensors", ".gguf", ".model", ".spm", ".bpe", ".tiktoken"}
STORE_FILES = {"tokens.bin", "documents.bin"}


class FileFacts(TypedDict):
    """A file's size and sha256 (64 hexadecimal digits), as in a checkpoint's manifest."""

    bytes: int
    sha256: str


Files = dict[str, FileFacts]  # by name


def list_files(folder: Path, known: Files | None = None) -> Files:
    """Returns the files of a folder that may be transferred: of a known kind; no links, subfolders or dot files.

    Args:
        folder: a checkpoint, a token store or a model.
        known: files whose sha256 is known, for example from a manifest. If the size agrees, they are not read.

    Returns:
        The facts of each file by name, sorted by name.
    """
    files: Files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.is_symlink() and _is_allowed(path.name):
            size, facts = path.stat().st_size, (known or {}).get(path.name)
            sha256 = facts["sha256"] if facts and facts["bytes"] == size else disk.sha256(path)
            files[path.name] = {"bytes": size, "sha256": sha256}
    return files


def check_files(files: Any) -> None:
    """Checks a list of files from another machine, which may contain anything.

    Raises:
        UserError: it is not of the type Files; or a name, a size or a hash is not valid.
    """
    if not isinstance(files, dict) or len(files) > MAX_FILES:
        raise UserError(f"expected the facts of at most {MAX_FILES} files by name")
    total = 0
    for name, facts in files.items():
        if not isinstance(name, str) or not _is_allowed(name):
            raise UserError(f"{name!r:.99} is not a file name that may be transferred")
        size, sha256 = (facts.get("bytes"), facts.get("sha256")) if isinstance(facts, dict) else (None, None)
        if type(size) is not int or not 0 <= size <= MAX_BYTES:
            raise UserError(f"{name}: {size!r:.99} is not a number of bytes")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise UserError(f"{name}: {sha256!r:.99} is not a sha256")
        if not size and sha256 != hashlib.sha256().hexdigest():
            raise UserError(f"{name}: an empty file with the sha256 of another one")
        total += size
    if total > MAX_BYTES:
        raise UserError(f"{total} bytes in all, expected at most {MAX_BYTES}")


def _is_allowed(name: str) -> bool:
    """Returns whether a file of this name may be sent, and may be written into a folder here."""
    plain = name.isprintable() and not name.startswith(".") and not {"/", "\\"} & set(name)
    return plain and len(name.encode()) <= 200 and (name in STORE_FILES or Path(name).suffix.lower() in SUFFIXES)


def total_bytes(files: Files) -> int:
    """Returns the size of all files together."""
    return sum(facts["bytes"] for facts in files.values())


class FileReader:
    """Reads pieces of a folder's files, and notices if one changes meanwhile.

    Attributes:
        error: which file changed or cannot be read; empty as long as all is well.
    """

    def __init__(self, folder: Path, files: Files):
        self.folder, self.files, self.error = folder, files, ""
        self._stamps: dict[str, tuple[int, int, int]] = {}  # of each file when it was first read

    def read(self, name: str, start: int, into: np.ndarray) -> bool:
        """Fills the uint8 array `into` with the file's bytes from `start` on; returns False once there is an error."""
        path, expected = self.folder / name, self.files[name]["bytes"]
        if self.error:
            return False
        try:
            with open(path, "rb") as file:
                file.seek(start)
                is_whole = file.readinto(into) == len(into)
                stamp = disk.stamp(file.fileno())
        except OSError as error:
            self.error = f"{path} cannot be read: {error.strerror}"
            return False
        if not is_whole or stamp[0] != expected or self._stamps.setdefault(name, stamp) != stamp:
            self.error = f"{path} changed while it was sent: found {stamp[0]} bytes, expected {expected}"
        return not self.error


class PartialFile:
    """A file that is received from its start to its end and hashed on the way; a part may be there already.

    Args:
        path: of the file.
        facts: its size and sha256 when complete.
        on_hashed: called with the number of bytes after each block of the existing part that was hashed.

    Attributes:
        num_held: bytes of it that are here. A complete file with a wrong sha256 counts as 0.
    """

    def __init__(self, path: Path, facts: FileFacts, on_hashed: Callable[[int], None]):
        self._path, self._size, self._sha256 = path, facts["bytes"], facts["sha256"]
        self.num_held, self._digest = 0, hashlib.sha256()
        with open(path, "ab") as file:
            if file.tell() != self._size:
                found = min(file.tell(), self._size)
                file.truncate(found - found % PIECE_BYTES)  # only whole pieces are trusted
        with open(path, "rb") as file:
            while block := file.read(PIECE_BYTES):
                self._add(block)
                on_hashed(len(block))

    def write(self, start: int, data: np.ndarray) -> None:
        """Writes the uint8 array `data` at byte `start`, which is where the held part ends."""
        with open(self._path, "r+b") as file:
            file.seek(start)
            file.write(data)
            if not (start + len(data)) % FLUSH_BYTES:
                file.flush()
                os.fsync(file.fileno())
        self._add(data)

    def _add(self, data: bytes | np.ndarray) -> None:
        self._digest.update(data)
        self.num_held += len(data)
        if self.num_held == self._size and self._digest.hexdigest() != self._sha256:
            self.num_held, self._digest = 0, hashlib.sha256()
            os.truncate(self._path, 0)


def open_partial_folder(folder: Path, files: Files, what: str) -> Path:
    """Returns the partial folder of `folder`, with only what an earlier transfer of the very same files left there.

    Args:
        folder: the target of the transfer.
        files: its files when complete.
        what: names the transfer in messages.

    Raises:
        UserError: the disk has too little free space.
        OSError: the disk failed.
    """
    partial = disk.partial_path(folder)
    try:
        is_same = not partial.is_symlink() and json.loads((partial / LIST_NAME).read_text(encoding="utf-8")) == files
    except (OSError, ValueError):
        is_same = False
    if not is_same:
        disk.remove(partial)
        partial.mkdir(parents=True)
        (partial / LIST_NAME).write_text(json.dumps(files), encoding="utf-8")
    needed = total_bytes(files)
    for path in partial.iterdir():
        if path.is_symlink() or not path.is_file() or path.name not in {LIST_NAME, *files}:
            disk.remove(path)
        elif path.name in files:
            needed -= min(path.stat().st_size, files[path.name]["bytes"])
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(
            f"{what} needs {needed} bytes, but {folder.parent} has {free} bytes free; free some space there"
        )
    return partial


def place_partial_folder(folder: Path) -> None:
    """Flushes the complete partial folder of `folder`, and renames it; an existing `folder` is replaced.

    Raises:
        OSError: the disk failed.
    """
    partial = disk.partial_path(folder)
    (partial / LIST_NAME).unlink()
    disk.flush_all(partial)
    disk.place(folder)
