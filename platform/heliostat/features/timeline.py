"""Events of many entities in one order, and the arithmetic on stretches of it. Arrays only.

The order is (entity, event time, tie). A window is then a range of positions, found by two
binary searches, and what a window adds up to follows from arrays made once for all rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from heliostat.features import moments
from heliostat.features.aggregations import IDENTITY, FloatArray
from heliostat.features.windows import tile_of

IntArray = NDArray[np.int64]
Parts: TypeAlias = NDArray[Any]
"""Partial results: numbers, shape ``(n,)``, or rows of them, shape ``(n, width)``."""

_LONG_SEGMENT = 48
_PACKED_BITS = 62
_FEW_CODES = 2**16  # what a sort by digits takes in one go


class EventIndex:
    """Finds events by (entity, instant): both packed into one integer, so that one search answers.

    Args:
        codes: Entity of each event, ``0 ≤ code < n_codes``, shape ``(n,)``, any order.
        times: Event times, shape ``(n,)``; the work is less where they ascend, as in a file of the event log.
        ties: What breaks ties, shape ``(n,)``.
        n_codes: Number of entities.
    """

    def __init__(self, codes: IntArray, times: IntArray, ties: IntArray, *, n_codes: int) -> None:
        self._origin_us = int(times.min()) if len(times) else 0
        self._span_us = int(times.max()) - self._origin_us + 1 if len(times) else 1
        self._bits = self._span_us.bit_length()
        self._instants: IntArray | None = None
        if self._bits + n_codes.bit_length() > _PACKED_BITS:
            # Too long a time for one integer: the rank of an instant is as good, and shorter.
            self._instants = np.unique(times)
            self._bits = len(self._instants).bit_length()
        packed = codes << self._bits
        packed |= times - self._origin_us if self._instants is None else np.searchsorted(self._instants, times)
        if n_codes <= _FEW_CODES and (times[1:] >= times[:-1]).all():
            # What is in order of time already needs to be dealt out to its entities only.
            order = np.argsort(codes.astype(np.uint16), kind="stable")
        else:
            order = np.argsort(packed)
        self._packed = packed[order]
        self.order = _tied_in_order(order, self._packed, ties)
        self.begins: IntArray = np.zeros(n_codes, dtype=np.int64)
        np.cumsum(np.bincount(codes, minlength=n_codes)[:-1], out=self.begins[1:])

    @property
    def codes(self) -> IntArray:
        """The entity of each event, in order."""
        return self._packed >> self._bits

    @property
    def times(self) -> IntArray:
        """The time of each event, in order."""
        offsets = self._packed & ((1 << self._bits) - 1)
        return offsets + self._origin_us if self._instants is None else self._instants[offsets]

    def packed(self, codes: IntArray, instants_us: IntArray) -> IntArray:
        """One integer for each (entity, instant), in the same order; beyond all events is all one."""
        if self._instants is not None:
            return (codes << self._bits) | np.searchsorted(self._instants, instants_us)
        return (codes << self._bits) | np.clip(instants_us - self._origin_us, 0, self._span_us)

    def positions(self, codes: IntArray, instants_us: IntArray) -> IntArray:
        """The first of the entity's events at or after each instant, as a position in order."""
        return np.searchsorted(self._packed, self.packed(codes, instants_us))


def _tied_in_order(order: IntArray, packed: IntArray, ties: IntArray) -> IntArray:
    """The order of (packed, tie); most are told apart by the first alone, which is in order."""
    equal = packed[1:] == packed[:-1]
    if equal.any():
        tied = np.flatnonzero(np.append(equal, False) | np.insert(equal, 0, False))
        members = order[tied]
        order[tied] = members[np.lexsort((ties[members], packed[tied]))]
    return order


@dataclass(frozen=True)
class Ranges:
    """The events that each row's window holds: positions ``[low, high)``, shape ``(m,)`` each."""

    low: IntArray
    high: IntArray

    @cached_property
    def empty(self) -> NDArray[np.bool_]:
        """Rows whose window holds no event."""
        return self.low >= self.high


