"""The files of a checkpoint and how they are written: the folder is complete under its name, or it does not exist.

    checkpoints/step-00000100/
        model.safetensors       the trainable weights
        optimizer.safetensors   the optimizers' tensors
        state.json              step, configuration, identity of the run
        manifest.json           size and sha256 of the files above, and its own sha256

Each machine writes and reads its own checkpoints. Equal tensors and states give equal files, byte for byte.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from forge_lib import disk

FORMAT_VERSION = 2  # version 1 has no sha256 of the manifest itself
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
FILES = (*TENSOR_FILES, "state.json")  # what the manifest lists

Tensors = dict[str, dict[str, torch.Tensor]]  # file name -> tensor name -> tensor
T = TypeVar("T")


def step_path(folder: Path, step: int) -> Path:
    """Returns the path of a step's checkpoint in a `checkpoints` folder."""
    return folder / f"step-{step:08d}"


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """Returns (step, path) of all checkpoints in a folder, complete or not, newest first."""
    named = [(int(path.name[5:]), path) for path in folder.glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    return sorted(((step, path) for step, path in named if path == step_path(folder, step)), reverse=True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that a checkpoint contains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def collect_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Tensors:
    """Returns the tensors that a checkpoint contains, without copying them.

    Args:
        model: unwrapped; parameters that are not trained are omitted.
        optimizers: with these states.
    """
    weights = {name: p.detach() for name, p in trainable(model).items()}
    return dict(zip(TENSOR_FILES, (weights, optimizer_tensors(optimizers)), strict=True))


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Returns the tensors of the optimizers' states, without copying them; `optimizer/parameter/key` is the name."""
    return {
        f"{number}/{parameter}/{key}": torch.as_tensor(value).detach()
        for number, optimizer in enumerate(optimizers)
        for parameter, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def write(folder: Path, step: int, tensors: Tensors, state: bytes, parallel: bool = True) -> Path:
    """Writes a checkpoint and returns its path.

    Args:
        folder: the run's `checkpoints` folder, created if missing. No other process may write there.
        step: number of optimizer steps done.
        tensors: from `collect_tensors`, on the CPU and contiguous.
        state: the text of state.json, from `to_json`; it has the keys `step` and `run`.
        parallel: writes the files at the same time, one thread each; else one after the other.

    Raises:
        OSError, SafetensorError: the disk is full, read-only or gone. Complete checkpoints in the folder do not
            change; temporary files may be left.
    """
    path = step_path(folder, step)
    temporary = create_temporary(path)
    writes = [partial(_write_tensors, temporary / file, named) for file, named in tensors.items()]
    writes.append(partial(write_bytes, temporary / "state.json", state))
    hashes = run_parallel(writes) if parallel else [write() for write in writes]
    files = {
        file: {"bytes": (temporary / file).stat().st_size, "sha256": sha256}
        for file, sha256 in zip((*tensors, "state.json"), hashes, strict=True)
    }
    manifest = {"format_version": FORMAT_VERSION, "files": files}
    write_bytes(temporary / "manifest.json", to_json({**manifest, "sha256": manifest_sha256(manifest)}))
    disk.place(path)
    return path


def create_temporary(path: Path) -> Path:
    """Creates the empty temporary folder in which a checkpoint is written before it is renamed; returns its path."""
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.flush(path.parent.parent)
    temporary = disk.partial_path(path)
    disk.remove(temporary)
    temporary.mkdir()
    return temporary


def to_json(content: dict) -> bytes:
    """Returns the text of a JSON file; equal contents give equal bytes."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def manifest_sha256(manifest: dict) -> str:
    """Returns the sha256 of a manifest's content without its own `sha256`."""
    content = {"format_version": manifest["format_version"], "files": manifest["files"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_bytes(path: Path, data: bytes) -> str:
    """Writes and flushes a file; returns its sha256."""
    path.write_bytes(data)
    disk.flush(path)
    return hashlib.sha256(data).hexdigest()


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Writes and flushes a safetensors file; returns its sha256."""
    save_file(tensors, path)
    flushed = in_thread(partial(disk.flush, path))  # the disk writes while this thread computes the hash
    sha256 = disk.sha256(path)
    flushed.result()
    return sha256


def in_thread(function: Callable[[], T]) -> "Future[T]":
    """Runs a function in a new thread. Python waits for it at exit; a ThreadPoolExecutor accepts no work then."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future


def run_parallel(functions: list[Callable[[], T]]) -> list[T]:
    """Runs functions in one thread each; waits for all, then returns their results or raises the first one's error."""
    futures = [in_thread(function) for function in functions]
    wait(futures)
    return [future.result() for future in futures]


def describe_error(error: Exception) -> str:
    """Returns what is wrong with a file, in a few words."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error).removeprefix("Error while serializing: ")
