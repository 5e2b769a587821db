"""The configuration: one dataclass per concern; each field is a flag of the scripts and a key of `--config` files.

forge_lib/flags.py reads them from the command line. `--model-name` and `--model_name` are the same flag.
"""

import math
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from forge_lib.errors import UserError

AUTO = -1  # of --micro-batch-size
IGNORED_LABEL = -100  # the label that the cross entropy of torch and transformers leaves out


def flag(
    default: Any,
    help: str,
    unit: str = "",
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    words: dict[str, int] | None = None,
) -> Any:
    """Returns a dataclass field that is a flag, with its line in `--help` and its range.

    Args:
        default: MISSING for a required flag.
        help: one line.
        unit: is the placeholder of the value on the command line.
        at_least, above, below: the range of a number, which `check_ranges` checks.
        words: that may be given instead of a number.
    """
    limits = {"at_least": at_least, "above": above, "below": below}
    metadata = {"help": help, **({"metavar": unit} if unit else {}), "limits": limits, "words": words or {}}
    return field(default=default, metadata=metadata)


def seed_flag(help: str) -> Any:
    """Returns a field for a seed that torch accepts."""
    return flag(0, help, "SEED", at_least=-(1 << 63), below=1 << 64)


def flag_name(field_name: str) -> str:
    """Returns the flag of a field: `model_name` is `--model-name`."""
    return "--" + field_name.replace("_", "-")


def find_range_mistakes(config: Any) -> list[str]:
    """Returns a line for each field of a configuration whose value is outside its range."""
    mistakes = []
    for each in fields(config):
        limits, value = each.metadata.get("limits", {}), getattr(config, each.name)
        if isinstance(value, float) and not math.isfinite(value):
            mistakes.append(f"{flag_name(each.name)} is {value}, but must be a finite number")
        elif limits.get("at_least") is not None and value < limits["at_least"]:
            mistakes.append(f"{flag_name(each.name)} is {value}, but must be at least {limits['at_least']}")
        elif limits.get("above") is not None and value <= limits["above"]:
            mistakes.append(f"{flag_name(each.name)} is {value}, but must be above {limits['above']}")
        elif limits.get("below") is not None and value >= limits["below"]:
            mistakes.append(f"{flag_name(each.name)} is {value}, but must be below {limits['below']}")
    return mistakes


@dataclass(kw_only=True)
class RangeChecked:
    """A configuration that raises UserError naming every field whose value is out of range; a base class."""

    def __post_init__(self):
        if mistakes := [*find_range_mistakes(self), *self.find_mistakes()]:
            raise UserError("\n".join(mistakes))

    def find_mistakes(self) -> list[str]:
        """Returns a line for each mistake that concerns more than the range of one field."""
        return []


@dataclass(kw_only=True)
class ModelNameConfig:
    """Which model."""

    _argument_group_name = "model"

    model_name: str = flag(MISSING, "Hub id, local folder or .gguf file", "NAME")
    trust_remote_code: bool = flag(False, "run the Python code that is part of a Hub model")


@dataclass(kw_only=True)
class WeightsConfig:
    """The initial weights, and which of them are trained."""

    _argument_group_name = "weights"

    from_scratch: bool = flag(False, "random weights, even if the model has pretrained ones")
    dropout: float = flag(
        0.0, "dropout of all layers; above 0 the losses depend on how the batch is divided", "P", at_least=0, below=1
    )
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    compile: bool = flag(False, "torch.compile the model's layers")
    lora_rank: int = flag(0, "train LoRA adapters of this rank; 0 trains all weights", "RANK", at_least=0)
    lora_alpha: float = flag(16.0, "scale of the LoRA adapters", "ALPHA")


@dataclass(kw_only=True)
class ModelConfig(WeightsConfig, ModelNameConfig):
    """The model as it is trained."""


@dataclass(kw_only=True)
class BeginConfig:
    """How a text begins."""

    _argument_group_name = "begin of a text"

    begin_tokens: bool = flag(True, "begin each document and prompt as the tokenizer begins a text (Llama: with <s>)")


