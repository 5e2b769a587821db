r"""Trains a causal language model, data-parallel, on one machine or on many.

One process:

    python scripts/train.py --model-name data/tiny_gpt2 --dataset-path data/sample_corpus.txt --output-dir runs/a

Two processes on this machine, or the processes of several machines (the same command on each):

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml scripts/train.py \
        --model-name data/tiny_gpt2 --dataset-path data/sample_corpus.txt --output-dir runs/a
    accelerate launch --config_file accelerate_configs/multi_node.yaml scripts/train.py \
        --model-name gpt2 --dataset-path corpus/ --output-dir runs/a

The losses are the same whichever of these runs it. A run that was stopped goes on when it is started again.
"""

import contextlib
import dataclasses
import json
import logging
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import gather, gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from forge_lib import batches, checkpoint, cluster, corpus, metrics
from forge_lib import model as models
from forge_lib.config import TrainConfig, UserError, parse_config

logger = logging.getLogger("forge")


def main(config: TrainConfig) -> Path:
    """Trains as `config` says and returns the folder of the final model. Call on all processes."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    output_dir = Path(config.output_dir)

    # The lobby: all that a person can get wrong is found here, on any machine, before a process group exists.
    world = cluster.World.from_environment()
    with cluster.Lobby(world) as lobby:
        device = cluster.choose_device(config.device, world)
        shares = batches.divide_batch(config.batch_size, config.shares, world.num_processes)
        trackers = metrics.check_trackers(config.report_to)
        tokenizer = models.load_tokenizer(config)
        torch.manual_seed(config.seed)
        model = models.load_model(config, len(tokenizer), config.sequence_length)
        if config.mask_documents:
            models.check_document_mask(model)
        store = corpus.prepare_store(config, tokenizer, progress=lobby.say)
        eval_store = store
        if config.eval_dataset_path:
            eval_config = dataclasses.replace(config, dataset_path=config.eval_dataset_path)
            eval_store = corpus.prepare_store(eval_config, tokenizer, progress=lobby.say)
        dataset, eval_dataset = make_datasets(config, store, eval_store)
        plan = batches.BatchPlan.of_run(len(dataset), config.batch_size, config.max_steps, config.epochs, config.seed)
        random_weights = config.from_scratch or not models.has_weights(config.model_name)
        weights = models.hash_weights(model)
        run = describe_run(config, model, store) | {"initial_weights": "random" if random_weights else weights}
        resume_from, passed_over = None, []
        if world.process_index == 0:
            make_folder(output_dir)
            resume_from, passed_over = checkpoint.find(output_dir / "checkpoints", config.resume)
            if resume_from:
                checkpoint.check_run(resume_from, run, plan.num_steps)
        lobby.say("measuring and hashing")
        facts = cluster.local_facts(config, world, device)
        facts["fingerprints"] = {
            "--dataset-path": store.fingerprint,
            "--eval-dataset-path": eval_store.fingerprint if eval_dataset else "none",
            "model configuration": models.hash_config(model),
            "kind of initial weights": "random" if random_weights else "pretrained",
            "tokenizer": corpus.tokenizer_fingerprint(tokenizer),
        }
        facts |= {"weights": weights, "random_weights": random_weights}
        agreement = cluster.agree(lobby.exchange(facts), config)

    # The process group.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its successor is not in torch 2.8
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if world.num_processes > 1:
        handlers.append(InitProcessGroupKwargs(backend=agreement.backend, timeout=timedelta(minutes=10)))
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=agreement.mixed_precision,
        log_with=trackers or None,
        project_dir=output_dir,
        kwargs_handlers=handlers,
    )
    cluster.check_world(world, accelerator.num_processes)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    optimizers = models.build_optimizers(model, config)
    state = checkpoint.load(resume_from, accelerator, model, optimizers)
    first_step = state["step"] if state else 0
    model, *optimizers = accelerator.prepare(model, *optimizers)
    if accelerator.scaler and state and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    sync = metrics.GradientSync(model)
    learning_rate = models.learning_rate_schedule(config, plan.num_steps)
    sampler = batches.ShareSampler(plan, shares, accelerator.process_index, first_step)
    loader = DataLoader(dataset, batch_sampler=sampler, pin_memory=accelerator.device.type == "cuda")

    for line in (*agreement.warnings, *passed_over):
        logger.warning(line)
    logger.info(cluster.describe(agreement))
    logger.info(describe_batches(config, plan, shares))
    log = metrics.MetricsLog(output_dir, accelerator.is_main_process)
    if accelerator.is_main_process:
        write_run(output_dir, config, agreement, plan, shares, run)
    if trackers:
        accelerator.init_trackers("p2p-llm-forge", config=dataclasses.asdict(config))
    if state:
        logger.info(f"resuming after step {first_step} of {plan.num_steps}")
        log.write(step=first_step, event="resume", num_processes=accelerator.num_processes)

    flops_per_token = metrics.model_flops_per_token(accelerator.unwrap_model(model), config.sequence_length)
    dtype = "fp32" if agreement.mixed_precision == "no" else "bf16"
    peak_flops = sum(peer["flops"].get(dtype, peer["flops"]["fp32"]) for peer in agreement.peers)
    tokens_per_byte = eval_store.manifest["num_tokens"] / eval_store.manifest["num_text_bytes"]
    results = {}
    seconds_since, tokens_since = 0.0, 0

    if eval_dataset and config.eval_every and first_step in (0, plan.num_steps):
        results = evaluate(accelerator, model, eval_dataset, config, tokens_per_byte, log, first_step)

    bar = tqdm(total=plan.num_steps, initial=first_step, unit="step", disable=not_a_terminal(accelerator))
    with bar, logging_redirect_tqdm():
        batch_iterator = iter(loader)
        for step in range(first_step, plan.num_steps):  # counts from 0; steps done are logged, from 1
            step_start = time.perf_counter()
            batch = next(batch_iterator)
            data_seconds = time.perf_counter() - step_start
            torch.manual_seed(hash((config.seed, step, world.process_index)) % (1 << 63))  # for dropout
            num_targets = max(1, dataset.num_targets(plan.batch(step)))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)

            # DDP averages over processes; the loss is the sum over all tokens of the global batch over their count.
            micro_batches = split_batch(batch, config.micro_batch_size)
            losses = []
            for number, micro_batch in enumerate(micro_batches):
                inputs = {name: t.to(accelerator.device, non_blocking=True) for name, t in micro_batch.items()}
                labels = inputs.pop("labels")
                last = number == len(micro_batches) - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    logits = model(**inputs, use_cache=False).logits
                    loss = models.next_token_loss(logits, labels)
                    accelerator.backward(loss * accelerator.num_processes / num_targets)
                losses.append(loss.detach())
            sync.backward_done()
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or float("inf"))
            if not torch.isfinite(grad_norm):  # the same on all processes; a CPU-GPU sync point
                stop_if_not_finite(accelerator, step + 1, losses, sampler.share(step), config)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

            step_done = step + 1
            sync_seconds, bytes_sent = sync.take()
            step_seconds = time.perf_counter() - step_start
            seconds_since += step_seconds
            tokens_since += len(plan.batch(step)) * config.sequence_length
            bar.update()
            if is_due(config.log_every, step_done, plan.num_steps):
                mine = [torch.stack(losses).sum().item(), metrics.peak_memory_bytes(accelerator.device)]
                all_of = gather(
                    torch.tensor([mine], dtype=metrics.sum_dtype(accelerator.device), device=accelerator.device)
                ).cpu()
                tokens_per_second = tokens_since / seconds_since
                row = {
                    "step": step_done,
                    "epoch": plan.num_samples(step_done) / len(dataset),
                    "tokens": plan.num_samples(step_done) * config.sequence_length,
                    "loss": all_of[:, 0].sum().item() / num_targets,
                    "grad_norm": grad_norm.item(),
                    "learning_rate": learning_rate(step),
                    "tokens_per_second": tokens_per_second,
                    "step_seconds": step_seconds,
                    "data_seconds": data_seconds,
                    "compute_seconds": step_seconds - data_seconds - sync_seconds,
                    "sync_seconds": sync_seconds,
                    "bytes_sent": bytes_sent,
                    "mfu": tokens_per_second * flops_per_token / peak_flops,
                    "peak_memory_bytes": int(all_of[:, 1].max()),
                    "num_processes": accelerator.num_processes,
                }
                seconds_since, tokens_since = 0.0, 0
                log.write(**row)
                accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step_done)
                bar.set_postfix(loss=f"{row['loss']:.4f}", tokens_per_second=f"{tokens_per_second:,.0f}")
                logger.info(
                    f"step {step_done}/{plan.num_steps}  loss {row['loss']:.4f}  grad norm {row['grad_norm']:.2f}  "
                    f"lr {row['learning_rate']:.2e}  {tokens_per_second:,.0f} tokens/s"
                )
            if eval_dataset and is_due(config.eval_every, step_done, plan.num_steps):
                results = evaluate(accelerator, model, eval_dataset, config, tokens_per_byte, log, step_done)
            if accelerator.is_main_process and is_due(config.sample_every, step_done, plan.num_steps):
                text = models.generate_text(
                    accelerator.unwrap_model(model), tokenizer, config.sample_prompt, config.seed
                )
                log.write(step=step_done, event="sample", text=text)
                logger.info(f"step {step_done}: sample: {text}")
            if accelerator.is_main_process and is_due(config.checkpoint_every, step_done, plan.num_steps):
                path = checkpoint.save(
                    output_dir / "checkpoints",
                    step_done,
                    accelerator.unwrap_model(model),
                    optimizers,
                    state={
                        "run": run,
                        "config": dataclasses.asdict(config),
                        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
                    },
                    keep=config.keep_checkpoints,
                )
                log.write(step=step_done, event="checkpoint", path=str(path))

    final = output_dir / "final"
    if accelerator.is_main_process:
        card = {"steps": plan.num_steps, **results, "configuration": dataclasses.asdict(config)}
        models.save_final(accelerator.unwrap_model(model), tokenizer, final, card)
    logger.info(f"done: the model lies in {final}, the metrics in {output_dir / 'metrics.jsonl'}")
    accelerator.wait_for_everyone()
    # DDP goes before its process group: as its last owner it would destroy it with Python's lock in hand, while
    # gloo's threads need that lock to drop their last tensors (a deadlock in torch 2.13).
    del model
    accelerator.free_memory()
    accelerator.end_training()
    return final


def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    dataset: batches.BlockDataset,
    config: TrainConfig,
    tokens_per_byte: float,
    log: metrics.MetricsLog,
    step: int,
) -> dict[str, float]:
    """Measures the model on the held-out blocks, logs and returns what it found. Call on all processes."""
    results = metrics.evaluate_model(accelerator, model, dataset, config.micro_batch_size, tokens_per_byte)
    results["eval_loss"] = results.pop("loss")
    log.write(step=step, **results)
    accelerator.log(results, step=step)
    logger.info(
        f"step {step}: held-out loss {results['eval_loss']:.4f}  perplexity {results['perplexity']:,.2f}  "
        f"{results['bits_per_byte']:.3f} bits/byte  accuracy {results['next_token_accuracy']:.1%}"
    )
    return results


def make_folder(output_dir: Path) -> None:
    """Makes the run folder; UserError where it cannot be written to."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "metrics.jsonl").touch()
    except OSError as error:
        raise UserError(f"--output-dir {output_dir} cannot be written to: {error.strerror}") from None


