"""The loss of a causal language model on a batch, summed over its tokens, if possible without the whole logits.

`add_loss` gives a model the argument `loss_labels`: with it, `model(…)` returns the loss instead of the logits. So the
loss is computed inside the module that DDP wraps.
"""

from __future__ import annotations  # names of transformers in signatures are not imported

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from forge_lib.config import IGNORED_LABEL
from forge_lib.errors import first_line
from forge_lib.models.chunked_loss import chunked_evaluation_sums, chunked_loss_sum

NUM_TOKENS = 8  # of the passes that check a model
TOLERANCE = 1e-5  # relative to the largest logit: rounding alone differs by 1e-6
NUM_TEST_ROWS = 64  # of a head with random weights; they are repeated
TEST_SCALE = 1000.0  # of the numbers that the model gets as its logits: a soft cap changes them visibly


def loss_sum(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the cross entropy of each token given the tokens before it, summed over the batch, in nats.

    It equals transformers' own `model(input_ids, labels=labels).loss` times the number of targets. For a mixture of
    experts with output_router_logits in its configuration, that includes its load-balancing loss: that of each
    micro-batch counts by its targets, so it depends slightly on how the batch is divided.

    Args:
        model: a causal language model with `add_loss`, wrapped by DDP or not.
        batch: the model's inputs and `labels`, [sequences, tokens] int64 each, on the model's device; labels that are
            -100 do not count.

    Returns:
        A scalar, fp32, computed in fp32 from logits of any float type.
    """
    return model(**_inputs(batch), loss_labels=batch["labels"])


@torch.no_grad()
def evaluation_sums(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, int, int]:
    """Returns a batch's loss in nats, its number of targets, and how many of them are the likeliest prediction.

    The arguments are those of `loss_sum`; the load-balancing loss of a mixture of experts is not included.
    """
    loss, num_correct = model(**_inputs(batch), loss_labels=batch["labels"], counts_correct=True)
    return loss.item(), (batch["labels"][:, 1:] != IGNORED_LABEL).sum().item(), num_correct.item()


def unused_parameters(model: nn.Module) -> list[str]:
    """Returns the names of the trained parameters on which the loss does not depend: those for images, for example.

    It walks the autograd graph of a pass over a few tokens, as DDP does; no gradient is computed.
    """
    ids = torch.arange(2, 2 + NUM_TOKENS)[None] % model.config.get_text_config().vocab_size
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        loss = loss_sum(model, {"input_ids": ids, "labels": ids})
    nodes, seen, used = [loss.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node in seen or node is None:
            continue
        seen.add(node)
        nodes += [each for each, _ in node.next_functions]
        used.add(id(getattr(node, "variable", None)))  # of the nodes that store a gradient
    return [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in used]


def add_loss(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Gives a model the argument `loss_labels`, in place, and returns it.

    Its attribute `full_logits_reason` then tells why the loss needs the whole logits; empty: it is computed in slices.
    """
    own_forward = model.forward.__func__

    @functools.wraps(own_forward)
    def forward(
        self: transformers.PreTrainedModel,
        *args: Any,
        loss_labels: torch.Tensor | None = None,
        counts_correct: bool = False,
        **kwargs: Any,
    ) -> Any:
        if loss_labels is None:
            return own_forward(self, *args, **kwargs)
        head = None if self.full_logits_reason else self.get_output_embeddings()
        with _head_as(head, _identity) if head else nullcontext():
            outputs = own_forward(self, *args, **kwargs)
        labels = loss_labels[:, 1:].flatten()
        predictions = outputs.logits[:, :-1].flatten(0, 1)  # with a head: the hidden states before it
        if counts_correct:
            return _evaluation_sums(predictions, head, labels)
        loss = chunked_loss_sum(predictions, head.weight, head.bias, labels) if head else _sum(predictions, labels)
        return loss + _balance_loss(self, outputs) * (labels != IGNORED_LABEL).sum()

    model.full_logits_reason = _full_logits_reason(model)
    model.forward = types.MethodType(forward, model)  # a method: a deep copy of the model gets its own
    return model


def describe_loss(model: nn.Module) -> str:
    """Returns a sentence for the log: whether the loss of a model with `add_loss` is computed in slices."""
    if model.full_logits_reason:
        return f"the loss needs memory for all logits: {model.full_logits_reason}"
    return "the loss is computed in slices, without the whole logits"


@torch.no_grad()
def _full_logits_reason(model: transformers.PreTrainedModel) -> str:
    """Returns why the loss of a model needs its whole logits; empty: the model's head and nothing else makes them.

    Three passes over a few tokens compare the model's own logits, the head after what the model returns without it,
    and large random logits in the place of the head's. In training mode, with the same random numbers for each pass.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its output layer is {type(head).__name__}, not a linear layer"
    head.forward = types.MethodType(_head_forward, head)
    head.substitute = None
    vocab_size, width = head.weight.shape
    ids = torch.arange(2, 2 + NUM_TOKENS)[None] % model.config.get_text_config().vocab_size
    test_weight = torch.randn(NUM_TEST_ROWS, width, generator=torch.Generator().manual_seed(0)) * TEST_SCALE
    test_bias = None if head.bias is None else test_weight[:, 0]
    columns = torch.arange(vocab_size) % NUM_TEST_ROWS

    def test_head(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, test_weight, test_bias)[..., columns]

    def run(substitute: Callable | None) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]), _head_as(head, substitute):
            torch.manual_seed(0)
            return model(input_ids=ids, use_cache=False).logits

    try:
        logits, hidden, changed = run(None), run(_identity), run(test_head)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        return f"it cannot compute without its output layer ({first_line(error)})"
    if hidden.shape[:-1] != logits.shape[:-1] or hidden.shape[-1] != width or logits.shape[-1] != vocab_size:
        return "its output layer is not the last one"
    for found, expected in ((logits, F.linear(hidden, head.weight, head.bias)), (changed, test_head(hidden))):
        if (found - expected).abs().max() > TOLERANCE * found.abs().max():
            return "it changes the logits after its output layer"
    return ""


def _head_forward(self: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    return self.substitute(hidden) if self.substitute else F.linear(hidden, self.weight, self.bias)


@contextmanager
def _head_as(head: nn.Linear, substitute: Callable | None) -> Iterator[None]:
    """Inside, the head of a model computes `substitute` of its input instead of the logits."""
    head.substitute = substitute
    try:
        yield
    finally:
        head.substitute = None


def _identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _inputs(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"} | {"use_cache": False}


def _evaluation_sums(
    predictions: torch.Tensor, head: nn.Linear | None, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if head:
        return chunked_evaluation_sums(predictions, head.weight, head.bias, labels)
    return _sum(predictions, labels), (predictions.argmax(-1) == labels).sum()  # the ignored label is never predicted


def _sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")


def _balance_loss(model: transformers.PreTrainedModel, outputs: transformers.utils.ModelOutput) -> torch.Tensor | int:
    """Returns the load-balancing loss per target, of a mixture of experts with output_router_logits; else 0."""
    if (balance := outputs.get("aux_loss")) is None:
        return 0
    config = model.config.get_text_config()
    name = "router_aux_loss_coef" if "router_aux_loss_coef" in config.to_dict() else "aux_loss_coef"  # of JetMoe
    return getattr(config, name) * balance
