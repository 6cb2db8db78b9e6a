"""The aggregation functions: what they keep of events, how that merges, what they answer.

An aggregation keeps one or more states (`heliostat.features.states`), and `Aggregation.finalize`
turns merged states into the feature's value.

Null, NaN and ±Inf inputs are skipped. `Count` and `Sum` of nothing are 0; every other
function of nothing is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.clock import (
    US_PER_DAY,
    US_PER_HOUR,
    US_PER_MINUTE,
    US_PER_S,
    format_duration,
    parse_duration_us,
)
from heliostat.errors import InvalidDefinitionError, WindowError
from heliostat.features.inputs import (
    Categories,
    ColumnLike,
    FloatArray,
    Input,
    InputValues,
    check_input,
    evaluate,
    text_of,
)
from heliostat.features.moments import deviation
from heliostat.features.sketches import Bins
from heliostat.features.states import IDENTITY, MOST_MEMBERS, State
from heliostat.features.windows import check_window, default_hop_us, ring_slots

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


@dataclass(frozen=True, eq=False)
class Aggregation:
    """Base of all aggregation functions.

    Args:
        column: Column name or `pyarrow.compute` expression of numbers or booleans.
        window: Length such as ``"30d"``; None means lifetime.
        windows: Several lengths at once: a view makes a feature of each, ``spend`` over
            ``("7d", "30d")`` becomes ``spend_7d`` and ``spend_30d``.
        where: Only events that meet this `pyarrow.compute` expression count.
        description: One line for the registry.
    """

    column: ColumnLike | None = None
    window: str | None = field(default=None, kw_only=True)
    windows: Sequence[str] | None = field(default=None, kw_only=True, repr=False)
    where: pc.Expression | None = field(default=None, kw_only=True)
    description: str = field(default="", kw_only=True)
    hop_us: int | None = field(default=None, kw_only=True, repr=False)

    needs_column: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.needs_column and self.column is None:
            raise InvalidDefinitionError(
                self.function,
                "it needs a column or an expression",
                f'write {self.function}("amount", window="30d")',
            )
        if self.column is not None and not isinstance(self.column, str | pc.Expression):
            raise InvalidDefinitionError(
                self.function,
                f"{self.column!r} is no column",
                "give a column name or a pyarrow.compute expression",
            )
        if self.where is not None and not isinstance(self.where, pc.Expression):
            raise InvalidDefinitionError(
                self.function,
                f"where={self.where!r} is no expression",
                'write one such as pyarrow.compute.field("type") == "purchase"',
            )
        if self.windows is not None:
            self._check_windows(self.windows)
        if self.window is not None:
            parse_duration_us(self.window)

    def _check_windows(self, windows: Sequence[str]) -> None:
        if self.window is not None:
            raise WindowError(f"{self.function} has a window and windows", "give one of them")
        if isinstance(windows, str) or not windows:
            raise WindowError(
                f"{self.function} has windows={windows!r}, which is no list", 'write windows=("7d", "30d")'
            )
        for each in windows:
            parse_duration_us(each)

    @property
    def function(self) -> str:
        """The function's name: ``Count``."""
        return type(self).__name__

    @property
    def window_us(self) -> int | None:
        """The window's length in microseconds; None means lifetime."""
        return None if self.window is None else parse_duration_us(self.window)

    takes_texts: ClassVar[bool] = False
    """Whether its column may hold texts; the feature is a category then (`heliostat.schema.text_codes`)."""

    @property
    def input(self) -> Input:
        """What it looks at."""
        return Input(self.column, self.where, texts=self.takes_texts)

    def named(self, name: str) -> Iterator[tuple[str, Self]]:
        """The features that one declaration stands for: itself, or one for each of its windows.

        Args:
            name: The declared name; the window is appended to it where there are several.
        """
        if self.windows is None:
            yield name, self
            return
        for window in self.windows:
            yield f"{name}_{''.join(window.split())}", replace(self, window=window, windows=None)

    def bound(self, *, where: pc.Expression | None, hop_us: int | None, at: str) -> Self:
        """The same aggregation inside a view: with the view's condition and hop.

        Args:
            where: The view's own condition, joined by *and*.
            hop_us: The view's hop, or None for the one that follows from the window.
            at: How messages name the place.

        Raises:
            WindowError: If the window doesn't fit the hop.
        """
        condition = self.where if where is None else where if self.where is None else where & self.where
        window_us = self.window_us
        if window_us is None:
            return replace(self, where=condition, hop_us=US_PER_DAY)
        hop = self._hop_us(window_us, hop_us)
        check_window(window_us, hop, where=at)
        return replace(self, where=condition, hop_us=hop)

    def _hop_us(self, window_us: int, hop_us: int | None) -> int:
        return hop_us or default_hop_us(window_us)

    def states(self) -> tuple[State, ...]:
        """What it keeps of events."""
        raise NotImplementedError

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:
        """The feature's value from merged states.

        Args:
            parts: One array a state, in the order of `states`: shape ``(n,)``, or ``(n, 3)`` for
                ``first`` and ``last`` (event time, tie, value).
            as_of_us: Query instant, for all or for each, microseconds.

        Returns:
            Shape ``(n,)``; NaN where the function of nothing is null.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """A JSON document with all that the value depends on."""
        hop = {} if self.hop_us is None or self.window is None else {"hop": format_duration(self.hop_us)}
        window = None if self.window_us is None else format_duration(self.window_us)
        return {
            "function": self.function,
            "column": text_of(self.column),
            "where": text_of(self.where),
            "window": window,
            **hop,
        }


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
        mean: FloatArray = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
        return mean


class Min(Aggregation):
    """Smallest value of a column."""

    def states(self) -> tuple[State, ...]:
        return (State("min", "value", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return np.where(np.isposinf(parts[0]), np.nan, parts[0])


class Max(Aggregation):
    """Largest value of a column."""

    def states(self) -> tuple[State, ...]:
        return (State("max", "value", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return np.where(np.isneginf(parts[0]), np.nan, parts[0])


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

    def states(self) -> tuple[State, ...]:
        return (State("max", "time", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:
        latest = np.where(np.isneginf(parts[0]), np.nan, parts[0])
        return (np.asarray(as_of_us, dtype=np.float64) - latest) / _UNITS_US[self.unit]

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
