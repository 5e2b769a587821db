"""What the peers settle before they train: the network interface, who is there, and whether all mean the same run.

The processes first meet in a lobby: a few keys in the TCPStore of the launcher, before any process group exists.
There, waiting costs nothing and has no time-out: a machine that still tokenizes says how far it is, and a mistake on
one machine ends all of them, with its message, within a second.
"""

import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import accelerate
import psutil
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import get_cpu_distributed_information, str_to_bool
from transformers.utils.logging import disable_progress_bar

from forge_lib.config import UserError, WorldConfig, flag_name

POLL_SECONDS = 0.25
STORE_SECONDS = 30  # the launcher has opened its store before it starts a process
WAIT_LINE_SECONDS = 10
SILENCE_SECONDS = 60  # a peer in the lobby that says nothing for so long is lost
FAREWELL_SECONDS = 5  # how long a failing process waits until its peers have heard why
LOCAL_FIELDS = {"dataset_path", "eval_dataset_path", "output_dir", "model_name", "micro_batch_size"}  # may differ
WIZARD_CURE = (
    "a YAML with `distributed_type: MULTI_CPU` starts one process on each machine, and each would train a model of "
    "its own. Change these two lines of the YAML:\n    distributed_type: MULTI_GPU\n    use_cpu: true"
)


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
    interface = next(
        (nic for nic, addrs in psutil.net_if_addrs().items() if any(a.address.split("%")[0] == own for a in addrs)), ""
    )
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    return os.environ.get("GLOO_SOCKET_IFNAME", interface), own


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


def local_facts(config: WorldConfig, world: World, device: str) -> dict:
    """Returns what this process tells the others of itself: versions, configuration, place and speed."""
    interface, address = choose_interface(world)
    small, large = (256, 1024) if device == "cpu" else (1024, 4096)
    flops = {"fp32": matmul_flops(device, torch.float32, large)}
    if matmul_flops(device, torch.bfloat16, small) > 1.2 * matmul_flops(device, torch.float32, small):
        flops["bf16"] = matmul_flops(device, torch.bfloat16, large)  # elsewhere it can be a hundred times slower
    return {
        "host": socket.gethostname(),
        "address": address,
        "interface": interface,
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "flops": flops,
        "launcher_mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "transformers": transformers.__version__,
        },
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in LOCAL_FIELDS},
    }


class Lobby:
    """Where the processes of a run wait for each other before there is a process group; use it as a context manager.

    Args:
        world: the processes that are expected.
    """

    def __init__(self, world: World):
        self.world = world
        self.host = socket.gethostname()
        self._state = "starting"
        self._done = threading.Event()

    def __enter__(self):
        if self.world.num_processes > 1:
            self._store = _open_store(self.world)
            self._heart = threading.Thread(target=self._beat, daemon=True)
            self._heart.start()
        return self

    def __exit__(self, *_):
        if self.world.num_processes > 1:
            self._done.set()
            self._heart.join()

    def say(self, state: str) -> None:
        """Tells the others what this process is doing now; cheap, to be called often."""
        self._state = state

    def exchange(self, facts: dict) -> list[dict]:
        """Hands `facts` (of JSON types) to all processes, waits for theirs, and returns them by rank.

        Call on all processes. Now and then, one process of each machine says on stderr for whom it waits.

        Raises:
            UserError: another process has failed, with its message; or has not been heard from for a minute.
        """
        world = self.world
        if world.num_processes == 1:
            return [facts]
        self.say("ready")
        self._store.set(f"facts/{world.process_index}", json.dumps(facts))
        missing, beats, said = set(range(world.num_processes)), {}, time.monotonic()
        while missing:
            try:
                if self._store.check(["error"]):
                    raise _PeerError(self._store.get("error").decode())
                missing = {rank for rank in missing if not self._store.check([f"facts/{rank}"])}
                states = {
                    rank: json.loads(self._store.get(f"state/{rank}"))
                    if self._store.check([f"state/{rank}"])
                    else None
                    for rank in missing
                }
            except dist.DistError as error:
                raise _PeerError(
                    f"the store on the main machine {world.main_address}:{world.main_port} is gone: its launcher has "
                    f"stopped; see its messages there ({type(error).__name__})"
                ) from None
            now = time.monotonic()
            for rank, state in states.items():
                if state and beats.get(rank, (None, 0))[0] != state["beat"]:
                    beats[rank] = (state["beat"], now)
                elif state and now - beats[rank][1] > SILENCE_SECONDS:
                    raise UserError(
                        f"process {rank} on {state['host']} has not been heard from for {SILENCE_SECONDS} s (it was "
                        f"{state['state']}): it has died, or its link is cut; start the run again on all machines"
                    )
            if missing and now - said >= WAIT_LINE_SECONDS and world.local_process_index == 0:
                said = now
                for rank, state in sorted(states.items()):
                    doing = f"on {state['host']}: {state['state']}" if state else "which has not started yet"
                    print(f"{self.host} waits for process {rank}, {doing}", file=sys.stderr, flush=True)
            if missing:
                time.sleep(POLL_SECONDS)
        return [json.loads(self._store.get(f"facts/{rank}")) for rank in range(world.num_processes)]

    def _beat(self) -> None:
        beat = 0
        while not self._done.wait(POLL_SECONDS * 2 if beat else 0):
            beat += 1
            state = {"beat": beat, "host": self.host, "state": self._state}
            try:
                self._store.set(f"state/{self.world.process_index}", json.dumps(state))
            except dist.DistError:
                return  # the store is gone: exchange() says so


