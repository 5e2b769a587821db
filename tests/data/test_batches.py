"""Which samples each step takes."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_lib.data.batches import (
    EMPTY_BLOCK,
    IGNORED,
    BatchPlan,
    BlockDataset,
    ShareSampler,
    TokenStream,
    divide_batch,
    permute,
    split_documents,
)
from forge_lib.errors import UserError


def store_of(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A store whose token i is i."""
    documents = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
    return np.arange(int(documents[-1]), dtype=np.uint16), documents


@given(length=st.integers(1, 3000), key=st.integers(0, 2**70))
@settings(deadline=None, max_examples=60)
def test_a_permutation_takes_every_place_once(length, key):
    assert np.array_equal(np.sort(permute(np.arange(length), length, key)), np.arange(length))


def test_a_permutation_looks_random():
    """A shuffle of 10,000 has no more fixed points, and no more correlation with the order, than chance has."""
    shuffled = permute(np.arange(10_000), 10_000, 1)
    assert (shuffled == np.arange(10_000)).sum() < 8
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(np.arange(10_000), shuffled)[0, 1]) < 0.04
    assert not np.array_equal(shuffled, permute(np.arange(10_000), 10_000, 2))


@given(
    num_blocks=st.integers(1, 200),
    batch_size=st.integers(1, 50),
    epochs=st.sampled_from([0.5, 1, 2, 3]),
    seed=st.integers(-3, 10),
)
@settings(deadline=None, max_examples=60)
def test_each_block_comes_once_an_epoch(num_blocks, batch_size, epochs, seed):
    plan = BatchPlan.of_run(num_blocks, batch_size, max_steps=0, epochs=epochs, seed=seed)
    blocks = np.concatenate([plan.batch(step) for step in range(plan.num_steps)])
    assert len(blocks) == max(1, round(epochs * num_blocks))
    for start in range(0, len(blocks) - num_blocks + 1, num_blocks):
        assert np.array_equal(np.sort(blocks[start : start + num_blocks]), np.arange(num_blocks))


@given(shares=st.lists(st.integers(1, 5), min_size=1, max_size=6), first_step=st.integers(0, 10))
@settings(deadline=None, max_examples=40)
def test_the_shares_of_all_processes_are_the_global_batch_from_any_step_on(shares, first_step):
    plan = BatchPlan.of_run(37, sum(shares), max_steps=12, epochs=0, seed=3)
    samplers = [list(ShareSampler(plan, shares, rank, first_step)) for rank in range(len(shares))]
    assert all(len(each) == 12 - first_step for each in samplers)
    for number, step in enumerate(range(first_step, 12)):
        assert list(chain.from_iterable(each[number] for each in samplers)) == plan.batch(step).tolist()


def test_a_process_whose_share_of_the_last_batch_is_empty_still_takes_part():
    plan = BatchPlan.of_run(5, 4, max_steps=0, epochs=1, seed=0)
    last = [list(ShareSampler(plan, [2, 2], rank))[-1] for rank in (0, 1)]
    assert last[0] == plan.batch(1).tolist()
    assert last[1] == [EMPTY_BLOCK]
    dataset = BlockDataset(TokenStream(*store_of([40])), 8)
    assert (dataset[EMPTY_BLOCK]["labels"] == IGNORED).all()


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
def test_shares_that_do_not_fit_are_named_with_the_cure(batch_size, shares, processes, message):
    with pytest.raises(UserError, match=message):
        divide_batch(batch_size, shares, processes)


@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=30), fraction=st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=60)
def test_a_split_parts_the_documents_without_loss_or_overlap(lengths, fraction):
    tokens, documents = store_of(lengths)
    train, held_out = split_documents(tokens, documents, fraction, seed=1)
    assert held_out.num_documents == min(max(1, round(fraction * len(lengths))), len(lengths) - 1)
    read = [stream.read(0, stream.num_tokens)[0] for stream in (train, held_out)]
    assert sorted(np.concatenate(read)) == list(tokens)
    begin_train = train.read(0, train.num_tokens)[1]
    assert all(int(read[0][b]) in documents for b in begin_train), "documents stay whole"


def test_a_stream_reads_any_range_as_it_reads_the_whole():
    tokens, documents = store_of([5, 1, 4, 10, 5, 6, 3])
    stream, _ = split_documents(tokens, documents, 0.3, seed=0)
    whole, beginnings = stream.read(0, stream.num_tokens)
    for start in range(stream.num_tokens):
        for stop in range(start + 1, stream.num_tokens + 1):
            part, part_beginnings = stream.read(start, stop)
            assert np.array_equal(part, whole[start:stop])
            assert np.array_equal(part_beginnings + start, beginnings[(beginnings >= start) & (beginnings < stop)])


def test_only_the_last_partial_block_is_dropped_in_training_and_nothing_in_evaluation():
    stream = TokenStream(*store_of([10, 10]))
    train, evaluation = BlockDataset(stream, 8), BlockDataset(stream, 8, keep_tail=True)
    assert torch.cat([train[i]["input_ids"] for i in range(len(train))]).tolist() == list(range(16))
    labels = torch.cat([evaluation[i]["labels"] for i in range(len(evaluation))])
    assert labels[labels != IGNORED].tolist() == list(range(20))


def test_positions_begin_anew_with_each_document():
    dataset = BlockDataset(TokenStream(*store_of([5, 1, 4, 10])), 8, mask_documents=True)
    assert dataset[0]["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 0, 1]
    assert dataset[0]["labels"].tolist() == [IGNORED, 1, 2, 3, 4, IGNORED, IGNORED, 7]
    assert dataset[1]["position_ids"].tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert dataset.num_targets(np.array([0, 1])) == 5 + 6


def test_too_little_text_for_one_block_is_named():
    with pytest.raises(UserError, match=r"has 5 tokens .* --sequence-length 8"):
        BlockDataset(TokenStream(*store_of([5])), 8)
