"""Token stores: damaged, hostile and changing ones."""

import hashlib
import json
import os

import numpy as np
import pytest
from commands import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from forge_lib import disk
from forge_lib.config import DataConfig
from forge_lib.data import corpus
from forge_lib.data.token_store import TokenStore, is_store, open_store, received_folder, verify_store
from forge_lib.errors import UserError

OFFSETS = st.lists(st.integers(0, 6) | st.integers(0, 2**64 - 1), min_size=1, max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FACTS = ["format_version", "dtype", "num_tokens", "num_documents", "num_text_bytes", "tokenizer", "files"]
FACTS += ["files/tokens.bin", "files/tokens.bin/bytes", "files/documents.bin/sha256", "tokenizer/vocab_size"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> TokenStore:
    """A store that tests copy, change and put back."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "x.txt").write_text("one two three\n\nfour")
    config = DataConfig(dataset_path=str(folder / "x.txt"), sample_by="paragraph")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2")
    return corpus.prepare_store(config, tokenizer, folder / "store", lambda state: None)


def copy(store, folder, offsets=None) -> TokenStore:
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
    return open_store(folder)


def test_a_damaged_store_is_named(tmp_path, small):
    copy(small, tmp_path / "store")
    os.truncate(tmp_path / "store" / "tokens.bin", 2)
    with pytest.raises(UserError, match=r"tokens\.bin has 2 bytes, its manifest says"):
        open_store(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format 99"):
        open_store(tmp_path / "store")


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
def test_verifying_a_store_names_the_file_with_a_flipped_bit(tmp_path, small, name):
    store = copy(small, tmp_path / "store")
    said = []
    verify_store(store, said.append)
    assert said[-1] == "verifying the token store: 100 %"
    data = bytearray((store.folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (store.folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is damaged: its sha256 .*make the store again"):
        verify_store(store)


@given(offsets=OFFSETS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_store_verifies_exactly_if_its_documents_follow_each_other_from_the_first_token_to_the_last(
    tmp_path, small, offsets, monkeypatch
):
    monkeypatch.setattr("forge_lib.token_store.OFFSETS_READ", 2)
    num_tokens = small.manifest["num_tokens"]
    right = offsets[0] == 0 and offsets[-1] == num_tokens and sorted(offsets) == offsets
    store = copy(small, tmp_path / "store", offsets)
    if right:
        verify_store(store)
    else:
        with pytest.raises(UserError, match=r"documents\.bin: .* token|documents\.bin: entry"):
            verify_store(store)


@pytest.mark.parametrize("offsets", [[0, 3, 3, None], [0, None], [0, 1, 1, 2, None]])
def test_empty_documents_and_offsets_that_do_not_decrease_are_right(tmp_path, small, offsets):
    offsets = [small.manifest["num_tokens"] if each is None else each for each in offsets]
    verify_store(copy(small, tmp_path / "store", offsets))


@given(where=st.sampled_from(FACTS), value=JSON)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_hostile_manifest_is_an_error_of_report_errors_or_a_store_that_fits(tmp_path, small, where, value):
    store = copy(small, tmp_path / "store")
    manifest = json.loads(json.dumps(small.manifest))
    *outer, last = where.split("/")
    inner = manifest
    for key in outer:
        inner = inner[key]
    inner[last] = value
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        opened = open_store(store.folder)
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
        open_store(store.folder)


def test_a_pipe_in_place_of_a_file_is_refused_and_a_link_to_a_file_is_read(tmp_path, small):
    store = copy(small, tmp_path / "store")
    (store.folder / "tokens.bin").rename(tmp_path / "elsewhere")
    os.mkfifo(store.folder / "tokens.bin")
    with pytest.raises(UserError, match=r"tokens\.bin has 0 bytes"):
        open_store(store.folder)
    (store.folder / "tokens.bin").unlink()
    (store.folder / "tokens.bin").symlink_to(tmp_path / "elsewhere")
    assert open_store(store.folder).fingerprint == small.fingerprint


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


def test_checking_that_nothing_has_changed_reads_no_file_and_a_change_is_hashed_once(tmp_path, small, monkeypatch):
    store = copy(small, tmp_path / "store")
    hashed = []
    sha256 = disk.sha256
    monkeypatch.setattr(disk, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    store.check_unchanged()
    assert not hashed
    os.utime(store.folder / "documents.bin", ns=(1, 1))
    for _ in range(3):
        store.check_unchanged()
    assert hashed == ["documents.bin"]


def test_a_home_folder_by_its_short_name_is_found(small, monkeypatch):
    monkeypatch.setenv("HOME", str(small.folder.parent))
    assert is_store("~/store")
    assert open_store("~/store").fingerprint == small.fingerprint


def test_a_store_from_a_peer_has_its_place_in_the_cache_and_a_hostile_fingerprint_has_none(small):
    assert received_folder(small.fingerprint).name == f"received-{small.fingerprint[:16]}"
    for wrong in ("../../../../etc/passwd", "", "A" * 64, small.fingerprint + "\n"):
        with pytest.raises(UserError, match="no fingerprint"):
            received_folder(wrong)
