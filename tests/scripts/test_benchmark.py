"""The benchmark: its flags, and the plot of its figures. What it measures is not tested."""

import pytest

from forge_lib.benchmark.model import sized_config, write_model
from forge_lib.benchmark.network import MODES, NetworkFigure
from forge_lib.benchmark.plots import plot_links
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


def test_the_plot_shows_each_mode_and_is_the_same_for_the_same_figures(tmp_path):
    figures = [NetworkFigure(mode, rate, rate * 2.0, 1e6) for mode in MODES for rate in (100, 20)]
    for name in ("a.svg", "b.svg"):
        plot_links(figures, "26 M parameters", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert all(mode in (tmp_path / "a.svg").read_text() for mode in MODES)


def test_a_model_folder_without_weights_has_the_wanted_size(tmp_path):
    config = sized_config("data/tiny_gpt2", 256, 3, trust_remote_code=False)
    assert (config.hidden_size, config.num_hidden_layers) == (256, 3)
    write_model(config, "data/tiny_gpt2", tmp_path)
    assert not list(tmp_path.glob("*.safetensors")) and (tmp_path / "tokenizer.json").exists()
