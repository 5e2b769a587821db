"""Checks how a model computes, before it is trained: with two short forward passes, for every kind of model."""

import torch
from torch import nn

from forge_lib.errors import UserError, first_line

NUM_TOKENS = 8
CAUSAL_TOLERANCE = 5e-6  # relative to the largest logit: causal models differ by 0, mixtures of experts by up to 3e-7
DOCUMENT_TOLERANCE = 1e-4  # a document alone has other shapes, and so other rounding


@torch.no_grad()
def check_model(model: nn.Module, mask_documents: bool, sequence_length: int) -> bool:
    """Checks that no prediction depends on later tokens and, with `mask_documents`, none on another document.

    Args:
        model: with weights, on the CPU, not yet compiled.
        mask_documents: whether `position_ids` that restart at each document must separate documents.
        sequence_length: tokens per sequence in training, at least 2.

    Returns:
        Whether the model changes its weights in evaluation mode, as RWKV does. If so, this check has changed them.

    Raises:
        UserError: the model is not causal, its weights are not finite, or --mask-documents has no effect on it.
    """
    was_training = model.training
    versions = [parameter._version for parameter in model.parameters()]
    model.eval()
    ids = torch.arange(2, 2 + min(NUM_TOKENS, sequence_length))[None] % model.config.get_text_config().vocab_size
    with torch.random.fork_rng(devices=[]):
        try:
            _check_causal(model, ids)
            if mask_documents and not _separates_documents(model, ids):
                raise UserError(
                    f"--mask-documents has no effect on models of type {model.config.model_type}; remove the flag"
                )
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"the model (type {model.config.model_type}) cannot compute {ids.shape[1]} tokens: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from None
    model.train(was_training)
    return versions != [parameter._version for parameter in model.parameters()]


def check_gradient(model: nn.Module, flag: str) -> None:
    """Checks that a model can be trained after `flag` has changed it, with a backward pass over a few tokens.

    Raises:
        UserError: names the flag.
    """
    ids = torch.arange(2, 4)[None] % model.config.get_text_config().vocab_size
    try:
        with torch.random.fork_rng(devices=[]):
            model(input_ids=ids, use_cache=False).logits.sum().backward()
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{flag} does not work with {model.config.model_type} ({first_line(error)})") from None
    model.zero_grad(set_to_none=True)


def _check_causal(model: nn.Module, ids: torch.Tensor) -> None:
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % model.config.get_text_config().vocab_size
    before, after = (_logits(model, each)[:, :-1] for each in (ids, changed))
    if not torch.isfinite(before).all():
        raise UserError("the model's logits are not finite: its weights are damaged; copy them again")
    if not _are_close(before, after, CAUSAL_TOLERANCE):
        can_be_decoder = model.config.to_dict().get("is_decoder") is False
        hint = "; is_decoder: true in its config.json makes it causal" if can_be_decoder else ""
        raise UserError(
            f"the model (type {model.config.model_type}) predicts tokens from later ones, so it cannot learn to write "
            f"text: expected a causal model{hint}"
        )


def _separates_documents(model: nn.Module, ids: torch.Tensor) -> bool:
    """Returns whether a document that follows another one has the same logits as alone."""
    half = ids.shape[1] // 2
    positions = (torch.arange(2 * half) % half)[None]
    try:
        packed = _logits(model, ids[:, : 2 * half], position_ids=positions)[:, half:]
    except TypeError:  # the model has no position_ids
        return False
    return _are_close(packed, _logits(model, ids[:, half : 2 * half]), DOCUMENT_TOLERANCE)


def _logits(model: nn.Module, ids: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **options).logits


def _are_close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * a.abs().max())
