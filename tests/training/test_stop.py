"""How a run is asked to stop."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time

import psutil
import pytest
from commands import BIN, QUIET, ROOT, SHORT, accelerate_launcher
from run_folders import rows

from forge_lib.checkpoints.verify import verify
from forge_lib.training import stop as stopping
from forge_lib.training.stop import StopRequest


def test_a_signal_ends_a_run_before_its_first_step_and_is_recorded_afterwards(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="SIGTERM before"), StopRequest(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    with StopRequest(KeyboardInterrupt) as stop:
        stop.defer(tmp_path)
        assert stop.reason() == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason().startswith("SIGTERM on ")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stop_file_is_found_and_an_old_one_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "POLL_SECONDS", 0)
    (tmp_path / "stop").touch()
    with StopRequest(KeyboardInterrupt) as stop:
        stop.defer(tmp_path)
        assert stop.reason() == ""
        (tmp_path / "stop").touch()
        assert "stop on " in stop.reason()
        stop.done()
    assert not (tmp_path / "stop").exists()


def test_a_second_ctrl_c_ends_the_process_at_once():
    program = (
        "import os, signal, time; from forge_lib.training.stop import StopRequest\n"
        "with StopRequest(KeyboardInterrupt) as stop:\n"
        "    stop.defer(None)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=50).returncode == 130


def descendants(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@pytest.mark.parametrize(
    ("launcher", "how"),
    [("forge", "closed terminal"), ("accelerate", "closed terminal"), ("forge", "Ctrl-C for a pipe")],
)
def test_a_run_saves_and_stops_when_its_terminal_or_pipe_is_closed(launcher, how, tmp_path, free_port):
    """A window that is closed sends SIGHUP; Ctrl-C before a `| tee log` ends `tee` too."""
    words = [BIN / "p2p-llm-forge", "--processes-per-node", 2, "--master-port", free_port]
    if launcher == "accelerate":
        words = [*accelerate_launcher(tmp_path, free_port, num_processes=2), "scripts/train.py"]
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
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            family = [each.as_dict(["pid", "cmdline", "status"]) for each in descendants(process.pid)]
            pytest.fail(f"still running: {family}\n{rows(tmp_path / 'run')[-1:]}{rows(tmp_path / 'run', 'event')}")
        assert code == 0 or launcher == "accelerate"  # its launcher reports a signal to itself as a failure
    finally:
        process.kill()  # and all that it has started, where it lives
    saved, stopped = rows(tmp_path / "run", "event")[-2:]
    assert (saved["event"], stopped["event"]) == ("checkpoint", "stop")
    assert verify(tmp_path / "run" / "checkpoints" / f"step-{saved['step']:08d}") is None
