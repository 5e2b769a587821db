"""Reads the text column of files with records (json, jsonl, csv, parquet, arrow), whatever other columns hold."""

import contextlib
import csv
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from forge_lib.config import DataConfig
from forge_lib.data.files import COMPRESSIONS
from forge_lib.data.streams import READ_BYTES, Advance, open_bytes, open_text
from forge_lib.errors import UserError

MAX_FIELD_CHARACTERS = 1 << 28  # of csv: a missing quote would otherwise read the rest of the file as one field
LONGEST_LITERAL = 10  # one character more than -Infinity has
BATCH_BYTES = 1 << 20  # of parquet and arrow, read at a time
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of arrow

Record = tuple[str, Any]  # where it is, for a message; and what it is
# Numbers become floats: an integer of thousands of digits in another column is no error. Control characters in a
# string are none either.
DECODER = json.JSONDecoder(parse_int=float, strict=False)


def read_texts(path: Path, kind: str, config: DataConfig, advance: Advance) -> Iterator[str]:
    """Yields the text of each record, "" if it is null or missing.

    Args:
        path: the file.
        kind: "json", "jsonl", "csv", "parquet" or "arrow".
        config: the column, and what to do with bytes that are not UTF-8.
        advance: called with the bytes that were read.

    Raises:
        UserError: the file is not of this kind or is damaged, or its column is missing or holds something else.
    """
    if kind in ("parquet", "arrow"):
        yield from (_read_parquet if kind == "parquet" else _read_arrow)(path, config, advance)
        return
    newline = {"json": None, "jsonl": "\n", "csv": ""}[kind]
    with open_text(path, config.encoding_errors, advance, newline) as file:
        if kind == "csv":
            records = _read_csv(path, file, config.text_column)
        else:
            records = (_read_lines if kind == "jsonl" else _read_json)(path, file)
        yield from texts_of(records, config, str(path))


def texts_of(records: Iterable[Record], config: DataConfig, source: str) -> Iterator[str]:
    """Yields the text of each record, "" if it is null or missing; the column must be in one of them.

    Raises:
        UserError: no record has the column, one is no object, or the column of one is no text.
    """
    column, columns, is_missing, is_found = config.text_column, [], False, False
    for place, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{place} is {_describe(record)}, expected an object with the key {column!r}")
        if column in record:
            is_found = True
            yield _check_text(record[column], place, config)
            continue
        is_missing, columns = True, columns or list(record)
        yield ""
    if is_missing and not is_found:
        raise no_column(source, column, columns)


def no_column(source: str, column: str, columns: list[str]) -> UserError:
    """Returns the error for data without the column."""
    names = ", ".join(map(repr, columns[:20])) or "none"
    return UserError(f"{source}: no column {column!r}; it has {names}: name one of them with --text-column")


def _check_text(value: Any, place: str, config: DataConfig) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{place}: column {config.text_column!r} has {_describe(value)}, expected text; name another column with "
            "--text-column"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if config.encoding_errors == "strict":
            raise UserError(
                f"{place}: column {config.text_column!r} has half of a surrogate pair at character {error.start}; "
                "correct it, or give --encoding-errors replace"
            ) from None
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _describe(value: Any) -> str:
    """Returns what a value of JSON is, for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the value {json.dumps(value)} without quotes"
    if isinstance(value, int | float):
        return f"the number {value:.12g} without quotes"
    names = {str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _read_lines(path: Path, file: TextIO) -> Iterator[Record]:
    """Yields the records of a jsonl file: one per line, except blank lines."""
    for number, line in enumerate(file, 1):
        line = line.strip(" \t\r\n\ufeff")  # files with a byte-order mark may have been joined
        if not line:
            continue
        place = f"{path}: line {number}"
        try:
            record, end = DECODER.raw_decode(line)
            if end < len(line):
                raise json.JSONDecodeError("Extra data", line, end)
        except json.JSONDecodeError as error:
            raise UserError(f"{place} is not JSON: {error.msg} at character {error.pos + 1}") from None
        except RecursionError:
            raise UserError(f"{place} is not readable: it is nested too deeply") from None
        yield place, record


def _read_json(path: Path, file: TextIO) -> Iterator[Record]:
    """Yields the elements of a json file's array, or its values if it is a sequence of them, in constant memory."""
    parser = _JsonParser(path, file)
    is_array = parser.skip("[")
    if is_array and parser.skip("]"):
        is_array = False
    elif is_array or not parser.at_end():
        while True:
            yield f"{path}: record {parser.num_values + 1}", parser.value()
            if is_array and parser.skip("]"):
                break
            if is_array and not parser.skip(","):
                parser.fail("Expecting ',' or ']'" if not parser.at_end() else "the array does not end")
            if not is_array and parser.at_end():
                break
    if not parser.at_end():
        parser.fail("Extra data")


