"""The aggregation functions: what they keep of events, how that merges, what they answer.

An aggregation keeps one or more states. A `State` is a partial result that merges with
another of its kind in any order, so that tiles can be added up offline, inside the online
server and at read time, with the same outcome. `Aggregation.finalize` turns merged states
into the feature's value.

Null, NaN and ±Inf inputs are skipped. `Count` and `Sum` of nothing are 0; every other
function of nothing is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import acero

from heliostat.clock import (
    US_PER_DAY,
    US_PER_HOUR,
    US_PER_MINUTE,
    US_PER_S,
    format_duration,
    parse_duration_us,
)
from heliostat.errors import ExpressionError, InvalidDefinitionError, UnknownColumnError, WindowError
from heliostat.features.windows import check_window, default_hop_us

FloatArray = NDArray[np.float64]
ColumnLike: TypeAlias = str | pc.Expression
Operator = Literal["add", "min", "max", "first", "last"]
StateInput = Literal["one", "value", "time"]

IDENTITY: Mapping[str, float] = {"add": 0.0, "min": np.inf, "max": -np.inf, "first": np.inf, "last": -np.inf}
"""What an empty state holds; of ``first`` and ``last`` it is the time's, their tie and value are 0."""

_UNITS_US = {"second": US_PER_S, "minute": US_PER_MINUTE, "hour": US_PER_HOUR, "day": US_PER_DAY}


@dataclass(frozen=True, eq=False)
class Input:
    """What an aggregation looks at: a column or expression, and which events count.

    Attributes:
        column: Column name or expression; None means the event itself.
        where: Condition an event must meet (null is not met), or None.
        nulls: Whether an event counts that has no value: then it says "null", instead of nothing.
    """

    column: ColumnLike | None
    where: pc.Expression | None
    nulls: bool = False

    @property
    def key(self) -> str:
        """Equal for inputs that mean the same."""
        return f"{_text(self.column)} | {_text(self.where)}" + (" | nulls" if self.nulls else "")


