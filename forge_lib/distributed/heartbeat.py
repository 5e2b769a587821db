"""Two threads per process: one exchanges heartbeats, the other watches the clock and ends a process that hangs.

The first may block in the store if a link goes silent. The second one uses no network until it has found a failure.
"""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch.distributed as dist

from forge_lib.distributed.store import OPEN_SECONDS, open_store, read_verdict, store_verdict
from forge_lib.distributed.verdicts import PeerState, Reporter, Verdict
from forge_lib.errors import UserError, exit_code
from forge_lib.process import World

BEAT_SECONDS = 0.5
LEAVE_SECONDS = 2  # how long this process may take to notice by itself that the run is over
JOIN_SECONDS = 1
LAUNCHER_STOPPED = "its launcher has stopped"


class ThisProcess(Protocol):
    """What the threads read of this process: its `Peers` object, whose attributes change while the threads run."""

    world: World
    host: str
    address: str
    step: int
    status: str
    is_leaving: bool
    hint: str
    on_peer_error: Callable[[BaseException], None]


class Heartbeat:
    """The two threads, and what they know about the processes of the run.

    Args:
        process: this process.
        timeout_seconds: a process is lost if it sends no heartbeat for this many seconds.
        start_seconds: a process is lost if it has not sent its first heartbeat by then.
        leave: ends this process with an exit code.

    Attributes:
        states: the last known state of each process, by rank.
        changed: when the heartbeat of each process last changed, in seconds of `time.monotonic`.
        answered: when the store last answered.
        verdict: why the run is over; None while it runs.
    """

    def __init__(
        self, process: ThisProcess, timeout_seconds: float, start_seconds: float, leave: Callable[[int], None]
    ):
        self.states: dict[int, PeerState] = {}
        self.changed: dict[int, float] = {}
        self.answered = time.monotonic()
        self.verdict: Verdict | None = None
        self._process, self._leave = process, leave
        self._timeout_seconds, self._start_seconds = timeout_seconds, start_seconds
        self._stopped = threading.Event()

    def start(self) -> None:
        """Connects to the store and starts the threads."""
        self.store = self.open_store()
        self._started = self.answered = time.monotonic()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._exchange, self._watch)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> bool:
        """Stops the threads; returns whether one of them still waits for a silent link."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        return any(thread.is_alive() for thread in self._threads)

    def open_store(self) -> dist.Store:
        """Opens a new connection to the store, with a longer time limit for answers than for heartbeats."""
        return open_store(self._process.world, 2 * self._timeout_seconds + OPEN_SECONDS)

    def reporter(self) -> Reporter:
        """Returns what this process knows now, for the wording of a verdict."""
        process, world = self._process, self._process.world
        main_machine = f"{world.main_address}:{world.main_port}"
        return Reporter(world.process_index, process.host, process.step, main_machine, process.hint, dict(self.states))

    def silent_since(self, moment: float) -> list[int]:
        """Returns the processes that have sent a heartbeat before a moment of `time.monotonic`, but none after it."""
        return [rank for rank, changed in list(self.changed.items()) if changed < moment]

    def _exchange(self) -> None:
        """The first thread: writes this process's state, and reads the states of all processes and the verdict."""
        process, beat = self._process, 0
        rank = process.world.process_index
        try:
            store = self.open_store()
            while not self._stopped.wait(BEAT_SECONDS if beat else 0):
                beat += 1
                own = PeerState(beat, process.host, process.address, process.status, process.step, process.is_leaving)
                store.set(f"state/{rank}", own.to_json())
                for other in range(process.world.num_processes):
                    if other in self.states or store.check([f"state/{other}"]):
                        self._update(other, PeerState.from_json(store.get(f"state/{other}")))
                if self.verdict is None and (verdict := read_verdict(store)):
                    self.verdict = self.reporter().with_processes(verdict)
                self.answered = time.monotonic()
        except (dist.DistError, UserError):
            if self.verdict is None and not self._stopped.is_set():
                self.verdict = self.reporter().lost_main_machine(LAUNCHER_STOPPED)

    def _update(self, rank: int, state: PeerState) -> None:
        if rank not in self.states or self.states[rank].beat != state.beat:
            self.changed[rank] = time.monotonic()
        self.states[rank] = state

    def _watch(self) -> None:
        """The second thread: looks for lost processes, and ends this one if it does not notice that the run is over.

        A process that waits in a collective of gloo or NCCL cannot notice it.
        """
        over_since, last_look = None, time.monotonic()
        while not self._stopped.wait(BEAT_SECONDS):
            now = time.monotonic()
            if self.verdict is None:
                lost = self._find_lost(now, last_look)
                self.verdict = self.verdict or lost
                last_look = now
                continue
            over_since = over_since or now
            if now - over_since > LEAVE_SECONDS and not self._process.is_leaving:
                self._end_process(self.verdict)
                return

    def _find_lost(self, now: float, last_look: float) -> Verdict | None:
        """Returns the verdict if a process, this one included, was silent for too long; else None."""
        limit, reporter = self._timeout_seconds, self.reporter()
        reason = f"silent for {limit:g} s"
        if now - last_look > limit:
            return reporter.frozen(now - last_look)
        if now - self.answered > limit:
            return reporter.lost_main_machine(reason)
        if silent := self.silent_since(now - limit):
            return reporter.lost_processes(silent, reason)
        unknown = [rank for rank in range(self._process.world.num_processes) if rank not in self.states]
        if unknown and now - self._started > max(self._start_seconds, limit):
            return reporter.never_started(unknown, now - self._started)
        return None

    def _end_process(self, verdict: Verdict) -> None:
        error = verdict.as_error()
        # In a separate thread, since the link to the store may be the one that fell silent.
        threading.Thread(target=store_verdict, args=(self.store, verdict), daemon=True).start()
        with suppress(Exception):
            self._process.on_peer_error(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        time.sleep(BEAT_SECONDS)
        self._leave(exit_code(error))
