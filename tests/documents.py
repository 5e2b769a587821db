"""Reads the documents of files, and writes files with documents."""

import csv
import gzip
import io
import json

import pytest
from backports import zstd

from forge_lib.config import DataConfig
from forge_lib.data.files import find_source
from forge_lib.data.reading import Reader
from forge_lib.errors import UserError

COMPRESS = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstd.compress}


def read_all(path, **options) -> tuple[list[str], Reader]:
    """Returns the documents of a file or folder, and the reader with its counts."""
    config = DataConfig(dataset_path=str(path), **options)
    reader = Reader(find_source(config), config, lambda text: None)
    documents, begun = [], ""
    for text, is_end in reader:
        begun += text
        if is_end:
            documents.append(begun)
            begun = ""
    assert not begun
    return documents, reader


def read(path, **options) -> list[str]:
    return read_all(path, **options)[0]


def as_jsonl(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[list[str]]) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()


def error_of(path, **options) -> str:
    with pytest.raises(UserError) as error:
        read(path, **options)
    assert str(path.name) in str(error.value)
    return str(error.value)
