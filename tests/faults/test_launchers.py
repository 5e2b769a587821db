"""Faults of launchers and their supervisors: killed, told to stop, started twice, and restarted."""

import re
import signal
import sys
import time

import pytest
from commands import find_free_port, until
from phases import check_fault_in_each_phase
from rig import DEATH_SECONDS, FAULTY, FLAGS, SLOW, TIMEOUT, wait_for_end
from run_folders import read_lock, wait_for_step

pytestmark = pytest.mark.faults


@pytest.mark.netns
@pytest.mark.timeout(500)
def test_a_run_continues_after_a_launcher_is_killed_in_each_phase(make_rig, hosts, table, undisturbed):
    """With --max-restarts: at the start, in a step, in a save and in an evaluation, each in a different attempt."""
    check_fault_in_each_phase(make_rig(hosts(2)), "kill_launcher", [0, 1, 0, 1], table, undisturbed())


@pytest.mark.netns
def test_a_killed_accelerate_launcher_ends_its_worker_too(make_rig, hosts, table, undisturbed):
    """The port and the folder are free at once for the next start."""
    rig = make_rig(hosts(2))
    running = rig.start_all("--timeout-seconds", TIMEOUT, faults=[SLOW], launcher="accelerate")
    wait_for_step(rig.run_folder(2), 7)
    workers = rig.workers().values()
    begun = time.monotonic()
    running[0].process.kill()
    wait_for_end(workers, DEATH_SECONDS, "both workers end")
    seconds = time.monotonic() - begun
    assert running[1].finish(30).code == 1, "accelerate's own"
    assert re.search("lost (process 0 on|the main machine) machine1", running[1].log.read_text())
    rig.check_no_process_remains()
    rig.finish(rig.start_all(launcher="accelerate"), 0, 0)
    rig.check(undisturbed())
    table.add("kill -9 of accelerate launch", "its worker ends, the other names it", seconds)


@pytest.mark.netns
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("launcher", "n"), [("forge", 1), ("forge", 2), ("accelerate", 1), ("accelerate", 2)])
def test_sigterm_to_one_launcher_stops_all_machines_with_a_checkpoint(
    make_rig, hosts, table, undisturbed, launcher, n
):
    rig = make_rig(hosts(2))
    running = rig.start_all("--timeout-seconds", TIMEOUT, faults=[SLOW], launcher=launcher)
    wait_for_step(rig.run_folder(n), 7)
    begun = time.monotonic()
    running[n - 1].process.send_signal(signal.SIGTERM)
    ended = [each.finish(60) for each in running]
    seconds = time.monotonic() - begun
    if launcher == "forge":
        assert [each.code for each in ended] == [0, 0], rig.output()[-6000:]
    assert re.search(r"stopping after step \d+: SIGTERM on " + rig.name(n), ended[0].output), ended[0].output
    assert "lost" not in rig.output()
    rig.check(None)
    assert int(rig.newest_checkpoint(1).name[5:]) not in (5, 10)
    codes = " and ".join(str(each.code) for each in ended)
    table.add(f"SIGTERM to the launcher ({launcher}) of machine {n}", f"all save, exit codes {codes}", seconds)
    rig.finish(rig.start_all(launcher=launcher), 0, 0)
    rig.check(undisturbed())


def test_a_second_run_in_the_same_folder_or_on_the_same_port_is_refused(make_rig, table, tmp_path):
    """| A second run uses the same folder or port | It is refused | 2 |"""
    rig = make_rig()
    running = rig.start_all("--max-steps", 9999, faults=[{**SLOW, "seconds": 0.5}])
    wait_for_step(rig.run_folder(1), 2)
    forge = [sys.executable, FAULTY, "p2p-llm-forge", "--processes-per-node", 2, *FLAGS]
    for place, flags, message in (
        ("folder", ["--master-port", find_free_port(), "--output-dir", rig.run_folder(2)], "is in use by another run"),
        ("port", ["--master-port", rig.port, "--output-dir", tmp_path / "other"], f"{rig.port} is in use"),
    ):
        second = rig.start([*forge, *flags]).finish(60)
        assert second.code == 2, second.output
        assert message in second.output
        table.add(f"a second run with the same {place}", "exit 2, refused", second.seconds)
    step = read_lock(rig.run_folder(1))["step"]
    wait_for_step(rig.run_folder(1), step + 2)
    (rig.run_folder(1) / "stop").touch()
    rig.finish(running, 0, 0)


@pytest.mark.netns
@pytest.mark.timeout(400)
def test_restarts_complete_a_run_whichever_machine_fails(make_rig, hosts, table, tmp_path, undisturbed):
    """A worker of one machine is killed, then of the other, then the main machine's link is cut for 30 s."""
    machines = hosts(2)
    rig = make_rig(machines)
    faults = [
        {"do": "kill", "at": "computing", "step": 7, "rank": 1, "once": str(tmp_path / "once_1")},
        {"do": "kill", "at": "computing", "step": 13, "rank": 0, "once": str(tmp_path / "once_2")},
        {"do": "sleep", "at": "computing", "step": 19, "rank": 0, "once": str(tmp_path / "once_3")},
        SLOW,
    ]
    running = rig.start_all("--timeout-seconds", TIMEOUT, "--max-restarts", 5, faults=faults)
    for number in (0, 1):
        mark = rig.wait_for_mark(number)
        step = read_lock(rig.run_folder(1))["step"]
        pid = read_lock(rig.run_folder(2))["pid"]

        def trains_again(pid: int = pid) -> bool:
            lock = read_lock(rig.run_folder(2))
            return lock.get("pid", pid) != pid and lock["step"] >= 1

        until(trains_again, 90, f"trains again\n{rig.output()[-6000:]}")
        table.add(f"worker {1 - number} killed (step {step}), --max-restarts", "trains again", mark.seconds_ago())
    mark = rig.wait_for_mark(2)
    machines.cut(1)
    time.sleep(30)
    machines.heal(1)
    rig.finish(running, 0, 0, timeout=360)
    rig.check(undisturbed())
    table.add("main machine cut off for 30 s, --max-restarts", "continues, ends bit for bit", mark.seconds_ago())


@pytest.mark.timeout(300)
def test_a_run_that_always_fails_at_one_step_is_given_up(make_rig, table):
    """Both machines restart and give up after the third failure; both log the reason."""
    rig = make_rig()
    faults = [{"do": "raise", "at": "computing", "step": 7, "rank": 1}]
    begun = time.monotonic()
    running = rig.start_all("--timeout-seconds", TIMEOUT, "--max-restarts", 10, faults=faults)
    ended = [each.finish(200) for each in running]
    seconds = time.monotonic() - begun
    assert [each.code for each in ended] == [3, 1], rig.output()[-6000:]
    for each in ended:
        assert "the same failure at step 6 three times: not starting again; its checkpoints are kept" in each.output
        assert "RuntimeError: injected" in each.output
    rig.check(None)
    table.add("exception always at one step, --max-restarts 10", "given up after three, reason on both", seconds)
