"""The side channel between the processes of a run: a few keys in the launcher's TCPStore, beside the process group.

Waiting costs nothing here and has no time-out of its own: a machine that still tokenizes says how far it is. Each
process keeps saying that it lives and what it does. So a mistake on one machine ends all of them with its message
within a second, and a machine that has died or fallen silent is known by name.
"""

import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import ClassVar

import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from forge_lib.errors import (
    KINDS,
    RESUME_HINT,
    DivergedError,
    PeerLostError,
    Stopped,
    UserError,
    as_user_error,
    exit_code,
)
from forge_lib.process import World

POLL_SECONDS = 0.1
BEAT_SECONDS = 0.5
STORE_SECONDS = 30  # the launcher has opened its store before it starts a process
WAIT_LINE_SECONDS = 10
START_SECONDS = 180  # all processes are started at about the same time; one that says nothing for so long is lost
SETTLE_SECONDS = 3  # after a failed collective: a process that does not beat in this time is the one that is lost
HANG_SECONDS = 3600  # the longest wait for a process that lives, at a meeting
LEAVE_SECONDS = 2  # once the run is known to be over: how long this process may take to notice it by itself
FAREWELL_SECONDS = 5  # how long a failing process waits until its peers have heard why
PROBE_SECONDS = 2


class Peers:
    """All processes of a run, as one of them sees the others; use it as a context manager, around all that they do.

    An error inside it is told to the others, and an error that another process has caused is raised as what that one
    has said: UserError, PeerLostError, DivergedError or Stopped.

    Args:
        world: the processes that are expected.
        timeout_seconds: a process that has been silent for so long is lost. If this process hangs in a collective by
            then, it says so and ends with exit code 3.
        start_seconds: one that has said nothing at all for so long is lost.
        cure: what a person can do when one is lost.

    Attributes:
        step: optimizer steps done, for messages.
        address: this machine's address in the network of the peers, for messages.
        on_peer_error: is called with the error before this process ends for one that another has caused.
    """

    met: ClassVar[bool] = False  # whether this process has a side channel that tells its errors
    stuck: ClassVar[bool] = False  # whether a thread of one still waits for a link that has fallen silent

    def __init__(
        self,
        world: World,
        timeout_seconds: float = 60.0,
        leave: Callable[[int], None] = os._exit,
        start_seconds: float = START_SECONDS,
        cure: str = RESUME_HINT,
    ):
        self.world, self.timeout_seconds, self.host = world, timeout_seconds, socket.gethostname()
        self.start_seconds, self.cure = start_seconds, cure
        self.step, self.address = 0, ""
        self.on_peer_error: Callable[[BaseException], None] = lambda error: None
        self._leave = leave
        self._posted: dict[str, str] = {}  # where there is one process
        self._doing = "starting"
        self._done, self._leaving = threading.Event(), threading.Event()
        self._states: dict[int, dict] = {}  # what each process has said last
        self._changed: dict[int, float] = {}  # and when: its beat counts up
        self._begun = self._talked = time.monotonic()  # when the store has last answered
        self._verdict: dict | None = None  # the first error that any process has told

    def __enter__(self):
        if self.world.num_processes > 1:
            Peers.met = True
            self._store = self._open_store()
            self._begun = self._talked = time.monotonic()
            self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._watch)]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind, error: BaseException | None, trace):
        if self.world.num_processes == 1:
            return
        self._leaving.set()
        found = error
        try:
            if error is not None:
                found = self._settle(error)
                if found is not error:
                    self.on_peer_error(found)
                self._farewell()
        finally:
            self._done.set()
            for thread in self._threads:
                thread.join(1)
            Peers.stuck = any(thread.is_alive() for thread in self._threads)
        if found is not error:
            raise found from None

    def set_status(self, doing: str) -> None:
        """Tells the others what this process is doing now; cheap, to be called often."""
        self._doing = doing

    def all_gather(self, facts: dict, name: str = "facts", limit_seconds: float = math.inf) -> list[dict]:
        """Hands `facts` (of JSON types) to all processes, waits for theirs, and returns them by rank.

        Call on all processes, each time with another `name`. Now and then one process of each machine says on stderr
        for whom it waits; it waits for one that lives no longer than the limit.

        Raises:
            UserError, PeerLostError, Stopped: another process has failed, or has not been heard of for too long.
        """
        world = self.world
        if world.num_processes == 1:
            return [facts]
        self._store.set(f"{name}/{world.process_index}", json.dumps(facts))
        self._wait_for({rank: f"{name}/{rank}" for rank in range(world.num_processes)}, limit_seconds)
        return [json.loads(self._store.get(f"{name}/{rank}")) for rank in range(world.num_processes)]

    def barrier(self, name: str) -> float:
        """Waits until all processes have called this with the same name; returns the seconds that it took.

        A barrier for waits that may be long: a lost machine ends it, and a process that keeps the others waiting for
        an hour.
        """
        start = time.monotonic()
        if self.world.num_processes > 1:
            self._store.set(f"met/{name}/{self.world.process_index}", "")
            self._wait_for({rank: f"met/{name}/{rank}" for rank in range(self.world.num_processes)}, HANG_SECONDS)
        return time.monotonic() - start

    def check(self) -> None:
        """Raises what has ended the run for all, where anything has; cheap, for waits of another kind."""
        if self._verdict:
            raise self._as_error(self._verdict)

    def set_first(self, key: str, text: str) -> None:
        """Leaves a text under a key for all; the first one that is left stays."""
        if self.world.num_processes == 1:
            self._posted.setdefault(key, text)
        else:
            self._store.compare_set(f"post/{key}", "", text)

    def get_first(self, key: str) -> str:
        """Returns the text that some process has left; call where it is known that one has."""
        if self.world.num_processes == 1:
            return self._posted[key]
        return self._store.get(f"post/{key}").decode()

    def release_launchers(self) -> None:
        """Spares torchrun's agents their exit barrier: one that a signal has ended never comes, and they would wait
        for it for five minutes. For a planned end, when all processes have met.
        """
        run_id = os.environ.get("TORCHELASTIC_RUN_ID")
        if self.world.num_processes > 1 and run_id:
            store = self._store.underlying_store
            store.set(f"{run_id}/torchelastic/agent/terminal_state/last_member", "<val_ignored>")

    def _wait_for(self, keys: dict[int, str], limit_seconds: float = math.inf) -> None:
        begun = said = time.monotonic()
        pause = POLL_SECONDS / 10
        while True:
            try:
                keys = {rank: key for rank, key in keys.items() if not self._store.check([key])}
            except dist.DistError:
                self._verdict = self._verdict or self._verdict_on_main_machine("its launcher has stopped")
                raise self._as_error(self._verdict) from None
            if not keys:
                return
            if self._verdict:
                raise self._as_error(self._verdict)
            now = time.monotonic()
            if now - begun > limit_seconds:
                verdict = self._verdict_on(list(keys), f"the others have waited for {limit_seconds:.0f} s")
                self._tell(verdict)
                raise self._as_error(verdict)
            if now - said >= WAIT_LINE_SECONDS and self.world.local_process_index == 0:
                said = now
                for rank in (rank for rank in sorted(keys) if rank >= 0):
                    state = self._states.get(rank)
                    doing = f"on {state['host']}: {state['doing']}" if state else "which has not started yet"
                    print(f"{self.host} waits for process {rank}, {doing}", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)

    # The two threads. One talks with the store, and may hang in that where a link falls silent; the other one looks at
    # the clock alone.

    def _talk(self) -> None:
        ranks, beat = range(self.world.num_processes), 0
        try:
            store = self._open_store()
            while not self._done.wait(BEAT_SECONDS if beat else 0):
                beat += 1
                mine = {"beat": beat, "host": self.host, "address": self.address, "doing": self._doing}
                mine |= {"step": self.step, "leaving": self._leaving.is_set()}
                store.set(f"state/{self.world.process_index}", json.dumps(mine))
                for rank in ranks:
                    if rank in self._states or store.check([f"state/{rank}"]):
                        self._hear(rank, json.loads(store.get(f"state/{rank}")))
                if self._verdict is None and store.check(["error"]):
                    self._verdict = self._with_ranks(json.loads(store.get("error")))
                self._talked = time.monotonic()
        except (dist.DistError, UserError):
            if self._verdict is None and not self._done.is_set():
                self._verdict = self._verdict_on_main_machine("its launcher has stopped")

    def _open_store(self) -> dist.Store:
        """Opens a connection of its own, whose answers may take longer than a link may be silent."""
        store = open_store(self.world)
        store.set_timeout(timedelta(seconds=2 * self.timeout_seconds + STORE_SECONDS))
        return store

    def _hear(self, rank: int, state: dict) -> None:
        if self._states.get(rank, {"beat": None})["beat"] != state["beat"]:
            self._changed[rank] = time.monotonic()
        self._states[rank] = state

    def _watch(self) -> None:
        """Ends this process where it cannot come to know by itself that the run is over, as in a collective."""
        since, looked = None, time.monotonic()
        while not self._done.wait(BEAT_SECONDS):
            now = time.monotonic()
            if self._verdict is None:
                self._verdict = self._find_lost(now, looked)
                looked = now
                continue
            since = since or now
            if now - since > LEAVE_SECONDS and not self._leaving.is_set():
                error = self._as_error(self._verdict)
                threading.Thread(target=self._tell, args=(self._verdict,), daemon=True).start()
                with suppress(Exception):
                    self.on_peer_error(error)
                print(f"error: {error}", file=sys.stderr, flush=True)
                time.sleep(BEAT_SECONDS)
                self._leave(exit_code(error))
                return

    def _find_lost(self, now: float, looked: float) -> dict | None:
        """Returns the verdict on who has been silent for too long, if anybody has."""
        why = f"silent for {self.timeout_seconds:g} s"
        if now - looked > self.timeout_seconds:
            text = f"{self._me()} was frozen for {now - looked:.0f} s: the others have given it up. {self.cure}"
            return self._verdict_with("lost", text)
        if now - self._talked > self.timeout_seconds:
            return self._verdict_on_main_machine(why)
        if silent := [rank for rank, changed in list(self._changed.items()) if now - changed > self.timeout_seconds]:
            return self._verdict_on(silent, why)
        unheard = [rank for rank in range(self.world.num_processes) if rank not in self._states]
        if unheard and now - self._begun > max(self.start_seconds, self.timeout_seconds):
            names = ", ".join(map(str, unheard))
            text = f"lost process {names}, which has not begun within {now - self._begun:.0f} s: see its machine"
            return self._verdict_with("lost", f"{text}. {self.cure}")
        return None

    # What an error means, and how the others hear of it.

    def _settle(self, error: BaseException) -> BaseException:
        """Returns the error that this process ends with: its own, or the one of another process that has caused it."""
        if self._verdict and str(error) == self._verdict["text"]:
            return error
        if self._verdict and self._verdict["kind"] == "user" and isinstance(error, Stopped):
            return self._as_error(self._verdict)  # the launcher ends what is left of its processes
        error = as_user_error(error)
        for kind, type_ in KINDS.items():
            if isinstance(error, type_):
                self._tell(self._verdict_with(kind, f"{self._me()}: {error}"))
                return error
        if not _is_communication(error):
            self._tell(
                self._verdict_with("lost", f"{self._me()} has failed: {type(error).__name__}: {error}. {self.cure}")
            )
            return error
        until = time.monotonic() + SETTLE_SECONDS
        failed = time.monotonic()
        while self._verdict is None and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        if self._verdict is None:
            heard = failed + 2 * BEAT_SECONDS  # what it had said before is heard a little later
            silent = [rank for rank, changed in list(self._changed.items()) if changed < heard]
            if self._talked < failed:
                verdict = self._verdict_on_main_machine("it does not answer")
            elif silent:
                verdict = self._verdict_on(silent, "it has died, or its link is cut")
            else:
                verdict = self._hung(error)
            self._tell(verdict)
            self._verdict = self._verdict or verdict
        return self._as_error(self._verdict)

    def _hung(self, error: BaseException) -> dict:
        """All processes live, yet a collective has failed: one of them hangs, or two cannot reach each other."""
        others = [rank for rank in list(self._states) if rank != self.world.process_index]
        hung = [rank for rank in others if not self._states[rank]["leaving"]]
        reason = str(error).splitlines()[0]
        if hung:
            return self._verdict_on(hung, f"it hangs ({reason})")
        for rank in others:
            state = self._states[rank]
            if state["address"] and not _answers(state["address"], self.world.main_port):
                text = f"{self._me()} cannot reach {self._name(rank)} at {state['address']}"
                return self._verdict_with("lost", f"{text} ({reason}). Mend the link. {self.cure}")
        time.sleep(SETTLE_SECONDS)  # another one may know more
        return self._verdict_with(
            "lost", f"step {self.step + 1}: the processes have lost each other ({reason}). {self.cure}"
        )

    def _verdict_on(self, ranks: list[int], why: str) -> dict:
        names = ", ".join(
            f"{self._name(rank)} (in step {self._states[rank]['step'] + 1}, {self._states[rank]['doing']})"
            for rank in ranks
        )
        return self._verdict_with(
            "lost", f"lost {names}: {why}. {self._me()} was in step {self.step + 1}. {self.cure}"
        )

    def _with_ranks(self, verdict: dict) -> dict:
        """Names the processes of a machine whose launcher has said that it starts anew."""
        ranks = [rank for rank, state in list(self._states.items()) if state["host"] == verdict.get("host")]
        return self._verdict_on(ranks, "they have died, and their machine starts anew") if ranks else verdict

    def _verdict_on_main_machine(self, why: str) -> dict:
        state = self._states.get(0)
        name = f"{state['host']} " if state else ""
        text = (
            f"lost the main machine {name}at {self.world.main_address}:{self.world.main_port}: {why}; see its messages"
        )
        return self._verdict_with("lost", f"{text} there. {self._me()} was in step {self.step + 1}. {self.cure}")

    def _verdict_with(self, kind: str, text: str) -> dict:
        return {"kind": kind, "rank": self.world.process_index, "text": text}

    def _me(self) -> str:
        return f"{self.host} (process {self.world.process_index})"

    def _name(self, rank: int) -> str:
        return f"process {rank} on {self._states[rank]['host']}"

    @staticmethod
    def _as_error(verdict: dict) -> BaseException:
        return KINDS[verdict["kind"]](verdict["text"])

    def _tell(self, verdict: dict) -> None:
        with suppress(dist.DistError):
            self._store.compare_set("error", "", json.dumps(verdict))

    def _farewell(self) -> None:
        """Stays a little, until all others have heard: the store ends with the main machine's processes."""
        rank, ranks = self.world.process_index, range(self.world.num_processes)
        until = time.monotonic() + FAREWELL_SECONDS
        with suppress(dist.DistError):
            self._store.set(f"heard/{rank}", "")
            while time.monotonic() < until:
                now = time.monotonic()
                gone = {r for r, changed in list(self._changed.items()) if now - changed > SETTLE_SECONDS}
                if all(r in gone or self._store.check([f"heard/{r}"]) for r in ranks):
                    return
                time.sleep(POLL_SECONDS)


