"""Point-in-time joins over Ray Data: a spine and the event log in, feature rows out.

The event log is bucketed by entity, so the join needs no shuffle of events: the spine is
split by the same buckets, and each bucket is one independent task that reads its events
once, for all views of the same source. Memory holds a bucket at a time for each running task.

* Exactly one row comes out for each row of the spine, in its order, with its own columns.
* A spine may carry the keys of several entities: each view joins by its own.
* All tasks read one version of the event log, whatever is appended meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.exceptions import RayError

from heliostat.errors import DuplicateNameError, HeliostatError, SpineError
from heliostat.features.aggregations import FloatArray
from heliostat.features.definitions import Entity, EventSource, FeatureRef, FeatureView
from heliostat.features.offline import compute_features, earliest_us, needed_columns
from heliostat.schema import BUCKET, INGESTED, TIE, TIMESTAMP, arrow_type, cast_column, times_us
from heliostat.storage.event_log import EventLog

IntArray = NDArray[np.int64]
Spine = TypeVar("Spine")

AS_OF = "as_of"
SPINE_ROW = "spine_row"
"""A Ray Dataset has no order to rely on: its result carries each row's number in the spine."""

_KEY = "_key"
_INSTANT = "_as_of_us"
_ROW = "_row"


def historical_features(
    spine: Spine,
    features: Sequence[FeatureView | FeatureRef],
    event_log: EventLog,
    *,
    as_of: str = AS_OF,
    known_at_us: int | None = None,
    concurrency: int | None = None,
) -> Spine:
    """Join features to a spine, each row as of its own instant; needs a connected Ray.

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
        SpineError: If the instants are missing, null or of the wrong type, or a column has a feature's name.
        StorageError: If the event log can't be read.
    """
    joins = _joins(features, event_log, known_at_us)
    names = [ref.name for ref in _single(features)]
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
    task = _Known(event_log, source, entity, event_log.version(source, entity), as_of_us, known_at_us)
    return _collected(_bucket_numbers(event_log).map_batches(task, batch_size=None), _key_schema(entity))


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
        Key columns, ``as_of`` and the features as ``view__feature``; in the order of ``entities``, or in none.

    Raises:
        KeyColumnError: If a key column is missing, null or of the wrong type.
        StorageError: If the event log can't be read.
    """
    if entities is not None:
        keys = entities.select(list(view.entity.key_columns)) if _has_keys(entities, view.entity) else entities
        return historical_features(
            _at_instant(keys, as_of_us), [view], event_log, known_at_us=known_at_us, concurrency=concurrency
        )
    join = _joins([view], event_log, known_at_us)[0]
    known = _Known(event_log, view.source, view.entity, join.versions[view.source.name], as_of_us, known_at_us)
    tasks = _bucket_numbers(event_log).map_batches(_Snapshot(join, known), batch_size=None, concurrency=concurrency)
    features = [(ref.name, pa.float64()) for ref in view]
    return _collected(tasks, pa.schema([*_key_schema(view.entity), (AS_OF, TIMESTAMP), *features]))


# ── What a task does ────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Join:
    """The features of one entity; picklable, and cheap.

    Attributes:
        entity: By whose key.
        sources: Its views, those of one source together.
        names: Qualified names of the features asked for.
        event_log: Where the events are.
        versions: The version of each source's log that is read, by name.
        known_at_us: Only events ingested by then count.
    """

    entity: Entity
    sources: tuple[tuple[FeatureView, ...], ...]
    names: tuple[str, ...]
    event_log: EventLog
    versions: Mapping[str, int]
    known_at_us: int | None

    def columns(self, bucket: int, keys: pa.Array, as_of_us: IntArray) -> dict[str, FloatArray]:
        """The features of one bucket's rows, shape ``(m,)`` each; each source's events are read once."""
        columns: dict[str, FloatArray] = {}
        for views in self.sources:
            source = views[0].source
            events = self.event_log.read_bucket(
                source,
                self.entity,
                bucket,
                columns=[*needed_columns(views), TIE, *(() if self.known_at_us is None else (INGESTED,))],
                min_time_us=earliest_us(views, as_of_us),
                max_time_us=int(as_of_us.max()),
                known_at_us=self.known_at_us,
                version=_existing(self.versions[source.name]),
            )
            columns |= compute_features(
                views, events, keys, as_of_us, known_at_us=self.known_at_us, deduplicate=False
            )
        return {name: columns[name] for name in self.names}

    def all_columns(self, buckets: NDArray[np.int32], keys: pa.Array, as_of_us: IntArray) -> dict[str, FloatArray]:
        """The same for rows of any buckets, one bucket after the other."""
        found = np.unique(buckets)
        if len(found) == 1:
            return self.columns(int(found[0]), keys, as_of_us)
        columns = {name: np.full(len(keys), np.nan) for name in self.names}
        for bucket in found:
            rows = np.flatnonzero(buckets == bucket)
            for name, values in self.columns(int(bucket), keys.take(pa.array(rows)), as_of_us[rows]).items():
                columns[name][rows] = values
        return columns


@dataclass(frozen=True, eq=False)
class _BucketTask:
    """Computes the features of blocks that hold (bucket, key, instant, row)."""

    join: _Join

    def __call__(self, block: pa.Table) -> pa.Table:
        columns = self.join.all_columns(
            block.column(BUCKET).to_numpy(),
            block.column(_KEY).combine_chunks(),
            block.column(_INSTANT).to_numpy(),
        )
        return pa.table({_ROW: block.column(_ROW), **{name: pa.array(each) for name, each in columns.items()}})


@dataclass(frozen=True, eq=False)
class _AppendTask:
    """Appends the features to blocks of a spine."""

    join: _Join
    as_of: str

    def __call__(self, block: pa.Table) -> pa.Table:
        if BUCKET not in block.column_names:
            return block  # an empty partition, without a schema
        buckets, rows = block.column(BUCKET).to_numpy(), block.drop_columns([BUCKET])
        keys = self.join.entity.encode(rows, what="the spine")
        return _with(rows, self.join.all_columns(buckets, keys, _instants(rows, self.as_of)))


@dataclass(frozen=True, eq=False)
class _BucketsTask:
    """Appends each row's bucket."""

    join: _Join
    as_of: str

    def __call__(self, block: pa.Table) -> pa.Table:
        _instants(block, self.as_of)
        keys = self.join.entity.encode(block, what="the spine")
        return block.append_column(BUCKET, pa.array(self.join.entity.buckets(keys, self.join.event_log.n_buckets)))


