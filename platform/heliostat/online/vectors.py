"""Vectors in and out of the stores, a table at a time; each runs here or, pickled, in a Ray task. Knows no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import UnknownTableError
from heliostat.features.definitions import Entity, FeatureRef, FeatureView
from heliostat.features.frames import with_columns
from heliostat.features.precomputed import COMPUTED_AT, PrecomputedView
from heliostat.features.request import request_columns
from heliostat.online.live import LiveRings, remember_ms
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.schema import TIE, TIMESTAMP, arrow_type, times_us
from heliostat.settings import Settings
from heliostat.storage.event_log import EventLog
from heliostat.storage.offline_store import OfflineStore
from heliostat.storage.online_store import OnlineStore
from heliostat.storage.stream_entries import event_entries

Instant: TypeAlias = str | int | date | datetime

AS_OF = "as_of"
IS_ABSENT = "is_absent"
ROWS_AT_ONCE = 20_000


@dataclass(frozen=True, slots=True)
class Written:
    """What a write did.

    Attributes:
        new: Rows that weren't there.
        known: Rows that were there already: the same key, timestamp and values.
    """

    new: int
    known: int


def _newest_us(now_us: int, settings: Settings) -> int:
    return now_us + settings.ingestion.future_tolerance_us


def written_rows(
    view: PrecomputedView, table: pa.Table, timestamp: Instant | None, now_us: int, settings: Settings
) -> pa.Table:
    """A written table as events of the view's source."""
    at: str | int
    if timestamp is None:
        at = COMPUTED_AT if COMPUTED_AT in table.column_names else now_us
    elif isinstance(timestamp, str) and timestamp in table.column_names:
        at = timestamp
    else:
        at = parse_instant_us(timestamp)
    return view.rows(table, at, newest_us=_newest_us(now_us, settings))


@dataclass(frozen=True, eq=False)
class OnlineWriter:
    """Writes tables of vectors to the online store; picklable.

    Attributes:
        view: The view.
        settings: Name the store.
        timestamp: As `written_rows` takes it.
        now_us: The present: the same for all tables, so that a task that is tried again writes the same rows.
    """

    view: PrecomputedView
    settings: Settings
    timestamp: Instant | None
    now_us: int

    def write(self, table: pa.Table, store: OnlineStore) -> Written:
        """All rows are checked before the first one is written."""
        rows = written_rows(self.view, table, self.timestamp, self.now_us, self.settings)
        rings = LiveRings.open(self.view.source, [self.view], self.settings)
        keep_ms = remember_ms(RingLimits.of(self.settings.ingestion))
        new = 0
        for first in range(0, rows.num_rows, ROWS_AT_ONCE):
            part = rows.slice(first, ROWS_AT_ONCE)
            updates = rings.updates(part, event_entries(part, ingested_us=self.now_us))
            outcomes = rings.outcomes(store.apply_events(updates, remember_ms=keep_ms))
            new += len(outcomes) - outcomes.count("duplicate")
        return Written(new, rows.num_rows - new)

    def __call__(self, block: pa.Table) -> pa.Table:
        """As `write`, for Ray Data: counts come out."""
        with OnlineStore.open(self.settings) as store:
            done = self.write(block, store)
        return pa.table({"new": [done.new], "known": [done.known]})


@dataclass(frozen=True, eq=False)
class OnlineLookup:
    """Appends feature vectors to tables; picklable.

    Attributes:
        features: Which.
        explicit: Whether all of them are wanted, or just those whose inputs a table brings.
        settings: Name the store.
        now_us: The instant of the vectors that `__call__` appends.
    """

    features: Sequence[FeatureRef]
    explicit: bool
    settings: Settings
    now_us: int = 0
    _readers: dict[tuple[str, ...], FeatureReader] = field(default_factory=dict, repr=False)

    @property
    def entities(self) -> dict[str, Entity]:
        """Whose keys are needed, by name."""
        return {ref.view.entity.name: ref.view.entity for ref in self.features}

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that features may take from a request."""
        return tuple(name for ref in self.features for name in ref.view.request_of([ref.feature]))

    def columns(self, table: pa.Table, store: OnlineStore, now_us: int) -> dict[str, Any]:
        """Features, and which views are absent, by column; shape ``(n,)`` each."""
        reader, prefixes = self._planned(tuple(table.column_names))
        inputs = request_columns(table, reader.request, what="the frame")
        texts = {name: _texts(entity, table) for name, entity in reader.entities.items()}
        batch, _ = reader.read(store, texts, as_of_us=now_us, inputs=inputs)
        columns: dict[str, Any] = {name: batch.matrix[:, at] for at, name in enumerate(batch.names)}
        return columns | {f"{prefix}__{IS_ABSENT}": batch.absent[:, at] for at, prefix in enumerate(prefixes)}

    def _planned(self, names: tuple[str, ...]) -> tuple[FeatureReader, list[str]]:
        """Reads what a table with such columns can have, and what its views' columns begin with."""
        known = set(names)
        chosen = [ref for ref in self.features if self.explicit or ref.view.request_of([ref.feature]).keys() <= known]
        if names not in self._readers:
            self._readers[names] = FeatureReader.open(chosen, self.settings)
        return self._readers[names], list(dict.fromkeys(ref.view.prefix for ref in chosen))

    def __call__(self, block: pa.Table) -> pa.Table:
        """The block with `columns`, for Ray Data."""
        with OnlineStore.open(self.settings) as store:
            return with_columns(block, self.columns(block, store, self.now_us))


