"""Point-in-time joins over Ray: a spine and the event log in, feature rows out.

The event log is bucketed by entity, so the join needs no shuffle of events: the spine is
split by the same buckets, and each bucket is one independent task that reads its events
once, for all views of the same source. Memory holds a bucket at a time for each running task.

* A table's join that is small (`heliostat.features.bucket_join.SMALL_JOIN`) is answered by this process, to
  the same bits: tasks would take longer to begin than it takes.
* Exactly one row comes out for each row of the spine, in its order, with its own columns.
* A spine may carry the keys of several entities: each view joins by its own.
* All tasks read one version of the event log, whatever is appended meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import ray
import ray.data

from heliostat.errors import SpineError
from heliostat.features.aggregations import FloatArray
from heliostat.features.bucket_join import (
    SMALL_JOIN,
    EntityJoin,
    JoinRows,
    check_spine,
    entity_joins,
    single_features,
    spine_instants_us,
)
from heliostat.features.bucket_tasks import over_blocks, over_buckets
from heliostat.features.definitions import Entity, EventSource, FeatureRef, FeatureView
from heliostat.features.request import request_columns
from heliostat.schema import BUCKET, TIMESTAMP, arrow_type
from heliostat.storage.event_log import EventLog
from heliostat.storage.log_version import LogVersion

Spine = TypeVar("Spine")

AS_OF = "as_of"
SPINE_ROW = "spine_row"
"""A Ray Dataset has no order to rely on: its result carries each row's number in the spine."""

_KEY = "_key"
_INSTANT = "_as_of_us"
_ROW = "_row"
_INPUT = "_input_"


def historical_features(
    spine: Spine,
    features: Sequence[FeatureView | FeatureRef],
    event_log: EventLog,
    *,
    as_of: str = AS_OF,
    known_at_us: int | None = None,
    concurrency: int | None = None,
) -> Spine:
    """Join features to a spine, each row as of its own instant; needs a connected Ray, unless the join is small.

    Args:
        spine: An Arrow table, a pandas frame or a Ray Dataset with the key columns of the views'
            entities and a column of instants; any rows, repeated and unknown entities included.
        features: Views (all of their features) and single features ``view["feature"]``.
        event_log: Where the views' events are.
        as_of: The column of instants: timestamps (without a zone: UTC) or int64 microseconds.
        known_at_us: Only events ingested at or before this instant count: what was known then.
        concurrency: Most buckets at a time; None: as many as Ray has CPUs.

    Returns:
        What was given, in the same type, with a float64 column ``view__feature`` for each feature, null
        as NaN. Tables and frames keep their order; a Dataset gets the column ``spine_row`` instead,
        unless it has one already, and its rows may come in any order.

    Raises:
        UnknownFeatureError: If a view doesn't define a feature.
        DuplicateNameError: If a feature is asked for twice.
        KeyColumnError: If a key column is missing, null or of the wrong type.
        SpineError: If the instants are missing, null or of the wrong type, a column has a feature's name, or
            a column that features take from the request is missing or of the wrong type.
        StorageError: If the event log can't be read.
    """
    joins = entity_joins(features, event_log, known_at_us)
    names = [ref.name for ref in single_features(features)]
    result: Any
    if isinstance(spine, ray.data.Dataset):
        result = _join_dataset(spine, joins, as_of, concurrency)
    elif isinstance(spine, pd.DataFrame):
        result = _join_frame(spine, joins, names, as_of, concurrency)
    elif isinstance(spine, pa.Table):
        found = _joined(spine, joins, as_of, concurrency)
        result = _with(spine, {name: found[name] for name in names})
    else:
        kinds = "give an Arrow table, a pandas frame or a Ray Dataset"
        raise SpineError(f"is a {type(spine).__name__}", kinds, ())
    return cast("Spine", result)


def entities_known(
    event_log: EventLog, source: EventSource, entity: Entity, as_of_us: int, *, known_at_us: int | None = None
) -> pa.Table:
    """All entities with an event before an instant, one task a bucket.

    Args:
        event_log: Where the events are.
        source: Whose events.
        entity: By whose key.
        as_of_us: The instant, microseconds.
        known_at_us: Only events ingested at or before this instant count.

    Returns:
        The entity's key columns, one row an entity, in no order.

    Raises:
        StorageError: If the event log can't be read.
    """
    task = _Known(event_log.opened(source, entity), entity, as_of_us, known_at_us)
    return _collected(over_buckets(task, event_log.n_buckets), _key_schema(entity))


