"""Files with records: only the text column matters, and every text of it is read as it is."""

import json

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from documents import as_csv, as_jsonl, error_of, read, read_all

from forge_lib.data import records

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
