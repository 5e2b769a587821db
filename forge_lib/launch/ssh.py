"""The run on all machines of a cluster from one terminal: `p2p-llm-forge --cluster cluster.yaml --ssh`.

Here, `run` starts the part of each machine over ssh (this machine's own without), shows what they write and tells
them to stop. There, `python -m forge_lib.launch.guard` starts p2p-llm-forge and watches over it. What is wished comes by its
stdin; when that ends, the connection or the terminal here is gone, which is a wish to stop too.

A terminal there, as by `ssh -t`, would send Ctrl-C as well. But the program would draw progress bars on it, each line
that it writes would fail when it is gone, before all is saved, and nobody would be there to kill a program that hangs.
"""

import contextlib
import copy
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from forge_lib.cluster.topology import Cluster, Machine, find_machine
from forge_lib.config import LaunchConfig
from forge_lib.errors import UserError
from forge_lib.flags import to_flags
from forge_lib.launch.guard import END, STOP, say
from forge_lib.process import StopSignals, ignore_output_errors, kill_process_tree

ROOT = Path(__file__).resolve().parents[2]
SSH = ["ssh", "-T", "-oBatchMode=yes", "-oConnectTimeout=10", "-oServerAliveInterval=15", "-oServerAliveCountMax=4"]
SSH += ["-oControlPath=none"]  # a connection that is shared has other options, and does not end with the run
POLL_SECONDS = 0.25
MARGIN_SECONDS = 30  # beyond --grace-seconds, and p2p-llm-forge's own margin, before what hangs is killed
LAST_SECONDS = 5  # for what a machine has said last to be shown
CLOSE_SECONDS = 15  # from the wish to end at once to the end of a connection that does not answer
FOLLOW_SECONDS = 10  # for the run's own rules to end the others, when a machine has made an end of it
MISTAKE, LOST, DIVERGED = 2, 3, 4  # exit codes of train.py
INTERRUPTED, KILLED = 128 + signal.SIGINT, 128 + signal.SIGKILL
SSH_FAILED = 255  # the exit code of ssh where it is not that of the program
NOT_FOUND = (126, 127)  # of a shell
CURES = {  # by what ssh says
    "Permission denied": "let your key in there (ssh-copy-id)",
    "Host key verification failed": "run `ssh {}` once by hand and compare its key",
    "Could not resolve": "correct `address` or `ssh` in cluster.yaml",
}
OTHER_CURE = "see whether `ssh {}` works by hand, or start p2p-llm-forge --cluster there"


def run(cluster: Cluster, config: LaunchConfig, place: Callable[[Any, Cluster, Machine], None]) -> int:
    """Runs a cluster's machines to their end; when it returns no process that it has started is left here.

    Args:
        config: of the command, with all of its flags.
        place: puts what the cluster says of a machine into a configuration.

    Returns:
        The exit code, as `choose_code` has it; 130 where a person has ended what would not end by itself.

    Raises:
        UserError: a machine's destination cannot be one, or there is no ssh.
    """
    own = _find_own(cluster, config.machine)
    commands = {}
    for machine in cluster.machines:
        placed = copy.copy(config)
        place(placed, cluster, machine)
        placed.ssh = False
        patience = f"{placed.grace_seconds + MARGIN_SECONDS:g}"
        program = ["-m", "forge_lib.launch.guard", patience, *to_flags(placed, type(placed))]
        commands[machine] = [sys.executable, *program] if machine == own else ssh_command(machine, program)
    if not shutil.which("ssh") and any(machine != own for machine in commands):
        raise UserError("--ssh needs the program `ssh` (Debian, Ubuntu: apt install openssh-client)")
    terminal = Terminal(config.timeout_seconds)
    with ignore_output_errors(), terminal.handling_signals():
        return terminal.run(commands)


def _find_own(cluster: Cluster, wanted: str) -> Machine | None:
    try:
        return find_machine(cluster, wanted)
    except UserError:
        if wanted != "auto":
            raise
        return None


def ssh_command(machine: Machine, program: list[str]) -> list[str]:
    """Returns the command that runs Python with the words of `program` on a machine.

    Raises:
        UserError: the destination would be read as an option, or is more than one word.
    """
    destination = destination_of(machine)
    if destination.startswith("-") or not destination.isprintable() or " " in destination:
        raise UserError(
            f"machine {machine.name!r}: ssh is {destination!r:.99}, expected user@host, ssh://user@host:port, or a "
            "name in ~/.ssh/config, where all other options can stand"
        )
    folder = machine.folder or str(ROOT.relative_to(Path.home()) if ROOT.is_relative_to(Path.home()) else ROOT)
    folder = folder if folder.startswith(("/", "~/")) else f"~/{folder}"  # and CDPATH changes nothing
    command = f"cd {_quoted(folder)} && exec {_quoted(machine.python)} {shlex.join(program)}"
    return [*SSH, "--", destination, command]


def destination_of(machine: Machine) -> str:
    """Returns what `ssh` is told to get to a machine."""
    return machine.ssh or machine.address


