"""Attention between the tokens of a document alone, without a [sequence x sequence] mask.

transformers masks packed documents with a dense boolean matrix, and scaled dot-product attention then computes all of
it. Here each document is attended to on its own, with the causal kernel: less memory, and less to compute. For CPUs;
GPUs have kernels for masks, and would wait for the lengths of the documents.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_documents"
TOLERANCE = 1e-4  # relative to the largest logit


def use_document_attention(model: PreTrainedModel) -> bool:
    """Lets a model on the CPU attend to each document alone, if its logits stay the same; returns whether it does.

    Documents are told by `position_ids` that start again at 0.
    """
    before = model.config._attn_implementation
    if before != "sdpa" or not model._can_set_attn_implementation():
        return False
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 0]])
    ids = torch.arange(2, 2 + positions.numel()).view_as(positions) % model.config.get_text_config().vocab_size

    @torch.no_grad()
    def logits() -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model(input_ids=ids, position_ids=positions, use_cache=False).logits

    try:
        expected = logits()
        model.set_attn_implementation(NAME)
        if (logits() - expected).abs().max() <= TOLERANCE * expected.abs().max():
            return True
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
        pass
    model.set_attn_implementation(before)
    return False


def documents_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """Returns where documents start, [batch, sequence] bool, instead of a mask; for anything else sdpa's mask."""
    is_packed = q_length == kv_length > 1 and q_offset == kv_offset and not allow_is_causal_skip
    has_window = local_size is not None and local_size < q_length
    if not is_packed or attention_mask is not None or has_window or use_vmap:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip, use_vmap=use_vmap, device=device, **kwargs,
        )  # fmt: skip
    rows, places = torch.arange(batch_size, device=device)[:, None], torch.arange(1, q_length, device=device)[None]
    continues = mask_function(rows, rows.new_zeros(()), places, places - 1)
    return torch.cat([continues.new_ones(batch_size, 1), ~continues.expand(batch_size, -1)], dim=1)


@torch.compiler.disable  # the number of documents differs from batch to batch
def documents_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Returns causal attention, [batch, sequence, heads, width], between the tokens of each document.

    Args:
        module: the layer.
        query: [batch, heads, sequence, width].
        key, value: [batch, key and value heads, sequence, width].
        attention_mask: from `documents_mask`; a mask of sdpa, or None, is passed on to sdpa.
        dropout, scaling, kwargs: of transformers' attention functions.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError("softcap and position_bias need a mask")
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    rows = []
    for number, starts in enumerate(attention_mask):
        edges = [*starts.nonzero()[:, 0].tolist(), len(starts)]
        lengths = [stop - start for start, stop in itertools.pairwise(edges)]
        parts = zip(*(tensor[number].split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
        rows.append(
            torch.cat(
                [
                    F.scaled_dot_product_attention(
                        *(each[None] for each in part), dropout_p=dropout, scale=scaling, is_causal=True
                    )
                    for part in parts
                ],
                dim=2,
            )
        )
    return torch.cat(rows).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, documents_attention)
AttentionMaskInterface.register(NAME, documents_mask)
