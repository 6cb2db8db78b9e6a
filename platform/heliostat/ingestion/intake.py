"""How events come in: files into the event log, live events into the online store and its streams.

Both are judged by the same `EventCheck`, row by row: what is right is taken, what isn't is
refused with a reason. Both are idempotent on the event id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import pyarrow as pa

from heliostat.clock import Clock
from heliostat.errors import (
    CatalogUnavailableError,
    OnlineStoreUnavailableError,
    TooManyEventsError,
    UnknownSourceError,
)
from heliostat.features.categories import CategoryDictionary
from heliostat.features.definitions import EventSource, FeatureView
from heliostat.ingestion.checking import Checked, EventCheck, as_json
from heliostat.ingestion.files import Batch, event_files, read_ahead, read_batches
from heliostat.online.live import LiveRings, remember_ms
from heliostat.online.tiles import RingLimits, ring_layout
from heliostat.settings import IngestionSettings, Settings
from heliostat.storage.event_log import EventLog
from heliostat.storage.event_updates import EventOutcome, EventUpdate
from heliostat.storage.late_events import acount_late, count_late
from heliostat.storage.offline_store import DEAD_LETTERS, OfflineStore
from heliostat.storage.online_store import AsyncOnlineStore, OnlineStore
from heliostat.storage.stream_entries import event_entries

EventStatus = Literal["accepted", "duplicate", "late", "rejected"]

_log = logging.getLogger(__name__)

_DEAD_LETTERS_HELD = 100_000
_REASONS_COUNTED = 1_000
_REASONS_SHOWN = 5


# ── Files ───────────────────────────────────────────────────────────────────────────


class Stores(Protocol):
    """What bulk ingestion needs of a workspace."""

    clock: Clock

    @property
    def configured(self) -> Settings:
        """The settings as they were given; files need no online store."""
        ...

    @property
    def event_log(self) -> EventLog:
        """Where events go."""
        ...

    @property
    def offline_store(self) -> OfflineStore:
        """Where refused rows go."""
        ...

    @property
    def categories(self) -> CategoryDictionary:
        """Learns the texts of categorical features."""
        ...


@dataclass(frozen=True)
class IngestReport:
    """What came of ingesting files.

    Attributes:
        source: The event source's name.
        files: How many files were read.
        rows: How many rows they hold.
        accepted: Events that are new.
        duplicates: Events that were there before, or more than once in the files.
        rejected: Rows that were refused; they are kept as dead letters.
        reasons: How often each of the most frequent reasons was given.
        versions: The event log's version that holds the events, by entity.
        seconds: How long it took.
    """

    source: str
    files: int
    rows: int
    accepted: int
    duplicates: int
    rejected: int
    reasons: Mapping[str, int]
    versions: Mapping[str, int]
    seconds: float

    @property
    def nothing_fits(self) -> bool:
        """Whether there were rows and all were refused."""
        return self.rows > 0 and self.rejected == self.rows

    def to_document(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return {
            "source": self.source,
            "files": self.files,
            "rows": self.rows,
            "accepted": self.accepted,
            "duplicates": self.duplicates,
            "rejected": self.rejected,
            "reasons": dict(self.reasons),
            "versions": dict(self.versions),
            "seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        told = (
            f"{self.source}: {self.accepted:,} new events, {self.duplicates:,} known already, "
            f"{self.rejected:,} rejected, from {self.files} files in {self.seconds:.1f} s"
        )
        return "\n".join([told, *(f"  {count:,} x {reason}" for reason, count in self.reasons.items())])


def ingest_files(paths: Sequence[str | Path], source: EventSource, *, workspace: Stores) -> IngestReport:
    """Take files of events into the event log: all that is right in one commit for each entity's table.

    A crash leaves nothing half done, and a repetition changes nothing. Memory holds a batch of rows
    and a bucket of the log at a time.

    Args:
        paths: Parquet and CSV files, or folders of them.
        source: What they are events of.
        workspace: Where they go.

    Raises:
        MissingFileError: If a path doesn't exist.
        InvalidValueError: If a file can't be read as what its name says.
        SchemaMismatchError: If a file lacks a column, or one has a hopeless type; nothing is ingested.
        CategoryCollisionError: If two texts of a categorical feature have one code; nothing is ingested.
    """
    started_s = time.perf_counter()
    settings, now_us = workspace.configured.ingestion, workspace.clock.now_us()
    check = EventCheck(source, future_tolerance_us=settings.future_tolerance_us)
    files = event_files(paths)
    letters = _DeadLetters(workspace.offline_store, source.name, now_us)
    with workspace.event_log.bulk(source, ingested_us=now_us) as bulk:
        for file in files:
            for batch in read_ahead(read_batches(file, check, batch_rows=settings.batch_rows)):
                checked = check.check(batch.rows, now_us=now_us)
                _learn(workspace.categories, source.name, workspace.categories.unknown(source.name, checked.accepted))
                bulk.add(checked.accepted)
                letters.add(batch, checked)
        letters.flush()  # before the commit: once the events are in, nobody would look for them again
        result = bulk.commit()
        rows = bulk.rows + letters.count
    if letters.count:
        _log.warning("%d of %d rows of %s were rejected", letters.count, rows, source.name)
    return IngestReport(
        source=source.name,
        files=len(files),
        rows=rows,
        accepted=result.accepted,
        duplicates=result.duplicates,
        rejected=letters.count,
        reasons=dict(letters.reasons.most_common(_REASONS_SHOWN)),
        versions=result.versions,
        seconds=time.perf_counter() - started_s,
    )


class _DeadLetters:
    """Refused rows on their way to the offline store."""

    def __init__(self, store: OfflineStore, source: str, now_us: int) -> None:
        self._store, self._source, self._now_us = store, source, now_us
        self._held: list[dict[str, Any]] = []
        self.count = 0
        self.reasons: Counter[str] = Counter()

    def add(self, batch: Batch, checked: Checked) -> None:
        refused = batch.rows.take(pa.array(checked.rejected)).to_pylist() if len(checked.rejected) else []
        numbers = batch.numbers[checked.rejected].tolist()
        for number, reason, event in zip(numbers, checked.reasons, refused, strict=True):
            self._keep(batch.file, number, reason, as_json(event))
        for number, text, reason in batch.broken:
            self._keep(batch.file, number, reason, as_json(text))
        if len(self._held) >= _DEAD_LETTERS_HELD:
            self.flush()

    def _keep(self, file: str, number: int, reason: str, event: str) -> None:
        letter = {"file": file, "row": number, "reason": reason, "event": event, "rejected_at": self._now_us}
        self._held.append(letter)
        self.count += 1
        if reason in self.reasons or len(self.reasons) < _REASONS_COUNTED:
            self.reasons[reason] += 1

    def flush(self) -> None:
        self._store.append_dead_letters(self._source, pa.Table.from_pylist(self._held, schema=DEAD_LETTERS))
        self._held = []


# ── Live ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class EventResult:
    """What became of one live event.

    Attributes:
        event_id: Its id; None if it has none.
        status: ``accepted``; ``duplicate``: it was there before; ``late``: it is history, but too old
            for a ring that has moved on; ``rejected``: it is nowhere.
        reason: Why it was rejected.
    """

    event_id: int | str | None
    status: EventStatus
    reason: str | None = None

    def to_document(self) -> dict[str, Any]:
        """As JSON can carry it."""
        document: dict[str, Any] = {"event_id": self.event_id, "status": self.status}
        return document if self.reason is None else {**document, "reason": self.reason}


@dataclass(frozen=True)
class _Batch:
    """A checked batch on its way to the online store."""

    source: EventSource
    events: Sequence[Any]
    checked: Checked
    rings: LiveRings
    updates: list[EventUpdate]
    texts: Mapping[str, Mapping[int, str]]


def _learn(categories: CategoryDictionary, source: str, texts: Mapping[str, Mapping[int, str]]) -> None:
    """Features need no dictionary: a catalog that is down stops no event."""
    try:
        categories.learn(source, texts)
    except CatalogUnavailableError as error:
        _log.warning("new categories of %s aren't written down yet: %s", source, error)


class Declared(Protocol):
    """What ingestion needs of declarations."""

    @property
    def sources(self) -> Mapping[str, EventSource]:
        """The declared event sources, by name."""
        ...

    @property
    def views(self) -> Mapping[str, FeatureView]:
        """All versions of all views."""
        ...


class IntakeStores(Protocol):
    """What live ingestion needs of a workspace."""

    clock: Clock

    @property
    def settings(self) -> Settings:
        """The settings."""
        ...

    @property
    def definitions(self) -> Declared:
        """What is declared."""
        ...

    @property
    def categories(self) -> CategoryDictionary:
        """Learns the texts of categorical features."""
        ...


class Intake:
    """Takes live events: each one's de-duplication, rings and stream entry in one atomic script.

    Args:
        online: The online store; `submit` needs the blocking one, `asubmit` the one for asyncio.
        sources: The declared event sources.
        views: The views whose rings are kept up to date.
        clock: Tells the present.
        settings: How events are taken in.
        n_buckets: The event log's number of buckets.
        categories: Learns the texts of categorical features; None: nobody does.
    """

    def __init__(
        self,
        online: OnlineStore | AsyncOnlineStore,
        sources: Sequence[EventSource],
        views: Sequence[FeatureView],
        *,
        clock: Clock,
        settings: IngestionSettings,
        n_buckets: int,
        categories: CategoryDictionary | None = None,
    ) -> None:
        self._online, self._clock, self._settings, self._categories = online, clock, settings, categories
        limits = RingLimits(lateness_us=settings.lateness_us, future_tolerance_us=settings.future_tolerance_us)
        self._remember_ms = remember_ms(limits)
        self._sources = {source.name: source for source in sources}
        self._checks = {
            source.name: EventCheck(source, future_tolerance_us=settings.future_tolerance_us) for source in sources
        }
        self._rings = {
            source.name: LiveRings(
                source,
                [ring_layout(view, limits) for view in views if view.source.name == source.name],
                keys=online.keys,
                n_buckets=n_buckets,
            )
            for source in sources
        }

    @classmethod
    def of(cls, stores: IntakeStores, online: OnlineStore | AsyncOnlineStore) -> Self:
        """The intake of a workspace, into its online store, blocking or for asyncio."""
        return cls(
            online,
            list(stores.definitions.sources.values()),
            list(stores.definitions.views.values()),
            clock=stores.clock,
            settings=stores.settings.ingestion,
            n_buckets=stores.settings.storage.buckets,
            categories=stores.categories,
        )

    def submit(self, source: str, events: Sequence[Any]) -> list[EventResult]:
        """Take events in, in this order.

        Args:
            source: The event source's name.
            events: Parsed JSON objects with the source's columns; times as ISO 8601 or microseconds.

        Returns:
            What became of each.

        Raises:
            UnknownSourceError: If no source has this name.
            TooManyEventsError: If there are more than a request may carry.
            OnlineStoreUnavailableError: If the store doesn't answer. Submitting the same events again
                is safe: those that were taken are duplicates then.
        """
        if not isinstance(self._online, OnlineStore):
            raise TypeError("this intake has an asyncio store; use asubmit")
        batch = self._prepared(source, events)
        if self._categories is not None and batch.texts:
            _learn(self._categories, source, batch.texts)
        results = _results(batch, self._online.apply_events(batch.updates, remember_ms=self._remember_ms))
        if late := _late(results):
            with contextlib.suppress(OnlineStoreUnavailableError):  # the events are in; their count is for people
                count_late(self._online, source, late)
        return results

    async def asubmit(self, source: str, events: Sequence[Any]) -> list[EventResult]:
        """As `submit`, for asyncio."""
        if not isinstance(self._online, AsyncOnlineStore):
            raise TypeError("this intake has a blocking store; use submit")
        batch = self._prepared(source, events)
        if self._categories is not None and batch.texts:  # seldom: the first time that a process sees them
            await asyncio.to_thread(_learn, self._categories, source, batch.texts)
        results = _results(batch, await self._online.apply_events(batch.updates, remember_ms=self._remember_ms))
        if late := _late(results):
            with contextlib.suppress(OnlineStoreUnavailableError):
                await acount_late(self._online, source, late)
        return results

    def _prepared(self, name: str, events: Sequence[Any]) -> _Batch:
        source = self._sources.get(name)
        if source is None:
            raise UnknownSourceError(name, tuple(self._sources))
        if len(events) > self._settings.max_events_per_request:
            raise TooManyEventsError(len(events), self._settings.max_events_per_request)
        now_us = self._clock.now_us()
        checked = self._checks[name].check(events, now_us=now_us)
        rings = self._rings[name]
        accepted = checked.accepted
        updates = rings.updates(accepted, event_entries(accepted, ingested_us=now_us)) if accepted.num_rows else []
        texts = {} if self._categories is None else self._categories.unknown(name, accepted)
        return _Batch(source, events, checked, rings, updates, texts)


def _results(batch: _Batch, outcomes: Sequence[EventOutcome]) -> list[EventResult]:
    results: dict[int, EventResult] = {}
    ids = batch.checked.accepted.column(batch.source.event_id).to_pylist()
    told = batch.rings.outcomes(outcomes)
    for row, event_id, outcome in zip(batch.checked.rows.tolist(), ids, told, strict=True):
        results[row] = EventResult(event_id, "accepted" if outcome == "applied" else outcome)
    for row, reason in zip(batch.checked.rejected.tolist(), batch.checked.reasons, strict=True):
        results[row] = EventResult(_id_of(batch.events[row], batch.source), "rejected", reason)
    return [results[row] for row in range(len(batch.events))]


def _late(results: Sequence[EventResult]) -> int:
    return sum(each.status == "late" for each in results)


def _id_of(event: Any, source: EventSource) -> int | str | None:  # noqa: ANN401 - whatever somebody sent
    found = event.get(source.event_id) if isinstance(event, Mapping) else None
    if isinstance(found, bool):  # to Python a number
        return None
    return found if isinstance(found, int | str) else None
