"""Faults of training processes: killed, stopped, hung, slow, and with wrong numbers."""

import contextlib
import json
import random
import re
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest
from commands import Finished, Running, find_free_port, until
from marked_processes import processes_with
from phases import check_fault_in_each_phase
from rig import DEATH_SECONDS, FAULTY, FLAGS, SLOW, STEPS, TIMEOUT
from run_folders import rows, sha256, wait_for_step

from forge_lib.checkpoints.verify import verify
from forge_lib.process import is_running


@pytest.fixture(scope="module")
def wrong_numbers(tmp_path_factory, home) -> tuple[Path, Finished]:
    """A run of two processes: process 1 has a NaN loss in step 4, and one changed weight from step 8 on."""
    folder = tmp_path_factory.mktemp("wrong_numbers")
    faults = [{"do": "nan", "at": "computing", "step": 4, "rank": 1}]
    faults += [{"do": "weight", "at": "computing", "step": 8, "rank": 1}]
    words = [sys.executable, FAULTY, "p2p-llm-forge", "--processes-per-node", 2, "--master-port", find_free_port()]
    words += [*FLAGS, "--max-steps", STEPS, "--on-nonfinite", "skip", "--output-dir", folder / "run"]
    return folder / "run", Running(words, folder / "log", prefix=["env", f"FAULTS={json.dumps(faults)}"]).finish()


@pytest.mark.xdist_group("wrong numbers")
def test_all_processes_skip_a_step_whose_loss_is_not_finite(wrong_numbers, table):
    """| A loss or gradient is not finite
    | All stop before the weights change, or skip the step (`--on-nonfinite skip`) | 2 |

    tests/scripts/test_train.py tests the stop.
    """
    folder, ended = wrong_numbers
    assert "step 4 is skipped: not finite: process 1, samples" in ended.output
    assert [row["step"] for row in rows(folder, "where")] == [4]
    table.add("NaN loss on one rank", "all skip the step, weights unchanged")


@pytest.mark.xdist_group("wrong numbers")
def test_a_changed_weight_ends_the_run_before_the_next_save(wrong_numbers, table):
    """| Weights differ between processes (faulty memory) | The run names host and tensor before the next save | 4 |"""
    folder, ended = wrong_numbers
    assert ended.code == 4, ended.output
    line = next(line for line in ended.output.splitlines() if "the replica of process 1 on" in line)
    assert "step 10: " in line, "the first comparison after step 8"
    assert f"process 1 on {socket.gethostname()} differs from process 0" in line
    checkpoints = folder / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000005"]
    assert verify(checkpoints / "step-00000005") is None
    table.add("one weight changed by 1e-3 on one rank", "exit 4 at the next comparison, rank and host named")


def test_a_worker_that_receives_sigterm_makes_all_save_and_the_run_resumes_to_the_same_weights(
    start, tmp_path, two_processes, undisturbed, table
):
    """SIGTERM to one of the two processes that accelerate has launched."""
    folder, word = tmp_path / "run", uuid.uuid4().hex
    words = [*two_processes, FAULTY, *FLAGS, "--max-steps", STEPS, "--output-dir", folder]
    faults = [{"do": "term", "at": "computing", "step": 7, "rank": 1}]
    ended = start(words, prefix=["env", f"FAULTS={json.dumps(faults)}", f"RIG={word}"]).finish()
    assert ended.code == 0, ended.output
    assert re.search(r"stopping after step \d+: SIGTERM on", ended.output)
    step = rows(folder, "reason")[0]["step"]
    assert 7 <= step <= 8
    assert verify(folder / "checkpoints" / f"step-{step:08d}") is None
    assert not (folder / "final").exists()
    until(lambda: not processes_with(word), 10, "no process remains")
    ended = start(words, warm=True).finish()
    assert ended.code == 0, ended.output
    assert f"resuming after step {step}" in ended.output
    final = undisturbed() / "final" / "model.safetensors"
    assert sha256(folder / "final" / "model.safetensors") == sha256(final)
    table.add("SIGTERM to a worker", "all save, exit 0; resumed bit for bit")


@pytest.mark.alone
def test_a_killed_process_ends_the_other_machine_which_names_it(make_rig, table):
    """| A process or its launcher is killed, or a machine crashes | All others end within seconds and name it | 3 |

    Here a process; test_launchers.py kills the launcher, test_links.py a machine. The message also contains the fix.
    """
    rig = make_rig()
    faults = [{"do": "kill", "at": "computing", "step": 7, "rank": 1}, {**SLOW, "seconds": 0.1}]
    first, second = rig.start_all("--timeout-seconds", TIMEOUT, faults=faults)
    mark = rig.wait_for_mark()
    output = first.finish().output
    seconds = mark.seconds_ago()
    assert first.process.returncode == 3, output
    assert seconds < DEATH_SECONDS + 3, "with the launcher's end"
    line = next(line for line in output.splitlines() if line.startswith("train.py: error: "))
    assert f"lost process 1 on {rig.name(2)}" in line
    assert "Start the same command again on every machine" in line
    assert second.finish().code == 128 + signal.SIGKILL
    assert "was killed by SIGKILL at step 6" in second.log.read_text()
    rig.check_no_process_remains()
    assert rows(rig.run_folder(1), "message")[0]["event"] == "peer_lost"
    table.add("kill -9 of a worker, no restarts", "exit 3, peer named", seconds)


