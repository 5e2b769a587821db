"""A pseudo-random permutation of any length, in constant memory."""

from math import ceil

import numpy as np

FEISTEL_ROUNDS = 6


def permute(positions: np.ndarray, length: int, key: int) -> np.ndarray:
    """Maps positions to their places in a pseudo-random permutation of range(length).

    A Feistel network over the next even power of two, repeated until the value is inside the range ("cycle walking":
    Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The round function is splitmix64's finalizer.

    Args:
        positions: [n] integers in range(length).
        length: size of the permuted range.
        key: selects the permutation.

    Returns:
        [n] int64 in range(length); different positions have different places.
    """
    half_bits = max(1, ceil(max(length - 1, 1).bit_length() / 2))
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)
    values = np.asarray(positions, np.uint64).copy()
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> shift, values[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        values[outside] = (left << shift) | right
        outside = values >= length
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
