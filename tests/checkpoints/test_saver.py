"""A background save contains the state at its call; a failed save costs one checkpoint and does not end the run."""

import copy
import ctypes
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from checkpoint_helpers import RUN, find, load, names, number, run_forked, step, trained_model

from forge_lib.checkpoints import saver as saver_module
from forge_lib.checkpoints.saver import Saver, copy_tensors


def delay_the_copy(monkeypatch, seconds: float = 0.2) -> None:
    """Makes the copy in memory start only after `seconds`; the tensors must not change before."""

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
    step(model, prepared)  # the loop calls no method of the saver
    saver.wait()
    _, other, others = load(tmp_path, name)
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
    assert load(tmp_path)[0]["run"] == RUN
    (outcome,) = saver.outcomes()
    assert outcome.path == tmp_path / number(2) and not outcome.error
    assert saver.outcomes() == []


def test_background_saves_follow_each_other_and_keep_no_copy(tmp_path):
    model, optimizers = trained_model()
    saver = Saver(tmp_path, keep=9)
    saver.attach(optimizers)
    for done in (1, 2, 3):
        saver.save(done, model, optimizers, {"run": RUN})
        step(model, optimizers)
    saver.wait()
    assert saver._copied is None
    assert [outcome.step for outcome in saver.outcomes()] == [1, 2, 3]
    assert len({(tmp_path / number(done) / "model.safetensors").read_bytes() for done in (1, 2, 3)}) == 3


# Failures


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


def mount_tmpfs(folder: Path, size: str) -> None:
    """Mounts a disk that only this process and its children see."""
    assert ctypes.CDLL(None, use_errno=True).unshare(0x00020000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)


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

    run_forked(check)


@pytest.mark.netns
def test_a_read_only_disk_costs_one_checkpoint_and_no_more(tmp_path):
    def fail(failing: bool) -> None:
        subprocess.run(["mount", "-o", f"remount,{'ro' if failing else 'rw'}", tmp_path], check=True)

    check = saves_around_a_failure(tmp_path, fail, "Read-only file system")
    run_forked(lambda: (mount_tmpfs(tmp_path, "1m"), check()))


def test_a_limit_of_file_sizes_costs_one_checkpoint_and_no_more(tmp_path):
    def fail(failing: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400 if failing else -1, -1))

    run_forked(saves_around_a_failure(tmp_path, fail, "File too large"))


def saves_around_a_failure(folder: Path, fail: Callable[[bool], None], error: str) -> Callable[[], None]:
    """Returns a function that saves before, during and after a failure; checks that only the second save is missing.

    Args:
        fail: makes the disk fail (True), or repairs it (False).
        error: what the message of the failed save must contain.
    """
    model, optimizers = trained_model()

    def check() -> None:
        saver = Saver(folder, keep=1)
        for done, found in ((1, 1), (2, 1), (3, 3)):
            fail(done == 2)
            saver.save(done, model, optimizers, {"run": RUN})
            saver.wait()
            assert find(folder).step == found and names(folder) == [number(found)]
        errors = [outcome.error for outcome in saver.outcomes()]
        assert error in errors.pop(1) and not any(errors)

    return check


def test_a_folder_that_was_deleted_is_created_again(tmp_path):
    model, optimizers = trained_model()
    saver = Saver(tmp_path / "run" / "checkpoints", keep=1)
    for done in (1, 2):
        saver.save(done, model, optimizers, {"run": RUN})
        saver.wait()
        assert find(saver.folder).step == done
        shutil.rmtree(tmp_path / "run")


def test_an_optimizer_whose_state_cannot_be_resumed_is_refused_before_it_trains(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(AssertionError, match="unknown state of SGD: add it here"):
        Saver(tmp_path, keep=1).attach([optimizer])
