"""What the machines of a check send each other: a record of each machine, with facts that are compared."""

import json
import os
import platform
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import psutil
import torch

from forge_lib.cluster.cluster_file import Cluster, Machine
from forge_lib.config import flag_name
from forge_lib.data.files import content_fingerprint
from forge_lib.distributed.facts import LIBRARIES, differing_versions, versions
from forge_lib.distributed.network import interface_of, is_public
from forge_lib.distributed.threads import available_cores
from forge_lib.errors import UserError

PROTOCOL = 2  # incompatible versions of the program have different numbers
MAX_RECORD_BYTES = 1 << 14
MAX_CLOCK_SECONDS = 1e12
MAX_INTEGER = 1 << 63
OTHER_FORM = "its facts have another form; install the same version of this program on all machines"

PartT = TypeVar("PartT")


@dataclass(frozen=True)
class MachineFacts:
    """What a machine found out about itself.

    Attributes:
        host: its host name.
        address: its IP address in the cluster's network, empty if it has none yet.
        interface: the network interface with that address.
        system: operating system and its release.
        versions: of Python and of the libraries, by name.
        processes: training processes on it.
        device: "cpu", or the name of its first GPU.
        cores: physical processor cores.
        memory_bytes: memory of that GPU or of the machine.
        free_bytes: free disk space under --output-dir.
        dataset: fingerprint of --dataset-path, empty without one.
        flags: the flags of the run that is forecast, by field name.
        is_public: whether this is the main machine and its address is public.
    """

    host: str
    address: str
    interface: str
    system: str
    versions: dict[str, str]
    processes: int
    device: str
    cores: int
    memory_bytes: int
    free_bytes: int
    dataset: str
    flags: dict[str, str | int | bool]
    is_public: bool


@dataclass(frozen=True)
class MachineSpeed:
    """FLOP/s of matrix products ("fp32", and "bf16" only if it is faster), and bytes per second of memory copies."""

    flops: dict[str, float]
    copy_bandwidth: float


@dataclass(frozen=True)
class Record:
    """The state of one machine of a check, as it sends it to the others, and as they pass it on.

    Attributes:
        id: random; a check that is started again has a different one.
        name: of the machine in cluster.yaml.
        host: its host name.
        cluster: fingerprint of its cluster.yaml.
        address: its IP address in the cluster's network.
        status: what it is doing, or nothing.
        heartbeat: increases with each message.
        facts: what it found out about itself; None until then.
        mistakes: what is wrong with its address, its port or its command line.
        links: for each other machine that it tried to reach, why that fails, or nothing.
        clocks: by how many seconds the clock of each other machine is ahead of its own.
        continues: whether it continues with the measurements.
        has_left: whether it ends the check.
    """

    id: str
    name: str
    host: str
    cluster: str
    address: str = ""
    status: str = ""
    heartbeat: int = 0
    facts: MachineFacts | None = None
    mistakes: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    clocks: dict[str, float] = field(default_factory=dict)
    continues: bool = False
    has_left: bool = False


@dataclass(frozen=True)
class Message:
    """What a machine sends: its own record first, then those that it received; None for each that is not valid."""

    records: list[Record | None]
    time: float


# Validation of what arrives from the network


def parse_message(line: bytes, max_records: int) -> Message:
    """Returns a message from the network with at most `max_records` records.

    Raises:
        ValueError: it is not a message of this program and version.
    """
    try:
        content = json.loads(line)
        if not isinstance(content, dict) or content.get("check_cluster") != PROTOCOL:
            raise ValueError("not a message of this program")
        if not isinstance(content.get("records"), list) or not _has_type(content.get("time"), float):
            raise ValueError("a message of another form")
        return Message([_parse_record(each) for each in content["records"][:max_records]], content["time"])
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parse_record(content: Any) -> Record | None:
    """Returns the record, or None if it has another form, is too large, or cannot be printed."""
    if not isinstance(content, dict) or len(json.dumps(content)) > MAX_RECORD_BYTES or not _is_printable(content):
        return None
    facts = _parse(MachineFacts, content.get("facts"))
    if facts and not {"python", *LIBRARIES} <= facts.versions.keys():
        facts = None
    record = _parse(Record, content | {"facts": facts})
    if record and content.get("facts") is not None and not facts:
        record.mistakes.append(OTHER_FORM)
    return record


