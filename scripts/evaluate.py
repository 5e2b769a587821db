r"""Measures a trained model on a text: loss, perplexity, bits per byte, next-token accuracy.

    python scripts/evaluate.py --model-name runs/a/final --dataset-path heldout.txt

On what scripts/train.py has held out, with its flags, over one or more processes:

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml scripts/evaluate.py \
        --model-name runs/a/final --dataset-path data/sample_corpus.txt --sample-by paragraph --eval-fraction 0.05

Metrics of the `evaluate` package, by name (from the Hub) or by path, compare what the model writes after the first
half of a document with the second half:

    python scripts/evaluate.py --model-name runs/a/final --dataset-path heldout.txt --metrics rouge bleu
"""

import json
import sys
from dataclasses import dataclass, field
from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs

from forge_lib.config import BlockConfig, DataConfig, ModelNameConfig, WorldConfig, flag
from forge_lib.data import blocks, corpus
from forge_lib.distributed.agreement import agree, check_world, compare_inputs
from forge_lib.distributed.device import choose_device
from forge_lib.distributed.facts import InputFacts, local_facts
from forge_lib.distributed.peers import Peers
from forge_lib.distributed.reporting import report_errors
from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from forge_lib.models import model as models
from forge_lib.process import World
from forge_lib.training import metrics


@dataclass(kw_only=True)
class MeasureConfig:
    """What is measured, and on which part of the text."""

    _argument_group_name = "evaluation"

    eval_fraction: float = flag(0.0, "only what train.py held out with this flag; 0 for all", "FRACTION")
    seed: int = flag(0, "train.py's, which decides what was held out", "SEED")
    micro_batch_size: int = flag(8, "sequences of one forward pass on one device", "SEQUENCES")
    metrics: list[str] = field(
        default_factory=list, metadata={"help": "metrics of the evaluate package, of written text", "metavar": "NAME"}
    )
    num_prompts: int = flag(16, "documents that --metrics has the model go on with", "COUNT")


@dataclass(kw_only=True)
class EvaluateConfig(MeasureConfig, WorldConfig, BlockConfig, DataConfig, ModelNameConfig):
    """Everything that this script reads."""

    def __post_init__(self):
        if not 0 <= self.eval_fraction < 1 or self.micro_batch_size < 1 or self.sequence_length < 2:
            raise UserError(
                "expected --eval-fraction from 0 to below 1, --micro-batch-size from 1, --sequence-length from 2; "
                f"found {self.eval_fraction}, {self.micro_batch_size}, {self.sequence_length}"
            )


def main(config: EvaluateConfig) -> dict[str, float]:
    """Prints the results as JSON on the main process, and returns them on all. Call on all processes."""
    world = World.from_environment()
    with Peers(world) as peers:
        device = choose_device(config.device, world)
        tokenizer = models.load_tokenizer(config)
        model = models.load_trained_model(config)
        models.check_positions(model.config, config.sequence_length)
        store = corpus.prepare_store(config, tokenizer, progress=peers.set_status)
        stream = blocks.TokenStream(store.tokens, store.documents)
        if config.eval_fraction:
            _, stream = blocks.split_documents(store.tokens, store.documents, config.eval_fraction, config.seed)
        dataset = blocks.BlockDataset(stream, config.sequence_length, config.mask_documents, keep_tail=True)
        written_metrics = metrics.load_metrics(config.metrics)
        agreement = agree(peers.all_gather(local_facts(config, world, device)), config)
        fingerprints = {"--dataset-path": store.fingerprint}
        facts = InputFacts(peers.host, fingerprints, models.hash_weights(model), random_weights=False)
        compare_inputs(peers.all_gather(facts, "inputs"))
        for line in agreement.warnings if world.process_index == 0 else []:
            print(line, file=sys.stderr)

        handlers = [InitProcessGroupKwargs(backend=agreement.backend, timeout=timedelta(minutes=10))]
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=agreement.mixed_precision,
            kwargs_handlers=handlers if world.num_processes > 1 else [],
        )
        check_world(world, accelerator.num_processes)
        model.to(accelerator.device)
        tokens_per_byte = store.manifest["num_tokens"] / store.manifest["num_text_bytes"]
        results = metrics.evaluate_model(
            accelerator,
            model,
            dataset,
            config.micro_batch_size,
            tokens_per_byte,
            meet=lambda: peers.barrier("evaluated"),
        )
        if accelerator.is_main_process:
            if written_metrics:
                predictions, references = write_on(config, model, tokenizer, stream)
                for metric in written_metrics:
                    results |= metric.compute(predictions=predictions, references=references)
            print(json.dumps(results, indent=2, default=float))
        peers.barrier("end")
        accelerator.end_training()
    return results


def write_on(config: EvaluateConfig, model, tokenizer, stream: blocks.TokenStream) -> tuple[list[str], list[str]]:
    """Has the model go on after the first half of documents; returns what it wrote and what really follows."""
    predictions, references = [], []
    start = 0
    while len(predictions) < config.num_prompts and start < stream.num_tokens:
        tokens, beginnings = stream.read(start, min(start + config.sequence_length, stream.num_tokens))
        end = next((int(b) for b in beginnings if b > 0), len(tokens))
        document = tokens[:end].tolist()
        start += end
        half = len(document) // 2
        if half < 4:
            continue
        prompt, rest = tokenizer.decode(document[:half]), tokenizer.decode(document[half:], skip_special_tokens=True)
        text = models.generate_text(model, tokenizer, prompt, config.seed, len(document) - half, temperature=0)
        predictions.append(text[len(prompt) :])
        references.append(rest)
    return predictions, references


if __name__ == "__main__":
    with report_errors("evaluate.py"):
        main(parse_config(EvaluateConfig, sys.argv[1:], description=__doc__))