@dataclass(frozen=True, eq=False)
class State:
    """One mergeable partial result.

    Attributes:
        op: How two partials of the same tile merge.
        of: What an event contributes: 1, the input's value, or its event time in microseconds.
        source: The column and condition behind it.
        across: How partials of different tiles merge; the same as ``op`` except for `DistinctDays`.
    """

    op: Operator
    of: StateInput
    source: Input
    across: Operator | None = None

    @property
    def width(self) -> int:
        """How many f8 columns it takes: ``first`` and ``last`` keep (event time, tie, value)."""
        return 3 if self.op in ("first", "last") else 1

    @property
    def merge_across(self) -> Operator:
        """How partials of different tiles merge."""
        return self.across or self.op

    @property
    def key(self) -> str:
        """Equal for states that two aggregations can share."""
        return f"{self.op}/{self.merge_across} {self.of} {self.source.key}"


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

    @property
    def input(self) -> Input:
        """What it looks at."""
        return Input(self.column, self.where)

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
            "column": _text(self.column),
            "where": _text(self.where),
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

    def states(self) -> tuple[State, ...]:
        return (State("first", "value", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return np.where(np.isfinite(parts[0][:, 0]), parts[0][:, 2], np.nan)


class Last(Aggregation):
    """Value of the latest event; among equal times, of the larger tie."""

    def states(self) -> tuple[State, ...]:
        return (State("last", "value", self.input),)

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:  # noqa: ARG002
        return np.where(np.isfinite(parts[0][:, 0]), parts[0][:, 2], np.nan)


class Latest(Aggregation):
    """Value of the latest event, null if that one has none: what a record says now.

    `Last` skips events without a value; here nothing but the newest event counts. Made for
    sources whose rows replace each other (`heliostat.features.sources.ProfileSource`).
    """

    @property
    def input(self) -> Input:
        return Input(self.column, self.where, nulls=True)

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


FUNCTIONS: tuple[type[Aggregation], ...] = (
    Count, Sum, Mean, Min, Max, First, Last, Latest, DistinctDays, TimeSinceLast,
)  # fmt: skip


@dataclass(frozen=True)
class InputValues:
    """An input, evaluated on a batch of events.

    Attributes:
        values: Shape ``(n,)``; 1.0 where the input is the event itself. Undefined where not used.
        used: Shape ``(n,)``: the condition holds, and the value is finite or `Input.nulls` says it needn't be.
    """

    values: FloatArray
    used: NDArray[np.bool_]


def evaluate(events: pa.Table, inputs: Iterable[Input]) -> dict[str, InputValues]:
    """Evaluate inputs on a batch of events: once each, by `Input.key`.

    Args:
        events: Columns of the source, ``n`` rows.
        inputs: Any; equal keys are evaluated once.

    Returns:
        Arrays of shape ``(n,)`` by input key.

    Raises:
        pyarrow.ArrowInvalid: If an expression names a column that isn't there.
    """
    distinct = {each.key: each for each in inputs}
    expressions: dict[str, pc.Expression] = {}
    for each in distinct.values():
        for part in (each.column, each.where):
            if isinstance(part, pc.Expression):
                expressions.setdefault(str(part), part)
    columns = _project(events, expressions)
    n = events.num_rows
    result: dict[str, InputValues] = {}
    for key, each in distinct.items():
        if each.column is None:
            values, used = np.ones(n), np.ones(n, dtype=np.bool_)
        else:
            name = each.column
            values = _as_float(events.column(name) if isinstance(name, str) else columns[str(name)])
            used = np.isfinite(values)
            if each.nulls:
                values, used = np.where(used, values, np.nan), np.ones(n, dtype=np.bool_)
        if each.where is not None:
            used = used & _as_mask(columns[str(each.where)])
        result[key] = InputValues(values, used)
    return result


def check_input(given: Input, schema: pa.Schema, *, at: str) -> None:
    """Refuse an input that a source can't answer.

    Args:
        given: Column and condition.
        schema: The source's schema.
        at: How the message names the place.

    Raises:
        UnknownColumnError: If it names a column that isn't there.
        ExpressionError: If it gives something other than numbers, or a condition that isn't true or false.
    """
    if isinstance(given.column, str) and given.column not in schema.names:
        raise UnknownColumnError(given.column, at, tuple(schema.names))
    if given.column is not None:
        dtype = (
            schema.field(given.column).type if isinstance(given.column, str) else _result(given.column, schema, at)
        )
        if not (pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_boolean(dtype)):
            raise ExpressionError(str(given.column), at, f"it gives {dtype}, and numbers or booleans are needed")
    if given.where is not None:
        dtype = _result(given.where, schema, at)
        if not pa.types.is_boolean(dtype):
            raise ExpressionError(str(given.where), at, f"a condition gives true or false, this gives {dtype}")


def _result(expression: pc.Expression, schema: pa.Schema, at: str) -> pa.DataType:
    try:
        return _project(schema.empty_table(), {"result": expression})["result"].type
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowKeyError) as error:
        reason = str(error).splitlines()[0]
        known = f"; columns are: {', '.join(schema.names)}"
        raise ExpressionError(str(expression), at, reason + known) from None


def _project(events: pa.Table, expressions: Mapping[str, pc.Expression]) -> dict[str, pa.ChunkedArray]:
    if not expressions:
        return {}
    names = [f"c{position}" for position in range(len(expressions))]
    plan = acero.Declaration.from_sequence(
        [
            acero.Declaration("table_source", acero.TableSourceNodeOptions(events)),
            acero.Declaration("project", acero.ProjectNodeOptions(list(expressions.values()), names)),
        ]
    )
    projected = plan.to_table(use_threads=False)
    return {key: projected.column(name) for key, name in zip(expressions, names, strict=True)}


def _as_float(column: pa.ChunkedArray) -> FloatArray:
    """As float64 with NaN for null."""
    whole = column.combine_chunks()
    if not pa.types.is_floating(whole.type):
        whole = (
            whole.cast(pa.float64(), safe=False) if not pa.types.is_boolean(whole.type) else whole.cast(pa.uint8())
        )
    values: FloatArray = whole.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    return values


def _as_mask(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    filled = pc.fill_null(column, False).combine_chunks()
    mask: NDArray[np.bool_] = filled.to_numpy(zero_copy_only=False).astype(np.bool_, copy=False)
    return mask


def _text(part: ColumnLike | None) -> str | None:
    return None if part is None else part if isinstance(part, str) else f"({part})"
