"""Copies a folder (a model, a token store, a checkpoint) from a machine that has it to the machines that lack it."""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from forge_lib.distributed import transfer, transfer_files
from forge_lib.training.session import Session


@dataclass(frozen=True)
class HeldFolder:
    """Whether a process has a folder, and whether it can send it: a single file in a cache is not sent."""

    is_held: bool
    is_sendable: bool


@dataclass(frozen=True)
class FileList:
    """The files that will be sent, as `transfer_files.list_files` returns them; empty on all but the sender."""

    files: dict[str, dict]


def fetch(session: Session, what: str, held: Path | None, target: Path) -> None:
    """Copies a folder from the first machine that has it to all that lack it. Call on all processes.

    Args:
        session: the processes.
        what: names the folder in messages, and the collectives of this call: use each name once.
        held: the folder if this machine has it, else None.
        target: the path of the copy.
    """
    world, peers = session.world, session.peers
    mine = HeldFolder(held is not None, held is not None and held.is_dir())
    found = peers.all_gather(mine, f"{what}, held")
    machines = sorted({process.machine for process in session.agreement.processes})  # rank of each one's first process
    receivers = {rank: session.hosts[rank] for rank in machines if not found[rank].is_held}
    sender = next((rank for rank in machines if found[rank].is_sendable), None)
    if not receivers or sender is None:
        return
    files = {}
    if world.process_index == sender:
        peers.set_status(f"hashing {what}")
        files = transfer_files.list_files(held)
    files = peers.all_gather(FileList(files), f"{what}, files")[sender].files
    group = dist.new_group(backend="gloo") if session.agreement.backend == "nccl" else None
    if world.process_index == sender:
        transfer.send(held, files, receivers, group, peers.set_status)
    elif world.process_index in receivers:
        transfer.receive(target, files, sender, session.hosts[sender], group, peers.set_status)
    peers.set_status(f"waiting until {what} has arrived")
    peers.barrier(f"{what}, arrived")
