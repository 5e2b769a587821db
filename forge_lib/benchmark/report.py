"""The results of a benchmark: a Markdown table, JSON, and a plot, with the date and the machine."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from forge_lib.errors import UserError

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True)
class Report:
    """What a benchmark has measured.

    Attributes:
        name: of the files.
        title: of the table and the plot.
        columns: headings of the table.
        rows: its cells, formatted.
        figures: all numbers, of JSON types.
        plot: draws the figures on matplotlib's axes.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: list[dict]
    plot: Callable[[Any], None]

    def table(self) -> str:
        """Returns the table as Markdown, with its title and the machine."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join([f"### {self.title}", "", machine(), "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def write_report(report: Report, folder: Path) -> None:
    """Writes NAME.md, NAME.json and NAME.svg into a folder; the same figures give the same files, but for the date.

    Raises:
        UserError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{report.name}.md").write_text(report.table())
    content = {"machine": machine(), "figures": report.figures}
    (folder / f"{report.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    pyplot = import_pyplot()
    pyplot.rcParams["svg.hashsalt"] = report.name
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    report.plot(axes)
    axes.set_title(report.title, fontsize="medium")
    figure.savefig(folder / f"{report.name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def import_pyplot() -> Any:
    """Returns matplotlib.pyplot, drawing into files; UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the plots need matplotlib: pip install 'p2p-llm-forge[report]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def machine() -> str:
    """Returns a line with the date, the processor and the versions."""
    names = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    memory = psutil.virtual_memory().total / 2**30
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    capability = torch.backends.cpu.get_cpu_capability()
    capability += " with AMX" if any("amx_bf16" in line for line in _cpu_lines()) else ""
    return f"{date.today()}; {processor}, {cores} cores, {capability}, {memory:.0f} GiB, {device}; {versions}."


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def bars(
    axes: Any, labels: Sequence[str], values: Sequence[float], spreads: Sequence[Sequence[float]], what: str
) -> None:
    """Draws ratios as horizontal bars, with a line at 1.

    Args:
        axes: matplotlib's.
        labels, values: of the bars.
        spreads: the single values behind each.
        what: of the x axis.
    """
    errors = [
        [max(0.0, value - min(spread)) for value, spread in zip(values, spreads, strict=True)],
        [max(0.0, max(spread) - value) for value, spread in zip(values, spreads, strict=True)],
    ]
    axes.barh(range(len(values)), values, xerr=errors, height=0.6, capsize=3)
    axes.set_yticks(range(len(values)), labels)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel(what)
    axes.grid(axis="x", alpha=0.3)
