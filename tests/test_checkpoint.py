"""Checkpoints: complete or not there at all, whatever happens to the process, the disk and the files."""

import copy
import ctypes
import hashlib
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_lib import checkpoint
from forge_lib.config import TrainConfig, UserError
from forge_lib.model import build_optimizers

RUN = {"data": "x", "batch_size": 8}
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def untrained_model(optimizer: str = "adamw") -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    config = TrainConfig(model_name="m", dataset_path="d", output_dir="o", optimizer=optimizer)
    return model, build_optimizers(model, config)


def trained_model(optimizer: str = "adamw") -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    """A small network after two steps."""
    torch.manual_seed(0)
    model, optimizers = untrained_model(optimizer)
    for _ in range(2):
        step(model, optimizers)
    return model, optimizers


def step(model, optimizers) -> None:
    model(torch.ones(3, 4)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def write(folder: Path, *steps: int, keep: int = 9, keep_best: bool = False, losses: dict | None = None) -> None:
    """Saves at each of these steps; the model is another each time."""
    saver = checkpoint.Saver(folder, keep, keep_best, background=False)
    model, optimizers = trained_model()
    for number in steps:
        step(model, optimizers)
        saver.save(number, model, optimizers, {"run": RUN, "eval_loss": (losses or {}).get(number)})
    assert not any(outcome.error for outcome in saver.outcomes())


def find(folder: Path, resume: str = "auto") -> checkpoint.Found:
    return checkpoint.find(folder, resume, RUN)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def number(step: int) -> str:
    return f"step-{step:08d}"


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


def child(work) -> int:
    """Forks a process that does `work()`, and returns its number. Autograd would hang there: train before."""
    if process := os.fork():
        return process
    try:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def in_child(work) -> None:
    """Does `work()` in a forked process, whose limits and mounts are its own; fails where it fails."""
    assert os.waitpid(child(work), 0)[1] == 0


def mount_tmpfs(folder: Path, size: str) -> None:
    """Mounts a disk that only this process and its children see."""
    assert ctypes.CDLL(None, use_errno=True).unshare(0x00020000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)


# Content


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path, name):
    model, optimizers = trained_model(name)
    saver = checkpoint.Saver(tmp_path, keep=2)
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
        saver = checkpoint.Saver(tmp_path / name, keep=1, background=background)
        saver.save(1, model, optimizers, state)
        saver.wait()
    for file in FILES:
        assert (tmp_path / "a" / number(1) / file).read_bytes() == (tmp_path / "b" / number(1) / file).read_bytes()
    assert find(tmp_path / "a").sha256 == find(tmp_path / "b").sha256 != ""


def test_a_background_save_holds_the_moment_of_the_call(tmp_path, monkeypatch):
    begin, copy_tensors = threading.Event(), checkpoint._copy
    monkeypatch.setattr(checkpoint, "_copy", lambda *args: begin.wait() and copy_tensors(*args))
    model, optimizers = trained_model()
    now = copy.deepcopy(model.state_dict())
    saver = checkpoint.Saver(tmp_path, keep=1)
    state = {"run": dict(RUN)}
    saver.save(2, model, optimizers, state)
    state["run"]["data"] = "y"
    threading.Timer(0.2, begin.set).start()
    saver.wait_for_copy()
    for _ in range(20):
        step(model, optimizers)
    saver.wait()
    other, other_optimizers = untrained_model()
    assert checkpoint.load(find(tmp_path).path, other, other_optimizers)["run"] == RUN
    assert all(torch.equal(now[name], value) for name, value in other.state_dict().items())
    (outcome,) = saver.outcomes()
    assert outcome.path == tmp_path / number(2) and not outcome.error
    assert saver.outcomes() == []


