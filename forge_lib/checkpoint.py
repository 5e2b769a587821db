"""Checkpoints: tensors as safetensors, the rest as JSON, complete or not there at all.

    checkpoints/step-00000100/
        model.safetensors       the trainable weights
        optimizer.safetensors   the optimizers' tensors
        state.json              step, configuration, what the run is
        manifest.json           size and sha256 of the files above, and its own sha256

Each machine writes and reads its own. The content follows from tensors and state alone, so that the copies of one step
are the same, byte for byte. Beside the checkpoints there may be, for a moment or after a crash: `.partial-…`, one that
is being written; `.replaced-…`, one that makes way for another of the same step; `.deleted-…`, one that is going.
"""

import gc
import hashlib
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from forge_lib.config import UserError

FORMAT_VERSION = 2  # 1: without the manifest's own sha256
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
FILES = (*TENSOR_FILES, "state.json")
MAX_JSON_BYTES = 1 << 24
BLOCK_BYTES = 1 << 20
NICENESS = 10  # of the writing thread: it takes what training leaves, and a tenth of a core where that is nothing
OUTLIVING_SECONDS = 600  # what a save may take whose parent is gone
DAMAGE = (OSError, ValueError, RecursionError, SafetensorError)  # what reading a bad checkpoint may raise

Tensors = dict[str, dict[str, torch.Tensor]]  # by file, by name


