"""Loads tokenizers and models with transformers, and checks that they fit the data and the flags."""

from __future__ import annotations  # names of transformers in signatures are not imported

import functools
import inspect
import logging
import pickle
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
from forge_lib.models.activations import fuse_activations
from forge_lib.models.checking import check_gradient
from forge_lib.models.compilation import compile_model
from forge_lib.models.fingerprints import dropout_names
from forge_lib.models.loss import add_loss
from forge_lib.models.weight_files import (
    check_loaded_keys,
    check_no_pointers,
    check_weight_files,
    has_weights,
    name_some,
)

HUB_SECONDS = 5
logger = logging.getLogger("forge")


def load_tokenizer(config: ModelNameConfig) -> transformers.PreTrainedTokenizerBase:
    """Loads the tokenizer of `config.model_name`; raises UserError if there is none."""
    folder = Path(config.model_name).expanduser()
    if folder.is_dir():
        check_no_pointers(config.model_name, sorted([*folder.glob("*.json"), *folder.glob("*.model")]))
    tokenizer = _load(transformers.AutoTokenizer.from_pretrained, config)
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):  # what transformers makes of no files
        raise UserError(
            f"--model-name {config.model_name}: its tokenizer knows no text, only special tokens; expected the files "
            "of a tokenizer, such as tokenizer.json: copy them from where the model comes from"
        )
    return tokenizer


def load_trained_model(
    config: ModelNameConfig, vocab_size: int, sequence_length: int = 1
) -> transformers.PreTrainedModel:
    """Loads a model with its weights, in fp32 on the CPU, for evaluation and generation.

    Args:
        config: which model.
        vocab_size: largest token id of the tokenizer + 1.
        sequence_length: tokens per sequence.

    Raises:
        UserError: no such model, no weights, or too small a vocabulary or number of positions.
    """
    if not has_weights(config.model_name):
        check_weight_files(config.model_name)
        raise UserError(f"--model-name {config.model_name}: the folder has no weights; name a trained model")
    check_weight_files(config.model_name)
    model = _drop_unknown_use_cache(_load_weights(config)).eval()
    check_fit(model.config, vocab_size, sequence_length, _num_reserved_positions(model))
    fuse_activations(model)
    return add_loss(model)


def load_model(config: ModelConfig, vocab_size: int, sequence_length: int) -> transformers.PreTrainedModel:
    """Loads a model for training, in fp32 on the CPU; `adapt_model` then applies LoRA and the like.

    Its weights are the pretrained ones. If there are none, or with `from_scratch`, they are random, drawn from torch's
    global generator.

    Args:
        config: which model, and how it is trained.
        vocab_size: largest token id of the tokenizer + 1.
        sequence_length: tokens per sequence in training.

    Raises:
        UserError: no such model, weights that cannot be loaded, or too small a vocabulary or number of positions.
    """
    if not config.from_scratch:
        check_weight_files(config.model_name)
    model_config = _load(transformers.AutoConfig.from_pretrained, config)
    if type(model_config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not config.trust_remote_code:
        raise UserError(
            f"--model-name {config.model_name}: transformers has no causal language model of type "
            f"{model_config.model_type}; expected one such as gpt2 or llama"
        )
    check_fit(model_config, vocab_size, sequence_length)
    text_config = model_config.get_text_config()
    dropouts = dropout_names(text_config.to_dict())
    for name in dropouts:
        setattr(text_config, name, config.dropout)
    if config.dropout and not dropouts and not config.lora_rank:  # the adapters of LoRA have their own
        raise UserError(f"--dropout has no effect on models of type {model_config.model_type}; remove the flag")
    model_config.return_dict = True  # a few configurations turn it off
    if has_weights(config.model_name) and not config.from_scratch:
        model = _load_weights(config, config=model_config)
    else:
        model = _load(transformers.AutoModelForCausalLM.from_config, config, model_config, dtype=torch.float32)
    check_fit(model.config, vocab_size, sequence_length, _num_reserved_positions(model))
    fuse_activations(model)
    return add_loss(_drop_unknown_use_cache(model).train())


def adapt_model(model: transformers.PreTrainedModel, config: ModelConfig) -> nn.Module:
    """Applies gradient checkpointing, LoRA and torch.compile, as configured.

    Raises:
        UserError: one of them does not work with this model.
    """
    kind = model.config.model_type
    if config.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"--gradient-checkpointing does not work with {kind} ({first_line(error)})") from None
        check_gradient(model, "--gradient-checkpointing")
    if config.lora_rank:
        try:
            model = _add_lora(model, config)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"--lora-rank does not work with {kind} ({first_line(error)})") from None
        check_gradient(model, "--lora-rank")
    if config.compile:
        compile_model(model)
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