class Tiles:
    """Events in order, cut at the tiles of one hop.

    Args:
        codes: Entity of each event, shape ``(n,)``, ascending.
        times: Event times, ascending within an entity.
        hop_us: Tile length.
    """

    def __init__(self, codes: IntArray, times: IntArray, hop_us: int) -> None:
        number = tile_of(times, hop_us)
        self.events = Segments(np.flatnonzero(changes(codes, number)), len(codes))
        starts = self.events.starts
        self._codes, self._numbers = codes[starts], number[starts]
        self.of_event = np.repeat(np.arange(len(starts)), self.events.ends - starts)
        self._blocks: dict[int | None, Blocks] = {}

    def blocks(self, tiles_a_window: int | None) -> Blocks:
        """The tiles in blocks as long as a window; without one, in one block an entity."""
        if tiles_a_window not in self._blocks:
            number = np.zeros_like(self._numbers) if tiles_a_window is None else self._numbers // tiles_a_window
            self._blocks[tiles_a_window] = Blocks(self._codes, number)
        return self._blocks[tiles_a_window]


class Blocks:
    """Tiles, cut at blocks.

    Args:
        codes: Entity of each tile, ascending.
        number: Block of each tile, ascending within an entity.
    """

    def __init__(self, codes: IntArray, number: IntArray) -> None:
        self.number = number
        self.opens = changes(codes, number)
        self.tiles = Segments(np.flatnonzero(self.opens), len(codes))


def changes(*columns: IntArray) -> NDArray[np.bool_]:
    """Where any column differs from the row before; True at the first row."""
    changed = np.ones(len(columns[0]), dtype=np.bool_)
    changed[1:] = False
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return changed


class Segments:
    """Neighbouring stretches of an array, each accumulated by itself, strictly in order.

    The order is fixed so that a result's bits depend on its own segment up to there and on
    nothing else: no pairwise tricks, no total of neighbours. Short segments are accumulated
    side by side, all first elements, all second ones, and so on.

    Args:
        starts: Where segments begin, ascending; the first is 0.
        n: Length of the array.
    """

    def __init__(self, starts: IntArray, n: int) -> None:
        self.starts, self.ends = starts, np.append(starts[1:], n)
        lengths = self.ends - starts
        self._long = np.flatnonzero(lengths > _LONG_SEGMENT)
        short = np.flatnonzero((lengths > 1) & (lengths <= _LONG_SEGMENT))
        self._short = short[np.argsort((_LONG_SEGMENT - lengths[short]).astype(np.uint8), kind="stable")]
        # How many short segments have a first element, a second one, …
        reach = np.cumsum(np.bincount(lengths[self._short], minlength=1)[::-1])[::-1]
        self._counts: list[int] = reach[1:].tolist()

    @cached_property
    def _forwards(self) -> IntArray:
        return self._steps(self.starts[self._short], 1)

    @cached_property
    def _backwards(self) -> IntArray:
        return self._steps(self.ends[self._short] - 1, -1)

    def _steps(self, first: IntArray, step: int) -> IntArray:
        """Positions of all first elements, then of all second ones, and so on."""
        steps = [first[:count] + step * number for number, count in enumerate(self._counts)]
        return np.concatenate(steps) if steps else first

    def running(self, ufunc: np.ufunc, values: FloatArray, *, backwards: bool = False) -> FloatArray:
        """Accumulate each segment from its beginning, or from its end.

        Args:
            ufunc: ``np.add``, ``np.minimum`` or ``np.maximum``.
            values: Shape ``(n,)``.
            backwards: From the end.

        Returns:
            Shape ``(n,)``: at ``i`` the accumulation from its segment's start (or end) up to and including ``i``.
        """
        result = values.copy()
        direction = -1 if backwards else 1
        for segment in self._long:
            span = slice(self.starts[segment], self.ends[segment])
            ufunc.accumulate(values[span][::direction], out=result[span][::direction])
        if self._counts:
            at = self._backwards if backwards else self._forwards
            stepped = values[at]
            begin = 0
            for before, count in itertools.pairwise(self._counts):
                following = stepped[begin + before : begin + before + count]
                ufunc(stepped[begin : begin + count], following, out=following)
                begin += before
            result[at] = stepped
        return result


@dataclass(frozen=True)
class Fold:
    """How partial results of one kind merge along stretches.

    Attributes:
        identity: What changes nothing: a number, or a row.
        merge: Two into one, pair by pair.
        of: What each event contributes, from its value and whether it is used.
        running: As `Segments.running`.
    """

    identity: Any
    merge: Callable[[Parts, Parts], Parts]
    of: Callable[[FloatArray, NDArray[np.bool_]], Parts]
    running: Callable[[Segments, Parts, bool], Parts]

    def unless(self, condition: NDArray[np.bool_], parts: Parts) -> Parts:
        """The parts, and nothing where the condition holds."""
        return np.where(condition if parts.ndim == 1 else condition[:, None], self.identity, parts)

    @staticmethod
    def chosen(condition: NDArray[np.bool_], one: Parts, other: Parts) -> Parts:
        """One where the condition holds, else the other."""
        return np.where(condition if one.ndim == 1 else condition[:, None], one, other)


