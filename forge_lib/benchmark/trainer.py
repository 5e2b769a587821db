"""transformers.Trainer on the model and the blocks of a run: the baseline of `scripts/benchmark.py step`.

    python -m forge_lib.benchmark.trainer '{"model": "…", "store": "…", …}'

Prints a JSON object with what `train` returns. It trains as train.py does with the same values: the same blocks in the
same order, the same initial weights, AdamW with the same rates.
"""

import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset, Sampler, SequentialSampler, Subset
from transformers import Trainer, TrainerCallback, TrainingArguments

from forge_lib.data.batches import BatchPlan
from forge_lib.data.blocks import BlockDataset, TokenStream
from forge_lib.data.token_store import open_store

KINDS = {  # arguments of Trainer: its defaults, and its fastest
    "default": {},
    "best": {"optim": "adamw_torch_fused"},
    "compiled": {"optim": "adamw_torch_fused", "torch_compile": True},
    "bf16": {"optim": "adamw_torch_fused", "bf16": True},
    "bf16, compiled": {"optim": "adamw_torch_fused", "bf16": True, "torch_compile": True},
}


@dataclass
class Task:
    """What Trainer trains.

    Attributes:
        model: folder with the weights.
        store: folder of the token store.
        kind: a key of KINDS.
        steps: optimizer steps.
        batch_size: sequences of a step of all processes.
        sequence_length: tokens per sequence.
        learning_rate, weight_decay, seed: as in train.py; the learning rate is constant.
        num_processes: of the run.
        checkpointing: whether it recomputes activations.
        on_gpu: whether it trains on the GPU; else on the CPU.
    """

    model: str
    store: str
    kind: str
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    seed: int = 0
    num_processes: int = 1
    checkpointing: bool = False
    on_gpu: bool = False


class _InOrder(Trainer):
    """Trains on the examples in their order."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(train_dataset or self.train_dataset)


class _Clock(TrainerCallback):
    """Takes the time at the end of each step, and the losses."""

    def __init__(self) -> None:
        self.times, self.losses = [], []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def train(task: Task) -> dict[str, Any]:
    """Trains; returns the seconds of each step but the first, the losses, and the peak of the GPU's memory, or 0."""
    torch.manual_seed(task.seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    model.loss_type = "ForCausalLM"  # gpt2 names none, and then Trainer counts one target too many per sequence
    store = open_store(Path(task.store))
    blocks = BlockDataset(TokenStream(store.tokens, store.documents), task.sequence_length)
    plan = BatchPlan.of_run(len(blocks), task.batch_size, task.steps, 1.0, task.seed)
    order = [int(block) for _, step in plan.batches(0) for block in step]
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=task.steps,
            per_device_train_batch_size=task.batch_size // task.num_processes,
            learning_rate=task.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=task.weight_decay,
            adam_beta2=0.95,
            use_cpu=not task.on_gpu,
            gradient_checkpointing=task.checkpointing,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **KINDS[task.kind],
        )
        _InOrder(model, arguments, train_dataset=Subset(blocks, order), callbacks=[clock]).train()
    return {
        "seconds": [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)],
        "losses": clock.losses,
        "gpu_bytes": torch.cuda.max_memory_allocated() if task.on_gpu else 0,
    }


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    found = train(Task(**json.loads(sys.argv[1])))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))
