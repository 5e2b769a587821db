r"""Trains a causal language model, data-parallel, on one machine or on several.

One process:

    python scripts/train.py --model-name data/tiny_gpt2 --dataset-path data/sample_corpus.txt --output-dir runs/a

Two processes on this machine, or the processes of several machines (the same command on each):

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml scripts/train.py \
        --model-name data/tiny_gpt2 --dataset-path data/sample_corpus.txt --output-dir runs/a
    accelerate launch --config_file accelerate_configs/multi_node.yaml scripts/train.py \
        --model-name gpt2 --dataset-path corpus/ --output-dir runs/a

The number of processes does not change the losses. Start a stopped run again with the same command to continue it.
"""

import contextlib
import math
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from forge_lib.config import TrainConfig
from forge_lib.distributed.reporting import report_errors
from forge_lib.flags import parse_config
from forge_lib.models.loss import loss_sum
from forge_lib.models.optimizers import build_optimizers, learning_rate_schedule, set_learning_rate
from forge_lib.process import ignore_output_errors
from forge_lib.training.evaluation import evaluate, write_sample
from forge_lib.training.inputs import Inputs
from forge_lib.training.run import Run


def main(config: TrainConfig) -> Path:
    """Trains, and returns the folder of the final model, which the main process writes. Call on all processes.

    Raises:
        UserError: a mistake of the user, on any machine.
        PeerLostError, DivergedError: another process is lost, or its weights differ.
        Stopped: the run was asked to stop; if it had begun its steps, it is saved.
    """
    with Run(config) as run:  # opens the side channel: an error in this block is reported to all processes
        accelerator = Accelerator(**run.join())  # join: all processes agree, and lock their run folders
        inputs = run.load_inputs(accelerator)  # tokenizer, model, data, plan; copied from another machine if missing
        optimizers = build_optimizers(inputs.model, config)
        run.resume(optimizers)  # in every run: opens the logs; loads the newest checkpoint of any machine, if any
        train(config, run, accelerator, inputs, optimizers)
        return run.finish()  # here, not in train(): DDP must be freed before its process group


def train(
    config: TrainConfig, run: Run, accelerator: Accelerator, inputs: Inputs, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Trains until the last step, or until the run is asked to stop. All processes call the same collectives.

    Args:
        config: every flag.
        run: the methods for everything else: random seeds, logs, checkpoints, stop requests.
        accelerator: the processes.
        inputs: model and data.
        optimizers: of `inputs.model`.
    """
    model, *optimizers = accelerator.prepare(inputs.model, *optimizers)
    learning_rate = learning_rate_schedule(config, inputs.plan.num_steps)
    max_grad_norm = config.max_grad_norm or math.inf  # inf: no clipping
    eval_every = config.eval_every if inputs.eval_dataset else 0
    run.begin(model, optimizers)  # run.step, the fp16 scaler, DDP's buckets and its hook for --gradient-compression
    if run.is_due(eval_every):  # here: in a new run, and in one that is already complete, for its model card
        evaluate(run, model)

    for step, blocks, batch in run.steps():  # from 0 or from the checkpoint's step; ends early if asked to stop
        # 1. Batch. `blocks`, the global batch, depends only on (seed, data, batch size, step); `batch` is this
        #    process's share of it, at least one block.
        num_targets = max(1, inputs.dataset.num_targets(blocks))
        set_learning_rate(optimizers, learning_rate(step))

        # 2. Gradient. The loss is the sum over the predicted tokens of the global batch, divided by their number. DDP
        #    averages gradients over the processes, so each process multiplies its part by their number.
        losses = []
        for micro_batch, is_last in run.micro_batches(batch):
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                loss = loss_sum(model, micro_batch)  # in nats
                losses.append(loss.detach())
                if is_last:
                    run.begin_totals(losses)  # all-reduces the loss and stop requests during the backward pass
                accelerator.backward(loss * accelerator.num_processes / num_targets)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        total_loss, grad_norm = run.totals(grad_norm)  # over all processes; all learn whether one is asked to stop
        mean_loss = total_loss / num_targets

        # 3. Update. If not finite, the update is skipped (the step counts) or the run ends (--on-nonfinite). For an
        #    overflow of fp16, the gradient scaler skips the update.
        if run.may_update(mean_loss, grad_norm):
            for optimizer in optimizers:
                optimizer.step()  # a hook waits here while a checkpoint still copies the weights (CPU)
        for optimizer in optimizers:
            optimizer.zero_grad()

        # 4. Periodic work: only the save, if asked to stop. The save records the evaluation before it.
        run.step_done(mean_loss, grad_norm, learning_rate(step))  # adds 1 to run.step; logs; may compare the replicas
        if run.is_due(eval_every):
            evaluate(run, model)
        if run.is_due(config.sample_every):
            write_sample(run, model)
        if run.must_save():
            run.save(next_learning_rate=learning_rate(step + 1))  # in the background, unless asked to stop


if __name__ == "__main__":
    with ignore_output_errors(), report_errors("train.py"):
        main(parse_config(TrainConfig, sys.argv[1:], description=__doc__))
