"""Generates text with a trained model, and prints it token by token.

python scripts/generate.py --model-name runs/a/final --prompt "Once upon a time"
"""

import sys
from dataclasses import dataclass

import torch
import transformers

from forge_lib.config import BeginConfig, ModelNameConfig, RangeChecked, flag, seed_flag
from forge_lib.data.tokenizing import prompt_ids, vocabulary_size
from forge_lib.distributed.reporting import report_errors
from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from forge_lib.models.generation import generate_ids
from forge_lib.models.loading import load_tokenizer, load_trained_model, max_positions


@dataclass(kw_only=True)
class PromptConfig:
    """How the text is generated."""

    _argument_group_name = "text"

    prompt: str = flag("", "start of the text; empty: the start of a document", "TEXT")
    max_new_tokens: int = flag(
        200, "maximum number of tokens; the end-of-text token ends the text earlier", "TOKENS", at_least=1
    )
    temperature: float = flag(
        0.8, "0: always the likeliest token; 1: random, with the model's own probabilities", "T", at_least=0
    )
    top_p: float = flag(0.95, "choose among the likeliest tokens that together have this probability", "P", above=0)
    seed: int = seed_flag("seed of the random choice of tokens")


@dataclass(kw_only=True)
class GenerateConfig(RangeChecked, PromptConfig, BeginConfig, ModelNameConfig):
    """Every flag of this script."""

    def find_mistakes(self) -> list[str]:
        """Returns a line if --top-p is no probability."""
        return [f"--top-p is {self.top_p}, but must be at most 1"] if self.top_p > 1 else []


def main(config: GenerateConfig) -> str:
    """Prints the text while it is generated, and returns it."""
    tokenizer = load_tokenizer(config)
    model = load_trained_model(config, vocabulary_size(tokenizer))
    prompt = prompt_ids(tokenizer, config.prompt, config.begin_tokens)
    positions = max_positions(model)
    if positions and len(prompt) + config.max_new_tokens > positions:
        raise UserError(
            f"--max-new-tokens {config.max_new_tokens} after {len(prompt)} tokens of --prompt is more than the "
            f"model's {positions} positions; use {max(0, positions - len(prompt))} or less"
        )
    ids = generate_ids(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        prompt,
        tokenizer.eos_token_id,
        config.seed,
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        streamer=transformers.TextStreamer(tokenizer, skip_special_tokens=True),
    )
    return tokenizer.decode(ids, skip_special_tokens=True)


if __name__ == "__main__":
    with report_errors("generate.py"):
        main(parse_config(GenerateConfig, sys.argv[1:], description=__doc__))
