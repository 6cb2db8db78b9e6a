"""The event log: one Delta table for each source and entity, bucketed by the entity's hash.

``{root}/events/{source}/{entity}`` is partitioned by bucket alone; a file's rows are in order
of event time, so that its statistics and those of its row groups prune reads by time. Beside
the source's columns it holds when each event was ingested and the hash of its id.

The same event id twice (of one source, in one bucket of one entity) is one event; the first
ingested stays. That is checked for every append, exactly, and again if somebody else has
appended between the check and the commit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable
from numpy.typing import NDArray

from heliostat.errors import BucketCountError, KeyColumnError
from heliostat.schema import BUCKET, ID_HASH, INGESTED, TIE, cast_column, conform, hash64
from heliostat.storage.delta import OpenTables, Progress, StreamId, Table, arrow_schema
from heliostat.storage.event_append import EntityAppend, HashCache, Spool, repetitive_columns, repetitive_texts
from heliostat.storage.event_files import LogStatistics
from heliostat.storage.log_version import NO_VERSION, LogVersion
from heliostat.storage.places import absolute_root, joined

IntArray = NDArray[np.int64]

_CONFIGURED_BUCKETS = "heliostat.buckets"
_CACHED_HASHES = 16_000_000
_SMALL_FILE_ROWS = 100_000


class EntityLike(Protocol):
    """What the log needs to know of an entity."""

    name: str

    @property
    def key_columns(self) -> tuple[str, ...]:
        """The columns of its key."""
        ...

    def encode(self, table: pa.Table, *, what: str = ...) -> pa.Array:
        """Canonical keys of a table's rows."""
        ...

    def buckets(self, encoded: pa.Array, n_buckets: int) -> NDArray[np.int32]:
        """The bucket of each key."""
        ...


class SourceLike(Protocol):
    """What the log needs to know of an event source."""

    name: str
    schema: pa.Schema
    event_time: str
    event_id: str

    @property
    def entities(self) -> Sequence[EntityLike]:
        """The entities that the events are about."""
        ...


@dataclass(frozen=True)
class AppendResult:
    """What an append did.

    Attributes:
        accepted: Events that are new in at least one of the source's tables.
        duplicates: Events that were there already, or more than once in the append.
        versions: The version that holds them, by entity.
        repeated: Events of streams that a table had already, by entity.
    """

    accepted: int
    duplicates: int
    versions: Mapping[str, int]
    repeated: Mapping[str, pa.Table]


