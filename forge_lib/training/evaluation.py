"""Evaluates a model on held-out blocks, and lets it write samples, during training and afterwards."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from forge_lib.data.corpus import begins_documents
from forge_lib.data.tokenizing import prompt_ids
from forge_lib.models.evaluation_mode import evaluation_mode
from forge_lib.models.generation import generate_ids
from forge_lib.models.loading import max_positions
from forge_lib.models.loss import evaluation_sums
from forge_lib.progress import ProgressBar
from forge_lib.training.run import Run
from forge_lib.training.totals import sum_dtype

SAMPLE_TOKENS = 100
logger = logging.getLogger("forge")


@torch.no_grad()
def evaluation_rows(
    accelerator: Accelerator,
    model: nn.Module,
    dataset: Dataset,
    batch_size: int,
    barrier: Callable[[], object] = lambda: None,
    use_copy: bool = False,
    shares: Sequence[int] = (),
) -> torch.Tensor:
    """Returns [num_processes, 3] fp64: the sums of `evaluation_sums` over the blocks that each process has evaluated.

    Every target counts once, whatever the number of processes. Call on all processes; all get the same result.

    Args:
        accelerator: the processes.
        model: prepared or not.
        dataset: a BlockDataset or a subset of it.
        batch_size: sequences per forward pass.
        barrier: waits for the other processes before the sums are gathered; it may take up to an hour.
        use_copy: of `evaluation_mode`.
        shares: each process evaluates a part of this size relative to the others, by rank; empty: equal parts.
    """
    parts = np.cumsum([0, *(shares or [1] * accelerator.num_processes)])
    start, stop = np.rint(parts * len(dataset) / parts[-1]).astype(int)[accelerator.process_index :][:2]
    mine = Subset(dataset, range(start, stop))
    sums = torch.zeros(3, dtype=torch.float64)
    shown = ProgressBar("evaluating", -(-len(mine) // batch_size), "batch", accelerator.is_main_process)
    with evaluation_mode(accelerator.unwrap_model(model), use_copy) as evaluated, shown as progress:
        for batch in DataLoader(mine, batch_size=batch_size):
            progress.add()
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            with accelerator.autocast():
                sums += torch.tensor(evaluation_sums(evaluated, batch), dtype=torch.float64)
    barrier()
    return gather(sums.to(accelerator.device, sum_dtype(accelerator.device))[None]).cpu().double()


def evaluate_model(
    accelerator: Accelerator, model: nn.Module, dataset: Dataset, batch_size: int, tokens_per_byte: float, **options
) -> dict[str, float]:
    """Returns eval_tokens, loss, perplexity, bits_per_byte and next_token_accuracy over all blocks of `dataset`.

    Args:
        accelerator, model, dataset, batch_size, options: of `evaluation_rows`.
        tokens_per_byte: tokens of the data per UTF-8 byte of it.
    """
    from forge_lib.training.evaluation_metrics import compute_metrics  # evaluate and datasets: seconds of imports

    rows = evaluation_rows(accelerator, model, dataset, batch_size, **options)
    return compute_metrics(rows.numpy(), tokens_per_byte)


def evaluation_totals(run: Run, model: nn.Module, dataset: Dataset, name: str) -> list[float]:
    """Returns the sums of `evaluation_sums` over some held-out blocks of a run. Call on all processes.

    Args:
        run, model: of which.
        dataset: the blocks.
        name: of the blocks; no other call at the same step has it.
    """
    run.inputs.eval_store.check_unchanged()
    rows = evaluation_rows(
        run.accelerator,
        model,
        dataset,
        run.config.micro_batch_size,
        barrier=lambda: run.peers.barrier(f"evaluated/{run.step}/{name}"),
        use_copy=run.inputs.changes_in_evaluation,
        shares=run.balancer.shares,
    )
    return rows.sum(dim=0).tolist()


def evaluate(run: Run, model: nn.Module) -> None:
    """Evaluates the model on the run's held-out blocks, and logs the results. Call on all processes."""
    with run.pause("evaluating"):
        run.inputs.eval_store.check_unchanged()
        results = evaluate_model(
            run.accelerator,
            model,
            run.inputs.eval_dataset,
            run.config.micro_batch_size,
            run.inputs.eval_tokens_per_byte,
            barrier=lambda: run.peers.barrier(f"evaluated/{run.step}"),
            use_copy=run.inputs.changes_in_evaluation,
            shares=run.balancer.shares,
        )
    results["eval_loss"] = results.pop("loss")
    run.log_evaluation(results)


def write_sample(run: Run, model: nn.Module) -> None:
    """Lets the main process generate some text; the other processes wait for it. Call on all processes."""
    run.peers.set_status("writing a sample")
    if run.accelerator.is_main_process:
        tokenizer = run.inputs.tokenizer
        prompt = prompt_ids(tokenizer, run.config.sample_prompt, begins_documents(run.inputs.store))
        with evaluation_mode(run.accelerator.unwrap_model(model), run.inputs.changes_in_evaluation) as evaluated:
            room = (max_positions(evaluated) or SAMPLE_TOKENS + len(prompt)) - len(prompt)
            num_tokens = max(1, min(SAMPLE_TOKENS, room))
            ids = generate_ids(evaluated, prompt, tokenizer.eos_token_id, run.config.seed, num_tokens)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        run.log.write(step=run.step, event="sample", text=text)
        run.trackers.log_text("sample", text, run.step)
        logger.info(f"step {run.step}: sample: {text}")
    run.peers.barrier(f"sample/{run.step}")
