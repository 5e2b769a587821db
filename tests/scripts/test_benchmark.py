"""The benchmark: its flags, and the reports of its figures. What it measures is not tested."""

import json

import pytest

from forge_lib.benchmark.model import sized_config, write_model
from forge_lib.benchmark.network import MODES, NetworkFigure, report_links
from forge_lib.benchmark.report import write_report
from forge_lib.benchmark.save import measure_saves
from forge_lib.benchmark.step import Setting
from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from scripts.benchmark import BenchmarkConfig


def test_unknown_modes_and_rates_are_reported():
    with pytest.raises(UserError, match=r"--rates 20;100: expected whole numbers with commas(.|\n)*--modes 'fp16'"):
        parse_config(
            BenchmarkConfig,
            ["network", "--model-name", "-", "--rates", "20;100", "--modes", "fp16"],
            positional="what",
        )


def test_the_report_has_each_figure_and_is_the_same_for_the_same_figures(tmp_path):
    figures = [NetworkFigure(mode, rate, rate * 2.0, 1e6) for mode in MODES for rate in (100, 20)]
    report = report_links(figures, 26_000_000)
    for name in ("a", "b"):
        write_report(report, tmp_path / name)
    plot = (tmp_path / "a" / "network.svg").read_text()
    assert plot == (tmp_path / "b" / "network.svg").read_text() and all(mode in plot for mode in MODES)
    table = (tmp_path / "a" / "network.md").read_text()
    assert "26 M parameters" in table and all(f"| {mode} | 100 | 200 | 1.0 |" in table for mode in MODES)
    assert len(json.loads((tmp_path / "a" / "network.json").read_text())["figures"]) == len(figures)


def test_a_model_folder_without_weights_has_the_wanted_size(tmp_path):
    config = sized_config("data/tiny_gpt2", 256, 3, trust_remote_code=False)
    assert (config.hidden_size, config.num_hidden_layers) == (256, 3)
    write_model(config, "data/tiny_gpt2", tmp_path)
    assert not list(tmp_path.glob("*.safetensors")) and (tmp_path / "tokenizer.json").exists()


def test_the_cost_of_checkpoints_is_measured(tmp_path):
    config = sized_config("data/tiny_gpt2", 32, 1, trust_remote_code=False)
    (figures,) = measure_saves(config, tmp_path / "checkpoints", rounds=1, steps=3).figures
    assert figures["checkpoint_bytes"] > 3 * 4 * 2048 * 32, "weights and two moments"
    assert figures["save_seconds"] > 0 and figures["resume_seconds"] > 0


def test_a_large_tokenizer_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("forge_lib.benchmark.step.LEAST_VOCABULARY", 2000)
    with pytest.raises(UserError, match=r"its tokenizer has 2,048 tokens; step, memory and start need one of at most"):
        Setting(tmp_path, "data/tiny_gpt2", "data/sample_corpus.txt")
