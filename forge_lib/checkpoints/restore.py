"""Finds the checkpoint from which a run continues, copies it into the run's folder, and loads it."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from forge_lib import disk
from forge_lib.checkpoints.format import (
    FILES,
    TENSOR_FILES,
    create_temporary,
    describe_error,
    list_steps,
    manifest_sha256,
    step_path,
    trainable,
)
from forge_lib.checkpoints.verify import DAMAGE, brief, check_tensors, read_json, read_manifest_and_state
from forge_lib.errors import UserError


class CheckpointedOptimizer(torch.optim.Optimizer):
    """An optimizer of this project, which knows the shapes of its tensors; a base class."""

    def state_shapes(self, shape: tuple) -> dict[str, tuple]:
        """Returns the shapes of the optimizer's tensors for a parameter of this shape, by key."""
        raise NotImplementedError


@dataclass(frozen=True)
class Found:
    """The checkpoint from which to continue, if there is one, and why others cannot be used."""

    path: Path | None = None
    step: int = 0
    sha256: str = ""  # of the manifest, and thereby of all files: equal on two machines if the checkpoints are equal
    skipped: list[str] = field(default_factory=list)  # one line for each damaged checkpoint
    foreign: list[str] = field(default_factory=list)  # one line for each checkpoint of another run


def find(folder: Path, resume: str, run: dict) -> Found:
    """Finds the checkpoint from which to continue: the newest on this machine that is undamaged and of this run.

    Args:
        folder: the run's `checkpoints` folder.
        resume: "auto" for the newest in it, "never", or a checkpoint's path, which need not exist on this machine.
        run: the values that must be equal in all parts of a run; compared with the saved `state["run"]`.

    Raises:
        UserError: "never", but the folder has checkpoints; or the checkpoint at the path is damaged or of another run.
    """
    if resume == "never":
        if existing := max(folder.glob("step-*"), default=None):
            raise UserError(
                f"--resume never, but {folder} has {existing.name}; name another --output-dir, or remove that folder"
            )
        return Found()
    if resume == "auto":
        skipped, foreign = [], []
        for _, path in list_steps(folder):
            found = _examine(path, run)
            if found.path:
                return Found(found.path, found.step, found.sha256, skipped, foreign)
            skipped += [f"checkpoint {path.name} is skipped: {problem}" for problem in found.skipped]
            foreign += [f"checkpoint {path.name} belongs to another run: {lines}" for lines in found.foreign]
        return Found(skipped=skipped, foreign=foreign)
    path = Path(resume).expanduser()
    if not path.exists():
        return Found()
    found = _examine(path.resolve(), run)
    for problem in found.skipped:
        raise UserError(f"--resume {resume}: {problem}. Name another checkpoint, or use --resume auto")
    for lines in found.foreign:
        raise UserError(f"{resume} belongs to another run: {lines}. Keep the old values, or name another --output-dir")
    return found


def adopt(path: Path, folder: Path, step: int) -> None:
    """Copies a checkpoint from another place into the run's folder; does nothing if it is already there."""
    target = step_path(folder, step)
    if path.resolve() == target.resolve():
        return
    temporary = create_temporary(target)
    for name in (*FILES, "manifest.json"):
        shutil.copyfile(path / name, temporary / name)
        disk.flush(temporary / name)
    disk.place(target)


def set_aside(folder: Path, newer_than: int) -> list[str]:
    """Renames complete checkpoints newer than a step, so that no run finds them again; returns their new names."""
    names = []
    for step, path in reversed(list_steps(folder)):
        if step > newer_than and (path / "manifest.json").exists():
            aside, number = folder / f"aside-{path.name}", 1
            while os.path.lexists(aside):
                number += 1
                aside = folder / f"aside-{path.name}-{number}"
            path.rename(aside)
            names.append(aside.name)
    if names:
        disk.flush(folder)
    return names


def differences(saved: dict, now: dict) -> list[str]:
    """Returns one line for each value of `now` that differs in `saved`, with both values."""
    return [
        f"{name} was {brief(saved.get(name))} and is now {brief(value)}"
        for name, value in now.items()
        if saved.get(name) != value
    ]


