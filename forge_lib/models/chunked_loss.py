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
GPU_ALIGNMENT = 8  # numbers of 2 bytes
ADDS_MIXED = (2, 10)  # from this version on, torch.addmm adds a product of 2-byte numbers to fp32
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
    hidden = _in_autocast_type(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels)


@torch.no_grad()
def chunked_evaluation_sums(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of `chunked_loss_sum`, and how many labels are the likeliest prediction, as scalars."""
    hidden = _in_autocast_type(hidden)
    loss, num_correct = torch.zeros((), device=hidden.device), torch.zeros((), dtype=torch.int64, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, bias)
        for part, targets in zip(hidden.split(head.rows), labels.split(head.rows), strict=True):
            logits = head.logits(part)
            num_correct += (logits.argmax(-1) == targets).sum()  # -100 is never predicted
            loss += _loss_sum(head.log_probabilities(logits), targets)
    return loss, num_correct


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def _in_autocast_type(tensor: torch.Tensor) -> torch.Tensor:
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


class _Head:
    """A linear layer in the type of its inputs, and the memory of a slice, made once: each slice overwrites it.

    The matrix products of a GPU are several times slower if the rows of a matrix with 2 bytes per number have a length
    that is not a multiple of 16 bytes. So the vocabulary is extended by tokens with a probability of 0.

    Args:
        hidden: [predictions, width], the inputs.
        weight, bias: [vocabulary, width], and [vocabulary] or None; of any type.

    Attributes:
        rows: of a slice.
        weight: [extended vocabulary, width], of the type of `hidden`.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        self._size, dtype = len(weight), hidden.dtype
        self.rows = min(slice_rows(self._size, hidden.device, dtype), max(1, len(hidden)))
        self._on_gpu = _is_on_gpu(hidden)
        extra = -self._size % GPU_ALIGNMENT if self._on_gpu and dtype.itemsize == 2 else 0
        self.weight = F.pad(weight.to(dtype), (0, 0, 0, extra)) if extra else weight.to(dtype)
        self._bias = None if bias is None else F.pad(bias.to(dtype), (0, extra))
        self._numbers = torch.empty(self.rows, len(self.weight), device=hidden.device)
        self._logits = self._numbers if dtype == torch.float32 else hidden.new_empty(self._numbers.shape)

    def logits(self, part: torch.Tensor) -> torch.Tensor:
        """Returns [n, extended vocabulary] for [n, width]."""
        logits = self._logits[: len(part)]
        if self._bias is None:
            torch.mm(part, self.weight.t(), out=logits)
        else:
            torch.addmm(self._bias, part, self.weight.t(), out=logits)
        logits[:, self._size :] = -torch.inf
        return logits

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns [n, extended vocabulary] fp32 for `logits`, which it overwrites if they are fp32."""
        numbers = self._numbers[: len(logits)].copy_(logits)
        return torch.log_softmax(numbers, 1, out=numbers)

    def logits_gradient(self, log_probabilities: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of the loss, [n, extended vocabulary], in the memory of the logits.

        It is the probabilities, less 1 at `places`, [n, 1] int64; computed in fp32 and then rounded.
        """
        of_labels = log_probabilities.gather(1, places).expm1()
        if self._on_gpu:  # rounds in the same pass
            gradient = torch.exp(log_probabilities, out=self._logits[: len(places)])
        else:
            gradient = self._logits[: len(places)].copy_(log_probabilities.exp_())
        return gradient.scatter_(1, places, of_labels.to(gradient.dtype))

    def add_weight_gradient(self, total: torch.Tensor, gradient: torch.Tensor, part: torch.Tensor, beta: int) -> None:
        """Sets `total`, [vocabulary, width] fp32, to beta (0 or 1) times itself, plus `logits_gradient`'s transpose
        times `part`, [n, width]."""
        gradient = gradient[:, : self._size]
        if part.dtype == torch.float32:
            total.addmm_(gradient.t(), part, beta=beta)
        elif self._on_gpu and torch.version.cuda and torch.__version__ >= ADDS_MIXED:
            torch.addmm(total, gradient.t(), part, out_dtype=torch.float32, beta=beta, out=total)
        else:  # in pieces, because torch makes a copy of the product in fp32
            for piece, columns in zip(total.split(PIECE_ROWS), gradient.split(PIECE_ROWS, dim=1), strict=True):
                if beta:
                    piece += columns.t() @ part
                else:
                    piece.copy_(columns.t() @ part)


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
        new = torch.empty_like if len(hidden) else torch.zeros_like  # the first slice overwrites it
        weight_gradient = new(weight, dtype=torch.float32) if needs_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        loss, head = torch.zeros((), device=hidden.device), _Head(hidden, weight, bias)
        for start in range(0, len(hidden), head.rows):
            part, targets = hidden[start : start + head.rows], labels[start : start + head.rows]
            log_probabilities = head.log_probabilities(head.logits(part))
            loss += _loss_sum(log_probabilities, targets)
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            counts = (targets != IGNORED_LABEL)[:, None]
            gradient = head.logits_gradient(log_probabilities, targets.clamp_min(0)[:, None])
            if needs_hidden:
                torch.mm(gradient, head.weight, out=hidden_gradient[start : start + head.rows]).mul_(counts)
            if needs_weight:
                head.add_weight_gradient(weight_gradient, gradient, part * counts, beta=min(start, 1))
            if needs_bias:
                bias_gradient += gradient[:, : len(bias)].mul_(counts).sum(0, dtype=torch.float32)
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
