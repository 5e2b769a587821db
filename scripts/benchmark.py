r"""Measures this program on this machine.

    python scripts/benchmark.py save --model-name data/tiny_gpt2 --hidden-size 768 --num-layers 6
    sudo .venv/bin/python scripts/benchmark.py network --model-name data/tiny_gpt2 --hidden-size 512 --num-layers 8

`save`: what checkpoints cost, beside one plain copy of the same bytes. `network`: tokens/s of two machines, which are
network namespaces of this machine with one core each, over links of several rates; about an hour. The figures are
printed as JSON. Other programs disturb them.
"""

import json
import sys
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Literal

from forge_lib.benchmark.model import sized_config, write_model
from forge_lib.benchmark.network import MODES, measure_links
from forge_lib.benchmark.plots import plot_links
from forge_lib.benchmark.save import measure_saves
from forge_lib.config import ModelNameConfig, RangeChecked, flag
from forge_lib.distributed.reporting import report_errors
from forge_lib.flags import parse_config


@dataclass(kw_only=True)
class MeasureConfig:
    """What is measured, and with which model."""

    _argument_group_name = "benchmark"

    what: Literal["save", "network"] = flag(MISSING, "save or network; may be given without the flag's name", "NAME")
    output_dir: str = flag("runs/benchmark", "folder on the disk to measure; emptied at the end", "FOLDER")
    hidden_size: int = flag(0, "width of the model instead of its own; 0: its own", "SIZE", at_least=0)
    num_layers: int = flag(0, "layers of the model instead of its own; 0: its own", "COUNT", at_least=0)
    plot: str = flag("", "also write a plot: .svg or .png (network)", "FILE")


@dataclass(kw_only=True)
class SaveConfig:
    """How often saves are measured."""

    _argument_group_name = "save"

    rounds: int = flag(5, "how many times to take each figure", "COUNT", at_least=1)
    steps: int = flag(12, "training steps per round; the save follows the second one", "STEPS", at_least=3)


@dataclass(kw_only=True)
class NetworkConfig:
    """Which links are measured."""

    _argument_group_name = "network"

    rates: str = flag("5,20,100,1000", "of the links, with commas", "MBIT/S")
    modes: str = flag(";".join(MODES), "how the machines train, with semicolons", "NAMES")
    dataset_path: str = flag("data/sample_corpus.txt", "training data", "PATH")


@dataclass(kw_only=True)
class BenchmarkConfig(RangeChecked, NetworkConfig, SaveConfig, MeasureConfig, ModelNameConfig):
    """Every flag of this script."""

    def find_mistakes(self) -> list[str]:
        """Returns a line for each value that is not possible."""
        mistakes = super().find_mistakes()
        if not all(rate.isdigit() and int(rate) for rate in self.rates.split(",")):
            mistakes.append(f"--rates {self.rates}: expected whole numbers with commas, as in 20,100")
        unknown = [mode for mode in self.modes.split(";") if mode not in MODES]
        if unknown:
            mistakes.append(f"--modes {unknown[0]!r}: expected one of {'; '.join(MODES)}")
        return mistakes


def main(config: BenchmarkConfig) -> dict:
    """Prints the figures as JSON, and returns them."""
    results = {"save": save, "network": network}[config.what](config)
    print(json.dumps(results, indent=2))
    return results


def save(config: BenchmarkConfig) -> dict:
    """Measures checkpoints."""
    model_config = sized_config(config.model_name, config.hidden_size, config.num_layers, config.trust_remote_code)
    folder = Path(config.output_dir).expanduser() / "checkpoints"
    return measure_saves(model_config, folder, config.rounds, config.steps)


def network(config: BenchmarkConfig) -> dict:
    """Measures two machines over links of several rates."""
    model_config = sized_config(config.model_name, config.hidden_size, config.num_layers, config.trust_remote_code)
    model = Path(config.output_dir).expanduser().absolute() / "model"
    num_parameters = write_model(model_config, config.model_name, model)
    rates = [int(rate) for rate in config.rates.split(",")]
    figures = measure_links(model, config.dataset_path, rates, config.modes.split(";"))
    if config.plot:
        title = f"{num_parameters / 1e6:.0f} M parameters, two machines of one core each"
        plot_links(figures, title, Path(config.plot).expanduser())
    return {"parameters": num_parameters, "figures": [asdict(each) for each in figures]}


if __name__ == "__main__":
    with report_errors("benchmark.py"):
        main(parse_config(BenchmarkConfig, sys.argv[1:], description=__doc__, positional="what"))
