"""`p2p-llm-forge status`: what it says about a run that trains, waits, has ended or was killed."""

import json
import signal

import pytest
from commands import BIN, SHORT, find_free_port, until

from forge_lib.launch.status import read_status
from forge_lib.report.history import read_tail

COMMAND = [BIN / "python", "scripts/train.py", *SHORT, "--log-every", 1, "--checkpoint-every", 10]


@pytest.fixture
def status(run):
    """Runs the command; returns its lines by name."""

    def status(folder) -> dict[str, str]:
        ended = run([BIN / "p2p-llm-forge", "status", folder])
        assert ended.code == 0, ended.output
        return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in ended.output.splitlines()}

    return status


def test_a_run_that_trains_is_killed_and_is_completed(start, status, tmp_path):
    folder = tmp_path / "a"
    running = start([*COMMAND, "--max-steps", 100_000, "--output-dir", folder])
    until(lambda: (folder / "checkpoints" / "step-00000010").exists(), 60, "a checkpoint")
    lines = status(folder)
    assert lines["state"] == "training" and "of 100,000" in lines["step"] and "left" not in lines["time left"]
    assert lines["last checkpoint"].startswith("step-000000") and f"process {running.process.pid}" in lines["since"]
    running.process.send_signal(signal.SIGKILL)
    running.process.wait()
    lines = status(folder)
    assert lines["state"].startswith("not active; it ended without a message (killed?) after ")
    assert "time left" not in lines and float(lines["loss"].split()[0]) > 0
    step = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
    ended = start([*COMMAND, "--max-steps", step + 2, "--output-dir", folder]).finish()
    assert ended.code == 0, ended.output
    lines = status(folder)
    assert lines["state"] == f"not active; complete: {step + 2:,} of {step + 2:,} steps"
    assert lines["last event"].startswith("checkpoint at step")


def test_a_launcher_that_waits_for_another_machine_says_for_which(start, status, tmp_path):
    folder = tmp_path / "a"
    flags = ["--num-nodes", 2, "--master-addr", "127.0.0.1", "--master-port", find_free_port(), "--join-timeout", 100]
    running = start([BIN / "p2p-llm-forge", *SHORT, *flags, "--output-dir", folder])
    until(lambda: (folder / "launcher.lock").exists(), 60, "launcher.lock")
    lines = status(folder)
    assert lines["state"].startswith("waiting: ") and "machine 1" in lines["state"]
    running.process.send_signal(signal.SIGTERM)
    running.finish()
    assert not (folder / "launcher.lock").exists()


def test_it_answers_at_once_also_about_a_long_run(run, tmp_path):
    """It reads the end of metrics.jsonl only, and imports neither torch nor transformers."""
    line = json.dumps({"step": 1, "loss": 1.0, "tokens_per_second": 5.0})
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n" * 300_000)
    assert read_status(tmp_path).state == "not active"
    assert 0 < len(read_tail(tmp_path)) < 30_000
    program = (
        "import sys; from forge_lib.launch.command import main; main(['status', sys.argv[1]]); print(*sys.modules)"
    )
    ended = run([BIN / "python", "-c", program, tmp_path])
    assert ended.code == 0 and {"torch", "transformers"}.isdisjoint(ended.output.split())


def test_a_folder_that_is_not_a_run_is_named(run, tmp_path):
    ended = run([BIN / "p2p-llm-forge", "status", tmp_path])
    assert ended.code == 2 and "has neither metrics.jsonl nor run.json" in ended.output
