"""The plots of a report, drawn by matplotlib: as SVG for light and dark pages, or as PNG."""

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forge_lib.errors import UserError
from forge_lib.report.history import History
from forge_lib.report.texts import run_names
from forge_lib.report.thinning import smooth, thin
from forge_lib.report.timeline import Timeline, make_timeline

SIZE = (4.6, 2.9)  # inches: with 9 points of font it is legible at the width of a phone
# In SVG these stand for the colors of the page, which are other ones if it is dark; in PNG they are used as they are.
TEXT, GRID = "#24292e", "#d0d4d9"
SERIES = ("#1668b8", "#d1570a", "#1a8a3e", "#9b3fb5", "#b8324f", "#0c8599", "#7a6a00", "#5b5f66")
SMOOTHED_SHARE = 100  # a curve of n rows is smoothed over n / 100 of them
FIX = "the plots need matplotlib: pip install 'p2p-llm-forge[report]'"
MARK_COLORS = {"lost": SERIES[4], "diverged": SERIES[4], "left out": SERIES[1], "stopped": SERIES[1]}


@dataclass(frozen=True)
class Plot:
    """A plot of a report: its title, a sentence about it, and the SVG."""

    title: str
    caption: str
    svg: str


def draw_plots(histories: Sequence[History]) -> list[Plot]:
    """Returns the plots of a report about some runs; those without numbers are left out.

    Raises:
        UserError: matplotlib is not installed.
    """
    several, names = len(histories) > 1, run_names(histories)
    made = [
        _plot("Loss", "Nats per token; dots: on the held-out text.", lambda axes: draw_loss(axes, histories)),
        *(
            _plot(title, caption, lambda axes, name=name, log=log: _draw_column(axes, histories, name, log))
            for title, caption, name, log in (
                ("Learning rate", "Of each step.", "learning_rate", False),
                ("Gradient norm", "Before clipping.", "grad_norm", True),
                ("Tokens per second", "Of all machines together.", "tokens_per_second", False),
                ("Peak memory", "Of the process with the most, in GB.", "peak_memory_bytes", False),
            )
            if any(history.last(name) for history in histories)
        ),
    ]
    for history, name in zip(histories, names, strict=True):
        name = f" ({name})" if several else ""
        if len(history):
            caption = "Seconds of a step" if not history.rounds else "Seconds of a round"
            made.append(
                _plot(
                    f"Where the time goes{name}", f"{caption}, smoothed.", lambda axes, h=history: _draw_parts(axes, h)
                )
            )
        timeline = make_timeline(history)
        if timeline.spans:
            height = 1.3 + 0.3 * len(timeline.machines)
            caption = "Bars: when it trained. Marks: events."
            made.append(
                _plot(f"Machines{name}", caption, lambda axes, t=timeline: _draw_machines(axes, t), (SIZE[0], height))
            )
    return made


