"""An exchange: the result on all peers, and how many messages it takes."""

import queue
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from forge_lib.elastic.averaging import average, have_equal_hash
from forge_lib.elastic.compression import CODECS
from forge_lib.elastic.flat import Shards


class Group:
    """Threads instead of machines; counts the messages that each one sends."""

    def __init__(self, rank: int, size: int, links: dict):
        self.rank, self.size, self._links, self.num_messages = rank, size, links, 0

    def transfer(self, sent, received, tag, timeout_seconds):
        for rank, tensor in sent.items():
            self._links[self.rank, rank, tag].put(tensor.clone())
            self.num_messages += 1
        for rank, tensor in received.items():
            tensor.copy_(self._links[rank, self.rank, tag].get(timeout=timeout_seconds))


def make_groups(size: int) -> list[Group]:
    links = {(a, b, tag): queue.Queue() for a in range(size) for b in range(size) for tag in range(1, 6)}
    return [Group(rank, size, links) for rank in range(size)]


@pytest.mark.parametrize(("size", "num_messages"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (7, 3)])
def test_all_peers_know_whether_all_have_the_same_hash_after_few_messages(size, num_messages):
    """With those of the average, an exchange of up to four peers has at most two messages per shard."""
    for different in (None, *range(size)):
        groups, digests = make_groups(size), [bytes(16 * [7])] * size
        if different is not None:
            digests[different] = bytes(16 * [8])
        with ThreadPoolExecutor(size) as pool:
            found = list(pool.map(have_equal_hash, groups, digests, [10.0] * size))
        assert found == [different is None or size == 1] * size
        assert [group.num_messages for group in groups] == [num_messages] * size
        assert size > 4 or 2 * (size - 1) + num_messages <= 2 * size


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["no", "int4"])
def test_all_peers_have_the_same_average_after_one_message_per_shard_and_phase(size, name):
    groups = make_groups(size)
    shards = Shards(10_000, 300, size, CODECS[name])
    vectors = torch.randn(size, 10_300, generator=torch.Generator().manual_seed(0))
    weights = [(rank + 1) / sum(range(size + 1)) for rank in range(size)]

    def run(rank: int):
        sent = [shards.encode(vectors[rank], index) for index in range(size)]
        own = shards.ranges(rank)
        error = torch.zeros(sum(each.stop - each.start for each in own))
        return average(groups[rank], shards, sent, weights, error, 10.0)

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, range(size)))
    assert all(torch.equal(a, b) for each in results for a, b in zip(each.data, results[0].data, strict=True))
    decoded = torch.empty(10_300)
    for index, data in enumerate(results[0].data):
        shards.decode_into(decoded, data, index)
    expected = torch.tensor(weights) @ vectors
    if CODECS[name].is_exact:  # fp32 for the matrices, bf16 for the vectors
        assert torch.allclose(decoded[:10_000], expected[:10_000], atol=1e-6)
    assert torch.allclose(decoded, expected, atol=0.5)
    assert [group.num_messages for group in groups] == [2 * (size - 1)] * size, "two per shard of another peer"
