r"""Measures what checkpoints cost, in time and memory, on this machine's processor and disk.

    python scripts/benchmark.py --model-name data/tiny_gpt2 --hidden-size 768 --num-layers 6

It trains a model on random tokens, without saves, with saves in the background and with saves in the foreground, in
turn; and compares saving and resuming with one plain copy of the same bytes. Other programs disturb it.
"""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from forge_lib import disk
from forge_lib.checkpoints import format as checkpoint
from forge_lib.checkpoints.saver import Saver
from forge_lib.config import ModelNameConfig, TrainConfig, flag
from forge_lib.distributed.peers import report_errors
from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from forge_lib.models import model as models

WARM_LOOPS = 6  # until the most memory that training alone takes has been taken


@dataclass(kw_only=True)
class CostConfig:
    """What is measured, and how often."""

    _argument_group_name = "benchmark"

    output_dir: str = flag("runs/benchmark", "folder on the disk that is measured; emptied at the end", "FOLDER")
    hidden_size: int = flag(0, "width of the model in place of its own; 0 for its own", "SIZE")
    num_layers: int = flag(0, "layers of the model in place of its own; 0 for its own", "COUNT")
    rounds: int = flag(5, "how often each figure is taken", "COUNT")
    steps: int = flag(12, "training steps of a round; it saves after the second one", "STEPS")


@dataclass(kw_only=True)
class BenchmarkConfig(CostConfig, ModelNameConfig):
    """Everything that this script reads."""

    def __post_init__(self):
        if self.rounds < 1 or self.steps < 3:
            raise UserError(f"expected --rounds from 1 and --steps from 3; found {self.rounds} and {self.steps}")


def main(config: BenchmarkConfig) -> dict[str, float]:
    """Prints the figures as JSON, and returns them."""
    folder = Path(config.output_dir).expanduser() / "checkpoints"
    model, optimizers, ids = make_model(config)
    for _ in range(WARM_LOOPS):
        train(model, optimizers, ids, config.steps)
    tensors = [*model.parameters(), *(t for o in optimizers for s in o.state.values() for t in s.values())]
    num_bytes = sum(t.nbytes for t in tensors)

    savers = {
        "none": None,
        "background": Saver(folder, keep=1),
        "foreground": Saver(folder, keep=1, background=False),
    }
    before = peak_memory_bytes()
    train(model, optimizers, ids, config.steps, savers["background"])
    savers["background"].wait()
    memory = peak_memory_bytes() - before
    loops: dict[str, list[float]] = {kind: [] for kind in savers}
    for _ in range(config.rounds):
        for kind, saver in savers.items():
            loops[kind].append(train(model, optimizers, ids, config.steps, saver))
            if saver:
                saver.wait()

    path = checkpoint.find(folder, "auto", {}).path
    copy = take(config.rounds, lambda: plain_copy(path, folder.with_name("copy")))
    save = take(config.rounds, lambda: savers["foreground"].save(1, model, optimizers, {"run": {}}))
    resume = take(config.rounds, lambda: checkpoint.load(checkpoint.find(folder, "auto", {}).path, model, optimizers))
    shutil.rmtree(folder)
    background, foreground = (
        statistics.median(saving - plain for saving, plain in zip(loops[kind], loops["none"], strict=True))
        for kind in ("background", "foreground")
    )
    results = {
        "checkpoint_bytes": num_bytes,
        "loop_seconds": statistics.median(loops["none"]),
        "loop_cost_of_a_background_save_seconds": background,
        "loop_cost_of_a_foreground_save_seconds": foreground,
        "background_over_foreground": background / foreground,
        "peak_memory_of_a_background_save_bytes": memory,
        "plain_copy_seconds": copy,
        "save_seconds": save,
        "resume_seconds": resume,
        "save_over_copy": save / copy,
        "resume_over_copy": resume / copy,
    }
    print(json.dumps(results, indent=2))
    return results


def make_model(config: BenchmarkConfig) -> tuple[torch.nn.Module, list[torch.optim.Optimizer], torch.Tensor]:
    """Returns a model with random weights, its optimizers, and a batch of random tokens."""
    model_config = AutoConfig.from_pretrained(config.model_name, trust_remote_code=config.trust_remote_code)
    sizes = {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers}
    for name, size in sizes.items():
        if size:
            setattr(model_config, name, size)
    model = AutoModelForCausalLM.from_config(model_config)
    optimizers = models.build_optimizers(model, TrainConfig(model_name="-", dataset_path="-", output_dir="-"))
    return model, optimizers, torch.randint(0, model_config.vocab_size, (4, 128))


def train(model, optimizers, ids: torch.Tensor, steps: int, saver: Saver | None = None) -> float:
    """Trains so many steps, saves after the second one, and returns the seconds that it took."""
    start = time.perf_counter()
    for step in range(steps):
        models.next_token_loss(model(ids, use_cache=False).logits, ids).backward()
        if saver:
            saver.wait_for_copy()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if saver and step == 1:
            saver.save(1, model, optimizers, {"run": {}})
    return time.perf_counter() - start


def peak_memory_bytes() -> int:
    """Returns the most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def plain_copy(source: Path, target: Path) -> None:
    """Copies a folder with `cp`, and waits until it is on the disk."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in (*target.iterdir(), target):
        disk.flush(path)


def take(rounds: int, call: Callable[[], object]) -> float:
    """Returns the median of the seconds that a call takes."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    with report_errors("benchmark.py"):
        main(parse_config(BenchmarkConfig, sys.argv[1:], description=__doc__))