@dataclass(kw_only=True)
class TextConfig:
    """The text, and how it is split into documents."""

    _argument_group_name = "data"

    dataset_path: str = flag(MISSING, "file, folder, glob, Hub dataset or token store", "PATH")
    sample_by: Literal["document", "paragraph", "line"] = flag(
        "document", "what is one document of a text file: document (the file), paragraph or line", "UNIT"
    )
    text_column: str = flag("text", "column with the text, in data with columns", "NAME")
    encoding_errors: Literal["strict", "replace"] = flag(
        "strict", "bytes that are not UTF-8: strict (an error) or replace", "HOW"
    )
    document_separator: str = flag(
        "", "text that separates documents, such as <|endoftext|>; it is no part of them", "TEXT"
    )
    special_tokens_in_text: Literal["parse", "plain"] = flag(
        "parse", "special tokens written in the text: parse (they become that token) or plain (ordinary text)", "HOW"
    )
    dataset_config: str = flag("", "configuration of a Hub dataset", "NAME")
    dataset_split: str = flag("train", "split of a Hub dataset", "NAME")


@dataclass(kw_only=True)
class DataConfig(TextConfig, BeginConfig):
    """The text as documents."""


@dataclass(kw_only=True)
class BlockConfig:
    """How the token store is split into sequences."""

    _argument_group_name = "sequences"

    sequence_length: int = flag(512, "tokens per sequence", "TOKENS", at_least=2)
    mask_documents: bool = flag(False, "no attention between the documents of a sequence")


@dataclass(kw_only=True)
class EvaluationConfig:
    """The held-out data, and when the model is evaluated on it."""

    _argument_group_name = "evaluation"

    eval_dataset_path: str = flag("", "separate held-out data; same kinds as --dataset-path", "PATH")
    eval_fraction: float = flag(0.0, "or: hold out this fraction of the documents", "FRACTION", at_least=0, below=1)
    eval_every: int = flag(
        100, "evaluate before the first step, every N steps and at the end; 0: never", "STEPS", at_least=0
    )
    sample_every: int = flag(0, "generate text every N steps and at the end; 0: never", "STEPS", at_least=0)
    sample_prompt: str = flag("", "start of the generated text; empty: the start of a document", "TEXT")


@dataclass(kw_only=True)
class BatchConfig:
    """The global batch, and how it is divided among the processes."""

    _argument_group_name = "batch"

    epochs: float = flag(1.0, "passes over the data", "EPOCHS", above=0)
    max_steps: int = flag(0, "number of optimizer steps, instead of --epochs; 0: use --epochs", "STEPS", at_least=0)
    batch_size: int = flag(32, "GLOBAL batch of one step, over all processes", "SEQUENCES", at_least=1)
    micro_batch_size: int = flag(
        0,
        "sequences per pass; 0: a fast size (on a GPU, if they fit); auto: as many as fit",
        "SEQUENCES",
        at_least=AUTO,
        words={"auto": AUTO},
    )
    shares: str = flag("", "the processes' shares of the batch, as in 3:1; empty: see --balance", "A:B:…")
    balance: Literal["", "auto", "even"] = flag(
        "", "auto: the shares follow the processes' speeds; even; empty: auto with several machines, else even", "HOW"
    )


@dataclass(kw_only=True)
class OptimizationConfig:
    """The optimizer and its schedule."""

    _argument_group_name = "optimization"

    optimizer: Literal["adamw", "muon", "adafactor"] = flag(
        "adamw", "adamw, muon (for matrices, with adamw for the rest) or adafactor", "NAME"
    )
    learning_rate: float = flag(3e-4, "peak learning rate", "RATE", above=0)
    lr_scheduler: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = flag("cosine", "schedule of transformers: cosine, linear, constant, warmup_stable_decay, …", "NAME")
    warmup_steps: int = flag(0, "steps over which the learning rate rises from 0", "STEPS", at_least=0)
    decay_steps: int = flag(0, "final decay of warmup_stable_decay; 0: a fifth of the run", "STEPS", at_least=0)
    weight_decay: float = flag(0.1, "weight decay of matrices; other parameters do not decay", "RATE", at_least=0)
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm; 0: no clipping", "NORM", at_least=0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = flag(
        "auto", "auto, no, bf16 or fp16; auto: bf16 if it is faster than fp32 on every process", "TYPE"
    )
    gradient_compression: Literal["no", "fp16"] = flag(
        "no", "no, or fp16: send gradients in half the bytes, rounded", "TYPE"
    )
    seed: int = seed_flag("seed of everything that is random")


