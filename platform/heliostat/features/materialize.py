"""Event log -> online rings: a view's history brought beside what live events made of it.

One task a bucket: read the bucket's events, add them up to tiles, pack rings, and let the
server merge each with the ring it holds (`heliostat.storage.ring_scripts.WRITE_RING`).
Complete tiles come from the log, tiles that late events may still change stay as live events
made them. Running it twice, or beside live ingestion, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow.compute as pc
import ray.data

from heliostat.clock import format_instant
from heliostat.features.backfill import bucket_rings
from heliostat.features.definitions import FeatureView
from heliostat.features.offline import earliest_us, needed_columns
from heliostat.features.tiles import RingLimits
from heliostat.schema import TIE
from heliostat.storage.event_log import EventLog
from heliostat.storage.online_store import OnlineConfig, OnlineStore, RingCounts


@dataclass(frozen=True)
class Materialization:
    """What a materialization did.

    Attributes:
        views: References of the views.
        as_of_us: The instant that the rings were made for.
        log_version: The event log's version that was read.
        events: Events read.
        entities: Entities among them.
        rings: What became of their rings.
    """

    views: tuple[str, ...]
    as_of_us: int
    log_version: int
    events: int
    entities: int
    rings: RingCounts

    def describe(self) -> dict[str, Any]:
        """A JSON document: what the job prints and the store keeps under `OnlineKeys.materialized`."""
        return {
            "views": list(self.views),
            "as_of": format_instant(self.as_of_us),
            "log_version": self.log_version,
            "events": self.events,
            "entities": self.entities,
            "rings_written": self.rings.written,
            "rings_unchanged": self.rings.unchanged,
            "rings_ahead": self.rings.ahead,
        }


@dataclass(frozen=True)
class BucketTask:
    """All that one bucket's materialization needs; picklable.

    Attributes:
        views: All of one source and entity.
        event_log: Where the events are.
        log_version: The version of it that is read.
        online: Where the rings are.
        as_of_us: Events before this instant count.
        limits: What the rings' layouts allow for.
    """

    views: tuple[FeatureView, ...]
    event_log: EventLog
    log_version: int
    online: OnlineConfig
    as_of_us: int
    limits: RingLimits

    def run(self, bucket: int, store: OnlineStore) -> tuple[int, int, RingCounts]:
        """Materialize one bucket.

        Args:
            bucket: Its number.
            store: The online store.

        Returns:
            Events read, entities among them, and what became of the rings.

        Raises:
            StorageError: If the log can't be read or the store doesn't answer.
        """
        source, entity = self.views[0].source, self.views[0].entity
        events = self.event_log.read_bucket(
            source,
            entity,
            bucket,
            columns=[*needed_columns(self.views), TIE],
            min_time_us=earliest_us(self.views, np.array([self.as_of_us])),
            max_time_us=self.as_of_us,
            version=self.log_version,
        )
        writes = bucket_rings(
            self.views,
            events,
            bucket=bucket,
            keys=self.online.keys,
            as_of_us=self.as_of_us,
            limits=self.limits,
        )
        keys = entity.encode(events, what=f"events of {source.name!r}")
        return events.num_rows, pc.count_distinct(keys).as_py(), store.write_rings(writes)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """As `run`, for Ray Data: a row with the bucket's number in, counts out."""
        with OnlineStore(self.online) as store:
            events, entities, rings = self.run(int(row["id"]), store)
        return {
            "events": events,
            "entities": entities,
            "written": rings.written,
            "unchanged": rings.unchanged,
            "ahead": rings.ahead,
        }


def materialize(
    views: Iterable[FeatureView],
    *,
    event_log: EventLog,
    online: OnlineConfig,
    as_of_us: int,
    limits: RingLimits,
    concurrency: int | None = None,
) -> tuple[Materialization, ...]:
    """Materialize views: one Ray task a bucket of each (source, entity), which its views share.

    Args:
        views: Any.
        event_log: Where the events are.
        online: Where the rings go.
        as_of_us: Events before this instant count: now, or earlier. An earlier one than the last time
            changes nothing that is newer.
        limits: What the rings' layouts allow for.
        concurrency: Most buckets at once; None: as many as there are CPUs.

    Returns:
        What was done, for each (source, entity).

    Raises:
        StorageError: If the log can't be read or the store doesn't answer.
    """
    together: dict[tuple[str, str], list[FeatureView]] = {}
    for view in views:
        together.setdefault((view.source.name, view.entity.name), []).append(view)
    return tuple(
        _materialized(
            BucketTask(
                views=tuple(each),
                event_log=event_log,
                log_version=event_log.version(each[0].source, each[0].entity),
                online=online,
                as_of_us=as_of_us,
                limits=limits,
            ),
            concurrency,
        )
        for each in together.values()
    )


def _materialized(task: BucketTask, concurrency: int | None) -> Materialization:
    n_buckets = task.event_log.n_buckets
    rows = ray.data.range(n_buckets, override_num_blocks=n_buckets).map(task, concurrency=concurrency).take_all()
    done = Materialization(
        views=tuple(view.ref for view in task.views),
        as_of_us=task.as_of_us,
        log_version=task.log_version,
        events=sum(row["events"] for row in rows),
        entities=sum(row["entities"] for row in rows),
        rings=sum((RingCounts(row["written"], row["unchanged"], row["ahead"]) for row in rows), RingCounts()),
    )
    with OnlineStore(task.online) as store:
        document = orjson.dumps(done.describe())
        store.put_many({task.online.keys.materialized(view.ref): document for view in task.views})
    return done