def load(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict:
    """Loads a checkpoint into model and optimizers, in place, and returns its state; call before `prepare`.

    The optimizers' settings (weight decay, ...) stay those of the current flags. Their tensors are moved to the
    devices of their parameters.

    Args:
        path: a checkpoint that `find` has verified.
        model: unwrapped, on any device.
        optimizers: as they were saved.

    Raises:
        UserError: names or shapes differ from those of model and optimizers, a file cannot be read, or the run is one
            of train_elastic.py, and this script is not.
    """
    try:
        weights, values = (load_file(path / name) for name in TENSOR_FILES)  # memory maps: each tensor is copied once
        state = read_json(path / "state.json")
    except DAMAGE as error:
        raise UserError(f"{path} cannot be loaded: {describe_error(error)}") from None
    if "elastic" in state and not any(isinstance(each, CheckpointedOptimizer) for each in optimizers):
        raise UserError(
            f"{path} is of a run of train_elastic.py: continue it with that script, or name another --output-dir (and "
            "the final model with --model-name)"
        )
    parameters = trainable(model)
    _check_shapes(path / "model.safetensors", weights, {name: tuple(p.shape) for name, p in parameters.items()})
    _check_shapes(path / "optimizer.safetensors", values, _expected_shapes(optimizers, values))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    load_states(values, optimizers)
    return state


def load_states(tensors: dict[str, torch.Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
    """Loads the tensors of `optimizer_tensors` into optimizers; their settings stay."""
    states: list[dict] = [{} for _ in optimizers]
    for name, tensor in tensors.items():
        optimizer, parameter, key = name.split("/")
        states[int(optimizer)].setdefault(int(parameter), {})[key] = tensor.clone()  # no longer in a memory map
    for optimizer, values in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})


def _expected_shapes(optimizers: list[torch.optim.Optimizer], values: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """Returns the shapes that optimizer.safetensors must have, by tensor name.

    A parameter that never had a gradient has no state: only parameters that occur in `values` are expected.
    """
    present = {name.rpartition("/")[0] for name in values}
    return {
        f"{number}/{index}/{key}": shape
        for number, optimizer in enumerate(optimizers)
        for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
        if f"{number}/{index}" in present
        for key, shape in state_shapes(optimizer, tuple(p.shape)).items()
    }


def state_shapes(optimizer: torch.optim.Optimizer, shape: tuple) -> dict[str, tuple]:
    """Returns the shapes of an optimizer's tensors for a parameter of this shape, by key."""
    if isinstance(optimizer, CheckpointedOptimizer):
        return optimizer.state_shapes(shape)
    if isinstance(optimizer, torch.optim.Muon):
        return {"momentum_buffer": shape}
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    assert isinstance(optimizer, torch.optim.Adafactor), f"unknown state of {type(optimizer).__name__}: add it here"
    if len(shape) < 2:
        return {"step": (), "variance": shape}
    return {"step": (), "row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


def _check_shapes(path: Path, tensors: dict[str, torch.Tensor], shapes: dict[str, tuple]) -> None:
    """Checks that a file has exactly the tensors of `shapes`; raises UserError for the first one that differs."""
    found = {name: f"shape {tuple(tensor.shape)}" for name, tensor in tensors.items()}
    expected = {name: f"shape {shape}" for name, shape in shapes.items()}
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{path} does not fit the model: for {brief(name)}, found {found.get(name, 'no tensor')}, expected "
                f"{expected.get(name, 'none')}. Keep the --model-name, --optimizer and --lora-rank of the run"
            )


def _examine(path: Path, run: dict) -> Found:
    """Returns the checkpoint, or a reason to refuse it as the only line of `skipped` or `foreign`."""
    try:
        manifest, state = read_manifest_and_state(path)
        if manifest["format_version"] == 1:  # it contains fewer values of its run
            run = {name: value for name, value in run.items() if name in state["run"]}
        if different := differences(state["run"], run):
            return Found(foreign=["; ".join(different)])
        check_tensors(path, manifest)
    except DAMAGE as error:
        return Found(skipped=[describe_error(error)])
    return Found(path, state["step"], manifest_sha256(manifest))