def make_datasets(
    config: TrainConfig, store: corpus.TokenStore, eval_store: corpus.TokenStore
) -> tuple[batches.BlockDataset, batches.BlockDataset | None]:
    """Returns the blocks to train on, and the held-out ones if there are any."""
    stream, eval_stream = batches.TokenStream(store.tokens, store.documents), None
    if config.eval_fraction:
        stream, eval_stream = batches.split_documents(store.tokens, store.documents, config.eval_fraction, config.seed)
    elif config.eval_dataset_path:
        eval_stream = batches.TokenStream(eval_store.tokens, eval_store.documents)
    cut = (config.sequence_length, config.mask_documents)
    return (
        batches.BlockDataset(stream, *cut),
        batches.BlockDataset(eval_stream, *cut, keep_tail=True) if eval_stream else None,
    )


def describe_run(config: TrainConfig, model: torch.nn.Module, store: corpus.TokenStore) -> dict:
    """Returns what a run is, whatever its length and learning rate: a checkpoint goes on in the same run alone."""
    same = (
        "lora_rank",
        "lora_alpha",
        "batch_size",
        "sequence_length",
        "mask_documents",
        "eval_fraction",
        "optimizer",
        "seed",
    )
    return {
        "data": store.fingerprint,
        "model": f"{model.config.model_type} of {sum(p.numel() for p in model.parameters()):,} parameters",
        **{name: getattr(config, name) for name in same},
    }


