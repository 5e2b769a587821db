"""Reads files, or a dataset on the Hub, as pieces of text; a document is one piece or several."""

import codecs
import contextlib
import io
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from forge_lib.config import DataConfig
from forge_lib.data.files import COMPRESSIONS, Source
from forge_lib.data.token_store import Progress
from forge_lib.errors import UserError

READ_BYTES = 1 << 18  # at a time; about the size of a piece

Piece = tuple[str, bool]  # a text, and whether a document ends with it


def read_pieces(source: Source, config: DataConfig, progress: Progress) -> Iterator[Piece]:
    """Yields the text of all documents in pieces, in constant memory; a long document is cut at spaces if it has any.

    Args:
        source: the files, or a dataset on the Hub.
        config: how to read them.
        progress: called for each piece of a file, with a line of text.

    Raises:
        UserError: something is not text, cannot be read, or lacks the column.
    """
    if not source.files:
        yield from _read_column(None, "hub", config)
        return
    done = 0
    with tqdm(total=source.num_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            bar.update(num_bytes)
            progress(f"tokenizing {config.dataset_path}: {done / source.num_bytes:.0%}")

        for path, kind in source.files:
            if kind == "text":
                yield from _split(_read_text(path, config.encoding_errors, advance), config.sample_by)
            else:
                yield from _read_column(path, kind, config)
                advance(path.stat().st_size)


def _read_text(path: Path, errors: str, advance: Callable[[int], None]) -> Iterator[str]:
    r"""Yields a text file block by block, decoded as UTF-8 with or without BOM, with \n at the end of each line.

    `datasets` would read a whole document as one string; this takes constant memory.
    """
    import fsspec

    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(errors), translate=True)
    is_compressed = path.suffix.lower()[1:] in COMPRESSIONS
    offset = 0  # of the next block, in bytes of the decompressed text
    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            while block := file.read(READ_BYTES):
                if errors == "strict" and b"\0" in block:
                    raise UserError(
                        f"{path}: not a text file: a zero byte at offset {offset + block.index(0)}; "
                        "expected UTF-8 (--encoding-errors replace reads the file nevertheless)"
                    )
                offset += len(block)
                yield decoder.decode(block.removeprefix(codecs.BOM_UTF8) if offset == len(block) else block)
                advance(0 if is_compressed else len(block))
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        position = offset - len(error.object) + error.start
        raise UserError(
            f"{path}: byte 0x{error.object[error.start]:02x} at offset {position} is not UTF-8; convert the file, "
            "or give --encoding-errors replace"
        ) from None
    except _damage_errors() as error:
        raise UserError(f"{path}: not readable: {error}") from None
    advance(path.stat().st_size if is_compressed else 0)


def _split(blocks: Iterable[str], sample_by: str) -> Iterator[Piece]:
    """Splits the text of one file into documents: the file, its paragraphs (between blank lines) or its lines."""
    rest, has_begun = "", False  # text not yet in a piece; whether its document has earlier pieces
    for block in blocks:
        rest += block
        if sample_by != "document":
            *documents, rest = re.split(r"\n\s*\n" if sample_by == "paragraph" else r"\n", rest)
            for text in documents:
                if has_begun or text.strip():
                    yield text.strip("\n"), True
                    has_begun = False
        if len(rest) >= READ_BYTES:
            half = len(rest) // 2
            cut = next((at for at in (rest.rfind(" ", half), rest.rfind("\n", half)) if at > 0), len(rest))
            yield rest[:cut], False
            rest, has_begun = rest[cut:], True
    if has_begun or rest.strip():
        yield rest if sample_by == "document" else rest.strip("\n"), True


def _read_column(path: Path | None, kind: str, config: DataConfig) -> Iterator[Piece]:
    """Yields the text column of a file, or of a dataset on the Hub if there is no path, with `datasets`."""
    import datasets
    import pyarrow

    where = str(path or config.dataset_path)
    try:
        with _open_records(path, kind, config) as records:
            for number, record in enumerate(records):
                if text := _get_text(record, number, where, config.text_column):
                    yield text, True
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError, *_damage_errors()) as error:
        if path and kind != "parquet" and config.encoding_errors == "strict":
            for _ in _read_text(path, "strict", lambda num_bytes: None):  # raises an error that names the byte, if any
                pass
        raise UserError(f"{where}: not readable as {kind}: {error.__cause__ or error}") from None


@contextlib.contextmanager
def _open_records(path: Path | None, kind: str, config: DataConfig) -> Iterator[Iterable[dict[str, Any]]]:
    import datasets

    if path is None:
        name = config.dataset_config or None
        yield datasets.load_dataset(config.dataset_path, name, split=config.dataset_split, streaming=True)
        return
    with contextlib.ExitStack() as files:
        if kind == "parquet" and path.suffix.lower()[1:] in COMPRESSIONS:
            path = files.enter_context(_decompress(path))  # parquet needs random access
        options = {} if kind == "parquet" else {"encoding_errors": config.encoding_errors}
        yield datasets.load_dataset(kind, data_files=[str(path)], split="train", streaming=True, **options)


@contextlib.contextmanager
def _decompress(path: Path) -> Iterator[Path]:
    """Returns a decompressed temporary copy of a parquet file."""
    import fsspec

    with tempfile.NamedTemporaryFile(suffix=".parquet") as plain:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            shutil.copyfileobj(file, plain)
        plain.flush()
        yield Path(plain.name)


def _get_text(record: dict[str, Any], number: int, where: str, column: str) -> str:
    """Returns the text of a record, "" if it has none but white space; raises UserError if it is not text."""
    if column not in record:
        columns = ", ".join(map(repr, record))
        raise UserError(f"{where}: no column {column!r}; it has {columns}: name one of them with --text-column")
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"{where}: column {column!r} has a value of type {type(text).__name__}, expected text (record {number}); "
            "name another column with --text-column"
        )
    return text if text and text.strip() else ""


def _damage_errors() -> tuple[type[Exception], ...]:
    """Returns the errors that reading a damaged or compressed file may raise."""
    import zstandard

    return OSError, EOFError, zlib.error, zstandard.ZstdError
