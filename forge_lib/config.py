"""The training configuration: one dataclass a concern, turned into flags and YAML keys.

Every flag of the scripts is a field here and every field is a flag; `--model-name` and `--model_name` are the same.
`--config run.yaml` gives defaults, flags override them.
"""

import argparse
import difflib
import math
import os
import re
import shutil
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist
import yaml
from accelerate.utils import get_cpu_distributed_information, str_to_bool
from transformers import HfArgumentParser

ConfigT = TypeVar("ConfigT")
WIZARD_CURE = (
    "a YAML with `distributed_type: MULTI_CPU` starts one process on each machine, and each would train a model of "
    "its own. Change these two lines of the YAML:\n    distributed_type: MULTI_GPU\n    use_cpu: true"
)


class UserError(ValueError):
    """A person's mistake: the message says what was found, what was expected, and which flag or key mends it."""


def flag(default: Any, help: str, unit: str = "", **kwargs: Any) -> Any:
    """Returns a dataclass field with its one line of `--help`; `unit` stands for the value on the command line."""
    metadata = {"help": help, **({"metavar": unit} if unit else {}), **kwargs}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class World:
    """The processes that the launcher means to start, and this one's place among them.

    Attributes:
        process_index: rank of this process.
        num_processes: processes on all machines.
        local_process_index: its number on this machine.
        num_local_processes: processes on this machine.
        main_address, main_port: where the main machine's store listens; an empty address where there is one process.
        attempt: how often the launcher has restarted the processes.
    """

    process_index: int = 0
    num_processes: int = 1
    local_process_index: int = 0
    num_local_processes: int = 1
    main_address: str = ""
    main_port: int = 0
    attempt: int = 0

    @property
    def machine(self) -> int:
        """The rank of the first process on this machine, which does its file work."""
        return self.process_index - self.local_process_index

    @property
    def is_local_main(self) -> bool:
        """Whether this process is the first one on its machine."""
        return self.local_process_index == 0

    @classmethod
    def from_environment(cls) -> "World":
        """Reads what accelerate, torchrun, mpirun or a notebook's launcher has left in the environment.

        Raises:
            UserError: the launcher has named a main machine, but has started a process without a rank.
        """
        for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            if str_to_bool(os.environ.get(f"ACCELERATE_USE_{name}", "false")):
                raise UserError(f"the YAML asks for {name}, but this program trains data-parallel alone: take it out")
        ranks = get_cpu_distributed_information()
        if ranks.world_size == 1:
            if "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
                address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
                raise UserError(
                    f"the launcher names a main machine ({address}), but this process got no rank in a world: "
                    + WIZARD_CURE
                )
            return cls()
        in_group = dist.is_available() and dist.is_initialized()  # as under accelerate's debug_launcher
        return cls(
            process_index=dist.get_rank() if in_group else ranks.rank,
            num_processes=ranks.world_size,
            local_process_index=ranks.local_rank,
            num_local_processes=ranks.local_world_size,
            main_address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
            main_port=int(os.environ.get("MASTER_PORT", 29500)),
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )


@dataclass(kw_only=True)
class ModelNameConfig:
    """Which model."""

    _argument_group_name = "model"

    model_name: str = flag(MISSING, "Hub id, local folder or .gguf file", "NAME")
    trust_remote_code: bool = flag(False, "run model code that comes with a Hub model")


@dataclass(kw_only=True)
class WeightsConfig:
    """How the model's weights begin, and which of them are trained."""

    _argument_group_name = "weights"

    from_scratch: bool = flag(False, "random weights; else the model's own where it has any")
    dropout: float = flag(0.0, "of all layers; above 0 losses depend on how the batch is divided", "P")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    compile: bool = flag(False, "torch.compile the model")
    lora_rank: int = flag(0, "train LoRA adapters of this rank instead of all weights; 0: all", "RANK")
    lora_alpha: float = flag(16.0, "scale of the LoRA adapters", "ALPHA")


@dataclass(kw_only=True)
class ModelConfig(WeightsConfig, ModelNameConfig):
    """The model as it is trained."""


