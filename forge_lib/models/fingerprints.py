"""Hashes that show whether two models are the same."""

import json

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
    """Returns a 128-bit xxh3 hash of the model's configuration, without its path and the version of transformers."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return xxhash.xxh3_128(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
