"""DDP's synchronization of the gradient: measured, and with the same rounding after a resume."""

import logging
import time

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from forge_lib.models.loss import loss_sum, unused_parameters
from forge_lib.models.weight_files import name_some

logger = logging.getLogger("forge")


class GradientSync:
    """Measures how DDP synchronizes the gradient: the bytes, and the seconds that no computation hides.

    It wraps DDP's own all-reduce in a communication hook, which changes no value; with `fp16`, it uses torch's hook
    that sends fp16. Without DDP, all figures are 0.

    Args:
        model: as returned by `Accelerator.prepare`.
        fp16: whether to send gradients as fp16.
    """

    def __init__(self, model: nn.Module, fp16: bool = False):
        self.num_bytes, self.fp16 = 0, fp16
        self._begun = self._on_gpu = None
        self._events = None
        if isinstance(model, DistributedDataParallel):
            self._on_gpu = next(model.parameters()).is_cuda
            model.register_comm_hook(self, _measured_all_reduce)

    def compute_begins(self) -> None:
        """Call when the step's batch is in memory."""
        self._begun = _timestamp(bool(self._on_gpu))

    def own_gradients_done(self) -> None:
        """The hook calls this when the last gradient of this process is computed; only the others' are missing."""
        self._events = [_timestamp(self._on_gpu)]

    def backward_done(self) -> None:
        """Call after the backward pass that synchronizes."""
        if self._events:
            self._events.append(_timestamp(self._on_gpu))

    def pop(self) -> tuple[float, float, float]:
        """Returns the seconds not hidden by computation, the bytes sent by this process, and its own seconds.

        All of them are since the last call; the own seconds are those of its forward and backward passes. A ring
        all-reduce of S bytes over n processes sends 2 (n - 1) / n S from each. On a GPU this waits for the step to
        end.
        """
        seconds = own_seconds = 0.0
        if self._events:
            done, end = self._events
            if self._on_gpu:
                end.synchronize()
            seconds = _seconds_between(done, end)
            own_seconds = _seconds_between(self._begun, done) if self._begun else 0.0
        n = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        num_bytes = 2 * (n - 1) / n * self.num_bytes
        self.num_bytes, self._events = 0, None
        return seconds, num_bytes, own_seconds


def _measured_all_reduce(sync: GradientSync, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook

    sync.num_bytes += 2 * bucket.buffer().numel() if sync.fp16 else bucket.buffer().nbytes
    if bucket.is_last():
        sync.own_gradients_done()
    return (fp16_compress_hook if sync.fp16 else allreduce_hook)(dist.group.WORLD, bucket)


def _seconds_between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def _timestamp(on_gpu: bool) -> float | torch.cuda.Event:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def allow_unused_parameters(accelerator: Accelerator, model: nn.Module) -> None:
    """Lets DDP finish without the gradients of parameters that the loss does not need; call before `prepare`.

    Such parameters stay as they are: those for images, for example, or of a decoder's attention to an encoder.
    """
    if accelerator.num_processes > 1 and (names := unused_parameters(model)):
        accelerator.ddp_handler.find_unused_parameters = True
        logger.info(f"{len(names)} parameter(s) are not needed for text, and stay as they are: {name_some(names)}")


def settle_buckets(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    block: dict[str, torch.Tensor],
    sync: GradientSync,
) -> None:
    """Makes DDP choose the final order of its buckets, which it does after its first backward pass.

    The order of the parameters in a bucket decides in which order a ring of more than two processes adds them up.
    Without this, the first step after a resume would round differently from the same step of an uninterrupted run.

    Args:
        accelerator: the processes.
        model: as returned by `Accelerator.prepare`.
        optimizers: their gradients are zeroed afterwards.
        block: a block without labels, so that the gradient is 0.
        sync: of this model; what it measures here does not count.
    """
    if accelerator.num_processes > 2:
        batch = {name: tensor[None].to(accelerator.device) for name, tensor in block.items()}
        with torch.compiler.set_stance("force_eager"):
            accelerator.backward(loss_sum(model, batch))
        for optimizer in optimizers:
            optimizer.zero_grad()
    sync.backward_done()
    sync.pop()