def test_too_little_memory_for_the_copy_costs_one_checkpoint_and_no_more(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't allocate memory")

    model, optimizers = trained_model()
    saver = checkpoint.Saver(tmp_path, keep=9)
    for done in (1, 2, 3):
        with monkeypatch.context() as patch:
            if done == 2:
                patch.setattr(checkpoint, "_copy", refuse)
            saver.save(done, model, optimizers, {"run": RUN})
            saver.wait_for_copy()
            saver.wait()
    saver.save_outliving(4, model, optimizers, {"run": RUN})
    assert names(tmp_path) == [number(1), number(3), number(4)]
    errors = [outcome.error for outcome in saver.outcomes()]
    assert "can't allocate memory" in errors.pop(1) and not any(errors)


def test_background_saves_reuse_their_memory_and_follow_each_other(tmp_path):
    model, optimizers = trained_model()
    saver = checkpoint.Saver(tmp_path, keep=9)
    addresses = set()
    for done in (1, 2, 3):
        saver.save(done, model, optimizers, {"run": RUN})
        saver.wait_for_copy()
        addresses.add(saver._copied.result()["model.safetensors"]["0.weight"].data_ptr())
        step(model, optimizers)
    saver.wait()
    assert len(addresses) == 1
    assert [outcome.step for outcome in saver.outcomes()] == [1, 2, 3]
    assert len({(tmp_path / number(done) / "model.safetensors").read_bytes() for done in (1, 2, 3)}) == 3


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


# Retention


def test_only_the_newest_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 3, keep=2)
    assert names(tmp_path) == [number(2), number(3)]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 6: 1.5}
    write(tmp_path, 1, 2, 3, 4, 5, 6, keep=1, keep_best=True, losses=losses)
    assert names(tmp_path) == [number(2), number(6)]


def test_a_new_checkpoint_is_kept_beside_a_damaged_newer_one(tmp_path):
    """Resumed from step 1, since step 3 is damaged, the run writes step 2: that one must stay."""
    write(tmp_path, 1, 3)
    (tmp_path / number(3) / "state.json").unlink()
    write(tmp_path, 2, keep=1)
    assert find(tmp_path).step == 2
    assert names(tmp_path) == [number(2), number(3)]


# Crashes


def test_leftovers_are_swept(tmp_path):
    write(tmp_path, 1, 2)
    for name in (".partial-step-00000003", ".deleted-step-00000000", f".replaced-{number(1)}"):
        shutil.copytree(tmp_path / number(1), tmp_path / name)
    (tmp_path / number(2)).rename(tmp_path / f".replaced-{number(2)}")
    (tmp_path / ".partial-link").symlink_to(tmp_path / number(1))
    assert len(checkpoint.sweep(tmp_path)) == 5
    assert names(tmp_path) == [number(1), number(2)]
    assert find(tmp_path).step == 2


class Fault:
    """Ends this process at the n-th operation on files, before or after it."""

    def __init__(self, at: int, when: str):
        self.at, self.when, self.count = at, when, itertools.count(1)

    def around(self, owner, name: str) -> None:
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            mine = next(self.count) == self.at
            if mine and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*args, **kwargs)
            finally:
                if mine:
                    os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, counted)


def save_with_fault(folder: Path, at: int, when: str) -> bool:
    """Saves step 3 over another of that step, and deletes step 1; True where it was killed."""
    model, optimizers = untrained_model()

    def save() -> None:
        fault = Fault(at, when)
        for name in ("mkdir", "open", "fsync", "rename", "unlink", "rmdir"):
            fault.around(os, name)
        fault.around(checkpoint, "save_file")
        fault.around(Path, "write_bytes")
        checkpoint.Saver(folder, keep=2, background=False).save(3, model, optimizers, {"run": RUN, "new": True})

    return os.WIFSIGNALED(os.waitpid(child(save), 0)[1])


