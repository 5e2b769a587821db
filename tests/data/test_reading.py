"""Files as people have them: every document is read as it is, or the file is an error that names it."""

import csv
import gzip
import io
import json
import random

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from documents import as_jsonl, read, read_all
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forge_lib.data import reading, records
from forge_lib.data.reading import split
from forge_lib.errors import UserError

COMPRESS = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstd.compress}


def as_csv(rows: list[list[str]]) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()


def error_of(path, **options) -> str:
    with pytest.raises(UserError) as error:
        read(path, **options)
    assert str(path.name) in str(error.value)
    return str(error.value)


# Compressed files


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("how", ["half", "one byte", "second part", "header of the second part"])
def test_a_compressed_file_without_its_end_is_an_error(tmp_path, kind, suffix, how):
    """Text of random words, so that half of the compressed file decompresses to about half of the text."""
    words = random.Random(0)
    texts = [" ".join(str(words.random()) for _ in range(20)) for _ in range(200)]
    data = {
        "txt": lambda: "\n".join(texts).encode(),
        "jsonl": lambda: as_jsonl([{"text": text} for text in texts]),
        "json": lambda: json.dumps([{"text": text} for text in texts]).encode(),
        "csv": lambda: as_csv([["text"], *([text] for text in texts)]),
        "parquet": lambda: pd.DataFrame({"text": texts}).to_parquet(),
    }[kind]()
    compress = COMPRESS[suffix]
    parts = [compress(data[: len(data) // 2]), compress(data[len(data) // 2 :])]
    whole = b"".join(parts)
    path = tmp_path / f"corpus.{kind}{suffix}"
    path.write_bytes(whole)
    assert read(path, sample_by="line") == texts
    cut = {"half": len(whole) // 2, "one byte": len(whole) - 1, "header of the second part": len(parts[0]) + 2}
    path.write_bytes(whole[: cut.get(how, len(parts[0]) + len(parts[1]) // 2)])
    assert "the end of the compressed file is missing; copy or download it again" in error_of(path, sample_by="line")


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.zst", "x.csv.gz", "x.parquet.zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_an_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"plain text")
    assert "not readable" in error_of(tmp_path / name)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_file_is_an_error(tmp_path, suffix):
    """Both have a checksum, as the command-line tools write it."""
    text = "".join(str(random.Random(n).random()) + "\n" for n in range(1000)).encode()
    checksum = {zstd.CompressionParameter.checksum_flag: 1}
    data = bytearray(gzip.compress(text) if suffix == ".gz" else zstd.compress(text, options=checksum))
    data[len(data) // 2] ^= 0x10
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(bytes(data))
    assert "not readable" in error_of(path, encoding_errors="replace")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "x.txt.gz"])
def test_a_pointer_of_git_lfs_is_an_error(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "is a Git LFS pointer, not the file itself; run `git lfs pull`" in error_of(tmp_path / name)


def test_what_zstd_writes_with_a_window_of_two_gigabytes_is_read(tmp_path):
    data = zstd.compress(b"one\n" * 10, options={zstd.CompressionParameter.window_log: 30})
    (tmp_path / "x.txt.zst").write_bytes(data)
    assert len(read(tmp_path / "x.txt.zst", sample_by="line")) == 10


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


# Records: only the text column matters


OTHERS = [
    (None, "q"),
    ([], ["q"]),
    ({"a": 1}, {"a": 1, "b": 2}),
    (1, "1"),
    ("2020-01-01", "yesterday"),
    (1, 10**400),
    (1, [{"deep": [[1, None], {}]}]),
    (float("nan"), -float("inf")),
    (True, 0.5),
    ("\ud800", ""),
]


@pytest.mark.parametrize(("first", "then"), OTHERS)
def test_other_columns_may_change_their_type(tmp_path, first, then):
    """11,000 records, then another type: `datasets` infers a type of each column from the first block of a file."""
    rows = [{"meta": first, "text": f"{n} {'x' * 200}"} for n in range(3000)]
    rows += [{"meta": then, "text": "last"}, {"text": "no meta"}, {"text": "more", "new": 3, "meta": first}]
    for name, data in (("x.jsonl", as_jsonl(rows)), ("x.json", json.dumps(rows, indent=1).encode())):
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == [row["text"] for row in rows]


@pytest.mark.parametrize("text", ["007", "42", "2020-01-01", "true", "NA", "None", "null", "nan", "N/A", "n/a", "1e5"])
def test_no_text_is_interpreted(tmp_path, text):
    (tmp_path / "x.csv").write_bytes(as_csv([["id", "text"], *[[str(n), text] for n in range(3)]]))
    (tmp_path / "x.jsonl").write_bytes(as_jsonl([{"text": text}] * 3))
    (tmp_path / "x.parquet").write_bytes(pd.DataFrame({"text": [text] * 3}).to_parquet())
    for kind in ("csv", "jsonl", "parquet"):
        assert read(tmp_path / f"x.{kind}") == [text] * 3


def test_the_words_of_missing_values_in_csv_are_documents(tmp_path):
    texts = ["a", "NA", "None", "null", "nan", "N/A", "n/a", "NULL"]
    (tmp_path / "x.csv").write_text("text\n" + "".join(f"{text}\n" for text in texts))
    assert read(tmp_path / "x.csv") == texts


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("7", "the number 7 without quotes"),
        ("7.5", "the number 7.5 without quotes"),
        ("true", "the value true without quotes"),
        ('["a"]', "an array"),
        ('{"a": 1}', "an object"),
    ],
)
def test_a_value_of_json_that_is_no_text_is_an_error_that_names_it(tmp_path, value, words):
    for name, data in (("x.jsonl", f'{{"text": "a"}}\n{{"text": {value}}}\n'), ("x.json", f'[{{"text": {value}}}]')):
        (tmp_path / name).write_text(data)
        place = "line 2" if name == "x.jsonl" else "record 1"
        assert f"{place}: column 'text' has {words}, expected text" in error_of(tmp_path / name)


def test_a_column_that_some_records_lack_is_read_and_one_that_all_lack_is_an_error(tmp_path):
    """However late the column comes."""
    rows = [{"id": 1}] * 11_000 + [{"text": "one"}, {"text": None}, {"text": "two"}]
    (tmp_path / "x.jsonl").write_bytes(as_jsonl(rows))
    documents, reader = read_all(tmp_path / "x.jsonl")
    assert (documents, reader.num_empty_documents) == (["one", "two"], 11_001)
    (tmp_path / "y.jsonl").write_bytes(as_jsonl([{"id": 1, "body": "x"}] * 20))
    message = error_of(tmp_path / "y.jsonl")
    assert "no column 'text'; it has 'id', 'body': name one of them with --text-column" in message
    assert read(tmp_path / "y.jsonl", text_column="body") == ["x"] * 20
    (tmp_path / "z.json").write_text("[{}]")
    assert "no column 'text'; it has none" in error_of(tmp_path / "z.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "line 2 is not JSON"),
        (b'{"text": "a"}\n["b"]\n', "line 2 is an array, expected an object with the key 'text'"),
        (b'{"text": "a"} {"text": "b"}\n', "line 1 is not JSON: Extra data at character 14"),
        (b'"a"\n', "line 1 is a string, expected an object"),
        (b'{"text": "a"}\n{"te', "line 2 is not JSON"),
        (b"[" * 200_000, "line 1 is not readable: it is nested too deeply"),
        (b'\xff\xfe{\0"\0', "not UTF-8 but UTF-16; convert it"),
    ],
)
def test_a_line_that_is_no_record_is_an_error_that_names_it(tmp_path, data, message):
    (tmp_path / "x.jsonl").write_bytes(data)
    assert message in error_of(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ('{\n "text": "a"\n}\n{\n "text": "b"\n}', ["a", "b"]),
        ('{"text": "only"}', ["only"]),
        ('\ufeff[{"text": "a"}]', ["a"]),
    ],
)
def test_a_json_file_is_an_array_or_a_sequence_of_objects(tmp_path, data, expected):
    (tmp_path / "x.json").write_text(data)
    assert read(tmp_path / "x.json") == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('[{"text": "a"}, {"text": "b"}', "record 3 is not JSON: the array does not end"),
        ('[{"text": "a"}, {"text": "b', "record 2 is not JSON: Unterminated string"),
        ('[{"text": "a"} {"text": "b"}]', "record 2 is not JSON: Expecting ',' or ']'"),
        ('[{"text": "a"}] {"text": "b"}', "record 2 is not JSON: Extra data"),
        ('[{"text": "a"},]', "record 2 is not JSON: Expecting value"),
        ('[{"text": tru' + " " * 100, "record 1 is not JSON: Expecting value"),
        ('[1, {"text": "b"}]', "record 1 is the number 1 without quotes, expected an object"),
        ("[" * 200_000, "record 1 is not JSON: nested too deeply"),
    ],
)
def test_a_json_file_that_is_cut_or_wrong_is_an_error(tmp_path, data, message):
    (tmp_path / "x.json").write_text(data)
    assert message in error_of(tmp_path / "x.json")