@dataclass(frozen=True)
class Outcome:
    """How a save ended: with a path, or with an error; with both where older checkpoints could not be deleted."""

    step: int
    path: Path | None
    error: str
    seconds: float


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from, if any, and a line for each that is not taken: damaged, or of another run."""

    path: Path | None = None
    step: int = 0
    sha256: str = ""  # of the manifest, and so of all: equal on two machines where the checkpoints are
    passed_over: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


class Saver:
    """Writes this machine's checkpoints, one at a time, in the background.

    A disk that is full, read-only or gone, or too little memory for the copy, raises nothing: it is an outcome. The
    next save tries again.
    """

    def __init__(self, folder: Path, keep: int, keep_best: bool = False, background: bool = True):
        """Writes nothing yet.

        Args:
            folder: the run's `checkpoints` folder, made when it is needed. No other process writes there.
            keep: how many checkpoints stay, at least 1: the newest of those up to the one just written.
            keep_best: and the one of them whose state has the lowest `eval_loss`.
            background: whether `save` returns while it copies and writes; else when all is on disk.
        """
        self.folder, self.keep, self.keep_best, self.background = folder, keep, keep_best, background
        self._copied: Future | None = None  # the last save's copy of the tensors; the next one takes its memory
        self._ended: list[Outcome] = []
        self._write: Future | None = None
        self.last_step = -1  # of the newest checkpoint that it has written

    def save(self, step: int, model: nn.Module, optimizers: list, state: dict) -> None:
        """Saves the tensors as they are now; waits for the save before it.

        In the background they are copied first. On a CPU a forward and backward pass can take place meanwhile: call
        `wait_for_copy` before they change (CheckFreq, Mohan et al., FAST 2021). On a GPU the copy is waited for here,
        since behind it in the queue may be an all-reduce that never ends.

        Args:
            step: optimizer steps done.
            model: unwrapped; parameters that are not trained are left out.
            optimizers: their states, in this order.
            state: what else to keep, of JSON types.
        """
        self.wait()
        start = time.monotonic()
        text, tensors = _to_json({**state, "step": step}), _tensors(model, optimizers)
        if not self.background:
            outcome = self._save(step, _on_cpu(tensors), text, start)
            self._ended.append(outcome)
            return
        buffers = self._copied.result() if self._copied and not self._copied.exception() else {}
        self._copied = _in_thread(partial(_copy, tensors, buffers))
        self._write = _in_thread(partial(self._save_quietly, step, text, start))
        if any(p.device.type != "cpu" for p in model.parameters()):
            self.wait_for_copy()

    def wait_for_copy(self) -> None:
        """Waits until the last save needs the model's and the optimizers' tensors no more."""
        if self._copied is not None:
            wait([self._copied])

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._write is not None:
            self._write.result()

    def outcomes(self) -> list[Outcome]:
        """Returns how the saves went that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def save_outliving(self, step: int, model: nn.Module, optimizers: list, state: dict) -> None:
        """Saves at once, also where this process is killed meanwhile, as a launcher does with all that it has started.

        A forked child in a session of its own writes; this process waits for it. The child holds on to the files that
        are open here, locks among them, and to no socket. Call it on the main thread, for the last save of a run.
        """
        self.wait()
        start = time.monotonic()
        self._copied = None  # a child cannot rely on pinned memory
        text, tensors = _to_json({**state, "step": step}), _on_cpu(_tensors(model, optimizers))
        save = partial(self._save, step, tensors, text, start)
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            _outlive(save, writing)
        os.close(writing)
        with open(reading, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        if answer:
            outcome = Outcome(**json.loads(answer))
            outcome = Outcome(**asdict(outcome) | {"path": outcome.path and Path(outcome.path)})
        else:
            outcome = Outcome(step, None, "the process that wrote it died", time.monotonic() - start)
        self.last_step = step if outcome.path else self.last_step
        self._ended.append(outcome)

    def _save_quietly(self, step: int, text: bytes, start: float) -> None:
        """Saves the copy, once it is there, with what processor time training leaves."""
        try:
            tensors = self._copied.result()
        except (MemoryError, RuntimeError) as problem:  # torch raises the second
            error = f"its tensors could not be copied in memory: {problem}"
            self._ended.append(Outcome(step, None, error, time.monotonic() - start))
            return
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        outcome = self._save(step, tensors, text, start, together=False)  # a second core may be training's
        self._ended.append(outcome)  # `outcomes` may have put another list in its place meanwhile

    def _save(self, step: int, tensors: Tensors, text: bytes, start: float, together: bool = True) -> Outcome:
        path, error = None, ""
        try:
            _write_checkpoint(self.folder, f"step-{step:08d}", tensors, text, together)
            path = self.folder / f"step-{step:08d}"
            self.prune(step)
        except (OSError, SafetensorError) as problem:
            error = _describe(problem)
            if path:
                error = f"older ones could not be deleted: {error}"
            sweep(self.folder)
        self.last_step = step if path else self.last_step
        return Outcome(step, path, error, time.monotonic() - start)

    def prune(self, step: int) -> None:
        """Deletes what need not stay; checkpoints newer than `step` were passed over, and do not count."""
        for leftover in (self.folder / f".replaced-step-{step:08d}", *self.folder.glob(".partial-*")):
            _remove(leftover)
        paths = [path for number, path in _steps(self.folder) if number <= step]
        stay = set(paths[: self.keep])
        losses = {path: loss for path in paths if (loss := _eval_loss(path)) is not None} if self.keep_best else {}
        if losses:
            stay.add(min(losses, key=losses.__getitem__))
        for path in paths:
            if path not in stay:
                deleted = path.with_name(f".deleted-{path.name}")
                _remove(deleted)
                path.rename(deleted)
                _remove(deleted)


def sweep(folder: Path) -> list[str]:
    """Clears up what a save left that was cut short, before a run begins; returns a line for each thing done."""
    lines = []
    for path in sorted(folder.glob(".*")):
        kind, _, name = path.name.partition("-")
        target = folder / name
        try:
            if kind == ".replaced" and not os.path.lexists(target):
                path.rename(target)
                _flush(folder)
                lines.append(f"checkpoint {name} is put back: the one to replace it was never finished")
            elif (path / ".files.json").exists():
                continue  # on its way from another machine, and to be continued
            elif kind in (".partial", ".deleted", ".replaced"):
                _remove(path)
                lines.append(f"removed {path.name}, left over from a save that was cut short")
        except OSError as error:
            lines.append(f"{path.name}, left over from a save, could not be removed: {_describe(error)}")
    return lines


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
        for _, path in _steps(folder):
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
    target, partial_path = folder / f"step-{step:08d}", folder / f".partial-step-{step:08d}"
    if path.resolve() == target.resolve():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    _remove(partial_path)
    partial_path.mkdir()
    for name in (*FILES, "manifest.json"):
        shutil.copyfile(path / name, partial_path / name)
        _flush(partial_path / name)
    _place(partial_path, target)
    return target


def set_aside(folder: Path, newer_than: int) -> list[str]:
    """Renames complete checkpoints newer than a step, so that they are not found again; returns their new names."""
    names = []
    for step, path in reversed(_steps(folder)):
        if step > newer_than and (path / "manifest.json").exists():
            aside, number = folder / f"aside-{path.name}", 1
            while os.path.lexists(aside):
                number += 1
                aside = folder / f"aside-{path.name}-{number}"
            path.rename(aside)
            names.append(aside.name)
    if names:
        _flush(folder)
    return names


def verify(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint, None where it is complete and each file is the one that was saved."""
    return next(iter(_examine(path, {}).passed_over), None)


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
        raise UserError(f"{path} cannot be loaded: {_describe(error)}") from None
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


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _tensors(model: nn.Module, optimizers: list) -> Tensors:
    """Returns what a checkpoint keeps, as it lies; an optimizer's tensor is named `optimizer/parameter/key`."""
    states = {
        f"{number}/{parameter}/{key}": torch.as_tensor(value).detach()
        for number, optimizer in enumerate(optimizers)
        for parameter, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    weights = {name: p.detach() for name, p in _trainable(model).items()}
    return dict(zip(TENSOR_FILES, (weights, states), strict=True))


def _on_cpu(tensors: Tensors) -> Tensors:
    """Returns the tensors in plain memory; those that lie there are not copied."""
    return {file: {name: t.cpu().contiguous() for name, t in named.items()} for file, named in tensors.items()}


def _copy(tensors: Tensors, buffers: Tensors) -> Tensors:
    """Copies tensors into those of the buffers that fit, else into new ones; pinned for those on a GPU."""
    copies: Tensors = {}
    for file, named in tensors.items():
        copies[file] = {}
        for name, t in named.items():
            buffer = buffers.get(file, {}).get(name)
            if buffer is None or buffer.shape != t.shape or buffer.dtype != t.dtype:
                buffer = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            copies[file][name] = buffer.copy_(t, non_blocking=t.is_cuda)
    for device in {t.device for named in tensors.values() for t in named.values() if t.is_cuda}:
        torch.cuda.synchronize(device)  # by its name: a new thread takes the first for its own
    return copies


def _write_checkpoint(folder: Path, name: str, tensors: Tensors, text: bytes, together: bool) -> None:
    """Writes a checkpoint under a temporary name, its files together or in turn, flushes it, and renames it."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _flush(folder.parent)
    path, partial_path = folder / name, folder / f".partial-{name}"
    _remove(partial_path)
    partial_path.mkdir()
    writes = [partial(_write_tensors, partial_path / file, named) for file, named in tensors.items()]
    writes.append(partial(_write_bytes, partial_path / "state.json", text))
    hashes = _together(writes) if together else [write() for write in writes]
    files = {
        file: {"bytes": (partial_path / file).stat().st_size, "sha256": sha256}
        for file, sha256 in zip((*tensors, "state.json"), hashes, strict=True)
    }
    manifest = {"format_version": FORMAT_VERSION, "files": files}
    _write_bytes(partial_path / "manifest.json", _to_json({**manifest, "sha256": _seal(manifest)}))
    _place(partial_path, path)


def _place(partial_path: Path, path: Path) -> None:
    """Gives a complete folder its name; what has had that name stays beside it until the next pruning or sweep."""
    _flush(partial_path)
    if os.path.lexists(path):
        replaced = path.with_name(f".replaced-{path.name}")
        _remove(replaced)
        path.rename(replaced)
    partial_path.rename(path)
    _flush(path.parent)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, path)
    flushed = _in_thread(partial(_flush, path))  # the disk works while the processor hashes
    sha256 = _sha256(path)
    flushed.result()
    return sha256


def _write_bytes(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    _flush(path)
    return hashlib.sha256(data).hexdigest()


def _outlive(save: Callable[[], Outcome], writing: int) -> NoReturn:
    """What a forked child does: it lets go of all but its work, saves, tells the parent if there is one, and ends."""
    try:
        os.setsid()
        gc.disable()  # collecting could free what belongs to a GPU, which a child must not touch
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(OUTLIVING_SECONDS)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nothing, standard)
        for descriptor in map(int, os.listdir("/dev/fd")):
            with suppress(OSError):
                # peers would take an open socket, and readers an open pipe, for a parent that lives
                mode = os.fstat(descriptor).st_mode
                if descriptor != writing and (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)):
                    os.close(descriptor)
        outcome = asdict(save())
        os.write(writing, json.dumps(outcome | {"path": outcome["path"] and str(outcome["path"])}).encode())
    finally:
        os._exit(0)


def _in_thread(call: Callable[[], Any]) -> Future:
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
    futures = [_in_thread(call) for call in calls]
    wait(futures)
    return [future.result() for future in futures]


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Returns the checkpoints of a folder, complete or not, newest first."""
    named = [(int(path.name[5:]), path) for path in folder.glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    return sorted(((step, path) for step, path in named if path.name == f"step-{step:08d}"), reverse=True)


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
        return Found(passed_over=[_describe(error)])
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
    hashes = _together([partial(_sha256, path / name) for name in TENSOR_FILES])
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


def _eval_loss(path: Path) -> float | None:
    try:
        loss = _read_json(path / "state.json").get("eval_loss")
    except DAMAGE:
        return None
    return loss if isinstance(loss, (int, float)) and math.isfinite(loss) else None


def _to_json(content: dict) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


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


def _sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Removes a folder, or a link to one, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error).removeprefix("Error while serializing: ")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
