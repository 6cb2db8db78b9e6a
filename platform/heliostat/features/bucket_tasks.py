"""One Ray task a bucket of entities, for work that keeps a core busy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import ray.data
from ray.data import DataContext, Dataset, TaskPoolStrategy
from ray.exceptions import RayTaskError

from heliostat.cluster import cpus_a_task
from heliostat.errors import HeliostatError


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
    with _context():
        numbers = ray.data.range(n_buckets, override_num_blocks=n_buckets)
        done = _mapped(numbers, _OfBuckets(task), concurrency)
    yield from _batches(done)


def over_blocks(
    task: Callable[[pa.Table], pa.Table], blocks: Sequence[pa.Table], *, concurrency: int | None = None
) -> Iterator[pa.Table]:
    """The same for a table of rows a bucket.

    Args:
        task: Picklable; takes one of the tables.
        blocks: At least one; they go to the tasks through Ray's memory.
        concurrency: Most at a time; None: as many as there are cores.

    Yields:
        What the tasks gave; tables without rows are left out.

    Raises:
        HeliostatError: What a task raised, as itself.
    """
    with _context():
        done = _mapped(ray.data.from_arrow(list(blocks)), task, concurrency)
    yield from _batches(done)


def over_dataset(task: Callable[[pa.Table], pa.Table], rows: Dataset, *, batch_rows: int) -> Iterator[pa.Table]:
    """Run a task for each part of somebody's Dataset; tables come as they are done, in no order.

    Args:
        task: Picklable; takes a table.
        rows: Any Dataset.
        batch_rows: How many rows a task gets at most.

    Yields:
        What the tasks gave.

    Raises:
        HeliostatError: What a task raised, as itself.
    """
    context, before = rows.context, rows.context.raise_original_map_exception
    context.raise_original_map_exception = True  # as in `_context`, for as long as it runs
    try:
        yield from _batches(rows.map_batches(task, batch_format="pyarrow", batch_size=batch_rows))
    finally:
        context.raise_original_map_exception = before


def _batches(rows: Dataset) -> Iterator[pa.Table]:
    """A Dataset's blocks, to the end; an error of ours inside a task comes out as itself."""
    try:
        for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            if batch.num_rows:
                yield batch
    except RayTaskError as error:
        if isinstance(error.cause, HeliostatError):
            raise error.cause from None
        raise


@contextlib.contextmanager
def _context() -> Iterator[None]:
    """How Datasets made inside are run."""
    context = DataContext.get_current().copy()
    # Ray Data's own wrapper would lose the error's kind.
    context.raise_original_map_exception = True
    # It would keep half of the cores free for operators that these pipelines don't have.
    context.op_resource_reservation_enabled = False
    with DataContext.current(context):
        yield


def _mapped(rows: Dataset, task: Callable[[pa.Table], pa.Table], concurrency: int | None) -> Dataset:
    return rows.map_batches(
        task,
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=cpus_a_task(),
        compute=TaskPoolStrategy(size=concurrency),
    )


class _OfBuckets:
    """The task as Ray Data calls it: a table of bucket numbers in, their tables out."""

    def __init__(self, task: Callable[[int], pa.Table]) -> None:
        self._task = task

    def __call__(self, numbers: pa.Table) -> pa.Table:
        return pa.concat_tables([self._task(number) for number in numbers.column("id").to_pylist()])
