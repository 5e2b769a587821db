"""What the machines settle before they train (interface, device, backend, precision), and whether they stay equal."""

import dataclasses
import ipaddress
import os
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import accelerate
import psutil
import torch
import torch.distributed as dist
import transformers
import xxhash
from accelerate import Accelerator
from accelerate.utils import gather, gather_object, str_to_bool
from torch import nn

from forge_lib.config import WorldConfig, flag_name
from forge_lib.errors import UserError
from forge_lib.process import MULTI_CPU_FIX, World

GROUP_START_SECONDS = 600  # time-out of the process group until the first step is done
NCCL_MARGIN_SECONDS = 15
DDP_BUCKET_BYTES = 250 << 20  # DDP's first broadcast sends so much at once
LOCAL_FIELDS = {
    "dataset_path",
    "eval_dataset_path",
    "output_dir",
    "model_name",
    "micro_batch_size",
    "device",
}  # differ
# Addresses that the internet does not reach: private, shared (as Tailscale's), of one link, of one machine.
PRIVATE = [*["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16", "127.0.0.0/8"]]
PRIVATE = [ipaddress.ip_network(network) for network in [*PRIVATE, "fc00::/7", "fe80::/10", "::1/128"]]
ARPHRD_NONE = "65534"  # the kernel's type of an interface without a link layer: WireGuard's and other tunnels'


