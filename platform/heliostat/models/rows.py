"""A model's rows, one bucket of entities at a time: who, at which instants, with what label and features.

The event log is bucketed by entity, so a bucket's events are all that its rows can see. Training takes
rows with labels at several instants, batch prediction without at one; both run one task a bucket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.errors import MissingInputError, StaleVersionError
from heliostat.features.aggregations import FloatArray
from heliostat.features.definitions import Entity, EventSource, FeatureRef, FeatureView, request_types
from heliostat.features.offline import compute_features, earliest_us, needed_columns
from heliostat.models.definitions import ModelSpec
from heliostat.models.labels import label_values
from heliostat.models.registry import ModelVersion
from heliostat.models.spine import AS_OF, ModelSpine
from heliostat.schema import TIE, TIMESTAMP, arrow_type, times_us
from heliostat.storage.event_log import EventLog

IntArray = NDArray[np.int64]

LABEL = "label"


def model_sources(spec: ModelSpec) -> tuple[EventSource, ...]:
    """The sources that a model looks at, each once: its views', then its label's."""
    sources = [*(view.source for view in spec.views), spec.label.source]
    return tuple({source.name: source for source in sources}.values())


def key_schema(entity: Entity) -> pa.Schema:
    """The key columns of an entity."""
    return pa.schema([(column, arrow_type(dtype)) for column, dtype in entity.keys.items()])


def population_rows(spec: ModelSpec, events: Mapping[str, pa.Table], instants_us: Sequence[int]) -> pa.Table:
    """Who belongs to a model's population at each instant.

    An entity belongs to it if it has an event before the instant, in any source of the model; with
    ``active_within``, in so long before it.

    Args:
        spec: Says population and sources.
        events: By name of the source: the key columns and event times of one bucket's events.
        instants_us: As-of instants.

    Returns:
        Key columns and ``as_of``, by instant and then by key.
    """
    entity, schema = spec.entity, key_schema(spec.entity)
    sources = {source.name: source for source in model_sources(spec)}
    keys = pa.concat_tables([events[name].select(schema.names).cast(schema) for name in sources])
    encoded = entity.encode(keys, what=f"events of {', '.join(sources)}").dictionary_encode()
    # Codes in the order of the keys, and for each one event that has it.
    order = pc.array_sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    codes = rank[encoded.indices.to_numpy(zero_copy_only=False)]
    example = np.zeros(len(order), dtype=np.int64)
    example[codes] = np.arange(len(codes))

    times = np.concatenate([times_us(events[name].column(source.event_time)) for name, source in sources.items()])
    by_time = np.argsort(times, kind="stable")
    times, codes = times[by_time], codes[by_time]
    since_us = spec.population.active_within_us
    schema = schema.append(pa.field(AS_OF, TIMESTAMP))
    parts: list[pa.Table] = [schema.empty_table()]
    for instant_us in sorted(instants_us):
        low = 0 if since_us is None else np.searchsorted(times, instant_us - since_us)
        members = np.unique(codes[low : np.searchsorted(times, instant_us)])
        instant = pa.array(np.full(len(members), instant_us), pa.int64()).cast(TIMESTAMP)
        taken = keys.take(pa.array(example[members]))
        parts.append(pa.table([*taken.columns, instant], schema=schema))
    return pa.concat_tables(parts)


def version_features(
    version: ModelVersion, views: Mapping[str, FeatureView], spec: ModelSpec | None = None
) -> tuple[FeatureRef, ...]:
    """The features that a version was trained on, of the versions of the views that it was trained on.

    Args:
        version: Registered.
        views: What is declared, by reference.
        spec: What else is read beside it: a view of which it reads another version comes `pinned`.

    Returns:
        In the order of the version's signature.

    Raises:
        StaleVersionError: If such a version of a view is declared no longer, or means something else since.
    """
    trained_with = version.lineage.get("view_hashes", {})
    beside = {} if spec is None else {view.name: view.ref for view in spec.views}
    refs: list[FeatureRef] = []
    stale: dict[str, None] = {}
    for name in version.pinned_names:
        pinned, _, feature = name.partition("__")
        view = views.get(pinned)
        if view is None or feature not in view or trained_with[pinned] != view.content_hash:
            stale[pinned] = None
        else:
            refs.append((view if beside.get(view.name, view.ref) == view.ref else view.pinned)[feature])
    if stale:
        raise StaleVersionError(version.model, version.version, tuple(stale))
    return tuple(refs)


@dataclass(frozen=True, eq=False)
class ModelRows:
    """Reads a model's rows off the event log; picklable, and cheap.

    Attributes:
        spec: The model.
        event_log: Where its events are.
        log_versions: The version of each source's log that is read, by name.
        instants_us: As-of instants.
        labelled: Whether rows get their label.
        extra: Features beyond the model's own, such as those of an older version.
        spine: The rows themselves, where they aren't the population's at the instants; those are the
            spine's first and last then.
    """

    spec: ModelSpec
    event_log: EventLog
    log_versions: Mapping[str, int]
    instants_us: tuple[int, ...]
    labelled: bool = True
    extra: tuple[FeatureRef, ...] = ()
    spine: ModelSpine | None = None

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        event_log: EventLog,
        instants_us: Sequence[int],
        *,
        labelled: bool = True,
        extra: Sequence[FeatureRef] = (),
        spine: ModelSpine | None = None,
    ) -> ModelRows:
        """Rows as the log is now: whatever is appended meanwhile, every bucket reads the same version.

        Raises:
            MissingInputError: If features take inputs of the request, and there is no spine that has them.
        """
        new = tuple({ref.name: ref for ref in extra if ref.name not in spec.feature_names}.values())
        instants = sorted(instants_us) if spine is None else [spine.first_us, spine.last_us]
        rows = cls(spec, event_log, {}, tuple(instants), labelled, new, spine)
        needed = request_types([*spec.feature_refs, *new])
        missing = tuple(name for name in needed if spine is None or name not in spine.request)
        if missing:
            raise MissingInputError(missing, f"model {spec.name!r}", "a population (give a spine with these columns)")
        return replace(rows, log_versions={each.name: event_log.version(each, spec.entity) for each in rows.sources})

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The model's features, then the extra ones."""
        return (*self.spec.feature_names, *(ref.name for ref in self.extra))

    @property
    def views(self) -> tuple[FeatureView, ...]:
        """The views that are computed, each once."""
        return tuple({view.prefix: view for view in (*self.spec.views, *(ref.view for ref in self.extra))}.values())

    @property
    def sources(self) -> tuple[EventSource, ...]:
        """The sources that are read, each once."""
        sources = [*model_sources(self.spec), *(view.source for view in self.views)]
        return tuple({source.name: source for source in sources}.values())

    @property
    def schema(self) -> pa.Schema:
        """Key columns, ``as_of``, perhaps ``label``, features."""
        label = [(LABEL, pa.float64())] if self.labelled else []
        features = [(name, pa.float64()) for name in self.feature_names]
        return pa.schema([*key_schema(self.spec.entity), (AS_OF, TIMESTAMP), *label, *features])

    def table(self, bucket: int) -> pa.Table:
        """The rows of one bucket.

        Args:
            bucket: Its number.

        Returns:
            Columns of `schema`, by instant and then by key; of a spine, in its order.

        Raises:
            StorageError: If the log can't be read.
        """
        entity, label = self.spec.entity, self.spec.label
        events = {source.name: self._events(source, bucket) for source in self.sources}
        if self.spine is None:
            rows, request = population_rows(self.spec, events, self.instants_us), dict[str, FloatArray]()
        else:
            rows = self.spine.rows(bucket)
            request = {name: rows.column(name).to_numpy() for name in self.spine.request}
        keys, as_of_us = entity.encode(rows, what="the population"), times_us(rows.column(AS_OF))
        columns = {name: rows.column(name) for name in rows.column_names if name not in request}
        if self.labelled:
            columns[LABEL] = pa.array(label_values(label, entity, events[label.source.name], keys, as_of_us))
        for source in self.sources:
            views = self._views_of(source)
            if views:
                found = compute_features(
                    views, events[source.name], keys, as_of_us, request=request, deduplicate=False
                )
                columns.update({name: pa.array(values) for name, values in found.items()})
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)

    def _views_of(self, source: EventSource) -> list[FeatureView]:
        return [view for view in self.views if view.source.name == source.name]

    def _events(self, source: EventSource, bucket: int) -> pa.Table:
        spec, views = self.spec, self._views_of(source)
        for_label = self.labelled and source.name == spec.label.source.name
        if for_label and (spec.label.column is not None or spec.label.where is not None):
            needed = set(source.schema.names)
        else:
            needed = {source.event_time, source.event_id, *spec.entity.key_columns}
            needed.update(needed_columns(views) if views else ())
        version = self.log_versions[source.name]
        last_us = max(self.instants_us) + (spec.label.horizon_us if for_label else 0)
        return self.event_log.read_bucket(
            source,
            spec.entity,
            bucket,
            columns=[*(name for name in source.schema.names if name in needed), TIE],
            min_time_us=self._first_us(views),
            max_time_us=last_us,
            version=version if version >= 0 else None,
        )

    def _first_us(self, views: Sequence[FeatureView]) -> int | None:
        """Nothing before this matters: neither to a window nor to who belongs to the population."""
        since_us = self.spec.population.active_within_us if self.spine is None else 0
        if since_us is None:
            return None
        instants = np.array(self.instants_us)
        seen_us = earliest_us(views, instants) if views else int(instants.min())
        return None if seen_us is None else min(seen_us, int(instants.min()) - since_us)
