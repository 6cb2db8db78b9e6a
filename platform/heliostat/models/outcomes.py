"""What became of entities: a label's value for any rows, each at its own instant. Pure.

Training looks at whole populations at a few instants (`heliostat.training.dataset`); the truth about
served predictions is asked for one row at a time, each at the microsecond of its request.
Both follow the same sentence: ``q ≤ event_time < q + horizon``.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.features.aggregations import FloatArray, evaluate
from heliostat.features.definitions import Entity
from heliostat.features.offline import unique_events
from heliostat.models.definitions import Label
from heliostat.schema import times_us

IntArray = NDArray[np.int64]


def label_values(
    label: Label, entity: Entity, events: pa.Table, keys: pa.Array, as_of_us: IntArray, *, deduplicate: bool = True
) -> FloatArray:
    """The label of each row, whether its horizon has passed or not: that is the caller's to know.

    Args:
        label: What is counted or summed.
        entity: Whose keys they are.
        events: Columns of the label's source, in any order.
        keys: Encoded keys of the rows (`Entity.encode`), length ``m``; unknown ones have no events.
        as_of_us: Their instants, shape ``(m,)``, microseconds.
        deduplicate: Drop repeated event ids. False for events of the event log, which holds each once.

    Returns:
        Shape ``(m,)``: 0 or 1, or the sum of the horizon's values in order of time.
    """
    if deduplicate:
        events = unique_events(label.source, events)
    distinct = pc.unique(keys)
    owners = pc.index_in(entity.encode(events, what="the events"), distinct)
    given = evaluate(events, [label.input])[label.input.key]
    wanted = np.flatnonzero(given.used & owners.is_valid().to_numpy(zero_copy_only=False))
    codes = owners.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)[wanted]
    times = times_us(events.column(label.source.event_time))[wanted]
    order = np.lexsort((times, codes))
    codes, times, values = codes[order], times[order], given.values[wanted][order]

    # Entity and rank of time in one integer: each row's horizon is then one range of positions.
    moments = np.unique(times)
    place = codes * (len(moments) + 1) + np.searchsorted(moments, times)
    base = pc.index_in(keys, distinct).to_numpy(zero_copy_only=False).astype(np.int64) * (len(moments) + 1)
    low = np.searchsorted(place, base + np.searchsorted(moments, as_of_us))
    high = np.searchsorted(place, base + np.searchsorted(moments, as_of_us + label.horizon_us))
    if label.kind == "sum":
        return _range_sums(values, low, high)
    happened = high > low
    return (happened if label.kind == "any" else ~happened).astype(np.float64)


def _range_sums(values: FloatArray, low: NDArray[np.intp], high: NDArray[np.intp]) -> FloatArray:
    """The sum of each range by itself: no running total that one large value spoils for all others."""
    padded = np.append(values, 0.0)
    sums: FloatArray = np.add.reduceat(padded, np.column_stack([low, high]).ravel())[::2]
    sums[high == low] = 0.0  # of an empty range, reduceat gives the value after it
    return sums
