"""The metrics of an evaluation against figures computed by hand."""

import math

import numpy as np
import pytest

from forge_lib.errors import UserError
from forge_lib.training import evaluation_metrics as metrics


def test_metrics_weight_tokens_rather_than_processes():
    """One process has 10 tokens at 1 nat, another 30 at 2 nats: the loss is (10 + 60) / 40 = 1.75."""
    rows = np.array([[10.0, 10, 5], [60.0, 30, 15]])
    assert metrics.compute_metrics(rows, tokens_per_byte=0.25) == {
        "eval_tokens": 40,
        "loss": 1.75,
        "perplexity": pytest.approx(math.exp(1.75)),
        "bits_per_byte": pytest.approx(1.75 / math.log(2) / 4),
        "next_token_accuracy": 0.5,
    }


def test_the_perplexity_of_a_huge_loss_is_infinite_rather_than_an_error():
    assert metrics.compute_metrics(np.array([[8000.0, 10, 0]]), 1.0)["perplexity"] == math.inf


def test_a_metric_of_the_evaluate_package_is_loaded_by_path_and_a_missing_one_is_an_error(tmp_path):
    (tmp_path / "length").mkdir()
    (tmp_path / "length" / "length.py").write_text(
        "import datasets\nimport evaluate\n"
        "class Length(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        text = datasets.Value('string')\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='',\n"
        "            features=datasets.Features({'predictions': text, 'references': text}))\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'length': sum(map(len, predictions))}\n"
    )
    (metric,) = metrics.load_metrics([str(tmp_path / "length")])
    assert metric.compute(predictions=["abc", "d"], references=["", ""]) == {"length": 4}
    with pytest.raises(UserError, match="--metrics no_such_metric: cannot be loaded"):
        metrics.load_metrics(["no_such_metric"])
