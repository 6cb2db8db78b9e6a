"""The aggregation functions: what they keep of events, how that merges, what they answer.

An aggregation keeps one or more states (`heliostat.features.states`), and `Aggregation.finalize`
turns merged states into the feature's value.

Null, NaN and ±Inf inputs are skipped. `Count` and `Sum` of nothing are 0; every other
function of nothing is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.clock import (
    US_PER_DAY,
    US_PER_HOUR,
    US_PER_MINUTE,
    US_PER_S,
)
from heliostat.errors import InvalidDefinitionError, WindowError
from heliostat.features.aggregate import Aggregation
from heliostat.features.inputs import (
    Categories,
    ColumnLike,
    FloatArray,
    Input,
    InputValues,
    check_input,
    evaluate,
)
from heliostat.features.moments import deviation
from heliostat.features.sketches import Bins
from heliostat.features.states import IDENTITY, MOST_MEMBERS, State
from heliostat.features.windows import ring_slots

__all__ = [
    "FUNCTIONS",
    "IDENTITY",
    "Aggregation",
    "ColumnLike",
    "Count",
    "CountDistinct",
    "DistinctDays",
    "First",
    "FloatArray",
    "Input",
    "InputValues",
    "Last",
    "Latest",
    "Max",
    "Mean",
    "Min",
    "Quantile",
    "State",
    "StdDev",
    "Sum",
    "TimeSinceLast",
    "check_input",
    "evaluate",
]

_UNITS_US = {"second": US_PER_S, "minute": US_PER_MINUTE, "hour": US_PER_HOUR, "day": US_PER_DAY}


class Count(Aggregation):
    """Number of events; of a column, number of its usable values."""

    needs_column = False

    def states(self) -> tuple[State, ...]:
        return (State("add", "one", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return parts[0]


class Sum(Aggregation):
    """Sum of a column; 0 of nothing."""

    def states(self) -> tuple[State, ...]:
        return (State("add", "value", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return parts[0]


class Mean(Aggregation):
    """Arithmetic mean of a column."""

    def states(self) -> tuple[State, ...]:
        return State("add", "value", self.input), State("add", "one", self.input)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        total, count = parts
        mean: FloatArray = total / np.where(count > 0, count, np.nan)
        return mean


class Min(Aggregation):
    """Smallest value of a column."""

    def states(self) -> tuple[State, ...]:
        return (State("min", "value", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return np.where(parts[0] == np.inf, np.nan, parts[0])


class Max(Aggregation):
    """Largest value of a column."""

    def states(self) -> tuple[State, ...]:
        return (State("max", "value", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return np.where(parts[0] == -np.inf, np.nan, parts[0])


class First(Aggregation):
    """Value of the earliest event; among equal times, of the smaller tie."""

    takes_texts = True

    def states(self) -> tuple[State, ...]:
        return (State("first", "value", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return np.where(np.isfinite(parts[0][:, 0]), parts[0][:, 2], np.nan)


class Last(Aggregation):
    """Value of the latest event; among equal times, of the larger tie."""

    takes_texts = True

    def states(self) -> tuple[State, ...]:
        return (State("last", "value", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return np.where(np.isfinite(parts[0][:, 0]), parts[0][:, 2], np.nan)


class Latest(Aggregation):
    """Value of the latest event, null if that one has none: what a record says now.

    `Last` skips events without a value; here nothing but the newest event counts. Made for
    sources whose rows replace each other (`heliostat.features.sources.ProfileSource`).
    """

    takes_texts = True

    @property
    def input(self) -> Input:
        return Input(self.column, self.where, nulls=True, texts=True)

    def states(self) -> tuple[State, ...]:
        return (State("last", "value", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return np.where(np.isfinite(parts[0][:, 0]), parts[0][:, 2], np.nan)


class DistinctDays(Aggregation):
    """Number of UTC days with at least one event.

    Its hop is always one day: a day is present in its tile or it isn't.
    """

    needs_column = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is None and self.windows is None:
            raise WindowError(
                "DistinctDays has no window",
                'give one: a lifetime of days has no bounded state, write window="365d"',
            )

    def _hop_us(self, window_us: int, hop_us: int | None) -> int:  # noqa: ARG002 - a day is the unit it counts
        return US_PER_DAY

    def states(self) -> tuple[State, ...]:
        return (State("max", "one", self.input, across="add"),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return np.where(parts[0] > 0, parts[0], np.nan)


@dataclass(frozen=True, eq=False)
class TimeSinceLast(Aggregation):
    """Time from the latest event to the query instant.

    Args:
        unit: ``"second"``, ``"minute"``, ``"hour"`` or ``"day"``.
    """

    unit: Literal["second", "minute", "hour", "day"] = field(default="day", kw_only=True)

    needs_column = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in _UNITS_US:
            raise InvalidDefinitionError(
                "TimeSinceLast", f"unit {self.unit!r} is unknown", f"use {', '.join(_UNITS_US)}"
            )

    @property
    def unit_us(self) -> int:
        """The unit's length, microseconds."""
        return _UNITS_US[self.unit]

    def states(self) -> tuple[State, ...]:
        return (State("max", "time", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:
        latest = np.where(parts[0] == -np.inf, np.nan, parts[0])
        return (np.float64(as_of_us) - latest) / float(self.unit_us)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "unit": self.unit}


class StdDev(Aggregation):
    """Sample standard deviation of a column (divided by n − 1); null of fewer than two values.

    Kept as count, mean and squared deviations, which merge without cancellation
    (`heliostat.features.moments`): at most 1e-12 of the values' root mean square away from the exact
    one, and exactly 0 of equal values. A spread beyond 1e154 has no square: it is infinite or null.
    """

    def states(self) -> tuple[State, ...]:
        return (State("moments", "value", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return deviation(parts[0])


@dataclass(frozen=True, eq=False)
class CountDistinct(Aggregation):
    """Number of different categories among a column's values; null if there are none.

    A value that isn't one of the categories is skipped, as a null is: it is no event of this feature.
    The state is a set of bits in one number, which is why the categories are declared, and at most 52.

    Args:
        categories: The values that count: texts or integers. Their order means nothing.
    """

    categories: Sequence[str] | Sequence[int] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = () if isinstance(self.categories, str) else tuple(self.categories)
        kinds = {type(each) for each in given}
        if kinds not in ({str}, {int}):
            raise InvalidDefinitionError(
                self.function,
                f"categories={self.categories!r} is no list of texts or integers",
                'write categories=("visit", "purchase")',
            )
        if len(set(given)) < len(given):
            raise InvalidDefinitionError(self.function, "a category is there twice", "name each once")
        if len(given) > MOST_MEMBERS:
            raise InvalidDefinitionError(
                self.function,
                f"{len(given)} categories are too many: {MOST_MEMBERS} bits are exact in a number",
                "name the most frequent ones, or group them by an expression",
            )

    @property
    def input(self) -> Input:
        categories: Categories = tuple(sorted(self.categories))  # type: ignore[assignment]
        return Input(self.column, self.where, categories=categories)

    def states(self) -> tuple[State, ...]:
        return (State("or", "value", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        members = np.bitwise_count(parts[0].astype(np.int64))
        return np.where(members > 0, members, np.nan)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "categories": list(self.input.categories)}


@dataclass(frozen=True, eq=False)
class Quantile(Aggregation):
    """A quantile of a column, within a relative error; null of nothing.

    Of ``n`` values in ascending order it is the one with ``⌊q · (n − 1)⌋`` before it. Values are
    counted in bins (`heliostat.features.sketches`), and the answer stands for all values of its bin:
    if the exact one's magnitude is inside ``between``, at most ``relative_error`` of it away. Smaller
    magnitudes count as 0, larger ones as the largest bin.

    Args:
        q: From 0 to 1; 0.5 is the median.
        between: Smallest and largest magnitude that matter, both above zero.
        relative_error: A smaller error and a wider range take more bins, so more bytes an entity.
        signed: Whether values below zero have bins as well, which doubles them; otherwise they count as 0.
    """

    q: float = field(kw_only=True)
    between: tuple[float, float] = field(kw_only=True)
    relative_error: float = field(default=0.05, kw_only=True)
    signed: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.q <= 1:
            raise InvalidDefinitionError(
                self.function, f"q={self.q!r} is no share", "give one from 0 to 1, such as 0.95"
            )
        if len(self.between) != 2:
            raise InvalidDefinitionError(
                self.function, f"between={self.between!r} is no range", "write between=(0.01, 10_000)"
            )
        self.bins.check_tile()

    @cached_property
    def bins(self) -> Bins:
        """The bins that it counts in."""
        low, high = self.between
        return Bins(float(self.relative_error), float(low), float(high), self.signed)

    def bound(self, *, where: pc.Expression | None, hop_us: int | None, at: str) -> Self:
        bound = super().bound(where=where, hop_us=hop_us, at=at)
        if bound.window_us is not None and bound.hop_us is not None:
            self.bins.check_ring(ring_slots(bound.window_us, bound.hop_us), at=at)
        return bound

    def states(self) -> tuple[State, ...]:
        return (State("add", "value", self.input, bins=self.bins),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return self.bins.quantile(parts[0], self.q)

    def describe(self) -> dict[str, Any]:
        bins = self.bins
        between = [bins.low, bins.high]
        return {
            **super().describe(),
            "q": float(self.q),
            "between": between,
            "relative_error": bins.relative_error,
            "signed": bins.signed,
        }


FUNCTIONS: tuple[type[Aggregation], ...] = (
    Count, Sum, Mean, StdDev, Min, Max, Quantile, First, Last, Latest, DistinctDays, CountDistinct, TimeSinceLast,
)  # fmt: skip
