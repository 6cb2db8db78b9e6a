"""Rings -> features: the slots of many entities, merged as of one instant. Pure.

Which slots count follows from the window contract, and a slot's number says whether it does:
``floor(q − W, h) ≤ tile start < q``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from heliostat.features.aggregations import Aggregation, FloatArray, State
from heliostat.features.states import IDENTITY, UFUNCS, IntArray, Operator, edges_of_runs, merged_runs
from heliostat.online.tiles import F8, LIFE, BoolArray, RingGroup, RingLayout, Rings, last_event


def parse_rings(group: RingGroup, rings: Sequence[bytes]) -> Rings:
    """Rings as numbers; a missing ring has no slots.

    Args:
        group: The rings' layout.
        rings: As they are in their bundles, ``n`` of them; empty where there is none.

    Raises:
        ValueError: If a ring's length is no multiple of a slot's.
    """
    slots = np.frombuffer(b"".join(rings), dtype=F8)
    counts = np.fromiter(map(len, rings), np.int64, len(rings)) // group.slot_bytes
    if int(np.add.reduce(counts)) * group.width != len(slots):  # less, if any has a rest
        raise ValueError("a ring's length is no multiple of its layout's slots")
    return Rings(slots.reshape(-1, group.width), counts)


@dataclass(frozen=True, eq=False)
class _Window:
    """What is merged of one ring over one window.

    Attributes:
        group: The ring.
        window_us: The window's length; None: all of the past.
        runs: States of one number that lie side by side and merge alike: how, their columns in a slot, and
            those in the table of results.
        empty: What that table holds of an entity without slots.
        first: Where the table's columns begin among all parts.
        edges: First and last values: their columns, and which part they are.
        others: Other states, the same.
    """

    group: RingGroup
    window_us: int | None
    runs: tuple[tuple[Operator, slice, slice], ...]
    empty: FloatArray
    first: int
    edges: tuple[tuple[State, slice, int], ...]
    others: tuple[tuple[State, slice, int], ...]


class MergePlan:
    """What is looked up once for a view, so that a request doesn't.

    Args:
        layout: The view's rings.
        features: Aggregated features that will be asked for.
    """

    def __init__(self, layout: RingLayout, features: Sequence[str]) -> None:
        self.layout = layout
        aggregations = {name: layout.view.base_features[name] for name in features}
        wanted: dict[tuple[str, int | None], dict[str, State]] = {}
        for name, aggregation in aggregations.items():
            window = layout.group_of(name).label, aggregation.window_us
            wanted.setdefault(window, {}).update({state.key: state for state in aggregation.states()})
        places: dict[tuple[str, int | None, str], int] = {}
        self._windows = [
            _window(layout.by_label[label], us, states, places) for (label, us), states in wanted.items()
        ]
        self._n_parts = len(places)
        self.features: dict[str, tuple[Aggregation, tuple[int, ...]]] = {}
        for name, aggregation in aggregations.items():
            label = layout.group_of(name).label
            parts = tuple(places[label, aggregation.window_us, state.key] for state in aggregation.states())
            self.features[name] = aggregation, parts
        self._last_event = None if layout.view.ttl_us is None else last_event(layout.view)
        labels = {window.group.label for window in self._windows}
        labels |= {LIFE} if self._last_event is not None else set()
        self.groups: tuple[RingGroup, ...] = tuple(group for group in layout.groups if group.label in labels)

    @property
    def last_event_column(self) -> int | None:
        """Where the life ring's slots hold what the view's ttl goes by; None without ttl."""
        if self._last_event is None:
            return None
        column: int = self.layout.by_label[LIFE].columns[self._last_event.key].start
        return column

    def expired(self, read: Mapping[str, _Read], as_of_us: int) -> BoolArray | None:
        """Entities whose last event is older than the view's ttl, shape ``(n,)``; None without ttl."""
        state, ttl_us = self._last_event, self.layout.view.ttl_us
        if state is None or ttl_us is None:
            return None
        slots = read[LIFE].within(None, None)
        runs: list[tuple[Operator, slice, slice]] = [
            ("max", self.layout.by_label[LIFE].columns[state.key], slice(0, 1))
        ]
        return ~(as_of_us - slots.folded(runs, state.empty)[:, 0] <= ttl_us)

    def parts(self, read: Mapping[str, _Read], expired: BoolArray | None) -> list[FloatArray]:
        """Merged states, in the order that features name them by."""
        found: list[FloatArray] = [_NOTHING] * self._n_parts
        for window in self._windows:
            slots = read[window.group.label].within(window.window_us, expired)
            if window.runs:
                found[window.first : window.first + len(window.empty)] = slots.folded(window.runs, window.empty).T
            for state, place, result in window.edges:
                found[result] = slots.edge(state, place)
            for state, place, result in window.others:
                found[result] = slots.merged(state, place)
        return found


