"""How a process that computes on a CPU allocates memory."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
NEVER = -1
LARGEST_INT_POWER = 1 << 30


def keep_freed_memory() -> None:
    """Makes glibc keep memory that is freed for the next allocation, instead of returning it to the system.

    Otherwise each step gets the memory of its large tensors from the system again, which clears it page by page.
    Measured on two cores: a step of GPT-2 124M took 4 to 9 % less time with the same peak of memory; with two layers
    of width 384 and the same vocabulary, 9 to 18 % less time and 5 to 7 % more memory. Does nothing with another C
    library.
    """
    if libc := _glibc():
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_INT_POWER)


def return_freed_memory() -> None:
    """Returns to the system what is free now, so that the process's memory is what it uses."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
