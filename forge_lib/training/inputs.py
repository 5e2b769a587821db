"""The inputs of a run: tokenizer, model, data and batch plan, the same on all processes."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator

from forge_lib.config import TrainConfig, flag_name
from forge_lib.data.batches import BatchPlan
from forge_lib.data.blocks import BlockDataset, TokenStream, split_documents
from forge_lib.data.corpus import begins_documents, describe_store, prepare_store
from forge_lib.data.files import data_exists
from forge_lib.data.token_store import TokenStore, is_store, open_store, received_folder, verify_store
from forge_lib.data.tokenizing import prompt_ids, splitting_fingerprint, tokenizer_fingerprint, vocabulary_size
from forge_lib.distributed.agreement import compare_inputs, describe_world
from forge_lib.distributed.facts import InputFacts
from forge_lib.errors import UserError
from forge_lib.models.checking import check_model
from forge_lib.models.compilation import prepare_compiler
from forge_lib.models.document_attention import use_document_attention
from forge_lib.models.fingerprints import hash_config, hash_weights
from forge_lib.models.loading import adapt_model, load_model, load_tokenizer, max_positions, model_exists
from forge_lib.models.loss import describe_loss
from forge_lib.models.weight_files import has_weights
from forge_lib.training.balance import Balancer
from forge_lib.training.fetch import fetch
from forge_lib.training.gradient_sync import allow_unused_parameters
from forge_lib.training.log import describe_batches
from forge_lib.training.session import Session
from forge_lib.training.unused_flags import flags_without_effect

logger = logging.getLogger("forge")

# A checkpoint can only be continued with the same values of these flags.
FIXED_FLAGS = (
    "lora_rank",
    "lora_alpha",
    "batch_size",
    "sequence_length",
    "mask_documents",
    "eval_fraction",
    "optimizer",
    "seed",
)


@dataclass(frozen=True)
class Inputs:
    """What a run trains, and on what.

    Attributes:
        tokenizer, model: as loaded; the model is on the CPU, in fp32.
        store: the tokens to train on.
        eval_store: the store of the held-out tokens; may be the same one.
        dataset, eval_dataset: blocks to train on, and held-out blocks if there are any.
        plan: which blocks each step takes.
        identity: what must not change when a run is continued, for `state.json`.
        warnings: harmless differences between the machines, for the log.
        notes: which files were read, and whether the weights are random, for the log.
        changes_in_evaluation: whether the model changes its weights in evaluation mode.
    """

    tokenizer: "transformers.PreTrainedTokenizerBase"
    model: torch.nn.Module
    store: TokenStore
    eval_store: TokenStore
    dataset: BlockDataset
    eval_dataset: BlockDataset | None
    plan: BatchPlan
    identity: dict
    warnings: list[str]
    notes: list[str]
    changes_in_evaluation: bool

    @property
    def eval_tokens_per_byte(self) -> float:
        """Tokens of the held-out text per byte of it."""
        return self.eval_store.manifest["num_tokens"] / self.eval_store.manifest["num_text_bytes"]


@dataclass(frozen=True)
class HeldStore:
    """The fingerprint of a process's token store ("": it has none), and whether the flag names a store, not text."""

    fingerprint: str
    is_store: bool


def load_inputs(session: Session, accelerator: Accelerator) -> Inputs:
    """Loads model and data, from another machine if this one lacks them. Call on all processes.

    Args:
        session, accelerator: the processes.

    Raises:
        UserError: something cannot be loaded, or the machines have loaded different models or data.
    """
    config, peers = session.config, session.peers
    peers.set_status("loading the model")
    fetch_model(session)
    tokenizer = load_tokenizer(config)
    model, changes_in_evaluation = _load_model(session, tokenizer)
    allow_unused_parameters(accelerator, model)
    store = eval_store = fetch_store(session, "dataset_path", tokenizer)
    if config.eval_dataset_path:
        eval_store = fetch_store(session, "eval_dataset_path", tokenizer)
    if config.sample_every:
        _check_prompt(config, model, tokenizer, store)
    dataset, eval_dataset = make_datasets(config, store, eval_store)
    plan = BatchPlan.of_run(len(dataset), config.batch_size, config.max_steps, config.epochs, config.seed)
    peers.set_status("hashing the model")
    is_random = config.from_scratch or not has_weights(config.model_name)
    weights = hash_weights(model)
    facts = InputFacts(
        host=peers.host,
        weights=weights,
        random_weights=is_random,
        fingerprints={
            "--dataset-path": store.fingerprint,
            "--eval-dataset-path": eval_store.fingerprint if eval_dataset else "none",
            "model configuration": hash_config(model),
            "kind of initial weights": "random" if is_random else "pretrained",
            "tokenizer": tokenizer_fingerprint(tokenizer),
        },
    )
    warnings = compare_inputs(peers.all_gather(facts, "inputs"))
    identity = describe_identity(config, model, store, tokenizer) | {
        "initial_weights": "random" if is_random else weights
    }
    notes = ["random weights" + (" (--from-scratch)" if config.from_scratch else ": the model folder has none")]
    notes = (notes if is_random else []) + [describe_loss(model)] + describe_store(store, tokenizer, config)
    if eval_store is not store:
        eval_data = dataclasses.replace(config, dataset_path=config.eval_dataset_path, eval_dataset_path="")
        notes += describe_store(eval_store, tokenizer, eval_data)
    return Inputs(
        tokenizer,
        model,
        store,
        eval_store,
        dataset,
        eval_dataset,
        plan,
        identity,
        warnings,
        notes,
        changes_in_evaluation,
    )


