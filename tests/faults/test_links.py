"""Faults of the network: links that are cut, slow, lossy or reset, and machines that are gone with their disk."""

import contextlib
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, TINY, until
from networks import filter_input, shape, throw_garbage
from phases import check_fault_in_each_phase
from rig import PHASES, REACTION_SECONDS, SLOW, STEPS, TIMEOUT, in_each_phase, wait_for_end
from run_folders import read_lock, rows, sha256, wait_for_step

pytestmark = [pytest.mark.netns, pytest.mark.faults]


@pytest.mark.timeout(500)
def test_a_run_continues_after_a_link_is_cut_in_each_phase(make_rig, hosts, table, undisturbed):
    """| A machine hangs, or its link is silent | All others end after `--timeout-seconds` (60) and name it | 3 |

    Here the link of machine 2 is cut until both have ended, with --max-restarts; test_processes.py stops a process.
    """
    check_fault_in_each_phase(make_rig(hosts(2)), "cut", [1, 1, 1, 1], table, undisturbed())


def test_a_link_that_is_down_for_five_seconds_only_pauses_the_run(make_rig, hosts, tmp_path, table, undisturbed):
    """| A link is down for a shorter time | One step takes longer | |

    This happens in each phase; garbage that a stranger sends to every port changes nothing either.
    """
    machines = hosts(3)
    rig = make_rig(machines)
    faults = in_each_phase(tmp_path, "sleep", [1, 1, 1, 1], seconds=2)
    running = rig.start_all("--timeout-seconds", 20, "--eval-every", 10, faults=[*faults, SLOW])
    for number, phase in enumerate(PHASES):
        rig.wait_for_mark(number)
        begun, step = time.monotonic(), read_lock(rig.run_folder(1)).get("step", -1)
        machines.cut(2)
        time.sleep(5)
        machines.heal(2)
        until(
            lambda: read_lock(rig.run_folder(1)).get("step", -1) > step + (1 if step >= 0 else 0),  # noqa: B023
            30,
            f"it continues after {phase}\n{rig.output()[-5000:]}",
        )
        table.add(f"link cut for 5 s in {phase}", "pauses, continues", time.monotonic() - begun)
        if phase == "step":
            throw_garbage(machines, 3, ["10.77.0.1", "10.77.0.2"])
    rig.finish(running, 0, 0)
    assert "lost" not in rig.output()
    table.add("stranger sends garbage to all ports", "no effect")
    rig.check(undisturbed())


@pytest.mark.timeout(300)
def test_the_others_wait_for_a_main_machine_that_crashed(make_rig, hosts, table, undisturbed):
    """With --max-restarts: its processes are killed and its link is down; it comes back later with an empty disk."""
    machines = hosts(2)
    rig = make_rig(machines)
    flags = ["--timeout-seconds", TIMEOUT, "--max-restarts", 5]
    first, second = rig.start_all(*flags, faults=[SLOW])
    wait_for_step(rig.run_folder(1), 12)
    worker = rig.workers()[1]
    machines.cut(1)
    begun = time.monotonic()
    first.kill()
    wait_for_end([worker], TIMEOUT + REACTION_SECONDS, "the process of machine 2 ends")
    table.add("power loss of the main machine", "the other ends and waits for it by name", time.monotonic() - begun)
    line = "machine2 waits for the main machine machine1 at 10.77.0.1"
    until(lambda: line in second.log.read_text(), 60, f"it names whom it waits for\n{second.log.read_text()}")
    shutil.rmtree(rig.run_folder(1))
    machines.heal(1)
    first = rig.start_machine(1, *flags, faults=[SLOW])
    rig.finish([first, second], 0, 0, timeout=200)
    assert re.search(r"resuming after step 1\d", first.log.read_text())
    rig.check(undisturbed())


@pytest.mark.timeout(200)
def test_a_link_cut_after_the_last_barrier_changes_nothing(make_rig, hosts, table, undisturbed):
    """Machine 2 only has to exit."""
    machines = hosts(2)
    rig = make_rig(machines)
    faults = [{"do": "sleep", "at": "leaving", "step": STEPS, "rank": 1, "seconds": 3}]
    faults += [{"do": "sleep", "at": "finalizing", "rank": 1, "seconds": 15}]
    running = rig.start_all("--timeout-seconds", 20, "--max-restarts", 2, faults=faults)
    mark = rig.wait_for_mark()
    machines.cut(2)
    time.sleep(6)
    machines.heal(2)
    rig.finish(running, 0, 0, timeout=120)
    assert "starting again" not in rig.output()
    table.add("link cut for 6 s at the very end", "exit 0", mark.seconds_ago())
    rig.check(undisturbed())


@pytest.mark.timeout(300)
def test_a_flapping_link_causes_few_restarts(make_rig, hosts, table, undisturbed):
    """The link is down for 4 s of every 10 s; the timeout is longer."""
    machines = hosts(2)
    rig = make_rig(machines)
    running = rig.start_all("--timeout-seconds", 10, "--max-restarts", 5, faults=[{**SLOW, "seconds": 1.0}])
    wait_for_step(rig.run_folder(1), 2)
    begun = time.monotonic()
    while any(each.process.poll() is None for each in running) and time.monotonic() < begun + 200:
        machines.cut(2)
        time.sleep(4)
        machines.heal(2)
        time.sleep(6)
    rig.finish(running, 0, 0, timeout=290)
    restarts = max(each.log.read_text().count("starting again") for each in running)
    table.add("link down 4 s of every 10 s", f"ends bit for bit, {restarts} restarts", time.monotonic() - begun)
    assert restarts <= 2
    rig.check(undisturbed())