def test_a_json_file_is_read_in_blocks(tmp_path, monkeypatch):
    """Blocks of 16 characters cut strings, literals, escapes and numbers at every place."""
    rows = [{"n": n, "f": -1.5e30, "ok": True, "no": None, "text": 'é\u2028"\\\n' * (n % 40)} for n in range(1, 200)]
    (tmp_path / "x.json").write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.setattr(records, "READ_BYTES", 16)
    assert read(tmp_path / "x.json") == [row["text"] for row in rows if row["text"]]


def test_only_line_feeds_separate_the_lines_of_jsonl(tmp_path):
    texts = ["a\u2028b", "a\x85b", "a\x0cb", "a\x1eb", "a\rb"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "x.jsonl").write_bytes("\r\n".join(lines).encode())
    assert read(tmp_path / "x.jsonl") == texts


def test_half_a_surrogate_pair_is_an_error_or_replaced(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud83d\\ude42b"}\n{"text": "a\\ud800b"}\n')
    assert "line 2: column 'text' has half of a surrogate pair at character 1" in error_of(tmp_path / "x.jsonl")
    assert read(tmp_path / "x.jsonl", encoding_errors="replace") == ["a🙂b", "a�b"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_bytes_that_are_not_utf8_are_an_error_or_replaced_in_every_format(tmp_path, kind):
    data = {
        "jsonl": '{"text": "caf\xe9"}\n',
        "json": '[{"text": "caf\xe9"}]',
        "csv": "text\ncaf\xe9\n",
        "txt": "caf\xe9",
    }
    path = tmp_path / f"x.{kind}"
    path.write_bytes(data[kind].encode("latin-1"))
    message = error_of(path)
    assert f"byte 0xe9 at offset {data[kind].index('é')} is not UTF-8" in message
    assert "--encoding-errors replace" in message
    assert read(path, encoding_errors="replace") == ["caf�"]


# csv


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("id,text\n1,Hello\n1,Hello, world\n", "line 3 has 3 fields, but the header has 2"),
        ("id,text\n1\n", "line 2 has 1 fields, but the header has 2; complete it"),
        ('id,text\n1,"a\nb"\n2,c,d\n', "line 4 has 3 fields"),
        ('id,text\n1,a\n2,"never closed\n3,b\n', "the row that begins in line 3 is not csv: unexpected end of data"),
        ('id,text\n1,"a"b\n', "the row that begins in line 2 is not csv"),
        ("id;text\n1;a\n", "no column 'text'; it has 'id;text'"),
        ("text,text\na,b\n", "2 columns are named 'text'; rename all but one"),
        ("a text without a header\n", "no column 'text'"),
    ],
)
def test_a_csv_file_with_shifted_columns_is_an_error_that_names_the_line(tmp_path, data, message):
    (tmp_path / "x.csv").write_text(data)
    assert message in error_of(tmp_path / "x.csv")