def max_positions(model: transformers.PreTrainedModel) -> int | None:
    """Returns how many tokens a model can process; None if its configuration sets no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions - _num_reserved_positions(model) if positions and positions > 0 else None  # XLNet has -1


def check_fit(
    model_config: transformers.PreTrainedConfig, vocab_size: int, sequence_length: int, num_reserved: int = 0
) -> None:
    """Raises UserError if a model has too few positions for the sequences, or too few tokens for the tokenizer.

    Args:
        model_config: of a causal language model.
        vocab_size: largest token id of the tokenizer + 1.
        sequence_length: tokens per sequence.
        num_reserved: positions that the model does not use for tokens.
    """
    text_config = model_config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions and 0 < positions < sequence_length + num_reserved:
        usable = positions - num_reserved
        raise UserError(
            f"--sequence-length {sequence_length} is longer than the model's {usable} positions; "
            f"use --sequence-length {usable} or less"
        )
    if text_config.vocab_size < vocab_size:
        raise UserError(
            f"--model-name: the tokenizer knows {vocab_size} tokens, but the model's vocabulary has "
            f"{text_config.vocab_size}; the two do not belong together: remove tokens that were added to the "
            f"tokenizer, or resize the model's embeddings to {vocab_size} and save it"
        )


def _num_reserved_positions(model: nn.Module) -> int:
    """Returns how many positions a model reserves for padding: RoBERTa numbers its tokens from padding_idx + 1."""
    for name, module in model.named_modules():
        is_table = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if is_table and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _load_weights(config: ModelNameConfig, /, **options: Any) -> transformers.PreTrainedModel:
    """Loads a model with its weights; raises UserError if they are damaged, or some of them are in no file."""

    def load(**options: Any) -> tuple[transformers.PreTrainedModel, dict]:
        try:
            return transformers.AutoModelForCausalLM.from_pretrained(**options)
        except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, KeyError) as error:
            raise UserError(
                f"--model-name {config.model_name}: the weights are damaged, or do not fit config.json "
                f"({first_line(error)}); copy them again, or give --from-scratch for random weights"
            ) from None

    # Tensors of another shape are reported below; otherwise the error would name neither them nor the shapes.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    model, found = _load(load, config, **options)
    for name, in_file, in_model in list(found["mismatched_keys"])[:1]:
        raise UserError(
            f"--model-name {config.model_name}: the weights do not fit config.json: {name} has the shape "
            f"{list(in_file)}, expected {list(in_model)}; correct it, or give --from-scratch for random weights"
        )
    missing, unexpected = set(found["missing_keys"]), set(found["unexpected_keys"])
    check_loaded_keys(config.model_name, missing, unexpected, type(model).__name__)
    if unexpected:
        logger.warning(f"the model does not use {len(unexpected)} tensor(s) of its weights: {name_some(unexpected)}")
    return model


def _drop_unknown_use_cache(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Lets a model without the argument `use_cache` ignore it, since all others need it."""
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" not in parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):

        def drop(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {name: value for name, value in kwargs.items() if name != "use_cache"}

        model.register_forward_pre_hook(drop, with_kwargs=True)
    return model


def _load(loader: Callable[..., Any], config: ModelNameConfig, /, *args: Any, **options: Any) -> Any:
    """Calls a function of transformers that loads a model or a part; raises UserError if it cannot be loaded."""
    source = {"trust_remote_code": config.trust_remote_code} if args else _find_model(config)
    try:
        return loader(*args, **source, **options)
    except UserError:
        raise
    except Exception as error:  # whatever the libraries raise for a wrong file
        offline = "; the Hub cannot be reached from this machine" if source.get("local_files_only") else ""
        raise UserError(
            f"--model-name {config.model_name}: neither a local model folder nor a model on the Hub that can be "
            f"loaded{offline} ({type(error).__name__}: {first_line(error)})"
        ) from None


def _find_model(config: ModelNameConfig) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` for a model; raises UserError if its path does not exist."""
    name = config.model_name
    path = Path(name).expanduser()
    options = {"trust_remote_code": config.trust_remote_code}
    if path.suffix == ".gguf" and path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, **options}
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise UserError(
                f"--model-name {name}: the folder has a LoRA adapter without its model; name a folder in which it is "
                "merged into the weights, such as final/ of a run"
            )
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
