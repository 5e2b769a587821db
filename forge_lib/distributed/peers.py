"""The side channel: barriers, all-gathers and heartbeats between the processes of a run, over the launcher's store.

These collectives need no process group and no GPU, and have no short timeout: a machine that still tokenizes reports
how far it is. Each process sends its heartbeat and its status. If one fails, all others end with its message within a
second; if one dies or falls silent, the others name it.
"""

import dataclasses
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

import torch.distributed as dist

from forge_lib.distributed.heartbeat import BEAT_SECONDS, LAUNCHER_STOPPED, Heartbeat
from forge_lib.distributed.store import store_verdict
from forge_lib.distributed.verdicts import Verdict
from forge_lib.errors import KINDS, RESUME_HINT, Stopped, UserError, as_user_error, first_line
from forge_lib.process import World

POLL_SECONDS = 0.1
WAIT_LINE_SECONDS = 10
START_SECONDS = 180  # all processes start at about the same time
HANG_SECONDS = 3600  # the longest wait at a barrier for a process that is alive
SETTLE_SECONDS = 3  # after a failed collective: a process without a heartbeat in this time is the one that is lost
EXIT_SECONDS = 5  # the longest wait of a process that leaves for the others
CONNECT_SECONDS = 2
# gloo and NCCL raise plain RuntimeErrors; one of these words is in each message about a failed connection.
CONNECTION_WORDS = ("gloo", "NCCL", "Connection", "Timed out", "timeout", "Broken pipe", "Socket", "recv", "peer")

Facts = TypeVar("Facts")