def test_csv_is_read_by_its_own_rules_only(tmp_path):
    long = "y" * 300_000  # the csv module's default limit is 131,072
    (tmp_path / "x.csv").write_bytes(f'id,text\r\n1,"a ""b"", c\r\nd"\r\n\r\n2, spaces \r\n3,{long}\r\n'.encode())
    assert read(tmp_path / "x.csv") == ['a "b", c\r\nd', " spaces ", long]


# parquet


def test_only_the_text_column_of_parquet_is_read(tmp_path):
    """A map, a struct, a dictionary and a list beside it; text as large_string and as a dictionary."""
    others = {
        "map": pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "struct": pyarrow.array([{"text": 1}, None]),
        "list": pyarrow.array([[1], []]),
        "when": pyarrow.array([0, 1], pyarrow.duration("s")),
    }
    for type in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())):
        table = pyarrow.table(others | {"text": pyarrow.array(["one", "two"], type)})
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        assert read(tmp_path / "x.parquet") == ["one", "two"]


@pytest.mark.parametrize(
    ("values", "type"), [([1], "int64"), ([["a"]], "list"), ([{"a": 1}], "struct"), ([b"a"], "binary")]
)
def test_a_parquet_column_that_holds_no_text_is_an_error(tmp_path, values, type):
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "x.parquet")
    assert f"column 'text' holds {type}" in error_of(tmp_path / "x.parquet")
    assert "no column 'body'; it has 'text'" in error_of(tmp_path / "x.parquet", text_column="body")


