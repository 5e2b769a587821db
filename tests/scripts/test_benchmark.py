"""The benchmark: its flags, and the reports of its figures. What it measures is not tested."""

import json

import pytest

from forge_lib.benchmark.model import sized_config, write_model
from forge_lib.benchmark.network import MODES, NetworkFigure, report_links
from forge_lib.benchmark.report import write_report
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
