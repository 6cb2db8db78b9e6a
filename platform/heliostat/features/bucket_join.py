"""What a point-in-time join asks for, and how its buckets are answered. Pure; knows no Ray.

An `EntityJoin` is all that a task needs: the features of one entity, and the version of the event
log to read. `JoinRows` are the rows of a spine that it is asked about; a join of few rows over
few events is answered right here, by threads of this process.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.errors import DuplicateNameError, InvalidDefinitionError, SpineError
from heliostat.features.aggregations import FloatArray
from heliostat.features.definitions import Entity, FeatureRef, FeatureView, request_types
from heliostat.features.offline import compute_features, earliest_us, needed_columns
from heliostat.features.request import RequestTypes, missing_column, request_columns
from heliostat.features.timeline import IntArray
from heliostat.schema import TIE, TIMESTAMP, cast_column, times_us
from heliostat.storage.event_log import EventLog
from heliostat.storage.log_version import LogVersion

SMALL_JOIN = 2_000_000
"""Rows and events up to which a join is answered by this process. They take about 0.5 s of CPU and a few hundred
bytes each; Ray's tasks cost 0.3 s before they answer anything, and their answer has to come back."""

_AT_ONCE = 2**17  # rows and events: fewer are mostly Python's work, more don't fit into caches
_FEWEST_AT_ONCE = 2**14
_MOST_THREADS = 4  # numpy lets others run while it works, Python doesn't
_KEPT_BYTES = 2**25 - 2**16  # glibc takes no array for a hint that is larger