def test_a_text_of_parquet_that_is_not_utf8_is_an_error_or_replaced(tmp_path):
    values = pyarrow.array([b"good", b"caf\xe9", None], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "x.parquet")
    message = error_of(tmp_path / "x.parquet")
    assert "row 2: byte 0xe9 at offset 3 is not UTF-8" in message
    assert read(tmp_path / "x.parquet", encoding_errors="replace") == ["good", "caf�"]


def test_two_columns_of_parquet_with_one_name_are_an_error(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert "2 columns are named 'text'; rename all but one" in error_of(tmp_path / "x.parquet")


def test_parquet_with_many_row_groups_nulls_and_long_texts_is_read_in_order(tmp_path):
    texts = [None if n % 7 == 0 else f"{n} " + "x" * (n % 50) ** 3 for n in range(300)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet", row_group_size=13)
    documents, reader = read_all(tmp_path / "x.parquet")
    assert documents == [text for text in texts if text]
    assert reader.num_empty_documents == texts.count(None)


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


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["a", "bc ", "\n", "\n\n", " ", "<e>", "é", "<"]), max_size=60),
    sample_by=st.sampled_from(["document", "paragraph", "line"]),
    separator=st.sampled_from(["", "<e>"]),
    block=st.integers(1, 7),
    piece=st.integers(8, 40),
)
def test_splitting_does_not_depend_on_blocks_and_pieces(parts, sample_by, separator, block, piece):
    """The reference splits the whole text at once."""
    text = "".join(parts)
    limits = {"document": "\0", "paragraph": r"\n\s*\n", "line": r"\n"}[sample_by]
    expected = [each for each in reading.re.split(f"<e>|{limits}" if separator else limits, text) if each.strip()]
    if sample_by != "document" or separator:
        expected = [each.strip("\n") for each in expected]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "READ_BYTES", piece)
        documents, begun = [], ""
        for each, is_end in split((text[at : at + block] for at in range(0, len(text), block)), sample_by, separator):
            assert len(each) <= piece + block
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
