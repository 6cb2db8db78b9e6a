"""Rings -> features: the slots of many entities, merged as of one instant. Pure.

Which slots count follows from the window contract, and a slot's number says whether it does:
``floor(q − W, h) ≤ tile start < q``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from heliostat.features.aggregations import Aggregation, FloatArray, State
from heliostat.features.states import emptied, merged_slots
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
        sums: States that are added up and lie side by side: their columns, and where each result goes.
        others: Other states: their columns, and where the result goes.
    """

    group: RingGroup
    window_us: int | None
    sums: tuple[tuple[slice, slice], ...]
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
            if window.sums:
                weights = mask.astype(np.float64)[:, None, :]
                for place, results in window.sums:
                    found[results] = _added_up(ring[:, :, place], mask, weights, expired)
            for state, place, result in window.others:
                values = merged_slots(state, ring[:, :, place], mask)
                found[result] = values if expired is None else emptied(state, values, expired)
        return found


_NOTHING = np.empty(0)


def _window(
    group: RingGroup,
    window_us: int | None,
    states: Mapping[str, State],
    places: dict[tuple[str, int | None, str], int],
) -> _Window:
    """Sorts states into sums and others, and numbers their results: sums that lie side by side in a row."""
    added = [key for key, each in states.items() if each.width == 1 and each.merge_across == "add"]
    added.sort(key=lambda key: group.columns[key].start)
    sums: list[tuple[slice, slice]] = []
    for key in added:
        column, result = group.columns[key], len(places)
        places[group.label, window_us, key] = result
        if sums and sums[-1][0].stop == column.start:
            before = sums.pop()
            sums.append((slice(before[0].start, column.stop), slice(before[1].start, result + 1)))
        else:
            sums.append((column, slice(result, result + 1)))
    others: list[tuple[State, slice, int]] = []
    for key, state in states.items():
        if key not in added:
            others.append((state, group.columns[key], len(places)))
            places[group.label, window_us, key] = len(places)
    return _Window(group, window_us, tuple(sums), tuple(others))


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


def _added_up(
    columns: FloatArray, mask: BoolArray, weights: FloatArray, expired: BoolArray | None
) -> list[FloatArray]:
    """Add states up that lie side by side: one product of the slots' weights (0 or 1) and their columns.

    Args:
        columns: Shape ``(n, n_slots, k)``.
        mask: Slots that count, shape ``(n, n_slots)``.
        weights: The same as numbers, shape ``(n, 1, n_slots)``.
        expired: Rows that are empty whatever their slots hold; None: none.

    Returns:
        ``k`` arrays of shape ``(n,)``.
    """
    total = np.matmul(weights, columns)[:, 0]
    if not math.isfinite(np.add.reduce(total, axis=None)):
        # Perhaps a sum beyond 1e308 in a slot that doesn't count: 0 times infinity.
        total = np.add.reduce(np.where(mask[:, :, None], columns, 0.0), axis=1)
    if expired is not None:
        total[expired] = 0.0
    return list(total.T)


def _mask(group: RingGroup, tiles: FloatArray, as_of_us: int, window_us: int | None) -> BoolArray:
    """Slots that count, by their tile numbers, shape ``(n, n_slots)``; every base does."""
    mask: BoolArray = tiles < -(-as_of_us // group.hop_us)
    if window_us is not None:
        mask &= tiles >= (as_of_us - window_us) // group.hop_us
    elif group.life:
        mask[:, 0] = True
    return mask
