"""The cross entropy behind a linear layer, without the whole matrix of logits.

For N predictions and a vocabulary of V tokens, the logits have N x V numbers: often more than all else that training
holds. Here the logits of a slice of predictions are computed, and at once their loss and their gradient, which needs
the softmax of just these logits. Only the gradients of the hidden states [N, D] and of the weights [V, D] remain. The
same idea is in Liger Kernel (arXiv 2410.10989), for GPUs alone.
"""

from typing import Any

import torch
from torch.nn import functional as F

from forge_lib.config import IGNORED_LABEL

LEAST_ROWS = 256  # fewer make the matrix product slow; more are not faster on CPUs
GPU_NUMBERS = 1 << 26  # logits of a slice on a GPU: 256 MiB in fp32


def slice_rows(vocab_size: int, device: str) -> int:
    """Returns how many predictions a slice has; `device`: a type of device, as "cpu"."""
    return LEAST_ROWS if device == "cpu" else max(LEAST_ROWS, GPU_NUMBERS // vocab_size)


def chunked_loss_sum(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Returns the cross entropy of `F.linear(hidden, weight, bias)`, summed over the labels, in nats.

    Args:
        hidden: [predictions, width]; the logits are computed in its type, or in that of autocast.
        weight: [vocabulary, width]; its gradient is added up in fp32.
        bias: [vocabulary], or None.
        labels: [predictions] int64; -100 does not count.

    Returns:
        A scalar, fp32; the loss and its gradient are computed in fp32 from the logits.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden = hidden.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels)


@torch.no_grad()
def chunked_evaluation_sums(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of `chunked_loss_sum`, and how many labels are the likeliest prediction, as scalars."""
    loss, num_correct = torch.zeros((), device=hidden.device), torch.zeros((), dtype=torch.int64, device=hidden.device)
    rows = slice_rows(len(weight), hidden.device.type)
    for part, targets in zip(hidden.split(rows), labels.split(rows), strict=True):
        logits = F.linear(part, weight, bias)
        num_correct += (logits.argmax(-1) == targets).sum()  # -100 is never predicted
        loss += _loss_sum(logits.log_softmax(1, dtype=torch.float32), targets)
    return loss, num_correct


def _log_probabilities(
    part: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, buffer: torch.Tensor | None
) -> torch.Tensor:
    """Returns [rows, vocabulary] fp32, in `buffer` if there is one: [rows or more, vocabulary], for fp32 weights."""
    if buffer is None:
        return F.linear(part, weight, bias).log_softmax(1, dtype=torch.float32)
    logits = torch.mm(part, weight.t(), out=buffer[: len(part)])
    if bias is not None:
        logits += bias
    return torch.log_softmax(logits, 1, out=logits)


def _loss_sum(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the sum over the targets that count; [predictions, vocabulary] fp32 and [predictions] int64."""
    found = log_probabilities.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return -found.mul_(targets != IGNORED_LABEL).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient is computed in `forward`, where the logits are, and scaled in `backward`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        loss, rows = torch.zeros((), device=hidden.device), slice_rows(len(weight), hidden.device.type)
        buffer = None
        if weight.dtype == torch.float32:
            buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))  # new memory for each slice would cost time
        for start in range(0, len(hidden), rows):
            part, targets = hidden[start : start + rows], labels[start : start + rows]
            counts = targets != IGNORED_LABEL
            places = targets.clamp_min(0)[:, None]
            log_probabilities = _log_probabilities(part, weight, bias, buffer)
            loss += _loss_sum(log_probabilities, targets)
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            gradient = log_probabilities.exp_()  # of the logits, once 1 is subtracted at the labels
            gradient.scatter_add_(1, places, torch.full_like(places, -1, dtype=torch.float32))
            gradient.mul_(counts[:, None])
            if needs_bias:
                bias_gradient += gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            if needs_hidden:
                torch.mm(gradient, weight, out=hidden_gradient[start : start + rows])
            if needs_weight and weight.dtype == torch.float32:
                weight_gradient.addmm_(gradient.t(), part)
            elif needs_weight:
                weight_gradient += gradient.t() @ part
        ctx.gradients = hidden_gradient, weight_gradient, bias_gradient
        return loss

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = ctx.gradients
        ctx.gradients = None  # once only
        for each in (hidden, weight, bias):
            if each is not None and each.dtype.itemsize < 4:
                each.copy_(each.float() * factor)  # the factor itself must not be rounded
            elif each is not None:
                each.mul_(factor)
        weight_dtype, bias_dtype = ctx.dtypes
        weight = weight if weight is None else weight.to(weight_dtype)
        return hidden, weight, bias if bias is None else bias.to(bias_dtype), None