def snapshot(
    view: FeatureView,
    event_log: EventLog,
    *,
    as_of_us: int,
    entities: pa.Table | None = None,
    known_at_us: int | None = None,
    concurrency: int | None = None,
) -> pa.Table:
    """A view's features of many entities at one instant; needs a connected Ray.

    Args:
        view: The view.
        event_log: Where its events are.
        as_of_us: The instant, microseconds.
        entities: Key columns of those wanted; None: all with an event before the instant.
        known_at_us: Only events ingested at or before this instant count.
        concurrency: Most buckets at a time; None: as many as Ray has CPUs.

    Returns:
        Key columns, ``as_of`` and the features as ``view__feature``, those without that need something of a
        request; in the order of ``entities``, or in none.

    Raises:
        KeyColumnError: If a key column is missing, null or of the wrong type.
        StorageError: If the event log can't be read.
    """
    stored = [view[name] for name in view.stored_features]
    if entities is not None:
        keys = entities.select(list(view.entity.key_columns)) if _has_keys(entities, view.entity) else entities
        return historical_features(
            _at_instant(keys, as_of_us), stored, event_log, known_at_us=known_at_us, concurrency=concurrency
        )
    join = entity_joins(stored, event_log, known_at_us)[0]
    known = _Known(join.logs[view.source.name], view.entity, as_of_us, known_at_us)
    tasks = over_buckets(_Snapshot(join, known), event_log.n_buckets, concurrency=concurrency)
    features = [(ref.name, pa.float64()) for ref in stored]
    return _collected(tasks, pa.schema([*_key_schema(view.entity), (AS_OF, TIMESTAMP), *features]))


# ── What a task does ────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _BucketTask:
    """Computes the features of blocks that hold (bucket, key, instant, row)."""

    join: EntityJoin

    def __call__(self, block: pa.Table) -> pa.Table:
        columns = self.join.all_columns(
            block.column(BUCKET).to_numpy(),
            block.column(_KEY).combine_chunks(),
            block.column(_INSTANT).to_numpy(),
            {name: block.column(_INPUT + name).to_numpy() for name in self.join.request},
        )
        return pa.table({_ROW: block.column(_ROW), **{name: pa.array(each) for name, each in columns.items()}})


@dataclass(frozen=True, eq=False)
class _AppendTask:
    """Appends the features to blocks of a spine."""

    join: EntityJoin
    as_of: str

    def __call__(self, block: pa.Table) -> pa.Table:
        if BUCKET not in block.column_names:
            return block  # an empty partition, without a schema
        buckets, rows = block.column(BUCKET).to_numpy(), block.drop_columns([BUCKET])
        keys = self.join.entity.encode(rows, what="the spine")
        request = request_columns(rows, self.join.request)
        return _with(rows, self.join.all_columns(buckets, keys, spine_instants_us(rows, self.as_of), request))


@dataclass(frozen=True, eq=False)
class _BucketsTask:
    """Appends each row's bucket."""

    join: EntityJoin
    as_of: str

    def __call__(self, block: pa.Table) -> pa.Table:
        spine_instants_us(block, self.as_of)
        keys = self.join.entity.encode(block, what="the spine")
        return block.append_column(BUCKET, pa.array(self.join.entity.buckets(keys, self.join.n_buckets)))


@dataclass(frozen=True, eq=False)
class _Known:
    """Finds the entities of buckets with an event before an instant."""

    log: LogVersion
    entity: Entity
    as_of_us: int
    known_at_us: int | None

    def __call__(self, bucket: int) -> pa.Table:
        """Key columns of one bucket's entities."""
        columns = list(self.entity.key_columns)
        keys = self.log.read([bucket], columns=columns, max_time_us=self.as_of_us, known_at_us=self.known_at_us)
        return keys.group_by(keys.column_names, use_threads=False).aggregate([]).cast(_key_schema(self.entity))


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """Computes the features of all known entities of buckets."""

    join: EntityJoin
    known: _Known

    def __call__(self, bucket: int) -> pa.Table:
        rows = _at_instant(self.known(bucket), self.known.as_of_us)
        keys = self.join.entity.encode(rows, what="known entities")
        buckets = np.full(rows.num_rows, bucket, dtype=np.int32)
        return _with(rows, self.join.all_columns(buckets, keys, np.full(rows.num_rows, self.known.as_of_us)))


# ── Bringing rows to tasks and back ─────────────────────────────────────────────────


def _join_frame(
    spine: pd.DataFrame, joins: Sequence[EntityJoin], names: Sequence[str], as_of: str, concurrency: int | None
) -> pd.DataFrame:
    """A frame's own columns stay as they are, its index too."""
    columns = [str(name) for name in spine.columns]
    check_spine(columns, joins, as_of)
    needed = dict.fromkeys([as_of, *(name for join in joins for name in (*join.entity.key_columns, *join.request))])
    present = spine[[name for name in needed if name in columns]]
    found = _joined(pa.Table.from_pandas(present, preserve_index=False), joins, as_of, concurrency)
    return spine.assign(**{name: found[name] for name in names})


