"""From text in any format to a token store."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import zstandard
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from forge_lib import corpus
from forge_lib.config import DataConfig, UserError

DOCUMENTS = [
    "The harbour is quiet.\nA boat comes in.",
    "Deniz çok güzel, İstanbul'da.",
    "Third — with €, 漢字 and 🙂.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2")


def make(tokenizer, path, folder=None, **options) -> corpus.TokenStore:
    return corpus.prepare_store(DataConfig(dataset_path=str(path), **options), tokenizer, folder, lambda state: None)


def texts(store, tokenizer) -> list[str]:
    """The documents of a store, decoded; each must end with the end-of-text token."""
    found = []
    for start, stop in zip(store.documents[:-1], store.documents[1:], strict=True):
        ids = store.tokens[int(start) : int(stop)].tolist()
        assert ids[-1] == tokenizer.eos_token_id
        found.append(tokenizer.decode(ids[:-1]))
    return found


def write(folder, name: str) -> None:
    """Writes DOCUMENTS in the format that the name says."""
    frame = pd.DataFrame({"text": DOCUMENTS})
    kind, *compression = name.removeprefix("corpus.").split(".")
    data = {
        "txt": lambda: "\n\n\n".join(DOCUMENTS).encode(),
        "md": lambda: ("\n\n".join(DOCUMENTS) + "\n").encode(),
        "json": lambda: frame.to_json(orient="records").encode(),
        "jsonl": lambda: "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode(),
        "csv": lambda: frame.to_csv(index=False).encode(),
        "parquet": lambda: frame.to_parquet(index=False),
    }[kind]()
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}
    (folder / name).write_bytes(compress[compression[0]](data) if compression else data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "md", "json", "jsonl", "csv", "parquet"])
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
def test_sample_by_decides_what_a_document_is(tmp_path, tokenizer, sample_by, expected):
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
def test_bytes_that_are_not_text_are_named_with_file_and_offset(tmp_path, tokenizer, data, offset):
    (tmp_path / "bad.txt").write_bytes(data)
    with pytest.raises(UserError, match=rf"bad\.txt: .*offset {offset}\b.*--encoding-errors replace"):
        make(tokenizer, tmp_path)
    assert make(tokenizer, tmp_path, encoding_errors="replace").manifest["num_documents"] == 1


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("x.jsonl", b'{"body": "a"}\n', {}, r"no column 'text'; it has 'body': name one with --text-column"),
        ("x.jsonl", b'{"text": 3}\n', {}, "holds int, expected text"),
        ("x.jsonl", b'{"text": "a"\n', {}, "not readable as json"),
        ("x.jsonl", b'{"text": "\xff"}\n', {}, "offset 10 is not UTF-8"),
        ("x.txt", b" \n\n", {}, "no text but white space"),
        ("x.txt", b"", {}, "empty: 1 file"),
        ("x.txt.gz", b"no gzip", {}, "not readable"),
        ("x.pdf", b"%PDF", {}, "unknown kind of file; expected txt, md, json"),
        ("x.parquet", b"no parquet", {}, "not readable as parquet"),
    ],
)
def test_input_that_cannot_be_used_is_named(tmp_path, tokenizer, name, data, options, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        make(tokenizer, tmp_path / name, tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("path", ["nowhere.txt", "/no/such/folder", "no*.txt"])
def test_a_path_that_is_not_there_is_named(tokenizer, path):
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
    with pytest.raises(UserError, match="holds other files"):
        make(tokenizer, tmp_path / "x.txt", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.doc").exists()


def test_killed_in_the_middle_it_leaves_no_half_store(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("The boat comes in again.\n" * 500_000)
    words = [sys.executable, "scripts/prepare_data.py", "--model-name", "data/tiny_gpt2"]
    words += ["--dataset-path", str(tmp_path / "x.txt"), "--output-dir", str(tmp_path / "store")]
    running = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    written = tmp_path / "store.partial" / "tokens.bin"
    while not (written.exists() and written.stat().st_size):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "store").exists()
    (tmp_path / "x.txt").write_text("short now")
    assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 0
    assert texts(corpus.open_store(tmp_path / "store"), tokenizer) == ["short now"]
    assert not (tmp_path / "store.partial").exists()


def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(tmp_path, tokenizer):
    text = (ROOT / "data" / "sample_corpus.txt").read_text() * 4
    (tmp_path / "x.txt").write_text(text)
    store = make(tokenizer, tmp_path / "x.txt")
    assert store.manifest["num_documents"] == 1
    assert len(text) > 2 * corpus.READ_BYTES
    whole = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert np.array_equal(store.tokens[:-1], whole)


def test_memory_stays_flat_however_large_the_corpus(tmp_path):
    """Ten times the text, in one document, takes no more memory, but for 48 MB of the allocator's slack."""
    text = (ROOT / "data" / "sample_corpus.txt").read_text()
    peaks = []
    for times in (5, 50):
        (tmp_path / "x.txt").write_text(text * times)
        words = [sys.executable, "scripts/prepare_data.py", "--model-name", "data/tiny_gpt2"]
        words += ["--dataset-path", str(tmp_path / "x.txt"), "--output-dir", str(tmp_path / f"store{times}")]
        code = f"import resource, subprocess; assert subprocess.run({words!r}).returncode == 0; "
        code += "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        peaks.append(int(ended.stdout.split("peak ")[1]))
    assert peaks[1] < peaks[0] + (48 << 10), f"{peaks} KB"