class EventLog:
    """All events. Cheap and picklable; nothing is opened before its first use.

    Args:
        root: Folder, or a URL such as ``s3://…``.
        storage_options: Options of the object store.
        n_buckets: Fixed when a table is created; see `BucketCountError`.
    """

    def __init__(self, root: str, storage_options: Mapping[str, str] | None = None, n_buckets: int = 16) -> None:
        self.root = absolute_root(root)
        self.storage_options = dict(storage_options or {})
        self.n_buckets = n_buckets
        self._hashes = HashCache(_CACHED_HASHES)
        self._kept: OpenTables | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return EventLog, (self.root, self.storage_options, self.n_buckets)

    def __repr__(self) -> str:
        return f"EventLog({self.root!r}, n_buckets={self.n_buckets})"

    def keeping(self, tables: OpenTables) -> EventLog:
        """The same log, whose tables stay open: for one thread, that reads or appends again and again."""
        log = EventLog(self.root, self.storage_options, self.n_buckets)
        log._hashes = self._hashes
        log._kept = tables
        return log

    @property
    def buckets(self) -> range:
        """All buckets."""
        return range(self.n_buckets)

    # ── Appending ────────────────────────────────────────────────────────────────

    def append(
        self,
        source: SourceLike,
        events: pa.Table,
        *,
        ingested_us: int,
        entity: EntityLike | None = None,
        progress: Progress | None = None,
    ) -> AppendResult:
        """Append events: one commit for each entity's table.

        Args:
            source: Where they come from.
            events: The source's columns, ``n`` rows; a column ``_ingested_us`` overrides ``ingested_us``.
            ingested_us: When they were ingested, microseconds.
            entity: Append to this entity's table only; None: to each.
            progress: Streams that this applies; needs ``entity``, since each table has its own.

        Raises:
            SchemaMismatchError: If the events don't fit the source's schema.
            KeyColumnError: If a key, id or event time is null.
            StaleProgressError: If somebody else has applied entries of the streams meanwhile.
            BucketCountError: If the log was created with another number of buckets.
        """
        with self.bulk(source, ingested_us=ingested_us, entity=entity) as bulk:
            bulk.add(events)
            return bulk.commit(progress)

    def bulk(self, source: SourceLike, *, ingested_us: int, entity: EntityLike | None = None) -> BulkAppend:
        """Append many batches of events in one commit for each entity's table: all of them or none.

        Args:
            source: Where they come from.
            ingested_us: When they were ingested, microseconds.
            entity: Append to this entity's table only; None: to each.
        """
        return BulkAppend(self, source, ingested_us, tuple(source.entities) if entity is None else (entity,))

    def compact(self, source: SourceLike, entity: EntityLike, *, min_files: int = 32) -> int:
        """Merge the small files that many little appends leave.

        Args:
            source: Where the events come from.
            entity: By whose key they are bucketed.
            min_files: Buckets with fewer small files are left alone.

        Returns:
            How many files were merged.
        """
        return self.table(source, entity).compact(
            min_files=min_files,
            max_rows=_SMALL_FILE_ROWS,
            sort_by=source.event_time,
            ranges=[source.event_time, INGESTED],
            repetitive=repetitive_columns(source.schema, source.event_id),
        )

    def table(self, source: SourceLike, entity: EntityLike) -> Table:
        """The Delta table of a source and entity."""
        return Table(joined(self.root, "events", source.name, entity.name), self.storage_options, BUCKET, self._kept)

    def ensure_table(self, source: SourceLike, entity: EntityLike) -> DeltaTable:
        """Open a table for writing; create it when absent.

        Raises:
            BucketCountError: If it was created with another number of buckets.
        """
        created = self.table(source, entity).ensure(stored_schema(source), {_CONFIGURED_BUCKETS: str(self.n_buckets)})
        return self._checked(created)

    def _checked(self, table: DeltaTable) -> DeltaTable:
        created_with = _buckets_of(table)
        if created_with != self.n_buckets:
            raise BucketCountError(table.table_uri, created_with, self.n_buckets)
        return table

    @property
    def hashes(self) -> HashCache:
        """Ids' hashes of files that were looked at lately."""
        return self._hashes

    # ── Reading ──────────────────────────────────────────────────────────────────

    def read_bucket(
        self,
        source: SourceLike,
        entity: EntityLike,
        bucket: int,
        *,
        columns: Sequence[str] | None = None,
        min_time_us: int | None = None,
        max_time_us: int | None = None,
        known_at_us: int | None = None,
        version: int | None = None,
        raw: bool = False,
    ) -> pa.Table:
        """Read one bucket's events, in no order; a log that doesn't exist yet reads as empty.

        Args:
            source: Where they come from.
            entity: By whose key they are bucketed.
            bucket: Which bucket.
            columns: Of the source's, ``_ingested_us``, ``_id_hash`` and ``_tie``; None: the source's and
                all of these.
            min_time_us: Only events at or after this instant.
            max_time_us: Only events before this instant.
            known_at_us: Only events ingested at or before this instant.
            version: As the log was at this version, as `version` gave it.
            raw: As the files have it, which is quicker: repetitive texts come as dictionaries, and the bounds of
                time leave out nothing smaller than a row group.

        Raises:
            UnknownColumnError: If a column doesn't exist.
            BucketCountError: If the log was created with another number of buckets.
        """
        return self.opened(source, entity, version).read(
            [bucket],
            columns=columns,
            min_time_us=min_time_us,
            max_time_us=max_time_us,
            known_at_us=known_at_us,
            raw=raw,
        )

    def read(
        self,
        source: SourceLike,
        entity: EntityLike,
        *,
        columns: Sequence[str] | None = None,
        min_time_us: int | None = None,
        max_time_us: int | None = None,
        known_at_us: int | None = None,
        version: int | None = None,
    ) -> pa.Table:
        """Read the events of all buckets, as `read_bucket` does one's."""
        return self.opened(source, entity, version).read(
            None, columns=columns, min_time_us=min_time_us, max_time_us=max_time_us, known_at_us=known_at_us
        )

    def opened(self, source: SourceLike, entity: EntityLike, version: int | None = None) -> LogVersion:
        """A version of a table, for many reads of it.

        Args:
            source: Where the events come from.
            entity: By whose key they are bucketed.
            version: As `version` gave it; None: the current one.
        """
        place = self.table(source, entity)
        table = None if version == NO_VERSION else place.open(version)
        return LogVersion(
            place=place,
            source=source.name,
            event_time=source.event_time,
            columns=(*source.schema.names, INGESTED, ID_HASH, TIE),
            texts=tuple(repetitive_texts(source.schema, source.event_id)),
            stored=stored_schema(source) if table is None else arrow_schema(table),
            version=NO_VERSION if table is None else table.version(),
            files=None if table is None else place.files(table),
            created_with=self.n_buckets if table is None else _buckets_of(table),
            n_buckets=self.n_buckets,
        )

    def version(self, source: SourceLike, entity: EntityLike) -> int:
        """The current version of a table; -1 when there is none yet."""
        table = self.table(source, entity).open()
        return NO_VERSION if table is None else table.version()

    def progress(self, source: SourceLike, entity: EntityLike, streams: Sequence[str]) -> dict[str, StreamId | None]:
        """The last entry of each stream that is in a table; None where nothing is."""
        place = self.table(source, entity)
        return place.progress(place.open(), streams)

    def statistics(
        self,
        source: SourceLike,
        entity: EntityLike,
        *,
        min_time_us: int | None = None,
        max_time_us: int | None = None,
    ) -> LogStatistics:
        """What the log holds of a source and entity, or a read of some time would open; without reading a row.

        Args:
            source: Where the events come from.
            entity: By whose key they are bucketed.
            min_time_us: Only files that may hold an event at or after this instant.
            max_time_us: Only files that may hold an event before this instant.
        """
        return self.opened(source, entity).statistics(min_time_us=min_time_us, max_time_us=max_time_us)


