"""The loss of a causal language model on a batch, summed over its tokens."""

from __future__ import annotations  # names of transformers in signatures are not imported

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from forge_lib.config import IGNORED_LABEL


def loss_sum(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the cross entropy of each token given the tokens before it, summed over the batch, in nats.

    It equals transformers' own `model(input_ids, labels=labels).loss` times the number of targets. For a mixture of
    experts with output_router_logits in its configuration, that includes its load-balancing loss: that of each
    micro-batch counts by its targets, so it depends slightly on how the batch is divided.

    Args:
        model: a causal language model; its logits may have any float type, the loss is computed in fp32.
        batch: the model's inputs and `labels`, [sequences, tokens] int64 each, on the model's device; labels that are
            -100 do not count.

    Returns:
        A scalar, fp32.
    """
    outputs, labels = _forward(model, batch), batch["labels"]
    loss = _sum(*_predictions(outputs.logits, labels))
    if (balance := outputs.get("aux_loss")) is not None:  # of a mixture of experts with output_router_logits
        config = getattr(model, "module", model).config.get_text_config()  # DDP has the model as `module`
        name = "router_aux_loss_coef" if "router_aux_loss_coef" in config.to_dict() else "aux_loss_coef"  # of JetMoe
        loss = loss + getattr(config, name) * balance * (labels[:, 1:] != IGNORED_LABEL).sum()
    return loss


@torch.no_grad()
def evaluation_sums(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, int, int]:
    """Returns a batch's loss in nats, its number of targets, and how many of them are the likeliest prediction.

    The arguments are those of `loss_sum`.
    """
    logits, labels = _predictions(_forward(model, batch).logits, batch["labels"])
    num_correct = (logits.argmax(-1) == labels).sum()  # the ignored label is never predicted
    return _sum(logits, labels).item(), (labels != IGNORED_LABEL).sum().item(), num_correct.item()


def _forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> transformers.utils.ModelOutput:
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}, use_cache=False)


def _predictions(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits [predictions, vocabulary] in fp32 and the labels [predictions] that they predict."""
    return logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()


def _sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
