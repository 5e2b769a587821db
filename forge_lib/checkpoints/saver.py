"""Writes this machine's checkpoints in a background thread, and the last one in a child that survives the launcher."""

import json
import os
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from torch import nn

from forge_lib.checkpoints import format as checkpoint
from forge_lib.checkpoints import retention, surviving
from forge_lib.checkpoints.format import Tensors
from forge_lib.checkpoints.restore import state_shapes

NICENESS = 10  # of the writing thread: it uses the time that training leaves, or a tenth of a core if that is none


@dataclass(frozen=True)
class Outcome:
    """The result of a save: a path, or an error; both if older checkpoints could not be deleted afterwards."""

    step: int
    path: Path | None
    error: str
    seconds: float


class Saver:
    """Writes this machine's checkpoints, one at a time, in the background.

    A failed save (the disk is full, read-only or gone, or there is too little memory for the copy) does not raise; it
    is reported as an Outcome. The next save tries again.
    """

    def __init__(self, folder: Path, keep: int, keep_best: bool = False, background: bool = True):
        """Stores the settings; writes nothing.

        Args:
            folder: the run's `checkpoints` folder, created by the first save. No other process may write there.
            keep: number of checkpoints to keep, at least 1: the newest up to the one just written.
            keep_best: also keeps the one with the lowest `eval_loss` in its state.
            background: `save` returns while a thread writes; else it returns when everything is on the disk.
        """
        self.folder, self.keep, self.keep_best, self.background = folder, keep, keep_best, background
        self.last_step = -1  # of the newest checkpoint that this saver has written
        self._copied: Future[Tensors] | None = None  # the copy of the running save
        self._written: Future[None] | None = None
        self._outcomes: deque[Outcome] = deque()

    def attach(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Makes each optimizer's `step` wait until a running save has copied the weights; the loop needs no call.

        Args:
            optimizers: as passed to `save`; prepared by accelerate, or not yet.
        """
        for optimizer in optimizers:
            unwrapped = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
            state_shapes(
                unwrapped, (1,)
            )  # fails now, not at the next start, for an optimizer that `load` does not know
            unwrapped.register_step_pre_hook(lambda *_: self.wait_for_copy())

    def save(self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict) -> None:
        """Saves the tensors as they are now; first waits for the previous save.

        In the background the tensors are copied first. On a CPU, a forward and backward pass can run meanwhile
        (CheckFreq, Mohan et al., FAST 2021); `attach` keeps optimizers from changing the tensors too early. On a GPU
        this method waits for the copy: an all-reduce that never ends may follow it in the GPU's queue.

        Args:
            step: number of optimizer steps done.
            model: unwrapped; parameters that are not trained are omitted.
            optimizers: their states are saved, in this order.
            state: further values to save, of JSON types.
        """
        self.wait()
        start = time.monotonic()
        text, tensors = _state_text(state, step), checkpoint.collect_tensors(model, optimizers)
        if not self.background:
            self._report(self._write(step, _on_cpu(tensors), text, start))
            return
        self._copied = checkpoint.in_thread(partial(copy_tensors, tensors))
        self._written = checkpoint.in_thread(partial(self._write_copy, step, self._copied, text, start))
        if any(p.device.type != "cpu" for p in model.parameters()):
            self.wait_for_copy()

    def save_surviving(
        self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict
    ) -> None:
        """Saves and waits, in a forked child: the save finishes even if a launcher kills all its processes meanwhile.

        Call on the main thread, for the last save of a run. Takes the same arguments as `save`.
        """
        self.wait()
        start = time.monotonic()
        text, tensors = _state_text(state, step), _on_cpu(checkpoint.collect_tensors(model, optimizers))

        def write() -> bytes:
            return json.dumps(asdict(self._write(step, tensors, text, start)), default=str).encode()

        if result := surviving.call_in_child(write):
            facts = json.loads(result)
            self._report(Outcome(**facts | {"path": Path(facts["path"]) if facts["path"] else None}))
        else:
            self._report(Outcome(step, None, "the process that wrote it died", time.monotonic() - start))

    def wait_for_copy(self) -> None:
        """Waits until the last save no longer reads the model's and the optimizers' tensors."""
        if copied := self._copied:
            wait([copied])

    def wait(self) -> None:
        """Waits until no save is running."""
        if self._written is not None:
            self._written.result()

    def outcomes(self) -> list[Outcome]:
        """Returns the results of all saves that ended since the last call."""
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def prune(self, step: int) -> None:
        """Deletes the checkpoints up to `step` that need not be kept; OSError if one cannot be deleted."""
        retention.prune(self.folder, step, self.keep, self.keep_best)

    def _write_copy(self, step: int, copied: "Future[Tensors]", text: bytes, start: float) -> None:
        """Writes the copy as soon as it is complete, at a low priority."""
        try:
            tensors = copied.result()
        except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError
            self._copied = None
            problem = f"its tensors could not be copied in memory: {error}"
            self._report(Outcome(step, None, problem, time.monotonic() - start))
            return
        if sys.platform == "linux":  # elsewhere a thread cannot have its own priority
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        outcome = self._write(step, tensors, text, start, parallel=False)  # training may need a second core
        self._copied = None  # frees its memory
        self._report(outcome)

    def _write(self, step: int, tensors: Tensors, text: bytes, start: float, parallel: bool = True) -> Outcome:
        path, error = None, ""
        try:
            path = checkpoint.write(self.folder, step, tensors, text, parallel)
            self.prune(step)
        except (OSError, SafetensorError) as problem:
            error = checkpoint.describe_error(problem)
            if path:
                error = f"older checkpoints could not be deleted: {error}"
            retention.sweep(self.folder)
        return Outcome(step, path, error, time.monotonic() - start)

    def _report(self, outcome: Outcome) -> None:
        if outcome.path:
            self.last_step = outcome.step
        self._outcomes.append(outcome)


def copy_tensors(tensors: Tensors) -> Tensors:
    """Copies tensors into CPU memory: pinned memory for tensors on a GPU."""
    copies: Tensors = {}
    for file, named in tensors.items():
        copies[file] = {}
        for name, t in named.items():
            buffer = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            copies[file][name] = buffer.copy_(t, non_blocking=t.is_cuda)
    for device in {t.device for named in tensors.values() for t in named.values() if t.is_cuda}:
        torch.cuda.synchronize(device)  # named explicitly: the current device of a new thread is always the first
    return copies


def _on_cpu(tensors: Tensors) -> Tensors:
    """Returns the tensors in unpinned CPU memory; those that are already there are not copied."""
    return {file: {name: t.cpu().contiguous() for name, t in named.items()} for file, named in tensors.items()}


def _state_text(state: dict, step: int) -> bytes:
    return checkpoint.to_json({**state, "step": step})
