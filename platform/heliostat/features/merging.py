"""Rings -> features: the slots of many entities, merged as of one instant. Pure.

Which slots count follows from the window contract, and a slot's number says whether it does:
``floor(q − W, h) ≤ tile start < q``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from heliostat.features.aggregations import Aggregation, FloatArray, State
from heliostat.features.states import IDENTITY, UFUNCS, IntArray, Operator, merged_slots
from heliostat.features.tiles import F8, LIFE, BoolArray, RingGroup, RingLayout, last_event


def parse_rings(group: RingGroup, values: Sequence[bytes | None]) -> FloatArray:
    """Rings as numbers; a missing ring is an empty one.

    Args:
        group: The rings' layout.
        values: As the store gives them, ``n`` of them.

    Returns:
        Shape ``(n, n_slots, width)``.

    Raises:
        ValueError: If a value hasn't the ring's length.
    """
    empty = group.empty_ring
    rings = [empty if value is None else value for value in values]
    if set(map(len, rings)) - {len(empty)}:
        raise ValueError("a ring has another length than its layout")
    return np.frombuffer(b"".join(rings), dtype=F8).reshape(len(values), group.n_slots, group.width)


@dataclass(frozen=True, eq=False)
class _Window:
    """What is merged of one ring over one window.

    Attributes:
        group: The ring.
        window_us: The window's length; None: all of the past.
        runs: States of one number that lie side by side and merge alike: how, their columns, and where the
            results go.
        edges: First and last values: their columns, and where the result goes.
        others: Other states, the same.
    """

    group: RingGroup
    window_us: int | None
    runs: tuple[tuple[Operator, slice, slice], ...]
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

    def expired(
        self, rings: Mapping[str, FloatArray], tiles: Mapping[str, FloatArray], as_of_us: int
    ) -> BoolArray | None:
        """Entities whose last event is older than the view's ttl, shape ``(n,)``; None without ttl."""
        state, ttl_us = self._last_event, self.layout.view.ttl_us
        if state is None or ttl_us is None:
            return None
        life = self.layout.by_label[LIFE]
        mask = _mask(life, tiles[LIFE], as_of_us, None)
        return ~(as_of_us - merged_slots(state, rings[LIFE][:, :, life.columns[state.key]], mask) <= ttl_us)

    def parts(
        self,
        rings: Mapping[str, FloatArray],
        tiles: Mapping[str, FloatArray],
        expired: BoolArray | None,
        as_of_us: int,
    ) -> list[FloatArray]:
        """Merged states, in the order that features name them by."""
        found: list[FloatArray] = [_NOTHING] * self._n_parts
        for window in self._windows:
            ring = rings[window.group.label]
            mask = _mask(window.group, tiles[window.group.label], as_of_us, window.window_us)
            if expired is not None:
                mask[expired] = False
            slots = _Slots.of(ring, mask)
            for operator, place, results in window.runs:
                found[results] = slots.folded(operator, place)
            for state, place, result in window.edges:
                found[result] = slots.edge(state, place)
            for state, place, result in window.others:
                found[result] = merged_slots(state, ring[:, :, place], mask)
        return found


_NOTHING = np.empty(0)