@dataclass(kw_only=True)
class DataConfig:
    """Which text, and how it becomes documents."""

    _argument_group_name = "data"

    dataset_path: str = flag(MISSING, "file, folder, glob, Hub data set or token store", "PATH")
    sample_by: Literal["document", "paragraph", "line"] = flag(
        "document", "one document of a text file is: document (the file), paragraph or line", "UNIT"
    )
    text_column: str = flag("text", "column that holds the text, where the data has columns", "NAME")
    encoding_errors: Literal["strict", "replace"] = flag(
        "strict", "bytes that are not UTF-8: strict (an error) or replace", "HOW"
    )
    dataset_config: str = flag("", "configuration of a Hub data set", "NAME")
    dataset_split: str = flag("train", "split of a Hub data set", "NAME")


@dataclass(kw_only=True)
class BlockConfig:
    """How the token store is cut into sequences."""

    _argument_group_name = "sequences"

    sequence_length: int = flag(512, "tokens per sequence", "TOKENS")
    mask_documents: bool = flag(False, "keep attention inside a document")


@dataclass(kw_only=True)
class EvaluationConfig:
    """What is held out, and when it is looked at."""

    _argument_group_name = "evaluation"

    eval_dataset_path: str = flag("", "held-out data of its own, as --dataset-path", "PATH")
    eval_fraction: float = flag(0.0, "or: hold out this fraction of the documents", "FRACTION")
    eval_every: int = flag(100, "evaluate every so many steps, and at the end; 0 for never", "STEPS")
    sample_every: int = flag(0, "generate text every so many steps; 0 for never", "STEPS")
    sample_prompt: str = flag("", "what the generated text begins with", "TEXT")


@dataclass(kw_only=True)
class BatchConfig:
    """The batch, which is global, and how the processes divide it."""

    _argument_group_name = "batch"

    epochs: float = flag(1.0, "passes over the data", "EPOCHS")
    max_steps: int = flag(0, "optimizer steps; overrides --epochs; 0 for --epochs", "STEPS")
    batch_size: int = flag(32, "GLOBAL batch of a step, over all processes", "SEQUENCES")
    micro_batch_size: int = flag(8, "sequences of one forward pass on one device", "SEQUENCES")
    shares: str = flag("", "parts of the batch by process, as in 3:1; empty for equal parts", "A:B:…")


@dataclass(kw_only=True)
class OptimizationConfig:
    """The optimizer and its schedule."""

    _argument_group_name = "optimization"

    optimizer: Literal["adamw", "muon", "adafactor"] = flag(
        "adamw", "adamw, muon (adamw beside it) or adafactor", "NAME"
    )
    learning_rate: float = flag(3e-4, "peak learning rate", "RATE")
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
    ] = flag("cosine", "cosine, linear, constant, warmup_stable_decay, … of transformers", "NAME")
    warmup_steps: int = flag(0, "steps over which the learning rate rises from 0", "STEPS")
    decay_steps: int = flag(0, "of warmup_stable_decay: its final decay; 0 for a fifth of the run", "STEPS")
    weight_decay: float = flag(0.1, "weight decay of matrices (nothing else decays)", "RATE")
    max_grad_norm: float = flag(1.0, "clip the gradient at this norm; 0 for no clipping", "NORM")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = flag(
        "auto", "auto, no, bf16, fp16; auto is bf16 if faster than fp32 everywhere", "TYPE"
    )
    gradient_compression: Literal["no", "fp16"] = flag(
        "no", "no, or fp16: gradients travel in half the bytes, rounded", "TYPE"
    )
    seed: int = flag(0, "everything random follows from it", "SEED")


@dataclass(kw_only=True)
class OutputConfig:
    """What is written, where and how often."""

    _argument_group_name = "output"

    output_dir: str = flag(MISSING, "run folder", "FOLDER")
    checkpoint_every: int = flag(500, "write a checkpoint every so many steps, and at the end; 0: never", "STEPS")
    keep_checkpoints: int = flag(2, "how many checkpoints to keep", "COUNT")
    keep_best: bool = flag(False, "keep the checkpoint with the lowest held-out loss too")
    checkpoint_async: bool = flag(True, "write checkpoints in the background")
    checkpoint_machines: str = flag("all", "machines that keep checkpoints: all, main, or the first N", "WHICH")
    resume: str = flag("auto", "auto (go on in the run folder), never, or a checkpoint's path", "HOW")
    log_every: int = flag(10, "log every so many steps; 0 for never", "STEPS")
    report_to: str = flag("none", "trackers beside metrics.jsonl: tensorboard, trackio, wandb, all", "NAMES")


