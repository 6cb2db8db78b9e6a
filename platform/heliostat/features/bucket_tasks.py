"""One Ray task a bucket of entities, for work that keeps a core busy.

Plain tasks rather than a Dataset: buckets are many small, independent pieces of work, which need no
planning. Their results wait for whoever takes them, and no more are begun than keep the cores busy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from heliostat.cluster import cpus_a_task
from heliostat.errors import HeliostatError

Given = TypeVar("Given")
Found = TypeVar("Found")


def over_buckets(
    task: Callable[[int], pa.Table], n_buckets: int, *, concurrency: int | None = None
) -> Iterator[pa.Table]:
    """Run a task for each bucket on the connected Ray; tables come as they are done, in no order.

    Args:
        task: Picklable; takes a bucket's number.
        n_buckets: Of the event log.
        concurrency: Most at a time; None: as many as there are cores.

    Yields:
        What the tasks gave; tables without rows are left out.

    Raises:
        HeliostatError: What a task raised, as itself.
    """
    yield from _with_rows(over_each(task, range(n_buckets), concurrency=concurrency))


def over_blocks(
    task: Callable[[pa.Table], pa.Table], blocks: Sequence[pa.Table], *, concurrency: int | None = None
) -> Iterator[pa.Table]:
    """The same for a table of rows a bucket.

    Args:
        task: Picklable; takes one of the tables.
        blocks: They go to the tasks through Ray's memory, in this order.
        concurrency: Most at a time; None: as many as there are cores.

    Yields:
        What the tasks gave; tables without rows are left out.

    Raises:
        HeliostatError: What a task raised, as itself.
    """
    yield from _with_rows(over_each(task, blocks, concurrency=concurrency))


def over_each(
    task: Callable[[Given], Found], work: Sequence[Given], *, concurrency: int | None = None
) -> Generator[Found, None, None]:
    """The same for any pieces of work, which are small; a plain object takes Ray half as long as a table.

    Args:
        task: Picklable; takes one of them.
        work: In this order.
        concurrency: Most at a time; None: as many as there are cores.

    Yields:
        What the tasks gave.

    Raises:
        HeliostatError: What a task raised, as itself.
    """
    each_takes = cpus_a_task()
    at_a_time = concurrency or 2 * max(1, int(ray.cluster_resources().get("CPU", 1.0) / each_takes))
    remote, shared = _IN_A_TASK.options(num_cpus=each_takes), ray.put(task)
    begun = 0
    under_way: list[ray.ObjectRef[Found]] = []
    try:
        while begun < len(work) or under_way:
            while begun < len(work) and len(under_way) < at_a_time:
                under_way.append(remote.remote(shared, work[begun]))
                begun += 1
            done, under_way = ray.wait(under_way, num_returns=1)
            yield _got(done[0])
    finally:
        for each in under_way:
            ray.cancel(each)


def _with_rows(tables: Generator[pa.Table, None, None]) -> Iterator[pa.Table]:
    with contextlib.closing(tables):
        yield from (table for table in tables if table.num_rows)


def _run(task: Callable[[Given], Found], given: Given) -> Found:
    return task(given)


# Once: Ray brings every function that it is given to every worker.
_IN_A_TASK = ray.remote(_run)


def _got(done: ray.ObjectRef[Any]) -> Any:  # noqa: ANN401 - a task's own
    """What a task gave; an error of ours inside it comes out as itself."""
    try:
        return ray.get(done)
    except RayTaskError as error:
        if isinstance(error.cause, HeliostatError):
            raise error.cause from None
        raise
