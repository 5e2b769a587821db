"""The metrics of an evaluation, as `evaluate.Metric` classes; evaluation.py imports this module late: it is slow."""

import math
from typing import ClassVar

import datasets
import evaluate
import numpy as np

from forge_lib.errors import UserError, first_line


class _TokenMetric(evaluate.Metric):
    """A metric of sums: each row counts any number of tokens, so batches and processes may differ in size."""

    description = ""
    columns: ClassVar = {"loss_sum": "float64", "num_targets": "int64"}

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="loss_sum: nats; num_targets: predicted tokens; num_correct: correctly predicted ones",
            features=datasets.Features({name: datasets.Value(dtype) for name, dtype in self.columns.items()}),
        )


class Loss(_TokenMetric):
    """Mean cross entropy per token, in nats."""

    description = "mean cross entropy per token, in nats"

    def _compute(self, loss_sum: list[float], num_targets: list[int]) -> dict[str, float]:
        return {"loss": float(np.sum(loss_sum) / np.sum(num_targets))}


class Perplexity(_TokenMetric):
    """exp(loss): the number of equally likely tokens that would be as hard to predict."""

    description = "exp of the mean cross entropy per token"

    def _compute(self, loss_sum: list[float], num_targets: list[int]) -> dict[str, float]:
        loss = np.sum(loss_sum) / np.sum(num_targets)
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf}


class BitsPerByte(_TokenMetric):
    """Bits that the model needs per byte of UTF-8 text: comparable between tokenizers."""

    description = "bits per byte of text; tokens_per_byte: tokens of the data (with end-of-text) per UTF-8 byte"

    def _compute(
        self, loss_sum: list[float], num_targets: list[int], tokens_per_byte: float = math.nan
    ) -> dict[str, float]:
        return {"bits_per_byte": float(np.sum(loss_sum) / np.sum(num_targets) / math.log(2) * tokens_per_byte)}


class NextTokenAccuracy(_TokenMetric):
    """The fraction of tokens whose most likely prediction is correct."""

    description = "fraction of tokens whose most likely prediction is correct"
    columns: ClassVar = {"num_correct": "int64", "num_targets": "int64"}

    def _compute(self, num_correct: list[int], num_targets: list[int]) -> dict[str, float]:
        return {"next_token_accuracy": float(np.sum(num_correct) / np.sum(num_targets))}


def compute_metrics(rows: np.ndarray, tokens_per_byte: float) -> dict[str, float]:
    """Returns eval_tokens, loss, perplexity, bits_per_byte and next_token_accuracy.

    Args:
        rows: [num_processes, 3] float64: loss_sum, num_targets and num_correct of each process.
        tokens_per_byte: tokens of the data per UTF-8 byte of it.
    """
    columns = {
        "loss_sum": rows[:, 0].tolist(),
        "num_targets": rows[:, 1].astype(np.int64).tolist(),
        "num_correct": rows[:, 2].astype(np.int64).tolist(),
    }
    results = {"eval_tokens": sum(columns["num_targets"])}
    for metric in (Loss, Perplexity, BitsPerByte, NextTokenAccuracy):
        inputs = {name: columns[name] for name in metric.columns}
        options = {"tokens_per_byte": tokens_per_byte} if metric is BitsPerByte else {}
        results |= metric(keep_in_memory=True).compute(**inputs, **options)
    return results


def load_metrics(names: list[str]) -> list[evaluate.Metric]:
    """Loads metrics of the evaluate package; raises UserError if one cannot be loaded."""
    loaded = []
    for name in names:
        try:
            loaded.append(evaluate.load(name))
        except Exception as error:  # a missing import, no connection to the Hub, an unknown name
            raise UserError(f"--metrics {name}: cannot be loaded ({first_line(error)})") from None
    return loaded
