"""Tokenizer, model, loss, optimizers, learning rates: thin helpers over transformers, peft and torch.optim."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import xxhash
from huggingface_hub import constants, get_session, try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from forge_lib import disk
from forge_lib.config import ModelConfig, ModelNameConfig, OptimizationConfig
from forge_lib.errors import UserError

IGNORED = -100  # the label that the loss leaves out
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.gguf")


def _source(config: ModelNameConfig) -> dict:
    """Where a model comes from, as arguments of `from_pretrained`.

    Raises:
        UserError: a local name without a model, or a Hub name where neither the Hub nor a cached copy is at hand.
    """
    name = config.model_name
    path = Path(name).expanduser()
    options = {"trust_remote_code": config.trust_remote_code}
    if path.suffix == ".gguf" and path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, **options}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model-name {name}: the folder holds no config.json; expected a model folder")
        return {"pretrained_model_name_or_path": str(path), **options}
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"--model-name {name}: no such file or folder")
    return {"pretrained_model_name_or_path": name, "local_files_only": not _hub_answers(), **options}


@functools.cache
def _hub_answers() -> bool:
    """One quick request: the libraries above try for most of a minute before they give up."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whichever HTTP library is below decides its type: no name, no route, proxy, certificate
        return False
    return True


def _load(loader: Callable, config: ModelNameConfig, /, **options):
    source = _source(config)
    try:
        return loader(**source, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        offline = "; the Hub cannot be reached from here" if source.get("local_files_only") else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--model-name {config.model_name}: neither a model folder here nor a model of the Hub that can be "
            f"loaded{offline} ({reason})"
        ) from None


def load_tokenizer(config: ModelNameConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of `config.model_name`; UserError where there is none."""
    return _load(AutoTokenizer.from_pretrained, config)


def is_here(model_name: str) -> bool:
    """Tells whether a model lies on this machine, or is one of the Hub that can be had here."""
    path = Path(model_name).expanduser()
    if path.exists() or path.suffix == ".gguf":
        return True
    is_path = path.is_absolute() or model_name.startswith((".", "~")) or model_name.count("/") > 1
    return not is_path and (isinstance(try_to_load_from_cache(model_name, "config.json"), str) or _hub_answers())


def has_weights(model_name: str) -> bool:
    """Tells whether a model comes with weights: a local folder may hold a config and a tokenizer alone."""
    path = Path(model_name).expanduser()
    return not path.is_dir() or any(any(path.glob(pattern)) for pattern in WEIGHT_FILES)


def load_trained_model(config: ModelNameConfig) -> PreTrainedModel:
    """Loads a model with its weights, in fp32, for evaluation and generation.

    Raises:
        UserError: no such model, or a folder without weights.
    """
    if not has_weights(config.model_name):
        raise UserError(f"--model-name {config.model_name}: the folder holds no weights; name a trained model")
    return _load(AutoModelForCausalLM.from_pretrained, config, dtype=torch.float32).eval()


def check_positions(model_config: PreTrainedConfig, sequence_length: int) -> None:
    """Raises UserError where the model has no positions for sequences so long."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions and sequence_length > positions:
        raise UserError(
            f"--sequence-length {sequence_length} is longer than the model's {positions} positions; "
            f"use --sequence-length {positions} or less"
        )


def load_model(config: ModelConfig, vocab_size: int, sequence_length: int) -> PreTrainedModel:
    """Loads the model on the CPU in fp32, ready for training.

    Its weights are the pretrained ones or, where there are none or with `from_scratch`, drawn from torch's global
    random generator. With `lora_rank` its weights are frozen and adapters added to all linear layers.

    Args:
        config: which model, and how it is trained.
        vocab_size: how many tokens the tokenizer knows.
        sequence_length: tokens per sequence that it will be given.

    Raises:
        UserError: no such model; a vocabulary or a number of positions that is too small.
    """
    model_config = _load(AutoConfig.from_pretrained, config)
    text_config = model_config.get_text_config()
    check_positions(model_config, sequence_length)
    if text_config.vocab_size < vocab_size:
        raise UserError(
            f"--model-name {config.model_name}: the tokenizer knows {vocab_size} tokens, but the model's vocabulary "
            f"has {text_config.vocab_size}; the two do not belong together"
        )
    for name, value in text_config.to_dict().items():
        if (name.endswith("pdrop") or "dropout" in name) and isinstance(value, float):
            setattr(text_config, name, config.dropout)
    if has_weights(config.model_name) and not config.from_scratch:
        model = _load(AutoModelForCausalLM.from_pretrained, config, config=model_config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=torch.float32, trust_remote_code=config.trust_remote_code
        )
    model.train()
    if config.gradient_checkpointing:
        model.config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora_rank:
        model = _add_lora(model, config)
    if config.compile:
        model.compile()  # in place: names and types of the model's parts stay as they are
    return model


def _add_lora(model: PreTrainedModel, config: ModelConfig) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("--lora-rank needs the package peft: pip install 'p2p-llm-forge[peft]'") from None

    model.enable_input_require_grads()  # frozen embeddings would cut the graph under gradient checkpointing
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.dropout,
            target_modules="all-linear",
        ),
    )


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the sum, in nats, of the cross entropy of each token given those before it.

    It equals transformers' own `model(input_ids, labels=labels).loss` times the number of targets.

    Args:
        logits: [batch, sequence, vocabulary], any float type; computed on in fp32.
        labels: [batch, sequence] int64; -100 is left out.

    Returns:
        A scalar, fp32.
    """
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def build_optimizers(model: nn.Module, config: OptimizationConfig) -> list[torch.optim.Optimizer]:
    """Returns the optimizers of the trainable parameters: one or, for Muon, Muon and AdamW.

    Weight decay acts on matrices only (not on biases, norms and other vectors). Muon takes the matrices between the
    embeddings and the output layer, with updates scaled to the size of AdamW's, so that both share one learning rate.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for p in trainable.values() if p.ndim >= 2]
    vectors = [p for p in trainable.values() if p.ndim < 2]

    def groups(decayed: list[nn.Parameter]) -> list[dict]:
        pairs = [(decayed, config.weight_decay), (vectors, 0.0)]
        return [{"params": params, "weight_decay": decay} for params, decay in pairs if params]

    lr = config.learning_rate
    if config.optimizer == "adafactor":
        return [torch.optim.Adafactor(groups(matrices), lr=lr)]
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(groups(matrices), lr=lr, betas=(0.9, 0.95), fused=True)]
    outer = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    outer |= {id(p) for name, p in trainable.items() if "lm_head" in name or "embed_out" in name}
    hidden = [p for p in matrices if id(p) not in outer and p.ndim == 2]
    rest = [p for p in matrices if id(p) in outer or p.ndim != 2]
    if not hidden:
        raise UserError("--optimizer muon: the model has no matrix between its embeddings and its output; use adamw")
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    others = groups(rest)
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), fused=True)] if others else [muon]


