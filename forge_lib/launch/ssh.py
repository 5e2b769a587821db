"""Runs all machines of a cluster from one terminal: `p2p-llm-forge --cluster cluster.yaml --ssh`.

On this machine, `run` starts the command of each machine over ssh (its own command without ssh), shows their output
and passes on stop requests. On each machine, guard.py runs p2p-llm-forge. Requests go to the guard's stdin; when that
ends, the connection or the terminal here is gone, which counts as a stop request, too.

A remote terminal (`ssh -t`) would pass on Ctrl-C as well. But the program would draw progress bars on it; once the
terminal is gone, its output would fail before everything is saved; and nothing would kill a program that hangs.
"""

import contextlib
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
from pathlib import Path

import psutil

from forge_lib.cluster.cluster_file import Cluster, Machine, find_machine
from forge_lib.errors import EXIT_DIVERGED, EXIT_PEER_LOST, EXIT_USER_ERROR, UserError
from forge_lib.flags import to_flags
from forge_lib.launch.config import ForgeConfig, place
from forge_lib.launch.messages import END, PROGRAM, STOP, print_message
from forge_lib.process import StopSignals, ignore_output_errors, kill_process_tree, shell_exit_code

ROOT = Path(__file__).resolve().parents[2]
SSH = ["ssh", "-T", "-oBatchMode=yes", "-oConnectTimeout=10", "-oServerAliveInterval=15", "-oServerAliveCountMax=4"]
SSH += ["-oControlPath=none"]  # a shared connection has other options, and does not end with the run
POLL_SECONDS = 0.25
MARGIN_SECONDS = 30  # beyond --grace-seconds, and the supervisor's own margin, before the guard kills what hangs
LAST_OUTPUT_SECONDS = 5  # how long to wait until the last output of a machine is shown
CLOSE_SECONDS = 15  # from the request to end at once, until an unanswered connection is closed
FOLLOW_SECONDS = 10  # after a machine failed: how long the others may take to end by themselves
INTERRUPTED, KILLED = 128 + signal.SIGINT, 128 + signal.SIGKILL
SSH_FAILED = 255  # the exit code of ssh itself, rather than of the program that it runs
NOT_FOUND = (126, 127)  # exit codes of a shell that cannot run a program
FIXES = {  # by what ssh prints
    "Permission denied": "let your key in there (ssh-copy-id)",
    "Host key verification failed": "run `ssh {}` once by hand and compare its key",
    "Could not resolve": "correct `address` or `ssh` in cluster.yaml",
}
OTHER_FIX = f"see whether `ssh {{}}` works by hand, or start {PROGRAM} --cluster there"


def run(cluster: Cluster, config: ForgeConfig) -> int:
    """Runs the command on all machines of a cluster to its end; none of the processes started here is left.

    Returns:
        The exit code, as `choose_code` gives it; 130 if the user killed the remaining commands.

    Raises:
        UserError: a machine's ssh destination is not valid, or there is no ssh.
    """
    own = _find_own(cluster, config.machine)
    commands = {}
    for machine in cluster.machines:
        placed = place(config, cluster, machine)
        stop_seconds = f"{placed.grace_seconds + MARGIN_SECONDS:g}"
        program = ["-m", "forge_lib.launch.guard", stop_seconds, *to_flags(placed, ForgeConfig)]
        commands[machine] = [sys.executable, *program] if machine == own else ssh_command(machine, program)
    if not shutil.which("ssh") and any(machine != own for machine in commands):
        raise UserError("--ssh needs the program `ssh` (Debian, Ubuntu: apt install openssh-client)")
    cluster_run = ClusterRun(config.timeout_seconds, are_independent=config.elastic)
    with ignore_output_errors(), cluster_run.handling_signals():
        return cluster_run.run(commands)


def _find_own(cluster: Cluster, wanted: str) -> Machine | None:
    """Returns this machine, or None if it is not one of the cluster."""
    try:
        return find_machine(cluster, wanted)
    except UserError:
        if wanted != "auto":
            raise
        return None


