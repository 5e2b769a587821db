"""The reports about steps: train.py beside Trainer, its limit, its memory, and how both grow."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from forge_lib.benchmark.processes import run_programs
from forge_lib.benchmark.report import Report, bars
from forge_lib.benchmark.step import (
    GPT2_124M,
    GPU_WORKLOADS,
    LLAMA_9M,
    LLAMA_49K,
    LLAMA_LONG,
    Setting,
    StepFigure,
    Workload,
    compare_steps,
    llama,
    train,
)

EXTRA_ROUNDS = 2  # of GPT-2, whose ratio is close to 1
COLUMNS = ("model", "beside Trainer", "processes", "tokens/s", "Trainer", "ratio", "peak MB", "Trainer", "ratio")


def measure_steps(setting: Setting, rounds: int) -> list[Report]:
    """Measures speed and memory: in fp32 beside Trainer's fastest, compiled, with recomputed activations."""
    recomputed = replace(LLAMA_49K, name="Llama 49,152, recomputed", flags=("--gradient-checkpointing",))
    cases = [
        (LLAMA_9M, "best", 1), (LLAMA_9M, "best", 2), (LLAMA_9M, "default", 1), (LLAMA_9M, "compiled", 1),
        (GPT2_124M, "best", 1), (GPT2_124M, "best", 2), (LLAMA_49K, "best", 1), (recomputed, "best", 1),
    ]  # fmt: skip
    figures = [
        compare_steps(setting, workload, kind, count, rounds + EXTRA_ROUNDS * (workload is GPT2_124M))
        for workload, kind, count in cases
    ]
    defaults = [
        compare_steps(setting, replace(each, has_defaults=True), "default", 1, rounds)
        for each in (LLAMA_9M, GPT2_124M)
    ]
    counts = [each for each in figures if (each.workload, each.baseline) == (LLAMA_9M.name, "best")]
    speeds = _report("speed_processes", "Tokens/s over the processes, fp32, one thread each", counts)
    return [
        _report("step", "Steps beside transformers.Trainer, fp32, one thread each", figures),
        _report("defaults", "Steps beside transformers.Trainer, precision and threads by default", defaults),
        replace(speeds, plot=lambda axes: _curves(axes, counts, [1, 2], "processes", _speed, "tokens/s")),
    ]


def measure_gpu_steps(setting: Setting, rounds: int) -> list[Report]:
    """Measures speed and memory on a GPU, in bf16, beside Trainer's fastest, and compiled; nothing without a GPU."""
    if not torch.cuda.is_available():
        return []
    kinds = ("bf16", "bf16, compiled")
    figures = [compare_steps(setting, each, kind, 1, rounds) for each in GPU_WORKLOADS for kind in kinds]
    return [_report("gpu", f"Steps beside transformers.Trainer, bf16, {torch.cuda.get_device_name()}", figures)]


def measure_limit(setting: Setting, rounds: int) -> list[Report]:
    """Measures which share of the speed of its own matrix products GPT-2 reaches."""
    found = []
    for _ in range(rounds):
        ours = train(setting, GPT2_124M).tokens_per_second
        shape = (GPT2_124M.batch_size, GPT2_124M.sequence_length)
        words = ["python", "-m", "forge_lib.benchmark.limits", setting.model(GPT2_124M), *shape]
        found.append((ours, float(run_programs([words], [{"OMP_NUM_THREADS": "1"}]).output)))
    ratios = [ours / limit for ours, limit in found]
    ours, limit = (statistics.median(each) for each in zip(*found, strict=True))
    figure = {"tokens_per_second": ours, "limit": limit, "ratio": statistics.median(ratios), "ratios": ratios}
    row = [GPT2_124M.name, f"{ours:,.0f}", f"{limit:,.0f}", f"{figure['ratio']:.2f}"]

    def plot(axes: Any) -> None:
        bars(axes, [GPT2_124M.name], [figure["ratio"]], [ratios], "share of the speed of its matrix products")

    columns = ["model", "tokens/s", "matrix products alone", "share"]
    return [Report("limit", "Arithmetic, fp32, one thread", columns, [row], [figure], plot)]


