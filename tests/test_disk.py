"""A crash-safe folder is complete under its name: the old one or the new one, whatever fails meanwhile."""

import os
import shutil
from pathlib import Path

import pytest

from forge_lib import disk

OPERATIONS = ["rename 1", "fsync 1", "fsync 2", "rename 2", "rmtree 1"]


class PowerCut(BaseException):
    """Ends the process at this operation."""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of two files, and the partial folder that will replace it."""
    for path, text in ((tmp_path / "folder", "old"), (tmp_path / ".partial-folder", "new")):
        path.mkdir()
        (path / "a").write_text(text)
        (path / "b").write_text(text)
    return tmp_path / "folder"


def fail_at(patch: pytest.MonkeyPatch, operation: str, error: BaseException) -> None:
    """Makes the n-th call of an operation (`rename 2`: the second rename) raise an error."""
    name, number = operation.split()
    owner = shutil if name == "rmtree" else os
    function, count = getattr(owner, name), iter(range(1, 100))

    def failing(*args, **kwargs):
        if next(count) == int(number):
            raise error
        return function(*args, **kwargs)

    patch.setattr(owner, name, failing)


def content(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_power_cut_leaves_the_old_or_the_new_folder_and_restore_removes_the_rest(folder, operation):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        fail_at(patch, operation, PowerCut())
        disk.place(folder)
    disk.restore(folder)
    assert content(folder) == {"new" if operation in ("fsync 2", "rmtree 1") else "old"}
    assert {path.name for path in folder.parent.iterdir()} <= {"folder", ".partial-folder"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_disk_error_leaves_the_old_folder_or_the_new_one(folder, operation):
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, operation, OSError(28, "No space left on device"))
        try:
            disk.place(folder)
        except OSError:
            assert content(folder) == {"new" if operation == "fsync 2" else "old"}
        else:
            assert operation == "rmtree 1" and content(folder) == {"new"}


def test_the_partial_folder_itself_is_renamed_not_copied(folder):
    before = os.stat(disk.partial_path(folder)).st_ino
    disk.place(folder)
    assert os.stat(folder).st_ino == before
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
