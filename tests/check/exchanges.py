"""Machines of a check in this process, at addresses of the loopback network, and the facts that they send."""

from dataclasses import replace

from forge_lib.check.arrival import Arrival
from forge_lib.check.exchange import Exchange
from forge_lib.check.machine_facts import MachineFacts
from forge_lib.distributed.facts import versions

ADDRESSES = {"alice": "127.0.1.1", "bob": "127.0.1.2", "carol": "127.0.1.3"}
FACTS = MachineFacts(
    host="a-host",
    address="127.0.1.1",
    interface="lo",
    system="Linux 6.1",
    versions=versions(),
    processes=1,
    device="cpu",
    cores=2,
    memory_bytes=8_000_000_000,
    free_bytes=50_000_000_000,
    dataset="",
    flags={"batch_size": 32},
    is_public=False,
)


def facts_of(name: str, **changes) -> MachineFacts:
    """The facts of a machine, whose host name is its name."""
    return replace(FACTS, host=name, address=ADDRESSES[name], **changes)


def make_arrival(name: str, port: int = 1, addresses: dict[str, str] = ADDRESSES, **changes) -> Arrival:
    """A machine that has its facts; its exchange is not started yet."""
    exchange = Exchange(name, addresses, port, changes.pop("cluster", "the same"))
    exchange.update(facts=facts_of(name, **changes))
    return Arrival(exchange)
