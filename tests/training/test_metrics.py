"""Metrics against figures worked out by hand."""

import json
import math

import pytest
import torch

from forge_lib.errors import UserError
from forge_lib.training import metrics


def test_the_metrics_weigh_tokens_not_rows():
    """Rows of 10 tokens at 1 nat and of 30 at 2 nats: a loss of (10 + 60) / 40 = 1.75."""
    sums = {"loss_sum": [10.0, 60.0], "num_targets": [10, 30]}
    assert metrics.Loss(keep_in_memory=True).compute(**sums) == {"loss": 1.75}
    assert metrics.Perplexity(keep_in_memory=True).compute(**sums)["perplexity"] == pytest.approx(math.exp(1.75))
    bits = metrics.BitsPerByte(keep_in_memory=True).compute(**sums, tokens_per_byte=0.25)["bits_per_byte"]
    assert bits == pytest.approx(1.75 / math.log(2) / 4)
    accuracy = metrics.NextTokenAccuracy(keep_in_memory=True).compute(num_correct=[5, 15], num_targets=[10, 30])
    assert accuracy == {"next_token_accuracy": 0.5}


def test_metrics_of_the_evaluate_package_are_taken_by_path_and_a_missing_one_is_named(tmp_path):
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


def test_a_tracker_that_is_not_there_is_named():
    assert metrics.check_trackers("none") == []
    assert metrics.check_trackers("tensorboard") == ["tensorboard"]
    with pytest.raises(UserError, match="--report-to tensorbored: no such tracker"):
        metrics.check_trackers("tensorbored")


def test_the_log_goes_on_behind_a_line_that_was_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    log = metrics.MetricsLog(tmp_path, enabled=True)
    log.write(step=2, loss=math.inf)
    metrics.MetricsLog(tmp_path, enabled=False).write(step=3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2, "loss": None}]


def test_without_other_processes_nothing_is_sent():
    sync = metrics.GradientSync(torch.nn.Linear(2, 2))
    sync.backward_done()
    assert sync.take() == (0.0, 0.0)