def _parse(part_class: type[PartT], content: Any) -> PartT | None:
    """Returns the dataclass with these fields, or None if a field is missing, unknown, or of another type."""
    types = get_type_hints(part_class)
    if not isinstance(content, dict) or content.keys() != types.keys():
        return None
    return part_class(**content) if all(_has_type(content[name], types[name]) for name in types) else None


def _has_type(value: Any, expected: Any) -> bool:
    """Returns whether a value from JSON has the type of a dataclass field; numbers must be finite and not huge."""
    kind, parts = get_origin(expected), get_args(expected)
    if kind is UnionType:
        return any(_has_type(value, part) for part in parts)
    if kind is dict:
        return isinstance(value, dict) and all(_has_type(each, parts[1]) for each in value.values())
    if kind is list:
        return isinstance(value, list) and all(_has_type(each, parts[0]) for each in value)
    if expected is float:
        return type(value) in (int, float) and abs(value) < MAX_CLOCK_SECONDS
    return type(value) is expected and (expected is not int or abs(value) < MAX_INTEGER)


def _is_printable(value: Any) -> bool:
    """Returns whether no text in a value from JSON has control characters, which a terminal would execute."""
    if isinstance(value, str):
        return value.isprintable()
    if isinstance(value, dict):
        return all(key.isprintable() and _is_printable(each) for key, each in value.items())
    return all(map(_is_printable, value)) if isinstance(value, list) else True


# The facts of this machine, and what may not differ between machines


def machine_facts(
    cluster: Cluster, machine: Machine, address: str, output_dir: str, dataset_path: str, flags: dict[str, Any]
) -> MachineFacts:
    """Returns the facts of this machine.

    Raises:
        UserError: --output-dir cannot be written to, or --dataset-path cannot be read.
    """
    uses_gpu = cluster.device_of(machine) != "cpu" and torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if uses_gpu else psutil.virtual_memory().total
    folder = Path(output_dir).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--output-dir {output_dir}: {folder} is not a folder that can be written to")
    return MachineFacts(
        host=socket.gethostname(),
        address=address,
        interface=interface_of(address),
        system=f"{platform.system()} {platform.release()}",
        versions=versions(),
        processes=machine.processes,
        device=torch.cuda.get_device_name(0) if uses_gpu else "cpu",
        cores=available_cores(),
        memory_bytes=memory,
        free_bytes=shutil.disk_usage(folder).free,
        dataset=content_fingerprint(dataset_path) if dataset_path else "",
        flags=flags,
        is_public=machine is cluster.main and is_public(address),
    )


def find_differences(facts: dict[str, MachineFacts]) -> list[tuple[str, str]]:
    """Returns the forbidden differences from the first machine, each as (machine, sentence).

    It compares the flags of this check, the minor versions of the libraries, and the data.

    Args:
        facts: by the machines' names, in the order of the cluster.
    """
    found = []
    main = next(iter(facts), "")
    for name, theirs in facts.items():
        for key, value in theirs.flags.items():
            expected = facts[main].flags.get(key)
            if value != expected:
                text = f"{name} has {flag_name(key)} {value!r}, {main} has {expected!r}"
                found.append((name, f"{text}: use the same flags on each machine"))
        for library, is_harmless in differing_versions(facts[main].versions, theirs.versions).items():
            if not is_harmless:
                text = f"{name} has {library} {theirs.versions[library]}, {main} has {facts[main].versions[library]}"
                found.append((name, f"{text}: install the same version"))
    with_data = {name: theirs.dataset for name, theirs in facts.items() if theirs.dataset}
    first = next(iter(with_data), "")
    for name, fingerprint in with_data.items():
        if fingerprint != with_data[first]:
            text = f"the data at --dataset-path of {name} differs from that of {first}: copy it from there, or remove"
            found.append((name, f"{text} it from {name}, which then receives it"))
    return found
