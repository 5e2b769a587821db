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
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather, gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from forge_lib.checkpoints.saver import Saver
from forge_lib.config import TrainConfig, flag_name
from forge_lib.data import batches, blocks
from forge_lib.distributed import agreement as cluster
from forge_lib.distributed.lock import RunLock
from forge_lib.distributed.peers import HANG_SECONDS, Peers, report_errors
from forge_lib.errors import RESUME_HINT, DivergedError, PeerLostError, Stopped, UserError
from forge_lib.flags import parse_config
from forge_lib.models import model as models
from forge_lib.process import World, die_with_launcher, ignore_output_errors
from forge_lib.training import metrics, start
from forge_lib.training.stop import StopRequest

logger = logging.getLogger("forge")

MAX_OVERFLOWS = 50  # steps in a row that fp16's gradient scaler may leave out


def main(config: TrainConfig) -> Path:
    """Trains as `config` says and returns the folder of the final model. Call on all processes.

    Raises:
        UserError: a person's mistake, on any machine.
        PeerLostError, DivergedError: another process is lost, or computes something else.
        Stopped: the run was told to stop; it is saved.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    world = World.from_environment()
    die_with_launcher(world)
    output_dir = Path(config.output_dir).expanduser()
    with (
        StopRequest(Stopped) as stop,
        Peers(world, config.timeout_seconds) as peers,
        RunLock(output_dir) as lock,
    ):
        trackers = metrics.check_trackers(config.report_to)
        shares = batches.divide_batch(config.batch_size, config.shares, world.num_processes)
        accelerator, agreement = start.join(config, world, peers, lock, trackers)
        inputs = start.load_inputs(config, world, peers, agreement)
        optimizers = models.build_optimizers(inputs.model, config)
        state, notes = start.resume(config, world, peers, agreement, inputs, optimizers, lock)
        saver = Saver(output_dir / "checkpoints", config.keep_checkpoints, config.keep_best, config.checkpoint_async)
        log = metrics.MetricsLog(output_dir, accelerator.is_main_process)
        timeout = cluster.GroupTimeout(accelerator, inputs.model, config.timeout_seconds)
        saves = lock.held and start.keeps_checkpoints(config, world, agreement)
        run = Run(config, world, peers, accelerator, agreement, inputs, saver, log, timeout, shares, saves)
        if state and lock.held and not saves:
            saver.prune(state["step"])  # a machine that keeps none has what it was sent to start with
        for line in (*agreement.warnings, *inputs.warnings, *notes):
            logger.warning(line)
        logger.info(cluster.describe(agreement))
        logger.info(describe_batches(config, inputs.plan, shares))
        if trackers:
            accelerator.init_trackers("p2p-llm-forge", config=dataclasses.asdict(config))
        try:
            return train(run, optimizers, state, stop, lock)
        finally:
            wait_for_save(run)


@dataclass(frozen=True)
class Run:
    """What all of the training loop needs; each attribute is described at its class."""

    config: TrainConfig
    world: World
    peers: Peers
    accelerator: Accelerator
    agreement: cluster.Agreement
    inputs: start.Inputs
    saver: Saver
    log: metrics.MetricsLog
    timeout: cluster.GroupTimeout
    shares: list[int]  # sequences of each global batch by process
    saves: bool  # whether this process writes its machine's checkpoints
    failed_saves: list[dict] = field(default_factory=list)  # of this process, that the others do not know of yet


def train(
    run: Run,
    optimizers: list[torch.optim.Optimizer],
    state: dict | None,
    stop: StopRequest,
    lock: RunLock,
) -> Path:
    """Trains until the end, or until it is told to stop; all processes do the same things in the same order.

    Args:
        run: what `main` has prepared.
        optimizers: of `run.inputs.model`.
        state: of the checkpoint that the model has been loaded from.
        stop: is asked each step.
        lock: is told each step.
    """
    config, accelerator, inputs, plan = run.config, run.accelerator, run.inputs, run.inputs.plan
    model, *optimizers = accelerator.prepare(inputs.model, *optimizers)
    if accelerator.scaler and state and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    sync = metrics.GradientSync(model, fp16=config.gradient_compression == "fp16")
    learning_rate = models.learning_rate_schedule(config, plan.num_steps)
    first_step = run.peers.step = state["step"] if state else 0
    sampler = batches.ShareSampler(plan, run.shares, accelerator.process_index, first_step)
    loader = DataLoader(inputs.dataset, batch_sampler=sampler, pin_memory=accelerator.device.type == "cuda")
    begin_log(run, state)
    lock.at(first_step)
    run.peers.on_peer_error = lambda error: on_peer_error(run, error)
    dtype = "fp32" if run.agreement.mixed_precision == "no" else "bf16"
    peak_flops = sum(peer["flops"].get(dtype, peer["flops"]["fp32"]) for peer in run.agreement.peers)
    throughput = metrics.Throughput(accelerator.unwrap_model(model), config.sequence_length, peak_flops)
    spikes = metrics.SpikeDetector()
    results, stopped_by, skipped, overflows, own_seconds = {}, "", 0, 0, 0.0

    if inputs.eval_dataset and config.eval_every and first_step in (0, plan.num_steps):
        results = evaluate(run, model, first_step)
    settle_buckets(run, model, optimizers)
    sync.backward_done()
    sync.take()  # begins anew
    stop.defer(lock.folder if run.world.is_local_main else None)
    bar = tqdm(total=plan.num_steps, initial=first_step, unit="step", disable=not_a_terminal(accelerator))
    with bar, logging_redirect_tqdm():
        batch_iterator = iter(loader)
        for step in range(first_step, plan.num_steps):  # counts from 0; steps done are logged, from 1
            step_start = time.perf_counter()
            run.peers.set_status("reading its batch")
            inputs.store.check_unchanged()
            batch = next(batch_iterator)
            data_seconds = time.perf_counter() - step_start
            run.peers.set_status("computing")
            torch.manual_seed(hash((config.seed, step, accelerator.process_index)) % (1 << 63))  # for dropout
            num_targets = max(1, inputs.dataset.num_targets(plan.batch(step)))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)

            # DDP averages over processes; the loss is the sum over all tokens of the global batch over their count.
            micro_batches = split_batch(batch, config.micro_batch_size)
            losses = []
            for number, micro_batch in enumerate(micro_batches):
                micro_inputs = {name: t.to(accelerator.device, non_blocking=True) for name, t in micro_batch.items()}
                labels = micro_inputs.pop("labels")
                last = number == len(micro_batches) - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    logits = model(**micro_inputs, use_cache=False).logits
                    loss = models.next_token_loss(logits, labels)
                    losses.append(loss.detach())
                    if last:  # it travels behind the backward pass
                        totals, wait_for_totals = begin_totals(run, losses, stop.reason())
                    accelerator.backward(loss * accelerator.num_processes / num_targets)
            sync.backward_done()
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or float("inf")).item()
            wait_for_totals()
            loss_sum, num_stopping = totals.tolist()  # the same on all processes, as grad_norm is
            mean_loss = loss_sum / num_targets
            if num_stopping:
                stopped_by = run.peers.get_first("stop")
                stop.limit(config.grace_seconds)
                logger.info(f"stopping after step {step + 1}: {stopped_by}")

            # An infinite gradient of finite losses is fp16's overflow, and the business of its gradient scaler.
            step_done = step + 1
            if math.isfinite(loss_sum) and (math.isfinite(grad_norm) or accelerator.scaler):
                run.saver.wait_for_copy()  # of the weights, which change now
                for optimizer in optimizers:
                    optimizer.step()
                skipped = 0
                overflows = overflows + 1 if accelerator.optimizer_step_was_skipped else 0
                if overflows > MAX_OVERFLOWS:
                    raise UserError(f"step {step_done}: {overflows} steps in a row overflow fp16; use bf16 or no")
            else:
                skipped += 1
                skip_step(run, step_done, losses, sampler.share(step), skipped)
            for optimizer in optimizers:
                optimizer.zero_grad()

            run.peers.step = step_done
            lock.at(step_done)
            if step == first_step:
                run.timeout.first_step_done()
                write_run(run)
            sync_seconds, bytes_sent = sync.take()
            step_seconds = time.perf_counter() - step_start
            throughput.add(len(plan.batch(step)) * config.sequence_length, step_seconds)
            own_seconds += step_seconds - sync_seconds
            bar.update()
            usual_loss = spikes.usual(mean_loss)
            if usual_loss is not None:
                logger.warning(f"step {step_done}: loss {mean_loss:.4f} is a spike, usual is {usual_loss:.4f}")
                run.log.write(step=step_done, event="loss_spike", loss=mean_loss, usual_loss=usual_loss)
            if is_due(config.log_every, step_done, plan.num_steps):
                mine = [metrics.peak_memory_bytes(accelerator.device), own_seconds]
                of_all = gather(
                    torch.tensor([mine], dtype=metrics.sum_dtype(accelerator.device), device=accelerator.device)
                ).cpu()
                name_straggler(run, step_done, of_all[:, 1].tolist())
                own_seconds = 0.0
                tokens_per_second, mfu = throughput.take()
                row = {
                    "step": step_done,
                    "epoch": plan.num_samples(step_done) / len(inputs.dataset),
                    "tokens": plan.num_samples(step_done) * config.sequence_length,
                    "loss": mean_loss,
                    "grad_norm": grad_norm,
                    "learning_rate": learning_rate(step),
                    "tokens_per_second": tokens_per_second,
                    "step_seconds": step_seconds,
                    "data_seconds": data_seconds,
                    "compute_seconds": step_seconds - data_seconds - sync_seconds,
                    "sync_seconds": sync_seconds,
                    "bytes_sent": bytes_sent,
                    "mfu": mfu,
                    "peak_memory_bytes": int(of_all[:, 0].max()),
                    "num_processes": accelerator.num_processes,
                }
                run.log.write(**row)
                accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step_done)
                bar.set_postfix(loss=f"{mean_loss:.4f}", tokens_per_second=f"{tokens_per_second:,.0f}")
                logger.info(
                    f"step {step_done}/{plan.num_steps}  loss {mean_loss:.4f}  grad norm {grad_norm:.2f}  "
                    f"lr {learning_rate(step):.2e}  {tokens_per_second:,.0f} tokens/s"
                )
            eval_due = inputs.eval_dataset and is_due(config.eval_every, step_done, plan.num_steps)
            if eval_due and not stopped_by:
                results = evaluate(run, model, step_done)
            if not stopped_by and is_due(config.sample_every, step_done, plan.num_steps):
                write_sample(run, model, step_done)

            save_due = is_due(config.checkpoint_every, step_done, plan.num_steps) or bool(stopped_by)
            if save_due or is_due(config.check_replicas_every, step_done, plan.num_steps):
                check_replicas(run, model, optimizers, step_done)
            if save_due:
                eval_loss = results["eval_loss"] if eval_due and not stopped_by else None
                facts = {"learning_rate": learning_rate(step_done), "eval_loss": eval_loss}
                save(run, model, optimizers, step_done, facts, last=bool(stopped_by))
            report_saves(run)
            if stopped_by:
                break

    final = lock.folder / "final"
    finish(run, model, results, final, stopped_by)
    stop.done()
    # DDP goes before its process group: as its last owner it would destroy it with Python's lock in hand, while
    # gloo's threads need that lock to drop their last tensors (a deadlock in torch 2.13).
    del model
    accelerator.free_memory()
    accelerator.end_training()
    if stopped_by:
        raise Stopped(f"stopped after step {step_done} by {stopped_by}; start it again, and it goes on from there")
    return final


# What the loop does now and then


def settle_buckets(run: Run, model: torch.nn.Module, optimizers: list) -> None:
    """Lets DDP order its buckets for good, which it does after its first backward pass: here, one without labels.

    In which order a ring adds up more than two numbers depends on their place in a bucket: the first step after a
    resume would round otherwise than the same step of a run that was never stopped.
    """
    if run.accelerator.num_processes > 2:
        block = run.inputs.dataset[blocks.EMPTY_BLOCK]
        inputs = {name: tensor[None].to(run.accelerator.device) for name, tensor in block.items()}
        labels = inputs.pop("labels")
        loss = models.next_token_loss(model(**inputs, use_cache=False).logits, labels)
        run.accelerator.backward(loss)
        for optimizer in optimizers:
            optimizer.zero_grad()


def begin_totals(run: Run, losses: list[torch.Tensor], stop_reason: str) -> tuple[torch.Tensor, Callable[[], object]]:
    """Begins to add up, over all processes, the step's loss and how many of them are told to stop.

    Returns:
        A tensor [2] of both, and a function that waits until it is complete.
    """
    if stop_reason:
        run.peers.set_first("stop", stop_reason)
    dtype = metrics.sum_dtype(run.accelerator.device)
    totals = torch.stack([torch.stack(losses).sum().to(dtype), losses[0].new_tensor(bool(stop_reason), dtype=dtype)])
    if run.accelerator.num_processes == 1:
        return totals, lambda: None
    return totals, dist.all_reduce(totals, async_op=True).wait


def skip_step(run: Run, step: int, losses: list[torch.Tensor], samples: list[int], skipped: int) -> None:
    """Leaves out a step whose loss or gradient is not finite, or ends the run; call on all processes.

    Args:
        step: steps done, with this one.
        losses: of this process's micro-batches.
        samples: of this process.
        skipped: how many such steps there have been in a row.

    Raises:
        UserError: `--on-nonfinite stop`, or too many.
    """
    size = run.config.micro_batch_size
    bad = [i for n, loss in enumerate(losses) if not torch.isfinite(loss) for i in samples[n * size : (n + 1) * size]]
    found = [(rank, ids) for rank, ids in enumerate(gather_object([bad])) if ids]
    where = "; ".join(f"process {rank}, samples {ids}" for rank, ids in found) or "in no loss, only in the gradient"
    run.log.write(step=step, event="not_finite", where=where)
    if run.config.on_nonfinite == "stop" or skipped > run.config.max_skipped_steps:
        raise UserError(
            f"step {step}: not finite: {where} ({skipped} such step(s) in a row). The weights are as before this "
            "step; lower --learning-rate, look at these samples, or give --on-nonfinite skip"
        )
    logger.warning(f"step {step} is skipped: not finite: {where}")
    if run.accelerator.scaler:
        run.accelerator.scaler.update()


def evaluate(run: Run, model: torch.nn.Module, step: int) -> dict[str, float]:
    """Measures the model on the held-out blocks, logs and returns what it found. Call on all processes."""
    run.peers.set_status("evaluating")
    run.inputs.eval_store.check_unchanged()
    start = time.monotonic()
    store = run.inputs.eval_store.manifest
    results = metrics.evaluate_model(
        run.accelerator,
        model,
        run.inputs.eval_dataset,
        run.config.micro_batch_size,
        tokens_per_byte=store["num_tokens"] / store["num_text_bytes"],
        meet=lambda: run.peers.barrier(f"evaluated/{step}"),
    )
    run.timeout.paused(time.monotonic() - start)
    results["eval_loss"] = results.pop("loss")
    run.log.write(step=step, **results)
    run.accelerator.log(results, step=step)
    logger.info(
        f"step {step}: held-out loss {results['eval_loss']:.4f}  perplexity {results['perplexity']:,.2f}  "
        f"{results['bits_per_byte']:.3f} bits/byte  accuracy {results['next_token_accuracy']:.1%}"
    )
    return results


def name_straggler(run: Run, step: int, seconds: list[float]) -> None:
    """Says which process the others wait for, where it takes twice as long as they do.

    Args:
        step: steps done.
        seconds: what each process has taken by itself since this was last asked.
    """
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = sorted(seconds[:slowest] + seconds[slowest + 1 :])
    usual = others[(len(others) - 1) // 2] if others else math.inf
    if seconds[slowest] > 2 * usual:
        host = run.agreement.peers[slowest]["host"]
        logger.warning(
            f"step {step}: the others wait for process {slowest} on {host}, which takes "
            f"{seconds[slowest] / usual:.1f} times as long; --shares can give it less"
        )
        run.log.write(step=step, event="straggler", process=slowest, host=host, ratio=seconds[slowest] / usual)


def write_sample(run: Run, model: torch.nn.Module, step: int) -> None:
    """Lets the main process write some text, for which the others wait. Call on all processes."""
    run.peers.set_status("writing a sample")
    if run.accelerator.is_main_process:
        model = run.accelerator.unwrap_model(model)
        text = models.generate_text(model, run.inputs.tokenizer, run.config.sample_prompt, run.config.seed)
        run.log.write(step=step, event="sample", text=text)
        logger.info(f"step {step}: sample: {text}")
    run.peers.barrier(f"sample/{step}")


def check_replicas(run: Run, model: torch.nn.Module, optimizers: list, step: int) -> None:
    """Compares weights and optimizer state of all processes; call on all. DivergedError where they are not equal."""
    run.peers.set_status("comparing its replica")
    replica = cluster.replica(run.accelerator.unwrap_model(model), optimizers)
    if diverged := cluster.find_diverged(run.accelerator, replica, run.agreement):
        run.log.write(step=step, event="diverged", message=diverged)
        raise DivergedError(f"step {step}: {diverged}; its memory is faulty, or something has changed it")


def save(run: Run, model: torch.nn.Module, optimizers: list, step: int, facts: dict, last: bool) -> None:
    """Saves a checkpoint on each machine that keeps them; call on all processes.

    Args:
        step: steps done.
        facts: of this step, for the checkpoint's state.
        last: the run ends with it: it is waited for, and outlives a launcher that kills this process.
    """
    run.peers.set_status("saving")
    start = time.monotonic()
    finish_saves(run, f"save/{step}")
    if run.saves:
        write = run.saver.save_surviving if last else run.saver.save
        write(step, run.accelerator.unwrap_model(model), optimizers, describe_state(run, step) | facts)
    if last:
        finish_saves(run, f"last/{step}")
        saved = run.saver.last_step == step
        if not any(facts["saved"] for facts in run.peers.all_gather({"saved": saved}, f"saved/{step}")):
            raise UserError(f"step {step} could not be saved on any machine: make room on a disk. {RESUME_HINT}")
    elif not run.config.checkpoint_async:
        run.peers.barrier(f"saved/{step}")
    run.timeout.paused(time.monotonic() - start)


def finish_saves(run: Run, name: str) -> None:
    """Waits until no process writes a checkpoint, and has the main one say which of the others could not; call on all.

    A slow disk of one machine is waited for here, where waiting has no time-out.
    """
    run.saver.wait()
    report_saves(run)
    mine = {"failed_saves": list(run.failed_saves)}
    run.failed_saves.clear()
    for rank, theirs in enumerate(run.peers.all_gather(mine, name, HANG_SECONDS)):
        if run.accelerator.is_main_process and rank != run.world.process_index:
            for failed in theirs["failed_saves"]:
                say_failed(run, failed)


def report_saves(run: Run) -> None:
    """Says which checkpoints of this machine have been written since it was last asked, and which could not be."""
    for outcome in run.saver.outcomes():
        step, host, error = outcome.step, run.peers.host, outcome.error
        if outcome.path:
            run.log.write(step=step, event="checkpoint", path=str(outcome.path), seconds=outcome.seconds)
            if error:
                logger.error(f"{host}: the checkpoint of step {step} is written, but {error}")
        else:
            failed = {"step": step, "event": "checkpoint_failed", "host": host, "error": error}
            say_failed(run, failed)
            run.failed_saves.append(failed)


def say_failed(run: Run, failed: dict) -> None:
    """Says that a checkpoint was not written: here, and in the main process's metrics.jsonl."""
    logger.error(f"{failed['host']}: the checkpoint of step {failed['step']} was not written: {failed['error']}")
    run.log.write(**failed)


