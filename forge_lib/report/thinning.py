"""Fewer points for a plot, without losing an extreme."""

import itertools

import numpy as np

MAX_POINTS = 1200  # of a curve: two for each of 600 columns of pixels


def thin(x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Returns the points of a curve, at most `max_points`: of each of equal parts, the lowest and the highest one.

    Args:
        x, y: [n] float64, in the order of x; points without a number are left out.
        max_points: even.
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= max_points:
        return x, y
    edges = np.linspace(0, len(x), max_points // 2 + 1).astype(int)
    kept = [np.array([0, len(x) - 1])]
    for start, stop in itertools.pairwise(edges):
        part = y[start:stop]
        kept.append(start + np.array([part.argmin(), part.argmax()]))
    kept = np.unique(np.concatenate(kept))
    return x[kept], y[kept]


def smooth(y: np.ndarray, num_points: int) -> np.ndarray:
    """Returns the mean of each point and those around it, over `num_points` in all; [n] float64 without nan."""
    if num_points < 2 or len(y) < num_points:
        return y
    sums = np.cumsum(np.concatenate([[0.0], y]))
    half = num_points // 2
    start = np.maximum(0, np.arange(len(y)) - half)
    stop = np.minimum(len(y), np.arange(len(y)) + half + 1)
    return (sums[stop] - sums[start]) / (stop - start)
