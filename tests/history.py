"""Rings from history, from a table instead of the log: what the materialization's tasks do, a bucket each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from heliostat.features.definitions import FeatureView
from heliostat.online.backfill import BucketRings, RingPlan
from heliostat.online.live import remember_ms
from heliostat.online.tiles import RingLimits
from heliostat.schema import ID_HASH, hash64, times_us
from heliostat.storage.online_store import OnlineStore
from heliostat.storage.ring_writes import EntityRings, RingCounts, RingLayouts


class History:
    """What events before an instant make of the rings of views; written as often as one likes.

    Args:
        views: All of one source and entity.
        log: Distinct events of the source.
        as_of_us: The instant.
        store: Where rings are written.
        n_buckets: How many the entity has.
        limits: What the rings' layouts allow for.
    """

    def __init__(
        self,
        views: Sequence[FeatureView],
        log: pa.Table,
        as_of_us: int,
        *,
        store: OnlineStore,
        n_buckets: int,
        limits: RingLimits,
    ) -> None:
        plan = RingPlan(tuple(views), store.keys, as_of_us, limits)
        self._store, self._source, self._entity = store, views[0].source, views[0].entity
        self._layouts = RingLayouts(plan.described, False, remember_ms(limits))
        log = log.filter(pa.array(times_us(log[self._source.event_time]) < as_of_us))
        log = log.append_column(ID_HASH, pa.array(hash64(log[self._source.event_id]).view(np.int64)))
        recent = pa.array(times_us(log[self._source.event_time]) >= plan.open_us)
        buckets = self._entity.buckets(self._entity.encode(log), n_buckets)
        self._writes: list[list[EntityRings]] = [[] for _ in range(n_buckets)]
        for bucket in np.unique(buckets).tolist():
            own = pa.array(buckets == bucket)
            rings = BucketRings.of(plan, bucket, log.filter(own), log.filter(pc.and_(own, recent)))
            self._writes[bucket] = list(rings.writes())

    def write(self) -> RingCounts:
        """Begin every bucket, and write what its entities have; all buckets in one round trip."""
        calls = []
        for bucket, writes in enumerate(self._writes):
            lease = self._store.begin_bucket(self._source.name, self._entity.name, bucket)
            calls += [call for each in writes for call in self._layouts.calls(lease, each)]
        return sum((counts for counts, _ in self._store.write_rings(calls)), RingCounts())
