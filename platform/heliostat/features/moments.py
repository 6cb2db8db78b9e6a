"""Count, mean and squared deviations of numbers: what a standard deviation is kept as. Arrays only.

Two parts merge without going back to the numbers, and without the difference of two large sums of
squares, which would leave nothing of the small spread of large numbers. Equal numbers deviate by
exactly 0, however many there are and in whatever order they merge.

Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def moments_of(values: FloatArray, used: NDArray[np.bool_]) -> FloatArray:
    """Each number by itself.

    Args:
        values: Shape ``(n,)``.
        used: Shape ``(n,)``; the others are no numbers at all.

    Returns:
        Shape ``(n, 3)``: count, mean, sum of squared deviations from it.
    """
    parts = np.zeros((len(values), 3))
    parts[:, 0] = used
    parts[:, 1] = np.where(used, values, 0.0)
    return parts


def merged(one: FloatArray, other: FloatArray) -> FloatArray:
    """Two parts as one, pair by pair; shape ``(n, 3)`` each. The server's script does the same."""
    result = np.empty_like(one)
    count = result[:, 0] = one[:, 0] + other[:, 0]
    share = np.divide(other[:, 0], count, out=np.zeros(len(count)), where=count > 0)
    delta = other[:, 1] - one[:, 1]
    result[:, 1] = one[:, 1] + delta * share
    result[:, 2] = one[:, 2] + other[:, 2] + delta * (delta * (one[:, 0] * share))
    return result


def merged_runs(parts: FloatArray, starts: IntArray) -> FloatArray:
    """Each run of parts as one.

    Args:
        parts: Shape ``(n, 3)``.
        starts: Where runs begin, ascending; the first is 0, and none is empty.

    Returns:
        Shape ``(len(starts), 3)``.
    """
    count, lengths = parts[:, 0], np.diff(np.append(starts, len(parts)))
    some = np.where(count > 0, np.arange(len(parts)), len(parts))
    origin = np.append(parts[:, 1], 0.0)[np.minimum.reduceat(some, starts)]
    total = np.add.reduceat(count, starts)
    offset = np.add.reduceat(count * (parts[:, 1] - np.repeat(origin, lengths)), starts)
    mean = origin + np.divide(offset, total, out=np.zeros(len(starts)), where=total > 0)
    apart = parts[:, 1] - np.repeat(mean, lengths)
    return np.column_stack([total, mean, np.add.reduceat(parts[:, 2] + apart * (count * apart), starts)])


def running(parts: FloatArray, starts: IntArray, ends: IntArray, *, backwards: bool = False) -> FloatArray:
    """Accumulate each stretch of parts from its beginning, or from its end.

    Neighbours merge first, then pairs, then fours: the bits at a place depend on the parts up to
    there and on nothing else, and errors grow with the logarithm of their number.

    Source: Hillis, Steele 1986, "Data parallel algorithms".

    Args:
        parts: Shape ``(n, 3)``.
        starts: Where stretches begin, ascending; the first is 0.
        ends: Where they end.
        backwards: From the end.

    Returns:
        Shape ``(n, 3)``.
    """
    places, lengths = np.arange(len(parts)), ends - starts
    behind = np.repeat(ends, lengths) - 1 - places if backwards else places - np.repeat(starts, lengths)
    result, step = parts.copy(), 1
    active = np.flatnonzero(behind >= step)
    while len(active):
        result[active] = merged(result[active + step if backwards else active - step], result[active])
        step *= 2
        active = active[behind[active] >= step]
    return result


def deviation(parts: FloatArray) -> FloatArray:
    """Sample standard deviation, shape ``(n,)``; NaN of fewer than two numbers."""
    freedom = parts[:, 0] - 1.0
    variance = np.divide(parts[:, 2], freedom, out=np.full(len(parts), np.nan), where=freedom > 0)
    deviations: FloatArray = np.sqrt(variance)
    return deviations
