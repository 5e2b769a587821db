"""Reads files, or a dataset on the Hub, as pieces of text; a document is one piece or several."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from forge_lib.config import DataConfig
from forge_lib.data.files import Source, count_kinds
from forge_lib.data.records import no_column, read_texts, texts_of
from forge_lib.data.streams import READ_BYTES, Advance, not_text, open_text, zero_byte_offset
from forge_lib.data.token_store import Progress
from forge_lib.errors import UserError
from forge_lib.progress import ProgressBar

Piece = tuple[str, bool]  # a text, and whether a document ends with it


class Reader:
    """Reads a source document by document; iterate over it once.

    A document is one piece or, if it is long, several: it is cut at spaces if it has any. So memory stays constant.

    Args:
        source: the files, or a dataset on the Hub.
        config: how to read them.
        progress: called as files are read, with a line of text.

    Attributes:
        read: the files with text.
        empty: the files without text.
        num_empty_documents: records whose text is null or only white space; they are left out.

    Raises:
        UserError: while it is iterated over: something is not text, cannot be read, or lacks the column.
    """

    def __init__(self, source: Source, config: DataConfig, progress: Progress):
        self.read: list[Path] = []
        self.empty = [*source.empty]
        self.num_empty_documents = 0
        self._source, self._config, self._progress = source, config, progress

    def __iter__(self) -> Iterator[Piece]:
        if not self._source.files:
            with ProgressBar("tokenizing", 0, "piece") as bar:
                for piece in self._split_records(_read_hub(self._config)):
                    bar.add()
                    yield piece
            return
        num_bytes, done = self._source.num_bytes, 0
        with ProgressBar("tokenizing", num_bytes, "B") as bar:

            def advance(count: int) -> None:
                nonlocal done
                done += count
                bar.add(count)
                self._progress(f"tokenizing {self._config.dataset_path}: {min(1, done / num_bytes):.0%}")

            for path, kind in self._source.files:
                is_empty = True
                for piece in self._read_file(path, kind, advance):
                    is_empty = False
                    yield piece
                if is_empty:
                    self.empty.append(path)
                else:
                    self.read.append(path)

    def describe(self) -> dict:
        """Returns what the manifest of a token store contains about the files."""
        skipped = {reason: [len(names), names[0]] for reason, names in sorted(self._source.skipped.items())}
        return {
            "num_files": len(self.read),
            "num_empty_files": len(self.empty),
            "read": count_kinds(self.read),
            "empty": count_kinds(self.empty),
            "skipped": skipped,
        }

    def _read_file(self, path: Path, kind: str, advance: Advance) -> Iterator[Piece]:
        if kind == "text":
            blocks = _read_text(path, self._config.encoding_errors, advance)
            yield from split(blocks, self._config.sample_by, self._config.document_separator)
        else:
            yield from self._split_records(read_texts(path, kind, self._config, advance))

    def _split_records(self, texts: Iterable[str]) -> Iterator[Piece]:
        for text in texts:
            if not text or text.isspace():
                self.num_empty_documents += 1
            elif len(text) < READ_BYTES and not self._config.document_separator:
                yield text, True
            else:
                yield from split([text], "document", self._config.document_separator)


def _read_text(path: Path, errors: str, advance: Advance) -> Iterator[str]:
    r"""Yields a text file block by block, with \n at the end of each line."""
    with open_text(path, errors, advance) as file:
        while block := file.read(READ_BYTES):
            if errors == "strict" and "\0" in block:
                raise not_text(path, zero_byte_offset(path))
            yield block


def split(blocks: Iterable[str], sample_by: str, separator: str = "") -> Iterator[Piece]:
    """Splits a text into documents.

    A document is yielded in pieces of about READ_BYTES characters. No piece but the last one ends with white space, so
    the blank lines between two paragraphs are never cut, however long they are.

    Args:
        blocks: the text.
        sample_by: "document" (all of it), "paragraph" (between blank lines) or "line".
        separator: ends a document too, and is no part of one; "": none.
    """
    limits = {"paragraph": [r"\n\s*\n"], "line": [r"\n"], "document": []}[sample_by]
    limit = re.compile("|".join([re.escape(separator), *limits] if separator else limits) or r"(?!)")
    strips = sample_by != "document" or separator != ""  # blank lines before a document, line feeds behind it
    blank_lines = re.compile(r"(\s*\n)?" if sample_by == "paragraph" else r"\n*")

    def piece(text: str, is_last: bool) -> Piece:
        text = text[blank_lines.match(text).end() :] if strips and not has_begun else text
        return text.rstrip("\n") if strips and is_last else text, is_last

    rest, has_begun = "", False  # text not yet in a piece; whether its document has earlier pieces
    for block in blocks:
        rest += block
        *documents, rest = limit.split(rest)
        for text in documents:
            if has_begun or text.strip():
                yield piece(text, True)
                has_begun = False
        while len(text := rest.lstrip()) >= READ_BYTES:
            cut = len(rest) - len(text) + _find_cut(text, READ_BYTES - len(separator))  # a separator may have begun
            yield piece(rest[:cut], False)
            rest, has_begun = rest[cut:], True
    if has_begun or rest.strip():
        yield piece(rest, True)


def _find_cut(text: str, stop: int) -> int:
    """Returns where to cut a text that begins with a word: before white space, or else behind a word, or at stop."""
    half = max(1, stop // 2)
    cut = max(text.rfind(" ", half, stop), 0) or max(text.rfind("\n", half, stop), 0)
    if not cut:
        ends = (
            at for at in range(min(stop, len(text) - 1), half, -1) if text[at - 1].isalnum() and not text[at].isalnum()
        )
        cut = next(ends, stop)
    return len(text[:cut].rstrip())


def _read_hub(config: DataConfig) -> Iterator[str]:
    """Yields the text of each record of a dataset on the Hub, with `datasets`."""
    import datasets
    import pyarrow

    name = config.dataset_path
    try:
        rows = datasets.load_dataset(name, config.dataset_config or None, split=config.dataset_split, streaming=True)
        columns = rows.column_names or [config.text_column]  # None if it is known only after reading
        if config.text_column not in columns:
            raise no_column(name, config.text_column, columns)
        records = ((f"{name}: record {number}", row) for number, row in enumerate(rows, 1))
        yield from texts_of(records, config, name)
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError, OSError) as error:
        raise UserError(f"--dataset-path {name}: not readable: {error.__cause__ or error}") from None
