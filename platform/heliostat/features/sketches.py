"""Bins whose counts answer quantiles within a relative error. Arrays only.

Each bin reaches from an edge to that edge times (1 + e) / (1 − e); its value is at most the share
``e`` away from every number in it. Counts of bins add up in any order, so a quantile of many tiles
is as good as one of all their numbers together.

Source: Masson, Rim, Lee 2019, "DDSketch: a fast and fully-mergeable quantile sketch"; here between
two magnitudes declared beforehand, so that the number of bins is fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import InvalidDefinitionError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_MOST_BINS = 1024
_MOST_RING_BYTES = 256 * 1024
_SMALLER = "allow a larger relative_error, bring the ends of between closer together, or give signed=False"


@dataclass(frozen=True)
class Bins:
    """The bins of one sketch, in ascending order of their values.

    Attributes:
        relative_error: Between 0 and 1: the ``e`` above.
        low: Smaller magnitudes count as 0.
        high: Larger magnitudes count as this one.
        signed: Whether negative numbers have bins, mirrored; otherwise they count as 0.
    """

    relative_error: float
    low: float
    high: float
    signed: bool

    def __post_init__(self) -> None:
        if not 0 < self.relative_error < 1:
            raise InvalidDefinitionError(
                "Quantile", f"relative_error={self.relative_error!r} is no share", "give one such as 0.05"
            )
        if not 0 < self.low < self.high < math.inf:
            raise InvalidDefinitionError(
                "Quantile",
                f"between=({self.low!r}, {self.high!r}) are no two magnitudes",
                "give the smallest and the largest that matter, above zero, such as between=(0.01, 10_000)",
            )

    def check_tile(self) -> None:
        """Refuse a tile that nobody wants to update.

        Raises:
            InvalidDefinitionError: If it takes too many bins.
        """
        if self.width > _MOST_BINS:
            raise InvalidDefinitionError(
                "Quantile", f"it needs {self.width} bins a tile, and {_MOST_BINS} are the most", _SMALLER
            )

    def check_ring(self, n_slots: int, *, at: str) -> None:
        """Refuse a ring that nobody wants to read.

        Args:
            n_slots: How many tiles a window needs.
            at: How the message names the place.

        Raises:
            InvalidDefinitionError: If they take too many bytes an entity.
        """
        size = 8 * self.width * n_slots
        if size > _MOST_RING_BYTES:
            raise InvalidDefinitionError(
                at,
                f"{n_slots} tiles of {self.width} bins are {size // 1024} KiB an entity, and"
                f" {_MOST_RING_BYTES // 1024} are the most",
                f"{_SMALLER}; or set a longer hop or a shorter window, which is fewer tiles",
            )

    @cached_property
    def ratio(self) -> float:
        """From a bin's lower edge to its upper one."""
        return (1.0 + self.relative_error) / (1.0 - self.relative_error)

    @cached_property
    def n_magnitudes(self) -> int:
        """Bins above zero."""
        return max(1, math.ceil((math.log(self.high) - math.log(self.low)) / math.log(self.ratio)))

    @property
    def width(self) -> int:
        """All bins: those below zero if there are any, zero, those above."""
        return (2 if self.signed else 1) * self.n_magnitudes + 1

    @property
    def _zero(self) -> int:
        return self.n_magnitudes if self.signed else 0

    @cached_property
    def edges(self) -> FloatArray:
        """Lower edges of the bins above zero, inclusive, shape ``(n_magnitudes,)``."""
        return np.array([self.low * self.ratio**number for number in range(self.n_magnitudes)])

    @cached_property
    def values(self) -> FloatArray:
        """What each bin stands for, shape ``(width,)``: as far from its lower edge as from its upper one."""
        above = self.edges * (2.0 * self.ratio / (self.ratio + 1.0))
        below = -above[::-1] if self.signed else np.empty(0)
        return np.concatenate([below, [0.0], above])

    def of(self, numbers: FloatArray) -> IntArray:
        """The bin of each finite number, shape ``(n,)``."""
        magnitude = np.searchsorted(self.edges, np.abs(numbers), side="right")
        if self.signed:
            return self._zero + np.where(numbers < 0, -magnitude, magnitude)
        return np.where(numbers < 0, 0, magnitude)

    def quantile(self, counts: FloatArray, q: float) -> FloatArray:
        """The value of the bin that holds a quantile.

        Args:
            counts: Shape ``(n, width)``.
            q: Which quantile.

        Returns:
            Shape ``(n,)``; NaN of nothing.
        """
        upto = counts.cumsum(axis=1)
        total = upto[:, -1]
        found = (upto > rank(total, q)[:, None]).argmax(axis=1)
        return np.where(total > 0, self.values[found], np.nan)

    @property
    def key(self) -> str:
        """Equal for bins that are the same."""
        return f"bins {self.relative_error!r} {self.low!r} {self.high!r} {'signed' if self.signed else 'unsigned'}"


def rank(total: FloatArray, q: float) -> FloatArray:
    """Which of so many numbers in ascending order is the quantile, counted from 0: ``⌊q · (n − 1)⌋``."""
    return np.floor(q * np.maximum(total - 1.0, 0.0))
