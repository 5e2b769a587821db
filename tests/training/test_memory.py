"""The peak memory of steps and of saves, apart."""

import platform
import subprocess
import sys

import pytest
import torch
from commands import ROOT

from forge_lib.training.memory import PeakMemory

MEGABYTE = 1 << 20
PROGRAM = """
import torch
from forge_lib.distributed.allocator import keep_freed_memory, return_freed_memory
from forge_lib.training.memory import PeakMemory

def fill(megabytes):
    torch.ones(megabytes << 20, dtype=torch.uint8)

{setting}
memory = PeakMemory(torch.device("cpu"))
peaks = [memory.pop()]
fill(400)
peaks.append(memory.pop())
memory.begin_save()
fill(800)
peaks += [memory.pop(), memory.pop()]
return_freed_memory()  # as Saving.report does
peaks += [memory.end_save(), memory.pop()]
print(*peaks)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="other systems cannot reset the peak")
@pytest.mark.parametrize("setting", ["", "keep_freed_memory()"])
def test_steps_and_saves_have_peaks_of_their_own(setting):
    command = [sys.executable, "-c", PROGRAM.format(setting=setting)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rest, steps, before_save, within_save, save, after_save = map(int, printed.split())
    assert rest + 300 * MEGABYTE < steps < rest + 500 * MEGABYTE
    assert before_save < steps + MEGABYTE
    assert within_save == 0, "all of the time was a save"
    assert save > steps + 300 * MEGABYTE
    assert after_save < steps, "the memory of the save was returned"


def test_a_system_without_a_peak_to_reset_gives_the_largest_since_the_start(monkeypatch, tmp_path):
    monkeypatch.setattr("forge_lib.training.memory.STATUS", tmp_path / "none")
    memory = PeakMemory(torch.device("cpu"))
    assert memory.pop() >= 100 * MEGABYTE