@dataclass(kw_only=True)
class FaultConfig:
    """What happens when something goes wrong, and when the run is told to stop."""

    _argument_group_name = "faults"

    grace_seconds: float = flag(60.0, "after SIGTERM or Ctrl-C: time to finish the step and save", "SECONDS")
    timeout_seconds: float = flag(60.0, "a machine that is silent for so long is lost", "SECONDS")
    check_replicas_every: int = flag(100, "compare the processes' weights every so many steps; 0: at saves", "STEPS")
    on_nonfinite: Literal["stop", "skip"] = flag(
        "stop", "at a loss or gradient that is not finite: stop, or skip the step", "HOW"
    )
    max_skipped_steps: int = flag(10, "of --on-nonfinite skip: stop after so many in a row", "STEPS")


@dataclass(kw_only=True)
class WorldConfig:
    """How the processes reach each other."""

    _argument_group_name = "world"

    backend: Literal["auto", "nccl", "gloo"] = flag(
        "auto", "auto, nccl or gloo; auto is nccl where every process has a GPU", "NAME"
    )
    device: Literal["auto", "cpu", "cuda"] = flag(
        "auto", "auto, cpu or cuda; auto is cuda where there is a GPU", "NAME"
    )


@dataclass(kw_only=True)
class TrainConfig(
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
    """Everything that scripts/train.py reads.

    Raises:
        UserError: naming every field whose value is out of range, at once.
    """

    def __post_init__(self):
        at_least = {
            "sequence_length": 2,
            "batch_size": 1,
            "micro_batch_size": 1,
            "max_steps": 0,
            "lora_rank": 0,
            "warmup_steps": 0,
            "decay_steps": 0,
            "weight_decay": 0,
            "max_grad_norm": 0,
            "dropout": 0,
            "eval_fraction": 0,
            "eval_every": 0,
            "sample_every": 0,
            "checkpoint_every": 0,
            "keep_checkpoints": 1,
            "log_every": 0,
            "grace_seconds": 1,
            "timeout_seconds": 2,
            "check_replicas_every": 0,
            "max_skipped_steps": 1,
        }
        wrong = [
            f"{flag_name(name)} is {getattr(self, name)}, but must be at least {least}"
            for name, least in at_least.items()
            if not getattr(self, name) >= least
        ]
        wrong += [
            f"{flag_name(name)} is {getattr(self, name)}, but must be below 1"
            for name in ("dropout", "eval_fraction")
            if getattr(self, name) >= 1
        ]
        wrong += [
            f"{flag_name(name)} is {getattr(self, name)}, but must be above 0"
            for name in ("learning_rate", "epochs")
            if not getattr(self, name) > 0
        ]
        wrong += [
            f"{flag_name(name)} is {getattr(self, name)}, but must be a number"
            for name in ("learning_rate", "epochs", "weight_decay", "max_grad_norm")
            if not math.isfinite(getattr(self, name))
        ]
        if self.checkpoint_machines not in ("all", "main") and not re.fullmatch(
            "[1-9][0-9]*", self.checkpoint_machines
        ):
            wrong.append(f"--checkpoint-machines {self.checkpoint_machines}: expected all, main, or a number from 1")
        if self.eval_fraction and self.eval_dataset_path:
            wrong.append("--eval-fraction and --eval-dataset-path were both given; give one of them")
        if self.optimizer == "muon" and self.mixed_precision == "fp16":
            wrong.append("--optimizer muon does not work with --mixed-precision fp16; use bf16 or no")
        if wrong:
            raise UserError("\n".join(wrong))


def to_flags(config: Any, config_class: type) -> list[str]:
    """Returns the flags that make a `config_class` out of the fields that `config` shares with it."""
    values = {f.name: getattr(config, f.name) for f in fields(config_class)}
    defaults = {f.name: f.default for f in fields(config_class)}
    return [f"{flag_name(name)}={value}" for name, value in values.items() if value != defaults[name]]


def flag_name(field_name: str) -> str:
    """Returns the flag of a field: `model_name` is `--model-name`."""
    return "--" + field_name.replace("_", "-")


@dataclass(kw_only=True)
class LaunchConfig:
    """The topology without a YAML: the flags that `p2p-llm-forge` takes beside those of scripts/train.py."""

    _argument_group_name = "topology"

    cluster: str = flag("", "cluster.yaml, which says all of the topology", "FILE")
    machine: str = flag("auto", "of --cluster, which machine this is: auto (by its addresses) or its name", "NAME")
    ssh: bool = flag(False, "of --cluster: start the run on all of its machines from here, over ssh")
    num_nodes: int = flag(1, "machines", "COUNT")
    node_rank: int = flag(0, "number of this machine, from 0, the main machine", "RANK")
    processes_per_node: int = flag(0, "processes on this machine; 0 for one per GPU, or one", "COUNT")
    master_addr: str = flag("", "address of the main machine; needed where there are several", "ADDRESS")
    master_port: int = flag(29500, "port on the main machine", "PORT")
    join_timeout: float = flag(600.0, "how long the machines wait for a missing one", "SECONDS")
    max_restarts: int = flag(0, "how often the launcher is started anew after a failure", "COUNT")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One line a flag: its dashed name, the unit of its value, what it means, its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=max(119, shutil.get_terminal_size().columns - 2))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[-1]
        return name if action.nargs in (0, "?") else f"{name} {action.metavar or action.dest.upper()}"

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.required:
            return f"{action.help} [required]"
        if action.default is False or action.default in (None, "", [], argparse.SUPPRESS):
            return action.help or ""
        return f"{action.help} [%(default)s]"


