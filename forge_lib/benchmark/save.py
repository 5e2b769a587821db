"""What checkpoints cost, in time and memory, with this machine's processor and disk.

A model trains on random tokens, in turn without saves, with background saves and with foreground saves. Saving and
resuming are compared with one plain copy of the same bytes.
"""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from forge_lib import disk
from forge_lib.benchmark.model import make_model
from forge_lib.benchmark.report import Report, bars
from forge_lib.checkpoints.restore import find, load
from forge_lib.checkpoints.saver import Saver
from forge_lib.models.loss import loss_sum
from forge_lib.training.memory import PeakMemory

WARM_LOOPS = 6  # training loops until its peak memory no longer rises
CPU = torch.device("cpu")


def measure_saves(config: transformers.PretrainedConfig, folder: Path, rounds: int, steps: int) -> Report:
    """Returns the figures, in seconds and bytes.

    Args:
        config: of the model.
        folder: on the disk to measure; it is removed at the end.
        rounds: how many times each figure is taken.
        steps: training steps per round; the save follows the second one.
    """
    model, optimizers, batch = make_model(config)
    for _ in range(WARM_LOOPS):
        train(model, optimizers, batch, steps)
    tensors = [*model.parameters(), *(t for o in optimizers for s in o.state.values() for t in s.values())]

    background, foreground = Saver(folder, keep=1), Saver(folder, keep=1, background=False)
    background.attach(optimizers)
    memory = PeakMemory(CPU)
    train(model, optimizers, batch, steps)
    peak = memory.pop()
    train(model, optimizers, batch, steps, background)
    background.wait()
    save_memory = memory.pop() - peak
    savers = {"none": None, "background": background, "foreground": foreground}
    loops: dict[str, list[float]] = {kind: [] for kind in savers}
    for _ in range(rounds):
        for kind, saver in savers.items():
            loops[kind].append(train(model, optimizers, batch, steps, saver))
            if saver:
                saver.wait()

    path = find(folder, "auto", {}).path
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: plain_copy(path, folder.with_name("copy")),
        "save": lambda: foreground.save(1, model, optimizers, {"run": {}}),
        "resume": lambda: load(find(folder, "auto", {}).path, model, optimizers),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call))
    shutil.rmtree(folder)
    costs = {
        kind: statistics.median(saving - plain for saving, plain in zip(loops[kind], loops["none"], strict=True))
        for kind in ("background", "foreground")
    }
    return _report(
        {
            "checkpoint_bytes": sum(t.nbytes for t in tensors),
            "loop_seconds": statistics.median(loops["none"]),
            "loop_cost_of_a_background_save_seconds": costs["background"],
            "loop_cost_of_a_foreground_save_seconds": costs["foreground"],
            "background_over_foreground": costs["background"] / costs["foreground"],
            "peak_memory_of_a_background_save_bytes": save_memory,
            **{f"{name}_seconds": statistics.median(values) for name, values in seconds.items()},
            "save_over_copy": median_ratio(seconds["save"], seconds["copy"]),
            "resume_over_copy": median_ratio(seconds["resume"], seconds["copy"]),
        }
    )


def _report(figures: dict[str, float]) -> Report:
    def plot(axes: Any) -> None:
        names = ["save_over_copy", "resume_over_copy", "background_over_foreground"]
        bars(axes, [name.replace("_", " ") for name in names], [figures[name] for name in names],
             [[figures[name]] for name in names], "ratio")  # fmt: skip

    rows = [
        [name.removesuffix("_bytes").replace("_", " "), f"{value / 1e6:.0f} MB" if "bytes" in name else f"{value:.2f}"]
        for name, value in figures.items()
    ]
    return Report("save", "Checkpoints", ["what", "seconds, MB or ratio"], rows, [figures], plot)


def train(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batch: dict[str, torch.Tensor],
    steps: int,
    saver: Saver | None = None,
) -> float:
    """Trains `steps` steps, saves after the second one, and returns the seconds that this took."""
    start = time.perf_counter()
    for step in range(steps):
        loss_sum(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if saver and step == 1:
            saver.save(1, model, optimizers, {"run": {}})
    return time.perf_counter() - start


def plain_copy(source: Path, target: Path) -> None:
    """Copies a folder with `cp`, and flushes it to the disk."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in (*target.iterdir(), target):
        disk.flush(path)


def seconds_of(call: Callable[[], object]) -> float:
    """Returns the duration of a call, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Returns the median of the ratios of each round."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))
