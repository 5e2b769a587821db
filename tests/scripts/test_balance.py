"""scripts/train.py with --balance auto and --micro-batch-size auto, on two processes."""

import json
import re

import pytest
from commands import QUIET, SHORT
from run_folders import losses, rows

FLAGS = [*SHORT, *QUIET, "--max-steps", "100", "--batch-size", "16"]
SPEEDS = json.dumps({"0": [3, 1], "30": [1, 3], "60": [5, 3]})


@pytest.mark.timeout(240)
def test_the_losses_stay_the_same_while_the_shares_change_and_the_run_is_killed_and_resumed(
    train, run, two_processes, tmp_path
):
    even, ended = train(*FLAGS, folder="even")
    assert ended.code == 0, ended.output
    words = [*two_processes, "tests/training/unequal.py", *FLAGS, "--balance", "auto", "--checkpoint-every", "25"]
    folder = tmp_path / "auto"
    ended = run([*words, "--output-dir", folder], variables={"SPEEDS": SPEEDS, "KILL_AT": "58"}, warm=True)
    assert ended.code != 0
    resumed = run([*words, "--output-dir", folder], variables={"SPEEDS": SPEEDS}, warm=True)
    assert resumed.code == 0, resumed.output

    changes = [row for row in rows(folder, "event") if row["event"] == "shares"]
    assert len(changes) >= 3
    assert all(sum(row["shares"]) == 16 for row in changes)
    saved = next(row["shares"] for row in rows(folder) if row["step"] == 50)
    assert saved == [4, 12] and f"they begin as in the checkpoint: {saved[0]} + {saved[1]}" in resumed.output
    assert rows(folder)[-1]["shares"] == [10, 6]
    assert rows(folder)[-1]["sequences_per_second"] == pytest.approx([5, 3])
    by_step = {row["step"]: row["loss"] for row in rows(folder)}  # the later row of a step counts
    assert [by_step[step] for step in range(1, 101)] == pytest.approx(losses(even), rel=1e-5)


def test_a_process_with_less_memory_takes_smaller_micro_batches(run, trained, tmp_path, two_processes):
    words = [*two_processes, "tests/training/unequal.py", *SHORT, *QUIET]
    words += ["--micro-batch-size", "auto", "--output-dir", tmp_path / "run"]
    ended = run(words, variables={"FREE_MEMORY": "30_000_000"}, warm=True)
    assert ended.code == 0, ended.output
    assert "process 0: micro-batches of up to 4 sequences" in ended.output, ended.output
    assert re.search("process 1: micro-batches of up to [1-3] sequences", ended.output), ended.output
    assert losses(tmp_path / "run") == pytest.approx(losses(trained), rel=1e-5)
