"""Plots of the figures, with matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from forge_lib.benchmark.network import MODES, NetworkFigure
from forge_lib.errors import UserError


def plot_links(figures: Sequence[NetworkFigure], title: str, path: Path) -> None:
    """Writes a plot of tokens/s over the rate of the links.

    Args:
        figures: of several modes and rates.
        title: names the model and the machines.
        path: of the image; its ending gives the format, such as .svg or .png.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'p2p-llm-forge[report]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "links"  # the same figures give the same file
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for mode in MODES:
        points = sorted((each.rate, each.tokens_per_second) for each in figures if each.mode == mode)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=mode)
    rates = sorted({each.rate for each in figures})
    axes.set_xscale("log")
    axes.set_xticks(rates, [str(rate) for rate in rates])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("link of each machine, Mbit/s")
    axes.set_ylabel("tokens/s of both machines")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