def test_a_save_killed_at_any_file_operation_loses_nothing(tmp_path):
    write(tmp_path / "before", 1, 2, 3)
    model, optimizers = untrained_model()
    killed, torn, at = 0, 0, 0
    while True:
        at += 1
        for when in ("before", "after"):
            folder = tmp_path / "now"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tmp_path / "before", folder)
            ended = not save_with_fault(folder, at, when)
            killed += not ended
            torn += any(path.name.startswith(".") for path in folder.iterdir())
            checkpoint.sweep(folder)
            assert names(folder)[-2:] == [number(2), number(3)], (at, when)
            assert set(names(folder)) <= {number(1), number(2), number(3)}, (at, when)
            for path in folder.iterdir():
                assert checkpoint.verify(path) is None, (at, when)
            assert "new" in checkpoint.load(find(folder).path, model, optimizers) or not ended
        if ended:
            break
    assert killed > 60 and torn > 30


def test_all_is_on_the_disk_before_a_checkpoint_gets_its_name(tmp_path, monkeypatch):
    """Nothing may be renamed or deleted whose successor a power cut could still take."""
    write(tmp_path, 1, 2)
    events = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor):
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_rename(source, target, **kwargs):
        events.append(f"rename {Path(source).name}")
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    write(tmp_path, 2, keep=1)
    assert sorted(events[:4]) == [f"flush {name}" for name in sorted(FILES)]
    assert events[3:] == [
        "flush manifest.json",
        f"flush .partial-{number(2)}",
        f"rename {number(2)}",
        f"rename .partial-{number(2)}",
        f"flush {tmp_path.name}",
        f"rename {number(1)}",
    ]


def test_a_process_killed_at_random_moments_of_its_saves_loses_nothing(tmp_path):
    draw = random.Random(0)
    model = torch.nn.Linear(400, 400)
    optimizers = [torch.optim.AdamW(model.parameters())]
    model(torch.ones(1, 400)).sum().backward()
    optimizers[0].step()
    newest, torn = 0, 0
    for _ in range(50):
        reading, writing = os.pipe()

        def save_for_ever(first: int = newest, pipe: int = writing) -> None:
            saver = checkpoint.Saver(tmp_path, keep=2)
            for done in itertools.count(first):  # the first save is over one that is there
                saver.save(done, model, optimizers, {"run": RUN})
                saver.wait()
                os.write(pipe, b".")

        start = time.monotonic()
        process = child(save_for_ever)
        os.read(reading, 1)
        time.sleep(draw.uniform(0, time.monotonic() - start))  # at some moment of the saves after the first
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(writing)
        with open(reading, "rb") as pipe:
            newest += len(pipe.read())
        torn += any(path.name.startswith(".") for path in tmp_path.iterdir())
        checkpoint.sweep(tmp_path)
        found = find(tmp_path)
        assert found.passed_over == [] and found.step - newest in (0, 1)  # renamed, and killed before it said so
        newest = found.step
    assert torn > 5
    checkpoint.load(found.path, model, optimizers)


