"""Checkpoints: tensors as safetensors, the rest as JSON, complete or not there at all.

    checkpoints/step-00000100/
        model.safetensors       the trainable weights
        optimizer.safetensors   the optimizers' tensors
        state.json              step, configuration, what the run is
        manifest.json           size and sha256 of the files above

The main process saves. At resume it sends what it has read to the others, which need no copy of their own.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn

from forge_lib.config import UserError

FORMAT_VERSION = 1


def save(
    folder: Path, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict, keep: int
) -> Path:
    """Writes a checkpoint below `folder`, then deletes all but the newest `keep`. Call on the main process.

    It is written under a temporary name, flushed to the disk, and renamed: no reader ever sees half of one.

    Args:
        folder: the run's `checkpoints` folder.
        step: optimizer steps done.
        model: unwrapped; parameters that are not trained are left out.
        optimizers: their states, in this order.
        state: what else to keep, of JSON types.
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's folder.
    """
    path = folder / f"step-{step:08d}"
    partial = folder / f".partial-step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover)
    partial.mkdir()
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(weights, partial / "model.safetensors")
    save_file(_flatten([optimizer.state_dict() for optimizer in optimizers]), partial / "optimizer.safetensors")
    _write_json(partial / "state.json", {"step": step, **state})
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(partial.iterdir())}
    _write_json(partial / "manifest.json", {"format_version": FORMAT_VERSION, "files": files})
    for file in (*partial.iterdir(), partial):
        _flush(file)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    _flush(folder)
    for old in sorted(each for each in folder.glob("step-*") if each.name <= path.name)[:-keep]:
        shutil.rmtree(old)  # what is newer than this one was passed over at resume, and is overwritten in its turn
    return path


def find(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    """Returns the checkpoint to go on from, if any, and a line for each damaged one that was passed over.

    Args:
        folder: the run's `checkpoints` folder.
        resume: "auto" for its newest complete checkpoint, "never", or the path of one.

    Raises:
        UserError: "never", but the folder holds checkpoints; or the path is no complete checkpoint.
    """
    if resume not in ("auto", "never"):
        if problem := _problem(Path(resume)):
            raise UserError(f"--resume {resume}: {problem}")
        return Path(resume), []
    found = sorted(folder.glob("step-*"), reverse=True)
    if resume == "never":
        if found:
            raise UserError(
                f"--resume never, but {folder} holds {found[0].name}; name another --output-dir, or remove that folder"
            )
        return None, []
    passed_over = []
    for path in found:
        problem = _problem(path)
        if not problem:
            return path, passed_over
        passed_over.append(f"checkpoint {path.name} is passed over: {problem}")
    return None, passed_over


def check_run(path: Path, run: dict, num_steps: int) -> None:
    """Compares the run that a checkpoint belongs to with the one that is to go on.

    Args:
        path: a complete checkpoint.
        run: what must not change between the two: `state["run"]` as it was saved.
        num_steps: how long the run shall be.

    Raises:
        UserError: naming each value that differs; or the checkpoint lies behind the end of the run.
    """
    state = _read_state(path)
    if state["step"] > num_steps:
        raise UserError(
            f"{path} is at step {state['step']}, but the run shall end at step {num_steps}; raise --max-steps or "
            "--epochs, or name another --output-dir"
        )
    saved = state["run"]
    differ = [
        f"{name} was {saved.get(name)!r} and is now {value!r}"
        for name, value in run.items()
        if saved.get(name) != value
    ]
    if differ:
        raise UserError(
            f"{path} belongs to another run: {'; '.join(differ)}. Keep the old values, or name another --output-dir"
        )


def _read_state(path: Path) -> dict:
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def load(
    path: Path | None, accelerator: Accelerator, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict | None:
    """Puts a checkpoint into model and optimizers on all processes, in place; call on all, before `prepare`.

    Args:
        path: the checkpoint, as the main process sees it; other processes' value does not matter.
        accelerator: sends from the main process to the others.
        model: unwrapped, on any device.
        optimizers: as they were saved.

    Returns:
        The state that was saved with it, the same on all processes; None where the main process has no checkpoint.
    """
    tensors, header = {}, [None]
    if accelerator.is_main_process and path:
        state = _read_state(path)
        for file in ("model", "optimizer"):
            tensors |= {f"{file}/{name}": t for name, t in load_file(path / f"{file}.safetensors").items()}
        header = [(state, [(name, t.shape, t.dtype) for name, t in tensors.items()])]
    if accelerator.num_processes > 1:
        broadcast_object_list(header)
    if header[0] is None:
        return None
    state, shapes = header[0]
    if accelerator.num_processes > 1:
        for name, shape, dtype in shapes:
            tensor = tensors[name] if accelerator.is_main_process else torch.empty(shape, dtype=dtype)
            tensors[name] = broadcast(tensor.to(accelerator.device)).cpu()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[f"model/{name}"])
    prefix = "optimizer/"
    saved = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    for optimizer, values in zip(optimizers, _unflatten(saved, len(optimizers)), strict=True):
        # The settings (weight decay, …) are those of the flags now, not those of the checkpoint.
        optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def _flatten(state_dicts: list[dict]) -> dict[str, torch.Tensor]:
    """Returns the tensors of optimizer states by name: `optimizer/parameter/key`."""
    return {
        f"{number}/{parameter}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, state_dict in enumerate(state_dicts)
        for parameter, values in state_dict["state"].items()
        for key, value in values.items()
    }


def _unflatten(tensors: dict[str, torch.Tensor], num_optimizers: int) -> list[dict]:
    states: list[dict] = [{} for _ in range(num_optimizers)]
    for name, tensor in tensors.items():
        number, parameter, key = name.split("/")
        states[int(number)].setdefault(int(parameter), {})[key] = tensor
    return states


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is complete and undamaged."""
    if not (path / "manifest.json").is_file():
        return "no complete checkpoint (it has no manifest.json)"
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format_version"] > FORMAT_VERSION:
            return f"its format {manifest['format_version']} is newer than this program's {FORMAT_VERSION}"
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            facts = manifest["files"][name]
            if (path / name).stat().st_size != facts["bytes"] or _sha256(path / name) != facts["sha256"]:
                return f"{name} is not the file that was saved"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"damaged: {error!r}"
    return None


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
