r"""Trains a causal language model with peers that join and leave, over slow links: train.py plus this one feature.

The first peer, which also starts the lighthouse, and any other one, at any time:

    accelerate launch --config_file accelerate_configs/single_process.yaml scripts/train_elastic.py \
        --lighthouse http://10.77.0.1:29510 --serve-lighthouse \
        --model-name data/tiny_gpt2 --dataset-path data/sample_corpus.txt --output-dir runs/a
    accelerate launch --config_file accelerate_configs/single_process.yaml scripts/train_elastic.py \
        --lighthouse http://10.77.0.1:29510 \
        --model-name data/tiny_gpt2 --dataset-path data/sample_corpus.txt --output-dir runs/a

Each peer trains alone for a round of --sync-every steps; then all average how far they have moved (DiLoCo, arXiv
2311.08105). A peer that is lost costs the others at most its own round. docs/slow-links.md explains when to use this.
"""

import contextlib
import math
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from forge_lib.distributed.reporting import report_errors
from forge_lib.elastic.rounds import Rounds
from forge_lib.flags import parse_config
from forge_lib.models.loss import loss_sum
from forge_lib.models.optimizers import build_optimizers, learning_rate_schedule, set_learning_rate
from forge_lib.peers_config import ElasticConfig
from forge_lib.process import ignore_output_errors
from forge_lib.training.evaluation import write_sample
from forge_lib.training.inputs import Inputs
from forge_lib.training.run import Run


def main(config: ElasticConfig) -> Path:
    """Trains, and returns the folder of the final model, which the main process writes. Call on all processes.

    Raises:
        UserError: a mistake of the user, on any machine.
        PeerLostError, DivergedError: another process is lost, or its weights differ.
        Stopped: the run was asked to stop; if it had begun its steps, it is saved.
    """
    with Run(config) as run, Rounds(config, run) as rounds:  # opens the side channel, and connects to the other peers
        rounds.fetch_inputs()  # model and data, from another peer if missing
        accelerator = Accelerator(**run.join())  # join: all processes agree, and lock their run folders
        inputs = run.load_inputs(accelerator)  # tokenizer, model, data, plan; copied from another machine if missing
        optimizers = build_optimizers(inputs.model, config)
        run.resume([*optimizers, rounds.build_outer()])  # opens the logs; loads the newest checkpoint, if any
        train(config, run, rounds, accelerator, inputs, optimizers)
        rounds.finish()  # a peer that is late gets the complete run
        return run.finish()  # here, not in train(): DDP must be freed before its process group


def train(
    config: ElasticConfig,
    run: Run,
    rounds: Rounds,
    accelerator: Accelerator,
    inputs: Inputs,
    optimizers: list[torch.optim.Optimizer],
) -> None:
    """Trains until the last step, or until this peer is asked to stop. Its processes call the same collectives.

    Args:
        config: every flag.
        run: the methods for everything else: random seeds, logs, checkpoints, stop requests.
        rounds: the methods for the other peers.
        accelerator: the processes of this peer.
        inputs: model and data.
        optimizers: of `inputs.model`.
    """
    model, *optimizers = accelerator.prepare(inputs.model, *optimizers)
    learning_rate = learning_rate_schedule(config, inputs.plan.num_steps)
    max_grad_norm = config.max_grad_norm or math.inf  # inf: no clipping
    eval_every = config.eval_every if inputs.eval_dataset else 0
    run.begin(model, optimizers, also_save=[rounds.outer])  # as in train.py; the outer optimizer is saved, too
    learning_rate = rounds.begin(optimizers, learning_rate)  # takes over the newest weights; begins a round
    if run.is_due(eval_every):  # here: in a new run, and in one that is already complete, for its model card
        rounds.evaluate(model)

    for step, blocks, batch in run.steps(rounds.batches()):  # ends early if this peer is asked to stop
        # 1. Batch. `blocks` are this peer's next ones, which no other peer has; `batch` is this process's share of
        #    them, at least one block.
        num_targets = max(1, rounds.num_targets(blocks))
        set_learning_rate(optimizers, learning_rate(step))

        # 2. Gradient. The loss is the sum over the predicted tokens of the peer's batch, divided by their number. DDP
        #    averages gradients over the processes, so each process multiplies its part by their number.
        losses = []
        for micro_batch, is_last in run.micro_batches(batch):
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                loss = loss_sum(model, micro_batch)  # in nats
                losses.append(loss.detach())
                if is_last:
                    run.begin_totals(losses)  # all-reduces the loss and stop requests during the backward pass
                accelerator.backward(loss * accelerator.num_processes / num_targets)
        rounds.add_gradients()  # of all peers, with --sync-every 1
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        total_loss, grad_norm = rounds.totals(grad_norm)
        mean_loss = total_loss / num_targets

        # 3. Update. If not finite, the update is skipped (the step counts) or the run ends (--on-nonfinite). For an
        #    overflow of fp16, the gradient scaler skips the update.
        if rounds.may_update() and run.may_update(mean_loss, grad_norm):
            for optimizer in optimizers:
                optimizer.step()  # a hook waits here while a checkpoint still copies the weights (CPU)
        for optimizer in optimizers:
            optimizer.zero_grad()

        # 4. Average, at the end of a round. Then run.step has the steps of all peers, and the weights are equal again.
        rounds.step_done(mean_loss, grad_norm)

        # 5. Periodic work: only the save, if asked to stop. The save records the evaluation before it.
        if run.is_due(eval_every):
            rounds.evaluate(model)
        if run.is_due(config.sample_every):
            write_sample(run, model)
        if run.must_save():
            run.save(next_learning_rate=learning_rate(step + 1))  # in the background, unless asked to stop


if __name__ == "__main__":
    with ignore_output_errors(), report_errors("train_elastic.py"):
        main(parse_config(ElasticConfig, sys.argv[1:], description=__doc__))