def write_png(histories: Sequence[History], path: Path) -> None:
    """Writes the main plot, the loss of all runs, as a PNG file.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    figure, axes = _figure((7.0, 4.0), "loss")
    draw_loss(axes, histories)
    axes.set_ylabel("loss, nats per token")
    try:
        figure.savefig(path, dpi=140, format="png")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def draw_loss(axes: Any, histories: Sequence[History]) -> None:
    """Draws the loss over the steps, with its smoothed course, and the held-out loss.

    Args:
        axes: of matplotlib.
        histories: of the runs.
    """
    has_curve = False
    names = list(map(_label, run_names(histories))) if len(histories) > 1 else ["loss"]
    for index, (history, name) in enumerate(zip(histories, names, strict=True)):
        color = SERIES[index % len(SERIES)]
        steps, losses = _known(history, "loss")
        if len(losses):
            rough = len(losses) > 40
            axes.plot(*thin(steps, losses), color=color, alpha=0.35 if rough else 1, linewidth=0.9 if rough else 1.4)
            if rough:
                smoothed = smooth(losses, max(5, len(losses) // SMOOTHED_SHARE))
                axes.plot(*thin(steps, smoothed), color=color, linewidth=1.5, label=name)
            else:
                axes.plot([], [], color=color, label=name)
            has_curve = True
        if history.evaluations:
            held_out = SERIES[1] if len(histories) == 1 else color
            points = [(row["step"], row["eval_loss"]) for row in history.evaluations]
            label = "held-out loss" if len(histories) == 1 else None
            axes.plot(*zip(*points, strict=True), "o--", color=held_out, markersize=3.5, linewidth=0.8, label=label)
            has_curve = True
    axes.set_xlabel("step")
    if has_curve:
        axes.legend(frameon=False, labelcolor=TEXT, fontsize="small")


def _draw_column(axes: Any, histories: Sequence[History], name: str, is_logarithmic: bool) -> None:
    scale = 1e-9 if name.endswith("_bytes") else 1.0
    for index, history in enumerate(histories):
        steps, values = _known(history, name)
        label = _label(run_names(histories)[index]) if len(histories) > 1 else None
        axes.plot(*thin(steps, values * scale), color=SERIES[index % len(SERIES)], linewidth=1.2, label=label)
    axes.set_xlabel("step")
    known = np.concatenate([_known(history, name)[1] for history in histories])
    if is_logarithmic and len(known) and 0 < 10 * known.min() < known.max():
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which("{x:g}")
    elif not is_logarithmic:
        axes.set_ylim(bottom=0)
    if len(histories) > 1:
        axes.legend(frameon=False, labelcolor=TEXT, fontsize="small")


def _draw_parts(axes: Any, history: History) -> None:
    names = {"compute_seconds": "computing", "sync_seconds": "synchronizing", "data_seconds": "reading data"}
    if history.rounds:
        names = {"compute_seconds": "computing", "sync_seconds": "exchanging", "wait_seconds": "waiting"}
    columns = history.columns
    kept = np.isfinite(columns["compute_seconds"])
    steps = columns["step"][kept]
    values = [smooth(np.nan_to_num(columns[name][kept]), max(1, len(steps) // SMOOTHED_SHARE)) for name in names]
    places = np.unique(np.linspace(0, len(steps) - 1, 600).astype(int)) if len(steps) else np.zeros(0, int)
    stacked = [each[places] for each in values]
    axes.stackplot(steps[places], *stacked, labels=list(names.values()), colors=SERIES, alpha=0.85, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=TEXT, fontsize="small", loc="lower left")


def _draw_machines(axes: Any, timeline: Timeline) -> None:
    machines = timeline.machines
    for row, machine in enumerate(machines):
        bars = [(span.start, span.stop - span.start) for span in timeline.spans if span.machine == machine]
        axes.broken_barh(bars, (row - 0.3, 0.6), color=SERIES[row % len(SERIES)], linewidth=0)
    for mark in timeline.marks:
        row = machines.index(mark.machine) if mark.machine in machines else len(machines) - 0.35
        axes.plot(mark.place, row, marker="v", color=MARK_COLORS.get(mark.kind, SERIES[2]), markersize=5)
    for kind in dict.fromkeys(mark.kind for mark in timeline.marks):
        axes.plot([], [], "v", color=MARK_COLORS.get(kind, SERIES[2]), markersize=5, label=kind)
    axes.set_yticks(range(len(machines)), [_label(name[:24]) for name in machines])
    axes.set_ylim(len(machines) - 0.1, -0.6)
    axes.set_xlabel("step" if timeline.unit == "step" else f"{timeline.unit} since the start")
    axes.grid(axis="y", visible=False)
    if timeline.marks:
        axes.figure.legend(frameon=False, labelcolor=TEXT, fontsize="small", ncols=4, loc="outside lower left")


def _label(text: str) -> str:
    """Returns a text as matplotlib shows it: without formulas, and also if it begins with an underscore."""
    return f"\u200b{text}".replace("$", r"\$")


def _known(history: History, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and the values of a column, without rows that have none."""
    steps, values = history.columns["step"], history.columns[name]
    known = np.isfinite(values)
    return steps[known], values[known]


def _plot(title: str, caption: str, draw: Callable[[Any], None], size: tuple[float, float] = SIZE) -> Plot:
    figure, axes = _figure(size, title)
    draw(axes)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return Plot(title, caption, _for_page(file.getvalue(), title))


def _figure(size: tuple[float, float], salt: str) -> tuple[Any, Any]:
    """Returns a new figure of matplotlib and its axes; `salt` makes the identifiers in its SVG unique."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError(FIX) from None
    from matplotlib.figure import Figure  # no pyplot: no state, and no window

    mpl.rcParams["svg.hashsalt"], mpl.rcParams["svg.fonttype"] = salt, "none"
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=TEXT, labelsize=10)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    return figure, axes


def _for_page(svg: str, title: str) -> str:
    """Returns an SVG for use inside a page: with the page's colors, its font, and a name for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = svg.replace(TEXT, "var(--text)").replace(GRID, "var(--grid)")
    for index, color in enumerate(SERIES):
        svg = svg.replace(color, f"var(--series-{index})")
    svg = re.sub(r'id="(?:figure|axes|patch|matplotlib|xtick|ytick|line2d|text|legend|PathC|Fill)[^"]*"', "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
