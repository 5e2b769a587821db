"""Runs attempts of the run until one succeeds or another one would not help, and passes on stop requests.

Each attempt runs in a forked child: the rendezvous, then the launcher. The supervisor itself opens no store and starts
no thread. torchrun's own restarts are not used: their processes would read the addresses of the failed attempt.
"""

import contextlib
import os
import signal
import time
import uuid
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from forge_lib.distributed.lock import LOCK_NAME, Holder, LauncherLock
from forge_lib.errors import EXIT_DIVERGED, EXIT_PEER_LOST, EXIT_USER_ERROR
from forge_lib.launch.attempt import run_attempt
from forge_lib.launch.child import FORK, Child
from forge_lib.launch.config import ForgeConfig
from forge_lib.launch.messages import Joined, ProcessFailed, Unavailable, Waiting, print_message
from forge_lib.launch.rendezvous import Rendezvous
from forge_lib.process import StopSignals, shell_exit_code

POLL_SECONDS = 0.25
STATUS_SECONDS = 5  # between two lines about the machines that this one waits for
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
RENDEZVOUS_PAUSE = 2.0  # between two rendezvous of one attempt
SAME_FAILURES = 3  # this many equal failures in a row end the run
TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Failure:
    """A failed attempt: its exit code, and the last step that it finished; None if it did not begin to train."""

    code: int
    step: int | None


class Supervisor(StopSignals):
    """Runs attempts, one after the other."""

    def __init__(self, config: ForgeConfig):
        self.config = config
        self.machine_id = uuid.uuid4().hex
        self.lock = LauncherLock(Path(config.output_dir).expanduser())
        self.hosts: dict[int, str] = {}  # by machine number, from the last complete rendezvous
        self.is_over = False  # the supervisor itself has ended the attempt, and printed the reason
        self.status_printed_at = 0.0
        # Of the last child: its exit code, the process that failed first, and why the rendezvous failed.
        self.child_code, self.failed, self.unavailable = 0, None, ""

    def run(self) -> int:
        """Returns the exit code of the last attempt; 0 if a user stopped it and nothing else went wrong."""
        with self.lock:
            return self._run_attempts()

    def _run_attempts(self) -> int:
        failures: list[Failure] = []
        farthest_step, pause = -1, FIRST_PAUSE
        while True:
            before = self._lock_holder()
            code = self._run_attempt(keep_trying=bool(failures or self.config.max_restarts))
            if code == 0 or (self.stopping and code == TERMINATED):
                return 0
            if code == EXIT_USER_ERROR or self.is_over:
                return code
            holder = self._lock_holder()
            step = holder.step if holder.pid not in (0, before.pid) else None
            failures.append(Failure(code, step))
            if step:  # from now on it has its own checkpoints, instead of what --resume names
                self.config.resume = "auto"
            if step is not None and step > farthest_step:
                farthest_step, pause = step, FIRST_PAUSE
            # After these codes, train.py has already printed the reason.
            description = [] if code in (EXIT_PEER_LOST, EXIT_DIVERGED) else [self._describe(failures[-1])]
            reason = self._reason_to_end(failures)
            if reason is not None:
                print_message(*description, *reason)
                return code
            restart = f"starting again in {pause:g} s (restart {len(failures)} of {self.config.max_restarts})"
            print_message(*description, restart)
            self.lock.set_waiting(restart)
            self._pause(pause)
            self.lock.set_waiting("")
            pause = min(2 * pause, LONGEST_PAUSE)
            if self.stopping:
                print_message("stopped before it was started again")
                return 0

    def _lock_holder(self) -> Holder:
        """Returns the process that trains or did last, and its step; an unknown one without run.lock."""
        try:
            with open(Path(self.config.output_dir).expanduser() / LOCK_NAME, "rb") as file:
                return Holder.read(file)
        except OSError:
            return Holder()

    def _describe(self, failure: Failure) -> str:
        who, code = "the launcher", self.child_code
        if self.failed:
            who, code = f"process {self.failed.rank}", self.failed.exit_code
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{who} {how}{'' if failure.step is None else f' at step {failure.step}'}"

    def _reason_to_end(self, failures: list[Failure]) -> list[str] | None:
        """Returns what to print if no other attempt follows, else None."""
        step, max_restarts = failures[-1].step, self.config.max_restarts
        if self.stopping or not max_restarts:
            return []
        if failures[-SAME_FAILURES:] == [failures[-1]] * SAME_FAILURES:
            when = "before the first step" if step is None else f"at step {step}"
            return [f"the same failure {when} three times: not starting again", "its checkpoints are kept"]
        if len(failures) > max_restarts:
            return [
                f"not starting again: {max_restarts} of {max_restarts} restarts are used",
                "its checkpoints are kept",
            ]
        return None

    def _run_attempt(self, keep_trying: bool) -> int:
        """Runs a child and, while machines are unavailable, another one; returns the exit code of the last."""
        self.status_printed_at = time.monotonic()
        deadline = self.status_printed_at + self.config.join_timeout
        while True:
            code = self._run_child(keep_trying, deadline)
            if not self.unavailable:
                return code
            if self.stopping:
                print_message("stopped before training began")
                return 0
            if time.monotonic() > deadline:
                self.is_over = True
                print_message(f"error: {self.unavailable}")
                return EXIT_PEER_LOST
            self._print_status(f"{self.unavailable}; trying again")
            self._pause(RENDEZVOUS_PAUSE)

    def _run_child(self, keep_trying: bool, deadline: float) -> int:
        """Runs a child to its end; returns its exit code. After a failure none of its processes is left."""
        self.child_code, self.failed, self.unavailable = 0, None, ""
        receiver, sender = FORK.Pipe(duplex=False)
        rendezvous = Rendezvous(self.config, self.machine_id, self.hosts, keep_trying, deadline, sender)
        child = Child(run_attempt, rendezvous, os.getpid())
        sender.close()
        code = 1
        try:
            code = self._watch(child, receiver)
        finally:
            if code or child.is_alive():
                child.kill()
            receiver.close()
        return code

    def _watch(self, child: Child, pipe: Connection) -> int:
        """Waits for the end of a child, or ends it itself; returns the exit code."""
        while child.is_alive():
            child.watch_descendants()
            if self.stopping and child.is_alive():
                code = 128 + signal.SIGINT if self.quit_now else child.request_stop(self.config.grace_seconds)
                if code is not None:
                    self.is_over = True
                    return code
            child.process.join(POLL_SECONDS)
            self._receive(pipe)
        self._receive(pipe)
        self.child_code = child.process.exitcode or 0
        return shell_exit_code(self.child_code)

    def _receive(self, pipe: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while pipe.poll():
                match pipe.recv():
                    case Waiting(text):
                        self._print_status(text)
                    case Joined(hosts):
                        self.hosts = hosts
                        self.lock.set_waiting("")
                    case Unavailable(reason):
                        self.unavailable = reason
                    case ProcessFailed() as failed:
                        self.failed = failed

    def _print_status(self, line: str) -> None:
        self.lock.set_waiting(line)
        if time.monotonic() - self.status_printed_at >= STATUS_SECONDS:
            self.status_printed_at = time.monotonic()
            print(line, flush=True)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < until:
            time.sleep(min(POLL_SECONDS, seconds))
