"""Compares what the processes send each other before they train, and derives the backend and the precision from it."""

from dataclasses import dataclass

from forge_lib.config import WorldConfig, flag_name
from forge_lib.distributed.facts import InputFacts, ProcessFacts, differing_versions
from forge_lib.distributed.network import public_address_warning
from forge_lib.errors import UserError
from forge_lib.process import MULTI_CPU_FIX, World

SAME_PROGRAM = "every machine must run the same program on the same data"


@dataclass(frozen=True)
class Agreement:
    """What all processes have agreed on.

    Attributes:
        processes: the facts of each process, by rank.
        backend: "nccl" or "gloo".
        mixed_precision: "no", "bf16" or "fp16".
        precision_reason: why, if the program has chosen it; else empty.
        warnings: harmless differences and other hints, one sentence each.
        alike: whether all processes have the same hardware and software, and so compute the same bits.
    """

    processes: list[ProcessFacts]
    backend: str
    mixed_precision: str
    precision_reason: str
    warnings: list[str]
    alike: bool


def agree(processes: list[ProcessFacts], config: WorldConfig) -> Agreement:
    """Compares the facts of all processes, and chooses backend and precision; the result is the same on each process.

    Args:
        processes: the `local_facts` of each process, by rank.
        config: of this process.

    Raises:
        UserError: a version or a flag differs (the message names each process and field), or the backend or the
            precision does not work on these machines.
    """
    warnings = _compare_versions_and_flags(processes)
    backend = _choose_backend(processes, config.backend)
    precision, reason, notes = _choose_precision(processes)
    kinds = {(each.device_name, each.instructions, each.threads, each.versions["torch"]) for each in processes}
    warnings += notes + _warn_about_machines(processes)
    return Agreement(processes, backend, precision, reason, warnings, alike=len(kinds) == 1)


def _compare_versions_and_flags(processes: list[ProcessFacts]) -> list[str]:
    """Returns the harmless differences from process 0; raises one UserError for all other differences."""
    errors, warnings = [], []
    main = processes[0]
    for rank, process in enumerate(processes):
        who = _differs(rank, process, main)
        for name, is_harmless in differing_versions(main.versions, process.versions).items():
            text = f"{who} in the version of {name}: {process.versions[name]} instead of {main.versions[name]}"
            (warnings if is_harmless else errors).append(text)
        for name in sorted({*main.config, *process.config}):
            ours, theirs = main.config.get(name), process.config.get(name)
            if ours != theirs:
                errors.append(f"{who} in {flag_name(name)}: {theirs!r} instead of {ours!r}")
    if errors:
        raise UserError("\n".join([*errors, SAME_PROGRAM]))
    return warnings


def _differs(rank: int, process: ProcessFacts | InputFacts, main: ProcessFacts | InputFacts) -> str:
    return f"{process.host} (process {rank}) differs from {main.host} (process 0)"


def _choose_backend(processes: list[ProcessFacts], wanted: str) -> str:
    without_gpu = [process.host for process in processes if process.device != "cuda"]
    if wanted == "nccl" and without_gpu:
        raise UserError(
            f"--backend nccl needs a GPU for every process, but {without_gpu[0]} has none; use --backend gloo or auto"
        )
    if wanted == "auto":
        return "gloo" if without_gpu else "nccl"
    return wanted


def _choose_precision(processes: list[ProcessFacts]) -> tuple[str, str, list[str]]:
    """Returns the precision: the flag's, else the YAML's, else bf16 if every process runs it faster.

    After it: the reason for the last of these choices, and warnings.
    """
    config, launcher = processes[0].config, processes[0].launcher_mixed_precision
    wanted, reason, warnings = config.get("mixed_precision", "no"), "", []
    if wanted != "auto":
        precision = wanted
        if launcher not in ("no", precision):
            warnings.append(f"--mixed-precision {precision} overrides mixed_precision: {launcher} of the YAML")
    elif launcher not in ("no", ""):
        precision = launcher
    elif without := next((process.host for process in processes if "bf16" not in process.flops), ""):
        precision, reason = "no", f"bf16 is not clearly faster on {without}"
    else:
        gain = min(process.flops["bf16"] / process.flops["fp32"] for process in processes)
        precision, reason = "bf16", f"measured: {gain:.1f} times as fast as fp32"
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"mixed_precision: {precision} of the YAML is not supported; use no, bf16 or fp16")
    if precision == "fp16" and config.get("optimizer") == "muon":
        raise UserError("--optimizer muon does not work with mixed precision fp16; use bf16 or no")
    if precision == "fp16" and any(process.device != "cuda" for process in processes):
        raise UserError("mixed precision fp16 needs a GPU for every process; use --mixed-precision bf16 or no")
    return precision, reason, warnings


def _warn_about_machines(processes: list[ProcessFacts]) -> list[str]:
    """Returns warnings for a public address of the main machine, and for machines with idle cores."""
    main = processes[0]
    warnings = [public_address_warning(main.address, main.port)] if main.is_public else []
    for process in {process.host: process for process in processes}.values():
        used = process.threads * process.num_local_processes
        if process.device == "cpu" and used <= process.cores // 2:
            warnings.append(
                f"{process.host} computes with {used} of its {process.cores} cores: OMP_NUM_THREADS is set; "
                "without it, each process gets its share of the cores"
            )
    return warnings


def compare_inputs(processes: list[InputFacts]) -> list[str]:
    """Compares what the processes have loaded; returns the harmless differences, one sentence each.

    Args:
        processes: the facts of each process, by rank.

    Raises:
        UserError: the message names each process and fingerprint that differs from process 0.
    """
    errors, warnings = [], []
    main = processes[0]
    for rank, process in enumerate(processes):
        who = _differs(rank, process, main)
        for name, ours in main.fingerprints.items():
            theirs = process.fingerprints.get(name)
            if ours != theirs:
                errors.append(f"{who} in its {name}: fingerprint {str(theirs)[:12]} instead of {ours[:12]}")
        if process.weights != main.weights and main.random_weights:
            warnings.append(
                f"{who} in the random initial weights (another kind of processor); it uses those of process 0"
            )
        elif process.weights != main.weights:
            errors.append(f"{who} in the model's weights: hash {process.weights[:12]} instead of {main.weights[:12]}")
    if errors:
        raise UserError("\n".join([*errors, SAME_PROGRAM]))
    return warnings


def check_world(world: World, num_processes: int) -> None:
    """Compares the number of processes in the process group with the number that the launcher announced.

    Raises:
        UserError: they differ, for example because each process would train alone.
    """
    if num_processes != world.num_processes:
        raise UserError(
            f"the launcher announced {world.num_processes} processes, but {num_processes} started: {MULTI_CPU_FIX}"
        )


def describe_world(agreement: Agreement) -> str:
    """Returns the machines, devices, backend and precision of the run, as one line for the log."""
    machines: dict[str, list[str]] = {}
    for process in agreement.processes:
        place = f" [{process.address} {process.interface}]" if process.address else ""
        machines.setdefault(process.host + place, []).append(process.device_name)
    names = ", ".join(f"{name}: {len(devices)} x {devices[0]}" for name, devices in machines.items())
    count = len(agreement.processes)
    where = f"{len(machines)} machine{'s' if len(machines) > 1 else ''} ({names})"
    backend = f"{agreement.backend}, " if count > 1 else ""
    precision = "fp32" if agreement.mixed_precision == "no" else agreement.mixed_precision
    reason = f" ({agreement.precision_reason})" if agreement.precision_reason else ""
    return f"{count} process{'es' if count > 1 else ''} on {where}, {backend}{precision}{reason}"