def choose_interface(world: World) -> tuple[str, str]:
    """Names the interface that routes to the main machine to gloo and NCCL, where the user has not named one.

    Left alone, gloo binds to the address that this host's own name resolves to, often a wrong one.

    Returns:
        The interface, and this machine's address on it.

    Raises:
        UserError: the main machine's name does not resolve, there is no route to it, or its own name means loopback.
    """
    if world.num_processes == 1:
        return "", ""
    name = world.main_address
    try:
        family, _, _, _, address = socket.getaddrinfo(name, world.main_port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: it only asks the kernel for the route
            own = probe.getsockname()[0]
    except socket.gaierror:
        raise UserError(f"the main machine's name {name!r} does not resolve here; give its address instead") from None
    except OSError as error:
        raise UserError(f"there is no route from here to the main machine {name}: {error.strerror}") from None
    several_machines = world.num_local_processes < world.num_processes
    if several_machines and own.startswith("127.") and name not in ("localhost", own) and not name.startswith("127."):
        raise UserError(
            f"the main machine's name {name!r} means {own} here, which other machines cannot reach; "
            "give its address on the network (main_process_ip, or --master-addr)"
        )
    interface = interface_of(own)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    return os.environ.get("GLOO_SOCKET_IFNAME", interface), own


def interface_of(address: str) -> str:
    """Returns the name of the network interface that has an IP address on this machine, or nothing."""
    nics = psutil.net_if_addrs().items()
    return next((nic for nic, addresses in nics if any(a.address.split("%")[0] == address for a in addresses)), "")


def is_public(address: str) -> bool:
    """Tells whether one of this machine's IP addresses is neither private nor of an overlay such as WireGuard."""
    if not address:
        return False
    ip = ipaddress.ip_address(address.split("%")[0])
    kind = Path("/sys/class/net") / interface_of(address) / "type"
    is_overlay = kind.is_file() and kind.read_text().strip() == ARPHRD_NONE
    return not is_overlay and not any(ip in network for network in PRIVATE)


def warn_of_public(address: str, port: int) -> str:
    """Returns the line that is due where the main machine's address is public."""
    return (
        f"anybody who reaches {address} port {port} can join this run and read it: the address is neither private nor "
        "an overlay's; close it with a firewall, or train over WireGuard (README: Trust)"
    )


def choose_device(wanted: str, world: World) -> str:
    """Returns "cuda" (this process's GPU is then the current one) or "cpu" (or "mps" for one process on a Mac).

    Raises:
        UserError: a GPU is wanted and there is none, or this machine has fewer GPUs than processes.
    """
    use_cpu = wanted == "cpu" or bool(str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")))
    if use_cpu or not torch.cuda.is_available():
        if wanted == "cuda":
            raise UserError(f"--device cuda: torch {torch.__version__} finds no GPU on {socket.gethostname()}")
        if not use_cpu and world.num_processes == 1 and torch.backends.mps.is_available():
            return "mps"
        return "cpu"
    if world.num_local_processes > torch.cuda.device_count():
        raise UserError(
            f"{world.num_local_processes} processes were started on {socket.gethostname()}, which has "
            f"{torch.cuda.device_count()} GPU(s): start one process a GPU (num_processes), or give --device cpu"
        )
    torch.cuda.set_device(world.local_process_index)
    return "cuda"


def matmul_flops(device: str, dtype: torch.dtype, size: int) -> float:
    """Returns the best of six measured speeds, in FLOP/s, of a product of two [size, size] matrices."""
    left, right = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that a run depends on, by name."""
    libraries = {module.__name__: module.__version__ for module in (torch, accelerate, transformers)}
    return {"python": ".".join(map(str, sys.version_info[:3])), **libraries}


def differing_versions(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, bool]:
    """Returns the libraries of which two machines have other versions, and whether a run puts up with that.

    It does where the minor version is the same.
    """
    found = {}
    for name in ("torch", "accelerate", "transformers"):
        one, other = ours[name].split("+")[0], theirs[name].split("+")[0]
        if one != other:
            found[name] = one.split(".")[:2] == other.split(".")[:2]
    return found


def local_facts(config: WorldConfig, world: World, device: str) -> dict:
    """Returns what this process tells the others of itself: versions, configuration, place and speed."""
    interface, address = choose_interface(world)
    small, large = (256, 1024) if device == "cpu" else (1024, 4096)
    flops = {"fp32": matmul_flops(device, torch.float32, large)}
    if matmul_flops(device, torch.bfloat16, small) > flops["fp32"] / 50:  # elsewhere it can be a hundred times slower
        bf16 = matmul_flops(device, torch.bfloat16, large)
        flops |= {"bf16": bf16} if bf16 > 1.2 * flops["fp32"] else {}
    return {
        "host": socket.gethostname(),
        "address": address,
        "port": world.main_port,
        "interface": interface,
        "is_public": is_public(address),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads() if device == "cpu" else 0,
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "num_local_processes": world.num_local_processes,
        "instructions": torch.backends.cpu.get_cpu_capability() if device == "cpu" else "",
        "flops": flops,
        "launcher_mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "versions": versions(),
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in LOCAL_FIELDS},
    }


@dataclass(frozen=True)
class Agreement:
    """What all processes have agreed on.

    Attributes:
        peers: the facts of each process, by rank.
        backend: "nccl" or "gloo".
        mixed_precision: "no", "bf16" or "fp16".
        warnings: differences that do no harm.
        alike: whether all processes compute alike, to the last bit.
    """

    peers: list[dict]
    backend: str
    mixed_precision: str
    warnings: list[str]
    alike: bool


def agree(peers: list[dict], config: WorldConfig) -> Agreement:
    """Compares the facts of all machines and settles what follows from them; the same result on each.

    Args:
        peers: the `local_facts` of each process, by rank.
        config: of this process; the flags that decide are the same everywhere, or this raises.

    Raises:
        UserError: naming each peer and field that differs from the main process.
    """
    errors, warnings = [], []
    main = peers[0]
    for rank, peer in enumerate(peers):
        who = f"{peer['host']} (process {rank}) differs from {main['host']} (process 0)"
        for name, is_harmless in differing_versions(main["versions"], peer["versions"]).items():
            ours, theirs = main["versions"][name], peer["versions"][name]
            (warnings if is_harmless else errors).append(f"{who} in the version of {name}: {theirs} against {ours}")
        for name in sorted({*main["config"], *peer["config"]}):
            ours, theirs = main["config"].get(name), peer["config"].get(name)
            if ours != theirs:
                errors.append(f"{who} in {flag_name(name)}: {theirs!r} against {ours!r}")
    if errors:
        raise UserError("\n".join([*errors, "every machine must run the same program on the same data"]))

    all_gpu = all(peer["device"] == "cuda" for peer in peers)
    if config.backend == "nccl" and not all_gpu:
        without = next(peer["host"] for peer in peers if peer["device"] != "cuda")
        raise UserError(
            f"--backend nccl needs a GPU for every process, {without} has none; use --backend gloo or auto"
        )
    backend = ("nccl" if all_gpu else "gloo") if config.backend == "auto" else config.backend

    precision = main["config"].get("mixed_precision", "no")
    launcher = main["launcher_mixed_precision"]
    if precision == "auto" and launcher not in ("no", ""):
        precision = launcher
    elif precision == "auto":
        precision = "bf16" if all("bf16" in peer["flops"] for peer in peers) else "no"
    elif launcher not in ("no", precision):
        warnings.append(f"--mixed-precision {precision} overrides mixed_precision: {launcher} of the YAML")
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"mixed_precision: {precision} of the YAML is not supported; use no, bf16 or fp16")
    if precision == "fp16" and main["config"].get("optimizer") == "muon":
        raise UserError("--optimizer muon does not work with mixed precision fp16; use bf16 or no")
    if precision == "fp16" and not all_gpu:
        raise UserError("mixed precision fp16 needs a GPU for every process; use --mixed-precision bf16 or no")
    if main["is_public"]:
        warnings.append(warn_of_public(main["address"], main["port"]))
    for peer in {peer["host"]: peer for peer in peers}.values():
        used = peer["threads"] * peer["num_local_processes"]
        if peer["device"] == "cpu" and used <= peer["cores"] // 2:
            warnings.append(
                f"{peer['host']} computes with {used} of its {peer['cores']} cores: say `use_cpu: true` in the YAML, "
                "or set OMP_NUM_THREADS"
            )
    alike = (
        len(
            {(peer["device_name"], peer["instructions"], peer["threads"], peer["versions"]["torch"]) for peer in peers}
        )
        == 1
    )
    return Agreement(peers=peers, backend=backend, mixed_precision=precision, warnings=warnings, alike=alike)


def compare(peers: list[dict]) -> list[str]:
    """Compares what the processes have loaded; returns the differences that do no harm.

    Args:
        peers: by rank, `host`, `fingerprints` (a dict by name), `weights` (a hash) and `random_weights` of each.

    Raises:
        UserError: naming each peer and fingerprint that differs from the main process.
    """
    errors, warnings = [], []
    main = peers[0]
    for rank, peer in enumerate(peers):
        who = f"{peer['host']} (process {rank}) differs from {main['host']} (process 0)"
        for name, ours in main["fingerprints"].items():
            theirs = peer["fingerprints"].get(name)
            if ours != theirs:
                errors.append(f"{who} in its {name}: fingerprint {str(theirs)[:12]} against {str(ours)[:12]}")
        if peer["weights"] != main["weights"]:
            if main["random_weights"]:
                warnings.append(
                    f"{who} in the random initial weights (another processor); it takes those of process 0"
                )
            else:
                errors.append(
                    f"{who} in the model's weights: hash {peer['weights'][:12]} against {main['weights'][:12]}"
                )
    if errors:
        raise UserError("\n".join([*errors, "every machine must run the same program on the same data"]))
    return warnings


def check_world(world: World, num_processes: int) -> None:
    """Compares the world that came up with the one that the launcher meant.

    Raises:
        UserError: they differ, as when each process would train alone.
    """
    if num_processes != world.num_processes:
        raise UserError(
            f"the launcher meant a world of {world.num_processes} processes, but {num_processes} came up: "
            + MULTI_CPU_FIX
        )


def describe(agreement: Agreement) -> str:
    """Returns who takes part, in one line for the log."""
    machines = {}
    for peer in agreement.peers:
        place = f" [{peer['address']} {peer['interface']}]" if peer["address"] else ""
        machines.setdefault(peer["host"] + place, []).append(peer["device_name"])
    names = ", ".join(f"{name}: {len(devices)} x {devices[0]}" for name, devices in machines.items())
    count = len(agreement.peers)
    where = f"{len(machines)} machine{'s' if len(machines) > 1 else ''} ({names})"
    group = f"{agreement.backend}, " if count > 1 else ""
    return (
        f"{count} process{'es' if count > 1 else ''} on {where}, "
        f"{group}{'fp32' if agreement.mixed_precision == 'no' else agreement.mixed_precision}"
    )


def measure_bandwidth(accelerator: Accelerator) -> float:
    """Returns the bytes per second that an all-reduce sends from each process; call on all, where there are several.

    It sends no more than a slow link carries in a moment: 64 KiB, and 1 and 8 MiB only if that was quick.
    """
    n = accelerator.num_processes
    for size in (1 << 16, 1 << 20, 1 << 23):
        tensor = torch.zeros(size, dtype=torch.uint8, device=accelerator.device)
        start = time.perf_counter()
        dist.all_reduce(tensor)
        tensor[0].item()  # waits for the GPU
        seconds = gather(torch.tensor([time.perf_counter() - start], device=accelerator.device)).max().item()
        if seconds > 0.2:
            break
    return 2 * (n - 1) / n * size / seconds


class GroupTimeout:
    """The seconds after which a collective of the process group gives up, as they follow from the run.

    Twice the longest pause that processes have made for each other so far (a save, an evaluation), or four times what
    the largest transfer takes, and at least a floor. gloo counts per operation. Make and use it on all processes.

    Args:
        accelerator: the process group.
        model: unwrapped.
        floor_seconds: once the first step is done; until then it is ten minutes, for what is slow but once.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, floor_seconds: float):
        # NCCL ends the process when time is up, and says no name: whoever watches for silent peers comes first.
        self.floor_seconds = floor_seconds + (NCCL_MARGIN_SECONDS if accelerator.device.type == "cuda" else 0)
        self.pause_seconds, self.seconds, self._least = 0.0, 0.0, GROUP_START_SECONDS
        self.num_bytes = min(sum(p.nbytes for p in model.parameters()), DDP_BUCKET_BYTES)
        self.bandwidth = measure_bandwidth(accelerator) if accelerator.num_processes > 1 else 0.0
        self._set()

    def first_step_done(self) -> None:
        """What is slow but once, as compiling, is over."""
        self._least = self.floor_seconds
        self._set()

    def paused(self, seconds: float) -> None:
        """Notes a pause."""
        if seconds > self.pause_seconds:
            self.pause_seconds = seconds
            self._set()

    def describe(self) -> dict[str, float]:
        """Returns the time-out, in seconds, and what it follows from, for run.json."""
        return {
            "seconds": self.seconds,
            "floor_seconds": self.floor_seconds,
            "largest_transfer_bytes": self.num_bytes,
            "bytes_per_second": self.bandwidth,
            "longest_pause_seconds": self.pause_seconds,
        }

    def _set(self) -> None:
        if self.bandwidth:
            self.seconds = max(self._least, 4 * self.num_bytes / self.bandwidth, 2 * self.pause_seconds)
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.seconds), dist.group.WORLD)


