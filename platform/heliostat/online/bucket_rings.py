"""One bucket's rings brought from the event log: what a task of a materialization does.

A task begins by taking the bucket over (`OnlineStore.begin_bucket`): whoever had begun before can't
write it any more, and every slot that live events touch from then on says so. It reads all that
happened before, and writes each entity atomically. Entities that live events touched in between are
done again with what came since, until none is left.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from heliostat.features.definitions import FeatureView
from heliostat.online.backfill import BucketRings, RingPlan
from heliostat.online.bucket_history import BucketHistory, HistoryReader
from heliostat.online.live import remember_ms
from heliostat.online.tiles import RingLayout, RingLimits
from heliostat.schema import TIMESTAMP
from heliostat.storage.bundles import view_id
from heliostat.storage.event_log import EventLog
from heliostat.storage.log_version import LogVersion
from heliostat.storage.online_store import OnlineConfig, OnlineStore
from heliostat.storage.ring_writes import BucketLease, RingCall, RingCounts, RingLayouts, RingOutcome

_CALLS_AT_ONCE = 8
_BATCHES_UNDER_WAY = 4
_ROUNDS = 40
_MOST_LEFT = 1_000


@dataclass(frozen=True)
class RateLimit:
    """How fast rings may be written; None: as fast as it goes.

    Attributes:
        entities_per_s: Entities a second.
        bytes_per_s: Bytes of rings a second.
    """

    entities_per_s: float | None = None
    bytes_per_s: float | None = None

    def shared(self, tasks: int) -> RateLimit:
        """One task's part."""
        parts = (None if each is None else each / tasks for each in (self.entities_per_s, self.bytes_per_s))
        return RateLimit(*parts)

    def seconds(self, entities: int, n_bytes: int) -> float:
        """How long that much has to take."""
        by_entities = 0.0 if self.entities_per_s is None else entities / self.entities_per_s
        return max(by_entities, 0.0 if self.bytes_per_s is None else n_bytes / self.bytes_per_s)


@dataclass(frozen=True)
class BucketState:
    """What a view's rings of one bucket were made from; kept beside them.

    Attributes:
        layout: Names of the ring groups, and the bound on lateness.
        version: Of the event log; everything up to it is in the rings.
        as_of_us: The instant.
        full_us: The instant of the last time that all entities were looked at.
        left: Entities that live events kept busy; they are due the next time.
    """

    layout: str
    version: int
    as_of_us: int
    full_us: int
    left: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """As the store keeps it."""
        return orjson.dumps(self)

    @classmethod
    def of(cls, document: bytes | None) -> BucketState | None:
        """From the store; None if there is nothing usable."""
        if document is None:
            return None
        try:
            values = orjson.loads(document)
            return cls(**{**values, "left": tuple(values["left"])})
        except (ValueError, TypeError, KeyError):
            return None


def layout_name(layout: RingLayout, limits: RingLimits) -> str:
    """What has to be the same for a bucket's state to hold."""
    return ",".join([*(group.name for group in layout.groups), str(limits.lateness_us)])


@dataclass(frozen=True)
class BucketJob:
    """What is to be done with one bucket.

    Attributes:
        bucket: Its number.
        after_us: Entities with events from this instant on are due; None: all entities are.
        full_us: The instant of the last time that all were.
        paths: Files whose entities are due as well.
        left: More of them, by their keys.
    """

    bucket: int
    after_us: int | None
    full_us: int
    paths: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class BucketDone:
    """What was done with one bucket.

    Attributes:
        bucket: Its number.
        full: Whether all entities were looked at.
        token: Of the last lease.
        epoch: Of the first: before it, all that live events did was read.
        events: Events read.
        entities: Entities whose rings were sent.
        rings: What became of them.
        n_bytes: Of the bundles that were sent.
        present: Hashes of the keys of all entities that were looked at, if all were and somebody wants to know.
    """

    bucket: int
    full: bool
    token: int
    epoch: int
    events: int
    entities: int
    rings: RingCounts
    n_bytes: int
    present: bytes = b""


