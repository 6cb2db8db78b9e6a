"""Rings: what of an entity's past the online store keeps, in which bytes, and how it is read. Pure.

A view's aggregations are grouped by hop. A group is one string of slots an entity; a slot is
a tile: its number and the partial states of its events, as f8, little endian. Tile ``k`` of
hop ``h`` covers ``[k·h, (k+1)·h)``. Only tiles with events have a slot, in their order: a read
moves and merges what happened, however long the window is. Equal states are kept once.

- A ring reaches over ``n = W/h + 1`` tiles for the longest window ``W``, as the contract says, and as
  many more as the tolerance for events in the future needs, so that such an event evicts nothing in use.
- Aggregations without a window, and the last event's time if the view has a ttl, form the
  group ``life``. It begins with the base: everything older than the slots behind it, which
  reach back as far as events may be late.
- What a base doesn't know has each state's own emptiness (`heliostat.features.states`): 0 of a sum,
  +inf of a minimum, -inf of a maximum.
- A tile from the event log carries a fraction with its number until a live event goes into it; see
  `heliostat.storage.rings`: the same bytes are merged inside the server.

A group's name ends with a hash of its layout. Bytes are thus never read by a layout that
didn't write them: after a change, rings are absent until they are materialized again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import orjson
from numpy.typing import NDArray

from heliostat.clock import US_PER_DAY, US_PER_MS, format_duration
from heliostat.features.aggregations import Aggregation, FloatArray, Input, InputValues, State
from heliostat.features.definitions import FeatureView
from heliostat.features.states import merged_runs, of_events, of_runs
from heliostat.features.windows import ring_slots, tile_of
from heliostat.settings import IngestionSettings
from heliostat.storage.bundles import RingBytes, ring_id
from heliostat.storage.rings import RingDescriptor

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

F8 = np.dtype("<f8")
LIFE = "life"
_FORMAT = "slots in use, in bundles"


@dataclass(frozen=True)
class RingLimits:
    """What events may do to the order of time; part of every ring's layout.

    Attributes:
        lateness_us: An event that comes later than this after its time may miss its live tile.
        future_tolerance_us: Events further in the future than this are refused at intake.
    """

    lateness_us: int
    future_tolerance_us: int

    @classmethod
    def of(cls, settings: IngestionSettings) -> RingLimits:
        """As the settings say."""
        return cls(settings.lateness_us, settings.future_tolerance_us)

    def first_live_tile(self, as_of_us: int, hop_us: int) -> int:
        """The first tile that late events may still change; those before it are complete."""
        return (as_of_us - self.lateness_us) // hop_us


@dataclass(frozen=True, eq=False)
class RingGroup:
    """The layout of one ring: the aggregations of a view that share a hop.

    Attributes:
        view_ref: Of the view and its version.
        label: ``1d``, ``1h``, … or ``life``.
        hop_us: Tile length.
        n_slots: How many tiles it reaches over, and one more for the base of a life ring.
        states: Each once, ordered by key.
        expire_us: How long after its last write a ring may be dropped; 0: never.
    """

    view_ref: str
    label: str
    hop_us: int
    n_slots: int
    states: tuple[State, ...]
    expire_us: int

    @property
    def life(self) -> bool:
        """Whether it begins with a base."""
        return self.label == LIFE

    @cached_property
    def name(self) -> str:
        """The label and a hash of the layout."""
        layout = [_FORMAT, self.label, self.hop_us, self.n_slots, [state.key for state in self.states]]
        return f"{self.label}.{hashlib.sha256(orjson.dumps(layout)).hexdigest()[:8]}"

    @cached_property
    def ring_id(self) -> bytes:
        """Which of a bundle's rings it is."""
        return ring_id(self.view_ref, self.name)

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Where each state lies in a slot, by state key; column 0 is the tile number."""
        found, at = dict[str, slice](), 1
        for state in self.states:
            found[state.key] = slice(at, at + state.width)
            at += state.width
        return found

    @cached_property
    def width(self) -> int:
        """Columns of a slot."""
        return 1 + sum(state.width for state in self.states)

    @cached_property
    def empty_slot(self) -> FloatArray:
        """A base that nothing went into, shape ``(width,)``."""
        slot = np.zeros(self.width, dtype=F8)
        slot[0] = -np.inf
        for state in self.states:
            slot[self.columns[state.key]] = state.empty
        return slot

    @property
    def slot_bytes(self) -> int:
        """Length of a slot."""
        return self.width * F8.itemsize

    @property
    def most_bytes(self) -> int:
        """Length of a ring with events in each tile of its reach."""
        return self.n_slots * self.slot_bytes

    @cached_property
    def descriptor(self) -> bytes:
        """The layout, as the server's scripts read it."""
        return RingDescriptor(
            ring_id=self.ring_id,
            n_slots=self.n_slots,
            life=self.life,
            operators=tuple((state.op, state.width) for state in self.states),
            empty_slot=self.empty_slot.tobytes(),
            expire_ms=-(-self.expire_us // US_PER_MS),
        ).pack()


@dataclass(frozen=True, eq=False)
class RingLayout:
    """The rings of one view.

    Attributes:
        view: The view.
        limits: What the layout allows for.
        groups: Window groups by rising hop, then ``life`` if there is one.
    """

    view: FeatureView
    limits: RingLimits
    groups: tuple[RingGroup, ...]

    def group_of(self, feature: str) -> RingGroup:
        """The group of an aggregated feature."""
        return self.by_label[_label(self.view.base_features[feature])]

    @cached_property
    def by_label(self) -> dict[str, RingGroup]:
        """The groups by label."""
        return {group.label: group for group in self.groups}

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What its states look at, each once."""
        return tuple({state.source.key: state.source for group in self.groups for state in group.states}.values())


def ring_layout(view: FeatureView, limits: RingLimits) -> RingLayout:
    """The rings that a view needs.

    Args:
        view: Any.
        limits: What events may do to the order of time.
    """
    members: dict[str, list[Aggregation]] = {}
    for aggregation in view.base_features.values():
        members.setdefault(_label(aggregation), []).append(aggregation)
    windows = sorted((each for label, each in members.items() if label != LIFE), key=lambda each: _hop_us(each[0]))
    groups = [_window_group(view, limits, aggregations) for aggregations in windows]
    life = [state for each in members.get(LIFE, ()) for state in each.states()]
    if view.ttl_us is not None:
        life.append(last_event(view))
    if life:
        live = -(-limits.lateness_us // US_PER_DAY) + 1 + _ahead(limits, US_PER_DAY)
        forgets = LIFE not in members and view.ttl_us is not None
        expire_us = (view.ttl_us or 0) + US_PER_DAY if forgets else 0
        groups.append(RingGroup(view.ref, LIFE, US_PER_DAY, 1 + live, _distinct(life), expire_us))
    return RingLayout(view, limits, tuple(groups))


def last_event(view: FeatureView) -> State:
    """What a ttl goes by: the time of the last event that the view counts."""
    return State("max", "time", Input(None, view.where))


def _window_group(view: FeatureView, limits: RingLimits, aggregations: Sequence[Aggregation]) -> RingGroup:
    hop_us = _hop_us(aggregations[0])
    longest_us = max(each.window_us or 0 for each in aggregations)
    n_slots = ring_slots(longest_us, hop_us) + _ahead(limits, hop_us)
    # Once all windows have closed and the vector is absent anyway, nothing is lost with the ring.
    expire_us = 0 if view.ttl_us is None else max(view.ttl_us, longest_us + hop_us) + US_PER_DAY
    states = [state for each in aggregations for state in each.states()]
    return RingGroup(view.ref, format_duration(hop_us), hop_us, n_slots, _distinct(states), expire_us)


def _ahead(limits: RingLimits, hop_us: int) -> int:
    return -(-limits.future_tolerance_us // hop_us)


def _hop_us(aggregation: Aggregation) -> int:
    return aggregation.hop_us or US_PER_DAY


def _label(aggregation: Aggregation) -> str:
    return LIFE if aggregation.window_us is None else format_duration(_hop_us(aggregation))


def _distinct(states: Iterable[State]) -> tuple[State, ...]:
    by_key = {state.key: state for state in states}
    return tuple(by_key[key] for key in sorted(by_key))


# ── Events -> tiles -> rings ────────────────────────────────────────────────────────


def event_slots(
    group: RingGroup, inputs: Mapping[str, InputValues], times_us: IntArray, ties: IntArray
) -> tuple[FloatArray, BoolArray]:
    """Each event as a slot that holds it alone.

    Args:
        group: The ring's layout.
        inputs: What its states look at, evaluated on the events, by `Input.key`.
        times_us: Event times, shape ``(n,)``.
        ties: What breaks ties, shape ``(n,)``.

    Returns:
        Slots, shape ``(n, width)``; and, shape ``(n,)``, whether the event is in any state at all.
    """
    slots = np.tile(group.empty_slot, (len(times_us), 1))
    slots[:, 0] = tile_of(times_us, group.hop_us)
    touched = np.zeros(len(times_us), dtype=np.bool_)
    for state in group.states:
        given = inputs[state.source.key]
        slots[:, group.columns[state.key]] = of_events(state, given, times_us, ties)
        touched |= given.used
    return slots, touched


@dataclass(frozen=True)
class TileStates:
    """Partial states of tiles, ordered by entity and tile.

    Attributes:
        codes: Entity of each tile, shape ``(m,)``, ascending.
        tiles: Tile numbers, shape ``(m,)``, ascending within an entity.
        slots: Shape ``(m, width)``; column 0 is the tile number.
    """

    codes: IntArray
    tiles: IntArray
    slots: FloatArray

    def between(self, first: int, last: int) -> TileStates:
        """Those with ``first ≤ tile ≤ last``."""
        inside = (self.tiles >= first) & (self.tiles <= last)
        if inside.all():
            return self
        return TileStates(self.codes[inside], self.tiles[inside], self.slots[inside])

    def of_entities(self, first: int, last: int) -> TileStates:
        """Those of entities ``first ≤ code < last``, which become entity 0, 1, …."""
        low, high = np.searchsorted(self.codes, [first, last])
        return TileStates(self.codes[low:high] - first, self.tiles[low:high], self.slots[low:high])


def tile_states(
    group: RingGroup,
    codes: IntArray,
    times_us: IntArray,
    ties: IntArray,
    inputs: Mapping[str, InputValues],
) -> TileStates:
    """Add events up to tiles.

    Args:
        group: The ring's layout.
        codes: Entity of each event, shape ``(n,)``.
        times_us: Event times, shape ``(n,)``; events are in the order (entity, event time, tie).
        ties: What breaks ties, shape ``(n,)``.
        inputs: What the states look at, evaluated on the events, by `Input.key`.
    """
    distinct = {state.source.key: inputs[state.source.key] for state in group.states}
    touched = np.logical_or.reduce([each.used for each in distinct.values()])
    if not touched.all():
        codes, times_us, ties = codes[touched], times_us[touched], ties[touched]
        distinct = {key: InputValues(each.values[touched], each.used[touched]) for key, each in distinct.items()}
    tiles = tile_of(times_us, group.hop_us)
    starts = _starts(codes, tiles)
    slots = np.empty((len(starts), group.width))
    slots[:, 0] = tiles[starts]
    for state in group.states:
        slots[:, group.columns[state.key]] = of_runs(state, distinct[state.source.key], times_us, ties, starts)
    return TileStates(codes[starts], tiles[starts], slots)


def _starts(*columns: IntArray) -> IntArray:
    """Where any column differs from the row before."""
    changed = np.zeros(len(columns[0]), dtype=np.bool_)
    changed[:1] = True
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(changed)


def _based(group: RingGroup, slots: FloatArray, starts: IntArray) -> FloatArray:
    """Merge runs of an entity's slots, in order of time, into one slot a run."""
    result = np.empty((len(starts), group.width))
    for state in group.states:
        place = group.columns[state.key]
        result[:, place] = merged_runs(state, slots[:, place], starts, across=True)
    return result


@dataclass(frozen=True, eq=False)
class Rings:
    """Rings of ``n`` entities, one behind the other.

    Attributes:
        slots: Shape ``(m, width)``, those of an entity in the order of their tiles, its base first.
        counts: How many slots each entity has, shape ``(n,)``.
    """

    slots: FloatArray
    counts: IntArray

    def to_bytes(self) -> RingBytes:
        """As the store keeps them."""
        return RingBytes(
            self.slots.astype(F8, copy=False).tobytes(), self.counts * (self.slots.shape[1] * F8.itemsize)
        )


def pack_rings(group: RingGroup, tiles: TileStates, n_entities: int, *, as_of_us: int, limits: RingLimits) -> Rings:
    """Put tiles into rings.

    Args:
        group: The rings' layout.
        tiles: Tiles of entities ``0 … n_entities - 1``.
        n_entities: How many rings.
        as_of_us: The instant the rings are made for.
        limits: Says which tiles are complete.
    """
    # Live events may be a little ahead of the instant.
    newest = max(as_of_us // group.hop_us, int(tiles.tiles.max(initial=0)))
    if not group.life:
        tiles = tiles.between(newest - group.n_slots + 1, newest)
        return Rings(_from_history(group, tiles, as_of_us), np.bincount(tiles.codes, minlength=n_entities))
    first_live = limits.first_live_tile(as_of_us, group.hop_us)
    old = tiles.tiles < first_live
    starts = _starts(tiles.codes[old])
    bases = np.tile(group.empty_slot, (n_entities, 1))
    bases[tiles.codes[old][starts]] = _based(group, tiles.slots[old], starts)
    bases[:, 0] = first_live
    tiles = tiles.between(first_live, newest)
    order = np.argsort(np.concatenate([np.arange(n_entities), tiles.codes]), kind="stable")
    slots = np.concatenate([bases, _from_history(group, tiles, as_of_us)])
    return Rings(slots[order], 1 + np.bincount(tiles.codes, minlength=n_entities))


def _from_history(group: RingGroup, tiles: TileStates, as_of_us: int) -> FloatArray:
    """Slots whose numbers say that they come from the event log, and as of when."""
    slots = tiles.slots.copy()
    slots[:, 0] += 0.25 + 0.5 * np.clip(as_of_us / group.hop_us - tiles.tiles, 0.0, 1.0)
    return slots
