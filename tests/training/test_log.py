"""metrics.jsonl and trackers."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from forge_lib.errors import UserError
from forge_lib.training.log import MetricsLog, to_json, write_run_json
from forge_lib.training.trackers import Trackers, choose_trackers


def choose(report_to: str, process_index: int = 0) -> list[str]:
    config = SimpleNamespace(report_to=report_to)
    return choose_trackers(config, SimpleNamespace(process_index=process_index))


def test_an_unknown_tracker_is_an_error_and_a_missing_package_only_a_warning(caplog):
    assert choose("none") == []
    assert choose("tensorboard,trackio") == ["tensorboard", "trackio"]
    with pytest.raises(UserError, match="--report-to tensorbored: no such tracker; expected all, aim, tensorboard"):
        choose("tensorbored")
    assert choose("aim,trackio") == ["trackio"]
    assert choose("aim", process_index=1) == []
    assert caplog.text.count("--report-to aim: its package is not installed") == 1


def test_a_tracker_that_fails_is_dropped_with_one_warning(caplog):
    seen = []
    good = SimpleNamespace(name="good", log=lambda values, step: seen.append((step, values)), finish=lambda: None)
    bad = SimpleNamespace(name="bad", log=lambda values, step: 1 / 0)
    accelerator = SimpleNamespace(trackers=[bad, good], is_main_process=True)
    trackers = Trackers(accelerator)
    for step in (1, 2):
        trackers.log({"loss": 1.5, "mfu": None}, step)
    trackers.finish()
    assert seen == [(1, {"loss": 1.5}), (2, {"loss": 1.5})]
    assert caplog.text.count("the tracker bad has failed: division by zero") == 1


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


def test_each_tracker_is_started_once_and_one_that_cannot_start_takes_no_other_with_it(tmp_path, caplog):
    """With accelerate's own call, which starts every tracker in its list each time."""
    started = []

    class Fake(GeneralTracker):
        requires_logging_directory, main_process_only, tracker = False, True, None

        def __init__(self, name: str):
            super().__init__(_blank=True)
            self.name = name

        def start(self):
            started.append(self.name)
            if self.name == "bad":
                raise OSError("no connection")

        def store_init_configuration(self, values):
            assert values == {"seed": 1}

    accelerator = Accelerator(cpu=True)
    accelerator.log_with = [Fake("first"), Fake("bad"), Fake("last")]
    Trackers(accelerator).start("run", {"seed": 1, "shares": None})
    assert started == ["first", "bad", "last"]
    assert [tracker.name for tracker in accelerator.trackers] == ["first", "last"]
    assert "cannot start: no connection" in caplog.text


def test_a_full_disk_leaves_run_json_as_it_was(tmp_path, caplog):
    write_run_json(tmp_path, {"step": 1})
    (tmp_path / ".partial-run.json").symlink_to("/dev/full")
    write_run_json(tmp_path, {"step": 2})
    assert json.loads((tmp_path / "run.json").read_text()) == {"step": 1}
    assert "run.json cannot be written: No space left on device; the run continues" in caplog.text
