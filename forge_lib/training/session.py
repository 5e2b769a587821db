"""How a process joins the others of its run: what they agree on, the run folder's lock, accelerate's settings."""

import dataclasses
import uuid
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedDataParallelKwargs, InitProcessGroupKwargs

from forge_lib.config import TrainConfig
from forge_lib.data.files import data_exists
from forge_lib.distributed.agreement import Agreement, agree
from forge_lib.distributed.device import choose_device
from forge_lib.distributed.environment import check_environment
from forge_lib.distributed.facts import local_facts
from forge_lib.distributed.lock import RunLock
from forge_lib.distributed.peers import Peers
from forge_lib.distributed.timeouts import GROUP_START_SECONDS
from forge_lib.errors import UserError
from forge_lib.models.loading import model_exists
from forge_lib.process import World
from forge_lib.training.hub import check_hub


@dataclass(frozen=True)
class Session:
    """What a process knows once it has joined the others.

    Attributes:
        config: the same on all processes, except for paths and the micro-batch size.
        world: the ranks.
        peers: the side channel to the other processes.
        lock: on the run folder; one process of each machine holds it.
        device: "cpu", "cuda" or "mps".
        agreement: what all processes have agreed on.
    """

    config: TrainConfig
    world: World
    peers: Peers
    lock: RunLock
    device: str
    agreement: Agreement

    @property
    def folder(self) -> Path:
        """The run folder of this machine."""
        return self.lock.folder

    @property
    def hosts(self) -> list[str]:
        """The host name of each process, by rank."""
        return [process.host for process in self.agreement.processes]

    def machine_names(self, machines: Collection[int] | None = None) -> list[str]:
        """Returns a name for each machine: its host name, with its address if another one has the same.

        Args:
            machines: which ones, by the rank of their first process; None: all.
        """
        first = {each.machine: each for each in reversed(self.agreement.processes)}
        hosts = [each.host for each in first.values()]
        names = {
            machine: each.host if hosts.count(each.host) == 1 else f"{each.host} ({each.address})"
            for machine, each in sorted(first.items())
        }
        return [name for machine, name in names.items() if machines is None or machine in machines]

    def is_checkpoint_machine(self) -> bool:
        """Returns whether this machine is one of `--checkpoint-machines`."""
        return self.world.machine in self._checkpoint_machines()

    def checkpoint_hosts(self) -> list[str]:
        """Returns the names of `--checkpoint-machines`."""
        return self.machine_names(self._checkpoint_machines())

    def _checkpoint_machines(self) -> list[int]:
        machines = sorted({process.machine for process in self.agreement.processes})
        which = self.config.checkpoint_machines
        count = {"all": len(machines), "main": 1}.get(which) or int(which)
        return machines[:count]

    def accelerator_arguments(self) -> dict[str, Any]:
        """Returns the arguments of `Accelerator(...)`: device, precision and backend, as agreed by all processes."""
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.8 lacks its replacement
        handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
        if self.world.num_processes > 1:
            timeout = timedelta(seconds=GROUP_START_SECONDS)
            handlers.append(InitProcessGroupKwargs(backend=self.agreement.backend, timeout=timeout))
        return {
            "cpu": self.device == "cpu",
            "mixed_precision": self.agreement.mixed_precision,
            "project_dir": self.folder,
            "kwargs_handlers": handlers,
        }


def join(config: TrainConfig, world: World, peers: Peers, lock: RunLock) -> Session:
    """Agrees with the other processes on how to train, and locks the run folder. Call on all processes.

    Raises:
        UserError: the machines differ in something that must be equal, or the run folder is in use or not writable.
    """
    check_environment()
    if not config.output_dir:
        raise UserError("--output-dir is empty; expected a folder for the run")
    if config.push_to_hub and world.process_index == 0:
        check_hub(config.push_to_hub)
    device = choose_device(config.device, world)
    if world.is_local_main:
        make_folder(lock.folder, world)
    peers.set_status("measuring its speed")
    has = {
        "model_name": model_exists(config.model_name),
        "dataset_path": data_exists(config.dataset_path),
        "eval_dataset_path": data_exists(config.eval_dataset_path),
    }
    facts = dataclasses.replace(
        local_facts(config, world, device), machine=world.machine, run_id=uuid.uuid4().hex, has=has
    )
    peers.address = facts.address
    agreement = agree(peers.all_gather(facts, "facts"), config)
    if device == "cuda" and agreement.mixed_precision != "no":
        torch.set_float32_matmul_precision("high")  # what remains in fp32 may be rounded, too: TF32
    # The main machine first: on a disk that machines share, it is the one that gets the lock.
    for is_main_turn in (True, False):
        if world.is_local_main and (world.process_index == 0) == is_main_turn:
            lock.acquire(agreement.processes[0].run_id)
            lock.set_waiting("the model and the data")
        peers.barrier(f"locks, {'main machine' if is_main_turn else 'others'}")
    return Session(config, world, peers, lock, device, agreement)


def make_folder(folder: Path, world: World) -> None:
    """Creates the run folder; raises UserError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.lock").touch()
        if world.process_index == 0:
            (folder / "metrics.jsonl").touch()
    except OSError as error:
        raise UserError(f"--output-dir {folder} is not writable: {error.strerror}") from None
