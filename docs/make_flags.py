"""Writes docs/flags.md from the dataclasses that define the flags: `make docs`."""

import dataclasses
from pathlib import Path

from forge_lib.config import TrainConfig, flag_name
from forge_lib.flags import groups_of
from forge_lib.launch.config import ForgeConfig
from forge_lib.peers_config import ElasticConfig
from scripts.benchmark import BenchmarkConfig
from scripts.check_cluster import CheckConfig
from scripts.evaluate import EvaluateConfig
from scripts.generate import GenerateConfig
from scripts.make_configs import MakeConfig
from scripts.prepare_data import PrepareConfig

PAGE = Path(__file__).with_name("flags.md")
INTRODUCTION = """# Flags

This page is generated from the code by `make docs`. `--help` prints the same lines.

`--model-name` and `--model_name` are the same flag. `--config run.yaml` reads defaults from a YAML file, and flags
override them; an unknown flag or key is an error that names the closest known one. A flag without a value, such as
`--compile`, is off unless given; `--no-checkpoint-async` turns off a flag that is on. For every `-every` flag, 0 means
never. All numbers are global: `--batch-size` counts the sequences of one optimizer step over all processes.

```yaml
model_name: gpt2
dataset_path: corpus/
learning_rate: 1e-4
mask_documents: true
```
"""
PROGRAMS = {
    "scripts/train.py": TrainConfig,
    "scripts/train_elastic.py": ElasticConfig,
    "p2p-llm-forge": ForgeConfig,
    "scripts/prepare_data.py": PrepareConfig,
    "scripts/evaluate.py": EvaluateConfig,
    "scripts/generate.py": GenerateConfig,
    "scripts/make_configs.py": MakeConfig,
    "scripts/check_cluster.py": CheckConfig,
    "scripts/benchmark.py": BenchmarkConfig,
}


def make_page() -> str:
    """Returns the text of docs/flags.md."""
    lines = [INTRODUCTION]
    described: dict[type, str] = {}  # group of flags: the program that it was described for
    for program, config_class in PROGRAMS.items():
        groups = groups_of(config_class)
        known = [group for group in groups if group in described]
        lines += [f"## {program}", ""]
        if known:
            names = ", ".join(f"*{group._argument_group_name}*" for group in known)
            lines += [f"The flags of {described[known[0]]} in the groups {names}, and:", ""]
        for group in groups:
            if group not in described:
                described[group] = program
                lines += [*make_table(group), ""]
    return "\n".join(lines).rstrip() + "\n"


def make_table(group: type) -> list[str]:
    """Returns a Markdown table with one row per flag of a group."""
    lines = [f"| {group._argument_group_name} | default | |", "| --- | --- | --- |"]
    for field in dataclasses.fields(group):
        unit = field.metadata.get("metavar", "")
        help = field.metadata["help"].replace("|", r"\|")
        lines.append(f"| `{' '.join([flag_name(field.name), unit]).strip()}` | {describe_default(field)} | {help} |")
    return lines


def describe_default(field: dataclasses.Field) -> str:
    """Returns the default of a flag as the page shows it."""
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else "none"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return str(field.default) if field.default != "" else "none"


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