@dataclass(frozen=True, eq=False)
class _Known:
    """Finds the entities of buckets with an event before an instant."""

    event_log: EventLog
    source: EventSource
    entity: Entity
    version: int
    as_of_us: int
    known_at_us: int | None

    def bucket(self, bucket: int) -> pa.Table:
        """Key columns of one bucket's entities."""
        keys = self.event_log.read_bucket(
            self.source,
            self.entity,
            bucket,
            columns=list(self.entity.key_columns),
            max_time_us=self.as_of_us,
            known_at_us=self.known_at_us,
            version=_existing(self.version),
        )
        return keys.group_by(keys.column_names, use_threads=False).aggregate([]).cast(_key_schema(self.entity))

    def __call__(self, numbers: Mapping[str, IntArray]) -> pa.Table:
        return pa.concat_tables([self.bucket(int(number)) for number in numbers["id"]])


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """Computes the features of all known entities of buckets."""

    join: _Join
    known: _Known

    def __call__(self, numbers: Mapping[str, IntArray]) -> pa.Table:
        return pa.concat_tables([self._bucket(int(number)) for number in numbers["id"]])

    def _bucket(self, bucket: int) -> pa.Table:
        rows = _at_instant(self.known.bucket(bucket), self.known.as_of_us)
        keys = self.join.entity.encode(rows, what="known entities")
        buckets = np.full(rows.num_rows, bucket, dtype=np.int32)
        return _with(rows, self.join.all_columns(buckets, keys, np.full(rows.num_rows, self.known.as_of_us)))


