"""Streams -> Delta tables, exactly once.

A table's commit carries, as Delta application transactions, the last entry of each stream that
it applies. So a sink that is killed between commit and trim finds the entries again, sees that
they are applied, and only trims; two sinks at once can't both apply an entry.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from heliostat.clock import US_PER_DAY, US_PER_HOUR, Clock, parse_duration_us, parse_instant_us
from heliostat.errors import StaleProgressError, StorageError, StreamEntryError
from heliostat.features.definitions import EventSource
from heliostat.ingestion.checking import EventCheck
from heliostat.ingestion.intake import Declared
from heliostat.ingestion.lease import SinkLease
from heliostat.ingestion.mending import RingMender
from heliostat.online.tiles import RingLimits
from heliostat.schema import INGESTED, times_us
from heliostat.settings import Settings
from heliostat.storage.delta import OpenTables, Progress, StreamId
from heliostat.storage.erasure import vacuum
from heliostat.storage.event_log import EventLog
from heliostat.storage.offline_store import DEAD_LETTERS, OfflineStore
from heliostat.storage.online_store import OnlineConfig
from heliostat.storage.stream_entries import StreamName, entry_text, events_from, rows_from
from heliostat.storage.streams import Streams

_log = logging.getLogger(__name__)

_ENTRIES_A_STREAM = 10_000
# An entry holds all predictions that were made together: megabytes, if they are many.
_RECORDS_A_STREAM = 1_000
_TRIES = 5
_COMMITS_A_COMPACTION = 50
_LONGEST_PAUSE_S = 30.0
# How often it is said that another sink runs, old files are deleted, and rings are mended.
_SAID_EVERY_S = 60.0
_VACUUM_EVERY_S = 3600.0
_MEND_EVERY_S = 5.0

# Whether an event came from the future was judged when it was taken in.
_END_OF_TIME_US = parse_instant_us("9999-12-31")

RECORDS: tuple[StreamName, ...] = ("predictions", "actuals")

Entries = list[tuple[StreamId, bytes]]
Entry = tuple[str, StreamId, bytes]
Decoded = TypeVar("Decoded")


@dataclass(frozen=True)
class Drained:
    """What one drain moved.

    Attributes:
        events: Events that are new in the event log.
        duplicates: Events that the log had already.
        predictions: Predictions that are new in their tables.
        actuals: Reported labels that are new in their tables.
        unreadable: Entries that went to the dead letters.
        trimmed: Entries that were dropped from their streams, now that they are applied.
    """

    events: int = 0
    duplicates: int = 0
    predictions: int = 0
    actuals: int = 0
    unreadable: int = 0
    trimmed: int = 0

    def __add__(self, other: Drained) -> Drained:
        return Drained(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Drained)))

    def to_document(self) -> dict[str, int]:
        """As JSON can carry it."""
        return {each.name: getattr(self, each.name) for each in fields(Drained)}

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in self.to_document().items())


class SinkStores(Protocol):
    """What the sink needs of a workspace."""

    clock: Clock

    @property
    def settings(self) -> Settings:
        """The settings."""
        ...

    @property
    def streams(self) -> Streams:
        """Where it comes from."""
        ...

    @property
    def event_log(self) -> EventLog:
        """Where events go."""
        ...

    @property
    def offline_store(self) -> OfflineStore:
        """Where predictions, actuals and unreadable entries go."""
        ...

    @property
    def online_config(self) -> OnlineConfig:
        """How to reach the rings."""
        ...

    @property
    def definitions(self) -> Declared:
        """What is declared."""
        ...


@dataclass
class Sink:
    """Moves what streams hold into tables.

    Args:
        streams: Where it comes from.
        event_log: Where events go.
        offline_store: Where predictions, actuals and unreadable entries go.
        sources: The declared event sources.
        clock: Tells when an unreadable entry was put aside.
        vacuum_after_us: How long files that were merged stay for those that still read them, microseconds.
        mender: Makes rings anew that have taken in what the log had already; None: nobody does.
    """

    streams: Streams
    event_log: EventLog
    offline_store: OfflineStore
    sources: Sequence[EventSource]
    clock: Clock
    vacuum_after_us: int = US_PER_DAY
    mender: RingMender | None = None
    # The same stores, whose tables stay open from drain to drain.
    _tables: OpenTables = field(default_factory=OpenTables, init=False, repr=False)
    _open_log: EventLog = field(init=False, repr=False)
    _open_store: OfflineStore = field(init=False, repr=False)
    _commits: int = field(default=0, init=False)
    _mended_s: float = field(default=-math.inf, init=False)
    _vacuumed_s: float = field(default=-math.inf, init=False)

    def __post_init__(self) -> None:
        self._open_log = self.event_log.keeping(self._tables)
        self._open_store = self.offline_store.keeping(self._tables)

    @classmethod
    def of(cls, stores: SinkStores) -> Self:
        """The sink of a workspace."""
        kept = stores.settings.storage.vacuum_after
        return cls(
            streams=stores.streams,
            event_log=stores.event_log,
            offline_store=stores.offline_store,
            sources=tuple(stores.definitions.sources.values()),
            clock=stores.clock,
            vacuum_after_us=0 if kept is None else parse_duration_us(kept),
            mender=RingMender(
                stores.streams,
                stores.event_log,
                stores.online_config,
                stores.definitions.views.values(),
                RingLimits.of(stores.settings.ingestion),
                stores.clock,
            ),
        )

    def run_forever(self, interval_s: float, stop: threading.Event) -> Drained:
        """Drain again and again; a store that is away, or a full disk, is waited for.

        Of several sinks that run, one drains; another takes over when it ends or is killed.

        Args:
            interval_s: Pause between two drains, seconds.
            stop: Set it to end after the drain under way.

        Returns:
            What was moved in all.
        """
        total, pause_s = Drained(), interval_s
        lease, said_s = SinkLease(self.streams, interval_s=interval_s), -math.inf
        while not stop.is_set():
            try:
                other = lease.other()
                if other is None:
                    moved = self.drain_once()
                    self._vacuum()
            except (StorageError, StaleProgressError) as error:
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
                _log.warning("not everything was drained, next try in %.1f s: %s", pause_s, error)
                stop.wait(pause_s)
                continue
            pause_s = interval_s
            if other is None:
                total += moved
                if moved != Drained():
                    _log.info("drained %s", moved)
            elif time.monotonic() > said_s + _SAID_EVERY_S:
                said_s = time.monotonic()
                _log.warning("another sink runs (%s): this one waits until it ends; one is enough", other)
            stop.wait(pause_s)
        with contextlib.suppress(StorageError):
            lease.release()
        return total

    def drain_once(self) -> Drained:
        """Move all that is in the streams now.

        Raises:
            OnlineStoreUnavailableError: If the streams' server doesn't answer.
            TableCommitError: If a table can't be written; its entries stay in their streams.
            StaleProgressError: If other sinks are quicker again and again.
        """
        total = Drained()
        for source in self.sources:
            total += self._drain(partial(self._drain_events, source))
        for name in RECORDS:
            total += self._drain(partial(self._drain_records, name))
        self._mend()
        self._compact()
        return total

    def _drain(self, once: Callable[[], tuple[Drained, bool]]) -> Drained:
        total, more, tries = Drained(), True, 0
        while more:
            try:
                moved, more = once()
            except StaleProgressError:
                tries += 1
                if tries == _TRIES:
                    raise
                continue
            total, tries = total + moved, 0
        return total

    # ── Events ───────────────────────────────────────────────────────────────────

    def _drain_events(self, source: EventSource) -> tuple[Drained, bool]:
        waiting = self._waiting(self.streams.event_streams(source.name), at_most=_ENTRIES_A_STREAM)
        if not waiting:
            return Drained(), False
        events, places, unreadable = self._events(source, waiting)
        accepted, known = 0, 0
        for entity in source.entities:
            applied = self._open_log.progress(source, entity, list(waiting))
            last = {stream: entries[-1][0] for stream, entries in waiting.items()}
            moving = [stream for stream in waiting if _is_new(last[stream], applied[stream])]
            if not moving:
                continue
            result = self._open_log.append(
                source,
                events.filter(pa.array([_is_new(entry, applied[stream]) for stream, entry in places], pa.bool_())),
                ingested_us=0,  # each entry says when it was ingested
                entity=entity,
                progress=Progress(
                    before={stream: applied[stream] for stream in moving},
                    after={stream: last[stream] for stream in moving},
                ),
            )
            self._commits += 1
            if self.mender is not None:  # before the trim: what is trimmed is never looked at again
                self.mender.note(source, entity, result.repeated[entity.name])
            accepted, known = max(accepted, result.accepted), max(known, result.duplicates)
        moved = Drained(accepted, known, unreadable=unreadable, trimmed=self._trim(waiting))
        return moved, any(len(entries) == _ENTRIES_A_STREAM for entries in waiting.values())

    def _events(
        self, source: EventSource, waiting: Mapping[str, Entries]
    ) -> tuple[pa.Table, list[tuple[str, StreamId]], int]:
        """The events of entries, where each one was, and how many entries became dead letters."""
        entries = [(stream, entry, payload) for stream, found in waiting.items() for entry, payload in found]
        good, events, bad = _decoded(
            entries, lambda some: events_from([payload for _, _, payload in some], source.schema)
        )
        checked = EventCheck(source, future_tolerance_us=0).check(events, now_us=_END_OF_TIME_US)
        bad.extend((good[row], reason) for row, reason in zip(checked.rejected, checked.reasons, strict=True))
        self._put_aside(source.name, bad)
        ingested = events.column(INGESTED).take(pa.array(checked.rows))
        places = [(stream, entry) for stream, entry, _ in (good[row] for row in checked.rows)]
        return checked.accepted.append_column(INGESTED, ingested), places, len(bad)

    # ── Predictions and actuals ──────────────────────────────────────────────────

    def _drain_records(self, name: StreamName) -> tuple[Drained, bool]:
        stream = self.streams.record_stream(name)
        waiting = self._waiting([stream], at_most=_RECORDS_A_STREAM)
        if not waiting:
            return Drained(), False
        entries = [(stream, entry, payload) for entry, payload in waiting[stream]]
        _, by_model, bad = _decoded(
            entries, lambda some: rows_from(name, [(entry, payload) for _, entry, payload in some])
        )
        self._put_aside(name, bad)
        last, count = waiting[stream][-1][0], 0
        for model, (ids, rows) in by_model.items():
            applied = self._open_store.progress(name, model, [stream])[stream]
            new = rows.filter(pa.array([_is_new(entry, applied) for entry in ids], pa.bool_()))
            if name == "predictions":
                # An append whose answer was lost is repeated: at once, or when the server is back.
                new = self._unknown(model, _first_of_each(new, "prediction_id"))
            if new.num_rows:
                progress = Progress(before={stream: applied}, after={stream: last})
                self._open_store.append_stream(name, model, new, progress)
                self._commits += 1
                count += new.num_rows
        moved = Drained(**{name: count}, unreadable=len(bad), trimmed=self._trim(waiting))
        return moved, len(waiting[stream]) == _RECORDS_A_STREAM

    def _unknown(self, model: str, rows: pa.Table) -> pa.Table:
        """Predictions that aren't in the model's table yet; the same one is of the same instant each time."""
        if not rows.num_rows:
            return rows
        at_us = times_us(rows.column("at"))
        known = self._open_store.read_predictions(
            model, start_us=int(at_us.min()), end_us=int(at_us.max()) + 1, columns=["prediction_id"]
        )
        ids = known.column("prediction_id").combine_chunks()
        return rows.filter(pc.invert(pc.is_in(rows.column("prediction_id"), value_set=ids))) if len(ids) else rows

    # ── Both ─────────────────────────────────────────────────────────────────────

    def _waiting(self, streams: Sequence[str], *, at_most: int) -> dict[str, Entries]:
        """The oldest entries of each stream that has any; another sink may have trimmed one since it was measured."""
        lengths = self.streams.lengths(streams)
        read = {stream: self.streams.read(stream, count=at_most) for stream in streams if lengths[stream]}
        return {stream: entries for stream, entries in read.items() if entries}

    def _trim(self, waiting: Mapping[str, Entries]) -> int:
        """Drop entries that every table has by now."""
        return sum(self.streams.trim(stream, entries[-1][0]) for stream, entries in waiting.items())

    def _put_aside(self, name: str, bad: Sequence[tuple[Entry, str]]) -> None:
        """Keep entries that can't be applied, so that they don't stop those behind them."""
        now_us = self.clock.now_us()
        letters = [
            {
                "file": f"{stream} {entry[0]}-{entry[1]}",
                "row": 0,
                "reason": reason,
                "event": entry_text(payload),
                "rejected_at": now_us,
            }
            for (stream, entry, payload), reason in bad
        ]
        if letters:
            _log.warning("%d entries for %s can't be applied; they are dead letters now", len(letters), name)
        self._open_store.append_dead_letters(name, pa.Table.from_pylist(letters, schema=DEAD_LETTERS))

    def _mend(self) -> None:
        """Make rings anew that have taken in an event which the log had already, a few seconds' worth at a time."""
        if self.mender is None or time.monotonic() < self._mended_s + _MEND_EVERY_S:
            return
        self._mended_s = time.monotonic()
        if entities := self.mender.mend():
            _log.info("made the rings of %d entities anew: they were sent events that the log had already", entities)

    # ── Small files ──────────────────────────────────────────────────────────────

    def _compact(self) -> None:
        """Merge the small files that drains leave, now and then; what fails is tried again later."""
        if self._commits < _COMMITS_A_COMPACTION:
            return
        self._commits = 0
        try:
            for source in self.sources:
                for entity in source.entities:
                    self._open_log.compact(source, entity)
            for name in RECORDS:
                for model in self._open_store.tables(name):
                    self._open_store.compact(name, model)
        except StorageError as error:
            _log.warning("small files weren't merged: %s", error)
        self._tables.forget()  # what a table remembers of files that are no more goes as well

    def _vacuum(self) -> None:
        """Delete the files that were merged into others long enough ago that nobody reads them any more.

        What a killed sink has written and not committed goes as well, a day later.
        """
        if time.monotonic() < self._vacuumed_s + _VACUUM_EVERY_S:
            return
        self._vacuumed_s = time.monotonic()
        hours = -(-self.vacuum_after_us // US_PER_HOUR)
        try:
            tables = [self._open_log.table(source, entity) for source in self.sources for entity in source.entities]
            tables += [
                self._open_store.table(name, model) for name in RECORDS for model in self._open_store.tables(name)
            ]
        except StorageError as error:
            tables = []
            _log.warning("old files weren't looked for: %s", error)
        for table in tables:
            try:
                vacuum(table, hours=hours)
            except StorageError as error:
                _log.warning("old files weren't deleted: %s", error)


def _is_new(entry: StreamId, applied: StreamId | None) -> bool:
    return applied is None or entry > applied


def _decoded(
    entries: list[Entry], decode: Callable[[list[Entry]], Decoded]
) -> tuple[list[Entry], Decoded, list[tuple[Entry, str]]]:
    """Entries that can be decoded, decoded, and those that can't with the reason; told one by one only if need be."""
    try:
        return entries, decode(entries), []
    except StreamEntryError:
        good, bad = [], []
    for entry in entries:
        try:
            decode([entry])
        except StreamEntryError as error:
            bad.append((entry, error.reason))
        else:
            good.append(entry)
    return good, decode(good), bad


def _first_of_each(rows: pa.Table, column: str) -> pa.Table:
    ids = rows.column(column).combine_chunks().dictionary_encode()
    if len(ids.dictionary) == rows.num_rows or ids.null_count:
        return rows
    _, first = np.unique(ids.indices.to_numpy(), return_index=True)
    return rows.take(pa.array(np.sort(first)))
