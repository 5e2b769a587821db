"""Checks how a model computes, before it is trained: with two short forward passes, for every kind of model."""

import torch
from torch import nn

from forge_lib.errors import UserError, first_line

NUM_TOKENS = 8
TOLERANCE = 1e-4  # relative to the largest logit; causal models differ by 0, BERT by 1e-3 and more


@torch.no_grad()
def check_model(model: nn.Module, mask_documents: bool) -> bool:
    """Checks that no prediction depends on later tokens and, with `mask_documents`, none on another document.

    Args:
        model: with weights, on the CPU, not yet compiled.
        mask_documents: whether `position_ids` that restart at each document must separate documents.

    Returns:
        Whether the model changes its weights in evaluation mode, as RWKV does. If so, this check has changed them.

    Raises:
        UserError: the model is not causal, or --mask-documents has no effect on it.
    """
    was_training, kind = model.training, model.config.model_type
    versions = [parameter._version for parameter in model.parameters()]
    model.eval()
    try:
        _check(model, mask_documents)
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"the model (type {kind}) cannot compute {NUM_TOKENS} tokens: {first_line(error)}") from None
    model.train(was_training)
    return versions != [parameter._version for parameter in model.parameters()]


def _check(model: nn.Module, mask_documents: bool) -> None:
    kind = model.config.model_type
    ids = torch.arange(2, 2 + NUM_TOKENS)[None] % model.config.get_text_config().vocab_size
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    with torch.random.fork_rng(devices=[]):
        if not _are_close(_logits(model, ids)[:, :-1], _logits(model, changed)[:, :-1]):
            raise UserError(
                f"the model (type {kind}) predicts tokens from later ones, so it cannot learn to write text: expected "
                "a causal model. For some types, is_decoder: true in its config.json makes it causal"
            )
        if mask_documents and not _separates_documents(model, ids):
            raise UserError(f"--mask-documents has no effect on models of type {kind}; remove the flag")


def _separates_documents(model: nn.Module, ids: torch.Tensor) -> bool:
    """Returns whether a document that follows another one has the same logits as alone."""
    half = NUM_TOKENS // 2
    positions = (torch.arange(NUM_TOKENS) % half)[None]
    try:
        packed = _logits(model, ids, position_ids=positions)[:, half:]
    except TypeError:  # the model has no position_ids
        return False
    return _are_close(packed, _logits(model, ids[:, half:]))


def _logits(model: nn.Module, ids: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **options).logits


def _are_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * a.abs().max())
