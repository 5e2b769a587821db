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

LEAST_ROWS = 256  # fewer make the matrix product slow
CPU_ROWS_BF16 = 512  # adding the gradients of the slices up takes longer than their matrix products
PIECE_ROWS = 4096  # of the gradient of the weights
GPU_NUMBERS = 1 << 26  # logits of a slice on a GPU: 256 MiB in fp32, and half as much again in bf16


def slice_rows(vocab_size: int, device: torch.device, dtype: torch.dtype) -> int:
    """Returns how many predictions a slice has, if its matrix products are computed in `dtype`."""
    if device.type == "cpu":
        return LEAST_ROWS if dtype == torch.float32 else CPU_ROWS_BF16
    return max(LEAST_ROWS, GPU_NUMBERS // vocab_size)


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
    rows = slice_rows(len(weight), hidden.device, hidden.dtype)
    for part, targets in zip(hidden.split(rows), labels.split(rows), strict=True):
        logits = F.linear(part, weight, bias)
        num_correct += (logits.argmax(-1) == targets).sum()  # -100 is never predicted
        loss += _loss_sum(logits.log_softmax(1, dtype=torch.float32), targets)
    return loss, num_correct


class _Buffers:
    """The memory of a slice, made once: new memory for each slice would cost time.

    Attributes:
        numbers: [rows, vocabulary] fp32, for the log-probabilities.
        logits: [rows, vocabulary], of the type of the matrix products; `numbers` itself if that is fp32.
    """

    def __init__(self, rows: int, weight: torch.Tensor):
        self.numbers = torch.empty(rows, len(weight), device=weight.device)
        self.logits = self.numbers if weight.dtype == torch.float32 else weight.new_empty(rows, len(weight))
        self._weight = weight

    def log_probabilities(self, part: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns [rows, vocabulary] fp32 for [rows, width], in `numbers`."""
        logits, numbers = self.logits[: len(part)], self.numbers[: len(part)]
        if bias is None:
            torch.mm(part, self._weight.t(), out=logits)
        else:
            torch.addmm(bias, part, self._weight.t(), out=logits)
        return torch.log_softmax(numbers.copy_(logits), 1, out=numbers)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds left.t() @ right to `total`, [vocabulary, width] fp32; in pieces if the product has another type, because
    torch makes a copy of it in fp32."""
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
        return
    for part, columns in zip(total.split(PIECE_ROWS), left.split(PIECE_ROWS, dim=1), strict=True):
        part += columns.t() @ right


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
        loss, rows = torch.zeros((), device=hidden.device), slice_rows(len(weight), hidden.device, hidden.dtype)
        buffers = _Buffers(min(rows, len(hidden)), weight)
        for start in range(0, len(hidden), rows):
            part, targets = hidden[start : start + rows], labels[start : start + rows]
            counts = (targets != IGNORED_LABEL)[:, None]
            places = targets.clamp_min(0)[:, None]
            log_probabilities = buffers.log_probabilities(part, bias)
            loss += _loss_sum(log_probabilities, targets)
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            gradient = log_probabilities.exp_()  # of the logits, once 1 is subtracted at the labels
            gradient.scatter_add_(1, places, torch.full_like(places, -1, dtype=torch.float32))
            if needs_bias:
                bias_gradient.addmv_(gradient.t(), counts[:, 0].float())
            gradient = buffers.logits[: len(part)].copy_(gradient)
            if needs_hidden:
                torch.mm(gradient, weight, out=hidden_gradient[start : start + rows]).mul_(counts)
            if needs_weight:
                _add_product(weight_gradient, gradient, part * counts)
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
