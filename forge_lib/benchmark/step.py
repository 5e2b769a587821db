"""Tokens/s and peak memory of train.py, beside transformers.Trainer on the same model and blocks.

Both train in turn (A B A B …), each time in a process of its own, with one thread. A ratio is the median over the
rounds; a single figure depends on what else the machine does.
"""

import json
import socket
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from forge_lib.benchmark.processes import run_programs
from forge_lib.benchmark.trainer import Task

WARM_STEPS = 2
LLAMA = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}


@dataclass(frozen=True)
class Workload:
    """A model and its batch.

    Attributes:
        config: of the model; the weights are random.
        batch_size: sequences of a step.
        sequence_length: tokens per sequence.
        steps: measured optimizer steps.
    """

    config: PreTrainedConfig
    batch_size: int
    sequence_length: int
    steps: int = 6


WORKLOADS = {
    "llama 9 M": Workload(LlamaConfig(vocab_size=8192, **LLAMA), 8, 256),
    "gpt2 124 M": Workload(GPT2Config(), 4, 256, steps=3),
    "llama, vocabulary 49,152": Workload(LlamaConfig(vocab_size=49_152, **LLAMA), 4, 1024, steps=3),
}


@dataclass(frozen=True)
class Measured:
    """One run of one trainer.

    Attributes:
        tokens_per_second: median over the steps after the first ones.
        peak_bytes: largest resident memory of a process, from its start to its end.
        losses: of each step.
    """

    tokens_per_second: float
    peak_bytes: int
    losses: list[float]


@dataclass(frozen=True)
class StepFigure:
    """train.py beside Trainer; `ratios` has one for each round, and `speed_ratio` is their median.

    Attributes:
        workload, baseline: keys of WORKLOADS, and of trainer.KINDS.
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


def measure_steps(
    folder: Path, model_name: str, dataset: str, workloads: list[str], baselines: list[str], processes: list[int],
    rounds: int,
) -> Iterator[StepFigure]:  # fmt: skip
    """Yields a figure for each workload, baseline and number of processes.

    Args:
        folder: for models and runs.
        model_name: its tokenizer is used.
        dataset: path of the text.
        workloads, baselines: keys of WORKLOADS and of trainer.KINDS.
        processes: numbers of processes.
        rounds: how often each of both trains.
    """
    store = folder / "store"
    flags = ["--model-name", model_name, "--dataset-path", dataset, "--sample-by", "paragraph"]
    run_programs([["python", "scripts/prepare_data.py", *flags, "--output-dir", store]])
    for name in workloads:
        model = folder / name.replace(" ", "_").replace(",", "")
        _write_model(WORKLOADS[name].config, model_name, model)
        for count in processes:
            for kind in baselines:
                pairs = []
                for _ in range(rounds):
                    pairs.append((_train(WORKLOADS[name], model, store, count, kind == "compiled"),
                                  _train_baseline(WORKLOADS[name], model, store, count, kind)))  # fmt: skip
                yield _compare(name, kind, count, pairs)


def _write_model(config: PreTrainedConfig, model_name: str, folder: Path) -> None:
    """Writes a model folder with random weights."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model_name).save_pretrained(folder)


def _train(workload: Workload, model: Path, store: Path, num_processes: int, compiled: bool) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model-name", model, "--dataset-path", store, "--output-dir", folder, "--seed", 0]
        flags += ["--batch-size", workload.batch_size, "--micro-batch-size", workload.batch_size // num_processes]
        flags += ["--sequence-length", workload.sequence_length, "--max-steps", WARM_STEPS + workload.steps]
        flags += ["--mixed-precision", "no", "--lr-scheduler", "constant", "--log-every", 1, "--eval-every", 0]
        flags += ["--checkpoint-every", 0, *(["--compile"] if compiled else [])]
        variables = _variables(num_processes)
        command = ["python", "scripts/train.py", *flags]
        ended = run_programs([command] * num_processes, variables)
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    speed = statistics.median(row["tokens_per_second"] for row in steps[WARM_STEPS:])
    return Measured(speed, ended.peak_bytes, [row["loss"] for row in steps])


def _train_baseline(workload: Workload, model: Path, store: Path, num_processes: int, kind: str) -> Measured:
    task = Task(str(model), str(store), kind, WARM_STEPS + workload.steps, workload.batch_size,
                workload.sequence_length, num_processes=num_processes)  # fmt: skip
    command = ["python", "-m", "forge_lib.benchmark.trainer", json.dumps(asdict(task))]
    ended = run_programs([command] * num_processes, _variables(num_processes))
    found = json.loads(ended.output.splitlines()[-1])
    seconds = statistics.median(found["seconds"][WARM_STEPS - 1 :])
    return Measured(workload.batch_size * workload.sequence_length / seconds, ended.peak_bytes, found["losses"])


def _variables(num_processes: int) -> list[dict[str, str]]:
    """Returns the environment variables of each process, those of torchrun if there are several."""
    if num_processes == 1:
        return [{"OMP_NUM_THREADS": "1"}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def _compare(name: str, kind: str, num_processes: int, pairs: list[tuple[Measured, Measured]]) -> StepFigure:
    ratios = [ours.tokens_per_second / baseline.tokens_per_second for ours, baseline in pairs]
    differences = [
        abs(a - b) / b for ours, baseline in pairs for a, b in zip(ours.losses, baseline.losses, strict=True)
    ]

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
