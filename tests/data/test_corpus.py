"""Text in any format becomes a token store."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import zstandard
from commands import ROOT
from transformers import AutoTokenizer

from forge_lib.config import DataConfig
from forge_lib.data import document_writer, reading, records
from forge_lib.data.corpus import describe_store, prepare_store
from forge_lib.data.files import content_fingerprint, data_exists
from forge_lib.data.token_store import TokenStore, is_store, open_store
from forge_lib.errors import UserError

DOCUMENTS = [
    "The harbour is quiet.\nA boat comes in.",
    "Deniz çok güzel, İstanbul'da.",
    "Third — with €, 漢字 and 🙂.",
]


def as_arrow(frame: pd.DataFrame, open_writer=pa.ipc.new_stream) -> bytes:
    """Returns an arrow file, in the format of streams or, with `pa.ipc.new_file`, of files."""
    table, sink = pa.Table.from_pandas(frame, preserve_index=False), pa.BufferOutputStream()
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2")


def make(tokenizer, path, folder=None, **options) -> TokenStore:
    return prepare_store(DataConfig(dataset_path=str(path), **options), tokenizer, folder)


def texts(store, tokenizer) -> list[str]:
    """Returns the documents of a store, decoded; each must end with the end-of-text token."""
    found = []
    for start, stop in zip(store.documents[:-1], store.documents[1:], strict=True):
        ids = store.tokens[int(start) : int(stop)].tolist()
        assert ids[-1] == tokenizer.eos_token_id
        found.append(tokenizer.decode(ids[:-1]))
    return found


def write(folder, name: str) -> None:
    """Writes DOCUMENTS in the format of the name's suffix."""
    frame = pd.DataFrame({"text": DOCUMENTS})
    kind, *compression = name.removeprefix("corpus.").split(".")
    data = {
        "txt": lambda: "\n\n\n".join(DOCUMENTS).encode(),
        "md": lambda: ("\n\n".join(DOCUMENTS) + "\n").encode(),
        "json": lambda: frame.to_json(orient="records").encode(),
        "jsonl": lambda: "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode(),
        "csv": lambda: frame.to_csv(index=False).encode(),
        "parquet": lambda: frame.to_parquet(index=False),
        "arrow": lambda: as_arrow(frame),
    }[kind]()
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}
    (folder / name).write_bytes(compress[compression[0]](data) if compression else data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "md", "json", "jsonl", "csv", "parquet", "arrow"])
def test_every_format_gives_the_same_documents(tmp_path, tokenizer, kind, suffix):
    name = f"corpus.{kind}{suffix}"
    write(tmp_path, name)
    store = make(tokenizer, tmp_path / name, sample_by="paragraph")
    assert texts(store, tokenizer) == DOCUMENTS
    assert store.manifest["num_text_bytes"] == sum(len(text.encode()) for text in DOCUMENTS)


def test_folders_are_read_in_order_with_all_their_formats_and_empty_files_are_counted(tmp_path, tokenizer):
    for name, text in [("b/2.txt", "two"), ("a/1.md", "one"), ("c.jsonl", '{"text": "three"}\n'), ("d.txt", "")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    store = make(tokenizer, tmp_path)
    assert texts(store, tokenizer) == ["one", "two", "three"]
    assert (store.manifest["source"]["num_files"], store.manifest["source"]["num_empty_files"]) == (3, 1)
    assert texts(make(tokenizer, tmp_path / "*" / "*.txt"), tokenizer) == ["two"]


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [("document", ["a b\nc\n\n d\n\ne\n"]), ("paragraph", ["a b\nc", " d", "e"]), ("line", ["a b", "c", " d", "e"])],
)
def test_sample_by_selects_what_a_document_is(tmp_path, tokenizer, sample_by, expected):
    (tmp_path / "x.txt").write_text("a b\nc\n\n d\n\ne\n")
    assert texts(make(tokenizer, tmp_path / "x.txt", sample_by=sample_by), tokenizer) == expected


