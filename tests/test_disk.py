"""A folder gets its name whole, whatever happens meanwhile."""

import os
import shutil
from pathlib import Path

import pytest

from forge_lib import disk

OPERATIONS = ["rename 1", "fsync 1", "fsync 2", "rename 2", "rmtree 1"]


class PowerCut(BaseException):
    """Nothing of this process happens any more."""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of two files that is to be replaced by another one."""
    for path, text in ((tmp_path / "folder", "old"), (tmp_path / ".partial-folder", "new")):
        path.mkdir()
        (path / "a").write_text(text)
        (path / "b").write_text(text)
    return tmp_path / "folder"


def fail_at(patch: pytest.MonkeyPatch, operation: str, error: BaseException) -> None:
    """Has the n-th of such operations raise."""
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
def test_a_power_cut_leaves_the_old_folder_or_the_new_one_and_nothing_else_that_stays(folder, operation):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        fail_at(patch, operation, PowerCut())
        disk.place(folder)
    disk.restore(folder)
    assert content(folder) == {"new" if operation in ("fsync 2", "rmtree 1") else "old"}
    assert {path.name for path in folder.parent.iterdir()} <= {"folder", ".partial-folder"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_disk_that_refuses_leaves_the_folder_that_was_there_or_has_the_new_one(folder, operation):
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, operation, OSError(28, "No space left on device"))
        try:
            disk.place(folder)
        except OSError:
            assert content(folder) == {"new" if operation == "fsync 2" else "old"}
        else:
            assert operation == "rmtree 1" and content(folder) == {"new"}


def test_what_lies_under_the_partial_name_is_the_folder_afterwards(folder):
    before = os.stat(disk.partial_path(folder)).st_ino
    disk.place(folder)
    assert os.stat(folder).st_ino == before
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
