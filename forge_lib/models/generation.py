"""Tokens from a model."""

from __future__ import annotations  # names of transformers in signatures are not imported

import torch
import transformers

from forge_lib.models.evaluation_mode import evaluation_mode


def generate_ids(
    model: transformers.PreTrainedModel,
    prompt: list[int],
    end_id: int,
    seed: int,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    streamer: transformers.TextStreamer | None = None,
) -> list[int]:
    """Returns `prompt` and the tokens that the model generates after it. torch's random state does not change.

    Args:
        model: a causal language model.
        prompt: token ids, at least one.
        end_id: the end-of-text token, which ends the text.
        seed: of the random choice of tokens.
        max_new_tokens: maximum number of tokens after the prompt.
        temperature: 0 always takes the likeliest token.
        top_p: choose among the likeliest tokens that together have this probability.
        streamer: receives the tokens one by one.
    """
    inputs = torch.tensor([prompt], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        with evaluation_mode(model):
            output = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                eos_token_id=end_id,
                pad_token_id=end_id,
                use_cache=True,
                streamer=streamer,
                **(sampling if temperature else {"do_sample": False}),
            )
    return output[0].tolist()
