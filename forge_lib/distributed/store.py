"""The TCPStore of the launcher: a few keys that all processes of a run read and write, beside the process group."""

import os
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from forge_lib.distributed.verdicts import Verdict
from forge_lib.errors import UserError, first_line
from forge_lib.process import World

OPEN_SECONDS = 30  # the launcher has opened its store before it starts a process
VERDICT_KEY = "error"  # the same in all versions: a machine with an older one must read it and end


def open_store(world: World, answer_seconds: float) -> dist.Store:
    """Connects to the store that the launcher holds; without a launcher, the first process holds it.

    Args:
        world: has the store's address.
        answer_seconds: an operation raises `dist.DistError` if the store does not answer for this many seconds.

    Returns:
        A view of the store that has only the keys of the launcher's current attempt.

    Raises:
        UserError: no store answers at the address.
    """
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
                timeout=timedelta(seconds=OPEN_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,  # torch opens the same store again for its process group
            )
        except dist.DistError as error:
            address = f"{world.main_address}:{world.main_port}"
            raise UserError(f"cannot open the store at {address}: {first_line(error)}") from None
    store = keys_of_attempt(store, world.attempt)
    store.set_timeout(timedelta(seconds=answer_seconds))
    return store


def keys_of_attempt(store: dist.Store, attempt: int) -> dist.PrefixStore:
    """Returns the view of a store that the processes of one attempt of the launcher use."""
    return dist.PrefixStore(f"forge/{attempt}", store)


def store_verdict(store: dist.Store, verdict: Verdict) -> None:
    """Stores the verdict, unless there is one already or the store is gone: the first one ends all processes."""
    with suppress(dist.DistError):
        store.compare_set(VERDICT_KEY, "", verdict.to_json())


def read_verdict(store: dist.Store) -> Verdict | None:
    """Returns the stored verdict, if there is one."""
    return Verdict.from_json(store.get(VERDICT_KEY)) if store.check([VERDICT_KEY]) else None
