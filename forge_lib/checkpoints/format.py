"""Checkpoints: tensors as safetensors, the rest as JSON, complete or not there at all.

    checkpoints/step-00000100/
        model.safetensors       the trainable weights
        optimizer.safetensors   the optimizers' tensors
        state.json              step, configuration, what the run is
        manifest.json           size and sha256 of the files above, and its own sha256

Each machine writes and reads its own. The content follows from tensors and state alone, so that the copies of one step
are the same, byte for byte. forge_lib/saver.py says when one is written.
"""

import hashlib
import json
import math
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from forge_lib import disk
from forge_lib.errors import UserError

FORMAT_VERSION = 2  # 1: without the manifest's own sha256
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
FILES = (*TENSOR_FILES, "state.json")
MAX_JSON_BYTES = 1 << 24
DAMAGE = (OSError, ValueError, RecursionError, SafetensorError)  # what reading a bad checkpoint may raise

Tensors = dict[str, dict[str, torch.Tensor]]  # by file, by name


def step_path(folder: Path, step: int) -> Path:
    """Returns where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """Returns (step, path) of the checkpoints in a folder, complete or not, newest first."""
    named = [(int(path.name[5:]), path) for path in folder.glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    return sorted(((step, path) for step, path in named if path == step_path(folder, step)), reverse=True)


def collect_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Tensors:
    """Returns the tensors that a checkpoint keeps, where they lie now.

    Args:
        model: unwrapped; parameters that are not trained are left out.
        optimizers: a tensor of their states is named `optimizer/parameter/key`.
    """
    states = {
        f"{number}/{parameter}/{key}": torch.as_tensor(value).detach()
        for number, optimizer in enumerate(optimizers)
        for parameter, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    weights = {name: p.detach() for name, p in _trainable(model).items()}
    return dict(zip(TENSOR_FILES, (weights, states), strict=True))


def write(folder: Path, step: int, tensors: Tensors, state: bytes, together: bool = True) -> Path:
    """Writes a checkpoint; returns its path.

    Args:
        folder: the run's `checkpoints` folder, made where there is none. No other process writes there.
        step: optimizer steps done.
        tensors: of `collect_tensors`, on the CPU and contiguous.
        state: the text of state.json, of `to_json`; it has `step` and `run`.
        together: whether the files are written at the same time, by a thread each, or in turn.

    Raises:
        OSError, SafetensorError: the disk is full, read-only or gone; the folder holds what it held, and leftovers.
    """
    path = step_path(folder, step)
    under_way = _begin(path)
    writes = [partial(_write_tensors, under_way / file, named) for file, named in tensors.items()]
    writes.append(partial(write_bytes, under_way / "state.json", state))
    hashes = _together(writes) if together else [write() for write in writes]
    files = {
        file: {"bytes": (under_way / file).stat().st_size, "sha256": sha256}
        for file, sha256 in zip((*tensors, "state.json"), hashes, strict=True)
    }
    manifest = {"format_version": FORMAT_VERSION, "files": files}
    write_bytes(under_way / "manifest.json", to_json({**manifest, "sha256": _seal(manifest)}))
    disk.place(path)
    return path


def _begin(path: Path) -> Path:
    """Returns the empty folder in which a checkpoint is written."""
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.flush(path.parent.parent)
    under_way = disk.partial_path(path)
    disk.remove(under_way)
    under_way.mkdir()
    return under_way


def to_json(content: dict) -> bytes:
    """Returns the text of a JSON file: equal contents give equal bytes."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, path)
    flushed = in_thread(partial(disk.flush, path))  # the disk works while the processor hashes
    sha256 = disk.sha256(path)
    flushed.result()
    return sha256


