"""The lock on a run folder."""

import json
import subprocess
import sys

import pytest

from forge_lib.distributed.lock import RunLock
from forge_lib.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from forge_lib.distributed.lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.acquire("one")
    lock.set_step(7)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds the lock on `tmp_path`, for the run "one"."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_in_use_is_refused_until_its_holder_is_dead(tmp_path, holder):
    with (
        RunLock(tmp_path) as lock,
        pytest.raises(UserError, match=f"in use by another run .process {holder.pid}"),
    ):
        lock.acquire("two")
    assert json.loads((tmp_path / "run.lock").read_text())["step"] == 7, "the refused run leaves the file as it is"
    holder.kill()
    holder.wait()
    with RunLock(tmp_path) as lock:
        lock.acquire("two")
        assert lock.held


def test_a_run_waits_for_the_last_save_of_a_dead_holder(tmp_path, holder):
    """A forked child survives the run and keeps the lock until the save is on disk."""
    program = HOLDER.replace("time.sleep(60)", "os.fork() or time.sleep(3) or os._exit(0)\n    time.sleep(60)")
    (tmp_path / "run").mkdir()
    stopped = subprocess.Popen([sys.executable, "-c", f"import os{program}", tmp_path / "run"], stdout=subprocess.PIPE)
    assert stopped.stdout.readline() == b"held\n"
    stopped.kill()
    stopped.wait()
    with RunLock(tmp_path / "run") as lock:
        lock.acquire("two")
        assert lock.held


def test_of_two_machines_that_share_a_folder_one_holds_the_lock(tmp_path, holder):
    with RunLock(tmp_path) as lock:
        lock.acquire("one")
        assert not lock.held
        lock.set_step(8)
    assert json.loads((tmp_path / "run.lock").read_text())["step"] == 7


def test_a_folder_in_use_on_this_machine_is_not_free(tmp_path, holder):
    with pytest.raises(UserError, match=f"in use by another run .process {holder.pid}"):
        RunLock(tmp_path).check_free()
    holder.kill()
    holder.wait()
    RunLock(tmp_path).check_free()


@pytest.mark.parametrize("text", ["", "not JSON", "[]", '{"unknown": 1}'])
def test_a_damaged_lock_file_does_not_keep_a_run_out(tmp_path, text):
    (tmp_path / "run.lock").write_text(text)
    RunLock(tmp_path).check_free()
    with RunLock(tmp_path) as lock:
        lock.acquire("two")
        assert lock.held
