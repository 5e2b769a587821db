"""Files that a power cut does not take: a folder is whole under its name, or does not have it.

A folder is written as `.partial-NAME` beside NAME and renamed once all of it is on the disk. What had the name before
is `.replaced-NAME` for that moment; where the power goes just then, `restore` puts it back.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

BLOCK_BYTES = 1 << 20


def partial_path(folder: Path) -> Path:
    """Returns where a folder is written before it gets its name."""
    return folder.with_name(f".partial-{folder.name}")


def replaced_path(folder: Path) -> Path:
    """Returns where what has a folder's name makes way for another of that name."""
    return folder.with_name(f".replaced-{folder.name}")


def place(folder: Path) -> None:
    """Gives a folder's partial one its name; each file in it has been flushed before.

    Raises:
        OSError: the disk refuses; the folder is the one that it was.
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
    with suppress(OSError):  # no reason to take the new one for missing
        remove(replaced)


def restore(folder: Path) -> None:
    """Ends a `place` that was cut short: puts back what made way, or removes it where the new one has the name."""
    replaced = replaced_path(folder)
    if os.path.lexists(replaced) and not os.path.lexists(folder):
        replaced.rename(folder)
        flush(folder.parent)
    remove(replaced)


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk, as it is now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """Waits until all that lies in a folder is on the disk."""
    for path in sorted(folder.rglob("*")):
        flush(path)


def remove(path: Path) -> None:
    """Removes a file, a folder with all in it, or a link, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def stamp(path: Path | int) -> tuple[int, int, int]:
    """Returns (size in bytes, time of the last write, inode) of a file, or of an open one by its descriptor.

    Equal as long as nobody has touched the file.
    """
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def sha256(path: Path, advance: Callable[[int], None] = lambda num_bytes: None) -> str:
    """Returns a file's sha256 in hexadecimal digits; `advance` is told the bytes of each block.

    The file is read, not mapped: one that shrinks meanwhile does not kill the process.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            advance(count)
    return digest.hexdigest()
