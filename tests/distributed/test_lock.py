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
    """Another process that holds the lock on `tmp_path`, for the run "one"."""
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
    assert json.loads((tmp_path / "run.lock").read_text())["step"] == 7, "what the holder says stays"
    holder.kill()
    holder.wait()
    with RunLock(tmp_path) as lock:
        lock.acquire("two")
        assert lock.held


def test_the_last_save_of_a_dead_holder_is_waited_for(tmp_path, holder):
    """A forked child that outlives the run holds the lock on, until the save is on disk."""
    program = HOLDER.replace("time.sleep(60)", "os.fork() or time.sleep(3) or os._exit(0)\n    time.sleep(60)")
    (tmp_path / "run").mkdir()
    stopped = subprocess.Popen([sys.executable, "-c", f"import os{program}", tmp_path / "run"], stdout=subprocess.PIPE)
    assert stopped.stdout.readline() == b"held\n"
    stopped.kill()
    stopped.wait()
    with RunLock(tmp_path / "run") as lock:
        lock.acquire("two")
        assert lock.held


def test_a_folder_that_two_machines_of_a_run_share_is_held_by_one(tmp_path, holder):
    with RunLock(tmp_path) as lock:
        lock.acquire("one")
        assert not lock.held
        lock.set_step(8)
    assert json.loads((tmp_path / "run.lock").read_text())["step"] == 7
