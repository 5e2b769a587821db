"""The model that is measured: the user's, or one of its kind with other sizes, with random weights."""

from pathlib import Path

import torch
import transformers

from forge_lib.config import TrainConfig
from forge_lib.models.loss import add_loss
from forge_lib.models.optimizers import build_optimizers


def sized_config(
    model_name: str, hidden_size: int, num_layers: int, trust_remote_code: bool
) -> transformers.PretrainedConfig:
    """Returns a model's configuration with another width and number of layers; 0 keeps its own."""
    config = transformers.AutoConfig.from_pretrained(model_name, trust_remote_code=trust_remote_code)
    for name, size in {"hidden_size": hidden_size, "num_hidden_layers": num_layers}.items():
        if size:
            setattr(config, name, size)
    return config


def make_model(
    config: transformers.PretrainedConfig,
) -> tuple[torch.nn.Module, list[torch.optim.Optimizer], dict[str, torch.Tensor]]:
    """Returns a model with random weights, its optimizers, and a batch of random tokens, [4, 128] int64."""
    model = add_loss(transformers.AutoModelForCausalLM.from_config(config))
    optimizers = build_optimizers(model, TrainConfig(model_name="-", dataset_path="-", output_dir="-"))
    ids = torch.randint(0, config.vocab_size, (4, 128))
    return model, optimizers, {"input_ids": ids, "labels": ids}


def write_model(config: transformers.PretrainedConfig, model_name: str, folder: Path) -> int:
    """Writes a model folder without weights, with the tokenizer of `model_name`; returns its number of parameters."""
    transformers.AutoTokenizer.from_pretrained(model_name).save_pretrained(folder)
    config.save_pretrained(folder)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config).num_parameters()
