"""A token store as a stream of tokens, and its blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_lib.config import IGNORED_LABEL
from forge_lib.data.blocks import EMPTY_BLOCK, BlockDataset, TokenStream, split_documents
from forge_lib.errors import UserError


def make_store(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens and documents of a store whose token i is i, with documents of these lengths."""
    documents = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
    return np.arange(int(documents[-1]), dtype=np.uint16), documents


@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=30), fraction=st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=60)
def test_a_split_divides_the_documents_without_loss_or_overlap(lengths, fraction):
    tokens, documents = make_store(lengths)
    train, held_out = split_documents(tokens, documents, fraction, seed=1)
    assert held_out.num_documents == min(max(1, round(fraction * len(lengths))), len(lengths) - 1)
    read = [stream.read(0, stream.num_tokens)[0] for stream in (train, held_out)]
    assert sorted(np.concatenate(read)) == list(tokens)
    train_starts = train.read(0, train.num_tokens)[1]
    assert all(int(read[0][start]) in documents for start in train_starts), "documents stay whole"


def test_a_stream_reads_any_range_as_it_reads_the_whole():
    tokens, documents = make_store([5, 1, 4, 10, 5, 6, 3])
    stream, _ = split_documents(tokens, documents, 0.3, seed=0)
    whole, whole_starts = stream.read(0, stream.num_tokens)
    for start in range(stream.num_tokens):
        for stop in range(start + 1, stream.num_tokens + 1):
            part, part_starts = stream.read(start, stop)
            assert np.array_equal(part, whole[start:stop])
            assert np.array_equal(part_starts + start, whole_starts[(whole_starts >= start) & (whole_starts < stop)])


def test_training_drops_only_the_last_partial_block_and_evaluation_drops_nothing():
    stream = TokenStream(*make_store([10, 10]))
    train, evaluation = BlockDataset(stream, 8), BlockDataset(stream, 8, keep_tail=True)
    assert torch.cat([train[i]["input_ids"] for i in range(len(train))]).tolist() == list(range(16))
    labels = torch.cat([evaluation[i]["labels"] for i in range(len(evaluation))])
    assert labels[labels != IGNORED_LABEL].tolist() == list(range(20))


def test_positions_restart_at_each_document():
    dataset = BlockDataset(TokenStream(*make_store([5, 1, 4, 10])), 8, mask_documents=True)
    assert dataset[0]["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 0, 1]
    assert dataset[0]["labels"].tolist() == [IGNORED_LABEL, 1, 2, 3, 4, IGNORED_LABEL, IGNORED_LABEL, 7]
    assert dataset[1]["position_ids"].tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert dataset.num_targets(np.array([0, 1])) == 5 + 6


class Unreadable:
    """Stands for a store's tokens, and fails if any of them is read."""

    def __getitem__(self, index):
        raise AssertionError("tokens were read")


@given(
    lengths=st.lists(st.integers(0, 9), min_size=2, max_size=30).filter(any),
    sequence_length=st.integers(2, 12),
    mask_documents=st.booleans(),
    fraction=st.sampled_from([0.0, 0.2, 0.5, 0.8]),
    data=st.data(),
)
@settings(deadline=None, max_examples=200)
def test_the_number_of_targets_is_that_of_the_labels_without_reading_a_token(
    lengths, sequence_length, mask_documents, fraction, data
):
    """This includes empty documents, which repeat an offset, and streams of several runs."""
    tokens, documents = make_store(lengths)

    def make_streams(tokens) -> list[TokenStream]:
        if fraction:
            return list(split_documents(tokens, documents, fraction, seed=1))
        return [TokenStream(tokens, documents)]

    for readable, unreadable in zip(make_streams(tokens), make_streams(Unreadable()), strict=True):
        if not readable.num_tokens:
            continue
        options = {"sequence_length": sequence_length, "mask_documents": mask_documents, "keep_tail": True}
        items, counted = BlockDataset(readable, **options), BlockDataset(unreadable, **options)
        indices = data.draw(st.lists(st.integers(0, len(items) - 1), max_size=5))
        expected = sum(int((items[index]["labels"][1:] != IGNORED_LABEL).sum()) for index in indices)
        assert counted.num_targets(np.array(indices, np.int64)) == expected


def test_the_empty_block_has_no_targets():
    dataset = BlockDataset(TokenStream(*make_store([40])), 8)
    assert (dataset[EMPTY_BLOCK]["labels"] == IGNORED_LABEL).all()


def test_too_little_text_for_one_block_is_reported():
    with pytest.raises(UserError, match=r"has 5 tokens .* --sequence-length 8"):
        BlockDataset(TokenStream(*make_store([5])), 8)
