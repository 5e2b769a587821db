"""Each sample is committed exactly once, whatever the peers do."""

import itertools
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_lib.elastic.ledger import Ledger
from forge_lib.elastic.meeting import to_ranges
from forge_lib.elastic.pace import plan_round


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 5), st.integers(0, 1 << 32))
def test_every_sample_is_given_out_until_it_is_committed_once(total, batch_size, seed):
    """In each round a random number of peers computes; each one commits a random number of its steps, or is lost."""
    ledger, seen, random = Ledger(total), np.zeros(total, int), Random(seed)
    for _ in range(10_000):
        if ledger.is_complete:
            break
        num_peers, committed = random.randint(1, 4), []
        given_out = [ledger.samples_of(index, num_peers, 3, batch_size) for index in range(num_peers)]
        flat = np.concatenate([each for steps in given_out for each in steps])
        assert len(np.unique(flat)) == len(flat), "no two peers have the same sample"
        for index, steps in enumerate(given_out):
            done = random.randint(0, 3)
            again = ledger.samples_of(index, num_peers, done, batch_size)
            assert all(np.array_equal(a, b) for a, b in zip(again, steps, strict=False)), "also for fewer steps"
            committed += again
        samples = np.sort(np.concatenate([*committed, np.arange(0)]))
        ledger.commit(to_ranges(samples))
        seen[samples] += 1
        assert ledger.num_committed == seen.sum()
        ranges = [sample for start, stop in to_ranges(samples) for sample in range(start, stop)]
        assert ranges == samples.tolist()
    assert (seen == 1).all() and ledger.committed == []


def test_equal_peers_take_turns_as_in_one_run():
    """Two peers with three steps of two samples: step 0 of both are the samples 0 to 3, and so on."""
    ledger = Ledger(100)
    first, second = (ledger.samples_of(index, 2, 3, 2) for index in (0, 1))
    assert [each.tolist() for each in first] == [[0, 1], [4, 5], [8, 9]]
    assert [each.tolist() for each in second] == [[2, 3], [6, 7], [10, 11]]


def test_what_a_slow_peer_has_left_out_is_given_out_first():
    ledger = Ledger(100)
    ledger.commit([[0, 2], [4, 6], [8, 10], [2, 4]])
    assert (ledger.first_open, ledger.committed) == (6, [[8, 10]])
    assert ledger.samples_of(0, 1, 2, 2)[0].tolist() == [6, 7]
    assert ledger.samples_of(0, 1, 2, 2)[1].tolist() == [10, 11]


def test_peers_compute_for_the_same_time_and_make_the_wanted_steps_on_average():
    pace = plan_round([0.1, 0.3], exchange_seconds=0.5, sync_every=20)
    assert pace.steps == [30, 10] and pace.seconds == pytest.approx(3.0)


@pytest.mark.parametrize(("exchange", "steps"), [(0.01, 10), (1.0, 50), (20.0, 100)])
def test_without_a_wanted_number_a_round_is_much_longer_than_its_exchange(exchange, steps):
    """25 times as long, between 10 and 100 steps."""
    assert plan_round([0.5, 0.5], exchange, 0).steps == [steps, steps]


def test_the_first_round_is_short():
    assert plan_round([0.0, 0.0], 0.0, 50).steps == [2, 2]


def test_a_peer_whose_speed_is_not_known_is_planned_like_the_slowest_of_the_others():
    assert plan_round([0.1, 0.0], 0.5, 20).steps == [20, 20]
    assert plan_round([0.1, 0.0, 0.3], 0.5, 20).steps == [30, 10, 10]


def test_a_peer_alone_makes_rounds_between_which_another_one_can_catch_up():
    assert plan_round([0.1], 0.0, 0).steps == [10]
    assert plan_round([0.1, 0.1], 0.0, 0).steps == [2, 2], "these exchange at once"


def test_a_round_lasts_until_a_peer_that_catches_up_can_have_some_updates():
    """At 0.1 s per step, four updates of 5 s each are 200 steps, whatever --sync-every says."""
    for sync_every, num_peers in itertools.product((0, 20), (1, 2)):
        steps = plan_round([0.1] * num_peers, 0.01, sync_every, update_seconds=5.0).steps
        assert steps == [200] * num_peers
    assert plan_round([0.1], 0.0, 300, update_seconds=5.0).steps == [300]
    assert plan_round([0.1], 0.0, 0, update_seconds=1e6).steps == [6000], "but at most ten minutes"
