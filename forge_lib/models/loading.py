"""Loads tokenizers and models with transformers, and checks that they fit the data and the flags."""

from __future__ import annotations  # names of transformers in signatures are not imported

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import nn

from forge_lib.config import ModelConfig, ModelNameConfig
from forge_lib.errors import UserError, first_line

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
HUB_SECONDS = 5


def load_tokenizer(config: ModelNameConfig) -> transformers.PreTrainedTokenizerBase:
    """Loads the tokenizer of `config.model_name`; raises UserError if there is none."""
    return _load(transformers.AutoTokenizer.from_pretrained, config)


def load_trained_model(config: ModelNameConfig) -> transformers.PreTrainedModel:
    """Loads a model with its weights, in fp32 on the CPU, for evaluation and generation.

    Raises:
        UserError: no such model, or a folder without weights.
    """
    if not has_weights(config.model_name):
        raise UserError(f"--model-name {config.model_name}: the folder has no weights; name a trained model")
    return _load(transformers.AutoModelForCausalLM.from_pretrained, config, dtype=torch.float32).eval()


def load_model(config: ModelConfig, vocab_size: int, sequence_length: int) -> transformers.PreTrainedModel:
    """Loads a model for training, in fp32 on the CPU.

    Its weights are the pretrained ones. If there are none, or with `from_scratch`, they are random, drawn from torch's
    global generator. With `lora_rank`, the weights are frozen and adapters are added to all linear layers.

    Args:
        config: which model, and how it is trained.
        vocab_size: number of tokens in the tokenizer's vocabulary.
        sequence_length: tokens per sequence in training.

    Raises:
        UserError: no such model, or its vocabulary or number of positions is too small.
    """
    model_config = _load(transformers.AutoConfig.from_pretrained, config)
    check_positions(model_config, sequence_length)
    text_config = model_config.get_text_config()
    if text_config.vocab_size < vocab_size:
        raise UserError(
            f"--model-name {config.model_name}: the tokenizer knows {vocab_size} tokens, but the model's vocabulary "
            f"has {text_config.vocab_size}; the two do not belong together"
        )
    for name, value in text_config.to_dict().items():
        if (name.endswith("pdrop") or "dropout" in name) and isinstance(value, float):
            setattr(text_config, name, config.dropout)
    auto_model = transformers.AutoModelForCausalLM
    if has_weights(config.model_name) and not config.from_scratch:
        model = _load(auto_model.from_pretrained, config, config=model_config, dtype=torch.float32)
    else:
        options = {"dtype": torch.float32, "trust_remote_code": config.trust_remote_code}
        model = auto_model.from_config(model_config, **options)
    model.train()
    if config.gradient_checkpointing:
        model.config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora_rank:
        model = _add_lora(model, config)
    if config.compile:
        model.compile()  # in place: the names and types of the model's parts do not change
    return model


def _add_lora(model: transformers.PreTrainedModel, config: ModelConfig) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise UserError("--lora-rank needs the package peft: pip install 'p2p-llm-forge[peft]'") from None

    model.enable_input_require_grads()  # with gradient checkpointing, frozen embeddings would cut the graph
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear",
    )
    return peft.get_peft_model(model, lora)


def model_exists(model_name: str) -> bool:
    """Returns whether a model is on this machine, in the Hub's cache, or on a Hub that this machine can reach."""
    path = Path(model_name).expanduser()
    if path.exists() or path.suffix == ".gguf":
        return True
    if _is_path(model_name):
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model_name, "config.json"), str) or _is_hub_reachable()


def has_weights(model_name: str) -> bool:
    """Returns whether a model comes with weights: a local folder may have only a config and a tokenizer."""
    path = Path(model_name).expanduser()
    return not path.is_dir() or any(any(path.glob(pattern)) for pattern in WEIGHT_FILES)


def check_positions(model_config: transformers.PreTrainedConfig, sequence_length: int) -> None:
    """Raises UserError if the sequences are longer than the model's positions."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions and sequence_length > positions:
        raise UserError(
            f"--sequence-length {sequence_length} is longer than the model's {positions} positions; "
            f"use --sequence-length {positions} or less"
        )


@torch.no_grad()
def check_document_mask(model: nn.Module) -> None:
    """Raises UserError if `position_ids` that restart at each document do not separate documents in this model.

    It compares the logits of a document that follows another one with its logits alone.
    """
    was_training = model.training
    model.eval()
    ids = torch.arange(2, 10)[None] % model.config.get_text_config().vocab_size
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    try:
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:]
        alone = model(input_ids=ids[:, 4:], use_cache=False).logits
        is_separate = torch.allclose(packed, alone, atol=1e-4, rtol=1e-3)
    except TypeError:  # the model has no position_ids
        is_separate = False
    model.train(was_training)
    if not is_separate:
        raise UserError(f"--mask-documents has no effect on models of type {model.config.model_type}; remove the flag")


def _load(loader: Callable[..., Any], config: ModelNameConfig, /, **options: Any) -> Any:
    """Calls a `from_pretrained` function of transformers; raises UserError if the model cannot be loaded."""
    source = _find_model(config)
    try:
        return loader(**source, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        offline = "; the Hub cannot be reached from this machine" if source.get("local_files_only") else ""
        raise UserError(
            f"--model-name {config.model_name}: neither a local model folder nor a model on the Hub that can be "
            f"loaded{offline} ({first_line(error)})"
        ) from None


def _find_model(config: ModelNameConfig) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` for a model; raises UserError if its path does not exist."""
    name = config.model_name
    path = Path(name).expanduser()
    options = {"trust_remote_code": config.trust_remote_code}
    if path.suffix == ".gguf" and path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, **options}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model-name {name}: the folder has no config.json; expected a model folder")
        return {"pretrained_model_name_or_path": str(path), **options}
    if path.suffix == ".gguf" or _is_path(name):
        raise UserError(f"--model-name {name}: no such file or folder")
    return {"pretrained_model_name_or_path": name, "local_files_only": not _is_hub_reachable(), **options}


def _is_path(model_name: str) -> bool:
    """Returns whether a name can only be a path: the Hub's names have one slash at most."""
    is_path = Path(model_name).expanduser().is_absolute() or model_name.startswith((".", "~"))
    return is_path or model_name.count("/") > 1


@functools.cache
def _is_hub_reachable() -> bool:
    """Sends the Hub one request with a short timeout; transformers would retry for most of a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    from huggingface_hub import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # its type depends on the HTTP library: no name, no route, proxy, certificate
        return False
    return True