def test_a_damaged_store_is_named(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("one two three")
    make(tokenizer, tmp_path / "x.txt", tmp_path / "store")
    os.truncate(tmp_path / "store" / "tokens.bin", 2)
    with pytest.raises(UserError, match=r"tokens\.bin has 2 bytes, its manifest says"):
        corpus.open_store(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format 99"):
        corpus.open_store(tmp_path / "store")


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


OFFSETS = st.lists(st.integers(0, 6) | st.integers(0, 2**64 - 1), min_size=1, max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FACTS = ["format_version", "dtype", "num_tokens", "num_documents", "num_text_bytes", "tokenizer", "files"]
FACTS += ["files/tokens.bin", "files/tokens.bin/bytes", "files/documents.bin/sha256", "tokenizer/vocab_size"]


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer) -> corpus.TokenStore:
    """A store that tests copy, change and put back."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "x.txt").write_text("one two three\n\nfour")
    return make(tokenizer, folder / "x.txt", folder / "store", sample_by="paragraph")


def copy(store, folder, offsets=None) -> corpus.TokenStore:
    """A copy of a store; with `offsets`, one whose documents lie there and whose manifest has their hash."""
    manifest = json.loads(json.dumps(store.manifest))
    folder.mkdir(exist_ok=True)
    for name in manifest["files"]:
        (folder / name).write_bytes((store.folder / name).read_bytes())
    if offsets is not None:
        data = np.asarray(offsets, np.uint64).tobytes()
        (folder / "documents.bin").write_bytes(data)
        manifest["files"]["documents.bin"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["num_documents"] = len(offsets) - 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return corpus.open_store(folder)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
def test_verifying_a_store_names_the_file_with_a_flipped_bit(tmp_path, small, name):
    store = copy(small, tmp_path / "store")
    said = []
    corpus.verify_store(store, said.append)
    assert said[-1] == "verifying the token store: 100 %"
    data = bytearray((store.folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (store.folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is damaged: its sha256 .*make it again with scripts/prepare_data"):
        corpus.verify_store(store)


@given(offsets=OFFSETS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_store_verifies_exactly_if_its_documents_follow_each_other_from_the_first_token_to_the_last(
    tmp_path, small, offsets, monkeypatch
):
    monkeypatch.setattr(corpus, "HASH_BYTES", 16)  # two offsets at a time
    num_tokens = small.manifest["num_tokens"]
    right = offsets[0] == 0 and offsets[-1] == num_tokens and sorted(offsets) == offsets
    store = copy(small, tmp_path / "store", offsets)
    if right:
        corpus.verify_store(store)
    else:
        with pytest.raises(UserError, match=r"documents\.bin: .* token|documents\.bin: entry"):
            corpus.verify_store(store)


@pytest.mark.parametrize("offsets", [[0, 3, 3, None], [0, None], [0, 1, 1, 2, None]])
def test_empty_documents_and_offsets_that_do_not_decrease_are_right(tmp_path, small, offsets):
    offsets = [small.manifest["num_tokens"] if each is None else each for each in offsets]
    corpus.verify_store(copy(small, tmp_path / "store", offsets))


@given(where=st.sampled_from(FACTS), value=JSON)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_hostile_manifest_is_an_error_of_one_message_or_a_store_that_fits(tmp_path, small, where, value):
    store = copy(small, tmp_path / "store")
    manifest = json.loads(json.dumps(small.manifest))
    *outer, last = where.split("/")
    inner = manifest
    for key in outer:
        inner = inner[key]
    inner[last] = value
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        opened = corpus.open_store(store.folder)
    except UserError as error:
        assert len(str(error)) < 600
    else:
        assert (len(opened.tokens), len(opened.documents)) == (len(small.tokens), len(small.documents))


@pytest.mark.parametrize(
    "content", ["[" * 200_000, "9" * 5000, "\0", "[]", "{}", '{"format_version": 1e999}', " " * ((1 << 24) + 1)]
)
def test_a_manifest_that_no_program_of_ours_has_written_is_damaged(tmp_path, small, content):
    store = copy(small, tmp_path / "store")
    (store.folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        corpus.open_store(store.folder)


def test_a_pipe_in_place_of_a_file_is_refused_and_a_link_to_a_file_is_read(tmp_path, small):
    store = copy(small, tmp_path / "store")
    (store.folder / "tokens.bin").rename(tmp_path / "elsewhere")
    os.mkfifo(store.folder / "tokens.bin")
    with pytest.raises(UserError, match=r"tokens\.bin has 0 bytes"):
        corpus.open_store(store.folder)
    (store.folder / "tokens.bin").unlink()
    (store.folder / "tokens.bin").symlink_to(tmp_path / "elsewhere")
    assert corpus.open_store(store.folder).fingerprint == small.fingerprint


def test_a_store_that_changes_while_it_is_read_is_named_and_one_that_was_only_touched_is_not(tmp_path, small):
    store = copy(small, tmp_path / "store")
    path, right = store.folder / "tokens.bin", (small.folder / "tokens.bin").read_bytes()
    store.check_unchanged()
    os.utime(path, ns=(1, 1))
    store.check_unchanged()  # hashed again
    (store.folder / "new").write_bytes(right)
    (store.folder / "new").rename(path)
    store.check_unchanged()
    path.write_bytes(right[:-1] + b"\xff")
    with pytest.raises(UserError, match=r"was changed while the run was reading it; restore it .* another sha256"):
        store.check_unchanged()
    os.truncate(path, 2)
    with pytest.raises(
        UserError, match=rf"was truncated .*goes on from its last checkpoint \(2 bytes, .* {len(right)}"
    ):
        store.check_unchanged()
    path.unlink()
    with pytest.raises(UserError, match=r"tokens\.bin was taken away"):
        store.check_unchanged()


def test_checking_that_nothing_has_changed_costs_microseconds_and_a_change_is_hashed_once(
    tmp_path, small, monkeypatch
):
    store = copy(small, tmp_path / "store")
    hashed = []
    sha256 = corpus._sha256
    monkeypatch.setattr(corpus, "_sha256", lambda path: hashed.append(path.name) or sha256(path))
    begun = time.perf_counter()
    for _ in range(1000):
        store.check_unchanged()
    assert time.perf_counter() - begun < 0.5
    assert not hashed
    os.utime(store.folder / "documents.bin", ns=(1, 1))
    for _ in range(3):
        store.check_unchanged()
    assert hashed == ["documents.bin"]


def test_a_source_that_changes_while_it_is_tokenized_is_named_and_leaves_nothing(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text("one two three")
    config = DataConfig(dataset_path=str(tmp_path / "in"))

    def meddle(state: str) -> None:
        (tmp_path / "in" / "a.txt").write_text("one two")

    with pytest.raises(UserError, match=r"a\.txt was changed while it was tokenized"):
        corpus.prepare_store(config, tokenizer, tmp_path / "out" / "store", meddle)
    assert [path.name for path in (tmp_path / "out").iterdir()] in ([], ["store.lock"])


def test_without_a_terminal_a_line_now_and_then_says_how_far_tokenizing_is(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "LINE_SECONDS", 0)
    (tmp_path / "x.txt").write_text("one two three")
    make(tokenizer, tmp_path / "x.txt", tmp_path / "store")
    assert "x.txt: 0.0 MB of text, " in capsys.readouterr().err


def test_a_home_folder_by_its_short_name_is_found(small, monkeypatch):
    monkeypatch.setenv("HOME", str(small.folder.parent))
    assert corpus.is_store("~/store")
    assert corpus.open_store("~/store").fingerprint == small.fingerprint


def test_a_store_from_a_peer_has_its_place_in_the_cache_and_a_hostile_fingerprint_has_none(small):
    assert corpus.received_folder(small.fingerprint).name == f"received-{small.fingerprint[:16]}"
    for wrong in ("../../../../etc/passwd", "", "A" * 64, small.fingerprint + "\n"):
        with pytest.raises(UserError, match="no fingerprint"):
            corpus.received_folder(wrong)
