"""Crash-safe folders: written under a temporary name, flushed, renamed; so a folder is complete, or it does not exist.

A folder is written as `.partial-NAME` beside NAME, and renamed once all of it is on the disk. An existing NAME is
renamed to `.replaced-NAME` meanwhile; if the power fails just then, `restore` renames it back.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

BLOCK_BYTES = 1 << 20
LFS_POINTER = b"version https://git-lfs"
LIST_NAME = ".files.json"  # marks a partial folder that another machine sends: the list of its files


def partial_path(folder: Path) -> Path:
    """Returns the temporary path under which a folder is written before it is renamed."""
    return folder.with_name(f".partial-{folder.name}")


def replaced_path(folder: Path) -> Path:
    """Returns the path to which an existing folder is renamed while the new one takes its name."""
    return folder.with_name(f".replaced-{folder.name}")


def place(folder: Path) -> None:
    """Renames a folder's partial one to its final name; all files in it must be flushed before.

    Raises:
        OSError: the disk failed; the folder is still the old one.
    """
    partial, replaced = partial_path(folder), replaced_path(folder)
    flush(partial)
    if os.path.lexists(folder):
        remove(replaced)
        folder.rename(replaced)
    try:
        partial.rename(folder)
    except OSError:
        restore(folder)
        raise
    flush(folder.parent)
    with suppress(OSError):  # the new folder is in place: this is no failure
        remove(replaced)


def restore(folder: Path) -> None:
    """Repairs an interrupted `place`: renames the old folder back, or removes it if the new one is in place."""
    replaced = replaced_path(folder)
    if os.path.lexists(replaced) and not os.path.lexists(folder):
        replaced.rename(folder)
        flush(folder.parent)
    remove(replaced)


def flush(path: Path) -> None:
    """Flushes a file or folder: waits until its current content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """Flushes all files and folders in a folder."""
    for path in sorted(folder.rglob("*")):
        flush(path)


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with its content; does nothing if it does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_lfs_pointer(path: Path) -> bool:
    """Returns whether a file is a pointer of Git LFS, which git writes in place of a large file."""
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def stamp(path: Path | int) -> tuple[int, int, int]:
    """Returns (size in bytes, time of the last write, inode) of a file, or of an open one by its descriptor.

    It stays equal as long as nobody changes or replaces the file.
    """
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def sha256(path: Path, advance: Callable[[int], None] = lambda num_bytes: None) -> str:
    """Returns a file's sha256 in hexadecimal digits; calls `advance` with the number of bytes after each block.

    The file is read, not memory-mapped: if it shrinks meanwhile, the process survives.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            advance(count)
    return digest.hexdigest()
