"""Finds processes whose copy of the model, or of the optimizers' states, is no longer equal to that of the others."""

from collections import Counter

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import gather, gather_object
from torch import nn

from forge_lib.distributed.agreement import Agreement


def replica(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Returns all tensors that must be equal on all processes, by name: parameters and the optimizers' states."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer {number}, parameter {parameter}, {key}"] = torch.as_tensor(value)
    return tensors


def find_diverged(accelerator: Accelerator, tensors: dict[str, torch.Tensor], agreement: Agreement) -> str:
    """Compares the replicas of all processes; returns which processes differ and where, or an empty string.

    Processes with the same hardware and software must agree in every bit: it compares 64-bit xxh3 hashes. Others (a
    GPU and a CPU, other numbers of threads) round differently: it compares the norms of the tensors, to a thousandth.
    Call on all processes.
    """
    if accelerator.num_processes == 1:
        return ""
    if agreement.alike:
        hashes = [xxhash.xxh3_64_intdigest(_bytes(tensor)) for tensor in tensors.values()]
        total = xxhash.xxh3_64_intdigest(str(hashes).encode()) >> 1  # fits an int64
        if gather(torch.tensor([total], device=accelerator.device)).unique().numel() == 1:
            return ""
        rows = gather_object([hashes])
    else:
        rows = gather_object([[tensor.double().norm().item() for tensor in tensors.values()]])
    differing: dict[int, list[str]] = {}
    for name, values in zip(tensors, zip(*rows, strict=True), strict=True):
        for rank in _find_outliers(values, agreement.alike):
            differing.setdefault(rank, []).append(name)
    return "; ".join(
        f"the replica of process {rank} on {agreement.processes[rank].host} differs from "
        f"{'process 0' if len(rows) == 2 else 'the others'} in {len(names)} of {len(tensors)} tensors ({names[0]}, …)"
        for rank, names in differing.items()
    )


def _find_outliers(values: tuple[float, ...], exact: bool) -> list[int]:
    """Returns the ranks whose value differs from the most common one, or by over a thousandth from the median."""
    if exact:
        usual = Counter(values).most_common(1)[0][0]  # of two different values, that of process 0
        return [rank for rank, value in enumerate(values) if value != usual]
    median = sorted(values)[(len(values) - 1) // 2]
    # `not <=` is also true for a value that is not a number.
    return [rank for rank, value in enumerate(values) if not abs(value - median) <= 1e-3 * abs(median) + 1e-12]


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