class _PeerError(UserError):
    """Another process's error, as this one has heard of it."""


def _open_store(world: World) -> dist.Store:
    """Joins the store that the launcher holds, or makes one where the first process is expected to hold it."""
    debug_file = os.environ.get("ACCELERATE_DEBUG_RDV_FILE")  # set by accelerate's debug_launcher
    if debug_file:
        store = dist.FileStore(debug_file, world.num_processes)
    else:
        launcher_holds_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = dist.TCPStore(
                world.main_address,
                world.main_port,
                is_master=world.process_index == 0 and not launcher_holds_it,
                timeout=timedelta(seconds=STORE_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,  # torch opens the same store again for its process group
            )
        except dist.DistError as error:
            raise UserError(
                f"cannot open the store at {world.main_address}:{world.main_port}: {str(error).splitlines()[0]}"
            ) from None
    return dist.PrefixStore(f"forge/{world.attempt}", store)


@contextmanager
def one_message(program: str) -> Iterator[None]:
    """Turns a person's mistake inside it into one message and exit code 2, here and on peers in the lobby."""
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        yield
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        _tell_peers(error)
        sys.exit(2)
    except OSError as error:
        if not error.filename:
            raise
        mistake = UserError(f"{error.filename}: {error.strerror}")
        print(f"{program}: error: {mistake}", file=sys.stderr, flush=True)
        _tell_peers(mistake)
        sys.exit(2)
    except Exception as error:
        _tell_peers(error)
        raise


def _tell_peers(error: Exception) -> None:
    """Leaves the error in the lobby, and waits a little until all who are there have heard of it."""
    try:
        world = World.from_environment()
        if world.num_processes == 1 or "the store on the main machine" in str(error):
            return
        store = _open_store(world)
        ranks = range(world.num_processes)
        if store.check([f"facts/{rank}" for rank in ranks]):
            return  # all have left the lobby, or see the same facts
        if not isinstance(error, _PeerError):
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            store.compare_set("error", "", f"{socket.gethostname()} (process {world.process_index}): {text}")
        store.set(f"heard/{world.process_index}", "")
        until = time.monotonic() + FAREWELL_SECONDS
        while time.monotonic() < until:
            here = [rank for rank in ranks if store.check([f"state/{rank}"])]
            if len(here) == len(ranks) and store.check([f"heard/{rank}" for rank in here]):
                return
            time.sleep(POLL_SECONDS)
    except (UserError, dist.DistError):
        pass  # there is no lobby: nobody to tell


@dataclass(frozen=True)
class Agreement:
    """What all processes have agreed on.

    Attributes:
        peers: the facts of each process, by rank.
        backend: "nccl" or "gloo".
        mixed_precision: "no", "bf16" or "fp16".
        warnings: differences that do no harm.
    """

    peers: list[dict]
    backend: str
    mixed_precision: str
    warnings: list[str]


def agree(peers: list[dict], config: WorldConfig) -> Agreement:
    """Compares the facts of all processes and settles what follows from them; the same result on each.

    Args:
        peers: as `Lobby.exchange` returns them: `local_facts` and, if given, `fingerprints` (a dict) and `weights` (a
            hash) with `random_weights`.
        config: of this process; the flags that decide are the same everywhere, or this raises.

    Raises:
        UserError: naming each peer and field that differs from the main process.
    """
    errors, warnings = [], []
    main = peers[0]
    for rank, peer in enumerate(peers):
        who = f"{peer['host']} (process {rank}) differs from {main['host']} (process 0)"
        for name in ("torch", "accelerate", "transformers"):
            ours, theirs = main["versions"][name], peer["versions"][name]
            if ours.split("+")[0] != theirs.split("+")[0]:
                same_minor = ours.split(".")[:2] == theirs.split(".")[:2]
                (warnings if same_minor else errors).append(f"{who} in the version of {name}: {theirs} against {ours}")
        for name in sorted({*main["config"], *peer["config"]}):
            ours, theirs = main["config"].get(name), peer["config"].get(name)
            if ours != theirs:
                errors.append(f"{who} in {flag_name(name)}: {theirs!r} against {ours!r}")
        for name, ours in main.get("fingerprints", {}).items():
            theirs = peer["fingerprints"].get(name)
            if ours != theirs:
                errors.append(f"{who} in its {name}: fingerprint {str(theirs)[:12]} against {str(ours)[:12]}")
        if peer.get("weights") != main.get("weights"):
            if main.get("random_weights"):
                warnings.append(
                    f"{who} in the random initial weights (another processor); it takes those of process 0"
                )
            else:
                errors.append(
                    f"{who} in the model's weights: hash {peer['weights'][:12]} against {main['weights'][:12]}"
                )
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
    return Agreement(peers=peers, backend=backend, mixed_precision=precision, warnings=warnings)


def check_world(world: World, num_processes: int) -> None:
    """Compares the world that came up with the one that the launcher meant.

    Raises:
        UserError: they differ, as when each process would train alone.
    """
    if num_processes != world.num_processes:
        raise UserError(
            f"the launcher meant a world of {world.num_processes} processes, but {num_processes} came up: "
            + WIZARD_CURE
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