def _load_model(session: Session, tokenizer: transformers.PreTrainedTokenizerBase) -> tuple[torch.nn.Module, bool]:
    """Returns the model of the run, and whether its weights or buffers change in evaluation mode."""
    config = session.config
    compiler = prepare_compiler(session.device) if config.compile else None
    model = _load_seeded(session, tokenizer)
    changes_in_evaluation = check_model(model, config.mask_documents, config.sequence_length)
    if changes_in_evaluation:  # the check has changed it
        model = _load_seeded(session, tokenizer)
    if compiler:
        compiler.join()
    return adapt_model(model, config), changes_in_evaluation


def _check_prompt(
    config: TrainConfig, model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, store: TokenStore
) -> None:
    """Raises UserError if the prompt of the samples leaves no position for a token after it."""
    length, positions = len(prompt_ids(tokenizer, config.sample_prompt, begins_documents(store))), max_positions(model)
    if positions and length >= positions:
        raise UserError(
            f"--sample-prompt has {length} tokens; the model's {positions} positions leave no room for more"
        )


def _load_seeded(session: Session, tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedModel:
    config = session.config
    torch.manual_seed(config.seed)
    model = load_model(config, vocabulary_size(tokenizer), config.sequence_length)
    if config.mask_documents and session.device == "cpu" and not use_document_attention(model):
        logger.info("--mask-documents needs a mask of sequence x sequence numbers for this model")
    return model


def fetch_model(session: Session) -> None:
    """Fetches the model folder if this machine lacks it and another one has it. Call on all processes."""
    if any(process.has["model_name"] for process in session.agreement.processes):
        folder = Path(session.config.model_name).expanduser()
        fetch(session, "the model", folder if model_exists(session.config.model_name) else None, folder)


def fetch_store(session: Session, field: str, tokenizer: "transformers.PreTrainedTokenizerBase") -> TokenStore:
    """Opens the token store of a flag: makes it from text, or fetches it from another machine. Call on all processes.

    A store that another machine made from text is written into the cache; a store that the flag names on another
    machine is written to the flag's path.

    Args:
        session: the processes.
        field: "dataset_path" or "eval_dataset_path".
        tokenizer: splits the text.
    """
    peers, path = session.peers, getattr(session.config, field)
    config = dataclasses.replace(session.config, dataset_path=path, eval_dataset_path="")
    have_it = [process.has[field] for process in session.agreement.processes]
    store = None
    if have_it[session.world.process_index] or not any(have_it):
        store = prepare_store(config, tokenizer, progress=peers.set_status)
        if session.world.is_local_main:
            verify_store(store, progress=peers.set_status)
    mine = HeldStore(store.fingerprint if store else "", is_store(path))
    theirs = next(held for held in peers.all_gather(mine, field) if held.fingerprint)
    folder = store.folder if store else received_folder(theirs.fingerprint)
    if not store and theirs.is_store and not data_exists(str(folder)):
        folder = Path(path).expanduser()
    is_here = is_store(folder)
    if is_here and not store and session.world.is_local_main:  # received in an earlier run
        verify_store(open_store(folder), progress=peers.set_status)
    fetch(session, f"the token store of {flag_name(field)}", folder if is_here else None, folder)
    return store or open_store(folder)


def make_datasets(
    config: TrainConfig, store: TokenStore, eval_store: TokenStore
) -> tuple[BlockDataset, BlockDataset | None]:
    """Returns the blocks to train on, and the held-out blocks if there are any."""
    stream, eval_stream = TokenStream(store.tokens, store.documents), None
    if config.eval_fraction:
        stream, eval_stream = split_documents(store.tokens, store.documents, config.eval_fraction, config.seed)
    elif config.eval_dataset_path:
        eval_stream = TokenStream(eval_store.tokens, eval_store.documents)
    shape = (config.sequence_length, config.mask_documents)
    return (
        BlockDataset(stream, *shape),
        BlockDataset(eval_stream, *shape, keep_tail=True) if eval_stream else None,
    )


def describe_identity(
    config: TrainConfig,
    model: torch.nn.Module,
    store: TokenStore,
    tokenizer: "transformers.PreTrainedTokenizerBase",
) -> dict:
    """Returns what identifies a run, whatever its length and learning rate."""
    return {
        "data": store.fingerprint,
        "model_config": hash_config(model),
        "tokenizer": splitting_fingerprint(tokenizer),  # how documents begin and end is part of the data
        "model": f"{model.config.model_type} of {sum(p.numel() for p in model.parameters()):,} parameters",
        **{name: getattr(config, name) for name in FIXED_FLAGS},
    }


def log_start(session: Session, inputs: Inputs, balancer: Balancer, lines: list[str]) -> None:
    """Logs the first lines of a run: warnings, the world, what was loaded, and the batch arithmetic.

    Args:
        session, inputs: of the run.
        balancer: has the shares of the global batch.
        lines: warnings about the checkpoints.
    """
    unused = flags_without_effect(session.config, inputs.eval_dataset is not None, inputs.plan.num_steps)
    for line in (*session.agreement.warnings, *inputs.warnings, *unused, *lines):
        logger.warning(line)
    batches = describe_batches(session.config, inputs.plan, balancer.shares)
    for line in (describe_world(session.agreement), *inputs.notes, batches, balancer.describe()):
        if line:
            logger.info(line)