def replica(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Returns all tensors that must be equal on all processes, by name: the parameters and the optimizers' states."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer {number}, parameter {parameter}, {key}"] = torch.as_tensor(value)
    return tensors


def find_diverged(accelerator: Accelerator, tensors: dict[str, torch.Tensor], agreement: Agreement) -> str:
    """Compares the replicas of all processes; returns who differs and where, or nothing. Call on all processes.

    Between processes that compute alike each bit counts: a 64-bit xxh3 hash travels. Between others (a GPU and a CPU,
    other numbers of threads) rounding differs, and the norms of the tensors are compared, to a thousandth.
    """
    if accelerator.num_processes == 1:
        return ""
    if agreement.alike:
        hashes = [xxhash.xxh3_64_intdigest(_bytes(tensor)) for tensor in tensors.values()]
        total = xxhash.xxh3_64_intdigest(str(hashes).encode()) >> 1  # fits an int64
        if gather(torch.tensor([total], device=accelerator.device)).unique().numel() == 1:
            return ""
        rows = gather_object([hashes])
    else:
        rows = gather_object([[tensor.double().norm().item() for tensor in tensors.values()]])
    odd: dict[int, list[str]] = {}
    for name, values in zip(tensors, zip(*rows, strict=True), strict=True):
        if agreement.alike:
            usual = Counter(values).most_common(1)[0][0]  # of two that differ, the first
            differ = [rank for rank, value in enumerate(values) if value != usual]
        else:
            usual = sorted(values)[(len(values) - 1) // 2]
            differ = [rank for rank, value in enumerate(values) if not abs(value - usual) <= 1e-3 * abs(usual) + 1e-12]
        for rank in differ:
            odd.setdefault(rank, []).append(name)
    return "; ".join(
        f"the replica of process {rank} on {agreement.peers[rank]['host']} differs from "
        f"{'process 0' if len(rows) == 2 else 'the others'} in {len(names)} of {len(tensors)} tensors ({names[0]}, …)"
        for rank, names in odd.items()
    )


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
