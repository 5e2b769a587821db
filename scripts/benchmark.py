r"""Measures what checkpoints cost, in time and memory, with this machine's processor and disk.

    python scripts/benchmark.py --model-name data/tiny_gpt2 --hidden-size 768 --num-layers 6

It trains a model on random tokens, in turn without saves, with background saves and with foreground saves. It also
compares saving and resuming with one plain copy of the same bytes. Other programs disturb the figures.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from forge_lib import disk
from forge_lib.checkpoints.restore import find, load
from forge_lib.checkpoints.saver import Saver
from forge_lib.config import ModelNameConfig, RangeChecked, TrainConfig, flag
from forge_lib.distributed.reporting import report_errors
from forge_lib.flags import parse_config
from forge_lib.models.loss import loss_sum
from forge_lib.models.optimizers import build_optimizers
from forge_lib.training.throughput import peak_memory_bytes

WARM_LOOPS = 6  # training loops until its peak memory no longer rises
CPU = torch.device("cpu")


@dataclass(kw_only=True)
class CostConfig:
    """What is measured, and how often."""

    _argument_group_name = "benchmark"

    output_dir: str = flag("runs/benchmark", "folder on the disk to measure; emptied at the end", "FOLDER")
    hidden_size: int = flag(0, "width of the model instead of its own; 0: its own", "SIZE", at_least=0)
    num_layers: int = flag(0, "layers of the model instead of its own; 0: its own", "COUNT", at_least=0)
    rounds: int = flag(5, "how many times to take each figure", "COUNT", at_least=1)
    steps: int = flag(12, "training steps per round; the save follows the second one", "STEPS", at_least=3)


@dataclass(kw_only=True)
class BenchmarkConfig(RangeChecked, CostConfig, ModelNameConfig):
    """Every flag of this script."""


def main(config: BenchmarkConfig) -> dict[str, float]:
    """Prints the figures as JSON, and returns them."""
    folder = Path(config.output_dir).expanduser() / "checkpoints"
    model, optimizers, batch = make_model(config)
    for _ in range(WARM_LOOPS):
        train(model, optimizers, batch, config.steps)
    tensors = [*model.parameters(), *(t for o in optimizers for s in o.state.values() for t in s.values())]

    background, foreground = Saver(folder, keep=1), Saver(folder, keep=1, background=False)
    background.attach(optimizers)
    before = peak_memory_bytes(CPU)
    train(model, optimizers, batch, config.steps, background)
    background.wait()
    memory = peak_memory_bytes(CPU) - before
    savers = {"none": None, "background": background, "foreground": foreground}
    loops: dict[str, list[float]] = {kind: [] for kind in savers}
    for _ in range(config.rounds):
        for kind, saver in savers.items():
            loops[kind].append(train(model, optimizers, batch, config.steps, saver))
            if saver:
                saver.wait()

    path = find(folder, "auto", {}).path
    copy = median_seconds(config.rounds, lambda: plain_copy(path, folder.with_name("copy")))
    save = median_seconds(config.rounds, lambda: foreground.save(1, model, optimizers, {"run": {}}))
    resume = median_seconds(config.rounds, lambda: load(find(folder, "auto", {}).path, model, optimizers))
    shutil.rmtree(folder)
    costs = {
        kind: statistics.median(saving - plain for saving, plain in zip(loops[kind], loops["none"], strict=True))
        for kind in ("background", "foreground")
    }
    results = {
        "checkpoint_bytes": sum(t.nbytes for t in tensors),
        "loop_seconds": statistics.median(loops["none"]),
        "loop_cost_of_a_background_save_seconds": costs["background"],
        "loop_cost_of_a_foreground_save_seconds": costs["foreground"],
        "background_over_foreground": costs["background"] / costs["foreground"],
        "peak_memory_of_a_background_save_bytes": memory,
        "plain_copy_seconds": copy,
        "save_seconds": save,
        "resume_seconds": resume,
        "save_over_copy": save / copy,
        "resume_over_copy": resume / copy,
    }
    print(json.dumps(results, indent=2))
    return results


def make_model(
    config: BenchmarkConfig,
) -> tuple[torch.nn.Module, list[torch.optim.Optimizer], dict[str, torch.Tensor]]:
    """Returns a model with random weights, its optimizers, and a batch of random tokens, [4, 128] int64."""
    model_config = transformers.AutoConfig.from_pretrained(
        config.model_name, trust_remote_code=config.trust_remote_code
    )
    sizes = {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers}
    for name, size in sizes.items():
        if size:
            setattr(model_config, name, size)
    model = transformers.AutoModelForCausalLM.from_config(model_config)
    optimizers = build_optimizers(model, TrainConfig(model_name="-", dataset_path="-", output_dir="-"))
    ids = torch.randint(0, model_config.vocab_size, (4, 128))
    return model, optimizers, {"input_ids": ids, "labels": ids}


def train(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batch: dict[str, torch.Tensor],
    steps: int,
    saver: Saver | None = None,
) -> float:
    """Trains `steps` steps, saves after the second one, and returns the seconds that this took."""
    start = time.perf_counter()
    for step in range(steps):
        loss_sum(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if saver and step == 1:
            saver.save(1, model, optimizers, {"run": {}})
    return time.perf_counter() - start


def plain_copy(source: Path, target: Path) -> None:
    """Copies a folder with `cp`, and flushes it to the disk."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in (*target.iterdir(), target):
        disk.flush(path)


def median_seconds(rounds: int, call: Callable[[], object]) -> float:
    """Returns the median duration of a call, in seconds."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    with report_errors("benchmark.py"):
        main(parse_config(BenchmarkConfig, sys.argv[1:], description=__doc__))
