"""Small checkpoints for tests, and functions that run in a forked process."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from forge_lib.checkpoints import restore
from forge_lib.checkpoints.saver import Saver
from forge_lib.config import TrainConfig
from forge_lib.models.optimizers import build_optimizers

RUN = {"data": "x", "batch_size": 8}
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def untrained_model(optimizer: str = "adamw") -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    config = TrainConfig(model_name="m", dataset_path="d", output_dir="o", optimizer=optimizer)
    return model, build_optimizers(model, config)


def trained_model(optimizer: str = "adamw") -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    """Returns a small network after two steps."""
    torch.manual_seed(0)
    model, optimizers = untrained_model(optimizer)
    for _ in range(2):
        step(model, optimizers)
    return model, optimizers


def step(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    model(torch.ones(3, 4)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def write(folder: Path, *steps: int, keep: int = 9, keep_best: bool = False, losses: dict | None = None) -> None:
    """Saves a checkpoint at each of these steps, with different weights."""
    saver = Saver(folder, keep, keep_best, background=False)
    model, optimizers = trained_model()
    for number in steps:
        step(model, optimizers)
        saver.save(number, model, optimizers, {"run": RUN, "eval_loss": (losses or {}).get(number)})
    assert not any(outcome.error for outcome in saver.outcomes())


def find(folder: Path, how: str = "auto") -> restore.Found:
    return restore.find(folder, how, RUN)


def load(folder: Path, optimizer: str = "adamw") -> tuple[dict, torch.nn.Module, list[torch.optim.Optimizer]]:
    """Returns state, model and optimizers of the newest checkpoint."""
    model, optimizers = untrained_model(optimizer)
    return restore.load(find(folder).path, model, optimizers), model, optimizers


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def number(step: int) -> str:
    return f"step-{step:08d}"


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Returns the content of all files in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fork(function: Callable[[], None]) -> int:
    """Runs a function in a forked process; returns its pid. It must not train: autograd hangs in a fork."""
    if process := os.fork():
        return process
    try:
        torch.set_num_threads(1)
        function()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def run_forked(function: Callable[[], None]) -> None:
    """Runs a function in a forked process, which has its own limits and mounts; fails if the function fails."""
    assert os.waitpid(fork(function), 0)[1] == 0