class BulkAppend:
    """Many batches, one commit for each entity's table. Use it as a context manager."""

    def __init__(self, log: EventLog, source: SourceLike, ingested_us: int, entities: Sequence[EntityLike]) -> None:
        self._log, self._source, self._ingested_us = log, source, ingested_us
        self._spools = {entity.name: Spool() for entity in entities}
        self._entities = entities
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for spool in self._spools.values():
            spool.close()

    def add(self, events: pa.Table) -> None:
        """Take a batch; it is held in memory up to a limit, then on disk, until `commit`.

        Args:
            events: The source's columns; a column ``_ingested_us`` overrides the append's.

        Raises:
            SchemaMismatchError: If they don't fit the source's schema.
            KeyColumnError: If a key, id or event time is null.
        """
        what = f"events of {self._source.name!r}"
        rows = conform(events, self._source.schema, what=what)
        for column in (self._source.event_time, self._source.event_id):
            nulls = rows.column(column).null_count
            if nulls:
                raise KeyColumnError(column, what, f"is null in {nulls} rows", tuple(rows.column_names))
        if INGESTED in events.column_names:
            ingested = cast_column(events.column(INGESTED), pa.int64())
        else:
            ingested = pa.array(np.full(rows.num_rows, self._ingested_us))
        hashes = pa.array(hash64(rows.column(self._source.event_id)).view(np.int64))
        rows = rows.append_column(INGESTED, ingested).append_column(ID_HASH, hashes)
        for entity in self._entities:
            self._spools[entity.name].add(rows, entity.buckets(entity.encode(rows, what=what), self._log.n_buckets))
        self.rows += rows.num_rows

    def commit(self, progress: Progress | None = None) -> AppendResult:
        """Make all of it part of the log.

        Args:
            progress: Streams that this applies.

        Raises:
            StaleProgressError: If somebody else has applied entries of the streams meanwhile.
            BucketCountError: If the log was created with another number of buckets.
        """
        accepted: list[int] = []
        versions: dict[str, int] = {}
        repeated: dict[str, pa.Table] = {}
        for entity in self._entities:
            self._log.ensure_table(self._source, entity)
            append = EntityAppend(
                table=self._log.table(self._source, entity),
                schema=stored_schema(self._source),
                event_time=self._source.event_time,
                event_id=self._source.event_id,
                spool=self._spools[entity.name],
                hashes=self._log.hashes,
                progress=progress,
            )
            versions[entity.name] = append.commit()
            accepted.append(append.accepted)
            repeated[entity.name] = append.repeated
        return AppendResult(max(accepted), self.rows - max(accepted), versions, repeated)


def stored_schema(source: SourceLike) -> pa.Schema:
    """The columns of a source's tables."""
    added = (pa.field(INGESTED, pa.int64()), pa.field(ID_HASH, pa.int64()), pa.field(BUCKET, pa.int32()))
    return pa.schema([*(field.with_nullable(True) for field in source.schema), *added])


def _buckets_of(table: DeltaTable) -> int:
    """The number of buckets that a table was created with."""
    return int(table.metadata().configuration.get(_CONFIGURED_BUCKETS, 0))
