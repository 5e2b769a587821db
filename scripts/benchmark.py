r"""Measures this program on this machine, beside the alternatives.

    python scripts/benchmark.py step --model-name data/tiny_gpt2
    python scripts/benchmark.py save --model-name data/tiny_gpt2 --hidden-size 768 --num-layers 6
    sudo .venv/bin/python scripts/benchmark.py network --model-name data/tiny_gpt2 --hidden-size 512 --num-layers 8

`prepare`: text to tokens, beside the tokenizer alone and datasets.map. `step`: tokens/s and memory beside
transformers.Trainer, on the CPU and on a GPU if there is one, and the share of the speed of the matrix products.
`memory`: speed and memory over the vocabulary, the sequence length and the width. `start`: seconds until the first
step. `save`: what checkpoints cost, beside one plain copy of the same bytes. `network`: two machines, which are
network namespaces of this machine with one core each, over links of several rates. `all`: all of them, some hours.

Everything is measured in turn with its baseline. Other programs disturb the figures. Tables, JSON and plots are
written to --report-dir.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from forge_lib.benchmark.model import sized_config, write_model
from forge_lib.benchmark.network import MODES, check_rights, measure_links
from forge_lib.benchmark.prepare import measure_preparing
from forge_lib.benchmark.report import Report, import_pyplot, write_report
from forge_lib.benchmark.save import measure_saves
from forge_lib.benchmark.start import measure_starts
from forge_lib.benchmark.step import Setting
from forge_lib.benchmark.step_reports import (
    measure_gpu_steps,
    measure_growth,
    measure_limit,
    measure_masking,
    measure_steps,
)
from forge_lib.config import ModelNameConfig, RangeChecked, flag
from forge_lib.distributed.reporting import report_errors
from forge_lib.flags import parse_config


@dataclass(kw_only=True)
class MeasureConfig:
    """What is measured, and with which model and text."""

    _argument_group_name = "benchmark"

    what: Literal["prepare", "step", "memory", "start", "save", "network", "all"] = flag(
        MISSING, "prepare, step, memory, start, save, network or all; may be given without the flag's name", "NAME"
    )
    dataset_path: str = flag("data/sample_corpus.txt", "text", "PATH")
    output_dir: str = flag("runs/benchmark", "folder for models and runs, on the disk to measure", "FOLDER")
    report_dir: str = flag("runs/benchmark/report", "folder for tables, JSON and plots", "FOLDER")
    rounds: int = flag(3, "how many times each figure is taken", "COUNT", at_least=1)


@dataclass(kw_only=True)
class ModelSizeConfig:
    """The model of save and network."""

    _argument_group_name = "save and network"

    hidden_size: int = flag(0, "width of the model; 0: its own, or 512 with `all`", "SIZE", at_least=0)
    num_layers: int = flag(0, "layers of the model; 0: its own, or 8 with `all`", "COUNT", at_least=0)
    steps: int = flag(12, "save: training steps per round; the save follows the second one", "STEPS", at_least=3)
    rates: str = flag("20,100,1000", "network: of the links, with commas", "MBIT/S")
    modes: str = flag(";".join(MODES), "network: how the machines train, with semicolons", "NAMES")


@dataclass(kw_only=True)
class BenchmarkConfig(RangeChecked, ModelSizeConfig, MeasureConfig, ModelNameConfig):
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


def main(config: BenchmarkConfig) -> None:
    """Measures, prints each table as soon as it is there, and writes the reports."""
    import_pyplot()  # reports now if it is missing
    names = [config.what]
    if config.what == "all":
        names = list(BENCHMARKS)
        config.hidden_size, config.num_layers = config.hidden_size or 512, config.num_layers or 8
    if "network" in names:
        check_rights()
    for name in names:
        for report in BENCHMARKS[name](config):
            write_report(report, Path(config.report_dir).expanduser())
            print(report.table(), flush=True)


def prepare(config: BenchmarkConfig) -> list[Report]:
    """Measures how text becomes a token store."""
    folder = work_folder(config) / "prepare"
    return measure_preparing(folder, config.model_name, config.dataset_path, config.rounds)


def step(config: BenchmarkConfig) -> Iterable[Report]:
    """Measures steps beside Trainer, beside their matrix products, and with masked documents."""
    setting = Setting(work_folder(config), config.model_name, config.dataset_path)
    for measure in (measure_steps, measure_gpu_steps, measure_limit, measure_masking):
        yield from measure(setting, config.rounds)


def memory(config: BenchmarkConfig) -> list[Report]:
    """Measures how speed and memory grow."""
    return measure_growth(Setting(work_folder(config), config.model_name, config.dataset_path), config.rounds)


def start(config: BenchmarkConfig) -> list[Report]:
    """Measures the time until the first step."""
    return measure_starts(Setting(work_folder(config), config.model_name, config.dataset_path), config.rounds)


def save(config: BenchmarkConfig) -> list[Report]:
    """Measures checkpoints."""
    model_config = sized_config(config.model_name, config.hidden_size, config.num_layers, config.trust_remote_code)
    return [measure_saves(model_config, work_folder(config) / "checkpoints", config.rounds, config.steps)]


def network(config: BenchmarkConfig) -> list[Report]:
    """Measures two machines over links of several rates."""
    model_config = sized_config(config.model_name, config.hidden_size, config.num_layers, config.trust_remote_code)
    model = work_folder(config) / "model"
    num_parameters = write_model(model_config, config.model_name, model)
    rates = [int(rate) for rate in config.rates.split(",")]
    return [measure_links(model, num_parameters, config.dataset_path, rates, config.modes.split(";"))]


def work_folder(config: BenchmarkConfig) -> Path:
    """Returns the folder for models and runs."""
    return Path(config.output_dir).expanduser().absolute()


BENCHMARKS: dict[str, Callable[[BenchmarkConfig], Iterable[Report]]] = {
    "prepare": prepare, "step": step, "memory": memory, "start": start, "save": save, "network": network,
}  # fmt: skip


if __name__ == "__main__":
    with report_errors("benchmark.py"):
        main(parse_config(BenchmarkConfig, sys.argv[1:], description=__doc__, positional="what"))
