"""One Ray task a bucket of entities, for work that keeps a core busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa
import ray.data
from ray.exceptions import RayTaskError

from heliostat.cluster import cpus_a_task
from heliostat.errors import HeliostatError


def over_buckets(task: Callable[[int], pa.Table], n_buckets: int) -> Iterator[pa.Table]:
    """Run a task for each bucket on the connected Ray; tables come as they are done, in no order.

    Args:
        task: Picklable; takes a bucket's number.
        n_buckets: Of the event log.

    Yields:
        What the tasks gave; tables without rows are left out.

    Raises:
        HeliostatError: What a task raised, as itself.
    """
    context = ray.data.DataContext.get_current().copy()
    # Ray Data's own wrapper would lose the error's kind.
    context.raise_original_map_exception = True
    with ray.data.DataContext.current(context):
        done = ray.data.range(n_buckets, override_num_blocks=n_buckets).map_batches(
            _OfBuckets(task), batch_format="pyarrow", batch_size=None, zero_copy_batch=True, num_cpus=cpus_a_task()
        )
    try:
        for table in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            if table.num_rows:
                yield table
    except RayTaskError as error:
        if isinstance(error.cause, HeliostatError):
            raise error.cause from None
        raise


class _OfBuckets:
    """The task as Ray Data calls it: a table of bucket numbers in, their tables out."""

    def __init__(self, task: Callable[[int], pa.Table]) -> None:
        self._task = task

    def __call__(self, numbers: pa.Table) -> pa.Table:
        return pa.concat_tables([self._task(number) for number in numbers.column("id").to_pylist()])
