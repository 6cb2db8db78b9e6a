"""Event log -> online rings: a view's history brought beside what live events made of it.

Bucket by bucket: read its events, add them up to tiles, pack rings, and let the server put each beside
the ring it holds (`heliostat.storage.history_script`). Running it twice, or beside live
ingestion, changes nothing. Few events are done by threads of this process, more by Ray's tasks
(`SMALL_MATERIALIZATION`): the same work on a bucket, and the same rings.

Each bucket says, beside its rings, which version of the log they were made from. So a run that is
killed goes on where it was, and a run looks only at entities with events that the last one hadn't
seen: windows that merely slide need no write, since whoever reads a ring masks it by time. Now and
then (``full_every_us``) all entities are looked at, and rings that nothing is left of are cleared.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import orjson

from heliostat.clock import US_PER_DAY, format_instant
from heliostat.features.definitions import FeatureView
from heliostat.online.backfill import entities_of, views_together
from heliostat.online.bucket_rings import (
    BucketDone,
    BucketJob,
    BucketTask,
    RateLimit,
    RunBucket,
)
from heliostat.online.due_buckets import due_jobs, every_job
from heliostat.online.tiles import RingLimits
from heliostat.schema import hash64
from heliostat.storage.bundles import RingBytes
from heliostat.storage.event_log import EventLog
from heliostat.storage.log_version import LogVersion
from heliostat.storage.online_store import OnlineConfig, OnlineStore
from heliostat.storage.ring_writes import BucketLease, EntityRings, RingCounts

SMALL_MATERIALIZATION = 3_000_000
"""Events up to which this process brings them online itself, also where a Ray is connected: on two cores it takes
less time than Ray's tasks for as many, and the server, which has to take in what all of them send, is half of it."""

SMALL_WITHOUT_RAY = 10_000_000
"""The same where a Ray would have to be started first, which takes as long."""

_AT_ONCE_HERE = 4  # some buckets are read and added up while the server takes others


@dataclass(frozen=True)
class Materialization:
    """What a materialization did.

    Attributes:
        views: References of the views.
        as_of_us: The instant that the rings were made for.
        log_version: Everything up to this version of the event log is in them.
        buckets: Buckets that had something to do.
        full: How many of those had all of their entities looked at.
        events: Events read.
        entities: Entities whose rings were sent.
        rings: What became of them.
        n_bytes: Of the bundles that were sent.
        seconds: How long it took.
    """

    views: tuple[str, ...]
    as_of_us: int
    log_version: int
    buckets: int
    full: int
    events: int
    entities: int
    rings: RingCounts
    n_bytes: int
    seconds: float

    @property
    def entities_per_s(self) -> float:
        """Entities a second."""
        return self.entities / self.seconds if self.seconds else 0.0

    def describe(self) -> dict[str, Any]:
        """A JSON document: what the job prints and the store keeps under `OnlineKeys.materialized`."""
        return {
            "views": list(self.views),
            "as_of": format_instant(self.as_of_us),
            "log_version": self.log_version,
            "buckets": self.buckets,
            "buckets_full": self.full,
            "events": self.events,
            "entities": self.entities,
            "rings_written": self.rings.written,
            "rings_unchanged": self.rings.unchanged,
            "rings_ahead": self.rings.ahead,
            "rings_busy": self.rings.busy,
            "rings_cleared": self.rings.cleared,
            "bytes": self.n_bytes,
            "seconds": round(self.seconds, 3),
            "entities_per_s": round(self.entities_per_s),
        }

    def __str__(self) -> str:
        told = {"ahead": self.rings.ahead, "busy": self.rings.busy, "cleared": self.rings.cleared}
        return (
            f"{', '.join(self.views)}: {self.events:,} events of {self.entities:,} entities, as of "
            f"{format_instant(self.as_of_us)}; rings: {self.rings.written:,} written, {self.rings.unchanged:,} "
            f"unchanged{''.join(f', {count:,} {name}' for name, count in told.items() if count)}; "
            f"{self.buckets} buckets in {self.seconds:.1f} s, {self.entities_per_s:,.0f} entities/s"
        )


