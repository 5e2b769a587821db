"""Tokens/s and peak memory of train.py, beside transformers.Trainer on the same model and blocks.

Both train in turn (A B A B …), each time in a process of its own, with one thread. A ratio is the median over the
rounds; a single figure depends on what else the machine does.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from forge_lib.benchmark.processes import Finished, run_programs
from forge_lib.benchmark.trainer import Task
from forge_lib.errors import UserError

WARM_STEPS = 2
LEAST_VOCABULARY = 2048  # of the models that are measured
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)  # as in train.py
MAX_BF16_DIFFERENCE = 0.02  # the same, if one of both may train in bf16
MAX_LOSS_DIFFERENCE = 1e-4  # relative, in fp32: a larger one means that the trainers do not train the same
LLAMA = {"intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}


@dataclass(frozen=True)
class Workload:
    """A model and its batch.

    Attributes:
        name: in tables.
        config: of the model; the weights are random.
        batch_size: sequences of a step of all processes.
        sequence_length: tokens per sequence.
        steps: measured optimizer steps.
        flags: of train.py, in addition.
        has_defaults: whether both choose precision and threads themselves; else fp32, and one thread per process.
        on_gpu: whether both train on the GPU; else on the CPU.
    """

    name: str
    config: PreTrainedConfig
    batch_size: int = 8
    sequence_length: int = 256
    steps: int = 6
    flags: Sequence[str] = ()
    has_defaults: bool = False
    on_gpu: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.sequence_length


def llama(vocab_size: int = 8192, hidden_size: int = 256, positions: int = 2048) -> LlamaConfig:
    """Returns a small Llama; with the defaults it has 9.3 million parameters."""
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, max_position_embeddings=positions,
        **(LLAMA | {"intermediate_size": 3 * hidden_size}),
    )  # fmt: skip


LLAMA_9M = Workload("Llama, 9 M", llama())
GPT2_124M = Workload("GPT-2, 124 M", GPT2Config(**NO_DROPOUT), batch_size=4, steps=3)
LLAMA_LONG = Workload("Llama, 9 M, sequence 2,048", llama(), batch_size=1, sequence_length=2048)
LLAMA_49K = Workload("Llama, vocabulary 49,152", llama(49_152), batch_size=4, sequence_length=1024, steps=3)
ON_GPU = {"batch_size": 32, "sequence_length": 512, "steps": 20, "has_defaults": True, "on_gpu": True}
GPU_WORKLOADS = (
    Workload("GPT-2, 124 M", GPT2Config(**NO_DROPOUT), **ON_GPU),
    Workload("Llama, 12 x 768, vocabulary 49,152", LlamaConfig(
        vocab_size=49_152, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4,
    ), **ON_GPU),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One run of one trainer.

    Attributes:
        tokens_per_second: median over the steps after the first ones.
        peak_bytes: largest resident memory of a process, from its start to its end; or that of the GPU.
        losses: of each step.
    """

    tokens_per_second: float
    peak_bytes: int
    losses: list[float]


@dataclass(frozen=True)
class StepFigure:
    """train.py beside Trainer; `ratios` has one for each round, and `speed_ratio` is their median.

    Attributes:
        workload: its name.
        baseline: a key of trainer.KINDS.
        num_processes: of both.
        tokens_per_second, baseline_tokens_per_second: medians.
        peak_bytes, baseline_peak_bytes: medians.
        memory_ratio: of them.
        loss_difference: largest relative difference of the losses of the same step.
    """

    workload: str
    baseline: str
    num_processes: int
    tokens_per_second: float
    baseline_tokens_per_second: float
    speed_ratio: float
    ratios: list[float]
    peak_bytes: int
    baseline_peak_bytes: int
    memory_ratio: float
    loss_difference: float


class Setting:
    """Where the programs find their models and their data.

    Args:
        folder: for models, data and runs.
        model_name: its tokenizer is used.
        dataset: path of the text.

    Raises:
        UserError: the tokenizer has too many tokens.
    """

    def __init__(self, folder: Path, model_name: str, dataset: str):
        self.folder, self._model_name = folder, model_name
        if (size := len(transformers.AutoTokenizer.from_pretrained(model_name))) > LEAST_VOCABULARY:
            raise UserError(
                f"--model-name {model_name}: its tokenizer has {size:,} tokens; step, memory and start need one of at "
                f"most {LEAST_VOCABULARY:,}, as in data/tiny_gpt2, because they change the size of the vocabulary"
            )
        self.store = folder / "store"
        flags = ["--model-name", model_name, "--dataset-path", dataset, "--sample-by", "paragraph"]
        run_programs([["python", "scripts/prepare_data.py", *flags, "--output-dir", self.store]])

    def model(self, workload: Workload) -> Path:
        """Returns the folder of a model with random weights, which it writes if it is not there."""
        folder = self.folder / "".join(c if c.isalnum() else "_" for c in workload.name)
        if not folder.exists():
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(workload.config).save_pretrained(folder)
            transformers.AutoTokenizer.from_pretrained(self._model_name).save_pretrained(folder)
        return folder


