"""Memory that is freed is used again, without help of the system."""

import platform
import resource
import subprocess
import sys

import pytest
from commands import ROOT

PROGRAM = """
import resource, torch
from forge_lib.distributed.allocator import keep_freed_memory, return_freed_memory
{before}
torch.ones(1 << 25)
{after}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(before: str, after: str = "") -> int:
    """Returns the page faults of an allocation of 64 MiB, after one of 128 MiB that was freed, and calls of the
    module's functions before and after that."""
    command = [sys.executable, "-c", PROGRAM.format(before=before, after=after)]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only for glibc")
def test_freed_memory_returns_to_the_system_only_when_asked():
    few = (1 << 26) // resource.getpagesize() / 600  # pages may have 2 MiB, which is 512 times as much
    assert page_faults("keep_freed_memory()") < few < page_faults("")
    assert page_faults("keep_freed_memory()", "return_freed_memory()") > few