def ssh_command(machine: Machine, program: list[str]) -> list[str]:
    """Returns the ssh command that runs Python with the arguments `program` on a machine.

    Raises:
        UserError: ssh would read the destination as an option, or it is more than one word.
    """
    destination = destination_of(machine)
    if destination.startswith("-") or not destination.isprintable() or " " in destination:
        raise UserError(
            f"machine {machine.name!r}: ssh is {destination!r:.99}, expected user@host, ssh://user@host:port, or a "
            "name in ~/.ssh/config, where all other options can be set"
        )
    folder = machine.folder or str(ROOT.relative_to(Path.home()) if ROOT.is_relative_to(Path.home()) else ROOT)
    folder = folder if folder.startswith(("/", "~/")) else f"~/{folder}"  # absolute: CDPATH is not used
    command = f"cd {_quoted(folder)} && exec {_quoted(machine.python)} {shlex.join(program)}"
    return [*SSH, "--", destination, command]


def destination_of(machine: Machine) -> str:
    """Returns the destination that `ssh` is given for a machine."""
    return machine.ssh or machine.address


def _quoted(path: str) -> str:
    """Quotes a path for a shell, which still replaces a leading ~ by its home folder."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") else shlex.quote(path)


def choose_code(codes: list[int]) -> int:
    """Returns the exit code of the run: that of the machine which caused the end.

    A user mistake (2) comes first, then a run that diverged (4), then any other failure. A lost process or connection
    (3) comes after those: machines that did not fail themselves report it.
    """
    codes = [EXIT_PEER_LOST if code == SSH_FAILED else code for code in codes]
    first, last = [EXIT_USER_ERROR, EXIT_DIVERGED], [EXIT_PEER_LOST, INTERRUPTED, 0]
    others = [code for code in codes if code not in (*first, *last)]
    return next(code for code in (*first, *others, *last) if code in codes)


class MachineCommand:
    """The command of one machine, run through ssh or, on this machine, directly.

    Attributes:
        code: its exit code; None while it runs.
        has_output: whether it has printed a line. Errors of ssh itself and of the remote shell do not count.
    """

    def __init__(self, machine: Machine, words: list[str], name_width: int, lock: threading.Lock):
        self.machine, self.code, self.has_output = machine, None, False
        self._prefix, self._lock = f"{machine.name:{name_width}} | ".encode(), lock
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        # In its own session: Ctrl-C reaches it only as a request from here, and ssh cannot ask for a password.
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=self._errors, start_new_session=True)
        self._thread = threading.Thread(target=self._show_output, daemon=True)
        self._thread.start()

    def _show_output(self) -> None:
        for line in self._process.stdout:
            self.has_output = True
            with self._lock, contextlib.suppress(OSError):
                sys.stdout.buffer.write(self._prefix + last_state(line) + b"\n")
                sys.stdout.buffer.flush()

    def has_just_ended(self) -> bool:
        """Returns True once: at the first call after it has ended and its output is shown."""
        if self.code is not None or self._process.poll() is None:
            return False
        self._thread.join(LAST_OUTPUT_SECONDS)  # limited, since a user may have paused the terminal's output
        self.code = shell_exit_code(self._process.returncode)
        return True

    def send(self, request: bytes) -> None:
        """Sends a request to the guard."""
        with contextlib.suppress(OSError):
            os.write(self._process.stdin.fileno(), request)

    def last_error(self) -> str:
        """Returns the last line that ssh, the remote shell or Python printed before the program ran."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip().rstrip(".") for line in reversed(lines) if line.strip()), "no message")

    def close(self) -> None:
        """Kills its processes on this machine."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process.poll() is None:
                kill_process_tree(psutil.Process(self._process.pid))
                self.code = KILLED
        self._process.wait()
        self._thread.join(1)
        self._errors.close()


def last_state(line: bytes) -> bytes:
    """Returns what a terminal finally shows of a line: the text after the last carriage return."""
    return line.rstrip(b"\r\n").rsplit(b"\r", 1)[-1]


class ClusterRun(StopSignals):
    """Runs the commands of all machines and passes on stop requests.

    Args:
        timeout_seconds: of the run: how long its processes take to notice that one is lost.
        are_independent: whether the others go on if a machine fails: with --elastic.
    """

    def __init__(self, timeout_seconds: float, are_independent: bool = False):
        self.timeout_seconds, self.are_independent = timeout_seconds, are_independent
        self.commands: list[MachineCommand] = []
        self.not_started = False  # a machine could not be reached, or the program is not there
        self.failed, self.follow_deadline = "", math.inf  # a failed machine, and when the others must have ended
        self.request, self.requested_at = b"", math.inf  # the last request that was sent

    def run(self, commands: dict[Machine, list[str]]) -> int:
        """Runs the commands to their end; returns the exit code."""
        name_width, lock = max(len(machine.name) for machine in commands), threading.Lock()
        try:
            for machine, words in commands.items():
                self.commands.append(MachineCommand(machine, words, name_width, lock))
            self._follow()
        finally:
            for command in self.commands:
                command.close()
        if self.not_started:
            return EXIT_USER_ERROR
        codes = [command.code for command in self.commands]
        if any(codes):
            ends = [f"{command.machine.name} ended with exit code {command.code}" for command in self.commands]
            print_message(", ".join(ends))
        return INTERRUPTED if self.quit_now and any(codes) else choose_code(codes)

    def _follow(self) -> None:
        """Returns when all commands have ended, or do not react to the request to end at once."""
        while any(command.code is None for command in self.commands):
            time.sleep(POLL_SECONDS)
            for command in self.commands:
                if command.has_just_ended() and command.code:
                    self._on_failure(command)
            now = time.monotonic()
            if now > self.follow_deadline and not self.stopping:
                self.stopping = True
                print_message(f"{self.failed} has failed, and the others still run")
            self._send_request(now)
            running = ", ".join(command.machine.name for command in self.commands if command.code is None)
            if running and self.request == END and now > self.requested_at + CLOSE_SECONDS:
                print_message(
                    f"{running} did not end within {CLOSE_SECONDS} s: the connection is closed; see what runs there"
                )
                return

    def _send_request(self, now: float) -> None:
        request = END if self.quit_now or self.not_started else STOP if self.stopping else b""
        if request == self.request:
            return
        self.request, self.requested_at = request, now
        if request == STOP:
            print_message("stopping all machines; Ctrl-C again ends at once")
        for command in self.commands:
            command.send(request)

    def _on_failure(self, command: MachineCommand) -> None:
        """Prints what a failed machine cannot report itself, and gives the others some time to end."""
        name, destination = command.machine.name, destination_of(command.machine)
        not_started = False
        if command.code == SSH_FAILED and command.has_output:
            error = command.last_error()
            print_message(f"{name}: the connection is lost ({error}); it stops by itself when it notices that")
        elif command.code == SSH_FAILED:
            reason = command.last_error().removeprefix("ssh: ")
            fix = next((fix for words, fix in FIXES.items() if words in reason), OTHER_FIX).format(destination)
            print_message(f"error: {name}: ssh {destination}: {reason}; {fix}")
            not_started = True
        elif command.code in NOT_FOUND or not (command.has_output or self.request):
            print_message(
                f"error: {name}: {command.last_error()}; correct `folder` or `python` of {name} in cluster.yaml"
            )
            not_started = True
        if self.are_independent:
            print_message(f"{name} has ended with exit code {command.code}; the other peers go on")
            return
        self.not_started |= not_started
        seconds = FOLLOW_SECONDS + (0 if command.code == EXIT_USER_ERROR else self.timeout_seconds)
        if time.monotonic() + seconds < self.follow_deadline:
            self.failed, self.follow_deadline = name, time.monotonic() + seconds
