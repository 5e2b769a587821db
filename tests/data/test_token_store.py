"""Token stores that are damaged, hostile, or changed while they are read."""

import hashlib
import json
import os
import runpy
from pathlib import Path

import datasets
import numpy as np
import pytest
from commands import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from forge_lib import disk
from forge_lib.config import DataConfig
from forge_lib.data.corpus import prepare_store
from forge_lib.data.token_store import (
    TokenStore,
    is_store,
    open_store,
    received_folder,
    stores_folder,
    verify_store,
)
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
    """A store that tests copy and change."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "x.txt").write_text("one two three\n\nfour")
    config = DataConfig(dataset_path=str(folder / "x.txt"), sample_by="paragraph")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_gpt2")
    return prepare_store(config, tokenizer, folder / "store")


def copy(store, folder, offsets=None) -> TokenStore:
    """Returns a copy of a store; with `offsets`, its documents start there and its manifest has their hash."""
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


def test_a_damaged_store_is_reported(tmp_path, small):
    copy(small, tmp_path / "store")
    os.truncate(tmp_path / "store" / "tokens.bin", 2)
    with pytest.raises(UserError, match=r"tokens\.bin has 2 bytes, but its manifest says"):
        open_store(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format 99"):
        open_store(tmp_path / "store")


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
def test_verify_store_names_the_file_with_a_flipped_bit(tmp_path, small, name):
    store = copy(small, tmp_path / "store")
    lines = []
    verify_store(store, lines.append)
    assert lines[-1] == "verifying the token store: 100 %"
    data = bytearray((store.folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (store.folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is damaged: its sha256 .*make the store again"):
        verify_store(store)


@given(offsets=OFFSETS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_store_is_verified_exactly_if_its_documents_cover_its_tokens_in_order(tmp_path, small, offsets, monkeypatch):
    monkeypatch.setattr("forge_lib.data.token_store.OFFSETS_READ", 2)
    num_tokens = small.manifest["num_tokens"]
    is_right = offsets[0] == 0 and offsets[-1] == num_tokens and sorted(offsets) == offsets
    store = copy(small, tmp_path / "store", offsets)
    if is_right:
        verify_store(store)
    else:
        with pytest.raises(UserError, match=r"documents\.bin: .* token|documents\.bin: entry"):
            verify_store(store)


@pytest.mark.parametrize("offsets", [[0, 3, 3, None], [0, None], [0, 1, 1, 2, None]])
def test_empty_documents_are_verified(tmp_path, small, offsets):
    offsets = [small.manifest["num_tokens"] if each is None else each for each in offsets]
    verify_store(copy(small, tmp_path / "store", offsets))


@given(where=st.sampled_from(FACTS), value=JSON)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_hostile_manifest_gives_a_user_error_or_a_store_with_the_same_content(tmp_path, small, where, value):
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
def test_a_manifest_that_this_program_cannot_have_written_is_damaged(tmp_path, small, content):
    store = copy(small, tmp_path / "store")
    (store.folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_store(store.folder)


def test_a_pipe_instead_of_a_file_is_refused_and_a_link_to_a_file_is_read(tmp_path, small):
    store = copy(small, tmp_path / "store")
    (store.folder / "tokens.bin").rename(tmp_path / "elsewhere")
    os.mkfifo(store.folder / "tokens.bin")
    with pytest.raises(UserError, match=r"tokens\.bin has 0 bytes"):
        open_store(store.folder)
    (store.folder / "tokens.bin").unlink()
    (store.folder / "tokens.bin").symlink_to(tmp_path / "elsewhere")
    assert open_store(store.folder).fingerprint == small.fingerprint


def test_a_store_that_changes_while_it_is_read_is_reported_and_a_touched_one_is_not(tmp_path, small):
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
        UserError, match=rf"was truncated .*continues from its last checkpoint \(2 bytes, .* {len(right)}"
    ):
        store.check_unchanged()
    path.unlink()
    with pytest.raises(UserError, match=r"tokens\.bin was removed"):
        store.check_unchanged()


def test_check_unchanged_reads_no_file_and_hashes_a_touched_one_once(tmp_path, small, monkeypatch):
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


def test_a_path_that_starts_with_a_tilde_is_found(small, monkeypatch):
    monkeypatch.setenv("HOME", str(small.folder.parent))
    assert is_store("~/store")
    assert open_store("~/store").fingerprint == small.fingerprint


def test_a_received_store_is_written_into_the_cache_and_a_hostile_fingerprint_is_refused(small):
    assert received_folder(small.fingerprint).name == f"received-{small.fingerprint[:16]}"
    for wrong in ("../../../../etc/passwd", "", "A" * 64, small.fingerprint + "\n"):
        with pytest.raises(UserError, match="not the fingerprint"):
            received_folder(wrong)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"XDG_CACHE_HOME": "/caches"},
        {"HF_HOME": "~/hub", "XDG_CACHE_HOME": "/caches"},
        {"HF_HOME": "$HOME/hub"},
        {"HF_HOME": "/hub", "HF_DATASETS_CACHE": "~/data/$HOME"},
    ],
)
def test_stores_are_in_the_cache_folder_of_datasets(monkeypatch, environment):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expected = runpy.run_path(datasets.config.__file__, run_name="datasets.config")["HF_DATASETS_CACHE"]
    assert stores_folder() == Path(expected) / "token_stores"
