"""A damaged or hostile checkpoint is refused with a message that names the file; nothing in it is executed."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from checkpoint_helpers import FILES, find, number, snapshot, untrained_model, write
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_lib import disk
from forge_lib.checkpoints import restore
from forge_lib.checkpoints.verify import verify
from forge_lib.errors import UserError


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """A folder with the checkpoints of steps 1 and 2, to be copied."""
    folder = tmp_path_factory.mktemp("original")
    write(folder, 1, 2)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    return shutil.copytree(original, tmp_path / "checkpoints")


@pytest.fixture(scope="module")
def single(original, tmp_path_factory) -> Path:
    """A folder with the checkpoint of step 1, shared by the examples of all property tests."""
    folder = tmp_path_factory.mktemp("around") / "checkpoints"
    shutil.copytree(original / number(1), folder / number(1))
    return folder


def damage(path: Path, how: str, other: Path) -> None:
    if how == "bit flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "truncated":
        os.truncate(path, path.stat().st_size - 3)
    elif how == "zero-filled":
        path.write_bytes(bytes(path.stat().st_size))
    elif how == "removed":
        path.unlink()
    else:
        shutil.copy(other, path)


def forge(path: Path, name: str, content: bytes) -> None:
    """Replaces a file of a checkpoint and lists the new one in the manifest."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal(path, manifest)


def seal(path: Path, manifest: dict) -> None:
    """Writes a manifest with its correct sha256."""
    text = json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True, separators=(",", ":"))
    manifest = {**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


# Damage


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["bit flipped", "truncated", "zero-filled", "removed", "swapped"])
def test_a_damaged_checkpoint_is_skipped_with_a_message_and_the_older_one_is_used(folder, file, how):
    path = folder / number(2)
    damage(path / file, how, other=folder / number(1) / file)
    found = find(folder)
    assert found.path == folder / number(1) and found.step == 1
    assert f"checkpoint {number(2)} is skipped: " in found.skipped[0]
    assert file in verify(path)
    with pytest.raises(UserError, match=f"--resume .*{number(2)}: "):
        find(folder, str(path))


def test_every_flipped_bit_of_a_manifest_is_noticed(folder):
    path = folder / number(1) / "manifest.json"
    data = path.read_bytes()
    for position in range(len(data) - 1):  # the last byte is the line break
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        assert verify(path.parent), f"byte {position}"


def test_a_later_format_an_empty_folder_and_a_file_are_skipped_with_the_reason(folder):
    manifest = json.loads((folder / number(2) / "manifest.json").read_text())
    seal(folder / number(2), manifest | {"format_version": 3})
    (folder / number(3)).mkdir()
    (folder / number(4)).touch()
    found = find(folder)
    assert found.step == 1
    assert found.skipped == [
        f"checkpoint {number(4)} is skipped: not a folder",
        f"checkpoint {number(3)} is skipped: incomplete: it has no manifest.json",
        f"checkpoint {number(2)} is skipped: its format version 3 is newer than 2, the newest known here",
    ]


def test_a_checkpoint_under_the_name_of_another_step_is_skipped(folder):
    shutil.rmtree(folder / number(2))
    shutil.copytree(folder / number(1), folder / number(7))
    found = find(folder)
    assert found.step == 1 and "its state.json is of step 1" in found.skipped[0]


# Hostile JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from([*FILES, "../state.json", "/etc/passwd", "..", ".", "", "a/b", "model.safetensors\0"])
FACTS = JSON | st.fixed_dictionaries(
    {"bytes": JSON | st.integers(0, 999), "sha256": JSON | st.text("0123456789abcdef", min_size=64, max_size=64)}
)
MANIFEST = JSON | st.fixed_dictionaries(
    {"format_version": st.sampled_from([1, 2]) | JSON, "files": st.dictionaries(NAMES, FACTS, max_size=5) | JSON},
    optional={"sha256": JSON},
)


@settings(max_examples=200, deadline=None)
@given(content=MANIFEST, sealed=st.booleans())
def test_only_the_original_manifest_is_accepted(single, content, sealed):
    path = single / number(1)
    if sealed and isinstance(content, dict):
        seal(path, content)
    else:
        (path / "manifest.json").write_text(json.dumps(content))
    before = snapshot(single.parent)
    assert isinstance(verify(path), str)
    assert len(find(single).skipped) == 1
    assert snapshot(single.parent) == before


@settings(max_examples=100, deadline=None)
@given(content=JSON, run=JSON)
def test_only_a_state_with_step_and_run_is_accepted(original, single, content, run):
    path = single / number(1)
    shutil.copyfile(original / number(1) / "manifest.json", path / "manifest.json")
    forge(path, "state.json", json.dumps(content).encode())
    assert isinstance(verify(path), str)
    forge(path, "state.json", json.dumps({"step": 1, "run": run}).encode())
    found = find(single)
    assert found.path is None and len(found.skipped) + len(found.foreign) == 1


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
@pytest.mark.parametrize("text", ["[" * 1_000_000, "9" * 100_000, "{", "\udcff", '{"step": 1e999}', "[]", ""])
def test_a_file_that_is_not_a_json_object_is_named(folder, file, text):
    content = text.encode(errors="surrogateescape")
    if file == "state.json":
        forge(folder / number(1), file, content)
    else:
        (folder / number(1) / file).write_bytes(content)
    assert file in verify(folder / number(1))


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
def test_json_of_2_gb_is_refused_without_reading_it(folder, file, monkeypatch):
    path = folder / number(1)
    if file == "state.json":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][file]["bytes"] = 2 << 30
        seal(path, manifest)
    os.truncate(path / file, 2 << 30)
    monkeypatch.setattr(disk, "sha256", lambda path: pytest.fail(f"{path} is read"))
    assert verify(path) == f"{file} has 2,147,483,648 bytes, more than 16,777,216"


# Hostile files


@pytest.mark.parametrize("file", FILES)
def test_a_link_is_not_accepted_as_a_file_of_a_checkpoint(folder, file):
    path = folder / number(1) / file
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    assert verify(path.parent) == f"{file} is not a regular file"


def test_a_pipe_is_not_accepted_as_a_file_of_a_checkpoint(folder):
    path = folder / number(1) / "state.json"
    path.unlink()
    os.mkfifo(path)
    assert verify(path.parent) == "state.json is not a regular file"


def test_a_link_is_not_accepted_as_a_checkpoint(folder, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / number(1)).symlink_to(folder / number(1))
    assert find(tmp_path / "here").skipped == [f"checkpoint {number(1)} is skipped: not a folder"]


class Payload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("file", FILES[:2])
def test_a_pickle_is_refused_and_not_executed(folder, tmp_path, file):
    forge(folder / number(2), file, pickle.dumps(Payload(tmp_path / "executed")))
    found = find(folder)
    assert found.step == 1 and f"{file} is not a safetensors file" in found.skipped[0]
    with pytest.raises(UserError, match="cannot be loaded"):
        restore.load(folder / number(2), *untrained_model())
    assert not (tmp_path / "executed").exists()