class _Parser(HfArgumentParser):
    """HfArgumentParser that raises UserError instead of leaving the program."""

    def error(self, message: str):
        raise UserError(re.sub(r"--\w+/(--[\w-]+)", r"\1", message))


def parse_config(
    config_class: type[ConfigT], argv: list[str], description: str = "", prog: str | None = None, positional: str = ""
) -> ConfigT:
    """Reads the flags in `argv`, and the YAML file that `--config` names in it, into a `config_class`.

    Args:
        config_class: a dataclass that inherits the groups of flags.
        argv: the command line without the program.
        description: stands above the flags in `--help`.
        prog: the program's name, where it is not the script's.
        positional: the field whose flag's name may be left out in front of all others.

    Raises:
        UserError: an unknown flag or key (with the nearest known one), a missing or malformed value.
    """
    groups = [base for base in reversed(config_class.__mro__) if "_argument_group_name" in vars(base)]
    parser = _Parser(
        groups,
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        usage=f"%(prog)s {f'{positional.upper()} ' if positional else ''}[--config FILE] [flags]",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with defaults for these flags")
    known = [f.name for base in groups for f in fields(base)]
    if positional and argv and not argv[0].startswith("-"):
        argv = [flag_name(positional), *argv]

    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    found, flags = config_parser.parse_known_args(argv)
    defaults = _yaml_flags(Path(found.config), known) if found.config else []

    for word in flags:
        name = word.split("=")[0]
        if not name.startswith("--") or name in parser._option_string_actions:
            continue
        if name.lstrip("-").replace("-", "_") in {f.name for f in fields(LaunchConfig)}:
            raise UserError(f"{name} is a flag of p2p-llm-forge; here the accelerate YAML gives the topology")
        raise UserError(f"unknown flag {name}{_nearest(name, known)}; --help lists all flags")
    namespace, unknown = parser.parse_known_args(defaults + flags)
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r}: every value needs its flag before it; --help lists them")
    values = vars(namespace)
    values.pop("config")
    return config_class(**values)


def _yaml_flags(path: Path, known: list[str]) -> list[str]:
    """The keys of a YAML file as flags, so that both are read and checked in one way."""
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected lines of `key: value`, found a {type(values).__name__}")
    flags = []
    for key, value in values.items():
        if str(key).replace("-", "_") not in known:
            raise UserError(f"--config {path}: unknown key {key!r}{_nearest(str(key), known)}")
        if value is None:
            continue
        if value is False and str(key).replace("-", "_") == "mixed_precision":
            value = "no"  # YAML reads a bare `no` as False
        words = [str(word) for word in value] if isinstance(value, list) else [str(value)]
        flags += [flag_name(str(key)), *words] if isinstance(value, list) else [f"{flag_name(str(key))}={words[0]}"]
    return flags


def _nearest(word: str, known: list[str]) -> str:
    name = word.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {flag_name(near[0])}?" if near else ""
