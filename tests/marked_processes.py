"""Finds the processes of one test by a word in their environment, which all descendants inherit, orphans too."""

import contextlib

import psutil

from forge_lib.process import is_running


def environment(process: psutil.Process) -> dict[str, str]:
    """Returns a running process's environment; empty if the process has just ended."""
    with contextlib.suppress(psutil.Error, OSError):
        return process.environ() if is_running(process) else {}
    return {}


def processes_with(word: str) -> list[psutil.Process]:
    """Returns the running processes that have `word` as a value in their environment."""
    return [process for process in psutil.process_iter() if word in environment(process).values()]


def workers(word: str) -> dict[int, psutil.Process]:
    """Returns the training processes among them, by rank.

    A launcher has no rank, and a child that a training process forked has a parent with a rank.
    """
    found = {}
    for process in processes_with(word):
        with contextlib.suppress(psutil.Error):
            rank = environment(process).get("RANK")
            if rank is not None and "RANK" not in environment(process.parent() or psutil.Process(1)):
                found[int(rank)] = process
    return found
