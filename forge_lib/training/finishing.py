"""What a complete run writes at its end: the final model with its card, and the report."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forge_lib.config import TrainConfig
from forge_lib.errors import first_line
from forge_lib.models.final import save_final
from forge_lib.report.card import PLOT_NAME, make_card
from forge_lib.report.history import read_history
from forge_lib.report.page import write_report
from forge_lib.report.plots import write_png
from forge_lib.training.inputs import Inputs

logger = logging.getLogger("forge")

REPORT_NAME = "report.html"


def write_results(
    config: TrainConfig,
    inputs: Inputs,
    folder: Path,
    results: dict[str, Any],
) -> Path:
    """Writes final/ and report.html into a run folder. Main process only.

    Whatever fails beside the weights, such as a plot, is a warning: a training of days must not end without its model.

    Args:
        config: every flag.
        inputs: the model, in which LoRA adapters are merged, and its tokenizer.
        folder: the run folder; it has run.json and metrics.jsonl.
        results: `steps`, and the numbers of the last evaluation.

    Returns:
        The folder of the final model.
    """
    final = folder / "final"

    def add_files(partial: Path) -> None:
        facts = {"figures": results, "configuration": dataclasses.asdict(config)}
        (partial / "training.json").write_text(
            json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        with _warning("the model card"):
            _write_card(config, folder, partial, results)

    save_final(inputs.model, inputs.tokenizer, final, add_files)
    logger.info(f"done: the model is in {final}, the metrics are in {folder / 'metrics.jsonl'}")
    if config.write_report:
        with _warning("the report"):
            write_report([folder], folder / REPORT_NAME)
            logger.info(f"the report is {folder / REPORT_NAME}")
    return final


def _write_card(config: TrainConfig, folder: Path, partial: Path, results: dict[str, Any]) -> None:
    """Writes README.md, and its plot, into the unfinished folder of the final model."""
    history = read_history(folder)
    if config.write_report:
        with _warning("the plot of the model card"):
            write_png([history], partial / PLOT_NAME)
    figures = results | {name: value for name in ("loss", "tokens") if (value := history.last(name)) is not None}
    place = config.push_to_hub or str(folder / "final")
    card = make_card(place, history, figures, has_plot=(partial / PLOT_NAME).exists())
    (partial / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def _warning(what: str) -> Iterator[None]:
    """Turns any exception inside into a line of the log."""
    try:
        yield
    except Exception as error:  # whatever the libraries behind it raise
        logger.warning(f"{what} could not be written: {first_line(error)}")
