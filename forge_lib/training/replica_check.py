"""Compares the replicas of all processes during the training."""

import torch
from accelerate import Accelerator
from torch import nn

from forge_lib.distributed.replicas import find_diverged, replica
from forge_lib.errors import DivergedError
from forge_lib.training.log import MetricsLog
from forge_lib.training.session import Session


def check_replicas(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    session: Session,
    log: MetricsLog,
    step: int,
) -> None:
    """Checks that all processes have the same weights and optimizer states. Call on all processes.

    Args:
        accelerator, session: the processes.
        model: unwrapped.
        optimizers: of its parameters.
        log: metrics.jsonl.
        step: completed steps.

    Raises:
        DivergedError: they differ; it names the process and the tensor.
    """
    if diverged := find_diverged(accelerator, replica(model, optimizers), session.agreement):
        log.write(step=step, event="diverged", message=diverged)
        raise DivergedError(f"step {step}: {diverged}; its memory is faulty, or something has changed it")