_NOTHING = np.empty(0)


class _Read:
    """Rings of many entities, with what all windows over them need.

    Args:
        group: Their layout.
        rings: Of ``n`` entities.
        as_of_us: Query instant.
    """

    def __init__(self, group: RingGroup, rings: Rings, as_of_us: int) -> None:
        self.group, self.rows, self.n, self.as_of_us = group, rings.slots, len(rings.counts), as_of_us
        all_have = np.logical_and.reduce(rings.counts)
        self.some = None if all_have else np.flatnonzero(rings.counts)
        self.counts = rings.counts if self.some is None else rings.counts[self.some]
        self.starts: IntArray = np.add.accumulate(self.counts) - self.counts
        # Looked at for every window, so they lie side by side.
        self.tiles = np.ascontiguousarray(rings.slots[:, 0])
        self.before: BoolArray = self.tiles < float(-(-as_of_us // group.hop_us))

    def within(self, window_us: int | None, expired: BoolArray | None) -> _Slots:
        """The slots that count; every base does.

        Args:
            window_us: The window's length; None: all of the past.
            expired: Entities of which nothing counts, shape ``(n,)``.
        """
        mask = self.before
        if window_us is not None:
            mask = mask & (self.tiles >= float((self.as_of_us - window_us) // self.group.hop_us))
        elif self.group.life:
            mask = mask.copy()
            mask[self.starts] = True
        if expired is not None:
            mask = mask & ~(expired if self.some is None else expired[self.some]).repeat(self.counts)
        if np.logical_and.reduce(mask):
            return _Slots(self.n, self.rows, self.some, self.starts, self.counts)
        counts: IntArray = np.add.reduceat(mask, self.starts, dtype=np.int64)
        some = self.some
        if not np.logical_and.reduce(counts):
            used = np.flatnonzero(counts)
            counts, some = counts[used], used if some is None else some[used]
        return _Slots(self.n, self.rows.compress(mask, axis=0), some, np.add.accumulate(counts) - counts, counts)


@dataclass(frozen=True, eq=False)
class _Slots:
    """The slots of many rings that count, one after the other: the work follows the tiles in use.

    Attributes:
        n: Number of entities.
        rows: The slots, shape ``(m, width)``.
        some: Entities that have any; None: all of them.
        starts: Where the rows of each of those begin.
        counts: How many they are.
    """

    n: int
    rows: FloatArray
    some: IntArray | None
    starts: IntArray
    counts: IntArray

    def folded(self, runs: Iterable[tuple[Operator, slice, slice]], empty: FloatArray) -> FloatArray:
        """States of one number, merged: shape ``(n, len(empty))``."""
        table = np.empty((len(self.starts), len(empty)))
        for operator, place, results in runs:
            if operator == "add":
                table[:, results] = self._sums(self.rows[:, place])
            else:
                UFUNCS[operator].reduceat(self.rows[:, place], self.starts, axis=0, out=table[:, results])
        if self.some is None:
            return table
        whole = np.empty((self.n, len(empty)))
        whole[:] = empty
        whole[self.some] = table
        return whole

    def _sums(self, rows: FloatArray) -> FloatArray:
        """Of each entity's rows, in order: so that C adds up to the same bits; `reduceat` sums long runs in pairs."""
        width = rows.shape[1]
        places = np.arange(len(self.starts)).repeat(self.counts)[:, None] * width + np.arange(width)
        sums = np.bincount(places.ravel(), weights=rows.ravel(), minlength=len(self.starts) * width)
        return sums.reshape(-1, width).astype(np.float64, copy=False)

    def edge(self, state: State, place: slice) -> FloatArray:
        """The first or last value, shape ``(n, 3)``."""
        rows = self.rows[:, place]
        times = rows[:, 0]
        extreme = (np.minimum if state.op == "first" else np.maximum).reduceat(times, self.starts)
        hits = np.flatnonzero(times == extreme.repeat(self.counts))
        if len(hits) != len(self.starts):  # two slots share a time, or none of an entity's holds a value
            hits = edges_of_runs(state, rows, self.starts, self.counts)
        return self._whole(state, rows[hits])

    def merged(self, state: State, place: slice) -> FloatArray:
        """Any other state: shape ``(n,)``, or ``(n, width)`` of a wider one."""
        found = self._whole(state, merged_runs(state, self.rows[:, place], self.starts, across=True))
        return found if state.width > 1 else found[:, 0]

    def _whole(self, state: State, merged: FloatArray) -> FloatArray:
        if self.some is None:
            return merged
        whole = np.tile(state.empty, (self.n, 1))
        whole[self.some] = merged
        return whole


def _window(
    group: RingGroup,
    window_us: int | None,
    states: Mapping[str, State],
    places: dict[tuple[str, int | None, str], int],
) -> _Window:
    """Sorts states by how they merge, and numbers their results: those of runs first."""
    runs: list[tuple[Operator, slice, slice]] = []
    first, empty = len(places), list[float]()
    in_order = sorted(states.items(), key=lambda each: group.columns[each[0]].start)
    single = {key: state for key, state in in_order if state.width == 1 and state.merge_across in UFUNCS}
    for at, (key, state) in enumerate(single.items()):
        operator, column = state.merge_across, group.columns[key]
        places[group.label, window_us, key] = first + at
        empty.append(IDENTITY[operator])
        if runs and runs[-1][0] == operator and runs[-1][1].stop == column.start:
            _, before, results = runs.pop()
            runs.append((operator, slice(before.start, column.stop), slice(results.start, at + 1)))
        else:
            runs.append((operator, column, slice(at, at + 1)))
    edges: list[tuple[State, slice, int]] = []
    others: list[tuple[State, slice, int]] = []
    for key, state in in_order:
        if key not in single:
            places[group.label, window_us, key] = len(places)
            wider = edges if state.op in ("first", "last") else others
            wider.append((state, group.columns[key], places[group.label, window_us, key]))
    return _Window(group, window_us, tuple(runs), np.array(empty), first, tuple(edges), tuple(others))


@dataclass(frozen=True, eq=False)
class Merged:
    """What rings say as of an instant.

    Attributes:
        columns: Aggregated features by name, shape ``(n,)`` each; NaN is null. Not to be written to:
            features with the same state may share an array.
        expired: Entities whose last event is older than the view's ttl, shape ``(n,)``; None without ttl.
    """

    columns: dict[str, FloatArray]
    expired: BoolArray | None


def merge_rings(plan: MergePlan, rings: Mapping[str, Rings], *, as_of_us: int) -> Merged:
    """Merge the rings of many entities into features.

    Args:
        plan: Which features.
        rings: Of ``n`` entities, by the labels of ``plan.groups``.
        as_of_us: Query instant, later than every event in the rings.
    """
    read = {group.label: _Read(group, rings[group.label], as_of_us) for group in plan.groups}
    # Sums of finite numbers may be infinite, and such sums of both signs nothing at all.
    with np.errstate(over="ignore", invalid="ignore"):
        expired = plan.expired(read, as_of_us)
        parts = plan.parts(read, expired)
        columns = {
            name: aggregation.finalize([parts[at] for at in places], as_of_us=as_of_us)
            for name, (aggregation, places) in plan.features.items()
        }
    return Merged(columns, expired)
