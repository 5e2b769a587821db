"""Averages vectors over the peers of a group in two phases, in few large messages.

The vector is divided into as many shards as there are peers, and each peer owns one. In phase 1 it sends each owner
the rounded numbers of that shard; the owner sums them in the order of the peers. In phase 2 the owner rounds the sum
and sends it to all others. So each peer sends 2 (n - 1) / n of the rounded vector, one message per shard and phase,
and all peers decode the same bytes.
"""

from dataclasses import dataclass

import torch

from forge_lib.elastic.flat import Shards
from forge_lib.elastic.peer_group import PeerGroup


@dataclass(frozen=True)
class Result:
    """What an exchange gives.

    Attributes:
        data: the bytes of each shard of the average, by its owner; equal on all peers.
        owner_error: [numbers of the own shard] fp32, what its rounding in phase 2 has left out.
        num_bytes: sent by this peer.
    """

    data: list[torch.Tensor]
    owner_error: torch.Tensor
    num_bytes: int


def average(
    group: PeerGroup,
    shards: Shards,
    sent: list[torch.Tensor],
    weights: list[float],
    owner_error: torch.Tensor,
    timeout_seconds: float,
) -> Result:
    """Returns the weighted average of the vectors of all members. Call on all members of the group.

    Args:
        group: of the peers.
        shards: the division of the vector; one shard for each member.
        sent: the bytes of each shard of this peer's vector, from `Shards.encode`; not needed if its weight is 0.
        weights: of each member's vector; their sum is 1. A member with weight 0 sends nothing in phase 1.
        owner_error: [numbers of the own shard] fp32, added to the sum before it is rounded.
        timeout_seconds: for each phase.

    Raises:
        RuntimeError: a peer is lost, or too slow.
    """
    own, others = group.rank, [rank for rank in range(group.size) if rank != group.rank]
    received = {rank: torch.empty(shards.num_bytes(own), dtype=torch.uint8) for rank in others if weights[rank]}
    first = {rank: sent[rank] for rank in others} if weights[own] else {}
    group.transfer(first, received, 1, timeout_seconds)
    if weights[own]:
        received[own] = sent[own]
    total = owner_error.clone()
    num_matrix = shards.ranges(own)[0].stop - shards.ranges(own)[0].start
    parts = total[:num_matrix], total[num_matrix:]
    for rank in sorted(received):
        for part, numbers in zip(parts, shards.decode(received[rank], own), strict=True):
            part += numbers.mul_(weights[rank])
    result = shards.encode_parts(*parts)
    decoded = torch.cat(shards.decode(result, own))
    data = [torch.empty(shards.num_bytes(rank), dtype=torch.uint8) for rank in range(group.size)]
    data[own] = result
    group.transfer(dict.fromkeys(others, result), {rank: data[rank] for rank in others}, 2, timeout_seconds)
    num_bytes = sum(map(len, first.values())) + len(others) * len(result)
    return Result(data, total - decoded, num_bytes)


def have_equal_hash(group: PeerGroup, digest: bytes, timeout_seconds: float) -> bool:
    """Returns whether all members give the same 16 bytes. Call on all members; RuntimeError if a peer is lost.

    The messages are those of a dissemination barrier (Hensgen, Finkel, Manber 1988): in step k each member sends its
    hash to the one that is 2^k places behind it. After log2(n) steps it has heard of all others, directly or not. A
    member that has seen another hash sends zeros from then on.
    """
    own, other = torch.frombuffer(bytearray(digest), dtype=torch.uint8), torch.zeros(len(digest), dtype=torch.uint8)
    is_equal, distance, tag = True, 1, 3
    while distance < group.size:
        received = torch.empty_like(own)
        to, source = (group.rank + distance) % group.size, (group.rank - distance) % group.size
        group.transfer({to: own if is_equal else other}, {source: received}, tag, timeout_seconds)
        is_equal &= torch.equal(received, own)
        distance, tag = 2 * distance, tag + 1
    return is_equal
