"""Saves: nothing complete is lost, whatever happens to the process and the disk."""

import copy
import ctypes
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import traceback
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from checkpoint_helpers import FILES, RUN, find, names, number, step, trained_model, untrained_model, write

from forge_lib.checkpoints import format as checkpoint
from forge_lib.checkpoints import saver as saver_module
from forge_lib.checkpoints.saver import Saver, copy_tensors, sweep


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


def delay_the_copy(monkeypatch, seconds: float = 0.2) -> None:
    """Lets the copy in memory begin only after so many seconds: the tensors must not change before."""

    def slow_copy(*args):
        time.sleep(seconds)
        return copy_tensors(*args)

    monkeypatch.setattr(saver_module, "copy_tensors", slow_copy)


@pytest.fixture
def accelerator():
    """An accelerator on the CPU; accelerate's global state is reset afterwards."""
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("prepared_first", [False, True], ids=["attached, then prepared", "prepared, then attached"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_no_step_changes_the_weights_before_a_save_has_copied_them(
    tmp_path, monkeypatch, accelerator, name, prepared_first
):
    delay_the_copy(monkeypatch)
    model, optimizers = trained_model(name)
    saver = Saver(tmp_path, keep=1)
    if not prepared_first:
        saver.attach(optimizers)
    prepared = [accelerator.prepare(optimizer) for optimizer in optimizers]
    if prepared_first:
        saver.attach(prepared)
    now = copy.deepcopy([model.state_dict(), *(optimizer.state_dict()["state"] for optimizer in prepared)])
    saver.save(2, model, prepared, {"run": RUN})
    step(model, prepared)  # the loop calls nothing of the saver
    saver.wait()
    other, others = untrained_model(name)
    checkpoint.load(find(tmp_path).path, other, others)
    saved = [other.state_dict(), *(optimizer.state_dict()["state"] for optimizer in others)]
    torch.testing.assert_close(saved, now, rtol=0, atol=0)
    assert not torch.equal(model.state_dict()["0.weight"], now[0]["0.weight"])


def test_a_background_save_holds_the_state_at_the_call(tmp_path, monkeypatch):
    delay_the_copy(monkeypatch)
    model, optimizers = trained_model()
    saver = Saver(tmp_path, keep=1)
    state = {"run": dict(RUN)}
    saver.save(2, model, optimizers, state)
    state["run"]["data"] = "y"
    saver.wait()
    assert checkpoint.load(find(tmp_path).path, *untrained_model())["run"] == RUN
    (outcome,) = saver.outcomes()
    assert outcome.path == tmp_path / number(2) and not outcome.error
    assert saver.outcomes() == []


def test_too_little_memory_for_the_copy_costs_one_checkpoint_and_no_more(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't allocate memory")

    model, optimizers = trained_model()
    saver = Saver(tmp_path, keep=9)
    for done in (1, 2, 3):
        with monkeypatch.context() as patch:
            if done == 2:
                patch.setattr(saver_module, "copy_tensors", refuse)
            saver.save(done, model, optimizers, {"run": RUN})
            saver.wait_for_copy()
            saver.wait()
    saver.save_surviving(4, model, optimizers, {"run": RUN})
    assert names(tmp_path) == [number(1), number(3), number(4)]
    errors = [outcome.error for outcome in saver.outcomes()]
    assert "can't allocate memory" in errors.pop(1) and not any(errors)


def test_background_saves_reuse_their_memory_and_follow_each_other(tmp_path):
    model, optimizers = trained_model()
    saver = Saver(tmp_path, keep=9)
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
    assert len(sweep(tmp_path)) == 5
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
        Saver(folder, keep=2, background=False).save(3, model, optimizers, {"run": RUN, "new": True})

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
            sweep(folder)
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
            saver = Saver(tmp_path, keep=2)
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
        sweep(tmp_path)
        found = find(tmp_path)
        assert found.passed_over == [] and found.step - newest in (0, 1)  # renamed, and killed before it said so
        newest = found.step
    assert torn > 5
    checkpoint.load(found.path, model, optimizers)


def test_the_last_save_outlives_the_processes_around_it(tmp_path, monkeypatch):
    write_checkpoint = checkpoint.write

    def slowly(*args):
        (tmp_path / "begun").touch()
        time.sleep(0.5)
        return write_checkpoint(*args)

    monkeypatch.setattr(checkpoint, "write", slowly)
    model, optimizers = trained_model()

    def save() -> None:
        os.setpgid(0, 0)
        Saver(tmp_path / "c", keep=1).save_surviving(2, model, optimizers, {"run": RUN})

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
    saver = Saver(tmp_path / "c", keep=1)
    saver.save(1, model, optimizers, {"run": RUN})
    saver.save_surviving(2, model, optimizers, {"run": RUN})
    (tmp_path / "file").touch()
    blocked = Saver(tmp_path / "file", keep=1)
    blocked.save_surviving(3, model, optimizers, {"run": RUN})
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
        saver = Saver(folder, keep=9, background=background)
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
        saver = Saver(folder, keep=1)
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
    saver = Saver(tmp_path / "run" / "checkpoints", keep=1)
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
    saver = Saver(tmp_path, keep=1, background=False)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    saver.save(2, model, optimizers, {"run": RUN})
    (outcome,) = saver.outcomes()
    assert outcome.path == tmp_path / number(2) and "older ones could not be deleted" in outcome.error