@dataclass(frozen=True)
class Step:
    """How far a materialization is.

    Attributes:
        views: References of the views under way.
        done: Buckets that are done.
        total: Buckets that have something to do.
        entities: Entities whose rings were sent so far.
    """

    views: tuple[str, ...]
    done: int
    total: int
    entities: int


OnStep: TypeAlias = Callable[[Step], None]
"""Is told of every bucket that is done, and once before the first."""

Connect: TypeAlias = Callable[[], AbstractContextManager[object]]
"""Connects Ray for as long as the block runs."""


def materialize(
    views: Iterable[FeatureView],
    *,
    event_log: EventLog,
    online: OnlineConfig,
    as_of_us: int,
    limits: RingLimits,
    present: bool = True,
    full: bool = False,
    full_every_us: int = US_PER_DAY,
    rate: RateLimit | None = None,
    concurrency: int | None = None,
    on_ray: bool = True,
    small: int = SMALL_MATERIALIZATION,
    connect: Connect = contextlib.nullcontext,
    on_step: OnStep | None = None,
    gone: Collection[str] = (),
) -> tuple[Materialization, ...]:
    """Materialize views: one task a bucket of each (source, entity), which its views share.

    Args:
        views: Any.
        event_log: Where the events are.
        online: Where the rings go.
        as_of_us: Events before this instant count.
        limits: What the rings' layouts allow for.
        present: Whether the instant is now. An earlier one changes nothing that is newer; it looks at all
            entities and is no beginning for the next run.
        full: Look at all entities, also where nothing has changed.
        full_every_us: Do so by itself after this long.
        rate: How fast rings may be written, over all tasks.
        concurrency: Most buckets at once; None: as many as there are CPUs, or two in this process.
        on_ray: Whether Ray takes what isn't small; False: all is done by threads of this process.
        small: Events of a (source, entity) up to which it is.
        connect: Is entered before Ray has something to do; by default it is connected already.
        on_step: Told how far it is.
        gone: References of views that nobody reads any more; their rings leave the bundles that are written.

    Returns:
        What was done, for each (source, entity).

    Raises:
        StorageError: If the log can't be read or the store doesn't answer; what was done stays done.
        MaterializationConflictError: If another materialization of the same began meanwhile.
    """
    done = []
    with contextlib.ExitStack() as stack:
        for together in views_together(list(views)):
            log = event_log.opened(together[0].source, together[0].entity)
            task = BucketTask(
                together, event_log, log.version, online, as_of_us, limits, present, known=log, gone=tuple(gone)
            )
            ray = _Ray(connect, stack, small) if on_ray else None
            done.append(_Run(task, log, full, full_every_us, rate or RateLimit(), concurrency, ray, on_step).run())
    return tuple(done)


@dataclass(frozen=True)
class _Ray:
    """A Ray that is connected when it has something to do, until all is done."""

    connect: Connect
    until: contextlib.ExitStack
    small: int

    def ensure(self) -> None:
        """Connect it."""
        self.until.enter_context(self.connect())