class _JsonParser:
    """Parses one value after another from a text file, and keeps only the current one in memory."""

    def __init__(self, path: Path, file: TextIO):
        self.num_values = 0
        self._path, self._file = path, file
        self._text, self._at = "", 0  # what is in memory, and where the next value begins

    def value(self) -> Any:
        """Returns the next value; reads on while it is incomplete."""
        self.at_end()
        while True:
            try:
                value, self._at = DECODER.raw_decode(self._text, self._at)
                self.num_values += 1
                return value
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - LONGEST_LITERAL
                if not is_cut or not self._read_more():
                    self.fail(error.msg)
            except RecursionError:
                self.fail("nested too deeply")

    def skip(self, character: str) -> bool:
        """Skips white space and, if it comes next, one character; returns whether it did."""
        if self.at_end() or self._text[self._at] != character:
            return False
        self._at += 1
        return True

    def at_end(self) -> bool:
        """Skips white space; returns whether the file ends there."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n\ufeff":
                self._at += 1
            if self._at < len(self._text):
                return False
            if not self._read_more():
                return True

    def fail(self, reason: str) -> None:
        """Raises the error of a file that is not JSON."""
        raise UserError(f"{self._path}: record {self.num_values + 1} is not JSON: {reason}") from None

    def _read_more(self) -> bool:
        """Reads as much as is in memory, at least one block: so a long value is not parsed too often."""
        self._text, self._at = self._text[self._at :], 0
        more = self._file.read(max(READ_BYTES, len(self._text)))
        self._text += more
        return bool(more)


def _read_csv(path: Path, file: TextIO, column: str) -> Iterator[Record]:
    """Yields the rows of a csv file (RFC 4180) as {column: text}; no value is interpreted, not even NA or 007."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    rows = csv.reader(file, strict=True)
    header: list[str] = []
    begin = 1  # the line in which the next row begins
    try:
        for row in rows:
            if row and not header:
                header = row
                _check_column(path, column, header)
            elif row:  # no blank line
                if len(row) != len(header):
                    more = len(row) > len(header)
                    fix = "put texts that contain commas into double quotes" if more else "complete it"
                    raise UserError(
                        f"{path}: line {begin} has {len(row)} fields, but the header has {len(header)}; {fix}"
                    )
                yield f"{path}: line {begin}", {column: row[header.index(column)]}
            begin = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: the row that begins in line {begin} is not csv: {error}") from None


def _check_column(path: Path, column: str, columns: list[str]) -> None:
    """Raises UserError if not exactly one column has that name."""
    if columns.count(column) > 1:
        raise UserError(f"{path}: {columns.count(column)} columns are named {column!r}; rename all but one")
    if column not in columns:
        raise no_column(str(path), column, columns)


def _check_schema(path: Path, column: str, schema: Any) -> None:
    """Raises UserError if not exactly one column of parquet or arrow has that name, or it does not hold text."""
    from pyarrow import types

    _check_column(path, column, schema.names)
    found = schema.field(column).type
    value_type = found.value_type if types.is_dictionary(found) else found
    is_text = types.is_string(value_type) or types.is_large_string(value_type) or types.is_string_view(value_type)
    if not (is_text or types.is_null(value_type)):
        raise UserError(
            f"{path}: column {column!r} holds {found}, expected text; name another column with --text-column"
        )