def test_two_machines_that_cannot_reach_each_other_end_all_three(make_rig, hosts, table):
    """The main machine still reaches both of them."""
    machines = hosts(3)
    rig = make_rig(machines, num_machines=3)
    running = rig.start_all("--timeout-seconds", TIMEOUT, faults=[SLOW])
    wait_for_step(rig.run_folder(1), 4)
    begun = time.monotonic()
    for n, other in ((2, 3), (3, 2)):
        machines.call(n, f"ip route add blackhole 10.77.0.{other}/32")
    ended = [each.finish(60) for each in running]
    seconds = time.monotonic() - begun
    assert [each.code for each in ended] == [3, 3, 3], rig.output()[-6000:]
    assert re.search(r"machine[23] \(process [12]\) cannot reach process [12] on machine[32]", rig.output())
    assert seconds < TIMEOUT + 12, seconds
    table.add("pair partition of three", "exit 3 on all, the pair named", seconds)
    rig.check_no_process_remains()


def test_connections_that_are_reset_end_both_machines(make_rig, hosts, table):
    machines = hosts(2)
    rig = make_rig(machines)
    running = rig.start_all("--timeout-seconds", TIMEOUT, faults=[SLOW])
    wait_for_step(rig.run_folder(1), 4)
    begun = time.monotonic()
    machines.call(1, "ss -K dst 10.77.0.2")
    ended = [each.finish(60) for each in running]
    seconds = time.monotonic() - begun
    assert [each.code for each in ended] == [3, 3], rig.output()[-6000:]
    table.add("live connections reset (ss -K)", "exit 3 on both", seconds)
    assert seconds < TIMEOUT + REACTION_SECONDS + 3
    rig.check_no_process_remains()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("rate", "steps", "timeout"), [("20mbit", 8, 3), ("5mbit", 6, 3), ("1mbit", 2, 20)])
def test_a_slow_link_is_no_lost_peer(make_rig, hosts, table, undisturbed, rate, steps, timeout):
    """A step sends more than the shortest timeout allows for; on 1 Mbit/s a heartbeat may need more than 3 s."""
    machines = hosts(2)
    rig = make_rig(machines)
    shape(machines, 2, rate)
    running = rig.start_all("--timeout-seconds", timeout, "--max-steps", steps)
    rig.finish(running, 0, 0, timeout=380)
    seconds = [row["step_seconds"] for row in rows(rig.run_folder(1))]
    timeout = json.loads((rig.run_folder(1) / "run.json").read_text())["process_group_timeout"]
    outcome = f"steps of {max(seconds):.1f} s, timeout {timeout['seconds']:.0f} s, no false alarm"
    table.add(f"link of {rate}", outcome, running[0].finish().seconds)
    rig.check(undisturbed(steps))


@pytest.mark.skipif(not shutil.which("nft"), reason="needs nftables")
@pytest.mark.parametrize("percent", [1, 5])
def test_lost_packets_only_cost_time(make_rig, hosts, table, undisturbed, percent):
    machines = hosts(2)
    rig = make_rig(machines)
    filter_input(machines, 2, f"numgen random mod 100 < {percent} drop")
    ended = rig.finish(rig.start_all("--timeout-seconds", TIMEOUT), 0, 0)
    table.add(f"{percent} % of packets lost", "slower, bit for bit", ended[0].seconds)
    rig.check(undisturbed())


@pytest.mark.timeout(400)
@pytest.mark.parametrize("source", ["text", "store"])
def test_an_empty_machine_receives_all_it_needs_over_a_link_that_is_cut_meanwhile(
    make_rig, hosts, run, table, tmp_path, undisturbed, source
):
    """Machine 2 has only the program, with its own caches and working folder; its link is cut for 10 s."""
    machines = hosts(2)
    rig = make_rig(machines)
    homes = [tmp_path / f"home{n}" for n in (1, 2)]
    for n, home in enumerate(homes, 1):
        (home / "work").mkdir(parents=True)
        rig.run_folder(n).mkdir()
    shutil.copytree(ROOT / "data", homes[0] / "work" / "data")
    flags = ["--timeout-seconds", 20]
    if source == "store":
        words = [sys.executable, "scripts/prepare_data.py", *TINY, "--output-dir", homes[0] / "work" / "store"]
        prepared = run(words)
        assert prepared.code == 0, prepared.output
        flags += ["--dataset-path", "store"]
    shape(machines, 2, "1mbit")
    running = []
    for n, home in enumerate(homes, 1):
        environment = {"HOME": home, "HF_HOME": home / "hf", "PYTHONPATH": ROOT}
        running.append(rig.start_machine(n, *flags, environment=environment, cwd=home / "work"))

    def is_arriving() -> bool:
        with contextlib.suppress(FileNotFoundError):  # it is renamed meanwhile
            return any(path.stat().st_size > 50_000 for path in homes[1].rglob("tokens.bin"))
        return False

    until(is_arriving, 90, "tokens arrive")
    begun = time.monotonic()
    machines.cut(2)
    time.sleep(10)
    machines.heal(2)
    shape(machines, 2, "1gbit")
    rig.finish(running, 0, 0)
    fault = f"second machine empty ({source}), link cut 10 s"
    table.add(fault, "receives all, undisturbed weights", time.monotonic() - begun)
    rig.check(undisturbed())
    ours, theirs = (home / "work" / "data" / "tiny_gpt2" / "tokenizer.json" for home in homes)
    assert sha256(ours) == sha256(theirs)
    ours, theirs = (hashes_of_store(home) for home in homes)
    assert ours == theirs


def hashes_of_store(home: Path) -> list[tuple[str, str]]:
    """Returns (name, hash) of each file of the token store below a home folder."""
    (tokens, *_) = home.rglob("tokens.bin")
    return sorted((path.name, sha256(path)) for path in tokens.parent.iterdir() if path.is_file())
