"""report.html: what it contains, and what it leaves out."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from commands import BIN, ROOT
from PIL import Image

from forge_lib.report.history import read_history
from forge_lib.report.page import command_of, find_differences, write_report
from forge_lib.report.texts import describe_status, holders
from forge_lib.report.timeline import make_timeline

SECTIONS = ("Plots", "Machines", "Samples", "Events", "Checkpoints", "Configuration")
WORLD = [{"host": host, "device_name": "cpu", "versions": {"torch": "2.13"}} for host in ("alder", "birch")]


@pytest.fixture
def run(tmp_path):
    """A run of two machines that lost one, and was resumed without it."""
    folder = tmp_path / "a run"
    folder.mkdir()
    config = {
        "model_name": "gpt2",
        "dataset_path": "a b.txt",
        "learning_rate": 0.01,
        "batch_size": 8,
        "output_dir": "r",
    }
    batches = {"num_steps": 100, "batch_size": 8, "num_blocks": 50, "shares": [4, 4]}
    (folder / "run.json").write_text(json.dumps({"config": config, "batches": batches, "world": WORLD}))
    rows = [{"step": 0, "event": "start", "time": 1000.0, "hosts": ["alder", "birch"]}, {"step": 0, "eval_loss": 8.0}]
    for step in range(10, 60, 10):
        times = {"step_seconds": 1.0, "data_seconds": 0.1, "compute_seconds": 0.7, "sync_seconds": 0.2}
        rows.append(
            {
                "step": step,
                "loss": 100.0 / step,
                "grad_norm": 1.0,
                "tokens_per_second": 5.0,
                "time": 1000.0 + step,
                **times,
            }
        )
    rows.append({"step": 50, "event": "sample", "text": "<script>alert(1)</script> & more", "time": 1050.0})
    rows.append(
        {"step": 50, "event": "checkpoint", "path": "r/step-50", "seconds": 0.5, "hosts": ["alder"], "time": 1050}
    )
    rows.append({"step": 50, "event": "peer_lost", "message": "birch is lost", "time": 1052.0})
    rows.append({"step": 50, "event": "resume", "hosts": ["alder"], "time": 4600.0})
    rows.append({"step": 60, "loss": 1.0, "tokens_per_second": 5.0, "time": 4610.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Links(HTMLParser):
    """Collects what a page would load, and checks that its tags are balanced."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self._open = [], []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "br", "use", "path", "rect"):
            self._open.append(tag)
        self.found += [
            value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "action")
        ]

    def handle_startendtag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()


def test_the_page_has_every_section_loads_nothing_and_shows_texts_as_they_are(run):
    write_report([run], run / "report.html")
    page = (run / "report.html").read_text()
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert [name for name in SECTIONS if name not in headings] == []
    assert [link for link in Links(page).found if not link.startswith(("#", "data:"))] == []
    assert "url(http" not in page and "@import" not in page and "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert {"Loss", "Gradient norm", "Tokens per second", "Where the time goes", "Machines"} <= set(titles)
    assert "so far 60 of 100 steps" in page and "birch is lost" in page
    assert "scripts/train.py --model-name gpt2 --dataset-path &#39;a b.txt&#39;" in page


def test_the_timeline_has_a_gap_while_a_machine_was_lost(run):
    timeline = make_timeline(read_history(run))
    minutes = [(span.machine, round(span.start, 1), round(span.stop, 1)) for span in timeline.spans]
    assert timeline.unit == "minutes" and minutes == [("alder", 0.0, 0.9), ("birch", 0.0, 0.9), ("alder", 60.0, 60.2)]
    assert [(mark.kind, round(mark.place, 1)) for mark in timeline.marks] == [("lost", 0.9), ("resumed", 60.0)]


def test_several_runs_share_the_plots_and_their_differences_are_listed(run, tmp_path):
    shutil.copytree(run, tmp_path / "b")
    description = json.loads((run / "run.json").read_text())
    description["config"]["learning_rate"] = 0.1
    (tmp_path / "b" / "run.json").write_text(json.dumps(description))
    histories = [read_history(folder) for folder in (run, tmp_path / "b")]
    assert find_differences(histories) == [("--learning-rate", ["0.01", "0.1"])]
    write_report([run, tmp_path / "b"], tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    assert "<th>--learning-rate</th><td>0.01</td><td>0.1</td>" in page and page.count("<h3>Loss</h3>") == 1


def test_the_command_has_the_flags_that_are_not_at_their_default(run):
    words = command_of(read_history(run)).split(" --")
    assert words[0] == "scripts/train.py" and "batch-size 8" in words and "learning-rate 0.01" in words


def test_the_script_writes_the_plot_alone_and_reports_a_wrong_folder(run, tmp_path, start):
    command = [BIN / "python", ROOT / "scripts" / "report.py"]
    ended = start([*command, run, "--png", tmp_path / "loss.png"]).finish()
    assert ended.code == 0 and not (run / "report.html").exists()
    assert Image.open(tmp_path / "loss.png").size[0] > 600
    ended = start([*command, tmp_path]).finish()
    assert ended.code == 2 and "expected the --output-dir of a run" in ended.output


def test_checkpoints_name_only_the_machines_that_could_write_them(run):
    rows = [{"step": 55, "event": "checkpoint", "path": "r/step-55", "hosts": ["alder", "birch"]}]
    rows.append({"step": 55, "event": "checkpoint_failed", "host": "birch", "error": "No space left on device"})
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    history = read_history(run)
    assert holders(history, history.events_named("checkpoint")[-1]) == ["alder"]


def test_names_of_runs_are_unique_and_shown_as_they_are(run, tmp_path):
    """matplotlib would read $ as a formula, and leave out a name that begins with an underscore."""
    for place in ("x/_$run$", "y/_$run$"):
        shutil.copytree(run, tmp_path / place)
    folders = [tmp_path / "x" / "_$run$", tmp_path / "y" / "_$run$"]
    write_report(folders, tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    assert all(page.count(f"{letter}/_$run$") >= 3 for letter in "xy"), "in the legends, and above its sections"


def test_rounds_of_a_peer_show_its_absence_and_a_lost_other_does_not_interrupt_it(tmp_path):
    rows = [
        {
            "step": n,
            "loss": 1.0,
            "tokens_per_second": 5.0,
            "round_seconds": 10.0,
            "time": time,
            "participants": [{"peer": peer} for peer in peers],
        }
        for n, time, peers in ((10, 1010, "ab"), (20, 1020, "a"), (30, 9000, "ab"), (40, 9010, "ab"))
    ]
    rows.append({"step": 40, "event": "peer_lost", "peer": "b", "time": 9011})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = read_history(tmp_path)
    spans = [
        (span.machine, round(span.start * 3600 + 1010), round(span.stop * 3600 + 1010))
        for span in make_timeline(history).spans
    ]
    assert sorted(spans) == [("a", 1000, 1020), ("a", 8985, 9010), ("b", 1000, 1010), ("b", 8985, 9010)]
    assert "interrupted" not in describe_status(history)
