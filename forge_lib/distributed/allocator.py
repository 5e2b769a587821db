"""How a process that computes on a CPU allocates memory."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt
NEVER = -1
SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")  # of glibc


def keep_freed_memory() -> None:
    """Makes glibc keep memory that is freed for the next allocation, instead of returning it to the system.

    Otherwise each step gets the memory of its large tensors from the system again, which clears it page by page.
    Measured on two cores: a step of GPT-2 124M took 4 to 9 % less time; with two layers of width 384 and the same
    vocabulary, 9 to 18 %. The peak of memory grows by 2 to 12 %. Does nothing with another C library, or if the user
    has set one of glibc's variables.
    """
    if any(name in os.environ for name in SETTINGS):
        return
    if libc := _glibc():
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
        libc.mallopt(M_MMAP_MAX, 0)


def return_freed_memory() -> None:
    """Returns to the system what is free now, so that the process's memory is what it uses."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