@dataclass(frozen=True, eq=False)
class EntityJoin:
    """The features of one entity; picklable.

    Attributes:
        entity: By whose key.
        sources: Its views, those of one source together.
        names: Qualified names of the features asked for.
        logs: Each source's events, at the version that is read, by name.
        n_buckets: Of the event log.
        known_at_us: Only events ingested by then count.
        request: What the features take from the spine's own columns.
    """

    entity: Entity
    sources: tuple[tuple[FeatureView, ...], ...]
    names: tuple[str, ...]
    logs: Mapping[str, LogVersion]
    n_buckets: int
    known_at_us: int | None
    request: RequestTypes = field(default_factory=dict)

    @cached_property
    def _needed(self) -> dict[str, list[str]]:
        """What is read of each source's events."""
        return {views[0].source.name: [*needed_columns(views), TIE] for views in self.sources}

    def events_by_bucket(self, buckets: Sequence[int], as_of_us: IntArray) -> dict[int, int]:
        """How many events rows of some buckets make it read, at most: those of the files it opens.

        Args:
            buckets: Which.
            as_of_us: The rows' instants, shape ``(m,)`` with ``m ≥ 1``.
        """
        events: Counter[int] = Counter()
        for views in self.sources:
            log = self.logs[views[0].source.name]
            read = log.statistics(buckets, min_time_us=earliest_us(views, as_of_us), max_time_us=int(as_of_us.max()))
            events.update(read.rows_by_bucket)
        return dict(events)

    def columns(
        self,
        buckets: Sequence[int],
        keys: pa.Array,
        as_of_us: IntArray,
        request: Mapping[str, FloatArray] | None = None,
    ) -> dict[str, FloatArray]:
        """The features of some buckets' rows, shape ``(m,)`` each; each source's events are read once."""
        columns: dict[str, FloatArray] = {}
        for views in self.sources:
            events = self.logs[views[0].source.name].read(
                buckets,
                columns=self._needed[views[0].source.name],
                min_time_us=earliest_us(views, as_of_us),
                max_time_us=int(as_of_us.max()),
                known_at_us=self.known_at_us,
                raw=True,
            )
            columns |= compute_features(views, events, keys, as_of_us, request=request, deduplicate=False)
        return {name: columns[name] for name in self.names}

    def all_columns(
        self,
        buckets: NDArray[np.int32],
        keys: pa.Array,
        as_of_us: IntArray,
        request: Mapping[str, FloatArray] | None = None,
        *,
        threads: int = 1,
    ) -> dict[str, FloatArray]:
        """The same for rows of any buckets: many small buckets at once, a large one by itself.

        Args:
            buckets: Each row's bucket, shape ``(m,)``.
            keys: Encoded keys, length ``m``.
            as_of_us: Instants, shape ``(m,)``.
            request: What each row brings itself, shape ``(m,)`` by name.
            threads: How many parts are worked on at a time.
        """
        brought = request or {}
        if not len(keys):
            return {name: np.empty(0) for name in self.names}
        _keep_freed_memory()
        parts = self._parts(np.bincount(buckets), as_of_us, threads)
        if len(parts) == 1:
            return self.columns(parts[0].buckets, keys, as_of_us, brought)
        order = np.argsort(buckets.astype(np.uint16) if buckets.max() < 2**16 else buckets, kind="stable")
        ordered_keys, ordered_us = keys.take(pa.array(order)), as_of_us[order]
        columns = {name: np.empty(len(keys)) for name in self.names}

        def answer(part: _Part) -> None:
            rows = order[part.rows]
            own = {name: values[rows] for name, values in brought.items()}
            found = self.columns(
                part.buckets, ordered_keys.slice(part.rows.start, len(rows)), ordered_us[part.rows], own
            )
            for name, values in found.items():
                columns[name][rows] = values

        if threads == 1:
            for part in parts:
                answer(part)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(answer, parts))
        return columns

    def _parts(self, rows: NDArray[np.intp], as_of_us: IntArray, threads: int) -> list[_Part]:
        """What is answered at once: neighbouring buckets, until their rows and events fill the processor's caches."""
        buckets = np.flatnonzero(rows)
        if len(buckets) == 1:
            return [_Part(buckets.tolist(), slice(0, int(rows.sum())))]
        events = self.events_by_bucket(buckets.tolist(), as_of_us)
        ends = np.cumsum(rows[buckets])
        work = ends + np.cumsum([events.get(bucket, 0) for bucket in buckets.tolist()])
        rounds = -(-int(work[-1]) // (_AT_ONCE * threads))
        at_once = max(_FEWEST_AT_ONCE, -(-int(work[-1]) // (rounds * threads)))
        cuts = np.append(np.flatnonzero(np.diff((work - 1) // at_once)) + 1, len(buckets)).tolist()
        firsts = [0, *cuts[:-1]]
        return [
            _Part(buckets[first:cut].tolist(), slice(int(ends[first - 1]) if first else 0, int(ends[cut - 1])))
            for first, cut in zip(firsts, cuts, strict=True)
        ]


@cache
def _keep_freed_memory() -> None:
    """Let this process use again what it freed, rather than give it back and have every page cleared anew.

    A join makes hundreds of arrays of a few 100 KiB. Until a process has freed a large one, glibc hands each of
    them back to the kernel at once, and a quarter of a small join is spent there. An array that is never touched
    costs nothing, and afterwards up to 64 MiB stay at hand: as they do in any program that works with large arrays.
    """
    np.empty(_KEPT_BYTES, dtype=np.uint8)


@dataclass(frozen=True)
class _Part:
    """Buckets that are answered at once, and their rows in order of buckets."""

    buckets: list[int]
    rows: slice


@dataclass(frozen=True, eq=False)
class JoinRows:
    """The rows of a spine, as the join of one entity's features looks at them.

    Attributes:
        join: What is asked.
        buckets: Each row's bucket, shape ``(m,)``.
        keys: Encoded keys, length ``m``.
        as_of_us: Instants, shape ``(m,)``.
        request: What each row brings itself, shape ``(m,)`` by name.
    """

    join: EntityJoin
    buckets: NDArray[np.int32]
    keys: pa.Array
    as_of_us: IntArray
    request: Mapping[str, FloatArray]

    @classmethod
    def of(cls, spine: pa.Table, joins: Sequence[EntityJoin], as_of: str) -> list[JoinRows]:
        """A spine's rows, for each join.

        Args:
            spine: As `check_spine` lets it pass.
            joins: Of all entities.
            as_of: The column of instants.

        Raises:
            SpineError: If an instant is null or of the wrong type, or a request column of the wrong type.
            KeyColumnError: If a key column is missing, null or of the wrong type.
        """
        as_of_us = spine_instants_us(spine, as_of)
        keys = [join.entity.encode(spine, what="the spine") for join in joins]
        return [
            cls(join, join.entity.buckets(own, join.n_buckets), own, as_of_us, request_columns(spine, join.request))
            for join, own in zip(joins, keys, strict=True)
        ]

    @cached_property
    def events_by_bucket(self) -> dict[int, int]:
        """As `EntityJoin.events_by_bucket`, of the buckets that have rows."""
        present = np.flatnonzero(np.bincount(self.buckets)).tolist()
        return self.join.events_by_bucket(present, self.as_of_us) if present else {}

    @property
    def size(self) -> int:
        """How many rows and events it is about, at most."""
        return len(self.keys) + sum(self.events_by_bucket.values())

    def columns_here(self, concurrency: int | None = None) -> dict[str, FloatArray]:
        """The features of all rows, shape ``(m,)`` by name, in their order, by threads of this process.

        Args:
            concurrency: Most threads; None: as many as there are cores, and not many.
        """
        threads = min(_MOST_THREADS, os.cpu_count() or 1) if concurrency is None else concurrency
        return self.join.all_columns(self.buckets, self.keys, self.as_of_us, self.request, threads=threads)


def single_features(features: Sequence[FeatureView | FeatureRef]) -> list[FeatureRef]:
    """Every single feature that is asked for, in order."""
    refs: list[FeatureRef] = []
    for each in features:
        refs.extend(each if isinstance(each, FeatureView) else [each.view[each.feature]])
    return refs


def entity_joins(
    features: Sequence[FeatureView | FeatureRef], event_log: EventLog, known_at_us: int | None
) -> list[EntityJoin]:
    """One join for each entity."""
    asked: dict[str, FeatureView] = {}
    by_prefix: dict[str, FeatureView] = {}
    for ref in single_features(features):
        other = by_prefix.setdefault(ref.view.prefix, ref.view)
        if other.version != ref.view.version:
            raise InvalidDefinitionError(
                "the point-in-time join",
                f"it asks for {other.ref} and {ref.view.ref} under one name",
                "give one as view.pinned: its columns are name@version__feature",
            )
        if ref.name in asked:
            raise DuplicateNameError("feature", ref.name, "the point-in-time join")
        asked[ref.name] = ref.view
    entities = {view.entity.name: view.entity for view in asked.values()}
    joins: list[EntityJoin] = []
    for entity in entities.values():
        own = {name: view for name, view in asked.items() if view.entity.name == entity.name}
        views = {view.prefix: view for view in own.values()}.values()
        sources = {view.source.name: view.source for view in views}
        joins.append(
            EntityJoin(
                entity=entity,
                sources=tuple(tuple(each for each in views if each.source.name == name) for name in sources),
                names=tuple(own),
                logs={name: event_log.opened(source, entity) for name, source in sources.items()},
                n_buckets=event_log.n_buckets,
                known_at_us=known_at_us,
                request=request_types([ref for ref in single_features(features) if ref.name in own]),
            )
        )
    return joins


def check_spine(
    columns: Sequence[str], joins: Sequence[EntityJoin], as_of: str, *, reserved: tuple[str, ...] = ()
) -> None:
    """Refuse a spine whose columns can't do."""
    known = tuple(columns)
    if as_of not in known:
        raise SpineError(f"has no column {as_of!r} of instants", "add it, or name yours: as_of=…", known)
    for name in (*reserved, *(each for join in joins for each in join.names)):
        if name in known:
            raise SpineError(f"has a column {name!r} already", "drop or rename it", known)
    for name, dtype in (each for join in joins for each in join.request.items()):
        if name not in known:
            raise SpineError(f"has no column {name!r}", missing_column(dtype), known)


def spine_instants_us(spine: pa.Table, as_of: str) -> IntArray:
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