@dataclass
class _Run:
    """One materialization of views of one source and entity."""

    task: BucketTask
    log: LogVersion
    full: bool
    full_every_us: int
    rate: RateLimit
    concurrency: int | None
    ray: _Ray | None
    on_step: OnStep | None
    finished: list[BucketDone] = field(default_factory=list)

    def run(self) -> Materialization:
        """Do it, and say in the store that it is done."""
        started_s, task = time.monotonic(), self.task
        with OnlineStore(task.online) as store:
            jobs = self._jobs(store)
            # What comes during the run comes from events; only what was there before may have none left.
            self.task = replace(task, sweeps=task.present and any(store.scan(task.plan.prefix)))
            self._say(len(jobs))
            # Closed, so that nothing more is begun after an error.
            with contextlib.closing(self._over(jobs)) as over:
                for done in over:
                    self.finished.append(done)
                    self._say(len(jobs))
            cleared = self._swept(store) if self.task.sweeps else RingCounts()
            result = Materialization(
                views=tuple(view.ref for view in task.views),
                as_of_us=task.as_of_us,
                log_version=task.log_version,
                buckets=len(jobs),
                full=sum(done.full for done in self.finished),
                events=sum(done.events for done in self.finished),
                entities=sum(done.entities for done in self.finished),
                rings=sum((done.rings for done in self.finished), cleared),
                n_bytes=sum(done.n_bytes for done in self.finished),
                seconds=time.monotonic() - started_s,
            )
            document = orjson.dumps(result.describe())
            store.put_many({task.online.keys.materialized(view.ref): document for view in task.views})
        return result

    def _say(self, total: int) -> None:
        if self.on_step is not None:
            entities = sum(done.entities for done in self.finished)
            self.on_step(Step(tuple(view.ref for view in self.task.views), len(self.finished), total, entities))

    def _jobs(self, store: OnlineStore) -> list[BucketJob]:
        if self.full or not self.task.present:
            return every_job(self.task)
        return due_jobs(self.task, store, self.full_every_us)

    def _over(self, jobs: Sequence[BucketJob]) -> Generator[BucketDone, None, None]:
        """Do them here or on Ray, by how many events their buckets' reads open, as the log's statistics have it."""
        if not jobs:
            return
        events = self.log.statistics([job.bucket for job in jobs], min_time_us=self.task.plan.first_us).rows
        if self.ray is None or events <= self.ray.small:
            yield from self._here(jobs)
        else:
            self.ray.ensure()
            yield from self._on_ray(jobs)

    def _here(self, jobs: Sequence[BucketJob]) -> Generator[BucketDone, None, None]:
        at_once = min(self.concurrency or _AT_ONCE_HERE, len(jobs))
        task = replace(self.task, rate=self.rate.shared(at_once))
        with OnlineStore(task.online) as store:
            if at_once == 1:
                yield from (task.run(job, store) for job in jobs)
                return
            with ThreadPoolExecutor(at_once) as pool:
                yield from pool.map(lambda job: task.run(job, store), jobs)

    def _on_ray(self, jobs: Sequence[BucketJob]) -> Generator[BucketDone, None, None]:
        # So that programs without Ray don't wait for its import.
        import ray

        from heliostat.cluster import cpus_a_task
        from heliostat.features.bucket_tasks import over_each

        at_once = self.concurrency or max(1, int(ray.cluster_resources().get("CPU", 1.0) / cpus_a_task()))
        task = replace(self.task, rate=self.rate.shared(min(at_once, len(jobs))))
        yield from over_each(RunBucket(task), jobs, concurrency=self.concurrency)

    # ── What nothing is left of ──────────────────────────────────────────────────

    def _swept(self, store: OnlineStore) -> RingCounts:
        """Clear the rings of entities of which the log knows nothing, in buckets that were looked at in full.

        Whoever has rings of other views alone is asked for in vain: one value is all that there is of an entity.
        """
        plan, swept = self.task.plan, RingCounts()
        by_bucket = {done.bucket: done for done in self.finished if done.full}
        if not by_bucket:
            return swept
        known = np.sort(np.concatenate([np.frombuffer(done.present, np.uint64) for done in by_bucket.values()]))
        source, entity = self.task.views[0].source, self.task.views[0].entity
        layouts = self.task.said_first(True)
        for keys in store.scan(plan.prefix):
            in_bucket, texts = entities_of(plan, keys)
            hashes = hash64(texts)
            missing = np.searchsorted(known, hashes, "right") == np.searchsorted(known, hashes, "left")
            for bucket in np.unique(in_bucket[missing]).tolist():
                if (done := by_bucket.get(bucket)) is None:
                    continue
                doomed = [keys[at] for at in np.flatnonzero(missing & (in_bucket == bucket)).tolist()]
                lease = BucketLease(store.keys.fence(source.name, entity.name, bucket), done.token, done.epoch)
                nothing = EntityRings(0, doomed, [RingBytes.none(len(doomed))] * len(plan.groups), {})
                for counts, _ in store.write_rings(list(layouts.calls(lease, nothing))):
                    swept += RingCounts(written=counts.written, cleared=counts.cleared)
        return swept
