"""What a complete run writes at its end: the final model with its card, the report, and the upload to the Hub."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from forge_lib.config import TrainConfig
from forge_lib.errors import UserError
from forge_lib.models.final import save_final
from forge_lib.report.card import PLOT_NAME, make_card
from forge_lib.report.history import read_history
from forge_lib.report.page import command_of, write_report
from forge_lib.report.plots import write_png
from forge_lib.training.hub import push_to_hub

logger = logging.getLogger("forge")

REPORT_NAME = "report.html"


def write_results(
    config: TrainConfig,
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: Path,
    results: dict[str, Any],
) -> Path:
    """Writes final/ and report.html into a run folder, and uploads the model if so configured. Main process only.

    Args:
        config: every flag.
        model: unwrapped; LoRA adapters are merged in place.
        tokenizer: its tokenizer.
        folder: the run folder; it has run.json and metrics.jsonl.
        results: `steps`, and the numbers of the last evaluation.

    Returns:
        The folder of the final model.
    """
    final, history = folder / "final", read_history(folder)
    figures = results | {name: value for name in ("loss", "tokens") if (value := history.last(name)) is not None}

    def add_files(partial: Path) -> None:
        if config.write_report:
            try:
                write_png([history], partial / PLOT_NAME)
            except UserError as error:  # matplotlib is not installed
                logger.info(f"the model card has no plot: {error}")
        name = (config.push_to_hub or folder.resolve().name).rpartition("/")[2]
        has_plot = (partial / PLOT_NAME).exists()
        card = make_card(name, history.description, figures, command_of(history), has_plot)
        (partial / "README.md").write_text(card, encoding="utf-8")
        facts = {"figures": figures, "configuration": dataclasses.asdict(config)}
        (partial / "training.json").write_text(
            json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    save_final(model, tokenizer, final, add_files)
    logger.info(f"done: the model is in {final}, the metrics are in {folder / 'metrics.jsonl'}")
    if config.write_report:
        try:
            write_report([folder], folder / REPORT_NAME)
            logger.info(f"the report is {folder / REPORT_NAME}")
        except UserError as error:
            logger.info(f"there is no report: {error}")
    if config.push_to_hub:
        push_to_hub(final, config.push_to_hub)
    return final