def wait_for_save(run: Run) -> None:
    """Waits, not without end, until the save that is under way is on the disk, and says how it went."""
    waiting = threading.Thread(target=run.saver.wait, daemon=True)
    waiting.start()
    waiting.join(run.config.grace_seconds)
    report_saves(run)


def on_peer_error(run: Run, error: BaseException) -> None:
    """When this process ends for an error that another one has caused."""
    wait_for_save(run)
    if isinstance(error, PeerLostError):
        run.log.write(step=run.peers.step, event="peer_lost", message=str(error))


def finish(run: Run, model: torch.nn.Module, results: dict, final: Path, stopped_by: str) -> None:
    """Waits for the last checkpoint and, unless the run was stopped, writes the final model; call on all processes."""
    run.peers.set_status("finishing")
    run.saver.wait()
    report_saves(run)
    if stopped_by:
        run.log.write(step=run.peers.step, event="stop", reason=stopped_by)
    elif run.accelerator.is_main_process:
        card = {"steps": run.peers.step, **results, "configuration": dataclasses.asdict(run.config)}
        models.save_final(run.accelerator.unwrap_model(model), run.inputs.tokenizer, final, card)
        write_run(run)
        logger.info(f"done: the model lies in {final}, the metrics in {final.with_name('metrics.jsonl')}")
    for tracker in run.accelerator.trackers:
        tracker.finish()  # it may take its time; at the meeting that is waited for
    run.accelerator.trackers = []
    finish_saves(run, "saves")
    run.peers.barrier("end")
    if stopped_by:
        run.peers.release_launchers()