def _texts(entity: Entity, table: pa.Table) -> list[str]:
    texts: list[str] = entity.encode(table, what="the frame").cast(pa.string()).to_pylist()
    return texts


@dataclass(frozen=True, eq=False)
class KeptVectors:
    """Reads what is kept of a view, part by part: a bucket of written rows, or a day of snapshots; picklable."""

    view: FeatureView
    log: EventLog
    snapshots: OfflineStore
    span: tuple[int, int]
    keys: pa.Array | None
    parts: tuple[int, ...]

    @classmethod
    def of(
        cls, view: FeatureView, log: EventLog, snapshots: OfflineStore, span: tuple[int, int], ids: pa.Table | None
    ) -> Self:
        """Of some entities, or (None) all.

        Raises:
            UnknownTableError: If snapshots are asked for and there are none.
        """
        keys = None if ids is None else pc.unique(view.entity.encode(ids, what="the frame"))
        if isinstance(view, PrecomputedView):
            buckets = log.buckets if keys is None else np.unique(view.entity.buckets(keys, log.n_buckets)).tolist()
            return cls(view, log, snapshots, span, keys, tuple(buckets))
        days = [parse_instant_us(day) for day in snapshots.days(view.ref)]
        if not days:
            raise UnknownTableError(f"features/{view.ref}", tuple(snapshots.tables("features")))
        return cls(
            view, log, snapshots, span, keys, tuple(day for day in days if span[0] - US_PER_DAY < day < span[1])
        )

    def __call__(self, parts: pa.Table) -> pa.Table:
        """The rows of some parts, by instant and key."""
        read = self._written if isinstance(self.view, PrecomputedView) else self._snapshot
        found = [read(part) for part in parts.column("part").to_pylist()]
        keys = [(column, "ascending") for column in self.view.entity.key_columns]
        return pa.concat_tables([self._schema.empty_table(), *found]).sort_by([(AS_OF, "ascending"), *keys])

    @property
    def _schema(self) -> pa.Schema:
        keys = [(column, arrow_type(dtype)) for column, dtype in self.view.entity.keys.items()]
        names = [self.view[name].name for name in self.view.stored_features]
        return pa.schema([*keys, (AS_OF, TIMESTAMP), *((name, pa.float64()) for name in names)])

    def _written(self, bucket: int) -> pa.Table:
        """Of rows with one key and timestamp, the one that counts everywhere: the larger tie."""
        view, entity = self.view, self.view.entity
        rows = self.log.read_bucket(
            view.source,
            entity,
            bucket,
            columns=[*entity.key_columns, COMPUTED_AT, *view.base_features, TIE],
            min_time_us=self.span[0],
            max_time_us=self.span[1],
        )
        keys = entity.encode(rows, what="written rows").dictionary_encode().indices.to_numpy()
        order = np.lexsort((rows.column(TIE).to_numpy(), times_us(rows.column(COMPUTED_AT)), keys))
        sorted_keys, sorted_times = keys[order], times_us(rows.column(COMPUTED_AT))[order]
        last = np.ones(len(order), dtype=np.bool_)
        last[:-1] = (sorted_keys[1:] != sorted_keys[:-1]) | (sorted_times[1:] != sorted_times[:-1])
        rows = rows.take(pa.array(order[last]))
        columns = {name: rows.column(name).fill_null(np.nan).to_numpy() for name in view.base_features}
        view.derive(columns)
        rows = rows.select([*entity.key_columns, COMPUTED_AT]).rename_columns([*entity.key_columns, AS_OF])
        return self._asked(with_columns(rows, {view[name].name: columns[name] for name in view.stored_features}))

    def _snapshot(self, day_us: int) -> pa.Table:
        rows = self.snapshots.read(self.view.ref, start_us=day_us, end_us=day_us + US_PER_DAY)
        names = {f"{self.view.name}__{name}": self.view[name].name for name in self.view.stored_features}
        rows = rows.rename_columns([names.get(name, name) for name in rows.column_names])
        at = times_us(rows.column(AS_OF))
        return self._asked(rows.filter(pa.array((at >= self.span[0]) & (at < self.span[1]))))

    def _asked(self, rows: pa.Table) -> pa.Table:
        if self.keys is not None:
            encoded = self.view.entity.encode(rows, what="kept rows")
            rows = rows.filter(pc.is_in(encoded, value_set=self.keys))
        return rows.select(self._schema.names).cast(self._schema)