def _joined(
    spine: pa.Table, joins: Sequence[EntityJoin], as_of: str, concurrency: int | None
) -> dict[str, FloatArray]:
    """The features of a table's rows, by name, in its order."""
    check_spine(spine.column_names, joins, as_of)
    asked = JoinRows.of(spine, joins, as_of)
    columns: dict[str, FloatArray] = {name: np.empty(0) for join in joins for name in join.names}
    if spine.num_rows == 0:
        return columns
    if sum(rows.size for rows in asked) <= SMALL_JOIN:
        for rows in asked:
            columns |= rows.columns_here(concurrency)
        return columns
    columns = {name: np.full(spine.num_rows, np.nan) for name in columns}
    for rows in asked:
        blocks = _bucket_blocks(rows)
        blocks.sort(key=partial(_events_behind, rows.events_by_bucket), reverse=True)
        for batch in over_blocks(_BucketTask(rows.join), blocks, concurrency=concurrency):
            places = batch.column(_ROW).to_numpy()
            for name in rows.join.names:
                columns[name][places] = batch.column(name).to_numpy()
    return columns


def _bucket_blocks(rows: JoinRows) -> list[pa.Table]:
    """One block for each bucket that has rows."""
    buckets = rows.buckets
    order = np.argsort(buckets.astype(np.uint16) if buckets.max() < 2**16 else buckets, kind="stable")
    whole = pa.table(
        {
            BUCKET: pa.array(buckets[order]),
            _KEY: rows.keys.take(pa.array(order)),
            _INSTANT: pa.array(rows.as_of_us[order]),
            _ROW: pa.array(order),
            **{_INPUT + name: pa.array(values[order]) for name, values in rows.request.items()},
        }
    )
    begins = np.flatnonzero(np.diff(buckets[order], prepend=-1))
    ends = np.append(begins[1:], len(order))
    return [whole.slice(begin, end - begin) for begin, end in zip(begins, ends, strict=True)]


def _events_behind(events_by_bucket: Mapping[int, int], block: pa.Table) -> int:
    """How much work a block is: the largest first, so that none of them is left over at the end."""
    return events_by_bucket.get(block.column(BUCKET)[0].as_py(), 0)


def _join_dataset(
    spine: ray.data.Dataset, joins: Sequence[EntityJoin], as_of: str, concurrency: int | None
) -> ray.data.Dataset:
    """The same for a Dataset: its rows are shuffled by bucket once for each entity."""
    schema = spine.schema()
    if schema is None:
        raise SpineError("is empty and has no columns", "give a Dataset with rows", ())
    check_spine(schema.names, joins, as_of, reserved=(BUCKET,))
    result = spine if SPINE_ROW in schema.names else _numbered(spine)
    tasks = ray.data.TaskPoolStrategy(size=concurrency)
    for join in joins:
        n_blocks = min(join.n_buckets, 2 * int(ray.cluster_resources().get("CPU", 1)))
        result = (
            result.map_batches(_BucketsTask(join, as_of), batch_size=None, batch_format="pyarrow", compute=tasks)
            .repartition(n_blocks, keys=[BUCKET])
            .map_batches(_AppendTask(join, as_of), batch_size=None, batch_format="pyarrow", compute=tasks)
        )
    return result


def _numbered(spine: ray.data.Dataset) -> ray.data.Dataset:
    """The spine with each row's number; its blocks stay in Ray's memory."""
    blocks = spine.to_arrow_refs()
    count, number = ray.remote(_count_rows), ray.remote(_number_rows)
    rows = ray.get([count.remote(block) for block in blocks])
    starts = np.cumsum([0, *rows[:-1]]).tolist()
    return ray.data.from_arrow_refs(
        [number.remote(block, start) for block, start in zip(blocks, starts, strict=True)]
    )


def _count_rows(block: pa.Table) -> int:
    return int(block.num_rows)


def _number_rows(block: pa.Table, start: int) -> pa.Table:
    return block.append_column(SPINE_ROW, pa.array(np.arange(start, start + block.num_rows)))


def _collected(parts: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """All rows of tasks' tables."""
    return pa.concat_tables([schema.empty_table(), *(part.select(schema.names).cast(schema) for part in parts)])


def _with(rows: pa.Table, columns: Mapping[str, FloatArray]) -> pa.Table:
    """The rows with more columns."""
    for name, values in columns.items():
        rows = rows.append_column(name, pa.array(values))
    return rows


def _key_schema(entity: Entity) -> pa.Schema:
    return pa.schema([(column, arrow_type(dtype)) for column, dtype in entity.keys.items()])


def _has_keys(table: pa.Table, entity: Entity) -> bool:
    return set(entity.key_columns) <= set(table.column_names)


def _at_instant(keys: pa.Table, as_of_us: int) -> pa.Table:
    """Keys with a column ``as_of``."""
    return keys.append_column(AS_OF, pa.array(np.full(keys.num_rows, as_of_us), pa.int64()).cast(TIMESTAMP))
