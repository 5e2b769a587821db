"""Opens files as streams of bytes or text, plain or compressed; a damaged or cut file is an error that names it."""

import codecs
import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from forge_lib import disk
from forge_lib.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

READ_BYTES = 1 << 18  # at a time
MAX_WINDOW_LOG = 31  # of zstd: reads what `zstd --long=31` wrote

Advance = Callable[[int], None]  # called with a number of bytes of the file on the disk that were read


class _CountedFile(io.FileIO):
    """A file that reports how many bytes are read."""

    def __init__(self, path: Path, advance: Advance):
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer) -> int | None:
        count = super().readinto(buffer)
        self._advance(count or 0)
        return count


@contextlib.contextmanager
def open_bytes(path: Path, advance: Advance) -> Iterator[BinaryIO]:
    """Opens a file for reading; decompresses it if its suffix is .gz or .zst.

    Raises:
        UserError: it cannot be read, is not of that compression, is damaged, or its end is missing.
    """
    with contextlib.ExitStack() as files:
        try:
            if disk.is_lfs_pointer(path):
                raise UserError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
            file = files.enter_context(io.BufferedReader(_CountedFile(path, advance), READ_BYTES))
            if path.suffix.lower() == ".gz":
                file = files.enter_context(gzip.GzipFile(fileobj=file))
            elif path.suffix.lower() == ".zst":
                options = {zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG}
                file = files.enter_context(zstd.ZstdFile(file, options=options))
            yield file
        except EOFError:
            raise UserError(f"{path}: the end of the compressed file is missing; copy or download it again") from None
        except (OSError, zlib.error, zstd.ZstdError) as error:
            raise UserError(f"{path}: not readable: {error}") from None


@contextlib.contextmanager
def open_text(path: Path, errors: str, advance: Advance, newline: str | None = None) -> Iterator[TextIO]:
    """Opens a file as `open_bytes` does, and decodes it as UTF-8 with or without a byte-order mark.

    Args:
        path: the file.
        errors: "strict", or "replace" to read bytes that are not UTF-8 as U+FFFD.
        advance: called with the bytes that were read.
        newline: as for `open`.

    Raises:
        UserError: as `open_bytes`, or errors is "strict" and a byte is not UTF-8: its offset is named.
    """
    try:
        with open_bytes(path, advance) as file:
            yield io.TextIOWrapper(file, encoding="utf-8-sig", errors=errors, newline=newline)
    except UnicodeDecodeError:
        raise _bad_byte(path) from None


def not_text(path: Path, offset: int) -> UserError:
    """Returns the error for a zero byte, at an offset in the decompressed file."""
    return UserError(
        f"{path}: not a text file: a zero byte at offset {offset}; expected UTF-8 (--encoding-errors replace reads "
        "the file nevertheless)"
    )


def zero_byte_offset(path: Path) -> int:
    """Returns the offset of the first zero byte in a decompressed file."""
    with open_bytes(path, lambda num_bytes: None) as file:
        offset = 0
        while block := file.read(READ_BYTES):
            if (at := block.find(0)) >= 0:
                return offset + at
            offset += len(block)
    return offset


def _bad_byte(path: Path) -> UserError:
    """Reads a file again to find its first byte that is not UTF-8; returns the error that names it."""
    decoder, offset, first = codecs.getincrementaldecoder("utf-8")(), 0, b""
    with open_bytes(path, lambda num_bytes: None) as file:
        try:
            while block := file.read(READ_BYTES):
                first = first or block[:2]
                offset += len(block)
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            position, byte = offset - len(error.object) + error.start, error.object[error.start]
            if first in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                return UserError(f"{path}: byte 0x{byte:02x} at offset {position} is not UTF-8 but UTF-16; convert it")
            return UserError(
                f"{path}: byte 0x{byte:02x} at offset {position} is not UTF-8; convert the file, or give "
                "--encoding-errors replace"
            )
    return UserError(f"{path} was changed while it was read; start again when it is complete")
