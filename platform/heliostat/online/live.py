"""Events that arrive now -> what they change in the online store.

Pure: it names keys and bytes; `OnlineStore.apply_events` sends them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import pyarrow as pa

from heliostat.clock import US_PER_DAY, US_PER_MS
from heliostat.features.aggregations import InputValues, evaluate
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.online.tiles import IntArray, RingLayout, RingLimits, event_slots, ring_layout
from heliostat.schema import hash64, tie48, times_us
from heliostat.settings import Settings
from heliostat.storage.event_updates import EventOutcome, EventUpdate
from heliostat.storage.online_store import OnlineKeys


def remember_ms(limits: RingLimits) -> int:
    """How long an event's id is remembered online.

    Long enough that a repetition after it can only fall into complete tiles, which the next
    materialization takes from the event log; there each id is one event for ever.
    """
    return (limits.lateness_us + US_PER_DAY + limits.future_tolerance_us) // US_PER_MS


@dataclass(frozen=True)
class _Ring:
    """One group's part in a batch of events."""

    descriptor: bytes
    slots: bytes
    slot_bytes: int
    touched: list[bool]

    def part(self, event: int) -> tuple[bytes, bytes]:
        begin = event * self.slot_bytes
        return self.descriptor, self.slots[begin : begin + self.slot_bytes]


class LiveRings:
    """Translates events of one source into updates of the online store.

    Args:
        source: Where the events come from.
        layouts: The rings of the views over it, of any of its entities; may be none.
        keys: The store's key names.
        n_buckets: The event log's number of buckets.
    """

    def __init__(
        self, source: EventSource, layouts: Sequence[RingLayout], *, keys: OnlineKeys, n_buckets: int
    ) -> None:
        self._source, self._keys, self._n_buckets = source, keys, n_buckets
        # The first entity's update carries the event to its stream; others are needed only for rings.
        self._entities: list[tuple[Entity, list[RingLayout]]] = []
        for position, entity in enumerate(source.entities):
            own = [
                each
                for each in layouts
                if (each.view.source.name, each.view.entity.name) == (source.name, entity.name)
            ]
            if position == 0 or own:
                self._entities.append((entity, own))
        self._inputs = [given for each in layouts for given in each.inputs]

    @classmethod
    def open(cls, source: EventSource, views: Iterable[FeatureView], settings: Settings) -> Self:
        """For the views over a source, in the project that the settings name."""
        limits = RingLimits.of(settings.ingestion)
        return cls(
            source,
            [ring_layout(view, limits) for view in views if view.source.name == source.name],
            keys=OnlineKeys(settings.online.key_prefix, settings.project),
            n_buckets=settings.storage.buckets,
        )

    @property
    def updates_per_event(self) -> int:
        """How many updates an event makes: one for each entity that is concerned."""
        return len(self._entities)

    def updates(self, events: pa.Table, fields: Sequence[tuple[bytes, ...]]) -> list[EventUpdate]:
        """What a batch of events changes.

        Args:
            events: Checked events with the source's columns, ``n`` rows.
            fields: Each event's entry in its stream, ``n`` of them.

        Returns:
            ``n · updates_per_event`` updates, those of an event next to each other.
        """
        times = times_us(events.column(self._source.event_time))
        ids = events.column(self._source.event_id)
        ties, texts = tie48(hash64(ids)), ids.cast(pa.string()).to_pylist()
        inputs = evaluate(events, self._inputs)
        columns = [
            self._entity_updates(entity, layouts, events, times, ties, texts, inputs, fields if first else None)
            for first, (entity, layouts) in zip([True, *[False] * len(self._entities)], self._entities, strict=False)
        ]
        return [update for row in zip(*columns, strict=True) for update in row]

    def _entity_updates(
        self,
        entity: Entity,
        layouts: Sequence[RingLayout],
        events: pa.Table,
        times: IntArray,
        ties: IntArray,
        ids: Sequence[str],
        inputs: dict[str, InputValues],
        fields: Sequence[tuple[bytes, ...]] | None,
    ) -> list[EventUpdate]:
        encoded = entity.encode(events, what=f"events of {self._source.name!r}")
        buckets = entity.buckets(encoded, self._n_buckets).tolist()
        rings = [ring for layout in layouts for ring in _rings(layout, times, ties, inputs)]
        prefix = self._keys.bundle_prefix(self._source.name, entity.name)
        streams = self._keys.event_streams(self._source.name, self._n_buckets)
        epochs = [self._keys.epoch(bucket) for bucket in range(self._n_buckets)]
        updates = []
        for event, (text, bucket) in enumerate(zip(encoded.cast(pa.string()).to_pylist(), buckets, strict=True)):
            touched = tuple(ring.part(event) for ring in rings if ring.touched[event])
            updates.append(
                EventUpdate(
                    epoch_key=epochs[bucket],
                    seen_key=self._keys.seen(self._source.name, entity.name, ids[event], bucket),
                    stream_key=None if fields is None else streams[bucket],
                    fields=() if fields is None else fields[event],
                    bundle_key=f"{prefix}{{b{bucket}}}:{text}" if touched else None,
                    rings=touched,
                )
            )
        return updates

    def outcomes(self, outcomes: Sequence[EventOutcome]) -> list[EventOutcome]:
        """What became of each event, from what became of its updates.

        An event that was interrupted between two entities and is repeated counts as a duplicate:
        its stream has it.
        """
        step = self.updates_per_event
        return [
            "late" if outcomes[at] == "applied" and "late" in outcomes[at : at + step] else outcomes[at]
            for at in range(0, len(outcomes), step)
        ]


def _rings(layout: RingLayout, times: IntArray, ties: IntArray, inputs: dict[str, InputValues]) -> list[_Ring]:
    rings = []
    for group in layout.groups:
        slots, touched = event_slots(group, inputs, times, ties)
        rings.append(_Ring(group.descriptor, slots.tobytes(), group.slot_bytes, touched.tolist()))
    return rings
