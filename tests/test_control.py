"""How a run is told to stop, and the lock on its folder."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time

import pytest
from conftest import BIN, QUIET, ROOT, SHORT, processes, rows

from forge_lib import checkpoint, control
from forge_lib.config import UserError

HOLDER = """
import sys, time
from pathlib import Path
from forge_lib.control import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.take("one")
    lock.at(7)
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
        control.RunLock(tmp_path) as lock,
        pytest.raises(UserError, match=f"in use by another run .process {holder.pid}"),
    ):
        lock.take("two")
    assert json.loads((tmp_path / "run.lock").read_text())["step"] == 7, "what the holder says stays"
    holder.kill()
    holder.wait()
    with control.RunLock(tmp_path) as lock:
        lock.take("two")
        assert lock.held


def test_the_last_save_of_a_dead_holder_is_waited_for(tmp_path, holder):
    """A forked child that outlives the run holds the lock on, until the save is on disk."""
    program = HOLDER.replace("time.sleep(60)", "os.fork() or time.sleep(3) or os._exit(0)\n    time.sleep(60)")
    (tmp_path / "run").mkdir()
    stopped = subprocess.Popen([sys.executable, "-c", f"import os{program}", tmp_path / "run"], stdout=subprocess.PIPE)
    assert stopped.stdout.readline() == b"held\n"
    stopped.kill()
    stopped.wait()
    with control.RunLock(tmp_path / "run") as lock:
        lock.take("two")
        assert lock.held


def test_a_folder_that_two_machines_of_a_run_share_is_held_by_one(tmp_path, holder):
    with control.RunLock(tmp_path) as lock:
        lock.take("one")
        assert not lock.held
        lock.at(8)
    assert json.loads((tmp_path / "run.lock").read_text())["step"] == 7


def test_a_signal_ends_a_run_that_has_not_begun_and_is_noted_afterwards(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="SIGTERM before"), control.StopRequest(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    with control.StopRequest(KeyboardInterrupt) as stop:
        stop.defer(tmp_path)
        assert stop.reason() == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason().startswith("SIGTERM on ")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_stop_file_is_found_and_an_old_one_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "LOOK_SECONDS", 0)
    (tmp_path / "stop").touch()
    with control.StopRequest(KeyboardInterrupt) as stop:
        stop.defer(tmp_path)
        assert stop.reason() == ""
        (tmp_path / "stop").touch()
        assert "stop on " in stop.reason()
        stop.done()
    assert not (tmp_path / "stop").exists()


def test_a_second_ctrl_c_ends_the_process_at_once():
    program = (
        "import os, signal, time; from forge_lib.control import StopRequest\n"
        "with StopRequest(KeyboardInterrupt) as stop:\n"
        "    stop.defer(None)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=50).returncode == 130


@pytest.mark.parametrize(
    ("launcher", "how"),
    [("forge", "closed terminal"), ("accelerate", "closed terminal"), ("forge", "Ctrl-C for a pipe")],
)
def test_a_run_whose_output_nobody_reads_any_more_is_saved(launcher, how, tmp_path, free_port):
    """A window that is closed sends SIGHUP; Ctrl-C before a `| tee log` ends `tee` too."""
    words = [BIN / "p2p-llm-forge", "--processes-per-node", 2, "--master-port", free_port]
    if launcher == "accelerate":
        words = [*processes(tmp_path, free_port, num_processes=2), "scripts/train.py"]
    words += [*SHORT, *QUIET, "--max-steps", 9999, "--device", "cpu", "--output-dir", tmp_path / "run"]
    reading, writing = pty.openpty() if how == "closed terminal" else os.pipe()

    def take_terminal() -> None:
        if how == "closed terminal":
            fcntl.ioctl(writing, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [*map(str, words)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=writing,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(writing)
    try:
        output = b""
        while b"step 5/" not in output:
            read = os.read(reading, 1 << 16)
            assert read, output
            output += read
        os.close(reading)
        if how != "closed terminal":
            os.killpg(process.pid, signal.SIGINT)
        code = process.wait(60)
        assert code == 0 or launcher == "accelerate"  # its launcher reports a signal to itself as a failure
    finally:
        process.kill()  # and all that it has started, where it lives
    saved, stopped = rows(tmp_path / "run", "event")[-2:]
    assert (saved["event"], stopped["event"]) == ("checkpoint", "stop")
    assert checkpoint.verify(tmp_path / "run" / "checkpoints" / f"step-{saved['step']:08d}") is None


def test_output_that_is_lost_costs_nothing_else():
    """The reader goes, then the disk is full; each later line is as good as written."""
    program = (
        "import os, sys; from forge_lib.control import lasting_output\n"
        "with lasting_output():\n"
        "    print('one', flush=True); sys.stdin.readline()\n"
        "    for _ in range(3): print('two' * 9999, flush=True)\n"
        "    os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
        "    for _ in range(3): print('three', file=sys.stderr, flush=True)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)
    assert process.stdout.readline() == "one\n"
    process.stdout.close()
    process.stdin.close()
    assert process.wait(50) == 0
