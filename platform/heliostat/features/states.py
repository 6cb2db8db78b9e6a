"""Partial results: what is kept of events, and how two of a kind become one. Arrays only.

A `State` merges with another of its kind in any order, so that tiles can be added up offline,
inside the online server and at read time, with the same outcome. A partial result is a row of
`State.width` numbers:

- ``add``, ``min``, ``max``: one number; with `Bins`, a count a bin;
- ``or``: a set, as the sum of 2^position of its members, of which there are at most `MOST_MEMBERS`;
- ``first``, ``last``: event time, tie, value;
- ``moments``: count, mean, sum of squared deviations (`heliostat.features.moments`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from heliostat.features import moments
from heliostat.features.inputs import FloatArray, Input, InputValues
from heliostat.features.sketches import Bins

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

Operator = Literal["add", "min", "max", "or", "first", "last", "moments"]
StateInput = Literal["one", "value", "time"]

IDENTITY: Mapping[str, float] = {
    "add": 0.0,
    "min": np.inf,
    "max": -np.inf,
    "or": 0.0,
    "first": np.inf,
    "last": -np.inf,
    "moments": 0.0,
}
"""What the first column of an empty state holds; the others hold 0."""

MOST_MEMBERS = 52
"""A float64 holds the sum of that many different powers of 2 exactly."""

UFUNCS: Mapping[str, np.ufunc] = {"add": np.add, "min": np.minimum, "max": np.maximum}


@dataclass(frozen=True, eq=False)
class State:
    """One mergeable partial result.

    Attributes:
        op: How two partials of the same tile merge.
        of: What an event contributes: 1, the input's value, or its event time in microseconds.
        source: The column and condition behind it.
        across: How partials of different tiles merge; the same as ``op`` except for `DistinctDays`.
        bins: Of ``add``: the value counts in its bin, instead of being added up.
    """

    op: Operator
    of: StateInput
    source: Input
    across: Operator | None = None
    bins: Bins | None = None

    @property
    def width(self) -> int:
        """How many f8 columns it takes."""
        if self.bins is not None:
            return self.bins.width
        return 3 if self.op in ("first", "last", "moments") else 1

    @property
    def merge_across(self) -> Operator:
        """How partials of different tiles merge."""
        return self.across or self.op

    @property
    def key(self) -> str:
        """Equal for states that two aggregations can share."""
        bins = "" if self.bins is None else f" | {self.bins.key}"
        return f"{self.op}/{self.merge_across} {self.of} {self.source.key}{bins}"

    @property
    def empty(self) -> FloatArray:
        """What it holds without events, shape ``(width,)``."""
        row = np.zeros(self.width)
        # A presence (0 or 1) that is added up over tiles must add nothing where there is none.
        row[0] = IDENTITY[self.merge_across]
        return row


def of_events(state: State, given: InputValues, times_us: IntArray, ties: IntArray) -> FloatArray:
    """Each event's part in a state.

    Args:
        state: Any.
        given: What it looks at, evaluated on the events.
        times_us: Event times, shape ``(n,)``.
        ties: What breaks ties, shape ``(n,)``.

    Returns:
        Shape ``(n, width)``; empty where the event isn't used.
    """
    n, used = len(times_us), given.used
    if state.bins is None and state.width == 1:
        return np.where(used, _contribution(state, given, times_us), state.empty[0])[:, None]
    if state.op == "moments":
        return moments.moments_of(given.values + 0.0, used)
    rows = np.tile(state.empty, (n, 1))
    if state.bins is not None:
        rows[np.flatnonzero(used), state.bins.of(given.values[used])] = 1.0
    else:
        rows[used] = np.column_stack([times_us, ties, given.values + 0.0])[used]
    return rows


def _contribution(state: State, given: InputValues, times_us: IntArray) -> FloatArray:
    if state.of == "one":
        return np.ones(len(times_us))
    return times_us.astype(np.float64) if state.of == "time" else given.values + 0.0  # so that -0.0 is 0.0


def of_runs(state: State, given: InputValues, times_us: IntArray, ties: IntArray, starts: IntArray) -> FloatArray:
    """What runs of events add up to, each in order of time.

    Args:
        state: Any.
        given: What it looks at, evaluated on the events.
        times_us: Event times, shape ``(n,)``.
        ties: What breaks ties, shape ``(n,)``.
        starts: Where runs begin, ascending; the first is 0, and none is empty.

    Returns:
        Shape ``(len(starts), width)``.
    """
    if state.bins is None:
        return merged_runs(state, of_events(state, given, times_us, ties), starts)
    # A row of bins for each event would be mostly zeros.
    used, width = given.used, state.width
    runs = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(times_us))))
    places = runs[used] * width + state.bins.of(given.values[used])
    return np.bincount(places, minlength=len(starts) * width).reshape(-1, width).astype(np.float64)


def merged_runs(state: State, rows: FloatArray, starts: IntArray, *, across: bool = False) -> FloatArray:
    """Merge runs of partial results, each in order of time.

    Args:
        state: What the rows are of.
        rows: Shape ``(n, width)``.
        starts: Where runs begin, ascending; the first is 0, and none is empty.
        across: Whether the rows of a run are of different tiles.

    Returns:
        Shape ``(len(starts), width)``.
    """
    if not len(starts):
        return np.empty((0, state.width))
    with np.errstate(over="ignore", invalid="ignore"):
        match state.op:
            case "moments":
                return moments.merged_runs(rows, starts)
            case "or":
                members = np.bitwise_or.reduceat(rows[:, 0].astype(np.int64), starts)
                return members.astype(np.float64)[:, None]
            case "first" | "last":
                return _edge_of_runs(state, rows, starts)
            case _ if state.bins is not None:
                counts: FloatArray = np.add.reduceat(rows, starts, axis=0)
                return counts
            case _:
                operator = state.merge_across if across else state.op
                merged: FloatArray = UFUNCS[operator].reduceat(rows[:, 0], starts)
                return merged[:, None]


def _edge_of_runs(state: State, rows: FloatArray, starts: IntArray) -> FloatArray:
    places, used = np.arange(len(rows)), np.isfinite(rows[:, 0])
    if state.op == "first":
        chosen = np.minimum.reduceat(np.where(used, places, len(rows)), starts)
        found = chosen < len(rows)
    else:
        chosen = np.maximum.reduceat(np.where(used, places, -1), starts)
        found = chosen >= 0
    result = np.tile(state.empty, (len(starts), 1))
    result[found] = rows[chosen[found]]
    return result


def edges_of_runs(state: State, rows: FloatArray, starts: IntArray, counts: IntArray) -> IntArray:
    """Which row of each run is the first or last one, by time and tie; rows may be in any order.

    Args:
        state: ``first`` or ``last``.
        rows: Shape ``(n, 3)``.
        starts: Where runs begin, ascending; the first is 0, and none is empty.
        counts: How long they are.

    Returns:
        Shape ``(len(starts),)``; an empty row only where a run has no other.
    """
    order = np.lexsort((rows[:, 1], rows[:, 0], np.repeat(np.arange(len(starts)), counts)))
    return order[starts if state.op == "first" else starts + counts - 1]


def emptied(state: State, merged: FloatArray, rows: BoolArray) -> FloatArray:
    """A merged state, made empty in some rows.

    Args:
        state: What it is of.
        merged: Shape ``(n,)``, or ``(n, width)`` of a wider state.
        rows: Which, shape ``(n,)``.
    """
    if merged.ndim == 1:
        return np.where(rows, state.empty[0], merged)
    blank: FloatArray = np.where(rows[:, None], state.empty, merged)
    return blank
