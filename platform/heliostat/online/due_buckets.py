"""Which buckets a materialization has something to do in, and which of their entities are due.

Each bucket's state says which version of the event log its rings were made from. What the log has got since
is told by its commits and its files' statistics: not a row is read.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from heliostat.online.bucket_rings import BucketJob, BucketState, BucketTask, layout_name
from heliostat.schema import TIMESTAMP
from heliostat.storage.log_version import NO_VERSION
from heliostat.storage.online_store import OnlineStore
from heliostat.storage.table_changes import TableChanges, table_changes


def every_job(task: BucketTask) -> list[BucketJob]:
    """All entities of all buckets."""
    return [BucketJob(bucket, None, task.as_of_us) for bucket in task.event_log.buckets]


def due_jobs(task: BucketTask, store: OnlineStore, full_every_us: int) -> list[BucketJob]:
    """Only what has changed since each bucket was done last; buckets without changes are left out.

    Args:
        task: What is materialized.
        store: Has the buckets' states.
        full_every_us: All entities of a bucket are due after this long.

    Raises:
        StorageError: If the log can't be read or the store doesn't answer.
    """
    states = _states(task, store, full_every_us)
    known = [state.version for state in states.values()]
    place = task.event_log.table(task.views[0].source, task.views[0].entity)
    changes = None
    if known and task.log_version != NO_VERSION:
        changes = table_changes(place, after=min(known), through=task.log_version)
    elif known:
        changes = TableChanges({}, {})
    if changes is None:
        return every_job(task)
    last_us = _last_times(task)
    jobs = (_job(task, bucket, states.get(bucket), changes, last_us.get(bucket)) for bucket in task.event_log.buckets)
    return [job for job in jobs if job is not None]


def _states(task: BucketTask, store: OnlineStore, full_every_us: int) -> dict[int, BucketState]:
    """What each bucket's rings were made from, where that holds for all views."""
    found: dict[int, BucketState] = {}
    layouts = {each.view.ref: layout_name(each, task.limits) for each in task.plan.layouts}
    for bucket in task.event_log.buckets:
        documents = store.read([store.keys.bucket_state(ref, bucket) for ref in layouts])
        states = [BucketState.of(document) for document in documents]
        usable = [
            state
            for state, layout in zip(states, layouts.values(), strict=True)
            if state is not None
            and state.layout == layout
            and NO_VERSION <= state.version <= task.log_version
            and state.as_of_us <= task.as_of_us < state.full_us + full_every_us
        ]
        if len(usable) == len(layouts):
            found[bucket] = BucketState(
                "",
                version=min(state.version for state in usable),
                as_of_us=min(state.as_of_us for state in usable),
                full_us=min(state.full_us for state in usable),
                left=tuple({text for state in usable for text in state.left}),
            )
    return found


def _last_times(task: BucketTask) -> dict[int, int]:
    """The last event time of each bucket, as the log's statistics have it."""
    source, entity = task.views[0].source, task.views[0].entity
    place = task.event_log.table(source, entity)
    table = place.open(task.log_version) if task.log_version != NO_VERSION else None
    found: dict[int, int] = {}
    if table is None:
        return found
    files, name = place.files(table), f"max.{source.event_time}"
    if not files.num_rows:
        return found
    buckets = files.column(f"partition.{place.partition}").to_pylist()
    unknown = np.iinfo(np.int64).max
    if name in files.column_names:
        ends = files.column(name).cast(TIMESTAMP).cast(pa.int64()).to_pylist()
    else:
        ends = [None] * len(buckets)
    for bucket, end in zip(buckets, ends, strict=True):
        found[int(bucket)] = max(found.get(int(bucket), 0), unknown if end is None else end)
    return found


def _job(
    task: BucketTask, bucket: int, state: BucketState | None, changes: TableChanges, last_us: int | None
) -> BucketJob | None:
    paths = None if state is None else changes.since(str(bucket), state.version)
    if state is None or paths is None:
        return BucketJob(bucket, None, task.as_of_us)
    # Events that the log had already, but that hadn't happened yet at the last instant.
    due = last_us is not None and last_us >= state.as_of_us > 0 and state.as_of_us < task.as_of_us
    if not paths and not due and not state.left:
        return None
    return BucketJob(bucket, state.as_of_us, state.full_us, paths, state.left)
