"""A bucket's events -> all rings of its entities, as history has them. Pure.

`heliostat.online.bucket_rings` reads the events and sends the rings.
"""

from __future__ import annotations

from bisect import bisect_left as _before
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.features.aggregations import InputValues, evaluate
from heliostat.features.definitions import FeatureView
from heliostat.features.entity_codes import EntityCodes
from heliostat.features.offline import earliest_us, needed_columns
from heliostat.features.timeline import EventIndex
from heliostat.online.tiles import (
    IntArray,
    RingGroup,
    RingLayout,
    RingLimits,
    TileStates,
    pack_rings,
    ring_layout,
    tile_states,
)
from heliostat.schema import ID_HASH, hash64, tie48, times_us
from heliostat.storage.bundles import RingBytes
from heliostat.storage.online_store import OnlineKeys
from heliostat.storage.ring_writes import EntityRings

_RINGS_AT_ONCE_BYTES = 8 * 2**20
_EVENTS_AT_ONCE = 250_000


@dataclass(frozen=True)
class RingPlan:
    """The rings of some views of one source and entity, at an instant.

    Attributes:
        views: All of one source and entity.
        keys: The store's key names.
        as_of_us: The instant that the rings are made for.
        limits: What the rings' layouts allow for.
    """

    views: tuple[FeatureView, ...]
    keys: OnlineKeys
    as_of_us: int
    limits: RingLimits

    @cached_property
    def layouts(self) -> tuple[RingLayout, ...]:
        """Each view's."""
        return tuple(ring_layout(view, self.limits) for view in self.views)

    @cached_property
    def groups(self) -> tuple[RingGroup, ...]:
        """All of them, in the order that writes have."""
        return tuple(group for layout in self.layouts for group in layout.groups)

    @cached_property
    def needed(self) -> tuple[str, ...]:
        """The columns of events that they are made from."""
        return needed_columns(self.views)

    @property
    def prefix(self) -> str:
        """What the bundles' keys begin with."""
        return self.keys.bundle_prefix(self.views[0].source.name, self.views[0].entity.name)

    @cached_property
    def described(self) -> tuple[tuple[bytes, bytes, int], ...]:
        """Each group's id and packed descriptor, and its first tile that late events may still change."""
        return tuple(
            (group.ring_id, group.descriptor, self.limits.first_live_tile(self.as_of_us, group.hop_us))
            for group in self.groups
        )

    @cached_property
    def first_us(self) -> int | None:
        """Events before aren't looked at; None: all are."""
        return earliest_us(self.views, np.array([self.as_of_us]))

    @property
    def open_us(self) -> int:
        """Events from here on are in an open tile of some group."""
        return min(first * group.hop_us for (*_, first), group in zip(self.described, self.groups, strict=True))