class Peers:
    """All processes of a run, as seen from one of them. Use it as a context manager, around everything they do.

    If the `with` block raises an error, all other processes end with it: they raise UserError, PeerLostError,
    DivergedError or Stopped. If another process caused the error, this one raises the error of that process.

    Args:
        world: the processes of the run.
        timeout_seconds: a process is lost if it sends no heartbeat for this many seconds. If this process then waits
            in a collective of the process group, it prints the reason and ends with exit code 3.
        start_seconds: a process is lost if it has not sent its first heartbeat by then.
        hint: what the user can do if a process is lost.
        leave: ends this process with an exit code; tests replace it.

    Attributes:
        host: this machine's name.
        address: this machine's address in the network of the processes, for messages.
        step: optimizer steps done, for messages.
        status: what this process does now.
        is_leaving: whether the `with` block has ended.
        on_peer_error: called with the error before this process ends because another one failed.
        was_opened: class attribute: whether this process has used a side channel, which reports errors to the others.
        has_stuck_thread: class attribute: whether a thread of this process still waits for a silent link.
    """

    was_opened: ClassVar[bool] = False
    has_stuck_thread: ClassVar[bool] = False

    def __init__(
        self,
        world: World,
        timeout_seconds: float = 60.0,
        start_seconds: float = START_SECONDS,
        hint: str = RESUME_HINT,
        leave: Callable[[int], None] = os._exit,
    ):
        self.world, self.hint = world, hint
        self.host, self.address, self.step, self.status = socket.gethostname(), "", 0, "starting"
        self.on_peer_error: Callable[[BaseException], None] = lambda error: None
        self.is_leaving = False
        self._heartbeat = Heartbeat(self, timeout_seconds, start_seconds, leave)
        self._texts: dict[str, str] = {}  # the store of a single process

    def __enter__(self) -> "Peers":
        if self.world.num_processes > 1:
            Peers.was_opened = True
            self._heartbeat.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.world.num_processes == 1:
            return
        self.is_leaving = True
        cause = error
        try:
            if error is not None:
                cause = self._find_cause(error)
                if cause is not error:
                    self.on_peer_error(cause)
            self._wait_until_all_leave()
        finally:
            Peers.has_stuck_thread |= self._heartbeat.stop()
        if cause is not error:
            raise cause from None

    def set_status(self, status: str) -> None:
        """Sets what this process does now; others print it while they wait. Cheap: call it often."""
        self.status = status

    def all_gather(self, facts: Facts, name: str, limit_seconds: float = math.inf) -> list[Facts]:
        """Sends `facts` to all processes and returns the facts of all, by rank. Call on all processes.

        While it waits, one process of each machine prints every 10 s which processes are missing.

        Args:
            facts: an instance of a dataclass whose fields are of JSON types; the same class on all processes.
            name: identifies this call; use each name once.
            limit_seconds: a process that is alive, but has not called this by then, is lost.

        Raises:
            UserError: another process sent a dataclass of other fields.
            UserError, PeerLostError, DivergedError, Stopped: another process failed or is lost.
        """
        if self.world.num_processes == 1:
            return [facts]
        fields = dataclasses.asdict(facts)
        keys = self._store_and_wait(name, json.dumps(fields), limit_seconds)
        values = [json.loads(self._heartbeat.store.get(key)) for key in keys]
        for rank, value in enumerate(values):
            if value.keys() != fields.keys():
                raise UserError(
                    f"process {rank} runs another version of this program; update all machines to the same"
                )
        return [type(facts)(**value) for value in values]

    def barrier(self, name: str, limit_seconds: float = HANG_SECONDS) -> float:
        """Waits until all processes have called this with the same name; returns the seconds that it waited.

        Use it for long waits: it fails only if a process is lost or keeps the others waiting for `limit_seconds`.

        Raises:
            UserError, PeerLostError, DivergedError, Stopped: another process failed or is lost.
        """
        start = time.monotonic()
        if self.world.num_processes > 1:
            self._store_and_wait(f"barrier/{name}", "", limit_seconds)
        return time.monotonic() - start

    def check(self) -> None:
        """Raises the error that ended the run, if the run is over. Cheap: for loops that wait for something else."""
        if self._heartbeat.verdict:
            raise self._heartbeat.verdict.as_error()

    def set_first(self, key: str, text: str) -> None:
        """Stores a text for all processes under a key; if there is one already, that one stays."""
        if self.world.num_processes == 1:
            self._texts.setdefault(key, text)
        else:
            self._heartbeat.store.compare_set(f"first/{key}", "", text)

    def get_first(self, key: str) -> str:
        """Returns the text under a key; waits if no process has stored it yet."""
        if self.world.num_processes == 1:
            return self._texts[key]
        return self._heartbeat.store.get(f"first/{key}").decode()

    def release_launchers(self) -> None:
        """Lets torchrun's agents end at once. Call before a planned end, after the last barrier.

        An agent that got a signal skips the exit barrier of the agents; the others would wait five minutes for it.
        """
        run_id = os.environ.get("TORCHELASTIC_RUN_ID")
        if self.world.num_processes > 1 and run_id:
            store = self._heartbeat.store.underlying_store
            store.set(f"{run_id}/torchelastic/agent/terminal_state/last_member", "<val_ignored>")

    # Waiting

    def _store_and_wait(self, prefix: str, text: str, limit_seconds: float) -> list[str]:
        """Stores this process's text, waits until all processes have stored theirs, and returns the keys, by rank."""
        keys = [f"{prefix}/{rank}" for rank in range(self.world.num_processes)]
        self._heartbeat.store.set(keys[self.world.process_index], text)
        self._wait_for(dict(enumerate(keys)), limit_seconds)
        return keys

    def _wait_for(self, keys: dict[int, str], limit_seconds: float) -> None:
        """Waits until the keys, by the rank of the process that stores them, are in the store."""
        heartbeat = self._heartbeat
        start = last_line = time.monotonic()
        pause = POLL_SECONDS / 10
        while True:
            try:
                keys = {rank: key for rank, key in keys.items() if not heartbeat.store.check([key])}
            except dist.DistError:
                heartbeat.verdict = heartbeat.verdict or heartbeat.reporter().lost_main_machine(LAUNCHER_STOPPED)
                raise heartbeat.verdict.as_error() from None
            if not keys:
                return
            self.check()
            now = time.monotonic()
            if now - start > limit_seconds:
                reason = f"the other processes waited for {limit_seconds:.0f} s"
                verdict = heartbeat.reporter().lost_processes(list(keys), reason)
                store_verdict(heartbeat.store, verdict)
                raise verdict.as_error()
            if now - last_line >= WAIT_LINE_SECONDS and self.world.is_local_main:
                last_line = now
                self._print_waits(sorted(keys))
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)

    def _print_waits(self, ranks: list[int]) -> None:
        for rank in ranks:
            state = self._heartbeat.states.get(rank)
            status = f"on {state.host}: {state.status}" if state else "which has not started yet"
            print(f"{self.host} waits for process {rank}, {status}", file=sys.stderr, flush=True)

    # Errors

    def _find_cause(self, error: BaseException) -> BaseException:
        """Returns the error that this process ends with, and reports it: its own, or that of the process at fault."""
        heartbeat = self._heartbeat
        verdict = heartbeat.verdict
        if verdict and str(error) == verdict.text:
            return error
        if verdict and verdict.kind == "user" and isinstance(error, Stopped):
            return verdict.as_error()  # the launcher stopped this process because another one ended
        error = as_user_error(error)
        for kind, type_ in KINDS.items():
            if isinstance(error, type_):
                store_verdict(heartbeat.store, heartbeat.reporter().own_error(kind, error))
                return error
        if not _is_communication_error(error):
            store_verdict(heartbeat.store, heartbeat.reporter().crashed(error))
            return error
        failed = time.monotonic()
        while heartbeat.verdict is None and time.monotonic() < failed + SETTLE_SECONDS:
            time.sleep(POLL_SECONDS)
        if heartbeat.verdict is None:
            verdict = self._explain_failed_collective(error, failed)
            store_verdict(heartbeat.store, verdict)
            heartbeat.verdict = heartbeat.verdict or verdict
        return heartbeat.verdict.as_error()

    def _explain_failed_collective(self, error: BaseException, failed: float) -> Verdict:
        """Returns the verdict on a collective that failed SETTLE_SECONDS ago, at `failed` (`time.monotonic`)."""
        heartbeat, reporter = self._heartbeat, self._heartbeat.reporter()
        if heartbeat.answered < failed:
            return reporter.lost_main_machine("it does not answer")
        # A heartbeat that was sent before the failure may be read a little after it.
        if silent := heartbeat.silent_since(failed + 2 * BEAT_SECONDS):
            return reporter.lost_processes(silent, "it has died, or its link is cut")
        # All processes live: one of them hangs, or two of them cannot reach each other.
        others = {rank: state for rank, state in reporter.states.items() if rank != self.world.process_index}
        if hanging := [rank for rank, state in others.items() if not state.leaving]:
            return reporter.lost_processes(hanging, f"it hangs ({first_line(error)})")
        for rank, state in others.items():
            if state.address and not _is_reachable(state.address, self.world.main_port):
                return reporter.unreachable(rank, error)
        time.sleep(SETTLE_SECONDS)  # another process may know more
        return reporter.disconnected(error)

    def _wait_until_all_leave(self) -> None:
        """Waits up to EXIT_SECONDS until all others leave too: the store may end with the main machine's processes."""
        heartbeat = self._heartbeat
        keys = {rank: f"leaving/{rank}" for rank in range(self.world.num_processes)}
        until = time.monotonic() + EXIT_SECONDS
        with suppress(dist.DistError):
            heartbeat.store.set(keys[self.world.process_index], "")
            while time.monotonic() < until:
                dead = heartbeat.silent_since(time.monotonic() - SETTLE_SECONDS)
                if all(rank in dead or heartbeat.store.check([key]) for rank, key in keys.items()):
                    return
                time.sleep(POLL_SECONDS)


def _is_communication_error(error: BaseException) -> bool:
    """Returns whether a collective or the store failed."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in CONNECTION_WORDS)
    )


def _is_reachable(address: str, port: int) -> bool:
    """Returns whether a machine answers; a refused connection is an answer too."""
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True
