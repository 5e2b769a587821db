"""Small checkpoints for tests."""

from pathlib import Path

import torch

from forge_lib.checkpoints import format as checkpoint
from forge_lib.checkpoints.saver import Saver
from forge_lib.config import TrainConfig
from forge_lib.models.model import build_optimizers

RUN = {"data": "x", "batch_size": 8}
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def untrained_model(optimizer: str = "adamw") -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    config = TrainConfig(model_name="m", dataset_path="d", output_dir="o", optimizer=optimizer)
    return model, build_optimizers(model, config)


def trained_model(optimizer: str = "adamw") -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    """A small network after two steps."""
    torch.manual_seed(0)
    model, optimizers = untrained_model(optimizer)
    for _ in range(2):
        step(model, optimizers)
    return model, optimizers


def step(model, optimizers) -> None:
    model(torch.ones(3, 4)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def write(folder: Path, *steps: int, keep: int = 9, keep_best: bool = False, losses: dict | None = None) -> None:
    """Saves at each of these steps; the model is another each time."""
    saver = Saver(folder, keep, keep_best, background=False)
    model, optimizers = trained_model()
    for number in steps:
        step(model, optimizers)
        saver.save(number, model, optimizers, {"run": RUN, "eval_loss": (losses or {}).get(number)})
    assert not any(outcome.error for outcome in saver.outcomes())


def find(folder: Path, resume: str = "auto") -> checkpoint.Found:
    return checkpoint.find(folder, resume, RUN)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def number(step: int) -> str:
    return f"step-{step:08d}"
