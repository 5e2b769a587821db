"""Whole files as people have them: empty ones, any text in every format, long documents, separators."""

import gzip
import io
import json
import re

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from documents import COMPRESS, as_csv, as_jsonl, read, read_all
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forge_lib.data import reading
from forge_lib.data.reading import split

# Files without text


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("x.jsonl.zst", zstd.compress(b"")),
        ("x.csv.gz", gzip.compress(b"", mtime=0)),
        ("x.jsonl", b"\xef\xbb\xbf"),
        ("x.json", b"\xef\xbb\xbf"),
        ("x.csv", b"\xef\xbb\xbf"),
        ("x.txt", b"\xef\xbb\xbf"),
        ("x.json", b" [ ] \n"),
        ("x.json", b"\n"),
        ("x.jsonl", b"\n \n"),
        ("x.csv", b"text\n"),
        ("x.csv", b"\n\n"),
        ("x.txt.zst", zstd.compress(b" \n")),
        ("x.jsonl", b'{"text": null}\n{"text": " "}\n'),
        ("x.jsonl", b""),
        ("x.parquet", pd.DataFrame({"text": []}).to_parquet()),
        ("x.parquet", pd.DataFrame().to_parquet()),
        ("x.parquet.gz", gzip.compress(pd.DataFrame({"text": pd.Series([], dtype=str)}).to_parquet())),
    ],
    ids=map(str, range(18)),
)
def test_a_file_without_text_is_counted_as_empty_and_the_others_are_read(tmp_path, name, data):
    (tmp_path / "good.jsonl").write_bytes(as_jsonl([{"text": "one"}]))
    (tmp_path / name).write_bytes(data)
    documents, reader = read_all(tmp_path)
    assert (documents, [path.name for path in reader.empty]) == (["one"], [name])
    assert reader.describe()["read"] == {".jsonl": [1, "good.jsonl"]}


# Any text


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=8)


@settings(max_examples=150, deadline=None)
@given(texts=TEXTS, others=TEXTS, suffix=st.sampled_from(["", ".gz", ".zst"]))
@example(texts=['"', ",", "\r", "\n", "\r\n", "\0", "\ufeff", "=1+1", "\\"], others=[], suffix="")
def test_any_text_is_read_back_equal_from_every_format(tmp_path_factory, texts, others, suffix):
    folder = tmp_path_factory.mktemp("any")
    others = [*others, *[""] * len(texts)][: len(texts)]
    rows = [{"other": other, "text": text} for other, text in zip(others, texts, strict=True)]
    table = pyarrow.table(
        {name: pyarrow.array([row[name] for row in rows], pyarrow.string()) for name in ("other", "text")}
    )
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    data = {
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
        "ndjson": as_jsonl(rows),
        "json": json.dumps(rows, ensure_ascii=False).encode(),
        "csv": as_csv([["other", "text"], *([row["other"], row["text"]] for row in rows)]),
        "parquet": sink.getvalue(),
    }
    expected = [text for text in texts if text.strip()]
    for kind, content in data.items():
        path = folder / f"x.{kind}{suffix}"
        path.write_bytes(COMPRESS[suffix](content))
        assert not content or read(path) == expected, kind


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["a", "bc ", "\n", "\n\n", " ", "<e>", "é", "<"]), max_size=60),
    sample_by=st.sampled_from(["document", "paragraph", "line"]),
    separator=st.sampled_from(["", "<e>"]),
    block=st.integers(1, 7),
    piece=st.integers(8, 40),
)
@example(["\n", "\n\n", "a", "a", "bc "], "document", "<e>", 1, 8)
@example(["a", *["\n\n"] * 20], "document", "<e>", 1, 8)
@example(["\n\n", " ", "\n", "a"], "paragraph", "", 1, 8)
@example(["a", "\n", *[" "] * 20, "\n", "a"], "paragraph", "", 1, 8)
def test_splitting_does_not_depend_on_blocks_and_pieces(parts, sample_by, separator, block, piece):
    """The reference splits the whole text at once."""
    text = "".join(parts)
    limits = {"document": "\0", "paragraph": r"\n\s*\n", "line": r"\n"}[sample_by]
    expected = [each for each in re.split(f"<e>|{limits}" if separator else limits, text) if each.strip()]
    if sample_by != "document" or separator:
        blank_lines = r"\A\s*\n" if sample_by == "paragraph" else r"\A\n+"
        expected = [re.sub(blank_lines, "", each).rstrip("\n") for each in expected]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "READ_BYTES", piece)
        documents, begun = [], ""
        for each, is_end in split((text[at : at + block] for at in range(0, len(text), block)), sample_by, separator):
            assert len(each.strip()) <= piece + block
            begun += each
            if is_end:
                documents.append(begun)
                begun = ""
    assert documents == expected


def test_a_separator_ends_documents_in_every_format(tmp_path):
    texts = ["one<|endoftext|>\ntwo\n<|endoftext|><|endoftext|>three\n\nfour", "five"]
    (tmp_path / "x.txt").write_text("<|endoftext|>".join(texts))
    (tmp_path / "x.jsonl").write_bytes(as_jsonl([{"text": text} for text in texts]))
    for name in ("x.txt", "x.jsonl"):
        expected = ["one", "two", "three\n\nfour", "five"]
        assert read(tmp_path / name, document_separator="<|endoftext|>") == expected
    assert read(tmp_path / "x.txt", document_separator="<|endoftext|>", sample_by="line")[2:] == [
        "three",
        "four",
        "five",
    ]
    assert np.char.count(read(tmp_path / "x.txt")[0], "<|endoftext|>") == 4
