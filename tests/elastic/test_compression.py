"""How changes are rounded: the error, the bytes, and that no rounding is lost with error feedback."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from forge_lib.elastic.compression import BLOCK, CHUNK, CODECS, TOP
from forge_lib.elastic.flat import Shards

NUMBERS = arrays.arrays("float32", st.integers(0, 5000), elements=st.floats(-1e4, 1e4, width=32))


@settings(max_examples=40, deadline=None)
@given(NUMBERS, st.sampled_from(list(CODECS)))
def test_bytes_are_as_many_as_announced_and_decode_to_the_same_length(numbers, name):
    codec, values = CODECS[name], torch.zeros(len(numbers)).copy_(torch.tensor(numbers))
    data = codec.encode(values)
    assert data.dtype == torch.uint8 and len(data) == codec.num_bytes(len(values))
    decoded = codec.decode(data, len(values))
    assert decoded.shape == values.shape and decoded.dtype == torch.float32
    assert torch.isfinite(decoded).all()
    if codec.is_exact:
        assert torch.equal(decoded, values)


@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("int4", 7)])
def test_integers_round_to_half_a_step_of_their_block(name, largest):
    """The step is the block's largest number / 127 or / 7; bf16 rounds it by up to 1 / 512."""
    values = torch.randn(10 * BLOCK, generator=torch.Generator().manual_seed(0)) * 1e-3
    blocks, codec = values.view(-1, BLOCK), CODECS[name]
    steps = blocks.abs().amax(dim=1, keepdim=True) / largest
    decoded = codec.decode(codec.encode(values), len(values)).view(-1, BLOCK)
    assert ((decoded - blocks).abs() <= steps * (0.5 + largest / 256)).all()


def test_sparse_keeps_the_largest_numbers_of_each_chunk():
    values = torch.randn(2 * CHUNK, generator=torch.Generator().manual_seed(0))
    decoded = CODECS["sparse"].decode(CODECS["sparse"].encode(values), len(values))
    for chunk, found in zip(values.view(2, CHUNK), decoded.view(2, CHUNK), strict=True):
        places = chunk.abs().topk(TOP).indices
        assert set(found.nonzero()[:, 0].tolist()) == set(places.tolist())
        assert torch.allclose(found[places], chunk[places], atol=chunk.abs().max() / 200)


def test_int4_needs_an_eighth_of_fp32_and_a_little_for_the_scales():
    assert CODECS["int4"].num_bytes(1 << 20) / CODECS["no"].num_bytes(1 << 20) == pytest.approx(0.1289, abs=1e-4)


def test_tiny_huge_and_no_numbers_are_encoded():
    """fp16 clamps a number above its range; tiny numbers are not lost in integers."""
    for codec in CODECS.values():
        for values in (torch.zeros(0), torch.zeros(200), torch.full((200,), 1e-12), torch.full((200,), 1e9)):
            decoded = codec.decode(codec.encode(values), len(values))
            assert torch.isfinite(decoded).all() and (decoded >= 0).all()
    tiny = torch.full((CHUNK,), 1e-12)
    assert all(CODECS[name].decode(CODECS[name].encode(tiny), CHUNK).max() > 0.9e-12 for name in ("int8", "int4"))


@pytest.mark.parametrize("name", ["fp16", "int8", "int4", "sparse"])
def test_with_error_feedback_the_sum_of_what_was_sent_follows_the_sum_of_what_was_meant(name):
    """100 rounds: what is missing at the end is the error of one round, not of all."""
    generator, codec = torch.Generator().manual_seed(0), CODECS[name]
    error, meant, sent = torch.zeros(3, CHUNK)
    for _ in range(100):
        change = torch.randn(CHUNK, generator=generator) + 0.3
        meant += change
        decoded = codec.decode(codec.encode(change + error), CHUNK)
        error = change + error - decoded
        sent += decoded
    assert torch.allclose(meant - sent, error, atol=1e-3)
    assert error.abs().mean() < {"sparse": 30}.get(name, 0.3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20_000), st.integers(0, 300), st.integers(1, 7), st.sampled_from(list(CODECS)))
def test_shards_cover_every_number_once(num_matrix, num_vector, count, name):
    shards = Shards(num_matrix, num_vector, count, CODECS[name])
    values = torch.randn(num_matrix + num_vector, generator=torch.Generator().manual_seed(0))
    seen, decoded = torch.zeros(len(values)), torch.full_like(values, torch.nan)
    for index in range(count):
        for place in shards.ranges(index):
            seen[place] += 1
        data = shards.encode(values, index)
        assert len(data) == shards.num_bytes(index)
        shards.decode_into(decoded, data, index)
    assert (seen == 1).all() and torch.isfinite(decoded).all()
    whole = Shards(num_matrix, num_vector, 1, CODECS[name])
    expected = torch.empty_like(values)
    whole.decode_into(expected, whole.encode(values, 0), 0)
    assert torch.equal(decoded, expected), "the division does not change what is sent"