@pytest.mark.faults
def test_a_process_killed_in_a_save_leaves_older_checkpoints_complete(make_rig, table, undisturbed):
    """| A process is killed during a save | Older checkpoints stay complete; the next start removes the unfinished one
    | 3 |
    """
    rig = make_rig()
    faults = [{"do": "kill", "at": "writing", "step": 10, "rank": 1}]
    rig.finish(rig.start_all("--timeout-seconds", TIMEOUT, faults=faults), 3, 128 + signal.SIGKILL)
    checkpoints = rig.run_folder(2) / "checkpoints"
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000005"]
    assert verify(checkpoints / "step-00000005") is None
    assert list(checkpoints.glob(".*")), "the unfinished one"
    rig.finish(rig.start_all(), 0, 0)
    rig.check(undisturbed())
    table.add("kill -9 in a save, no restarts", "exit 3; older checkpoint complete, resumed bit for bit")


@pytest.mark.netns
@pytest.mark.faults
@pytest.mark.timeout(500)
def test_a_run_continues_after_a_process_is_killed_in_each_phase(make_rig, hosts, table, undisturbed):
    """With --max-restarts: at the start, in a step, in a save and in an evaluation, each in a different attempt."""
    check_fault_in_each_phase(make_rig(hosts(2)), "kill", [1, 0, 1, 0], table, undisturbed())


@pytest.mark.netns
@pytest.mark.faults
@pytest.mark.timeout(500)
def test_a_run_continues_after_a_process_hangs_in_each_phase(make_rig, hosts, table, undisturbed):
    """| A machine hangs, or its link is silent | All others end after `--timeout-seconds` (60) and name it | 3 |

    Here it hangs (SIGSTOP) and is resumed later, with --max-restarts; test_links.py cuts its link.
    """
    check_fault_in_each_phase(make_rig(hosts(2)), "stop", [0, 1, 0, 1], table, undisturbed())


@pytest.mark.faults
@pytest.mark.timeout(200)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_killed_before_its_first_message_delays_nobody(make_rig, tmp_path, table, undisturbed, rank):
    """Its launcher is already connected to the other machine's launcher."""
    rig = make_rig()
    fault = {"do": "kill", "at": "importing", "rank": rank, "once": str(tmp_path / "once")}
    running = rig.start_all("--timeout-seconds", TIMEOUT, "--max-restarts", 2, faults=[fault])
    mark = rig.wait_for_mark()
    rig.finish(running, 0, 0, timeout=150)
    table.add(f"kill -9 of process {rank} before its first message", "continues bit for bit", mark.seconds_ago())
    rig.check(undisturbed())


@pytest.mark.netns
@pytest.mark.faults
@pytest.mark.timeout(900)
def test_workers_killed_at_twenty_random_steps_change_no_weight(make_rig, hosts, table, tmp_path, undisturbed):
    """Ten on each machine, including the one with the store, at seeded random moments."""
    draw = random.Random(20)
    num_steps, moments = 60, ["reading its batch", "computing", "saving"]
    rig = make_rig(hosts(2))
    faults = []
    for number, step in enumerate(sorted(draw.sample(range(2, num_steps), 20))):
        at = moments[draw.randrange(2 if step % 5 else 3)]  # it saves after each fifth step
        once = str(tmp_path / f"once_{number}")
        faults.append({"do": "kill", "at": at, "step": step, "rank": number % 2, "once": once})
    flags = ["--timeout-seconds", TIMEOUT, "--max-restarts", 30, "--max-steps", num_steps]
    running = rig.start_all(*flags, faults=[*faults, {**SLOW, "seconds": 0.05}])
    rig.finish(running, 0, 0, timeout=880)
    marks = rig.marks()
    assert len(marks) == 20
    for rank in (0, 1):
        count = sum(mark.rank == rank for mark in marks)
        table.add(f"kill -9 of worker {rank} at random steps, --max-restarts", f"{count} times, bit for bit")
    rig.check(undisturbed(num_steps))


@pytest.mark.faults
def test_a_slow_machine_and_a_save_longer_than_the_timeout_are_no_lost_peers(make_rig, table, undisturbed):
    """Machine 2 runs a quarter of the time and needs 8 s for a save."""
    rig = make_rig()
    save = {"do": "sleep", "at": "writing", "step": 10, "rank": 1, "seconds": TIMEOUT + 2}
    running = rig.start_all("--timeout-seconds", TIMEOUT, faults=[{**SLOW, "seconds": 0.1}, save])
    wait_for_step(rig.run_folder(1), 2)
    worker = rig.workers()[1]

    def slow_down() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while is_running(worker):
                worker.suspend()
                time.sleep(0.75)
                worker.resume()
                time.sleep(0.25)

    threading.Thread(target=slow_down, daemon=True).start()
    rig.finish(running, 0, 0)
    seconds = [row["step_seconds"] for row in rows(rig.run_folder(1))]
    table.add("one machine at 25 % of its time", f"steps of up to {max(seconds):.1f} s, bit for bit", sum(seconds))
    table.add(f"save of {TIMEOUT + 2} s, longer than the timeout", "the others wait for it, bit for bit")
    rig.check(undisturbed())