@dataclass
class _Tally:
    """What became of writes so far."""

    entities: int = 0
    n_bytes: int = 0
    rings: RingCounts = field(default_factory=RingCounts)
    busy: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class BucketTask:
    """All that the materialization of one bucket needs; picklable.

    Attributes:
        views: All of one source and entity.
        event_log: Where the events are.
        log_version: Everything up to this version of it counts.
        online: Where the rings are.
        as_of_us: Events before this instant count.
        limits: What the rings' layouts allow for.
        present: Whether the instant is the present: then what live events have done is read as well, and
            what was done is remembered.
        rate: How fast this task may write.
        known: The log as it was when all this began.
        sweeps: Whether somebody wants to know which entities were looked at (`BucketDone.present`).
        gone: References of other views over the same source, whose rings go.
    """

    views: tuple[FeatureView, ...]
    event_log: EventLog
    log_version: int
    online: OnlineConfig
    as_of_us: int
    limits: RingLimits
    present: bool = True
    rate: RateLimit = RateLimit()
    known: LogVersion | None = None
    sweeps: bool = True
    gone: tuple[str, ...] = ()

    @cached_property
    def plan(self) -> RingPlan:
        """The rings."""
        return RingPlan(self.views, self.online.keys, self.as_of_us, self.limits)

    def said_first(self, covers: bool) -> RingLayouts:
        """What all writes begin with; `RingLayouts` says what ``covers`` means."""
        return RingLayouts(
            self.plan.described, covers, remember_ms(self.limits), b"".join(view_id(ref) for ref in self.gone)
        )

    def run(self, job: BucketJob, store: OnlineStore) -> BucketDone:
        """Materialize one bucket.

        Args:
            job: Which, and which of its entities.
            store: The online store.

        Raises:
            StorageError: If the log can't be read or the store doesn't answer.
            MaterializationConflictError: If another materialization of the bucket begins meanwhile.
        """
        plan, lease, history = self.plan, self._begun(job.bucket, store), self._read(job.bucket, store)
        n_events, full = history.events.num_rows, job.after_us is None
        if job.after_us is not None:
            due = self._due(job, history)
            full = due is None
            history = history if due is None else history.of_entities(due)
        rings = BucketRings.of(plan, job.bucket, history.events, history.recent, also=job.left)
        tally = self._write(rings, lease, history.covers, store)
        left, last = self._settled(lease, rings.texts, history, tally, store)
        if self.present:
            self._remember(job, full, left, store)
        present = rings.hashes().tobytes() if full and self.sweeps else b""
        return BucketDone(
            job.bucket, full, last.token, lease.epoch, n_events, tally.entities, tally.rings, tally.n_bytes, present
        )

    def remake(self, bucket: int, texts: Sequence[str], store: OnlineStore) -> RingCounts:
        """Make the rings of some entities anew, and clear those that nothing is left of.

        Args:
            bucket: The entities'.
            texts: Their keys.
            store: The online store.

        Raises:
            StorageError: As `run`.
            MaterializationConflictError: As `run`.
        """
        lease = self._begun(bucket, store)
        history = self._read(bucket, store).of_entities(self.views[0].entity.encoded(list(texts)))
        rings = BucketRings.of(self.plan, bucket, history.events, history.recent, also=texts)
        tally = self._write(rings, lease, history.covers, store)
        left, _ = self._settled(lease, rings.texts, history, tally, store)
        return tally.rings + RingCounts(busy=len(left))

    def _begun(self, bucket: int, store: OnlineStore) -> BucketLease:
        lease = store.begin_bucket(self.views[0].source.name, self.views[0].entity.name, bucket)
        # Should such a view come back, nobody may believe that its rings are still there.
        store.remove([store.keys.bucket_state(ref, bucket) for ref in self.gone])
        return lease

    def _read(self, bucket: int, store: OnlineStore) -> BucketHistory:
        return HistoryReader(self.plan, bucket, self.event_log, store, self.present, self.known).read()

    def _due(self, job: BucketJob, history: BucketHistory) -> pa.Array | None:
        """Encoded keys of the entities that have to be looked at; None if that can't be told."""
        source, entity = self.views[0].source, self.views[0].entity
        place = self.event_log.table(source, entity)
        parts = [history.fresh, entity.encoded(list(job.left))]
        later = history.events.filter(
            pc.greater_equal(history.events.column(source.event_time), pa.scalar(job.after_us, TIMESTAMP))
        )
        parts.append(entity.encode(later))
        if job.paths:
            table = place.open(history.version)
            found = place.filesystem().get_file_info(list(job.paths))
            if table is None or any(not each.is_file for each in found):
                return None
            parts.append(entity.encode(place.read(table, job.paths, columns=entity.key_columns)))
        return pc.unique(pa.chunked_array([part.cast(parts[0].type) for part in parts]))

    def _settled(
        self,
        lease: BucketLease,
        texts: Sequence[str],
        history: BucketHistory,
        tally: _Tally,
        store: OnlineStore,
    ) -> tuple[tuple[str, ...], BucketLease]:
        """Do busy entities again, with what came in between; returns those that stay busy, and the last lease."""
        for _ in range(_ROUNDS):
            if not tally.busy:
                break
            busy = [texts[at] for at in sorted(tally.busy)]
            lease = self._begun(history.bucket, store)
            history = (history.followed() or self._read(history.bucket, store)).of_entities(
                self.views[0].entity.encoded(busy)
            )
            again = BucketRings.of(self.plan, history.bucket, history.events, history.recent)
            texts, done = again.texts, self._write(again, lease, history.covers, store)
            tally.rings += done.rings
            tally.busy = done.busy
        return tuple(texts[at] for at in sorted(tally.busy)), lease

    def _write(self, rings: BucketRings, lease: BucketLease, covers: bool, store: OnlineStore) -> _Tally:
        """Send rings, several batches under way at a time."""
        tally, started_s = _Tally(), time.monotonic()
        layouts = self.said_first(covers)
        under_way: deque[Future[list[RingOutcome]]] = deque()
        with ThreadPoolExecutor(1) as pool:
            for batch in _batches(call for each in rings.writes() for call in layouts.calls(lease, each)):
                tally.entities += sum(call.n_entities for call in batch)
                tally.n_bytes += sum(call.n_bytes for call in batch)
                under_way.append(pool.submit(store.write_rings, batch))
                if len(under_way) > _BATCHES_UNDER_WAY:
                    _absorb(tally, under_way.popleft())
                wait_s = self.rate.seconds(tally.entities, tally.n_bytes) - (time.monotonic() - started_s)
                if wait_s > 0:
                    time.sleep(wait_s)
            while under_way:
                _absorb(tally, under_way.popleft())
        return tally

    def _remember(self, job: BucketJob, full: bool, left: tuple[str, ...], store: OnlineStore) -> None:
        """Say what the rings were made from, now that they are."""
        version = self.log_version if len(left) <= _MOST_LEFT else -1
        full_us = self.as_of_us if full else job.full_us
        store.put_many(
            {
                store.keys.bucket_state(layout.view.ref, job.bucket): BucketState(
                    layout_name(layout, self.limits), version, self.as_of_us, full_us, left[:_MOST_LEFT]
                ).to_bytes()
                for layout in self.plan.layouts
            }
        )


def _batches(calls: Iterable[RingCall]) -> Iterator[list[RingCall]]:
    remaining = iter(calls)
    while batch := list(islice(remaining, _CALLS_AT_ONCE)):
        yield batch


def _absorb(tally: _Tally, written: Future[list[RingOutcome]]) -> None:
    outcomes = written.result()
    # Those that stay busy are counted at the end.
    tally.rings += replace(RingCounts.total(outcome.counts for outcome in outcomes), busy=0)
    for outcome in outcomes:
        tally.busy.update(outcome.busy)


@dataclass(frozen=True)
class RunBucket:
    """The task as Ray calls it."""

    task: BucketTask

    def __call__(self, job: BucketJob) -> BucketDone:
        """Materialize one bucket, on a connection of its own."""
        with OnlineStore(self.task.online) as store:
            return self.task.run(job, store)