def measure_masking(setting: Setting, rounds: int) -> list[Report]:
    """Measures what --mask-documents costs, beside train.py without it."""
    masked = replace(LLAMA_LONG, flags=("--mask-documents",))
    pairs = [(train(setting, masked), train(setting, LLAMA_LONG)) for _ in range(rounds)]
    times = [plain.tokens_per_second / ours.tokens_per_second for ours, plain in pairs]
    memories = [ours.peak_bytes / plain.peak_bytes for ours, plain in pairs]
    figures = [
        {"what": what, "ratio": statistics.median(ratios), "ratios": ratios}
        for what, ratios in (("seconds per step", times), ("peak memory", memories))
    ]
    rows = [[each["what"], f"{each['ratio']:.2f} ({min(each['ratios']):.2f} to {max(each['ratios']):.2f})"]
            for each in figures]  # fmt: skip

    def plot(axes: Any) -> None:
        bars(axes, [each["what"] for each in figures], [each["ratio"] for each in figures], [times, memories],
             "times that without --mask-documents")  # fmt: skip

    title = f"--mask-documents, {LLAMA_LONG.name}, fp32, one thread"
    return [Report("masking", title, ["what", "times that without the flag"], rows, figures, plot)]


def measure_growth(setting: Setting, rounds: int) -> list[Report]:
    """Measures tokens/s and memory over the vocabulary, the sequence length and the width."""
    vocabularies = [
        (size, Workload(f"vocabulary {size}", llama(size), 4, 256, 3)) for size in (2048, 8192, 32_768, 131_072)
    ]
    sequences = [
        (length, Workload(f"sequence {length}", llama(), 2048 // length, length, 3)) for length in (128, 512, 2048)
    ]
    widths = [(width, Workload(f"width {width}", llama(hidden_size=width), 4, 256, 3)) for width in (128, 256, 512)]
    return [
        report
        for name, points in (("vocabulary", vocabularies), ("sequence length", sequences), ("width", widths))
        for report in _growth(setting, name, points, rounds)
    ]


def _growth(setting: Setting, name: str, points: Sequence[tuple[int, Workload]], rounds: int) -> list[Report]:
    figures = [compare_steps(setting, workload, "best", 1, rounds) for _, workload in points]
    sizes, file = [size for size, _ in points], name.replace(" ", "_")
    speeds = _report(f"speed_{file}", f"Tokens/s over the {name}, fp32, one thread", figures)
    memories = _report(f"memory_{file}", f"Peak memory over the {name}", figures)
    return [
        replace(speeds, plot=lambda axes: _curves(axes, figures, sizes, name, _speed, "tokens/s")),
        replace(memories, plot=lambda axes: _curves(axes, figures, sizes, name, _memory, "peak memory, MB")),
    ]


def _speed(each: StepFigure, is_baseline: bool) -> float:
    return each.baseline_tokens_per_second if is_baseline else each.tokens_per_second


def _memory(each: StepFigure, is_baseline: bool) -> float:
    return (each.baseline_peak_bytes if is_baseline else each.peak_bytes) / 1e6


def _curves(
    axes: Any,
    figures: Sequence[StepFigure],
    sizes: Sequence[int],
    name: str,
    value: Callable[[StepFigure, bool], float],
    what: str,
) -> None:
    """Draws a curve for train.py and one for Trainer, over sizes that are named `name`."""
    for is_baseline, label in ((False, "train.py"), (True, "transformers.Trainer")):
        axes.plot(sizes, [value(each, is_baseline) for each in figures], "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(name)
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
    axes.legend()


def _report(name: str, title: str, figures: Sequence[StepFigure]) -> Report:
    def plot(axes: Any) -> None:
        labels = [f"{each.workload}\n{each.baseline}, {each.num_processes} process(es)" for each in figures]
        bars(axes, labels, [each.speed_ratio for each in figures], [each.ratios for each in figures],
             "tokens/s, times those of Trainer")  # fmt: skip

    rows = [
        [
            each.workload, each.baseline, str(each.num_processes),
            f"{each.tokens_per_second:,.0f}", f"{each.baseline_tokens_per_second:,.0f}",
            f"{each.speed_ratio:.2f} ({min(each.ratios):.2f} to {max(each.ratios):.2f})",
            f"{each.peak_bytes / 1e6:,.0f}", f"{each.baseline_peak_bytes / 1e6:,.0f}", f"{each.memory_ratio:.2f}",
        ]
        for each in figures
    ]  # fmt: skip
    return Report(name, title, COLUMNS, rows, [asdict(each) for each in figures], plot)
