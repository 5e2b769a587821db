"""How fast text becomes a token store, in each format, beside the tokenizer alone and beside datasets.map."""

import gzip
import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forge_lib.benchmark.processes import run_programs
from forge_lib.benchmark.report import Report, bars

MEGABYTES, GROWTH = 25, 10
ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class PrepareFigure:
    """A format of 25 MB of text; medians.

    Attributes:
        format: the ending of the file.
        seconds, limit_seconds, map_seconds: of this program, of encode_batch_fast alone, and of datasets.map.
        limit_ratio: limit_seconds / seconds, the median over the rounds, and `ratios` of each round.
        map_ratio: map_seconds / seconds, the median over the rounds.
        peak_bytes, grown_peak_bytes: peak memory for 25 MB and for ten times as much (measured once).
        two_cores_ratio: seconds with one core / seconds with two; only with two cores.
    """

    format: str
    seconds: float
    limit_seconds: float
    map_seconds: float
    limit_ratio: float
    ratios: list[float]
    map_ratio: float
    peak_bytes: int
    grown_peak_bytes: int
    two_cores_ratio: float


@dataclass(frozen=True)
class _Round:
    """Seconds and peak bytes of this program, the tokenizer alone, datasets.map, and this program with two cores."""

    own: tuple[float, int]
    limit: tuple[float, int]
    mapped: tuple[float, int]
    both: tuple[float, int]


def measure_preparing(folder: Path, model_name: str, dataset: str, rounds: int) -> list[Report]:
    """Measures each format with one core, and with two; all programs run once in each round.

    Args:
        folder: for the files.
        model_name: its tokenizer is used.
        dataset: a text file, which is repeated up to the wanted size.
        rounds: how often each program runs.
    """
    small, large = (_write(folder / f"{size}MB", dataset, size) for size in (MEGABYTES, MEGABYTES * GROWTH))
    cores = sorted(os.sched_getaffinity(0))

    def run(kind: str, path: Path, num_cores: int = 1) -> tuple[float, int]:
        chosen = ",".join(map(str, cores[:num_cores]))
        words = ["taskset", "-c", chosen, "python", "-m", "forge_lib.benchmark.prepare_programs", kind, model_name]
        ended = run_programs([[*words, path]])
        return float(ended.output.split()[0]), ended.peak_bytes

    figures = []
    for name, path in small.items():
        found = [
            _Round(run("own", path), run("limit", small[".txt"]), run("map", path), run("own", path, 2))
            for _ in range(rounds)
        ]
        figures.append(_compare(name, found, run("own", large[name])[1], len(cores) > 1))
        print(json.dumps(asdict(figures[-1])), file=sys.stderr, flush=True)
    return [_report(figures), _report_memory(figures)]


def _compare(name: str, found: Sequence[_Round], grown_peak_bytes: int, has_two_cores: bool) -> PrepareFigure:
    def median(values: Iterable[float]) -> float:
        return statistics.median(list(values))

    ratios = [each.limit[0] / each.own[0] for each in found]
    return PrepareFigure(
        format=name,
        seconds=median(each.own[0] for each in found),
        limit_seconds=median(each.limit[0] for each in found),
        map_seconds=median(each.mapped[0] for each in found),
        limit_ratio=median(ratios),
        ratios=ratios,
        map_ratio=median(each.mapped[0] / each.own[0] for each in found),
        peak_bytes=min(each.own[1] for each in found),
        grown_peak_bytes=grown_peak_bytes,
        two_cores_ratio=median(each.own[0] / each.both[0] for each in found) if has_two_cores else 0.0,
    )


def _report(figures: Sequence[PrepareFigure]) -> Report:
    def plot(axes: Any) -> None:
        labels = [each.format for each in figures]
        spreads = [each.ratios for each in figures]
        bars(axes, labels, [each.limit_ratio for each in figures], spreads, "share of the tokenizer's own speed")

    columns = [
        "format",
        "seconds for 25 MB",
        "tokenizer alone",
        "share of its speed",
        "datasets.map",
        "times its speed",
    ]
    columns += ["one core / two", "peak MB, 25 MB", "peak MB, 250 MB"]
    rows = [
        [
            f"`{each.format}`", f"{each.seconds:.1f}", f"{each.limit_seconds:.1f} s",
            f"{each.limit_ratio:.2f} ({min(each.ratios):.2f} to {max(each.ratios):.2f})",
            f"{each.map_seconds:.1f} s", f"{each.map_ratio:.1f}", f"{each.two_cores_ratio:.2f}",
            f"{each.peak_bytes / 1e6:.0f}", f"{each.grown_peak_bytes / 1e6:.0f}",
        ]
        for each in figures
    ]  # fmt: skip
    return Report("prepare", "Preparing text, one core", columns, rows, [asdict(each) for each in figures], plot)


def _report_memory(figures: Sequence[PrepareFigure]) -> Report:
    sizes = [MEGABYTES, MEGABYTES * GROWTH]

    def plot(axes: Any) -> None:
        for each in figures:
            axes.plot(sizes, [each.peak_bytes / 1e6, each.grown_peak_bytes / 1e6], marker="o", label=each.format)
        axes.set_xticks(sizes)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("corpus, MB of text")
        axes.set_ylabel("peak memory, MB")
        axes.grid(alpha=0.3)
        axes.legend(ncols=2)

    rows = [[f"`{each.format}`", f"{each.peak_bytes / 1e6:.0f}", f"{each.grown_peak_bytes / 1e6:.0f}"]
            for each in figures]  # fmt: skip
    columns = ["format", *(f"peak MB, {size} MB of text" for size in sizes)]
    return Report(
        "memory_corpus",
        "Peak memory of preparing over the corpus",
        columns,
        rows,
        [asdict(each) for each in figures],
        plot,
    )


def _write(folder: Path, dataset: str, megabytes: int) -> dict[str, Path]:
    """Writes the paragraphs of a text file in every format; returns the files by ending."""
    import pandas as pd

    from forge_lib.data.streams import zstd

    paragraphs = Path(dataset).read_text().split("\n\n")
    size = sum(len(text.encode()) + 2 for text in paragraphs)
    texts = paragraphs * max(1, megabytes * 1_000_000 // size)
    lines = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()
    frame = pd.DataFrame({"id": range(len(texts)), "text": texts})
    folder.mkdir(parents=True, exist_ok=True)
    files = {ending: folder / f"x{ending}" for ending in ENDINGS}
    files[".txt"].write_text("\n\n".join(texts))
    files[".jsonl"].write_bytes(lines)
    files[".jsonl.gz"].write_bytes(gzip.compress(lines, 6))
    files[".jsonl.zst"].write_bytes(zstd.compress(lines))
    frame.to_json(files[".json"], orient="records")
    frame.to_csv(files[".csv"], index=False)
    frame.to_parquet(files[".parquet"], index=False)
    return files
