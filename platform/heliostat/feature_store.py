"""The feature store for programs: declare, write, read, now and as of any instant.

    with FeatureStore.open() as store:
        store.register([spending])
        store.get_online([1, 2], "spending")
        store.get_historical(orders, ["spending", "scores__risk"], as_of="ordered_at")

What goes in comes out: pandas gives pandas, Arrow gives Arrow, a Ray Dataset gives a Ray Dataset.
Tables work without Ray, in this process; where Ray is connected, what is large of `materialize` and
`get_historical` runs on it, a task a bucket. Datasets are never collected here.

Values of a `FeatureView` come from its events alone. What programs compute themselves is
declared as a `PrecomputedView` and written: `write_online` changes the online store at once and
reaches the event log through its stream, `write_offline` the other way round by `materialize`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa

from heliostat.clock import parse_instant_us
from heliostat.errors import (
    HeliostatError,
    InvalidDefinitionError,
    InvalidValueError,
    UnknownFeatureError,
    UnknownViewError,
)
from heliostat.features.bucket_join import JoinRows, check_spine, entity_joins, single_features
from heliostat.features.definitions import FeatureRef, FeatureView
from heliostat.features.frames import Asked, as_table, is_dataset, ray_is_connected, some_columns, with_columns
from heliostat.features.metadata import FeatureMetadata
from heliostat.features.precomputed import PrecomputedView
from heliostat.features.registry import Plan
from heliostat.ingestion.intake import IngestReport, ingest_files
from heliostat.ingestion.sink import Drained, Sink
from heliostat.models.definitions import Definitions
from heliostat.online.materialize import materialize
from heliostat.online.tiles import RingLimits
from heliostat.online.vectors import (
    AS_OF,
    ROWS_AT_ONCE,
    Instant,
    KeptVectors,
    OnlineLookup,
    OnlineWriter,
    Written,
    written_rows,
)
from heliostat.settings import Settings, load_settings
from heliostat.workspace import Workspace

Frame = TypeVar("Frame")
ViewLike: TypeAlias = str | FeatureView
FeatureLike: TypeAlias = str | FeatureView | FeatureRef


class FeatureStore:
    """Everything that a program does with features.

    Args:
        workspace: The stores and declarations; whoever opened it closes it.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._lookups: dict[tuple[tuple[str, ...], tuple[str, ...] | None], OnlineLookup] = {}

    @classmethod
    def open(cls, settings: Settings | None = None, *, definitions: Sequence[object] | None = None) -> Self:
        """Open the feature store of a project; close it, or use it as a context manager.

        Args:
            settings: Which project; None: as the command line would, from configs/ and the environment.
            definitions: What is declared, instead of the settings' definitions module.
        """
        workspace = Workspace.open(load_settings((), environ=os.environ) if settings is None else settings)
        if definitions is not None:
            workspace.definitions = Definitions.of(definitions)
        return cls(workspace)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what was opened."""
        self._workspace.close()

    # ── Declaring ────────────────────────────────────────────────────────────────

    @property
    def definitions(self) -> Definitions:
        """What is declared: by the definitions module, and by `register`."""
        return self._workspace.definitions

    def register(self, declared: Sequence[object] | Definitions) -> Plan:
        """Register declarations beside those that are there, in one transaction; nothing is retired.

        Sink, gateway and jobs are other processes: they know what the definitions module declares. What it
        lacks is retired by the next `heliostat apply`, unless a serving model reads it.

        Args:
            declared: Views, models, sources, entities; what they refer to is taken along.

        Returns:
            What changed.

        Raises:
            DefinitionConflictError: If a view changed without a higher version. Nothing is registered then.
        """
        new = declared if isinstance(declared, Definitions) else Definitions.of(declared)
        known = [each for each in _all(self.definitions) if _identity(each) not in set(map(_identity, _all(new)))]
        plan = self._workspace.features.apply(new, keep=True)
        merged = Definitions.of([*_all(new), *known], merge=True)
        self._workspace.definitions = merged
        self._lookups.clear()
        return plan

    def features(self, text: str = "") -> tuple[FeatureMetadata, ...]:
        """Metadata of the registered features that hold all words of a text."""
        return self._workspace.features.features(text)

    # ── Bringing data in ─────────────────────────────────────────────────────────

    def ingest(self, paths: str | Path | Sequence[str | Path], source: str) -> IngestReport:
        """Take Parquet and CSV files of events into the event log; repeating it changes nothing.

        Raises:
            HeliostatError: As `heliostat.ingestion.intake.ingest_files`.
        """
        files = [paths] if isinstance(paths, str | Path) else paths
        return ingest_files(files, self.definitions.source(source), workspace=self._workspace)

    def write_online(self, frame: object, view: ViewLike, timestamp: Instant | None = None) -> Written:
        """Write vectors: the next read sees them, and their stream carries them to the event log.

        Of an entity's rows the one with the latest timestamp counts, in whatever order they are written.

        Args:
            frame: Key columns, features, and a column ``computed_at`` if ``timestamp`` doesn't say otherwise.
            view: A `PrecomputedView`.
            timestamp: The column of timestamps, or one instant for all rows; None: the column
                ``computed_at`` where there is one, and otherwise now.

        Raises:
            InvalidDefinitionError: If the view is computed from events.
            DataError: If the frame doesn't fit; nothing is written then (of a Dataset: nothing of its block).
            OnlineStoreUnavailableError: If the store doesn't answer; writing again is safe.
        """
        declared = self._written(view, "write_online")
        writer = OnlineWriter(declared, self._workspace.settings, timestamp, self._workspace.clock.now_us())
        if is_dataset(frame):
            counts = [row for part in _over_dataset(writer, frame) for row in part.to_pylist()]
            return Written(sum(each["new"] for each in counts), sum(each["known"] for each in counts))
        return writer.write(as_table(frame), self._workspace.online)

    def write_offline(self, frame: object, view: ViewLike, timestamp: Instant | None = None) -> Written:
        """Write vectors into the event log in one commit; `materialize` brings them online.

        Args and errors as `write_online`; of a Dataset, too, all rows are written or none.
        """
        declared = self._written(view, "write_offline")
        now_us = self._workspace.clock.now_us()
        parts: Iterable[pa.Table] = (
            frame.iter_batches(batch_size=ROWS_AT_ONCE, batch_format="pyarrow")  # type: ignore[attr-defined]
            if is_dataset(frame)
            else [as_table(frame)]
        )
        with self._workspace.event_log.bulk(declared.source, ingested_us=now_us) as bulk:
            for part in parts:
                bulk.add(written_rows(declared, part, timestamp, now_us, self._workspace.configured))
            done = bulk.commit()
        return Written(done.accepted, done.duplicates)

    def _written(self, view: ViewLike, call: str) -> PrecomputedView:
        declared = self.view(view)
        if not isinstance(declared, PrecomputedView):
            raise InvalidDefinitionError(
                f"{call} of {declared.ref}",
                f"its values are computed from events of {declared.source.name!r}, and written values would differ",
                "send events (POST /events, heliostat ingest), or declare a PrecomputedView",
            )
        return declared

    def flush(self) -> Drained:
        """Move what was written online into the event log now; a running sink does so by itself."""
        return Sink.of(self._workspace).drain_once()

    def materialize(self, views: Sequence[ViewLike] | None = None) -> None:
        """Bring views' history from the event log into the online store; None: all views.

        Safe beside live writes, and again. What is large runs on Ray, if it is connected; all else in this process.
        """
        chosen = list(self.definitions.views.values()) if views is None else [self.view(each) for each in views]
        _materialize(chosen, self._workspace, on_ray=ray_is_connected())

    # ── Reading ──────────────────────────────────────────────────────────────────

    def get_online(
        self,
        entities: Any,  # noqa: ANN401 - see Args
        views: ViewLike | Sequence[ViewLike],
        names: Sequence[str] | None = None,
    ) -> Any:  # noqa: ANN401 - as given
        """Feature vectors as of this call: one round trip, however many views and entities.

        Args:
            entities: Keys (a list or Series, of views of one entity), or a frame with key columns. Its other
                columns stay, and give derived features what they take from a request.
            views: One or several, of any entities.
            names: Only these features, ``feature`` or ``view__feature``; None: all that need nothing of a
                request, or whose inputs the frame brings. A category comes as its code, as in training.

        Returns:
            Key columns, or the frame, with a float64 column ``view__feature`` for each feature, null as NaN, and a
            column ``view__is_absent`` for each view: nothing is known of the entity, or nothing within the ttl.
            One row an entity, in order.

        Raises:
            UnknownViewError: If a view isn't declared.
            UnknownFeatureError: If a name is of none of the views.
            KeyColumnError: If a key is missing, null or of the wrong type.
            StorageError: If the store doesn't answer.
        """
        declared = [self.view(each) for each in ([views] if isinstance(views, str | FeatureView) else views)]
        lookup, now_us = self._lookup(declared, names), self._workspace.clock.now_us()
        if is_dataset(entities):
            task = OnlineLookup(lookup.features, lookup.explicit, lookup.settings, now_us)
            return entities.map_batches(task, batch_format="pyarrow", batch_size=ROWS_AT_ONCE)
        asked = Asked.of(entities, lookup.entities, lookup.inputs)
        return asked.answer(lookup.columns(asked.table, self._workspace.online, now_us))

    def _lookup(self, views: Sequence[FeatureView], names: Sequence[str] | None) -> OnlineLookup:
        """The plan of a read; each is made once."""
        key = tuple(view.prefix for view in views), None if names is None else tuple(names)
        if key not in self._lookups:
            self._lookups[key] = OnlineLookup(_named(views, names), names is not None, self._workspace.settings)
        return self._lookups[key]

    def get_historical(
        self, spine: Frame, features: Sequence[FeatureLike], *, as_of: str = AS_OF, known_at: Instant | None = None
    ) -> Frame:
        """Features as they were at each row's own instant: exactly one row for each row of the spine.

        Args:
            spine: Key columns and a column of instants; any rows, repeated and unknown entities included.
            features: Views and features; as text ``view``, ``view@version``, ``view__feature`` or
                ``view@version__feature``. A column is called as it was asked for.
            as_of: The column of instants.
            known_at: Only what was ingested by this instant counts: what was known then.

        Returns:
            What was given, in the same type and order, with a float64 column for each feature, null as NaN. A
            Dataset gets the column ``spine_row`` instead of an order.

        Raises:
            HeliostatError: As `heliostat.features.point_in_time.historical_features`.
        """
        asked = [self._feature(each) for each in features]
        log, known_at_us = self._workspace.event_log, None if known_at is None else parse_instant_us(known_at)
        if is_dataset(spine) or ray_is_connected():
            from heliostat.features.point_in_time import historical_features

            return historical_features(spine, asked, log, as_of=as_of, known_at_us=known_at_us)
        joins = entity_joins(asked, log, known_at_us)
        names = [name for join in joins for name in (*join.entity.key_columns, *join.request)]
        table = some_columns(spine, [as_of, *names], what="the spine")
        check_spine(_column_names(spine), joins, as_of)
        columns: dict[str, Any] = {ref.name: np.empty(0) for ref in single_features(asked)}
        if table.num_rows:
            for rows in JoinRows.of(table, joins, as_of):
                columns |= rows.columns_here()
        return with_columns(spine, columns, what="the spine")

    def get_offline(self, entities: Any, view: ViewLike, start: Instant, end: Instant) -> Any:  # noqa: ANN401 - as given
        """What is kept of a view between two instants: the vectors that were written, or daily snapshots.

        Args:
            entities: Keys, or a frame with key columns, as for `get_online`; None: all, as Arrow. Of a Dataset,
                keys are read here, values aren't.
            view: A `PrecomputedView`: its rows. Another view: what jobs/compute_features.py has kept, by day.
            start: Rows as of this instant or later.
            end: Rows as of before this instant.

        Returns:
            Key columns, ``as_of`` and the features ``view__feature``, by ``as_of`` and key.

        Raises:
            UnknownViewError: If the view isn't declared.
            UnknownTableError: If the view has no snapshots.
        """
        declared = self.view(view)
        span = parse_instant_us(start), parse_instant_us(end)
        if span[1] < span[0]:
            raise InvalidValueError("end", str(end), f"an instant not before {start}")
        log, snapshots = self._workspace.event_log, self._workspace.offline_store
        if is_dataset(entities):
            import ray.data

            keys = entities.select_columns(list(declared.entity.key_columns))
            ids = pa.concat_tables(list(keys.iter_batches(batch_format="pyarrow", batch_size=None)))
            kept = KeptVectors.of(declared, log, snapshots, span, ids)
            parts = [pa.table({"part": [part]}) for part in kept.parts]
            return ray.data.from_arrow(parts).map_batches(kept, batch_format="pyarrow", batch_size=None)
        asked = None if entities is None else Asked.of(entities, {declared.entity.name: declared.entity})
        kept = KeptVectors.of(declared, log, snapshots, span, None if asked is None else asked.table)
        found = kept(pa.table({"part": pa.array(kept.parts, pa.int64())}))
        return found if asked is None else asked.like(found)

    # ── Names ────────────────────────────────────────────────────────────────────

    def view(self, view: ViewLike) -> FeatureView:
        """A declared view; ``name@version`` gives columns that carry the version.

        Raises:
            UnknownViewError: Naming those that are declared.
        """
        if isinstance(view, FeatureView):
            found = self.definitions.views.get(view.ref)
            same = found is not None and view in (found, found.pinned)
            if found is None or not (same or found.content_hash == view.content_hash):
                raise UnknownViewError(view.ref, tuple(self.definitions.views))
            return found.pinned if view.prefix == view.ref else found
        declared = self.definitions.view(view)
        return declared.pinned if view == declared.ref else declared

    def _feature(self, feature: FeatureLike) -> FeatureView | FeatureRef:
        if isinstance(feature, FeatureRef):
            return self.view(feature.view)[feature.feature]
        if isinstance(feature, str) and "__" in feature:
            view, _, name = feature.partition("__")
            return self.view(view)[name]
        return self.view(feature)


# ── What runs here, or in Ray's tasks ───────────────────────────────────────────────


def _all(definitions: Definitions) -> list[Any]:
    kinds = (definitions.entities, definitions.sources, definitions.views, definitions.labels, definitions.models)
    return [each for kind in kinds for each in kind.values()]


def _identity(declared: Any) -> tuple[str, str]:  # noqa: ANN401 - any declaration
    if isinstance(declared, FeatureView):
        return "view", declared.ref
    return type(declared).__name__, declared.name


def _over_dataset(task: OnlineWriter, rows: Any) -> Iterator[pa.Table]:  # noqa: ANN401 - a Dataset
    """What a task gives for each part of somebody's Dataset; an error of ours inside it comes out as itself."""
    from ray.exceptions import RayTaskError

    context, before = rows.context, rows.context.raise_original_map_exception
    context.raise_original_map_exception = True  # Ray Data's own wrapper would lose the error's kind
    try:
        done = rows.map_batches(task, batch_format="pyarrow", batch_size=ROWS_AT_ONCE)
        yield from done.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayTaskError as error:
        if isinstance(error.cause, HeliostatError):
            raise error.cause from None
        raise
    finally:
        context.raise_original_map_exception = before


def _column_names(frame: object) -> list[str]:
    return list(frame.column_names) if isinstance(frame, pa.Table) else [str(name) for name in frame.columns]  # type: ignore[attr-defined]


def _named(views: Sequence[FeatureView], names: Sequence[str] | None) -> list[FeatureRef]:
    """The features of views that some names mean, in the names' order."""
    every = [ref for view in views for ref in view]
    if names is None:
        return every
    found: list[FeatureRef] = []
    for name in names:
        meant = [ref for ref in every if name in (ref.name, ref.feature)]
        if len(meant) != 1:
            known = tuple(ref.name for ref in (meant or every))
            raise UnknownFeatureError(name, ", ".join(view.ref for view in views), known)
        found.append(meant[0])
    return found


def _materialize(views: Sequence[FeatureView], workspace: Workspace, *, on_ray: bool) -> None:
    materialize(
        views,
        event_log=workspace.event_log,
        online=workspace.online_config,
        as_of_us=workspace.clock.now_us(),
        limits=RingLimits.of(workspace.settings.ingestion),
        on_ray=on_ray,
        gone=workspace.retired_views(),
    )
