"""Which samples each step and each process takes."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_lib.data.batches import BatchPlan, divide_batch, micro_batches, read_batch, share_of
from forge_lib.data.blocks import EMPTY_BLOCK, BlockDataset, TokenStream
from forge_lib.errors import UserError


@given(
    num_blocks=st.integers(1, 200),
    batch_size=st.integers(1, 50),
    epochs=st.sampled_from([0.5, 1, 2, 3]),
    seed=st.integers(-3, 10),
)
@settings(deadline=None, max_examples=60)
def test_each_epoch_takes_each_block_once(num_blocks, batch_size, epochs, seed):
    plan = BatchPlan.of_run(num_blocks, batch_size, max_steps=0, epochs=epochs, seed=seed)
    blocks = np.concatenate([plan.batch(step) for step in range(plan.num_steps)])
    assert len(blocks) == max(1, round(epochs * num_blocks))
    for start in range(0, len(blocks) - num_blocks + 1, num_blocks):
        assert np.array_equal(np.sort(blocks[start : start + num_blocks]), np.arange(num_blocks))


@given(shares=st.lists(st.integers(1, 5), min_size=1, max_size=6), step=st.integers(0, 11))
@settings(deadline=None, max_examples=40)
def test_the_shares_of_all_processes_are_the_global_batch(shares, step):
    blocks = BatchPlan.of_run(37, sum(shares), max_steps=12, epochs=0, seed=3).batch(step)
    by_process = [share_of(blocks, shares, rank) for rank in range(len(shares))]
    assert [len(share) for share in by_process] == shares
    assert list(chain.from_iterable(by_process)) == blocks.tolist()


def test_a_process_whose_share_of_the_last_batch_is_empty_takes_the_empty_block():
    last = BatchPlan.of_run(5, 4, max_steps=0, epochs=1, seed=0).batch(1)
    assert [share_of(last, [2, 2], rank) for rank in (0, 1)] == [last.tolist(), [EMPTY_BLOCK]]


def test_a_batch_has_the_items_of_its_blocks_in_order():
    stream = TokenStream(np.arange(40, dtype=np.uint16), np.array([0, 5, 6, 20, 40], np.uint64))
    dataset = BlockDataset(stream, 8, mask_documents=True)
    batch = read_batch(dataset, [3, 0])
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(batch[name], torch.stack([dataset[3][name], dataset[0][name]]))


@pytest.mark.parametrize(
    ("batch_size", "shares", "processes", "expected"),
    [(8, "", 2, [4, 4]), (8, "3:1", 2, [6, 2]), (12, "2,1,1", 3, [6, 3, 3]), (5, "", 1, [5])],
)
def test_a_batch_is_divided_by_the_shares(batch_size, shares, processes, expected):
    assert divide_batch(batch_size, shares, processes) == expected


@pytest.mark.parametrize(
    ("batch_size", "shares", "processes", "message"),
    [
        (7, "", 2, "use --batch-size 6 or 8"),
        (8, "2:1", 2, "use --batch-size 6 or 9"),
        (8, "1:1:1", 2, "names 3 processes, but the run has 2"),
        (8, "1:x", 2, "expected whole numbers"),
        (8, "1:0", 2, "at least 1"),
    ],
)
def test_shares_that_do_not_fit_are_reported_with_a_fix(batch_size, shares, processes, message):
    with pytest.raises(UserError, match=message):
        divide_batch(batch_size, shares, processes)


@pytest.mark.parametrize(("size", "expected"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (5, [5]), (8, [5])])
def test_micro_batches_divide_the_batch_in_order_and_mark_the_last(size, expected):
    batch = {"input_ids": torch.arange(15).view(5, 3), "labels": torch.arange(15, 30).view(5, 3)}
    parts, are_last = zip(*micro_batches(batch, size), strict=True)
    assert [len(part["labels"]) for part in parts] == expected
    assert are_last == (*[False] * (len(expected) - 1), True)
    for name, tensor in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)


def test_samples_have_the_blocks_of_their_steps_and_no_samples_have_none():
    plan = BatchPlan(num_blocks=7, batch_size=3, num_steps=9, seed=1)
    assert np.array_equal(plan.blocks(np.arange(27)), np.concatenate([blocks for _, blocks in plan.batches(0)]))
    assert plan.blocks(np.arange(0)).dtype == np.int64 and len(plan.blocks(np.arange(0))) == 0
