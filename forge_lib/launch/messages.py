"""What the processes of the command send each other and print. Imports nothing slow: guard.py needs it at once."""

import contextlib
import sys
from dataclasses import dataclass

PROGRAM = "p2p-llm-forge"

# From ssh.py to the guard on each machine, through its stdin.
STOP, END = b"s", b"e"  # save and stop; end at once


def print_message(*parts: str) -> None:
    """Prints one line of the command itself on stderr, if anyone can still read it; nothing without `parts`."""
    with contextlib.suppress(OSError):  # after a terminal is closed, there are still processes to stop
        if parts:
            print(f"{PROGRAM}: {'; '.join(parts)}", file=sys.stderr, flush=True)


# From the child of one attempt to the supervisor, through a pipe.


@dataclass(frozen=True)
class Waiting:
    """The rendezvous waits. `text` names the machines and the reason; the supervisor prints it from time to time."""

    text: str


@dataclass(frozen=True)
class Joined:
    """The rendezvous is complete: the host name of each machine, by its number."""

    hosts: dict[int, str]


@dataclass(frozen=True)
class Unavailable:
    """The rendezvous failed for a reason that may pass: another machine is missing or cannot be reached."""

    reason: str


@dataclass(frozen=True)
class ProcessFailed:
    """The training process that failed first, and its exit code; negative for a signal."""

    rank: int
    exit_code: int


Message = Waiting | Joined | Unavailable | ProcessFailed
