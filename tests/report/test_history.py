"""What is read from metrics.jsonl: also of a run that was resumed, has crashed, or is of train_elastic.py."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_lib.errors import UserError
from forge_lib.report.history import read_history, read_tail
from forge_lib.report.thinning import thin


def row(step: int, loss: float | None = 1.0, **more) -> dict:
    return {"step": step, "loss": loss, "tokens_per_second": 10.0, **more}


def write(folder, *rows, end: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows) + end)


def test_of_steps_that_a_resumed_run_has_repeated_the_later_rows_count(tmp_path):
    """It was killed after step 3, and goes on from step 1: rows 2 and 3 of the first start do not count any more."""
    before = [row(1, 9.0), row(2, 8.0), {"step": 2, "eval_loss": 8.5}, row(3, 7.0)]
    write(tmp_path, *before, {"step": 1, "event": "resume"}, row(2, 5.0))
    history = read_history(tmp_path)
    assert history.columns["step"].tolist() == [1, 2] and history.columns["loss"].tolist() == [9.0, 5.0]
    assert history.evaluations == [] and history.last_step == 2
    write(tmp_path, *before, {"step": 1, "event": "resume"}, row(2, 5.0), {"step": 2, "eval_loss": 4.5})
    assert [each["eval_loss"] for each in read_history(tmp_path).evaluations] == [4.5]


@pytest.mark.parametrize(
    "end", ['{"step": 3, "lo', "garbage\n", "[1]\n", '{"step": 3, "loss": "a", "tokens_per_second": 1}\n']
)
def test_a_line_that_is_not_a_row_is_left_out(tmp_path, end):
    write(tmp_path, row(1), row(2, None, unknown=[1, {"a": 2}]), end=end)
    history = read_history(tmp_path)
    assert history.columns["step"][:2].tolist() == [1, 2]
    assert np.isnan(history.columns["loss"][1:]).all()


def test_an_empty_file_is_a_run_without_steps_and_another_folder_is_an_error(tmp_path):
    write(tmp_path)
    assert len(read_history(tmp_path)) == 0 and read_history(tmp_path).last("loss") is None
    with pytest.raises(
        UserError, match=r"has neither metrics\.jsonl nor run\.json: expected the --output-dir of a run"
    ):
        (tmp_path / "other").mkdir()
        read_history(tmp_path / "other")
    with pytest.raises(UserError, match="is not a folder"):
        read_history(tmp_path / "nothing")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        read_history(tmp_path)


def test_rows_of_rounds_have_columns_too(tmp_path):
    rows = [row(n, 2.0 / n, participants=[{"peer": "alder"}], round=n, utilization=0.5) for n in (1, 2)]
    write(tmp_path, *rows)
    history = read_history(tmp_path)
    assert history.columns["loss"].tolist() == [2.0, 1.0] and history.columns["utilization"].tolist() == [0.5, 0.5]
    assert [each["participants"][0]["peer"] for each in history.rounds] == ["alder", "alder"]


def test_the_end_of_a_long_file_has_the_newest_rows(tmp_path):
    write(tmp_path, *(row(n, 1.0 / n) for n in range(1, 30_001)), {"step": 30_000, "event": "stop"})
    tail, whole = read_tail(tmp_path), read_history(tmp_path)
    assert 0 < len(tail) < len(whole) == 30_000
    assert tail.last("loss") == whole.last("loss") == 1 / 30_000 and tail.events == whole.events


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=500))
def test_a_thinned_curve_keeps_its_extremes_and_its_ends(values):
    x, y = np.arange(len(values), dtype=float), np.array(values, float)
    known = y[np.isfinite(y)]
    found_x, found = thin(x, y, max_points=20)
    assert len(found) <= 22 and (np.diff(found_x) > 0).all()
    if len(known):
        assert (found.min(), found.max()) == (known.min(), known.max())
        assert (found[0], found[-1]) == (known[0], known[-1])


def test_a_run_that_began_again_before_its_first_checkpoint_has_only_its_newest_rows(tmp_path):
    sample = {"step": 3, "event": "sample", "text": "old"}
    write(tmp_path, row(1), row(2), row(3, 3.0), sample, {"step": 0, "event": "start"}, row(1, 9.0), row(2, 8.0))
    history = read_history(tmp_path)
    assert history.columns["loss"].tolist() == [9.0, 8.0] and history.last_step == 2
    assert history.events_named("sample") == [sample] and history.events_named("sample", is_undone=False) == []


def test_a_peer_that_takes_over_later_rounds_keeps_its_earlier_ones(tmp_path):
    """train_elastic.py: after a restart it gets rounds 3 and 4 from others, and does not repeat them."""
    rounds = [row(n, 2.0 / n, participants=[]) for n in (1, 2, 5)]
    write(tmp_path, *rounds[:2], {"step": 1, "event": "resume"}, rounds[2])
    assert read_history(tmp_path).columns["step"].tolist() == [1, 2, 5]


def test_one_damaged_line_among_many_is_found_and_no_extreme_is_lost(tmp_path):
    """100,000 rows, of which two are damaged: the rest is as it was written."""
    losses = np.random.default_rng(0).random(100_000)
    losses[77_777] = 5.0
    lines = [json.dumps(row(n, loss)) for n, loss in enumerate(losses, 1)]
    lines[50_000], lines[-1] = lines[50_000][:40], '{"step": 100000, "tokens_per_second": 1, "loss"'
    lines[50_000] += ', "tokens_per_second"'
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    history = read_history(tmp_path)
    assert history.num_unreadable == 2 and len(history) == 99_998
    assert thin(history.columns["step"], history.columns["loss"])[1].max() == 5.0
