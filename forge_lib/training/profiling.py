"""Traces some steps with PyTorch's profiler: `--profile-steps`."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProfileKwargs

from forge_lib.errors import first_line

logger = logging.getLogger("forge")

SKIPPED_STEPS = 3  # the first ones: they compile, and fill caches
NUM_ROWS = 15  # of the table


class StepProfiler:
    """Writes a trace and a table of a few steps, on each process. Use it as a context manager around the steps.

    Args:
        accelerator: the processes.
        folder: for the files; on this machine.
        num_steps: that are traced, after the first ones; 0: none.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, num_steps: int):
        self._accelerator, self._folder, self._num_steps = accelerator, folder, num_steps
        self._contexts, self._profiler, self._is_written = ExitStack(), None, False

    def __enter__(self) -> "StepProfiler":
        if self._num_steps:
            schedule = {
                "skip_first": SKIPPED_STEPS - 1,
                "wait": 0,
                "warmup": 1,
                "active": self._num_steps,
                "repeat": 1,
            }
            handler = ProfileKwargs(schedule_option=schedule, on_trace_ready=self._write)
            self._profiler = self._contexts.enter_context(self._accelerator.profile(handler))
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.__exit__(*error)
        if self._num_steps and not self._is_written:
            logger.warning(
                f"--profile-steps: no step was traced, because the run ended before; {SKIPPED_STEPS} steps come first"
            )

    def step_done(self) -> None:
        """Call after each step."""
        if self._profiler:
            self._profiler.step()

    def _write(self, profiler: Any) -> None:
        self._is_written = True
        try:
            self._write_files(profiler)
        except (OSError, RuntimeError) as error:  # a disk that is full is no reason to stop training
            logger.warning(f"the trace of --profile-steps cannot be written: {first_line(error)}")

    def _write_files(self, profiler: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"process-{self._accelerator.process_index}"
        trace, table = self._folder / f"{name}.json.gz", self._folder / f"{name}.txt"
        profiler.export_chrome_trace(str(trace))
        device = self._accelerator.device.type
        order = f"self_{device}_time_total" if device in ("cpu", "cuda") else "self_cpu_time_total"
        text = profiler.key_averages().table(sort_by=order, row_limit=NUM_ROWS, max_name_column_width=40)
        table.write_text(text)
        logger.info(
            f"profiled up to {self._num_steps} steps: {trace} (open it at ui.perfetto.dev) and {table}\n{text}"
        )