def test_a_bom_and_crlf_make_no_difference(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree")
    assert texts(make(tokenizer, tmp_path / "x.txt", sample_by="paragraph"), tokenizer) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"abc\xffdef", 3),
        (b"\xef\xbb\xbfabc\xff", 6),
        (b"a" * ((1 << 18) - 1) + "é".encode() + b"\xff", (1 << 18) + 1),
        (b"ends in the middle \xe2\x82", 19),
        (b"zero \0 byte", 5),
    ],
)
def test_bytes_that_are_not_text_are_reported_with_file_and_offset(tmp_path, tokenizer, data, offset):
    (tmp_path / "bad.txt").write_bytes(data)
    with pytest.raises(UserError, match=rf"bad\.txt: .*offset {offset}\b.*--encoding-errors replace"):
        make(tokenizer, tmp_path)
    assert make(tokenizer, tmp_path, encoding_errors="replace").manifest["num_documents"] == 1


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("x.jsonl", b'{"body": "a"}\n', {}, r"no column 'text'; it has 'body': name one of them with --text-column"),
        ("x.jsonl", b'{"text": 3}\n', {}, "line 1: column 'text' has the number 3 without quotes, expected text"),
        ("x.jsonl", b'{"text": "a"\n', {}, "line 1 is not JSON: Expecting ',' delimiter at character 13"),
        ("x.jsonl", b'{"text": "\xff"}\n', {}, "offset 10 is not UTF-8"),
        ("x.txt", b" \n\n", {}, "no text except white space"),
        ("x.txt", b"", {}, "empty: 1 file"),
        ("x.txt.gz", b"no gzip", {}, "not readable"),
        ("x.pdf", b"%PDF", {}, "unknown format; expected txt, md, json"),
        ("x.parquet", b"no parquet", {}, "not readable as parquet"),
        ("x.arrow", b"no arrow", {}, "not readable as arrow"),
        ("x.arrow", as_arrow(pd.DataFrame({"text": DOCUMENTS}))[:-400], {}, "not readable as arrow"),
        ("x.arrow", as_arrow(pd.DataFrame({"text": [1, 2]})), {}, "column 'text' holds int64, expected text"),
        ("x.arrow", as_arrow(pd.DataFrame({"body": DOCUMENTS})), {}, "no column 'text'; it has 'body'"),
    ],
)
def test_input_that_cannot_be_used_is_reported(tmp_path, tokenizer, name, data, options, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        make(tokenizer, tmp_path / name, tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("path", ["nowhere.txt", "/no/such/folder", "no*.txt"])
def test_a_path_that_does_not_exist_is_reported(tokenizer, path):
    with pytest.raises(UserError, match=r"--dataset-path .*no "):
        make(tokenizer, path)


def test_unchanged_input_is_not_read_again_and_changed_input_is(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("one")
    before = make(tokenizer, tmp_path / "x.txt", tmp_path / "store")
    made = os.stat(tmp_path / "store" / "tokens.bin")
    assert make(tokenizer, tmp_path / "x.txt", tmp_path / "store").fingerprint == before.fingerprint
    assert os.stat(tmp_path / "store" / "tokens.bin").st_ino == made.st_ino
    (tmp_path / "x.txt").write_text("other")
    after = make(tokenizer, tmp_path / "x.txt", tmp_path / "store")
    assert texts(after, tokenizer) == ["other"]
    assert after.fingerprint != before.fingerprint


def test_a_folder_of_the_user_is_never_replaced(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("one")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("years of work")
    with pytest.raises(UserError, match="has other files"):
        make(tokenizer, tmp_path / "x.txt", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.doc").exists()


def test_a_killed_prepare_data_leaves_no_partial_store(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("The boat comes in again.\n" * 500_000)
    words = [sys.executable, "scripts/prepare_data.py", "--model-name", "data/tiny_gpt2"]
    words += ["--dataset-path", str(tmp_path / "x.txt"), "--output-dir", str(tmp_path / "store")]
    running = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    written = tmp_path / ".partial-store" / "tokens.bin"
    while not (written.exists() and written.stat().st_size):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "store").exists()
    (tmp_path / "x.txt").write_text("short now")
    assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 0
    assert texts(open_store(tmp_path / "store"), tokenizer) == ["short now"]
    assert not (tmp_path / ".partial-store").exists()


def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(tmp_path, tokenizer):
    text = (ROOT / "data" / "sample_corpus.txt").read_text() * 4
    (tmp_path / "x.txt").write_text(text)
    store = make(tokenizer, tmp_path / "x.txt")
    assert store.manifest["num_documents"] == 1
    assert len(text) > 2 * reading.READ_BYTES
    whole = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert np.array_equal(store.tokens[:-1], whole)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Five times the text, in one document, takes at most 48 MB more memory: the allocator's slack."""
    text = (ROOT / "data" / "sample_corpus.txt").read_text()
    peaks = []
    for times in (5, 25):
        (tmp_path / "x.txt").write_text(text * times)
        words = [sys.executable, "scripts/prepare_data.py", "--model-name", "data/tiny_gpt2"]
        words += ["--dataset-path", str(tmp_path / "x.txt"), "--output-dir", str(tmp_path / f"store{times}")]
        code = f"import resource, subprocess; assert subprocess.run({words!r}).returncode == 0; "
        code += "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        peaks.append(int(ended.stdout.split("peak ")[1]))
    assert peaks[1] < peaks[0] + (48 << 10), f"{peaks} KB"


@pytest.mark.parametrize("content", ["another's manifest", "a store with a letter", "a damaged store", "tokens alone"])
def test_a_folder_with_other_content_is_refused_and_not_changed(tmp_path, tokenizer, content):
    folder = tmp_path / "store"
    (tmp_path / "x.txt").write_text("one two three")
    make(tokenizer, tmp_path / "x.txt", folder)
    if content == "another's manifest":
        (folder / "manifest.json").write_text('{"name": "a web page"}')
    elif content == "a store with a letter":
        (folder / "letter.txt").write_text("Dear Ann")
        (tmp_path / "x.txt").write_text("another text")
    elif content == "a damaged store":
        os.truncate(folder / "tokens.bin", 2)
    else:
        (folder / "manifest.json").unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"has other files; name an empty|is damaged|has 2 bytes"):
        make(tokenizer, tmp_path / "x.txt", folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_link_to_a_store_stays_and_an_interrupted_rename_is_repaired(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("one two three")
    (tmp_path / "there").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "there")
    made = make(tokenizer, tmp_path / "x.txt", tmp_path / "store")
    assert (tmp_path / "store").is_symlink() and is_store(tmp_path / "there")
    (tmp_path / "there").rename(tmp_path / ".replaced-there")
    assert make(tokenizer, tmp_path / "x.txt", tmp_path / "store").fingerprint == made.fingerprint
    assert not (tmp_path / ".replaced-there").exists()


def test_a_store_of_another_tokenizer_is_refused(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("one two three")
    make(tokenizer, tmp_path / "x.txt", tmp_path / "store")
    other = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2")
    other.add_tokens(["<other>"])
    with pytest.raises(UserError, match=r"made with the tokenizer of .* \(2048 tokens\).*\(2049 tokens\)"):
        make(other, tmp_path / "store")


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path, tokenizer):
    large = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2")
    large.add_tokens([f"<{n}>" for n in range(70_000)])
    (tmp_path / "x.txt").write_text("one <69999>")
    store = make(large, tmp_path / "x.txt")
    assert store.tokens.dtype == np.uint32
    assert store.tokens.max() > 1 << 16


def test_a_source_that_changes_while_it_is_tokenized_is_reported_and_no_store_is_left(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text("one two three")
    config = DataConfig(dataset_path=str(tmp_path / "in"))

    def change_source(state: str) -> None:
        (tmp_path / "in" / "a.txt").write_text("one two")

    with pytest.raises(UserError, match=r"a\.txt was changed while it was tokenized"):
        prepare_store(config, tokenizer, tmp_path / "out" / "store", change_source)
    assert [path.name for path in (tmp_path / "out").iterdir()] in ([], ["store.lock"])


def test_without_a_terminal_lines_report_the_progress_of_tokenizing(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(document_writer, "LINE_SECONDS", 0)
    (tmp_path / "x.txt").write_text("one two three")
    make(tokenizer, tmp_path / "x.txt", tmp_path / "store")
    assert "x.txt: 0.0 MB of text, " in capsys.readouterr().err


def test_data_exists_for_files_folders_and_patterns_that_match(tmp_path):
    (tmp_path / "x.txt").write_text("one")
    for path in ("x.txt", "", "*.txt", "**/x.*"):
        assert data_exists(str(tmp_path / path))
    for path in ("y.txt", "*.md"):
        assert not data_exists(str(tmp_path / path))
    assert not data_exists("")


def test_the_content_fingerprint_depends_on_names_and_bytes_and_not_on_the_folder(tmp_path, tokenizer):
    for folder, text in (("a", "one"), ("b", "one"), ("c", "other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(text)
    a, b, c = (content_fingerprint(str(tmp_path / folder)) for folder in "abc")
    assert a == b != c
    store = make(tokenizer, tmp_path / "a", tmp_path / "store")
    assert content_fingerprint(str(tmp_path / "store")) == store.fingerprint
    assert content_fingerprint("some/dataset-of-the-hub") == ""


def test_a_folder_of_text_may_have_a_manifest_json_of_its_own(tokenizer, tmp_path):
    write(tmp_path, "corpus.jsonl")
    (tmp_path / "manifest.json").write_text(json.dumps([{"text": "More."}]))
    assert not is_store(tmp_path)
    assert texts(make(tokenizer, tmp_path), tokenizer) == [*DOCUMENTS, "More."]


def test_files_of_equal_name_size_and_time_in_other_folders_have_stores_of_their_own(tokenizer, tmp_path):
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.txt").write_text(f"Part {name}.")
        os.utime(tmp_path / name / "part.txt", (1, 1))
        found += texts(make(tokenizer, tmp_path / name), tokenizer)
    assert found == ["Part a.", "Part b."]


def test_a_full_disk_is_one_line_that_names_the_file():
    """/dev/full accepts no byte."""
    with (
        pytest.raises(UserError, match=r"^/dev/full: No space left on device$"),
        document_writer.HashedFile(Path("/dev/full")) as file,
    ):
        file.write(np.zeros(1 << 20, np.uint8))


def test_flags_that_do_not_concern_the_files_are_noted(tokenizer, tmp_path):
    def notes(name: str, **options) -> list[str]:
        write(tmp_path / name, f"corpus.{name}")
        config = DataConfig(dataset_path=str(tmp_path / name), **options)
        lines = describe_store(prepare_store(config, tokenizer), tokenizer, config)
        return [line for line in lines if "no effect" in line]

    for name in ("txt", "jsonl"):
        (tmp_path / name).mkdir()
    assert notes("txt", sample_by="line") == notes("jsonl") == []
    path = tmp_path / "jsonl"
    expected = [f"--sample-by, --dataset-split: no effect on the files of {path}"]
    assert notes("jsonl", sample_by="line", dataset_split="test") == expected
    frame = pd.DataFrame({"body": DOCUMENTS})
    frame.to_json(path / "corpus.jsonl", orient="records", lines=True)
    config = DataConfig(dataset_path=str(path), text_column="body")
    assert not any("no effect" in line for line in describe_store(prepare_store(config, tokenizer), tokenizer, config))
    assert notes("txt", text_column="body") == [f"--text-column: no effect on the files of {tmp_path / 'txt'}"]


def test_arrow_files_of_both_formats_are_read_in_small_parts(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "BATCH_BYTES", 1)
    frame = pd.DataFrame({"number": range(3), "text": DOCUMENTS})
    for name, writer in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        (tmp_path / f"{name}.arrow").write_bytes(as_arrow(frame, writer))
        assert texts(make(tokenizer, tmp_path / f"{name}.arrow"), tokenizer) == DOCUMENTS
