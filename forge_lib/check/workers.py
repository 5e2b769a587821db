"""Worker processes that form the process group of a run, and measure it; one group of workers per machine."""

import multiprocessing
import signal
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.pool import AsyncResult
from multiprocessing.synchronize import Barrier
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from forge_lib.cluster.cluster_file import Cluster, Machine
from forge_lib.distributed.agreement import Agreement
from forge_lib.distributed.peers import Peers
from forge_lib.distributed.speed import ALL_REDUCE_BYTES, all_reduce_seconds
from forge_lib.distributed.threads import set_threads
from forge_lib.errors import PeerLostError, first_line
from forge_lib.process import World, die_with_parent

STORE_SECONDS = 30
GROUP_SECONDS = 120  # timeout of the process group
NUM_ALL_REDUCES = 5
SLOW_SECONDS = 2.0  # an all-reduce that takes longer is not repeated, and no larger one follows
POLL_SECONDS = 0.1

T = TypeVar("T")
Prepare = Callable[..., Callable[[], T]]  # receives a Place and further arguments


@dataclass(frozen=True)
class Place:
    """The settings that one worker receives.

    Attributes:
        world: the processes of the run, and this one's rank among them.
        holds_store: whether this worker opens the store, which otherwise is the store of the check.
        backend: "nccl" or "gloo".
        device: "cpu", "cuda" or "mps".
        mixed_precision: "no", "bf16" or "fp16".
    """

    world: World
    holds_store: bool
    backend: str
    device: str
    mixed_precision: str


class Workers:
    """The workers of this machine, as many as a run would start; use it as a context manager, on all machines."""

    def __init__(self, cluster: Cluster, machine: Machine, device: str, agreement: Agreement, peers: Peers):
        first = sum(each.processes for each in cluster.machines[: machine.rank])
        main = (cluster.address(cluster.main), cluster.port)
        is_only_machine = len(cluster.machines) == 1
        self.places = [
            Place(
                world=World(first + n, cluster.num_processes, n, machine.processes, *main),
                holds_store=is_only_machine and n == 0,
                backend=agreement.backend,
                device=device,
                mixed_precision=agreement.mixed_precision,
            )
            for n in range(machine.processes)
        ]
        self.peers = peers

    def __enter__(self):
        self.peers.set_status("starting its worker processes")
        context = multiprocessing.get_context("spawn")
        self._barrier = context.Barrier(len(self.places) + 1)
        self._pool = context.Pool(len(self.places), _start_worker, (self._barrier,))
        return self

    def __exit__(self, *_):
        self._pool.terminate()

    def run(self, status: str, prepare: Prepare, *args: Any) -> list[Any]:
        """Measures something in all workers, at the same time on all machines; call on all machines.

        Args:
            status: what the workers do, for messages.
            prepare: is called in each worker with its Place and `args`. It returns the function that measures; that
                one is called once all workers are prepared.

        Returns:
            What the function returned in each worker of this machine.

        Raises:
            PeerLostError: a collective failed here, or another machine was lost.
        """
        self.peers.set_status(status)
        tasks = [(prepare, place, args) for place in self.places]
        results = self._pool.map_async(_call_together, tasks, chunksize=1)
        while self._barrier.n_waiting < len(self.places) and not results.ready():
            self._wait(results)
        if not results.ready():  # otherwise a worker has failed
            self.peers.barrier(status)
            self._barrier.wait()
        while not results.ready():
            self._wait(results)
        try:
            return results.get()
        except RuntimeError as error:  # of gloo, NCCL or the store
            raise PeerLostError(f"{self.peers.host}: {status} failed: {first_line(error)}") from None

    def _wait(self, results: AsyncResult) -> None:
        results.wait(POLL_SECONDS)
        self.peers.check()


def _start_worker(barrier: Barrier) -> None:
    """Stores the barrier, which can only be passed to a new process, and ends this process when the check ends."""
    global _barrier
    _barrier = barrier
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the check ends them


def _call_together(task: tuple[Prepare, Place, tuple]) -> Any:
    prepare, place, args = task
    try:
        if place.device == "cuda":
            torch.cuda.set_device(place.world.local_process_index)
        else:
            set_threads(place.world)
        measure = prepare(place, *args)
        _barrier.wait()
    except BaseException:
        _barrier.abort()
        raise
    return measure()


def measure_all_reduce(place: Place) -> Callable[[], dict[int, float]]:
    """Opens the store; returns a function that forms the process group and measures all-reduces. See `Workers.run`.

    The function returns the median seconds of an all-reduce, by bytes.
    """
    world, timeout = place.world, timedelta(seconds=STORE_SECONDS)
    store = dist.TCPStore(
        world.main_address, world.main_port, None, place.holds_store, timeout, wait_for_workers=False
    )

    def measure() -> dict[int, float]:
        dist.init_process_group(
            place.backend,
            store=dist.PrefixStore("check", store),
            timeout=timedelta(seconds=GROUP_SECONDS),
            rank=world.process_index,
            world_size=world.num_processes,
        )
        medians: dict[int, float] = {}
        for size in ALL_REDUCE_BYTES:
            tensor = torch.zeros(size // 4, device=place.device)
            seconds: list[float] = []
            while len(seconds) < NUM_ALL_REDUCES and sum(seconds) < 2 * SLOW_SECONDS:
                seconds.append(all_reduce_seconds(tensor))  # the same on all processes, so they stop together
            medians[size] = statistics.median(seconds[1:] or seconds)
            if medians[size] > SLOW_SECONDS and len(medians) > 1:
                break
        dist.destroy_process_group()
        return medians

    return measure
