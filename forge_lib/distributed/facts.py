"""What the processes of a run send each other about themselves before they train."""

import dataclasses
import importlib.metadata
import os
import socket
import sys
from dataclasses import dataclass, field

import torch

from forge_lib.config import WorldConfig
from forge_lib.distributed.network import choose_interface, is_public
from forge_lib.distributed.speed import matmul_flops
from forge_lib.distributed.threads import available_cores
from forge_lib.process import World

LIBRARIES = ("torch", "accelerate", "transformers")
# Fields of the configuration that may differ between machines.
LOCAL_FIELDS = {"dataset_path", "eval_dataset_path", "output_dir", "model_name", "micro_batch_size", "device"}


@dataclass(frozen=True)
class ProcessFacts:
    """What one process sends the others about itself. run.json lists these fields, except `config`, under `world`.

    Attributes:
        host: the machine's hostname.
        address, port, interface: its IP address on the route to the main machine, the run's port, and the network
            interface; empty address and interface for a single process.
        is_public: whether that address is reachable from the internet.
        device, device_name: "cpu", "cuda" or "mps", and the GPU's product name.
        threads: threads per process on a CPU; 0 on other devices.
        cores: physical cores of the machine that the process may use.
        num_local_processes: processes on the machine.
        instructions: instruction set on a CPU, such as "AVX2".
        flops: measured FLOP/s of matrix products: "fp32", and "bf16" only if that is clearly faster.
        launcher_mixed_precision: the precision in the YAML.
        versions: of Python and of the libraries, by name.
        config: the fields of the configuration that must be equal on all machines.
        machine: rank of the first process on the same machine.
        run_id: a random identifier; the run uses that of process 0.
        has: by field of the configuration, whether that model or data is on this machine.
    """

    host: str
    address: str
    port: int
    interface: str
    is_public: bool
    device: str
    device_name: str
    threads: int
    cores: int
    num_local_processes: int
    instructions: str
    flops: dict[str, float]
    launcher_mixed_precision: str
    versions: dict[str, str]
    config: dict
    machine: int = 0
    run_id: str = ""
    has: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class InputFacts:
    """What one process sends the others about the model and the data that it has loaded.

    Attributes:
        host: the machine's hostname.
        fingerprints: by name, the hashes that must be equal on all machines.
        weights: hash of the initial weights.
        random_weights: whether these are random.
    """

    host: str
    fingerprints: dict[str, str]
    weights: str
    random_weights: bool


def local_facts(config: WorldConfig, world: World, device: str) -> ProcessFacts:
    """Collects the facts of this process, and measures the speed of matrix products.

    Raises:
        UserError: there is no usable route to the main machine.
    """
    interface, address = choose_interface(world)
    on_cpu = device == "cpu"
    return ProcessFacts(
        host=socket.gethostname(),
        address=address,
        port=world.main_port,
        interface=interface,
        is_public=is_public(address),
        device=device,
        device_name=torch.cuda.get_device_name() if device == "cuda" else device,
        threads=torch.get_num_threads() if on_cpu else 0,
        cores=available_cores(),
        num_local_processes=world.num_local_processes,
        instructions=torch.backends.cpu.get_cpu_capability() if on_cpu else "",
        flops=measure_flops(device),
        launcher_mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        versions=versions(),
        config={k: v for k, v in dataclasses.asdict(config).items() if k not in LOCAL_FIELDS},
    )


def measure_flops(device: str) -> dict[str, float]:
    """Measures matrix products in FLOP/s: "fp32", and "bf16" only if it is more than 1.2 times as fast."""
    small, large = (256, 1024) if device == "cpu" else (1024, 4096)
    flops = {"fp32": matmul_flops(device, torch.float32, large)}
    # Small products first: without hardware support bf16 is a hundred times slower, so a large product takes seconds.
    if matmul_flops(device, torch.bfloat16, small) > matmul_flops(device, torch.float32, small) / 10:
        bf16 = matmul_flops(device, torch.bfloat16, large)
        if bf16 > 1.2 * flops["fp32"]:
            flops["bf16"] = bf16
    return flops


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that a run depends on, by name."""
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def differing_versions(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, bool]:
    """Returns, for each library whose versions differ, whether a run works nevertheless.

    A run works if only the part after the minor version differs. Local suffixes ("+cpu") are ignored.
    """
    found = {}
    for name in LIBRARIES:
        one, other = ours[name].split("+")[0], theirs[name].split("+")[0]
        if one != other:
            found[name] = one.split(".")[:2] == other.split(".")[:2]
    return found