def _numbers(ufunc: np.ufunc, identity: float, dtype: type[np.generic] = np.float64) -> Fold:
    def of(values: FloatArray, used: NDArray[np.bool_]) -> Parts:
        return np.where(used, values, identity).astype(dtype, copy=False)

    def running(segments: Segments, parts: Parts, backwards: bool) -> Parts:
        return segments.running(ufunc, parts, backwards=backwards)

    return Fold(dtype(identity), ufunc, of, running)


def _running_moments(segments: Segments, parts: Parts, backwards: bool) -> Parts:
    return moments.running(parts, segments.starts, segments.ends, backwards=backwards)


FOLDS: Mapping[str, Fold] = {
    "add": _numbers(np.add, IDENTITY["add"]),
    "min": _numbers(np.minimum, IDENTITY["min"]),
    "max": _numbers(np.maximum, IDENTITY["max"]),
    "or": _numbers(np.bitwise_or, IDENTITY["or"], np.int64),
    "moments": Fold(np.zeros(3), moments.merged, moments.moments_of, _running_moments),
}
"""By merge operator."""


def counted(marked: NDArray[np.bool_], ranges: Ranges) -> FloatArray:
    """How many marked events each range holds."""
    if marked.all():
        counts = ranges.high - ranges.low
    else:
        total = np.zeros(len(marked) + 1, dtype=np.int64)
        np.cumsum(marked, out=total[1:])
        counts = total[ranges.high] - total[ranges.low]
    return counts.astype(np.float64)


def tiles_with(tiles: Tiles, used: NDArray[np.bool_], ranges: Ranges) -> FloatArray:
    """How many tiles of each range hold a usable event; the ranges begin and end with tiles or events."""
    if used.all():
        some = np.flatnonzero(~ranges.empty)
        counts = np.zeros(len(ranges.low))
        counts[some] = tiles.of_event[ranges.high[some] - 1] - tiles.of_event[ranges.low[some]] + 1
        return counts
    marked = np.zeros(len(used), dtype=np.bool_)
    positions = np.flatnonzero(used)
    marked[positions[changes(tiles.of_event[positions])]] = True
    return counted(marked, ranges)


def edges(used: NDArray[np.bool_], ranges: Ranges, *, first: bool) -> tuple[IntArray, NDArray[np.bool_]]:
    """The first or last usable event of each range, and whether there is one."""
    n = len(used)
    if used.all():
        return np.where(ranges.empty, 0, ranges.low if first else ranges.high - 1), ~ranges.empty
    if first:
        following = np.minimum.accumulate(np.where(used, np.arange(n), n)[::-1])[::-1]
        position = np.append(following, n)[ranges.low]
        found = position < ranges.high
    else:
        preceding = np.maximum.accumulate(np.where(used, np.arange(n), -1))
        position = np.insert(preceding, 0, -1)[ranges.high]
        found = position >= ranges.low
    return np.where(found, position, 0), found


def nth_smallest(values: IntArray, ranges: Ranges, nth: IntArray, *, n_values: int) -> IntArray:
    """Which value is the n-th smallest of each range.

    Bit by bit from the highest: those of a range whose bit is 0 are neighbours again once all
    such values are brought to the front, and a count says whether the n-th is among them.

    Source: Claude, Navarro 2012, "The wavelet matrix".

    Args:
        values: ``0 ≤ value < n_values``, shape ``(n,)``.
        ranges: Positions among them.
        nth: Counted from 0, less than the range's length, shape ``(m,)``.
        n_values: How many different values there may be.

    Returns:
        Shape ``(m,)``; anything where the range is empty.
    """
    low, high, nth = ranges.low, ranges.high, nth.copy()
    found = np.zeros(len(nth), dtype=np.int64)
    for bit in reversed(range(max(1, (n_values - 1).bit_length()))):
        zero = (values >> bit) & 1 == 0
        zeros = np.concatenate([[0], np.cumsum(zero)])
        low_zeros, high_zeros = zeros[low], zeros[high]
        is_one = nth >= high_zeros - low_zeros
        found |= is_one.astype(np.int64) << bit
        nth -= np.where(is_one, high_zeros - low_zeros, 0)
        low = np.where(is_one, zeros[-1] + low - low_zeros, low_zeros)
        high = np.where(is_one, zeros[-1] + high - high_zeros, high_zeros)
        values = np.concatenate([values[zero], values[~zero]])
    return found