# What is written of the run


def begin_log(run: Run, state: dict | None) -> None:
    """Writes run.json and, of a run that goes on, where and with which other settings."""
    write_run(run)
    if state:
        now = run.agreement.peers[0]["config"] | {"mixed_precision": run.agreement.mixed_precision}
        changed = changed_settings(state["config"], now)
        logger.info("; ".join([f"resuming after step {state['step']} of {run.inputs.plan.num_steps}", *changed]))
        run.log.write(step=state["step"], event="resume", num_processes=run.accelerator.num_processes, changed=changed)


def describe_state(run: Run, step: int) -> dict:
    """Returns what a checkpoint says beside its tensors: the same on all machines."""
    num_samples, num_blocks = run.inputs.plan.num_samples(step), run.inputs.plan.num_blocks
    scaler = run.accelerator.scaler
    return {
        "run": run.inputs.run,
        "config": run.agreement.peers[0]["config"] | {"mixed_precision": run.agreement.mixed_precision},
        "world": [{"host": peer["host"], "device": peer["device_name"]} for peer in run.agreement.peers],
        "sampler": {"num_samples": num_samples, "num_blocks": num_blocks, "epoch": num_samples / num_blocks},
        "random": {"seed": run.config.seed, "of_a_step": "hash((seed, step, process_index))"},
        "scaler": scaler.state_dict() if scaler else None,
    }


