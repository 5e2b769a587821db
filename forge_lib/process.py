"""This process: its rank, its parent, the signals it receives, its output; and how it ends other processes."""

import contextlib
import ctypes
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import psutil

from forge_lib.errors import UserError

PR_SET_PDEATHSIG = 1  # of prctl(2)
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
OTHER_TRAINING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # kinds of training that an accelerate YAML can ask for
MULTI_CPU_FIX = (
    "a YAML with `distributed_type: MULTI_CPU` starts one process on each machine, and each would train a model of "
    "its own. Change these two lines of the YAML:\n    distributed_type: MULTI_GPU\n    use_cpu: true"
)


@dataclass(frozen=True)
class World:
    """The processes that the launcher intends to start, and this one's place among them.

    Attributes:
        process_index: rank of this process.
        num_processes: number of processes on all machines.
        local_process_index: number of this process on its machine, from 0.
        num_local_processes: number of processes on this machine.
        main_address, main_port: where the store on the main machine listens; an empty address for a single process.
        attempt: how many times the launcher has restarted the processes.
    """

    process_index: int = 0
    num_processes: int = 1
    local_process_index: int = 0
    num_local_processes: int = 1
    main_address: str = ""
    main_port: int = 0
    attempt: int = 0

    @property
    def machine(self) -> int:
        """The rank of the first process on this machine; that process does the machine's file I/O."""
        return self.process_index - self.local_process_index

    @property
    def is_local_main(self) -> bool:
        """Whether this process is the first one on its machine."""
        return self.local_process_index == 0

    @classmethod
    def from_environment(cls) -> "World":
        """Reads the environment variables that accelerate, torchrun, mpirun or a notebook's launcher has set.

        Raises:
            UserError: the launcher named a main machine, but gave this process no rank; or the YAML asks for a kind
                of training other than data-parallel.
        """
        if not is_launched():
            return cls()
        import torch.distributed as dist  # slow imports, which a single process does not need here
        from accelerate.utils import get_cpu_distributed_information

        for name in OTHER_TRAINING:
            if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1", "yes", "y", "t", "on"):
                raise UserError(f"the YAML asks for {name}, but this program trains data-parallel only: remove it")
        ranks = get_cpu_distributed_information()
        if ranks.world_size == 1:
            if "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
                address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
                raise UserError(
                    f"the launcher names a main machine ({address}), but gave this process no rank: {MULTI_CPU_FIX}"
                )
            if "LOCAL_RANK" in os.environ and "MASTER_ADDR" not in os.environ:
                raise UserError(
                    "the environment variables of a launcher (LOCAL_RANK, RANK, WORLD_SIZE) are set, but MASTER_ADDR "
                    "is not: unset them, or start with accelerate launch or torchrun"
                )
            return cls()
        in_group = dist.is_available() and dist.is_initialized()  # under accelerate's debug_launcher
        return cls(
            process_index=dist.get_rank() if in_group else ranks.rank,
            num_processes=ranks.world_size,
            local_process_index=ranks.local_rank,
            num_local_processes=ranks.local_world_size,
            main_address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
            main_port=int(os.environ.get("MASTER_PORT", 29500)),
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )


def is_launched() -> bool:
    """Returns whether a launcher started this process, rather than a plain `python`."""
    return any(name in LAUNCHER_VARIABLES or name.startswith("ACCELERATE_") for name in os.environ)


# The end of a parent, and of a process with all its children


def die_with_launcher(world: World) -> None:
    """Makes the kernel end this process when its launcher dies, since it would train on alone. Linux only.

    One of several processes is killed. A single process, which accelerate's simple launcher does not signal when it
    ends, gets SIGTERM and saves.
    """
    if world.num_processes > 1 or "ACCELERATE_MIXED_PRECISION" in os.environ:
        die_with_parent(signal.SIGKILL if world.num_processes > 1 else signal.SIGTERM)


def die_with_parent(number: int) -> None:
    """Makes the kernel send this process the signal `number` when its parent dies. Does nothing outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def kill_process_tree(process: psutil.Process) -> None:
    """Kills a process and all its descendants."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def is_running(process: psutil.Process) -> bool:
    """Returns whether a process exists and is not a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def shell_exit_code(code: int) -> int:
    """Returns an exit code as a shell does: 128 + N for a process that signal N killed (Python: -N)."""
    return code if code >= 0 else 128 - code


# Signals


def stop_signals() -> list[signal.Signals]:
    """Returns the signals that ask a program to stop: SIGTERM, SIGINT and, except under nohup, SIGHUP."""
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_nohup else [signal.SIGHUP])]


class StopSignals:
    """Turns Ctrl-C and SIGTERM into two flags: stop and save, or quit now. A base class.

    Attributes:
        stopping: whether the program is asked to save and stop.
        quit_now: whether it is asked to quit without saving: after a second Ctrl-C.
    """

    stopping = quit_now = False

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Handles the stop signals inside the `with` block. Call in the main thread."""
        before = {number: signal.signal(number, self._on_signal) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        # A terminal that is closed sends SIGHUP twice, so only a second Ctrl-C means more than the first signal.
        self.quit_now |= self.stopping and number == signal.SIGINT
        self.stopping = True


# Output


@contextmanager
def ignore_output_errors() -> Iterator[None]:
    """Inside the `with` block, a failed write to stdout or stderr loses the text and raises nothing.

    A closed terminal, a pipe without a reader or a full disk would otherwise end a run before it is saved: with
    `| tee log`, Ctrl-C ends `tee` before the program.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_without_errors, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _without_errors(stream: TextIO | None) -> TextIO:
    if stream is None:  # it was closed when the program started
        return open(os.devnull, "w")
    stream.flush()
    file = io.BufferedWriter(_FileWithoutErrors(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True)


class _FileWithoutErrors(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EPIPE):  # there will be no reader again: redirect to /dev/null
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, self.fileno())
                os.close(devnull)
            return memoryview(data).nbytes