@dataclass(kw_only=True)
class OutputConfig:
    """What is written, where, and how often."""

    _argument_group_name = "output"

    output_dir: str = flag(MISSING, "run folder", "FOLDER")
    checkpoint_every: int = flag(
        500, "save a checkpoint every N steps and at the end; 0: only when asked to stop", "STEPS", at_least=0
    )
    keep_checkpoints: int = flag(2, "number of checkpoints to keep", "COUNT", at_least=1)
    keep_best: bool = flag(False, "also keep the checkpoint with the lowest held-out loss")
    checkpoint_async: bool = flag(True, "write checkpoints in the background")
    checkpoint_machines: str = flag("all", "machines that keep checkpoints: all, main, or the first N", "WHICH")
    resume: str = flag("auto", "auto (continue from the newest checkpoint), never, or a checkpoint's path", "HOW")
    log_every: int = flag(10, "log every N steps and at the end; 0: never", "STEPS", at_least=0)
    report_to: str = flag("none", "trackers in addition to metrics.jsonl: tensorboard, trackio, wandb, all", "NAMES")
    write_report: bool = flag(True, "at the end, write report.html, and a plot for the model card")
    profile_steps: int = flag(0, "trace this many steps with PyTorch's profiler; 0: none", "STEPS", at_least=0)
    push_to_hub: str = flag("", "upload the final model to this repository of the HuggingFace Hub", "NAME")


@dataclass(kw_only=True)
class FaultConfig:
    """What happens on failures, and when the run is asked to stop."""

    _argument_group_name = "faults"

    grace_seconds: float = flag(
        60.0, "after SIGTERM or Ctrl-C: time limit to finish the step and save", "SECONDS", at_least=1
    )
    timeout_seconds: float = flag(
        60.0, "a machine that sends no heartbeat for this time is lost", "SECONDS", at_least=2
    )
    check_replicas_every: int = flag(
        100, "compare the weights of all processes every N steps; 0: only at saves", "STEPS", at_least=0
    )
    on_nonfinite: Literal["stop", "skip"] = flag(
        "stop", "on a loss or gradient that is not finite: stop, or skip the step", "HOW"
    )
    max_skipped_steps: int = flag(
        10, "with --on-nonfinite skip: stop after this many skipped steps in a row", "STEPS", at_least=1
    )


@dataclass(kw_only=True)
class WorldConfig:
    """The devices, and how the processes communicate."""

    _argument_group_name = "world"

    backend: Literal["auto", "nccl", "gloo"] = flag(
        "auto", "auto, nccl or gloo; auto: nccl if every process has a GPU", "NAME"
    )
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto, cpu or cuda; auto: cuda if there is a GPU", "NAME")


@dataclass(kw_only=True)
class TrainConfig(
    RangeChecked,
    WorldConfig,
    FaultConfig,
    OutputConfig,
    OptimizationConfig,
    BatchConfig,
    EvaluationConfig,
    BlockConfig,
    DataConfig,
    ModelConfig,
):
    """Every flag of scripts/train.py."""

    def find_mistakes(self) -> list[str]:
        """Returns a line for each pair of values that do not go together."""
        mistakes = []
        if not re.fullmatch("all|main|[1-9][0-9]*", self.checkpoint_machines):
            mistakes.append(
                f"--checkpoint-machines {self.checkpoint_machines}: expected all, main, or a number from 1"
            )
        if self.eval_fraction and self.eval_dataset_path:
            mistakes.append("--eval-fraction and --eval-dataset-path were both given; give one of them")
        if self.optimizer == "muon" and self.mixed_precision == "fp16":
            mistakes.append("--optimizer muon does not work with --mixed-precision fp16; use bf16 or no")
        return mistakes


@dataclass(kw_only=True)
class LaunchConfig:
    """The topology without a YAML: flags of `p2p-llm-forge` in addition to those of scripts/train.py."""

    _argument_group_name = "topology"

    cluster: str = flag("", "cluster.yaml, which describes the whole topology", "FILE")
    machine: str = flag("auto", "with --cluster: which machine this is, auto (by its addresses) or a name", "NAME")
    elastic: bool = flag(False, "train with peers that join and leave: start this machine's peer (train_elastic.py)")
    ssh: bool = flag(False, "with --cluster: start the run on all of its machines over ssh")
    num_nodes: int = flag(1, "number of machines", "COUNT", at_least=1)
    node_rank: int = flag(0, "number of this machine; 0 is the main machine", "RANK", at_least=0)
    processes_per_node: int = flag(0, "processes on this machine; 0: one per GPU, or one", "COUNT", at_least=0)
    master_addr: str = flag("", "address of the main machine; required with several machines", "ADDRESS")
    master_port: int = flag(29500, "port on the main machine", "PORT", at_least=1, below=65536)
    join_timeout: float = flag(600.0, "how long to wait for a missing machine", "SECONDS", above=0)
    max_restarts: int = flag(0, "how many times to restart the launcher after a failure", "COUNT", at_least=0)
