"""What a point-in-time join asks for, and how one bucket of it is answered. Pure; knows no Ray.

An `EntityJoin` is all that a task needs: the features of one entity, the event log, and which
version of it to read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.errors import DuplicateNameError, InvalidDefinitionError, SpineError
from heliostat.features.aggregations import FloatArray
from heliostat.features.definitions import Entity, FeatureRef, FeatureView, request_types
from heliostat.features.offline import compute_features, earliest_us, needed_columns
from heliostat.features.request import RequestTypes, missing_column
from heliostat.features.timeline import IntArray
from heliostat.schema import TIE, TIMESTAMP, cast_column, times_us
from heliostat.storage.event_log import EventLog


@dataclass(frozen=True, eq=False)
class EntityJoin:
    """The features of one entity; picklable, and cheap.

    Attributes:
        entity: By whose key.
        sources: Its views, those of one source together.
        names: Qualified names of the features asked for.
        event_log: Where the events are.
        versions: The version of each source's log that is read, by name.
        known_at_us: Only events ingested by then count.
        request: What the features take from the spine's own columns.
    """

    entity: Entity
    sources: tuple[tuple[FeatureView, ...], ...]
    names: tuple[str, ...]
    event_log: EventLog
    versions: Mapping[str, int]
    known_at_us: int | None
    request: RequestTypes = field(default_factory=dict)

    def version(self, source: str) -> int | None:
        """The version of a source's log to read; None where there is no log."""
        version = self.versions[source]
        return version if version >= 0 else None

    def events_by_bucket(self) -> dict[int, int]:
        """How many events of all sources each bucket has, about: as the log is now."""
        events: Counter[int] = Counter()
        for views in self.sources:
            events.update(self.event_log.statistics(views[0].source, self.entity).rows_by_bucket)
        return dict(events)

    def columns(
        self, bucket: int, keys: pa.Array, as_of_us: IntArray, request: Mapping[str, FloatArray] | None = None
    ) -> dict[str, FloatArray]:
        """The features of one bucket's rows, shape ``(m,)`` each; each source's events are read once."""
        columns: dict[str, FloatArray] = {}
        for views in self.sources:
            source = views[0].source
            events = self.event_log.read_bucket(
                source,
                self.entity,
                bucket,
                columns=[*needed_columns(views), TIE],
                min_time_us=earliest_us(views, as_of_us),
                max_time_us=int(as_of_us.max()),
                known_at_us=self.known_at_us,
                version=self.version(source.name),
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
    ) -> dict[str, FloatArray]:
        """The same for rows of any buckets, one bucket after the other."""
        found, brought = np.unique(buckets), request or {}
        if len(found) == 1:
            return self.columns(int(found[0]), keys, as_of_us, brought)
        columns = {name: np.full(len(keys), np.nan) for name in self.names}
        for bucket in found:
            rows = np.flatnonzero(buckets == bucket)
            own = {name: values[rows] for name, values in brought.items()}
            for name, values in self.columns(int(bucket), keys.take(pa.array(rows)), as_of_us[rows], own).items():
                columns[name][rows] = values
        return columns


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
                event_log=event_log,
                versions={name: event_log.version(source, entity) for name, source in sources.items()},
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
