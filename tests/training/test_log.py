"""metrics.jsonl and trackers."""

import json
import math

import numpy as np
import pytest

from forge_lib.errors import UserError
from forge_lib.training.log import MetricsLog, check_trackers, to_json


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


def test_numbers_that_json_lacks_become_null_at_any_depth():
    row = {
        "a": math.nan,
        "b": [1.5, -math.inf, {"c": np.float32("nan")}],
        "d": np.array([1.0, math.inf]),
        "e": np.int64(3),
    }
    expected = {"a": None, "b": [1.5, None, {"c": None}], "d": [1.0, None], "e": 3}
    assert json.loads(json.dumps(to_json(row), allow_nan=False)) == expected
