"""Errors that end a run, their exit codes, and messages for errors of the operating system."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESUME_HINT = "Start the same command again on every machine: the run continues from its newest checkpoint"

EXIT_USER_ERROR, EXIT_PEER_LOST, EXIT_DIVERGED = 2, 3, 4


class UserError(Exception):
    """A mistake of the user: the message states what was found, what was expected, and which flag or key fixes it."""


class PeerLostError(RuntimeError):
    """Another process died, hangs, or cannot be reached any more; the message names it."""


class DivergedError(RuntimeError):
    """The processes' replicas of the model are no longer equal; the message names the processes that differ."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, by a signal or by a file, on one of the machines; the message names it."""


# The names of errors in the messages between processes.
KINDS = {"user": UserError, "lost": PeerLostError, "diverged": DivergedError, "stopped": Stopped}


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a process that ends with this error."""
    if isinstance(error, Stopped):
        return 0
    codes = {UserError: EXIT_USER_ERROR, PeerLostError: EXIT_PEER_LOST, DivergedError: EXIT_DIVERGED}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


def as_user_error(error: BaseException) -> BaseException:
    """Returns a UserError for an error of the operating system that names a file; any other error unchanged."""
    if isinstance(error, OSError) and error.filename:
        return UserError(f"{error.filename}: {error.strerror}")
    return error


@contextmanager
def disk_errors_as_user_errors(path: Path) -> Iterator[None]:
    """Turns an OSError inside the `with` block into a UserError that names the file, or else `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from None


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class if it has no message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def explain_connection_error(error: OSError) -> tuple[str, str]:
    """Returns what went wrong with a TCP connection, and what may be the cause, each as a short phrase."""
    if isinstance(error, socket.gaierror):
        return "the name does not resolve", "correct the name, or give an IP address"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused", "no program listens on that port yet, or a firewall rejects the connection"
    if isinstance(error, TimeoutError):
        return "no answer", "the machine is off, or a firewall drops what is sent to that port"
    return (error.strerror or str(error)).lower(), "check the address and the network"
