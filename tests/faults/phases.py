"""The same fault in each phase of a run: at the start, in a step, in a save and in an evaluation."""

import signal
import time
from pathlib import Path

from commands import Running
from fault_table import FaultTable
from rig import DEATH_SECONDS, PHASES, REACTION_SECONDS, SLOW, TIMEOUT, Rig, in_each_phase, wait_for_end


def start_with_fault_in_each_phase(rig: Rig, do: str, ranks: list[int]) -> list[Running]:
    """Starts all machines with restarts; in each phase, the fault `do` hits a different attempt, on these ranks."""
    faults = in_each_phase(rig.folder, "sleep" if do == "cut" else do, ranks, seconds=2)
    flags = ["--timeout-seconds", TIMEOUT, "--eval-every", 10, "--max-restarts", 10]
    return rig.start_all(*flags, faults=[*faults, SLOW])


def check_fault_in_each_phase(rig: Rig, do: str, ranks: list[int], table: FaultTable, expected: Path) -> None:
    """Checks that the others end in time and name the peer, and that the restarted run has the expected weights.

    `do` is a fault of faulty.py that hits `ranks`, or "cut": the link of machine 2 is cut until both sides have ended.
    """
    running = start_with_fault_in_each_phase(rig, do, ranks)
    for number, phase in enumerate(PHASES):
        mark = rig.wait_for_mark(number)
        workers = {worker.pid: worker for worker in rig.workers().values()}
        others = [worker for pid, worker in workers.items() if pid != mark.pid]  # if they have not ended already
        if do == "cut":
            rig.hosts.cut(2)
        is_silent = do in ("stop", "cut")
        limit = TIMEOUT + REACTION_SECONDS if is_silent or phase in ("start", "evaluation") else DEATH_SECONDS
        wait_for_end(others, limit + 30, f"the other ends, {phase}\n{rig.output()[-5000:]}")
        seconds = mark.seconds_ago()
        if do == "cut":
            wait_for_end([workers[mark.pid]], 30, f"both sides end, {phase}")
            rig.hosts.heal(2)
        if do == "stop":
            time.sleep(1)
            workers[mark.pid].send_signal(signal.SIGCONT)
            wait_for_end([workers[mark.pid]], 30, f"the resumed one ends, {phase}")
        table.add(f"{do} in {phase}", "others end, run continues bit for bit", seconds)
        assert seconds < limit, f"{phase}\n{rig.output()[-5000:]}"
    ended = rig.finish(running, 0, 0, timeout=480)
    for each in ended:
        assert each.output.count("starting again in") == 4, each.output[-8000:]
    named = [line for each in ended for line in each.output.splitlines() if "error: " in line and "lost" in line]
    for rank in set(ranks):
        assert any(
            f"process {rank} on {rig.name(rank + 1)}" in line or (rank == 0 and "main machine" in line)
            for line in named
        ), named
    rig.check(expected)