def compare_steps(setting: Setting, workload: Workload, kind: str, num_processes: int, rounds: int) -> StepFigure:
    """Trains with train.py and with Trainer in turn, and returns the figure.

    Args:
        setting: models and data.
        workload: what is trained.
        kind: of the baseline, a key of trainer.KINDS; if it names "compiled", train.py compiles too.
        num_processes: of both.
        rounds: how often each of both trains.
    """
    pairs = []
    for _ in range(rounds):
        ours = train(setting, workload, num_processes, "compiled" in kind)
        pairs.append((ours, train_baseline(setting, workload, num_processes, kind)))
    figure = _compare(workload, kind, num_processes, pairs)
    print(json.dumps(asdict(figure)), file=sys.stderr, flush=True)
    return figure


def train(setting: Setting, workload: Workload, num_processes: int = 1, compiled: bool = False) -> Measured:
    """Trains with train.py."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model-name", setting.model(workload), "--dataset-path", setting.store, "--output-dir", folder]
        flags += ["--batch-size", workload.batch_size, "--device", "cuda" if workload.on_gpu else "cpu"]
        flags += ["--sequence-length", workload.sequence_length, "--max-steps", WARM_STEPS + workload.steps]
        flags += ["--mixed-precision", "auto" if workload.has_defaults else "no", "--write-report", "false"]
        flags += ["--lr-scheduler", "constant", "--log-every", 1, "--eval-every", 0, "--checkpoint-every", 0]
        flags += [*(["--compile"] if compiled else []), *workload.flags]
        ended = _run(["scripts/train.py", *flags], num_processes, workload.has_defaults)
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    speed = statistics.median(row["tokens_per_second"] for row in steps[WARM_STEPS:])
    peak = max(row["peak_memory_bytes"] or 0 for row in steps) if workload.on_gpu else ended.peak_bytes
    return Measured(speed, peak, [row["loss"] for row in steps])


def train_baseline(setting: Setting, workload: Workload, num_processes: int = 1, kind: str = "best") -> Measured:
    """Trains with transformers.Trainer, a kind of trainer.KINDS."""
    task = Task(
        model=str(setting.model(workload)), store=str(setting.store), kind=kind, steps=WARM_STEPS + workload.steps,
        batch_size=workload.batch_size, sequence_length=workload.sequence_length, num_processes=num_processes,
        checkpointing="--gradient-checkpointing" in workload.flags, on_gpu=workload.on_gpu,
    )  # fmt: skip
    ended = _run(["-m", "forge_lib.benchmark.trainer", json.dumps(asdict(task))], num_processes, workload.has_defaults)
    found = json.loads(ended.output.splitlines()[-1])
    seconds = statistics.median(found["seconds"][WARM_STEPS - 1 :])
    return Measured(workload.tokens / seconds, found["gpu_bytes"] or ended.peak_bytes, found["losses"])


def _run(words: Sequence[object], num_processes: int, chooses_threads: bool) -> Finished:
    """Runs a Python program, with torchrun if it has several processes; each has one thread, or chooses itself."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_processes]
    command = ["python", *(launcher if num_processes > 1 else []), *words]
    return run_programs([command], [{} if chooses_threads else {"OMP_NUM_THREADS": "1"}])


def _compare(workload: Workload, kind: str, num_processes: int, pairs: list[tuple[Measured, Measured]]) -> StepFigure:
    name = workload.name
    ratios = [ours.tokens_per_second / baseline.tokens_per_second for ours, baseline in pairs]
    differences = [
        abs(a - b) / b for ours, baseline in pairs for a, b in zip(ours.losses, baseline.losses, strict=True)
    ]

    if max(differences) > (MAX_BF16_DIFFERENCE if workload.has_defaults else MAX_LOSS_DIFFERENCE):
        raise RuntimeError(f"{name}: the losses differ by up to {max(differences):.1e}, so the speeds say nothing")

    def median(of: str, which: int) -> float:
        return statistics.median(getattr(pair[which], of) for pair in pairs)

    return StepFigure(
        workload=name,
        baseline=kind,
        num_processes=num_processes,
        tokens_per_second=median("tokens_per_second", 0),
        baseline_tokens_per_second=median("tokens_per_second", 1),
        speed_ratio=statistics.median(ratios),
        ratios=ratios,
        peak_bytes=int(median("peak_bytes", 0)),
        baseline_peak_bytes=int(median("peak_bytes", 1)),
        memory_ratio=median("peak_bytes", 0) / median("peak_bytes", 1),
        loss_difference=max(differences),
    )