def test_the_last_save_outlives_the_processes_around_it(tmp_path, monkeypatch):
    write_checkpoint = checkpoint._write_checkpoint

    def slowly(*args):
        (tmp_path / "begun").touch()
        time.sleep(0.5)
        write_checkpoint(*args)

    monkeypatch.setattr(checkpoint, "_write_checkpoint", slowly)
    model, optimizers = trained_model()

    def save() -> None:
        os.setpgid(0, 0)
        checkpoint.Saver(tmp_path / "c", keep=1).save_outliving(2, model, optimizers, {"run": RUN})

    process = child(save)
    until = time.monotonic() + 20
    while not (tmp_path / "begun").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(process, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    while not find(tmp_path / "c").path and time.monotonic() < until:
        time.sleep(0.05)
    assert checkpoint.load(find(tmp_path / "c").path, *untrained_model())["step"] == 2


def test_a_save_that_outlives_tells_how_it_went(tmp_path):
    model, optimizers = trained_model()
    saver = checkpoint.Saver(tmp_path / "c", keep=1)
    saver.save(1, model, optimizers, {"run": RUN})
    saver.save_outliving(2, model, optimizers, {"run": RUN})
    (tmp_path / "file").touch()
    blocked = checkpoint.Saver(tmp_path / "file", keep=1)
    blocked.save_outliving(3, model, optimizers, {"run": RUN})
    assert [(o.step, o.path, o.error) for o in saver.outcomes()] == [
        (n, tmp_path / "c" / number(n), "") for n in (1, 2)
    ]
    (outcome,) = blocked.outcomes()
    assert outcome.path is None and "File exists" in outcome.error
    assert names(tmp_path / "c") == [number(2)]


# Disks


@pytest.mark.netns
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_costs_one_checkpoint_and_no_more(tmp_path, background):
    model = torch.nn.Linear(100, 250)  # 100 kB
    optimizers = [torch.optim.SGD(model.parameters())]
    folder, filler = tmp_path / "checkpoints", tmp_path / "filler"

    def check() -> None:
        mount_tmpfs(tmp_path, "400k")
        saver = checkpoint.Saver(folder, keep=9, background=background)
        for done in (1, 2, 3, 4):
            if done == 3:
                filler.write_bytes(bytes(150_000))
            saver.save(done, model, optimizers, {"run": RUN})
            saver.wait()
            assert find(folder).step == (2 if done == 3 else done)
            if done == 3:
                assert names(folder) == [number(1), number(2)]
                filler.unlink()
        errors = [outcome.error for outcome in saver.outcomes()]
        assert "No space left on device" in errors.pop(2) and not any(errors)

    in_child(check)


@pytest.mark.netns
def test_a_read_only_disk_costs_one_checkpoint_and_no_more(tmp_path):
    def spoil(spoiled: bool) -> None:
        subprocess.run(["mount", "-o", f"remount,{'ro' if spoiled else 'rw'}", tmp_path], check=True)

    check = save_beside_trouble(tmp_path, spoil, "Read-only file system")
    in_child(lambda: (mount_tmpfs(tmp_path, "1m"), check()))


def test_a_limit_of_file_sizes_costs_one_checkpoint_and_no_more(tmp_path):
    def spoil(spoiled: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400 if spoiled else -1, -1))

    in_child(save_beside_trouble(tmp_path, spoil, "File too large"))


def save_beside_trouble(folder: Path, spoil, error: str):
    """Returns what saves before, in and after trouble, and checks that only the middle one is missing."""
    model, optimizers = trained_model()

    def check() -> None:
        saver = checkpoint.Saver(folder, keep=1)
        for done, found in ((1, 1), (2, 1), (3, 3)):
            spoil(done == 2)
            saver.save(done, model, optimizers, {"run": RUN})
            saver.wait()
            assert find(folder).step == found and names(folder) == [number(found)]
        errors = [outcome.error for outcome in saver.outcomes()]
        assert error in errors.pop(1) and not any(errors)

    return check


def test_a_folder_that_has_vanished_is_made_again(tmp_path):
    model, optimizers = trained_model()
    saver = checkpoint.Saver(tmp_path / "run" / "checkpoints", keep=1)
    for done in (1, 2):
        saver.save(done, model, optimizers, {"run": RUN})
        saver.wait()
        assert find(saver.folder).step == done
        shutil.rmtree(tmp_path / "run")


def test_old_ones_that_cannot_be_deleted_are_reported_with_the_new_one(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    write(tmp_path, 1)
    model, optimizers = trained_model()
    saver = checkpoint.Saver(tmp_path, keep=1, background=False)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    saver.save(2, model, optimizers, {"run": RUN})
    (outcome,) = saver.outcomes()
    assert outcome.path == tmp_path / number(2) and "older ones could not be deleted" in outcome.error


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
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: pytest.fail(f"{path} is read"))
    assert checkpoint.verify(path) == f"{file} has 2,147,483,648 bytes, more than 16,777,216"
