"""Which files of the event log may hold what is asked for, and what their statistics tell.

Nothing here opens a file: Delta's log says how many rows each has, and their first and last time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from heliostat.schema import BUCKET, TIMESTAMP, times_us


@dataclass(frozen=True)
class LogStatistics:
    """What the log holds of one source and entity.

    Attributes:
        version: -1 when there is no table yet.
        rows: Number of events.
        files: Number of files.
        size_bytes: On disk.
        min_time_us: First event time, rounded down to a millisecond; None without events.
        max_time_us: Last event time, rounded up to a millisecond.
        rows_by_bucket: Number of events by bucket; buckets without any are left out.
    """

    version: int
    rows: int
    files: int
    size_bytes: int
    min_time_us: int | None
    max_time_us: int | None
    rows_by_bucket: Mapping[int, int]


def statistics_of(files: pa.Table, version: int, event_time: str) -> LogStatistics:
    """What some files hold together.

    Args:
        files: Rows of `Table.files`.
        version: Of the table.
        event_time: The column of event times.
    """
    if files.num_rows == 0:
        return LogStatistics(version, 0, 0, 0, None, None, {})
    by_bucket = files.group_by(f"partition.{BUCKET}").aggregate([("num_records", "sum")])
    buckets, rows = (by_bucket.column(name).to_pylist() for name in (f"partition.{BUCKET}", "num_records_sum"))
    return LogStatistics(
        version=version,
        rows=pc.sum(files.column("num_records")).as_py(),
        files=files.num_rows,
        size_bytes=pc.sum(files.column("size_bytes")).as_py(),
        min_time_us=pc.min(files.column(f"min.{event_time}")).cast(TIMESTAMP).cast(pa.int64()).as_py(),
        max_time_us=pc.max(files.column(f"max.{event_time}")).cast(TIMESTAMP).cast(pa.int64()).as_py(),
        rows_by_bucket=dict(sorted(zip(buckets, rows, strict=True))),
    )


def pruned(
    files: pa.Table,
    buckets: Collection[int] | None,
    event_time: str,
    min_time_us: int | None,
    max_time_us: int | None,
) -> pa.Table:
    """The files that may hold what is asked for; those without statistics stay.

    Args:
        files: Rows of `Table.files`.
        buckets: Which; None: all.
        event_time: The column of event times.
        min_time_us: Only events at or after this instant are asked for.
        max_time_us: Only events before this instant are.
    """
    keep = pa.scalar(True)
    if buckets is not None:
        column = files.column(f"partition.{BUCKET}")
        keep = pc.is_in(column, value_set=pa.array(buckets, column.type))
    bounds = (("max", pc.greater_equal, min_time_us), ("min", pc.less, max_time_us))
    for edge, compare, bound_us in bounds:
        name = f"{edge}.{event_time}"
        if bound_us is not None and name in files.column_names:
            within = compare(files.column(name), pa.scalar(bound_us, TIMESTAMP))
            keep = pc.and_(keep, pc.fill_null(within, True))
    return files if isinstance(keep, pa.Scalar) else files.filter(keep)


def paths_of(files: pa.Table) -> list[str]:
    """The files' paths, in an order that doesn't change."""
    paths: list[str] = sorted(files.column("path").to_pylist())
    return paths


def cut(rows: pa.Table, event_time: str, min_time_us: int | None, max_time_us: int | None) -> pa.Table:
    """The rows between the bounds; a part of the same memory where they are neighbours, as in a file.

    Args:
        rows: With event times, none of them null.
        event_time: Their column.
        min_time_us: Only events at or after this instant.
        max_time_us: Only events before this instant.
    """
    if rows.num_rows == 0 or (min_time_us is None and max_time_us is None):
        return rows
    times = times_us(rows.column(event_time))
    inside = np.ones(len(times), dtype=np.bool_)
    if min_time_us is not None:
        inside &= times >= min_time_us
    if max_time_us is not None:
        inside &= times < max_time_us
    n = int(np.count_nonzero(inside))
    first = int(inside.argmax())
    if n == 0 or inside[first : first + n].all():
        return rows.slice(first, n)
    return rows.filter(pa.array(inside))


def between(event_time: str, min_time_us: int | None, max_time_us: int | None) -> pc.Expression | None:
    """The condition that an event is between the bounds; None without bounds."""
    time = pc.field(event_time)
    low = None if min_time_us is None else time >= pa.scalar(min_time_us, TIMESTAMP)
    high = None if max_time_us is None else time < pa.scalar(max_time_us, TIMESTAMP)
    return both(low, high)


def both(one: pc.Expression | None, other: pc.Expression | None) -> pc.Expression | None:
    """Both conditions, where there are two."""
    return other if one is None else one if other is None else one & other