def _read_parquet(path: Path, config: DataConfig, advance: Advance) -> Iterator[str]:
    """Yields the text column of a parquet file; no other column is read."""
    import pyarrow
    import pyarrow.parquet

    column, size = config.text_column, path.stat().st_size
    try:
        with contextlib.ExitStack() as files:
            plain = path
            if path.suffix.lower()[1:] in COMPRESSIONS:
                plain = files.enter_context(_decompress(path))  # parquet needs random access
            table = files.enter_context(pyarrow.parquet.ParquetFile(plain))
            if not table.metadata.num_rows:
                return
            _check_schema(path, column, table.schema_arrow)
            uncompressed = sum(
                table.metadata.row_group(number).total_byte_size for number in range(table.num_row_groups)
            )
            rows = max(1, min(10_000, BATCH_BYTES * table.metadata.num_rows // max(1, uncompressed)))
            num_read = 0
            for batch in table.iter_batches(batch_size=rows, columns=[column]):
                yield from _decode_all(batch.column(0), path, num_read, config.encoding_errors)
                num_read += batch.num_rows
                advance(batch.num_rows * size // table.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as parquet: {error}") from None


def _read_arrow(path: Path, config: DataConfig, advance: Advance) -> Iterator[str]:
    """Yields the text column of an arrow file, in the format of streams, as `datasets` writes it, or of files."""
    import pyarrow

    try:
        with contextlib.ExitStack() as files:
            plain = path
            if path.suffix.lower()[1:] in COMPRESSIONS:
                plain = files.enter_context(_decompress(path))
            source = files.enter_context(pyarrow.OSFile(str(plain)))  # no memory map: the file may be truncated
            schema, batches = _open_arrow(source)
            num_read = num_bytes = 0
            for batch in batches:
                if batch.num_rows:
                    _check_schema(path, config.text_column, schema)
                    values = batch.column(schema.names.index(config.text_column))
                    rows = max(1, BATCH_BYTES * batch.num_rows // max(1, values.nbytes))
                    for start in range(0, batch.num_rows, rows):
                        part = values.slice(start, rows)
                        yield from _decode_all(part, path, num_read + start, config.encoding_errors)
                num_read += batch.num_rows
                done = source.tell() * path.stat().st_size // source.size()  # the file itself may be compressed
                advance(done - num_bytes)
                num_bytes = done
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as arrow: {error}") from None


def _open_arrow(source: Any) -> tuple[Any, Iterator[Any]]:
    """Returns the schema and the record batches of an open file."""
    import pyarrow

    if source.read(6) != b"ARROW1":
        source.seek(max(0, source.size() - len(END_OF_STREAM)))
        if source.read() != END_OF_STREAM:  # the library takes a stream that is cut between batches for a whole one
            raise pyarrow.ArrowInvalid("its end is missing")
        source.seek(0)
        stream = pyarrow.ipc.open_stream(source)
        return stream.schema, iter(stream)
    source.seek(0)
    file = pyarrow.ipc.open_file(source)
    return file.schema, (file.get_batch(number) for number in range(file.num_record_batches))


def _decode_all(values: Any, path: Path, num_before: int, errors: str) -> Iterator[str]:
    """Yields the texts of an array of strings, "" if it is null; `num_before` rows of the file are before it."""
    import pyarrow

    for number, text in enumerate(values.cast(pyarrow.large_binary()).to_pylist(), num_before + 1):
        yield _decode(text, f"{path}: row {number}", errors)


def _decode(text: bytes | None, place: str, errors: str) -> str:
    try:
        return (text or b"").decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte 0x{error.object[error.start]:02x} at offset {error.start} is not UTF-8; convert the file, "
            "or give --encoding-errors replace"
        ) from None


@contextlib.contextmanager
def _decompress(path: Path) -> Iterator[Path]:
    """Returns a decompressed temporary copy of a file."""
    with tempfile.NamedTemporaryFile(suffix=".parquet") as plain:
        with open_bytes(path, lambda num_bytes: None) as file:
            shutil.copyfileobj(file, plain)
        plain.flush()
        yield Path(plain.name)
