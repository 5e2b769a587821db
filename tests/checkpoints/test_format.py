"""Checkpoints: complete or not there at all, whatever happens to the process, the disk and the files."""

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import FILES, RUN, find, names, number, step, trained_model, untrained_model, write
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_lib import disk
from forge_lib.checkpoints import format as checkpoint
from forge_lib.checkpoints.saver import Saver
from forge_lib.errors import UserError


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
    """Replaces a file of a checkpoint, and makes the manifest fit."""
    (path / name).unlink()
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal(path, manifest)


def seal(path: Path, manifest: dict) -> None:
    """Writes a manifest with its right hash."""
    text = json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True, separators=(",", ":"))
    manifest = {**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


# Content


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path, name):
    model, optimizers = trained_model(name)
    saver = Saver(tmp_path, keep=2)
    saver.save(2, model, optimizers, {"run": RUN})
    saver.wait_for_copy()
    step(model, optimizers)
    saver.wait()
    other, other_optimizers = untrained_model(name)
    state = checkpoint.load(find(tmp_path).path, other, other_optimizers)
    assert state == {"step": 2, "run": RUN}
    step(other, other_optimizers)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_two_machines_write_the_same_bytes(tmp_path):
    model, optimizers = trained_model()
    for name, background, state in [("a", True, {"run": RUN, "x": 1}), ("b", False, {"x": 1, "run": RUN})]:
        saver = Saver(tmp_path / name, keep=1, background=background)
        saver.save(1, model, optimizers, state)
        saver.wait()
    for file in FILES:
        assert (tmp_path / "a" / number(1) / file).read_bytes() == (tmp_path / "b" / number(1) / file).read_bytes()
    assert find(tmp_path / "a").sha256 == find(tmp_path / "b").sha256 != ""


def test_what_is_loaded_needs_its_files_no_more(tmp_path):
    model, optimizers = trained_model()
    write(tmp_path, 1)
    checkpoint.load(find(tmp_path).path, model, optimizers)
    for file in FILES[:2]:
        os.truncate(tmp_path / number(1) / file, 0)  # a memory map would end the process here
    step(model, optimizers)


def test_a_checkpoint_of_format_1_still_loads(tmp_path):
    write(tmp_path, 1)
    manifest = json.loads((tmp_path / number(1) / "manifest.json").read_text())
    del manifest["sha256"]
    (tmp_path / number(1) / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    assert checkpoint.load(find(tmp_path).path, *untrained_model())["step"] == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)),
            r"'1.bias' has shape \(2,\), expected \(1",
        ),
        (torch.nn.Sequential(torch.nn.Linear(4, 8)), r"'1.bias' has shape \(2,\), expected nothing"),
        (torch.nn.Sequential(*[torch.nn.Linear(n, m) for n, m in ((4, 8), (8, 2), (2, 1))]), "'2.bias' has .*nothing"),
    ],
)
def test_another_model_is_refused_by_name_and_shape(tmp_path, changed, message):
    write(tmp_path, 1)
    with pytest.raises(UserError, match=f"does not fit the model: {message}"):
        checkpoint.load(find(tmp_path).path, changed, [torch.optim.AdamW(changed.parameters())])