def describe_batches(config: TrainConfig, plan: batches.BatchPlan, shares: list[int]) -> str:
    """Returns the batch arithmetic, in one line for the log."""
    parts = f"{len(shares)} x {shares[0]}" if len(set(shares)) == 1 else " + ".join(map(str, shares))
    micro = max(-(-share // config.micro_batch_size) for share in shares)
    return (
        f"batch of {config.batch_size} sequences = {parts}, in up to {micro} micro-batch(es) of "
        f"{config.micro_batch_size}; x {config.sequence_length} tokens = "
        f"{config.batch_size * config.sequence_length:,} tokens a step; {plan.num_steps:,} steps = "
        f"{plan.num_samples(plan.num_steps) / plan.num_blocks:.2f} epochs of {plan.num_blocks:,} sequences"
    )


def write_run(
    output_dir: Path,
    config: TrainConfig,
    agreement: cluster.Agreement,
    plan: batches.BatchPlan,
    shares: list[int],
    run: dict,
) -> None:
    """Writes run.json: what the run is, for people and programs."""
    content = {
        "config": dataclasses.asdict(config),
        "batches": dataclasses.asdict(plan) | {"shares": shares},
        "world": [{k: v for k, v in peer.items() if k != "config"} for peer in agreement.peers],
        "backend": agreement.backend,
        "mixed_precision": agreement.mixed_precision,
        "run": run,
    }
    (output_dir / "run.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def split_batch(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """Cuts [n, ...] tensors into micro-batches of up to `size` sequences."""
    parts = {name: tensor.split(size) for name, tensor in batch.items()}
    return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]


def is_due(every: int, step: int, num_steps: int) -> bool:
    """Tells whether something that happens every so many steps, and at the end, happens after `step` steps."""
    return every > 0 and (step % every == 0 or step == num_steps)


def stop_if_not_finite(
    accelerator: Accelerator, step: int, losses: list[torch.Tensor], samples: list[int], config: TrainConfig
) -> None:
    """Ends the run on all processes, before any weight is touched, where a loss is not finite. Call on all processes.

    An infinite gradient of finite losses is fp16's overflow, and its gradient scaler's business.
    """
    size = config.micro_batch_size
    bad = [i for n, loss in enumerate(losses) if not torch.isfinite(loss) for i in samples[n * size : (n + 1) * size]]
    found = [(rank, ids) for rank, ids in enumerate(gather_object([bad])) if ids]
    if not found and accelerator.scaler is not None:
        return
    where = "; ".join(f"process {rank}, samples {ids}" for rank, ids in found) or "in no loss, only in the gradient"
    raise UserError(
        f"step {step}: not finite: {where}. The weights are as they were before this step; "
        "lower --learning-rate, or look at these samples"
    )


def not_a_terminal(accelerator: Accelerator) -> bool:
    """Tells whether this process shall show no progress bar."""
    return not (accelerator.is_main_process and sys.stderr.isatty())


if __name__ == "__main__":
    with cluster.one_message("train.py"):
        main(parse_config(TrainConfig, sys.argv[1:], description=__doc__))
