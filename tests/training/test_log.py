"""metrics.jsonl and trackers."""

import json
import math

import pytest

from forge_lib.errors import UserError
from forge_lib.training.log import MetricsLog, check_trackers


def test_an_unknown_tracker_is_an_error_that_names_the_installed_ones():
    assert check_trackers("none") == []
    assert check_trackers("tensorboard") == ["tensorboard"]
    with pytest.raises(UserError, match="--report-to tensorbored: no such tracker"):
        check_trackers("tensorbored")


def test_the_log_continues_after_an_incomplete_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    log = MetricsLog(tmp_path, enabled=True)
    log.write(step=2, loss=math.inf)
    MetricsLog(tmp_path, enabled=False).write(step=3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2, "loss": None}]