def test_another_optimizer_is_refused(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(UserError, match=r"optimizer\.safetensors does not fit the model"):
        checkpoint.load(find(tmp_path).path, *untrained_model("muon"))


# Finding


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["bit flipped", "truncated", "zero-filled", "removed", "swapped"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_is_taken(tmp_path, file, how):
    write(tmp_path, 1, 2)
    path = tmp_path / number(2)
    damage(path / file, how, other=tmp_path / number(1) / file)
    found = find(tmp_path)
    assert found.path == tmp_path / number(1) and found.step == 1
    assert f"checkpoint {number(2)} is passed over: " in found.passed_over[0]
    assert file in checkpoint.verify(path)
    with pytest.raises(UserError, match=f"--resume .*{number(2)}: "):
        find(tmp_path, str(path))


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path):
    write(tmp_path, 1)
    path = tmp_path / number(1) / "manifest.json"
    data = path.read_bytes()
    for place in range(len(data) - 1):  # but for the line's end
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert checkpoint.verify(path.parent), f"byte {place}"


def test_a_later_format_an_empty_folder_and_a_file_are_named(tmp_path):
    write(tmp_path, 1, 2)
    manifest = json.loads((tmp_path / number(2) / "manifest.json").read_text())
    seal(tmp_path / number(2), manifest | {"format_version": 3})
    (tmp_path / number(3)).mkdir()
    (tmp_path / number(4)).touch()
    found = find(tmp_path)
    assert found.step == 1
    assert found.passed_over == [
        f"checkpoint {number(4)} is passed over: no folder",
        f"checkpoint {number(3)} is passed over: no complete checkpoint (it has no manifest.json)",
        f"checkpoint {number(2)} is passed over: its format 3 is newer than this program's 2",
    ]


def test_a_checkpoint_under_another_step_s_name_is_passed_over(tmp_path):
    write(tmp_path, 1)
    shutil.copytree(tmp_path / number(1), tmp_path / number(7))
    found = find(tmp_path)
    assert found.step == 1 and "its state is that of step 1" in found.passed_over[0]


def test_another_run_is_named_with_both_values(tmp_path):
    write(tmp_path, 1, 2)
    now = RUN | {"batch_size": 16, "seed": 0}
    found = checkpoint.find(tmp_path, "auto", now)
    assert found.path is None and found.passed_over == []
    assert found.foreign == [
        f"checkpoint {number(n)} belongs to another run: batch_size was 8 and is now 16; seed was None and is now 0"
        for n in (2, 1)
    ]
    with pytest.raises(UserError, match="belongs to another run: batch_size was 8 and is now 16"):
        checkpoint.find(tmp_path, str(tmp_path / number(2)), now)


def test_steps_of_nine_digits_are_newer_than_those_of_eight(tmp_path):
    write(tmp_path, 99_999_999, 100_000_000)
    assert find(tmp_path).step == 100_000_000


def test_a_path_is_taken_and_one_that_is_not_here_is_no_mistake(tmp_path):
    write(tmp_path, 1, 2)
    assert find(tmp_path, str(tmp_path / number(1))).step == 1
    assert find(tmp_path, str(tmp_path / number(5))) == checkpoint.Found()


def test_never_refuses_a_folder_that_holds_a_checkpoint(tmp_path):
    assert find(tmp_path, "never") == checkpoint.Found()
    write(tmp_path, 1)
    with pytest.raises(UserError, match=r"--resume never, but .* holds step-00000001"):
        find(tmp_path, "never")


def test_what_is_set_aside_is_kept_and_not_found(tmp_path):
    for _ in range(2):
        write(tmp_path, 1, 2, 3)
        aside = checkpoint.set_aside(tmp_path, newer_than=1)
        assert find(tmp_path).step == 1 and find(tmp_path).passed_over == []
    assert aside == [f"aside-{number(2)}-2", f"aside-{number(3)}-2"]
    assert names(tmp_path) == sorted([number(1), *aside, *(name.removesuffix("-2") for name in aside)])


# Hostile files

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with one checkpoint, to be copied."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder, 1)
    return folder


@settings(max_examples=200, deadline=None)
@given(content=MANIFEST, sealed=st.booleans())
def test_no_manifest_but_the_right_one_is_believed(whole, content, sealed):
    with tempfile.TemporaryDirectory() as around:
        folder = shutil.copytree(whole, Path(around) / "checkpoints")
        if sealed and isinstance(content, dict):
            seal(folder / number(1), content)
        else:
            (folder / number(1) / "manifest.json").write_text(json.dumps(content))
        before = snapshot(Path(around))
        assert isinstance(checkpoint.verify(folder / number(1)), str)
        assert len(find(folder).passed_over) == 1
        assert snapshot(Path(around)) == before


@settings(max_examples=100, deadline=None)
@given(content=JSON, run=JSON)
def test_no_state_is_believed_that_is_none(whole, content, run):
    with tempfile.TemporaryDirectory() as around:
        folder = shutil.copytree(whole, Path(around) / "checkpoints")
        forge(folder / number(1), "state.json", json.dumps(content).encode())
        assert isinstance(checkpoint.verify(folder / number(1)), str)
        forge(folder / number(1), "state.json", json.dumps({"step": 1, "run": run}).encode())
        found = find(folder)
        assert found.path is None and len(found.passed_over) + len(found.foreign) == 1


def snapshot(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
@pytest.mark.parametrize("text", ["[" * 1_000_000, "9" * 100_000, "{", "\udcff", '{"step": 1e999}', "[]", ""])
def test_json_that_is_none_is_named(tmp_path, file, text):
    write(tmp_path, 1)
    content = text.encode(errors="surrogateescape")
    if file == "state.json":
        forge(tmp_path / number(1), file, content)
    else:
        (tmp_path / number(1) / file).write_bytes(content)
    assert file in checkpoint.verify(tmp_path / number(1))


@pytest.mark.parametrize("file", FILES)
def test_a_link_is_no_file_of_a_checkpoint(tmp_path, file):
    write(tmp_path, 1)
    path = tmp_path / number(1) / file
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert checkpoint.verify(path.parent) == f"{file} is no plain file"


def test_a_pipe_is_no_file_of_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    path = tmp_path / number(1) / "state.json"
    path.unlink()
    os.mkfifo(path)
    assert checkpoint.verify(path.parent) == "state.json is no plain file"


def test_a_link_is_no_checkpoint(tmp_path):
    write(tmp_path / "other", 1)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / number(1)).symlink_to(tmp_path / "other" / number(1))
    assert find(tmp_path / "here").passed_over == [f"checkpoint {number(1)} is passed over: no folder"]


def test_a_save_over_a_link_leaves_what_it_points_to(tmp_path):
    write(tmp_path / "other", 1, 2)
    before = snapshot(tmp_path / "other")
    (tmp_path / "here").mkdir()
    for done in (1, 2):
        (tmp_path / "here" / number(done)).symlink_to(tmp_path / "other" / number(done))
    write(tmp_path / "here", 2, keep=1)
    assert names(tmp_path / "here") == [number(2)] and find(tmp_path / "here").step == 2
    assert snapshot(tmp_path / "other") == before


class Payload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("file", FILES[:2])
def test_a_pickle_is_refused_and_not_executed(tmp_path, file):
    write(tmp_path, 1, 2)
    forge(tmp_path / number(2), file, pickle.dumps(Payload(tmp_path / "executed")))
    found = find(tmp_path)
    assert found.step == 1 and f"{file} is no safetensors file" in found.passed_over[0]
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoint.load(tmp_path / number(2), *untrained_model())
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
def test_json_of_2_gb_is_refused_unread(tmp_path, file, monkeypatch):
    write(tmp_path, 1)
    path = tmp_path / number(1)
    if file == "state.json":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][file]["bytes"] = 2 << 30
        seal(path, manifest)
    os.truncate(path / file, 2 << 30)
    monkeypatch.setattr(disk, "sha256", lambda path: pytest.fail(f"{path} is read"))
    assert checkpoint.verify(path) == f"{file} has 2,147,483,648 bytes, more than 16,777,216"
