"""When checkpoints are written and deleted: behind the back of training, and by a child that outlives its parent.

Beside the checkpoints there may be, for a moment or after a crash: `.partial-…`, one that is being written;
`.replaced-…`, one that makes way for another of the same step; `.deleted-…`, one that is going.
"""

import gc
import json
import os
import signal
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from torch import nn

from forge_lib import disk
from forge_lib.checkpoints import format as checkpoint
from forge_lib.checkpoints.format import Tensors

NICENESS = 10  # of the writing thread: it takes what training leaves, and a tenth of a core where that is nothing
OUTLIVING_SECONDS = 600  # what a save may take whose parent is gone


@dataclass(frozen=True)
class Outcome:
    """How a save ended: with a path, or with an error; with both where older checkpoints could not be deleted."""

    step: int
    path: Path | None
    error: str
    seconds: float


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
        self._ended: deque[Outcome] = deque()
        self._write: Future | None = None
        self.last_step = -1  # of the newest checkpoint that it has written

    def attach(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Makes each optimizer's `step` wait until a running save has copied the weights; the loop calls nothing.

        Args:
            optimizers: as passed to `save`; prepared by accelerate, or not yet.
        """
        for optimizer in optimizers:
            unwrapped = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
            unwrapped.register_step_pre_hook(lambda *_: self.wait_for_copy())

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
        text, tensors = checkpoint.to_json({**state, "step": step}), checkpoint.collect_tensors(model, optimizers)
        if not self.background:
            self._ended.append(self._save(step, _on_cpu(tensors), text, start))
            return
        buffers = self._copied.result() if self._copied and not self._copied.exception() else {}
        self._copied = checkpoint.in_thread(partial(copy_tensors, tensors, buffers))
        self._write = checkpoint.in_thread(partial(self._save_quietly, step, text, start))
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
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def save_surviving(self, step: int, model: nn.Module, optimizers: list, state: dict) -> None:
        """Saves at once, also where this process is killed meanwhile, as a launcher does with all that it has started.

        A forked child in a session of its own writes; this process waits for it. The child holds on to the files that
        are open here, locks among them, and to no socket. Call it on the main thread, for the last save of a run.
        """
        self.wait()
        start = time.monotonic()
        self._copied = None  # a child cannot rely on pinned memory
        text, tensors = (
            checkpoint.to_json({**state, "step": step}),
            _on_cpu(checkpoint.collect_tensors(model, optimizers)),
        )
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
        self._ended.append(self._save(step, tensors, text, start, together=False))  # a second core may be training's

    def _save(self, step: int, tensors: Tensors, text: bytes, start: float, together: bool = True) -> Outcome:
        path, error = None, ""
        try:
            path = checkpoint.write(self.folder, step, tensors, text, together)
            self.prune(step)
        except (OSError, SafetensorError) as problem:
            error = checkpoint.describe(problem)
            if path:
                error = f"older ones could not be deleted: {error}"
            sweep(self.folder)
        self.last_step = step if path else self.last_step
        return Outcome(step, path, error, time.monotonic() - start)

    def prune(self, step: int) -> None:
        """Deletes what need not stay; checkpoints newer than `step` were passed over, and do not count."""
        replaced = disk.replaced_path(checkpoint.step_path(self.folder, step))
        for leftover in (replaced, *self.folder.glob(".partial-*")):
            disk.remove(leftover)
        paths = [path for number, path in checkpoint.list_steps(self.folder) if number <= step]
        stay = set(paths[: self.keep])
        if self.keep_best:
            losses = {path: loss for path in paths if (loss := checkpoint.eval_loss(path)) is not None}
            stay.update(sorted(losses, key=losses.__getitem__)[:1])
        for path in paths:
            if path not in stay:
                deleted = path.with_name(f".deleted-{path.name}")
                disk.remove(deleted)
                path.rename(deleted)
                disk.remove(deleted)


def sweep(folder: Path) -> list[str]:
    """Clears up what a save left that was cut short, before a run begins; returns a line for each thing done."""
    lines = []
    for path in sorted(folder.glob(".*")):
        kind, _, name = path.name.partition("-")
        target = folder / name
        try:
            if kind == ".replaced" and not os.path.lexists(target):
                disk.restore(target)
                lines.append(f"checkpoint {name} is put back: the one to replace it was never finished")
            elif (path / ".files.json").exists():
                continue  # on its way from another machine, and to be continued
            elif kind in (".partial", ".deleted", ".replaced"):
                disk.remove(path)
                lines.append(f"removed {path.name}, left over from a save that was cut short")
        except OSError as error:
            lines.append(f"{path.name}, left over from a save, could not be removed: {checkpoint.describe(error)}")
    return lines


def _on_cpu(tensors: Tensors) -> Tensors:
    """Returns the tensors in plain memory; those that lie there are not copied."""
    return {file: {name: t.cpu().contiguous() for name, t in named.items()} for file, named in tensors.items()}


def copy_tensors(tensors: Tensors, buffers: Tensors) -> Tensors:
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