@dataclass(frozen=True, eq=False)
class _Slots:
    """The slots of many rings that count, one after the other: the work follows the tiles in use.

    Attributes:
        ring: All slots, shape ``(n, n_slots, width)``.
        mask: Which count, shape ``(n, n_slots)``.
        rows: Those, shape ``(m, width)``.
        some: Entities that have any; None: all of them.
        starts: Where the rows of each of those begin.
        counts: How many they are.
    """

    ring: FloatArray
    mask: BoolArray
    rows: FloatArray
    some: IntArray | None
    starts: IntArray
    counts: IntArray

    @classmethod
    def of(cls, ring: FloatArray, mask: BoolArray) -> _Slots:
        rows = ring.reshape(-1, ring.shape[2]).take(np.flatnonzero(mask), axis=0)
        counts = np.add.reduce(mask, axis=1, dtype=np.int64)
        starts = np.add.accumulate(counts) - counts
        if np.logical_and.reduce(counts):
            return cls(ring, mask, rows, None, starts, counts)
        some = np.flatnonzero(counts)
        return cls(ring, mask, rows, some, starts[some], counts[some])

    def folded(self, operator: Operator, place: slice) -> list[FloatArray]:
        """Neighbouring states of one number, merged: shape ``(n,)`` each."""
        merged: FloatArray = UFUNCS[operator].reduceat(self.rows[:, place], self.starts, axis=0)
        if self.some is not None:
            whole = np.full((len(self.mask), merged.shape[1]), IDENTITY[operator])
            whole[self.some] = merged
            merged = whole
        return list(merged.T)

    def edge(self, state: State, place: slice) -> FloatArray:
        """The first or last value, shape ``(n, 3)``."""
        times = self.rows[:, place.start]
        extreme = (np.minimum if state.op == "first" else np.maximum).reduceat(times, self.starts)
        hits = np.flatnonzero(times == extreme.repeat(self.counts))
        if len(hits) != len(self.starts):  # two slots share a time, or none of an entity's holds a value
            return merged_slots(state, self.ring[:, :, place], self.mask)
        merged: FloatArray = self.rows[hits, place]
        if self.some is None:
            return merged
        whole = np.tile(state.empty, (len(self.mask), 1))
        whole[self.some] = merged
        return whole


def _window(
    group: RingGroup,
    window_us: int | None,
    states: Mapping[str, State],
    places: dict[tuple[str, int | None, str], int],
) -> _Window:
    """Sorts states by how they merge, and numbers their results: those of a run one after the other."""
    runs: list[tuple[Operator, slice, slice]] = []
    edges: list[tuple[State, slice, int]] = []
    others: list[tuple[State, slice, int]] = []
    for key, state in sorted(states.items(), key=lambda each: group.columns[each[0]].start):
        column, result = group.columns[key], len(places)
        places[group.label, window_us, key] = result
        if state.width > 1 or state.merge_across not in UFUNCS:
            (edges if state.op in ("first", "last") else others).append((state, column, result))
        elif (
            runs
            and runs[-1][0] == state.merge_across
            and (runs[-1][1].stop, runs[-1][2].stop)
            == (
                column.start,
                result,
            )
        ):
            operator, before, results = runs.pop()
            runs.append((operator, slice(before.start, column.stop), slice(results.start, result + 1)))
        else:
            runs.append((state.merge_across, column, slice(result, result + 1)))
    return _Window(group, window_us, tuple(runs), tuple(edges), tuple(others))


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


def merge_rings(plan: MergePlan, rings: Mapping[str, FloatArray], *, as_of_us: int) -> Merged:
    """Merge the rings of many entities into features.

    Args:
        plan: Which features.
        rings: Shape ``(n, n_slots, width)``, by the labels of ``plan.groups``.
        as_of_us: Query instant, later than every event in the rings.
    """
    # Looked at for every window, so they lie side by side.
    tiles = {label: np.ascontiguousarray(ring[:, :, 0]) for label, ring in rings.items()}
    # Sums of finite numbers may be infinite, and such sums of both signs nothing at all.
    with np.errstate(over="ignore", invalid="ignore"):
        expired = plan.expired(rings, tiles, as_of_us)
        parts = plan.parts(rings, tiles, expired, as_of_us)
        columns = {
            name: aggregation.finalize([parts[at] for at in places], as_of_us=as_of_us)
            for name, (aggregation, places) in plan.features.items()
        }
    return Merged(columns, expired)


def _mask(group: RingGroup, tiles: FloatArray, as_of_us: int, window_us: int | None) -> BoolArray:
    """Slots that count, by their tile numbers, shape ``(n, n_slots)``; every base does."""
    mask: BoolArray = tiles < -(-as_of_us // group.hop_us)
    if window_us is not None:
        mask &= tiles >= (as_of_us - window_us) // group.hop_us
    elif group.life:
        mask[:, 0] = True
    return mask