# ── Bringing rows to tasks and back ─────────────────────────────────────────────────


def _join_frame(
    spine: pd.DataFrame, joins: Sequence[_Join], names: Sequence[str], as_of: str, concurrency: int | None
) -> pd.DataFrame:
    """A frame's own columns stay as they are, its index too."""
    columns = [str(name) for name in spine.columns]
    _check_columns(columns, joins, as_of)
    needed = dict.fromkeys([as_of, *(column for join in joins for column in join.entity.key_columns)])
    present = spine[[name for name in needed if name in columns]]
    found = _joined(pa.Table.from_pandas(present, preserve_index=False), joins, as_of, concurrency)
    return spine.assign(**{name: found[name] for name in names})


def _joined(spine: pa.Table, joins: Sequence[_Join], as_of: str, concurrency: int | None) -> dict[str, FloatArray]:
    """The features of a table's rows, by name, in its order."""
    _check_columns(spine.column_names, joins, as_of)
    as_of_us = _instants(spine, as_of)
    encoded = [join.entity.encode(spine, what="the spine") for join in joins]
    columns = {name: np.full(spine.num_rows, np.nan) for join in joins for name in join.names}
    if spine.num_rows == 0:
        return columns
    for join, keys in zip(joins, encoded, strict=True):
        blocks = _bucket_blocks(keys, as_of_us, join.entity.buckets(keys, join.event_log.n_buckets))
        tasks = ray.data.from_arrow(blocks).map_batches(
            _BucketTask(join), batch_size=None, batch_format="pyarrow", zero_copy_batch=True, concurrency=concurrency
        )
        for batch in _batches(tasks):
            rows = batch.column(_ROW).to_numpy()
            for name in join.names:
                columns[name][rows] = batch.column(name).to_numpy()
    return columns


def _bucket_blocks(keys: pa.Array, as_of_us: IntArray, buckets: NDArray[np.int32]) -> list[pa.Table]:
    """One block for each bucket that has rows."""
    order = np.argsort(buckets.astype(np.uint16) if buckets.max() < 2**16 else buckets, kind="stable")
    whole = pa.table(
        {
            BUCKET: pa.array(buckets[order]),
            _KEY: keys.take(pa.array(order)),
            _INSTANT: pa.array(as_of_us[order]),
            _ROW: pa.array(order),
        }
    )
    begins = np.flatnonzero(np.diff(buckets[order], prepend=-1))
    ends = np.append(begins[1:], len(order))
    return [whole.slice(begin, end - begin) for begin, end in zip(begins, ends, strict=True)]


def _join_dataset(
    spine: ray.data.Dataset, joins: Sequence[_Join], as_of: str, concurrency: int | None
) -> ray.data.Dataset:
    """The same for a Dataset: its rows are shuffled by bucket once for each entity."""
    schema = spine.schema()
    if schema is None:
        raise SpineError("is empty and has no columns", "give a Dataset with rows", ())
    _check_columns(schema.names, joins, as_of, reserved=(BUCKET,))
    result = spine if SPINE_ROW in schema.names else _numbered(spine)
    for join in joins:
        n_blocks = min(join.event_log.n_buckets, 2 * int(ray.cluster_resources().get("CPU", 1)))
        result = (
            result.map_batches(
                _BucketsTask(join, as_of), batch_size=None, batch_format="pyarrow", concurrency=concurrency
            )
            .repartition(n_blocks, keys=[BUCKET])
            .map_batches(_AppendTask(join, as_of), batch_size=None, batch_format="pyarrow", concurrency=concurrency)
        )
    return result


def _numbered(spine: ray.data.Dataset) -> ray.data.Dataset:
    rows = spine.materialize()
    return rows.zip(ray.data.range(rows.count()).rename_columns({"id": SPINE_ROW}))


def _bucket_numbers(event_log: EventLog) -> ray.data.Dataset:
    """One block a bucket, with its number as ``id``."""
    return ray.data.range(event_log.n_buckets, override_num_blocks=event_log.n_buckets)


