"""The gloo group of the peers that exchange."""

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from forge_lib.cluster.addresses import bracketed
from forge_lib.elastic.membership import new_gloo_group
from forge_lib.elastic.peer_facts import Member
from forge_lib.errors import UserError, first_line


class PeerGroup:
    """A gloo group of the peers that exchange; it can be configured again after a failure.

    Args:
        address: of this peer; the members that connect to it must reach it.
        port: of the store through which the members of a group find each other, if this peer is its first member.

    Raises:
        UserError: the port is in use.
    """

    def __init__(self, address: str, port: int):
        try:
            self._store = dist.TCPStore(address, port, is_master=True, wait_for_workers=False)
        except dist.DistError as error:
            raise UserError(f"{address}, --peer-port {port}, cannot be used: {first_line(error)}") from None
        self.rank = self.size = 0
        self._group: Any = None
        self._ids: list[str] = []

    def connect(self, members: list[Member], own: str, name: str, timeout_seconds: float) -> None:
        """Connects to the other members, unless they are connected already. Call on all of them.

        Args:
            members: of the group, in the same order on each of them.
            own: identifier of this peer.
            name: of the group; no two groups of a run have the same one.
            timeout_seconds: of connecting, and of each message.

        Raises:
            RuntimeError: a member does not connect.
        """
        ids = [member.id for member in members]
        if ids == self._ids:
            return
        self.close()
        self.rank, self.size, self._ids = ids.index(own), len(ids), ids
        if self.size == 1:
            return
        first = members[0].facts
        self._group = new_gloo_group(timeout_seconds)
        self._group.configure(f"{bracketed(first.address)}:{first.store_port}/{name}", own, self.rank, self.size)

    def transfer(
        self, sent: dict[int, torch.Tensor], received: dict[int, torch.Tensor], tag: int, timeout_seconds: float
    ) -> None:
        """Sends a tensor to each of some members and receives one from each; the sizes are known on both sides.

        Args:
            sent, received: contiguous CPU tensors by rank.
            tag: of the messages.
            timeout_seconds: of all messages together.

        Raises:
            RuntimeError: a member is lost, or too slow.
        """
        works = [self._group.recv([tensor], rank, tag) for rank, tensor in received.items() if len(tensor)]
        works += [self._group.send([tensor], rank, tag) for rank, tensor in sent.items() if len(tensor)]
        until = time.monotonic() + timeout_seconds
        for work in works:
            work.wait(timedelta(seconds=max(0.1, until - time.monotonic())))

    def close(self) -> None:
        """Closes the connections; the other members see a failure if they still use them."""
        self._ids = []
        if self._group:
            self._group.abort(errored=False)
            self._group.shutdown()
            self._group = None
