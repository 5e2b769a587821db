"""Writes text with a trained model, token by token, to the terminal.

python scripts/generate.py --model-name runs/a/final --prompt "Once upon a time"
"""

import sys
from dataclasses import dataclass

import torch
from transformers import TextStreamer

from forge_lib.config import ModelNameConfig, flag
from forge_lib.distributed.peers import report_errors
from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from forge_lib.models import model as models


@dataclass(kw_only=True)
class TextConfig:
    """How the text is drawn."""

    _argument_group_name = "text"

    prompt: str = flag("", "what the text begins with; empty for the beginning of a document", "TEXT")
    max_new_tokens: int = flag(200, "at the most so many; the end-of-text token ends it sooner", "TOKENS")
    temperature: float = flag(0.8, "0 takes the likeliest token each time, 1 draws as the model says", "T")
    top_p: float = flag(0.95, "draw from the likeliest tokens that hold this much probability", "P")
    seed: int = flag(0, "another seed, another text", "SEED")


@dataclass(kw_only=True)
class GenerateConfig(TextConfig, ModelNameConfig):
    """Everything that this script reads."""

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise UserError(
                f"expected --temperature of 0 or more, --top-p above 0 and up to 1, --max-new-tokens of 1 or more; "
                f"found {self.temperature}, {self.top_p}, {self.max_new_tokens}"
            )


def main(config: GenerateConfig) -> str:
    """Prints the text as it comes, and returns it."""
    tokenizer = models.load_tokenizer(config)
    model = models.load_trained_model(config).to("cuda" if torch.cuda.is_available() else "cpu")
    return models.generate_text(
        model,
        tokenizer,
        config.prompt,
        config.seed,
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )


if __name__ == "__main__":
    with report_errors("generate.py"):
        main(parse_config(GenerateConfig, sys.argv[1:], description=__doc__))
