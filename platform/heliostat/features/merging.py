"""Rings -> features: the slots of many entities, merged as of one instant. Pure.

Which slots count follows from the window contract, and a slot's number says whether it does:
``floor(q − W, h) ≤ tile start < q``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from heliostat.features.aggregations import IDENTITY, Aggregation, FloatArray, State
from heliostat.features.tiles import F8, LIFE, UFUNCS, BoolArray, RingGroup, RingLayout, identity, last_event


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
    if any(value is not None and len(value) != len(empty) for value in values):
        raise ValueError("a ring has another length than its layout")
    data = b"".join([empty if value is None else value for value in values])
    return np.frombuffer(data, dtype=F8).reshape(len(values), group.n_slots, group.width)


@dataclass(frozen=True, eq=False)
class _Part:
    """One state of one feature, found beforehand.

    Attributes:
        state: The state.
        place: Its columns in a slot.
        key: Equal for parts whose merged values are the same.
    """

    state: State
    place: slice
    key: tuple[str, str, int | None]


class MergePlan:
    """What is looked up once for a view, so that a request doesn't.

    Args:
        layout: The view's rings.
        features: Aggregated features that will be asked for.
    """

    def __init__(self, layout: RingLayout, features: Sequence[str]) -> None:
        self.layout = layout
        self.features: dict[str, tuple[Aggregation, RingGroup, tuple[_Part, ...]]] = {}
        for name in features:
            aggregation, group = layout.view.base_features[name], layout.group_of(name)
            parts = tuple(
                _Part(state, group.columns[state.key], (group.label, state.key, aggregation.window_us))
                for state in aggregation.states()
            )
            self.features[name] = aggregation, group, parts
        self.last_event = None if layout.view.ttl_us is None else last_event(layout.view)
        labels = {group.label for _, group, _ in self.features.values()}
        labels |= {LIFE} if self.last_event is not None else set()
        self.groups: tuple[RingGroup, ...] = tuple(group for group in layout.groups if group.label in labels)


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
    masks: dict[tuple[str, int | None], BoolArray] = {}
    merged: dict[tuple[str, str, int | None], FloatArray] = {}
    columns: dict[str, FloatArray] = {}
    # Sums of finite numbers may be infinite, and such sums of both signs nothing at all.
    with np.errstate(over="ignore", invalid="ignore"):
        expired = _expired(plan, rings, as_of_us)
        for name, (aggregation, group, parts) in plan.features.items():
            ring, window = rings[group.label], (group.label, parts[0].key[2])
            if window not in masks:
                masks[window] = _mask(group, ring, as_of_us, window[1])
            for part in parts:
                if part.key not in merged:
                    values = _merge(part.state, ring[:, :, part.place], masks[window])
                    if expired is not None:
                        values[expired] = _blank(part.state)
                    merged[part.key] = values
            columns[name] = aggregation.finalize([merged[part.key] for part in parts], as_of_us=as_of_us)
    return Merged(columns, expired)


def _expired(plan: MergePlan, rings: Mapping[str, FloatArray], as_of_us: int) -> BoolArray | None:
    state, ttl_us = plan.last_event, plan.layout.view.ttl_us
    if state is None or ttl_us is None:
        return None
    life = plan.layout.by_label[LIFE]
    ring = rings[LIFE]
    last = _merge(state, ring[:, :, life.columns[state.key]], _mask(life, ring, as_of_us, None))
    return ~(as_of_us - last <= ttl_us)


def _mask(group: RingGroup, ring: FloatArray, as_of_us: int, window_us: int | None) -> BoolArray:
    """Slots that count, shape ``(n, n_slots)``; every base does."""
    tiles = ring[:, :, 0]
    mask: BoolArray = tiles < -(-as_of_us // group.hop_us)
    if window_us is not None:
        mask &= tiles >= (as_of_us - window_us) // group.hop_us
    elif group.life:
        mask[:, 0] = True
    return mask


def _merge(state: State, columns: FloatArray, mask: BoolArray) -> FloatArray:
    """Merge the slots of each entity where the mask holds.

    Args:
        state: What the columns are.
        columns: Shape ``(n, n_slots, width of the state)``.
        mask: Shape ``(n, n_slots)``.

    Returns:
        Shape ``(n,)``, or ``(n, 3)`` for first and last.
    """
    if state.width == 1:
        operator = state.merge_across
        values = np.where(mask, columns[:, :, 0], IDENTITY[operator])
        merged: FloatArray = UFUNCS[operator].reduce(values, axis=1)
        return merged
    # Turned round, first is last.
    sign = -1.0 if state.op == "first" else 1.0
    times = np.where(mask, sign * columns[:, :, 0], -np.inf)
    latest = times.max(axis=1, keepdims=True)
    ties = np.where((times == latest) & mask, sign * columns[:, :, 1], -np.inf)
    merged = columns[np.arange(len(columns)), ties.argmax(axis=1)]
    merged[~np.isfinite(latest[:, 0])] = _blank(state)
    return merged


def _blank(state: State) -> FloatArray | float:
    """What a state holds without events."""
    return identity(state) if state.width == 1 else np.array([identity(state), 0.0, 0.0])