def learning_rate_schedule(config: OptimizationConfig, num_steps: int) -> Callable[[int], float]:
    """Returns the learning rate as a pure function of the step (from 0), by transformers' schedule of that name."""
    specific = {}
    if config.lr_scheduler == "warmup_stable_decay":
        specific["num_decay_steps"] = config.decay_steps or max(1, num_steps // 5)
        if config.warmup_steps + specific["num_decay_steps"] > num_steps:
            raise UserError(
                f"--warmup-steps {config.warmup_steps} and --decay-steps {specific['num_decay_steps']} do not fit "
                f"into a run of {num_steps} steps"
            )
    elif config.lr_scheduler == "cosine_with_min_lr":
        specific["min_lr_rate"] = 0.1
    bearer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    scheduler = get_scheduler(config.lr_scheduler, bearer, config.warmup_steps, num_steps, specific)
    factor = scheduler.lr_lambdas[0]
    return lambda step: config.learning_rate * factor(step)


def hash_weights(model: nn.Module) -> str:
    """Returns a 128-bit xxh3 hash over names and bytes of all parameters, wherever they lie."""
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_config(model: nn.Module) -> str:
    """Returns a hash over the model's configuration, apart from where it came from."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return xxhash.xxh3_128(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


@torch.no_grad()
def check_document_mask(model: nn.Module) -> None:
    """Raises UserError where the model does not keep documents apart by `position_ids` that begin anew.

    It compares a document's logits behind another document with its logits alone.
    """
    was_training = model.training
    model.eval()
    ids = torch.arange(2, 10)[None] % model.config.get_text_config().vocab_size
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    try:
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:]
        apart = torch.allclose(packed, model(input_ids=ids[:, 4:], use_cache=False).logits, atol=1e-4, rtol=1e-3)
    except TypeError:  # it takes no position_ids
        apart = False
    model.train(was_training)
    if not apart:
        raise UserError(f"--mask-documents has no effect on models of type {model.config.model_type}; leave it out")


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    seed: int,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    streamer=None,
) -> str:
    """Returns `prompt` and what the model writes after it; the global random state stays as it was.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: may be empty: then the text begins as a document does.
        seed: of the drawing of tokens.
        max_new_tokens: at the most so many; the end-of-text token ends it sooner.
        temperature: 0 takes the likeliest token each time.
        top_p: draw from the likeliest tokens that hold this much probability.
        streamer: a transformers streamer that is given the tokens as they come.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    inputs = torch.tensor([ids], device=model.device)
    draw = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
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
            **(draw if temperature else {"do_sample": False}),
        )
    model.train(was_training)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def save_final(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, facts: dict) -> None:
    """Writes a HuggingFace model folder: weights, config, tokenizer, generation config and a model card.

    LoRA adapters are saved in `adapter/` below it and then merged into the weights.

    Args:
        model: the unwrapped model; LoRA adapters are merged in place.
        tokenizer: its tokenizer.
        folder: is written whole under another name first, and takes the place of an older one.
        facts: what the model card says of the run.
    """
    folder = folder.resolve() if folder.is_symlink() else folder  # the link stays
    disk.restore(folder)
    partial = disk.partial_path(folder)
    disk.remove(partial)
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(partial / "adapter")
        model = model.merge_and_unload()
    model.config.use_cache = True
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", "# Model card", ""]
    lines += ["Trained with P2P-LLM-Forge, data-parallel, with HuggingFace Accelerate.", ""]
    lines += ["```json", json.dumps(facts, indent=2, ensure_ascii=False), "```"]
    (partial / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    disk.flush_all(partial)
    disk.place(folder)
