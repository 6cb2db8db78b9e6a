"""What a view's backfill costs, before anybody runs it: events and bytes to read, rings to keep.

Events and bytes come from the statistics of the event log's files, so that no row is read for
them. How many entities there are is counted in as many buckets as it takes to see enough
events, and scaled up: entities are spread over buckets by a hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow.compute as pc

from heliostat.features.definitions import FeatureView
from heliostat.features.offline import earliest_us
from heliostat.online.tiles import RingLimits, ring_layout
from heliostat.storage.bundles import directory_bytes
from heliostat.storage.event_log import EventLog
from heliostat.storage.online_store import OnlineKeys

_COUNTED_EVENTS: Final = 500_000
_ENTITY_TEXT_BYTES: Final = 16  # what an entity's own key adds to its bundle's, about


@dataclass(frozen=True, slots=True)
class BackfillCost:
    """What materializing views now would read and keep.

    Attributes:
        views: References of the views, all of one source and entity.
        events: Events in the files that it would open.
        size_bytes: Of these files; columns that no view needs aren't read.
        files: How many.
        entities: With an event in reach; exact if ``entities_counted`` says so.
        entities_counted: Whether every bucket was counted, not just some.
        ring_bytes: Of the bundles and their keys at most, without the server's own overhead: as if no tile
            had two events, up to the rings' reach.
    """

    views: tuple[str, ...]
    events: int
    size_bytes: int
    files: int
    entities: int
    entities_counted: bool
    ring_bytes: int

    def __str__(self) -> str:
        about = "" if self.entities_counted else "about "
        return (
            f"{self.events:,} events in {self.files} files of {_megabytes(self.size_bytes)} to read, "
            f"{about}{self.entities:,} entities, up to {_megabytes(self.ring_bytes)} of rings"
        )

    def to_document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "views": list(self.views),
            "events": self.events,
            "bytes": self.size_bytes,
            "files": self.files,
            "entities": self.entities,
            "entities_counted": self.entities_counted,
            "ring_bytes": self.ring_bytes,
        }


def backfill_costs(
    views: Iterable[FeatureView], event_log: EventLog, *, as_of_us: int, keys: OnlineKeys, limits: RingLimits
) -> tuple[BackfillCost, ...]:
    """What materializing views at an instant would cost; views of one source and entity share their reading.

    Args:
        views: Any.
        event_log: Where their events are.
        as_of_us: The instant, microseconds.
        keys: The online store's key names.
        limits: What the rings' layouts allow for.

    Returns:
        One for each source and entity, in the order of the views.

    Raises:
        StorageError: If the log can't be read.
    """
    together: dict[tuple[str, str], list[FeatureView]] = {}
    for view in views:
        together.setdefault((view.source.name, view.entity.name), []).append(view)
    return tuple(_cost(each, event_log, as_of_us, keys, limits) for each in together.values())


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _cost(
    views: Sequence[FeatureView], event_log: EventLog, as_of_us: int, keys: OnlineKeys, limits: RingLimits
) -> BackfillCost:
    source, entity = views[0].source, views[0].entity
    since_us = earliest_us(views, np.array([as_of_us]))
    reached = event_log.statistics(source, entity, min_time_us=since_us, max_time_us=as_of_us)
    entities, counted = _entities(views, event_log, as_of_us, reached.rows_by_bucket)
    groups = [group for view in views for group in ring_layout(view, limits).groups]
    beside = len(keys.bundle(source.name, entity.name, "", 0)) + _ENTITY_TEXT_BYTES + directory_bytes(len(groups))
    ring_bytes = entities * beside + sum(
        min(entities * group.n_slots, reached.rows + entities * group.life) * group.slot_bytes for group in groups
    )
    return BackfillCost(
        views=tuple(view.ref for view in views),
        events=reached.rows,
        size_bytes=reached.size_bytes,
        files=reached.files,
        entities=entities,
        entities_counted=counted,
        ring_bytes=ring_bytes,
    )


def _entities(
    views: Sequence[FeatureView], event_log: EventLog, as_of_us: int, rows_by_bucket: Mapping[int, int]
) -> tuple[int, bool]:
    """Entities with an event in reach, and whether all buckets were counted."""
    source, entity = views[0].source, views[0].entity
    since_us = earliest_us(views, np.array([as_of_us]))
    found = seen = events = 0
    for bucket, rows in rows_by_bucket.items():
        if events and events + rows > _COUNTED_EVENTS:
            break
        table = event_log.read_bucket(
            source,
            entity,
            bucket,
            columns=entity.key_columns,
            min_time_us=since_us,
            max_time_us=as_of_us,
        )
        found += pc.count_distinct(entity.encode(table, what=f"events of {source.name!r}")).as_py()
        events, seen = events + rows, seen + 1
    if not seen:
        return 0, True
    return round(found * len(rows_by_bucket) / seen), seen == len(rows_by_bucket)