def _batches(rows: ray.data.Dataset) -> Iterator[pa.Table]:
    """A Dataset's blocks, to the end; an error of ours inside a task comes out as itself."""
    try:
        for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            if batch.num_rows:
                yield batch
    except RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HeliostatError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise cause from None


def _collected(rows: ray.data.Dataset, schema: pa.Schema) -> pa.Table:
    """All rows of a Dataset."""
    return pa.concat_tables(
        [schema.empty_table(), *(batch.select(schema.names).cast(schema) for batch in _batches(rows))]
    )


def _with(rows: pa.Table, columns: Mapping[str, FloatArray]) -> pa.Table:
    """The rows with more columns."""
    for name, values in columns.items():
        rows = rows.append_column(name, pa.array(values))
    return rows


# ── What is asked for ───────────────────────────────────────────────────────────────


def _single(features: Sequence[FeatureView | FeatureRef]) -> list[FeatureRef]:
    """Every single feature that is asked for, in order."""
    refs: list[FeatureRef] = []
    for each in features:
        refs.extend(each if isinstance(each, FeatureView) else [each.view[each.feature]])
    return refs


def _joins(features: Sequence[FeatureView | FeatureRef], event_log: EventLog, known_at_us: int | None) -> list[_Join]:
    """One join for each entity."""
    asked: dict[str, FeatureView] = {}
    for ref in _single(features):
        if ref.name in asked:
            raise DuplicateNameError("feature", ref.name, "the point-in-time join")
        asked[ref.name] = ref.view
    entities = {view.entity.name: view.entity for view in asked.values()}
    joins: list[_Join] = []
    for entity in entities.values():
        own = {name: view for name, view in asked.items() if view.entity.name == entity.name}
        views = {view.name: view for view in own.values()}.values()
        sources = {view.source.name: view.source for view in views}
        joins.append(
            _Join(
                entity=entity,
                sources=tuple(tuple(each for each in views if each.source.name == name) for name in sources),
                names=tuple(own),
                event_log=event_log,
                versions={name: event_log.version(source, entity) for name, source in sources.items()},
                known_at_us=known_at_us,
            )
        )
    return joins


def _existing(version: int) -> int | None:
    """The version to read; None where there was no log yet."""
    return version if version >= 0 else None


def _key_schema(entity: Entity) -> pa.Schema:
    return pa.schema([(column, arrow_type(dtype)) for column, dtype in entity.keys.items()])


def _has_keys(table: pa.Table, entity: Entity) -> bool:
    return set(entity.key_columns) <= set(table.column_names)


def _at_instant(keys: pa.Table, as_of_us: int) -> pa.Table:
    """Keys with a column ``as_of``."""
    return keys.append_column(AS_OF, pa.array(np.full(keys.num_rows, as_of_us), pa.int64()).cast(TIMESTAMP))


def _check_columns(
    columns: Sequence[str], joins: Sequence[_Join], as_of: str, *, reserved: tuple[str, ...] = ()
) -> None:
    """Refuse a spine whose columns can't do."""
    known = tuple(columns)
    if as_of not in known:
        raise SpineError(f"has no column {as_of!r} of instants", "add it, or name yours: as_of=…", known)
    for name in (*reserved, *(each for join in joins for each in join.names)):
        if name in known:
            raise SpineError(f"has a column {name!r} already", "drop or rename it", known)


def _instants(spine: pa.Table, as_of: str) -> IntArray:
    """The instants in microseconds, shape ``(n,)``."""
    column = spine.column(as_of)
    known = tuple(spine.column_names)
    if column.null_count:
        raise SpineError(f"has no instant ({as_of!r} is null) in {column.null_count} rows", "drop these rows", known)
    is_instant = pa.types.is_timestamp, pa.types.is_integer, pa.types.is_date
    try:
        if any(fits(column.type) for fits in is_instant):
            return times_us(cast_column(column, TIMESTAMP))
    except pa.ArrowInvalid:
        pass  # said below
    raise SpineError(
        f"has instants {as_of!r} of type {column.type} that aren't whole microseconds",
        "give timestamps or int64 microseconds, UTC",
        known,
    )
