"""The peak memory of this process, at the steps and at the saves beside them."""

import contextlib
import resource
import sys
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CLEAR_PEAK = "5"  # proc(5): resets the peak of the resident memory


class PeakMemory:
    """Peaks between two calls, in bytes: of the GPU's memory if the process trains on one, else of main memory.

    Where the system cannot reset the peak (outside Linux), all of them are the largest since the process started.

    Args:
        device: of the training.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._of_steps = 0
        self._is_saving = False
        self._restart()

    def begin_save(self) -> None:
        """Counts the memory from now on as that of a save."""
        self._of_steps, self._is_saving = max(self._of_steps, self._restart()), True

    def end_save(self) -> int:
        """Returns the peak since `begin_save`."""
        self._is_saving = False
        return self._restart()

    def pop(self) -> int:
        """Returns the peak of the steps since the last call, without the time of saves; 0: all of it was one save."""
        if not self._is_saving:
            self._of_steps = max(self._of_steps, self._restart())
        peak, self._of_steps = self._of_steps, 0
        return peak

    def _restart(self) -> int:
        """Returns the peak since the last call, and starts anew."""
        if self._on_gpu:
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return peak
        lines = STATUS.read_text().splitlines() if STATUS.exists() else []
        line = next((line for line in lines if line.startswith("VmHWM:")), "")
        if not line:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024
        with contextlib.suppress(OSError):  # a container may forbid it
            CLEAR.write_text(CLEAR_PEAK)
        return int(line.split()[1]) * 1024
