"""Which checkpoint a run continues from."""

import pytest
from checkpoint_helpers import RUN, find, names, number, snapshot, write

from forge_lib.checkpoints import restore
from forge_lib.errors import UserError


def test_another_run_is_named_with_both_values(tmp_path):
    write(tmp_path, 1, 2)
    now = RUN | {"batch_size": 16, "seed": 0}
    found = restore.find(tmp_path, "auto", now)
    assert found.path is None and found.skipped == []
    assert found.foreign == [
        f"checkpoint {number(n)} belongs to another run: batch_size was 8 and is now 16; seed was None and is now 0"
        for n in (2, 1)
    ]
    with pytest.raises(UserError, match="belongs to another run: batch_size was 8 and is now 16"):
        restore.find(tmp_path, str(tmp_path / number(2)), now)


def test_a_step_of_nine_digits_is_newer_than_one_of_eight(tmp_path):
    write(tmp_path, 99_999_999, 100_000_000)
    assert find(tmp_path).step == 100_000_000


def test_the_checkpoint_of_a_path_is_found_and_a_path_that_does_not_exist_is_no_error(tmp_path):
    write(tmp_path, 1, 2)
    assert find(tmp_path, str(tmp_path / number(1))).step == 1
    assert find(tmp_path, str(tmp_path / number(5))) == restore.Found()


def test_never_refuses_a_folder_that_has_a_checkpoint(tmp_path):
    assert find(tmp_path, "never") == restore.Found()
    write(tmp_path, 1)
    with pytest.raises(UserError, match=r"--resume never, but .* has step-00000001"):
        find(tmp_path, "never")


def test_a_checkpoint_that_is_set_aside_is_kept_and_not_found(tmp_path):
    for _ in range(2):
        write(tmp_path, 1, 2, 3)
        aside = restore.set_aside(tmp_path, newer_than=1)
        assert find(tmp_path).step == 1 and find(tmp_path).skipped == []
    assert aside == [f"aside-{number(2)}-2", f"aside-{number(3)}-2"]
    assert names(tmp_path) == sorted([number(1), *aside, *(name.removesuffix("-2") for name in aside)])


def test_an_adopted_checkpoint_is_a_copy_that_replaces_one_of_the_same_step(tmp_path):
    write(tmp_path / "theirs", 1, 2)
    write(tmp_path / "run", 2)
    before = snapshot(tmp_path / "theirs")
    for _ in range(2):  # the second time it is already there
        restore.adopt(tmp_path / "theirs" / number(2), tmp_path / "run", 2)
    restore.adopt(tmp_path / "run" / number(2), tmp_path / "run", 2)
    assert names(tmp_path / "run") == [number(2)]
    assert find(tmp_path / "run").sha256 == find(tmp_path / "theirs").sha256
    assert snapshot(tmp_path / "theirs") == before