def open_store(world: World) -> dist.Store:
    """Joins the store that the launcher holds, or makes one where the first process is expected to hold it."""
    debug_file = os.environ.get("ACCELERATE_DEBUG_RDV_FILE")  # set by accelerate's debug_launcher
    if debug_file:
        store = dist.FileStore(debug_file, world.num_processes)
    else:
        launcher_holds_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = dist.TCPStore(
                world.main_address,
                world.main_port,
                is_master=world.process_index == 0 and not launcher_holds_it,
                timeout=timedelta(seconds=STORE_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,  # torch opens the same store again for its process group
            )
        except dist.DistError as error:
            raise UserError(
                f"cannot open the store at {world.main_address}:{world.main_port}: {str(error).splitlines()[0]}"
            ) from None
    return dist.PrefixStore(f"forge/{world.attempt}", store)


def _is_communication(error: BaseException) -> bool:
    """Whether a collective has failed: gloo and NCCL raise plain RuntimeErrors."""
    marks = ("gloo", "NCCL", "Connection", "Timed out", "timeout", "Broken pipe", "Socket", "recv", "peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)
    )


def _answers(address: str, port: int) -> bool:
    """Whether a machine can be reached: a refused connection is an answer too."""
    try:
        socket.create_connection((address, port), timeout=PROBE_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def report_errors(program: str) -> Iterator[None]:
    """Turns an error that a person can act on into one message and its exit code, here and on all other processes."""
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        yield
    except (UserError, PeerLostError, DivergedError, Stopped) as error:
        found = error
        if isinstance(error, Stopped) and isinstance(error.__context__, UserError):
            found = error.__context__  # on its way out for that, the launcher told it to end
    except Exception as error:
        found = as_user_error(error)
        if found is error and not dist.is_initialized():
            raise
        if found is error:
            traceback.print_exc()
            _end(1)
    else:
        if Peers.stuck:
            _end(0)
        return
    word = "" if isinstance(found, Stopped) else "error: "
    print(f"{program}: {word}{found}", file=sys.stderr, flush=True)
    if isinstance(found, UserError):
        _tell_peers(found)
    _end(exit_code(found))


def _end(code: int) -> None:
    """Ends this process; with a failed process group or a silent link, without the interpreter's way out: it hangs."""
    if dist.is_initialized() or Peers.stuck:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _tell_peers(error: UserError) -> None:
    """A mistake that was found before this process had met the others, as an unknown flag."""
    try:
        world = World.from_environment()
        if world.num_processes > 1 and not Peers.met:
            with Peers(world):
                raise error
    except (UserError, RuntimeError):
        pass  # there is nobody to tell
