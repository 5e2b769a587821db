r"""Evaluates a trained model on a text: loss, perplexity, bits per byte, next-token accuracy.

    python scripts/evaluate.py --model-name runs/a/final --dataset-path heldout.txt

On what scripts/train.py has held out, with the same flags, over one or more processes:

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml scripts/evaluate.py \
        --model-name runs/a/final --dataset-path data/sample_corpus.txt --sample-by paragraph --eval-fraction 0.05

Metrics of the `evaluate` package, by name (from the Hub) or by path, compare what the model generates after the first
half of a document with the second half:

    python scripts/evaluate.py --model-name runs/a/final --dataset-path heldout.txt --metrics rouge bleu
"""

from __future__ import annotations  # names of transformers in signatures are not imported

import json
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import transformers
from accelerate import Accelerator, InitProcessGroupKwargs

from forge_lib.config import BlockConfig, DataConfig, ModelNameConfig, RangeChecked, WorldConfig, flag, seed_flag
from forge_lib.data.blocks import BlockDataset, TokenStream, split_documents
from forge_lib.data.corpus import describe_store, prepare_store
from forge_lib.data.token_store import TokenStore
from forge_lib.data.tokenizing import vocabulary_size
from forge_lib.distributed.agreement import Agreement, agree, check_world, compare_inputs
from forge_lib.distributed.device import MICRO_BATCH_SIZE, choose_device, choose_micro_batch_size
from forge_lib.distributed.environment import check_environment
from forge_lib.distributed.facts import InputFacts, local_facts
from forge_lib.distributed.peers import Peers
from forge_lib.distributed.reporting import report_errors
from forge_lib.errors import UserError, first_line
from forge_lib.flags import parse_config
from forge_lib.models.checking import check_model
from forge_lib.models.document_attention import use_document_attention
from forge_lib.models.fingerprints import hash_weights
from forge_lib.models.generation import generate_ids
from forge_lib.models.loading import load_tokenizer, load_trained_model
from forge_lib.process import World
from forge_lib.training.evaluation import evaluate_model
from forge_lib.training.log import to_json

GROUP_TIMEOUT = timedelta(minutes=10)
MIN_HALF = 4  # tokens in half of a document; shorter documents are not used as prompts


@dataclass(kw_only=True)
class MeasureConfig:
    """What is measured, and on which part of the text."""

    _argument_group_name = "evaluation"

    eval_fraction: float = flag(
        0.0, "only what train.py held out with this value; 0: the whole text", "FRACTION", at_least=0, below=1
    )
    seed: int = seed_flag("the seed of train.py, which selects what was held out")
    micro_batch_size: int = flag(0, "sequences per forward pass; 0: chosen", "SEQUENCES", at_least=0)
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": "metrics of the evaluate package for generated text", "metavar": "NAME"},
    )
    num_prompts: int = flag(16, "number of documents that the model continues for --metrics", "COUNT", at_least=1)


@dataclass(kw_only=True)
class EvaluateConfig(RangeChecked, MeasureConfig, WorldConfig, BlockConfig, DataConfig, ModelNameConfig):
    """Every flag of this script."""