def write_bytes(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    disk.flush(path)
    return hashlib.sha256(data).hexdigest()


def in_thread(call: Callable[[], Any]) -> Future:
    """Calls in a thread that Python waits for at its end; an executor's would refuse work then."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future


def _together(calls: list[Callable[[], Any]]) -> list:
    """Makes the calls, in a thread each; returns what they return, or raises what the first one raises, at the end."""
    futures = [in_thread(call) for call in calls]
    wait(futures)
    return [future.result() for future in futures]


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from, if any, and a line for each that is not taken: damaged, or of another run."""

    path: Path | None = None
    step: int = 0
    sha256: str = ""  # of the manifest, and so of all: equal on two machines where the checkpoints are
    passed_over: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


def find(folder: Path, resume: str, run: dict) -> Found:
    """Finds the checkpoint to go on from: the newest here that is complete, undamaged and of this run.

    Args:
        folder: the run's `checkpoints` folder.
        resume: "auto" for its newest, "never", or the path of one; the path need not exist on this machine.
        run: what must not change between two parts of a run: `state["run"]` as it was saved.

    Raises:
        UserError: "never", but the folder holds checkpoints; the path's is damaged, or of another run.
    """
    if resume == "never":
        if held := max(folder.glob("step-*"), default=None):
            raise UserError(
                f"--resume never, but {folder} holds {held.name}; name another --output-dir, or remove that folder"
            )
        return Found()
    if resume == "auto":
        passed_over, foreign = [], []
        for _, path in list_steps(folder):
            found = _examine(path, run)
            if found.path:
                return Found(found.path, found.step, found.sha256, passed_over, foreign)
            passed_over += [f"checkpoint {path.name} is passed over: {problem}" for problem in found.passed_over]
            foreign += [f"checkpoint {path.name} belongs to another run: {lines}" for lines in found.foreign]
        return Found(passed_over=passed_over, foreign=foreign)
    if not os.path.exists(resume):
        return Found()
    found = _examine(Path(resume).resolve(), run)
    for problem in found.passed_over:
        raise UserError(f"--resume {resume}: {problem}")
    for lines in found.foreign:
        raise UserError(f"{resume} belongs to another run: {lines}. Keep the old values, or name another --output-dir")
    return found


def adopt(path: Path, folder: Path, step: int) -> Path:
    """Copies a checkpoint that lies elsewhere into the run's folder, complete or not at all; returns its new path."""
    target = step_path(folder, step)
    if path.resolve() == target.resolve():
        return target
    under_way = _begin(target)
    for name in (*FILES, "manifest.json"):
        shutil.copyfile(path / name, under_way / name)
        disk.flush(under_way / name)
    disk.place(target)
    return target


def set_aside(folder: Path, newer_than: int) -> list[str]:
    """Renames complete checkpoints newer than a step, so that they are not found again; returns their new names."""
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


def verify(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint, None where it is complete and each file is the one that was saved."""
    return next(iter(_examine(path, {}).passed_over), None)


def eval_loss(path: Path) -> float | None:
    """Returns the held-out loss at a checkpoint's step, None where there was no evaluation or it cannot be read."""
    try:
        loss = _read_json(path / "state.json").get("eval_loss")
    except DAMAGE:
        return None
    return loss if isinstance(loss, (int, float)) and math.isfinite(loss) else None


def differences(saved: dict, now: dict) -> list[str]:
    """Returns a line for each value of `now` that is another in `saved`, with both."""
    return [
        f"{name} was {_brief(saved.get(name))} and is now {_brief(value)}"
        for name, value in now.items()
        if saved.get(name) != value
    ]


def load(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict:
    """Puts a checkpoint that `find` has found into model and optimizers, in place; call before `prepare`.

    The optimizers' settings (weight decay, …) stay those of the flags now. Their tensors go to their parameters'
    devices.

    Args:
        path: the checkpoint.
        model: unwrapped, on any device.
        optimizers: as they were saved.

    Returns:
        The state that was saved with it.

    Raises:
        UserError: names or shapes are not those of model and optimizers, or it cannot be read.
    """
    try:
        weights, values = (load_file(path / name) for name in TENSOR_FILES)  # memory maps: each tensor is copied once
        state = _read_json(path / "state.json")
    except DAMAGE as error:
        raise UserError(f"{path} cannot be loaded: {describe(error)}") from None
    parameters = _trainable(model)
    _compare(path / "model.safetensors", weights, {name: tuple(p.shape) for name, p in parameters.items()})
    places = {
        f"{number}/{index}": (optimizer, p)
        for number, optimizer in enumerate(optimizers)
        for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }
    begun = {name.rpartition("/")[0] for name in values}  # a parameter that never had a gradient has no state
    shapes = {
        f"{place}/{key}": shape
        for place, (optimizer, p) in places.items()
        if place in begun
        for key, shape in _state_shapes(optimizer, tuple(p.shape)).items()
    }
    _compare(path / "optimizer.safetensors", values, shapes)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    states: list[dict] = [{} for _ in optimizers]
    for name, tensor in values.items():
        place, _, key = name.rpartition("/")
        number, index = map(int, place.split("/"))
        device = "cpu" if key == "step" else places[place][1].device
        states[number].setdefault(index, {})[key] = tensor.to(device, copy=True)
    for optimizer, values in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _state_shapes(optimizer: torch.optim.Optimizer, shape: tuple) -> dict[str, tuple]:
    """Returns the shapes of an optimizer's tensors for a parameter of this shape."""
    if isinstance(optimizer, torch.optim.Muon):
        return {"momentum_buffer": shape}
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    assert isinstance(optimizer, torch.optim.Adafactor), f"what does {type(optimizer).__name__} keep?"
    if len(shape) < 2:
        return {"step": (), "variance": shape}
    return {"step": (), "row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


def _compare(path: Path, tensors: dict[str, torch.Tensor], shapes: dict[str, tuple]) -> None:
    """Checks that a file has exactly these tensors; UserError naming the first that differs."""
    for name in sorted({*tensors, *shapes}):
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
        expected = shapes.get(name, "nothing")
        if found != expected:
            raise UserError(f"{path} does not fit the model: {_brief(name)} has shape {found}, expected {expected}")


def _examine(path: Path, run: dict) -> Found:
    """Returns a checkpoint as found, or what is wrong with it in one line of `passed_over` or `foreign`."""
    try:
        manifest, state = _read(path)
        if manifest["format_version"] == 1:  # it says less of its run
            run = {name: value for name, value in run.items() if name in state["run"]}
        if different := differences(state["run"], run):
            return Found(foreign=["; ".join(different)])
        _check_tensors(path, manifest)
    except DAMAGE as error:
        return Found(passed_over=[describe(error)])
    return Found(path, state["step"], _seal(manifest))


def _read(path: Path) -> tuple[dict, dict]:
    """Reads manifest and state, and checks all but the tensors' hashes; one of DAMAGE where something is wrong."""
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise ValueError("no folder")
    if not os.path.lexists(path / "manifest.json"):
        raise ValueError("no complete checkpoint (it has no manifest.json)")
    manifest = _read_json(path / "manifest.json")
    version, files = manifest.get("format_version"), manifest.get("files")
    if type(version) is not int or version < 1:
        raise ValueError("manifest.json has no format_version")
    if version > FORMAT_VERSION:
        raise ValueError(f"its format {_brief(version)} is newer than this program's {FORMAT_VERSION}")
    if not isinstance(files, dict) or set(files) != set(FILES):
        raise ValueError(f"manifest.json does not list {', '.join(FILES)}")
    if any(not isinstance(facts, dict) or set(facts) != {"bytes", "sha256"} for facts in files.values()):
        raise ValueError("manifest.json does not give bytes and sha256 of each file")
    if version > 1 and manifest.get("sha256") != _seal(manifest):
        raise ValueError("manifest.json is not the file that was saved")
    for name, facts in files.items():
        if (size := _size(path / name)) != facts["bytes"]:
            raise ValueError(f"{name} is not the file that manifest.json names: it has {size:,} bytes")
    text = _read_text(path / "state.json")
    _check_hash("state.json", files["state.json"], hashlib.sha256(text).hexdigest())
    state = _parse("state.json", text)
    if type(state.get("step")) is not int or state["step"] < 0 or not isinstance(state.get("run"), dict):
        raise ValueError("state.json names no step and run")
    if path.name.startswith("step-") and path.name != f"step-{state['step']:08d}":
        raise ValueError(f"its state is that of step {_brief(state['step'])}")
    return manifest, state


def _check_tensors(path: Path, manifest: dict) -> None:
    hashes = _together([partial(disk.sha256, path / name) for name in TENSOR_FILES])
    for name, sha256 in zip(TENSOR_FILES, hashes, strict=True):
        _check_hash(name, manifest["files"][name], sha256)
        try:
            with safe_open(path / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{name} is no safetensors file: {error}") from None


def _check_hash(name: str, facts: dict, sha256: str) -> None:
    if facts["sha256"] != sha256:
        raise ValueError(f"{name} is not the file that manifest.json names: its sha256 is {sha256}")


def _seal(manifest: dict) -> str:
    """Returns the sha256 of a manifest without its own."""
    content = {"format_version": manifest["format_version"], "files": manifest["files"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_json(path: Path) -> dict:
    return _parse(path.name, _read_text(path))


def _read_text(path: Path) -> bytes:
    """Reads a plain file; ValueError where it is none, or larger than any that is ours."""
    if (size := _size(path)) > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {size:,} bytes, more than {MAX_JSON_BYTES:,}")
    return path.read_bytes()


def _parse(name: str, text: bytes) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is no JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no JSON object")
    return content


def _size(path: Path) -> int:
    """Returns the bytes of a plain file; ValueError where it is a link or something else, or missing."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is no plain file")
    return status.st_size


def describe(error: Exception) -> str:
    """Returns what is wrong with a file, in a few words."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error).removeprefix("Error while serializing: ")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
