"""The peak memory of steps and of saves, apart."""

import torch

from forge_lib.training.memory import PeakMemory

MEGABYTE = 1 << 20


def fill(megabytes: int) -> None:
    """Uses memory for a moment."""
    torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)


def test_steps_and_saves_have_peaks_of_their_own():
    memory = PeakMemory(torch.device("cpu"))
    rest = memory.pop()
    fill(400)
    steps = memory.pop()
    assert steps > rest + 300 * MEGABYTE
    memory.begin_save()
    fill(800)
    assert memory.pop() < steps, "the memory of the moment before the save"
    assert memory.pop() == 0, "all of the time was a save"
    assert memory.end_save() > steps + 300 * MEGABYTE
    assert memory.pop() < steps


def test_a_system_without_a_peak_to_reset_gives_the_largest_since_the_start(monkeypatch, tmp_path):
    monkeypatch.setattr("forge_lib.training.memory.STATUS", tmp_path / "none")
    memory = PeakMemory(torch.device("cpu"))
    assert memory.pop() >= 100 * MEGABYTE
