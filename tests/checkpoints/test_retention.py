"""Which checkpoints are kept, and what an interrupted save leaves."""

import shutil

import pytest
from checkpoint_helpers import RUN, find, names, number, trained_model, write

from forge_lib import disk
from forge_lib.checkpoints.retention import sweep
from forge_lib.checkpoints.saver import Saver


def test_only_the_newest_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 3, keep=2)
    assert names(tmp_path) == [number(2), number(3)]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 6: 1.5}
    write(tmp_path, 1, 2, 3, 4, 5, 6, keep=1, keep_best=True, losses=losses)
    assert names(tmp_path) == [number(2), number(6)]


def test_a_new_checkpoint_is_kept_beside_a_damaged_newer_one(tmp_path):
    """The run resumed from step 1, because step 3 is damaged, and writes step 2: that one must stay."""
    write(tmp_path, 1, 3)
    (tmp_path / number(3) / "state.json").unlink()
    write(tmp_path, 2, keep=1)
    assert find(tmp_path).step == 2
    assert names(tmp_path) == [number(2), number(3)]


def test_old_checkpoints_that_cannot_be_deleted_are_reported_with_the_new_one(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    write(tmp_path, 1)
    model, optimizers = trained_model()
    saver = Saver(tmp_path, keep=1, background=False)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    saver.save(2, model, optimizers, {"run": RUN})
    (outcome,) = saver.outcomes()
    assert outcome.path == tmp_path / number(2) and "older checkpoints could not be deleted" in outcome.error


def test_what_interrupted_saves_leave_is_removed_or_restored(tmp_path):
    write(tmp_path, 1, 2)
    for name in (".partial-step-00000003", ".deleted-step-00000000", f".replaced-{number(1)}"):
        shutil.copytree(tmp_path / number(1), tmp_path / name)
    (tmp_path / number(2)).rename(tmp_path / f".replaced-{number(2)}")
    (tmp_path / ".partial-link").symlink_to(tmp_path / number(1))
    assert sorted(line.partition(",")[0].partition(":")[0] for line in sweep(tmp_path)) == [
        "removed .deleted-step-00000000",
        "removed .partial-link",
        "removed .partial-step-00000003",
        f"removed .replaced-{number(1)}",
        f"restored checkpoint {number(2)}",
    ]
    assert names(tmp_path) == [number(1), number(2)]
    assert find(tmp_path).step == 2


def test_an_unfinished_transfer_is_not_removed(tmp_path):
    (tmp_path / ".partial-step-00000003").mkdir()
    (tmp_path / ".partial-step-00000003" / disk.LIST_NAME).touch()
    assert sweep(tmp_path) == []
    assert names(tmp_path) == [".partial-step-00000003"]


@pytest.mark.parametrize("left", [".partial-step-00000003", f".replaced-{number(2)}"])
def test_the_next_save_removes_what_is_left_of_an_interrupted_one(tmp_path, left):
    write(tmp_path, 1)
    shutil.copytree(tmp_path / number(1), tmp_path / left)
    write(tmp_path, 2)
    assert names(tmp_path) == [number(1), number(2)]
