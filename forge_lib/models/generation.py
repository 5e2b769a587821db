"""Text from a model."""

from __future__ import annotations  # names of transformers in signatures are not imported

import torch
import transformers


def generate_text(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: str,
    seed: int,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    streamer: transformers.TextStreamer | None = None,
) -> str:
    """Returns `prompt` and the text that the model generates after it. torch's random state does not change.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: empty: the text starts like a document.
        seed: of the random choice of tokens.
        max_new_tokens: maximum number of tokens; the end-of-text token ends the text earlier.
        temperature: 0 always takes the likeliest token.
        top_p: choose among the likeliest tokens that together have this probability.
        streamer: receives the tokens one by one.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    inputs = torch.tensor([ids], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    was_training = model.training
    model.eval()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            use_cache=True,
            streamer=streamer,
            **(sampling if temperature else {"do_sample": False}),
        )
    model.train(was_training)
    return tokenizer.decode(output[0], skip_special_tokens=True)
