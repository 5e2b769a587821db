"""How long a run takes until its first step: new, resumed and compiled."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from forge_lib.benchmark.processes import ROOT, run_programs
from forge_lib.benchmark.report import Report, bars
from forge_lib.benchmark.step import LLAMA_9M, Setting
from forge_lib.checkpoints.restore import find, load
from forge_lib.checkpoints.saver import Saver
from forge_lib.config import TrainConfig
from forge_lib.models.loading import load_model
from forge_lib.models.optimizers import build_optimizers
from forge_lib.process import kill_process_tree

LATE_STEPS = (10, 10_000, 1_000_000)
NUM_STEPS = 2_000_000
LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class StartFigure:
    """A kind of start beside its baseline; medians.

    Attributes:
        name, baseline: what is compared.
        seconds, baseline_seconds: of both.
        ratio: the median over the rounds; `ratios` of each round.
    """

    name: str
    baseline: str
    seconds: float
    baseline_seconds: float
    ratio: float
    ratios: list[float]


def measure_starts(setting: Setting, rounds: int) -> list[Report]:
    """Measures all kinds of start, one after the other and in turn with their baselines."""
    runs = {step: _run_at(setting, step) for step in LATE_STEPS}
    cache = tempfile.mkdtemp()
    compiled = {"TORCHINDUCTOR_CACHE_DIR": cache}
    first_step(setting, ["--compile"], compiled)  # fills the cache
    imports = [["python", "-c", "import torch, transformers"]]
    classes = [["python", "-c", "import torch, transformers; transformers.LlamaForCausalLM"]]  # imported when used
    new, old = LATE_STEPS[0], LATE_STEPS[-1]
    pairs: list[tuple[str, str, Callable[[], float], Callable[[], float]]] = [
        ("first step, warm store", "import torch, transformers",
         lambda: first_step(setting), lambda: run_programs(imports).seconds),
        ("first step, warm store", "the same, and the model's class",
         lambda: first_step(setting), lambda: run_programs(classes).seconds),
        (f"resume at step {old:,}", f"resume at step {new:,}",
         lambda: resumed(setting, runs[old]), lambda: resumed(setting, runs[new])),
        (f"resume at step {LATE_STEPS[1]:,}", f"resume at step {new:,}",
         lambda: resumed(setting, runs[LATE_STEPS[1]]), lambda: resumed(setting, runs[new])),
        ("second start with --compile", "start without --compile",
         lambda: first_step(setting, ["--compile"], compiled), lambda: first_step(setting)),
    ]  # fmt: skip
    figures = []
    for name, baseline, measure, measure_baseline in pairs:
        found = [(measure(), measure_baseline()) for _ in range(rounds)]
        ratios = [seconds / other for seconds, other in found]
        medians = [statistics.median(each) for each in zip(*found, strict=True)]
        figures.append(StartFigure(name, baseline, *medians, statistics.median(ratios), ratios))
        print(json.dumps(asdict(figures[-1])), file=sys.stderr, flush=True)
    shutil.rmtree(cache, ignore_errors=True)
    return [_report(figures), _report_resume(figures)]


def first_step(setting: Setting, flags: Sequence[str] = (), variables: dict[str, str] | None = None) -> float:
    """Returns the seconds until a new run has made its first step."""
    with tempfile.TemporaryDirectory() as folder:
        return _seconds_until_step(setting, Path(folder), flags, variables)


def resumed(setting: Setting, run: Path) -> float:
    """Returns the seconds until a run that was stopped has made its next step."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(run, folder, dirs_exist_ok=True)
        (Path(folder) / "metrics.jsonl").unlink(missing_ok=True)
        return _seconds_until_step(setting, Path(folder))


def _seconds_until_step(
    setting: Setting, folder: Path, flags: Sequence[str] = (), variables: dict[str, str] | None = None
) -> float:
    start, metrics = time.perf_counter(), folder / "metrics.jsonl"
    words = [sys.executable, "scripts/train.py", *_flags(setting, folder), *flags]
    with open(os.devnull, "wb") as nothing:
        process = subprocess.Popen(words, cwd=ROOT, stdout=nothing, stderr=nothing, env=os.environ | (variables or {}))
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        if process.poll() is not None or time.perf_counter() - start > LIMIT_SECONDS:
            raise RuntimeError(f"{' '.join(map(str, words))} has made no step")
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    kill_process_tree(psutil.Process(process.pid))
    process.wait()
    return seconds


def _flags(setting: Setting, folder: Path) -> list[str]:
    flags = ["--model-name", setting.model(LLAMA_9M), "--dataset-path", setting.store, "--output-dir", folder]
    flags += ["--batch-size", 1, "--sequence-length", 64, "--max-steps", NUM_STEPS, "--log-every", 1]
    flags += ["--eval-every", 0, "--checkpoint-every", 0, "--mixed-precision", "no"]
    return [str(flag) for flag in flags]


def _run_at(setting: Setting, step: int) -> Path:
    """Returns the folder of a run that was stopped after a step: made by one of ten steps, whose number is changed."""
    folder = setting.folder / f"run-{step}"
    if folder.exists():
        return folder
    run_programs(
        [["python", "scripts/train.py", *_flags(setting, folder), "--max-steps", 10, "--checkpoint-every", 10]]
    )
    config = TrainConfig(model_name=str(setting.model(LLAMA_9M)), dataset_path=str(setting.store), output_dir="-")
    model = load_model(config, LLAMA_9M.config.vocab_size, 64)
    optimizers = build_optimizers(model, config)
    state = load(find(folder / "checkpoints", "auto", {}).path, model, optimizers)
    shutil.rmtree(folder)
    Saver(folder / "checkpoints", keep=1, background=False).save(step, model, optimizers, state)
    return folder


def _report(figures: Sequence[StartFigure]) -> Report:
    def plot(axes: Any) -> None:
        labels = [f"{each.name}\n/ {each.baseline}" for each in figures]
        bars(axes, labels, [each.ratio for each in figures], [each.ratios for each in figures], "times the baseline")

    columns = ["start", "seconds", "baseline", "seconds", "ratio"]
    rows = [
        [each.name, f"{each.seconds:.2f}", each.baseline, f"{each.baseline_seconds:.2f}", f"{each.ratio:.2f}"]
        for each in figures
    ]
    return Report("start", "Until the first step", columns, rows, [asdict(each) for each in figures], plot)


def _report_resume(figures: Sequence[StartFigure]) -> Report:
    base = f"resume at step {LATE_STEPS[0]:,}"
    seconds = {each.name: each.seconds for each in figures if each.baseline == base}
    seconds[base] = statistics.median(each.baseline_seconds for each in figures if each.baseline == base)
    points = [(step, seconds[f"resume at step {step:,}"]) for step in LATE_STEPS]

    def plot(axes: Any) -> None:
        axes.plot(*zip(*points, strict=True), marker="o")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step of the checkpoint")
        axes.set_ylabel("seconds until the next step")
        axes.grid(alpha=0.3)

    rows = [[f"{step:,}", f"{value:.2f}"] for step, value in points]
    figures = [{"step": step, "seconds": value} for step, value in points]
    return Report("resume", "Resuming over the step of the checkpoint", ["step", "seconds"], rows, figures, plot)
