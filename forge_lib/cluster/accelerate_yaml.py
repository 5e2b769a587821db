"""accelerate's YAML files: writes one for each machine of a cluster, and finds what is wrong in a given one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from forge_lib.cluster.addresses import as_ip, is_address, is_loopback, is_valid_port
from forge_lib.cluster.cluster_file import Cluster, Machine
from forge_lib.errors import UserError
from forge_lib.process import MULTI_CPU_FIX

if TYPE_CHECKING:
    from accelerate.commands.config.config_args import BaseConfig

MADE_BY = "Made by scripts/make_configs.py"
NUMBERS = ("num_processes", "num_machines", "machine_rank", "main_process_port")
PLUGINS = ("deepspeed_config", "fsdp_config", "megatron_lm_config", "parallelism_config", "fp8_config")


def accelerate_config(cluster: Cluster, machine: Machine) -> str:
    """Returns the text of a machine's YAML for `accelerate launch --config_file`."""
    num_machines = len(cluster.machines)
    lines = [
        f"# {machine.name}, machine {machine.rank} of {num_machines} in {cluster.name}.",
        f"# {MADE_BY}. To change it, edit cluster.yaml and run that script again.",
    ]
    if num_machines * machine.processes == 1:
        lines += ["distributed_type: 'NO'"]
    else:
        lines += ["# accelerate's word for torchrun, on CPUs too.", "distributed_type: MULTI_GPU"]
    if cluster.device_of(machine) != "auto":
        lines += [f"use_cpu: {str(cluster.device_of(machine) == 'cpu').lower()}"]
    lines += [f"num_machines: {num_machines}", f"machine_rank: {machine.rank}"]
    if num_machines > 1:
        lines += [f"# {machine.processes} on this machine, times num_machines: accelerate divides by num_machines."]
    lines += [f"num_processes: {machine.processes * num_machines}"]
    if num_machines > 1:
        lines += [f"main_process_ip: {_quoted(cluster.address(cluster.main))}"]
    lines += [f"main_process_port: {cluster.port}"]
    precision = cluster.mixed_precision
    lines += [f"mixed_precision: {_quoted('no' if precision == 'auto' else precision)}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Returns a YAML scalar that is read as text, even if it looks like something else (an IPv6 address, `no`)."""
    return yaml.safe_dump(text, default_flow_style=True).removesuffix("...\n").strip()


def find_config_mistakes(path: Path) -> list[str]:
    """Returns what is wrong in an accelerate YAML, such as one of its wizard, for a run of this project.

    Each line names the keys, and what they should be.

    Raises:
        UserError: the file cannot be read.
    """
    from accelerate.commands.config.config_args import load_config_from_file  # imports torch: slow

    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--check {path}: cannot be read: {reason}") from None
    if not isinstance(keys, dict):
        return ["expected lines of `key: value`"]
    try:
        config = load_config_from_file(str(path))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return [f"accelerate does not accept it: {error}"]
    if mistakes := _check_types(keys, config):
        return mistakes
    return [
        *_check_distributed_type(config),
        *_check_counts(config),
        *(_check_main_address(config) if config.num_machines > 1 else []),
        *_check_port(config),
        *_check_precision(config),
        *_check_plugins(keys, config),
    ]


def _check_types(keys: dict[str, Any], config: "BaseConfig") -> list[str]:
    """Checks the types that the other checks rely on."""
    if keys.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        return [f"compute_environment is {keys['compute_environment']}, expected LOCAL_MACHINE"]
    mistakes = [
        f"{name} is {keys[name]!r:.99}, expected a whole number"
        for name in NUMBERS
        if name in keys and type(keys[name]) is not int and (keys[name] is not None or name == "machine_rank")
    ]
    if config.num_machines is None or not isinstance(config.dynamo_config, dict):
        mistakes.append("num_machines and dynamo_config: expected a whole number, and lines of `key: value`")
    elif not mistakes and config.num_machines < 1:
        mistakes.append(f"num_machines is {config.num_machines}, expected 1 or more")
    return mistakes


def _distributed_type(config: "BaseConfig") -> str:
    return str(getattr(config.distributed_type, "value", config.distributed_type))


def _check_distributed_type(config: "BaseConfig") -> list[str]:
    kind = _distributed_type(config)
    if kind == "MULTI_CPU":
        return [f"distributed_type is MULTI_CPU: {MULTI_CPU_FIX}"]
    if kind not in ("MULTI_GPU", "NO"):
        return [f"distributed_type is {kind}; training here is data-parallel, on GPUs or CPUs: MULTI_GPU"]
    if kind == "NO" and (config.num_machines > 1 or config.num_processes > 1):
        return [
            f"distributed_type is NO, which starts one process; with num_machines {config.num_machines} and "
            f"num_processes {config.num_processes} it must be MULTI_GPU"
        ]
    return []


def _check_counts(config: "BaseConfig") -> list[str]:
    mistakes = []
    if _distributed_type(config).startswith("MULTI") and config.num_processes < 1:
        mistakes.append("num_processes is missing: the number of processes on all machines together")
    elif config.num_machines > 1 and config.num_processes % config.num_machines:
        mistakes.append(
            f"num_processes {config.num_processes} is not a multiple of num_machines {config.num_machines}, by which "
            "accelerate divides it: give the number of processes on this machine, times num_machines"
        )
    if not 0 <= config.machine_rank < config.num_machines:
        mistakes.append(
            f"machine_rank is {config.machine_rank}; with num_machines {config.num_machines} it is from 0 to "
            f"{config.num_machines - 1}"
        )
    return mistakes


def _check_main_address(config: "BaseConfig") -> list[str]:
    """Checks the address of the main machine, which several machines need."""
    address = str(config.main_process_ip or "")
    if not address:
        return ["main_process_ip is missing: the address of the main machine"]
    if is_loopback(address):
        return [
            f"main_process_ip is {address}, a loopback address, which other machines cannot use: give the main "
            "machine's address on the network"
        ]
    if not is_address(address):
        return [f"main_process_ip is {address!r:.99}, expected an IP address or a name, without port and brackets"]
    if (ip := as_ip(address)) and ip.is_unspecified:
        return [f"main_process_ip is {address}, which is no machine's address: give that of the main machine"]
    return []


def _check_port(config: "BaseConfig") -> list[str]:
    mistakes, several = [], config.num_machines > 1
    if config.main_process_port and not is_valid_port(config.main_process_port):
        mistakes.append(f"main_process_port is {config.main_process_port}, expected a number from 1 to 65535")
    if several and not config.main_process_port:
        mistakes.append("main_process_port is missing: a free port of the main machine, the same on each machine")
    if several and config.rdzv_backend != "static":
        mistakes.append(f"rdzv_backend is {config.rdzv_backend}, which accelerate reads from no file: remove the line")
    return mistakes


def _check_precision(config: "BaseConfig") -> list[str]:
    precision = str(config.mixed_precision)
    if precision == "fp16" and config.use_cpu:
        return ["mixed_precision is fp16, which needs GPUs; with use_cpu it is no or bf16"]
    if precision not in ("None", "no", "bf16", "fp16", "False"):  # YAML reads an unquoted `no` as False
        return [f"mixed_precision is {precision}, expected no, bf16 or fp16"]
    return []


def _check_plugins(keys: dict[str, Any], config: "BaseConfig") -> list[str]:
    mistakes = [
        f"{name} is given, but not used: training here is only data-parallel" for name in PLUGINS if keys.get(name)
    ]
    dynamo = config.dynamo_config.get("dynamo_backend", "NO")
    if dynamo != "NO":
        mistakes.append(f"dynamo_config asks for {dynamo}, which is not used; train.py has --compile")
    return mistakes
