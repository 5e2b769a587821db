"""The pseudo-random permutation that orders an epoch."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_lib.data.permutation import permute


@given(length=st.integers(1, 3000), key=st.integers(0, 2**70))
@settings(deadline=None, max_examples=60)
def test_a_permutation_takes_every_place_once(length, key):
    assert np.array_equal(np.sort(permute(np.arange(length), length, key)), np.arange(length))


def test_a_permutation_looks_random():
    """A shuffle of 10,000 has no more fixed points, and no more correlation with the order, than by chance."""
    shuffled = permute(np.arange(10_000), 10_000, 1)
    assert (shuffled == np.arange(10_000)).sum() < 8
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(np.arange(10_000), shuffled)[0, 1]) < 0.04
    assert not np.array_equal(shuffled, permute(np.arange(10_000), 10_000, 2))
