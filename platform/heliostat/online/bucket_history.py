"""One bucket's events, whole: what the event log holds, and what lies in streams on its way there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from heliostat.errors import StreamEntryError
from heliostat.features.offline import unique_events
from heliostat.online.backfill import RingPlan
from heliostat.schema import ID_HASH, INGESTED, TIMESTAMP, hash64, times_us
from heliostat.storage.event_files import cut
from heliostat.storage.event_log import EventLog
from heliostat.storage.log_version import LogVersion
from heliostat.storage.online_store import OnlineStore
from heliostat.storage.stream_entries import events_from
from heliostat.storage.stream_tail import StreamTail

_LONGEST_TAIL = 100_000
_READ_TOGETHER = 500_000  # of more events, ids aren't read but of those that need them


@dataclass(frozen=True, eq=False)
class BucketHistory:
    """A bucket's events as of an instant.

    Attributes:
        bucket: Which bucket.
        events: Distinct events in reach of the views: their columns, as the files have them, and ``_id_hash``.
        recent: Of those in open tiles: key columns and id.
        version: The event log's version that was read.
        covers: Whether all is in it that live events have done before it was read.
        fresh: Keys of entities with events that were in streams, encoded.
    """

    bucket: int
    events: pa.Table
    recent: pa.Table
    version: int
    covers: bool
    fresh: pa.Array
    _reader: HistoryReader = field(repr=False)

    def of_entities(self, keys: pa.Array) -> Self:
        """Only the events of some entities, given by their encoded keys."""
        entity = self._reader.plan.views[0].entity
        kept = [table.filter(pc.is_in(entity.encode(table), value_set=keys)) for table in (self.events, self.recent)]
        return replace(self, events=kept[0], recent=kept[1])

    def followed(self) -> Self | None:
        """With what came into the streams since; None if it can't be told any more."""
        more = self._reader.tail_events()
        return None if more is None else self._with(more)

    def _with(self, tail: pa.Table) -> Self:
        """With events that the log may have as well."""
        plan = self._reader.plan
        source, entity = plan.views[0].source, plan.views[0].entity
        if not tail.num_rows:
            return replace(self, fresh=entity.encode(tail))
        known = self.events.column(ID_HASH).to_numpy()
        new = tail.filter(pa.array(~np.isin(tail.column(ID_HASH).to_numpy(), known)))
        recent = new.filter(pa.array(times_us(new.column(source.event_time)) >= plan.open_us))
        return replace(
            self,
            events=_joined(self.events, new),
            recent=_joined(self.recent, recent),
            fresh=entity.encode(new),
        )


@dataclass(eq=False)
class HistoryReader:
    """Reads one bucket's history, and follows it.

    Attributes:
        plan: For which rings.
        bucket: Which bucket.
        event_log: The log.
        store: The server with the streams.
        present: Whether the plan's instant is the present: then streams count, and what is a little ahead.
        known: A version of the log that was opened lately; opening it again is spared while nothing was committed.
    """

    plan: RingPlan
    bucket: int
    event_log: EventLog
    store: OnlineStore
    present: bool
    known: LogVersion | None = None
    _tail: StreamTail | None = None

    def read(self) -> BucketHistory:
        """Read all of it: the streams first, so that what leaves them meanwhile is found in the log.

        Raises:
            StorageError: If the log can't be read or the server doesn't answer.
        """
        source, entity = self.plan.views[0].source, self.plan.views[0].entity
        tail = None
        if self.present:
            # An event's stream is in the bucket of the source's first entity.
            own = source.entities[0].name == entity.name
            buckets = [self.bucket] if own else list(self.event_log.buckets)
            streams = [self.store.keys.events(source.name, bucket) for bucket in buckets]
            self._tail = StreamTail(self.store, streams, most=_LONGEST_TAIL)
            tail = self.tail_events()
        # Looked up after the streams: a version that is current now holds what has left them.
        is_current = self.known is not None and self.known.is_current
        log = self.known if self.known is not None and is_current else self.event_log.opened(source, entity)
        events, recent = self._read(log)
        none = entity.encode(recent.slice(0, 0))
        history = BucketHistory(self.bucket, events, recent, log.version, tail is not None, none, self)
        return history if tail is None else history._with(tail)

    def _read(self, log: LogVersion) -> tuple[pa.Table, pa.Table]:
        """Events in reach, and those in open tiles; from one look at the files where that is little."""
        plan, source, entity = self.plan, self.plan.views[0].source, self.plan.views[0].entity
        until_us = plan.as_of_us + (plan.limits.future_tolerance_us if self.present else 0)
        first_us, open_us = plan.first_us, plan.open_us
        columns = (*plan.needed, ID_HASH)
        short = tuple(dict.fromkeys((*entity.key_columns, source.event_id)))
        every = tuple(dict.fromkeys((*columns, *short, INGESTED)))
        older = first_us is None or first_us < open_us
        rows = log.statistics([self.bucket], min_time_us=first_us).rows
        together = older and rows <= _READ_TOGETHER
        # What was ingested while this runs may be later than what the instant allowed for.
        found = self._events(log, every, first_us if together else open_us, None if self.present else until_us)
        later = pc.greater_equal(found.column(source.event_time), pa.scalar(until_us, TIMESTAMP))
        if self.present and pc.any(later).as_py():
            found = found.filter(pc.or_(pc.invert(later), pc.greater(found.column(INGESTED), plan.as_of_us)))
        events = cut(found, source.event_time, first_us, None).select(columns)
        recent = cut(found, source.event_time, open_us, None).select(short)
        if older and not together:
            events = pa.concat_tables([self._events(log, columns, first_us, open_us), events])
        return events, recent

    def _events(
        self, log: LogVersion, columns: Sequence[str], first_us: int | None, until_us: int | None
    ) -> pa.Table:
        found = log.read([self.bucket], columns=columns, min_time_us=first_us, max_time_us=until_us, raw=True)
        return cut(found, self.plan.views[0].source.event_time, first_us, until_us)

    def tail_events(self) -> pa.Table | None:
        """The bucket's events that came into the streams since the last call; None if that can't be told."""
        plan, source, entity = self.plan, self.plan.views[0].source, self.plan.views[0].entity
        payloads = None if self._tail is None else self._tail.follow()
        if payloads is None:
            return None
        try:
            found = events_from(payloads, source.schema)
        except StreamEntryError:
            return None  # the sink puts such an entry aside
        if found.num_rows:
            buckets = entity.buckets(entity.encode(found), self.event_log.n_buckets)
            found = found.filter(pa.array(buckets == self.bucket))
        if plan.first_us is not None:
            after = pa.scalar(plan.first_us, TIMESTAMP)
            found = found.filter(pc.greater_equal(found.column(source.event_time), after))
        found = unique_events(source, found)
        hashes = hash64(found.column(source.event_id)).view(np.int64) if found.num_rows else np.empty(0, np.int64)
        return found.append_column(ID_HASH, pa.array(hashes))


def _joined(rows: pa.Table, more: pa.Table) -> pa.Table:
    """Rows of files, and plain ones."""
    return pa.concat_tables([rows, more.select(rows.column_names).cast(rows.schema)])