def _quoted(path: str) -> str:
    """For a shell, which is to put its home folder for ~."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") else shlex.quote(path)


def choose_code(codes: list[int]) -> int:
    """Returns the most telling one of the machines' exit codes.

    A mistake (2) comes first, then a run that diverged (4), then whatever else a machine may fail with. That one was
    lost (3, also for a lost connection) is what the machines say that have not failed.
    """
    codes = [LOST if code == SSH_FAILED else code for code in codes]
    others = [code for code in codes if code not in (MISTAKE, DIVERGED, LOST, INTERRUPTED, 0)]
    return next(code for code in (MISTAKE, DIVERGED, *others, LOST, INTERRUPTED, 0) if code in codes)


class Part:
    """What runs on one machine, as it is seen from here.

    Attributes:
        code: its exit code; None as long as it runs.
        has_spoken: whether a line of it has come. What ssh itself and the shell there have to say goes elsewhere.
    """

    def __init__(self, machine: Machine, words: list[str], width: int, lock: threading.Lock):
        self.machine, self.code, self.has_spoken = machine, None, False
        self._prefix, self._lock = f"{machine.name:{width}} | ".encode(), lock
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        # A session of its own: Ctrl-C here comes to it as a wish alone, and ssh asks nobody for a password.
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=self._errors, start_new_session=True)
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._thread.start()

    def _show(self) -> None:
        for line in self._process.stdout:
            self.has_spoken = True
            with self._lock, contextlib.suppress(OSError):
                sys.stdout.buffer.write(self._prefix + plain(line) + b"\n")
                sys.stdout.buffer.flush()

    def has_just_ended(self) -> bool:
        """Tells once of its end, when all that it has said is shown."""
        if self.code is not None or self._process.poll() is None:
            return False
        self._thread.join(LAST_SECONDS)  # no longer: a person may have stopped the terminal's output
        code = self._process.returncode
        self.code = code if code >= 0 else 128 - code
        return True

    def tell(self, wish: bytes) -> None:
        """Lets it know what is wished."""
        with contextlib.suppress(OSError):
            os.write(self._process.stdin.fileno(), wish)

    def last_error(self) -> str:
        """Returns the last line that ssh, the shell or Python there has said before the program ran."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip().rstrip(".") for line in reversed(lines) if line.strip()), "it said nothing")

    def close(self) -> None:
        """Ends what is left of it here."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process.poll() is None:
                kill_process_tree(psutil.Process(self._process.pid))
                self.code = KILLED
        self._process.wait()
        self._thread.join(1)
        self._errors.close()


def plain(line: bytes) -> bytes:
    """Returns of a line what a terminal would show in the end: what follows the last carriage return."""
    return line.rstrip(b"\r\n").rsplit(b"\r", 1)[-1]


class Terminal(StopSignals):
    """Follows the machines' parts, and tells them what a person wishes.

    Args:
        timeout_seconds: of the run, after which its processes know that one is lost.
    """

    def __init__(self, timeout_seconds: float):
        self.timeout_seconds = timeout_seconds
        self.parts: list[Part] = []
        self.refused = False  # a machine could not be reached, or its part did not start
        self.failed, self.follow_at = "", math.inf  # a machine that failed, and when the others must have noticed
        self.told, self.told_at = b"", math.inf  # what the machines have been told

    def run(self, commands: dict[Machine, list[str]]) -> int:
        """Starts the commands and follows them to their end; returns the exit code."""
        width, lock = max(len(machine.name) for machine in commands), threading.Lock()
        try:
            for machine, words in commands.items():
                self.parts.append(Part(machine, words, width, lock))
            self._follow()
        finally:
            for part in self.parts:
                part.close()
        if self.refused:
            return MISTAKE
        codes = [part.code for part in self.parts]
        if any(codes):
            say(", ".join(f"{part.machine.name} ended with exit code {part.code}" for part in self.parts))
        return INTERRUPTED if self.quit_now and any(codes) else choose_code(codes)

    def _follow(self) -> None:
        """Until all have ended, or have been told so and do not."""
        while any(part.code is None for part in self.parts):
            time.sleep(POLL_SECONDS)
            for part in self.parts:
                if part.has_just_ended() and part.code:
                    self._account(part)
            now = time.monotonic()
            if now > self.follow_at and not self.stopping:
                self.stopping = True
                say(f"{self.failed} has failed, and the others run on")
            wish = END if self.quit_now or self.refused else STOP if self.stopping else b""
            if wish != self.told:
                self.told, self.told_at = wish, now
                if wish == STOP:
                    say("stopping all machines; Ctrl-C again ends at once")
                for part in self.parts:
                    part.tell(wish)
            silent = ", ".join(part.machine.name for part in self.parts if part.code is None)
            if silent and self.told == END and now > self.told_at + CLOSE_SECONDS:
                say(f"{silent} did not end within {CLOSE_SECONDS} s: the connection is closed; see what runs there")
                return

    def _account(self, part: Part) -> None:
        """Says of a machine that has failed what it cannot say itself."""
        name, destination = part.machine.name, destination_of(part.machine)
        if part.code == SSH_FAILED and part.has_spoken:
            say(f"{name}: the connection is lost ({part.last_error()}); it is stopped there when that is noticed")
        elif part.code == SSH_FAILED:
            reason = part.last_error().removeprefix("ssh: ")
            cure = next((cure for words, cure in CURES.items() if words in reason), OTHER_CURE).format(destination)
            say(f"error: {name}: ssh {destination}: {reason}; {cure}")
            self.refused = True
        elif part.code in NOT_FOUND or not (part.has_spoken or self.told):
            say(f"error: {name}: {part.last_error()}; correct `folder` or `python` of {name} in cluster.yaml")
            self.refused = True
        patience = FOLLOW_SECONDS + (0 if part.code == MISTAKE else self.timeout_seconds)
        if time.monotonic() + patience < self.follow_at:
            self.failed, self.follow_at = name, time.monotonic() + patience