def changed_settings(before: dict, now: dict) -> list[str]:
    """Returns which flags are other than when the checkpoint was written."""
    return [
        f"{flag_name(name)} was {before[name]!r} and is now {value!r}"
        for name, value in now.items()
        if name in before and before[name] != value and name != "resume"
    ]


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


def write_run(run: Run) -> None:
    """Writes run.json on the main process: what the run is, for people and programs."""
    if not run.accelerator.is_main_process:
        return
    content = {
        "config": dataclasses.asdict(run.config),
        "batches": dataclasses.asdict(run.inputs.plan) | {"shares": run.shares},
        "world": [{k: v for k, v in peer.items() if k != "config"} for peer in run.agreement.peers],
        "backend": run.agreement.backend,
        "mixed_precision": run.agreement.mixed_precision,
        "process_group_timeout": run.timeout.describe(),
        "run": run.inputs.run,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (Path(run.config.output_dir).expanduser() / "run.json").write_text(text, encoding="utf-8")


def split_batch(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """Cuts [n, ...] tensors into micro-batches of up to `size` sequences."""
    parts = {name: tensor.split(size) for name, tensor in batch.items()}
    return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]


def is_due(every: int, step: int, num_steps: int) -> bool:
    """Tells whether something that happens every so many steps, and at the end, happens after `step` steps."""
    return every > 0 and (step % every == 0 or step == num_steps)


def not_a_terminal(accelerator: Accelerator) -> bool:
    """Tells whether this process shall show no progress bar."""
    return not (accelerator.is_main_process and sys.stderr.isatty())


if __name__ == "__main__":
    with ignore_output_errors(), report_errors("train.py"):
        main(parse_config(TrainConfig, sys.argv[1:], description=__doc__))