def main(config: EvaluateConfig) -> dict[str, float]:
    """Prints the results as JSON on the main process, and returns them on all processes. Call on all processes."""
    world = World.from_environment()
    metrics = []
    with Peers(world) as peers:
        check_environment()
        device = choose_device(config.device, world)
        tokenizer = load_tokenizer(config)
        model = load_trained_model(config, vocabulary_size(tokenizer), config.sequence_length)
        if config.mask_documents and device == "cpu":
            use_document_attention(model)
        check_model(model, config.mask_documents, config.sequence_length)
        store = prepare_store(config, tokenizer, progress=peers.set_status)
        stream = TokenStream(store.tokens, store.documents)
        if config.eval_fraction:
            _, stream = split_documents(store.tokens, store.documents, config.eval_fraction, config.seed)
        dataset = BlockDataset(stream, config.sequence_length, config.mask_documents, keep_tail=True)
        if config.metrics:
            from forge_lib.training.evaluation_metrics import load_metrics  # slow import

            metrics = load_metrics(config.metrics)
        agreement = compare(config, world, peers, device, model, store)
        if world.process_index == 0:
            for line in (*agreement.warnings, *describe_store(store, tokenizer, config)):
                print(line, file=sys.stderr)

        handlers = [InitProcessGroupKwargs(backend=agreement.backend, timeout=GROUP_TIMEOUT)]
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=agreement.mixed_precision,
            kwargs_handlers=handlers if world.num_processes > 1 else [],
        )
        check_world(world, accelerator.num_processes)
        model.to(accelerator.device)
        chosen = choose_micro_batch_size(device, config.sequence_length, agreement.mixed_precision)
        if model.full_logits_reason:  # they need much memory
            chosen = min(chosen, MICRO_BATCH_SIZE)
        results = evaluate_model(
            accelerator,
            model,
            dataset,
            config.micro_batch_size or chosen,
            tokens_per_byte=store.manifest["num_tokens"] / store.manifest["num_text_bytes"],
            barrier=lambda: peers.barrier("evaluated"),
        )
        if accelerator.is_main_process:
            try:
                if metrics:
                    results |= compute_metrics(metrics, *continue_documents(config, model, tokenizer, stream))
            finally:  # the loss is known, whatever the metrics do
                print(json.dumps(to_json(results), indent=2))
        peers.barrier("end")
        accelerator.end_training()
    return results


def compare(
    config: EvaluateConfig,
    world: World,
    peers: Peers,
    device: str,
    model: transformers.PreTrainedModel,
    store: TokenStore,
) -> Agreement:
    """Agrees with the other processes on backend and precision, and compares data and weights. Call on all processes.

    Raises:
        UserError: the processes have different versions, flags, data or weights.
    """
    agreement = agree(peers.all_gather(local_facts(config, world, device), "facts"), config)
    facts = InputFacts(
        host=peers.host,
        fingerprints={"--dataset-path": store.fingerprint},
        weights=hash_weights(model),
        random_weights=False,
    )
    compare_inputs(peers.all_gather(facts, "inputs"))
    return agreement


def compute_metrics(metrics: list[Any], predictions: list[str], references: list[str]) -> dict[str, float]:
    """Returns what metrics of the evaluate package find; raises UserError if one of them does not compare texts."""
    results = {}
    for metric in metrics:
        try:
            results |= metric.compute(predictions=predictions, references=references)
        except Exception as error:  # whatever a metric raises
            raise UserError(f"--metrics {metric.name}: cannot compare texts ({first_line(error)})") from None
    return results


def continue_documents(
    config: EvaluateConfig,
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    stream: TokenStream,
) -> tuple[list[str], list[str]]:
    """Lets the model continue documents after their first half; returns its continuations and the second halves.

    Raises:
        UserError: all documents are too short.
    """
    predictions, references = [], []
    start = 0
    while len(predictions) < config.num_prompts and start < stream.num_tokens:
        tokens, document_starts = stream.read(start, min(start + config.sequence_length, stream.num_tokens))
        end = next((int(position) for position in document_starts if position > 0), len(tokens))
        document = tokens[:end].tolist()
        start += end
        half = len(document) // 2
        if half < MIN_HALF:
            continue
        length = len(document) - half
        ids = generate_ids(model, document[:half], tokenizer.eos_token_id, config.seed, length, temperature=0)
        predictions.append(tokenizer.decode(ids[half:], skip_special_tokens=True))
        references.append(tokenizer.decode(document[half:], skip_special_tokens=True))
    if not predictions:
        raise UserError(f"--metrics needs documents of at least {2 * MIN_HALF} tokens; all are shorter (--sample-by)")
    return predictions, references


if __name__ == "__main__":
    with report_errors("evaluate.py"):
        main(parse_config(EvaluateConfig, sys.argv[1:], description=__doc__))
