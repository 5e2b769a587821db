"""Hashes that show whether two models are the same."""

import json
from typing import Any

import torch
import xxhash
from torch import nn


def hash_weights(model: nn.Module) -> str:
    """Returns a 128-bit xxh3 hash of the names and bytes of all parameters, on any device."""
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_config(model: nn.Module) -> str:
    """Returns a 128-bit xxh3 hash of the model's configuration.

    Its path, the version of transformers, and the dropout, which is a flag, do not count.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    content = json.dumps(_without_dropout(config), sort_keys=True, default=str)
    return xxhash.xxh3_128(content.encode()).hexdigest()


def dropout_names(config: dict[str, Any]) -> list[str]:
    """Returns the names of the probabilities of dropout in a model's configuration."""
    return [
        name
        for name, value in config.items()
        if (str(name).endswith("pdrop") or "dropout" in str(name)) and type(value) in (int, float)
    ]


def _without_dropout(config: dict[str, Any]) -> dict[str, Any]:
    parts = {name: _without_dropout(value) for name, value in config.items() if isinstance(value, dict)}
    return config | parts | dict.fromkeys(dropout_names(config), 0.0)
