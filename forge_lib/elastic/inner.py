"""Inside one peer: its main process tells its other processes what was decided, and copies the weights to them."""

from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import nn

T = TypeVar("T")


def tell_all(accelerator: Accelerator, value: T) -> T:
    """Returns the main process's value on all processes. Call on all processes."""
    if accelerator.num_processes == 1:
        return value
    (told,) = broadcast_object_list([value])
    return told


@torch.no_grad()
def copy_weights(accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
    """Copies the main process's parameters to all processes. Call on all processes."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            parameter.copy_(broadcast(parameter.detach()))