@dataclass(frozen=True, eq=False)
class BucketRings:
    """What one bucket's events make of its entities' rings.

    Attributes:
        plan: Which rings.
        bucket: The bucket's number.
        texts: The entities' keys.
    """

    plan: RingPlan
    bucket: int
    texts: list[str]
    _events: _SortedEvents
    _recent: dict[int, list[str]]

    @classmethod
    def of(
        cls, plan: RingPlan, bucket: int, events: pa.Table, recent: pa.Table, *, also: Sequence[str] = ()
    ) -> BucketRings:
        """Sort a bucket's events.

        Args:
            plan: Which rings.
            bucket: The bucket's number.
            events: Distinct events, in any order: the columns of
                `heliostat.features.offline.needed_columns`, and ``_id_hash``.
            recent: Of those in open tiles: key columns and id.
            also: Keys of entities whose rings are cleared if they have no events.
        """
        source, entity = plan.views[0].source, plan.views[0].entity
        what = f"events of {source.name!r}"
        numbered = EntityCodes(entity.encode(events, what=what))
        texts: list[str] = numbered.keys.cast(pa.string()).to_pylist()
        texts += sorted(set(also) - set(texts))
        prefix = plan.keys.seen(source.name, entity.name, "", bucket)
        places = pc.index_in(
            entity.encode(recent, what=what).cast(pa.string()), pa.array(texts, pa.string())
        ).fill_null(-1)  # such an entity is out of reach
        ids = recent.column(source.event_id).cast(pa.string()).to_pylist()
        seen: dict[int, list[str]] = {}
        for place, event_id in sorted(zip(places.to_pylist(), ids, strict=True)):
            seen.setdefault(place, []).append(prefix + event_id)
        return cls(plan, bucket, texts, _SortedEvents.of(plan, events, numbered.rows), seen)

    def writes(self) -> Iterator[EntityRings]:
        """All entities' rings, some entities' at a time."""
        groups, prefix = self.plan.groups, f"{self.plan.prefix}{{b{self.bucket}}}:"
        ring_bytes = sum(group.most_bytes for group in groups)
        at_once = max(1, _RINGS_AT_ONCE_BYTES // ring_bytes)
        recent = list(self._recent)
        for first, last in self._events.chunks(len(self.texts), at_once):
            chunk, texts = self._events.of_entities(first, last), self.texts[first:last]
            yield EntityRings(
                first,
                [prefix + text for text in texts],
                [self._rings(group, chunk, last - first) for group in groups],
                {
                    place - first: self._recent[place]
                    for place in recent[_before(recent, first) : _before(recent, last)]
                },
            )

    def _rings(self, group: RingGroup, chunk: _SortedEvents, n_entities: int) -> RingBytes:
        tiles = tile_states(group, chunk.codes, chunk.times_us, chunk.ties, chunk.inputs)
        if not group.life and len(tiles.tiles):
            newest = max(self.plan.as_of_us // group.hop_us, int(tiles.tiles.max()))
            tiles = tiles.between(newest - group.n_slots + 1, newest)
        begins = np.diff(tiles.codes, prepend=-1) > 0
        here = tiles.codes[begins]
        own = TileStates(np.cumsum(begins) - 1, tiles.tiles, tiles.slots)
        packed = pack_rings(group, own, len(here), as_of_us=self.plan.as_of_us, limits=self.plan.limits)
        sizes = np.zeros(n_entities, dtype=np.int64)
        data, sizes[here] = packed.to_bytes()
        return RingBytes(data, sizes)

    def hashes(self) -> NDArray[np.uint64]:
        """Of the entities' keys, shape ``(n_entities,)``."""
        return hash64(pa.array(self.texts, pa.string()))


@dataclass(frozen=True, eq=False)
class _SortedEvents:
    """Events in the order (entity, event time, tie), shape ``(n,)`` each."""

    codes: IntArray
    times_us: IntArray
    ties: IntArray
    inputs: dict[str, InputValues]

    @classmethod
    def of(cls, plan: RingPlan, events: pa.Table, codes: IntArray) -> _SortedEvents:
        times = times_us(events.column(plan.views[0].source.event_time))
        ties = tie48(events.column(ID_HASH).to_numpy().view(np.uint64))
        inputs = evaluate(events, [given for layout in plan.layouts for given in layout.inputs])
        index = EventIndex(codes, times, ties, n_codes=int(codes.max(initial=-1)) + 1)
        order = index.order
        return cls(
            index.codes,
            index.times,
            ties[order],
            {key: InputValues(each.values[order], each.used[order]) for key, each in inputs.items()},
        )

    def chunks(self, n_entities: int, at_once: int) -> Iterator[tuple[int, int]]:
        """Runs of entities with a bounded number of them and, unless one has more alone, of events."""
        ends = np.searchsorted(self.codes, np.arange(1, n_entities + 1))
        first = 0
        while first < n_entities:
            before = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, before + _EVENTS_AT_ONCE, side="right"))
            last = min(max(last, first + 1), first + at_once, n_entities)
            yield first, last
            first = last

    def of_entities(self, first: int, last: int) -> _SortedEvents:
        low, high = np.searchsorted(self.codes, [first, last])
        inputs = {key: InputValues(each.values[low:high], each.used[low:high]) for key, each in self.inputs.items()}
        return _SortedEvents(self.codes[low:high] - first, self.times_us[low:high], self.ties[low:high], inputs)


def entities_of(plan: RingPlan, keys: Sequence[str]) -> tuple[IntArray, pa.Array]:
    """Whose bundles these keys are: of each the bucket and the entity's key."""
    ends = pc.utf8_slice_codeunits(pa.array(keys, pa.string()), len(plan.prefix))
    parts = pc.extract_regex(ends, r"(?s)^\{b(?P<bucket>\d+)\}:(?P<text>.*)$")
    return pc.struct_field(parts, "bucket").cast(pa.int64()).to_numpy(), pc.struct_field(parts, "text")


def views_together(views: Sequence[FeatureView]) -> tuple[tuple[FeatureView, ...], ...]:
    """Views by source and entity: those that are made from the same events."""
    together: dict[tuple[str, str], list[FeatureView]] = {}
    for view in views:
        together.setdefault((view.source.name, view.entity.name), []).append(view)
    return tuple(tuple(each) for each in together.values())
