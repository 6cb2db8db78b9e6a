"""What became of entities after given instants: a declared label's values.

Training takes them for its rows, monitoring for predictions whose horizon has passed. The
window is exact: ``q ≤ event_time < q + horizon``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.features.aggregations import FloatArray, evaluate
from heliostat.features.definitions import Entity
from heliostat.models.definitions import Label
from heliostat.schema import TIE, times_us
from heliostat.storage.event_log import EventLog

IntArray = NDArray[np.int64]


def label_values(label: Label, entity: Entity, events: pa.Table, keys: pa.Array, as_of_us: IntArray) -> FloatArray:
    """A label for entities at instants.

    Args:
        label: What it counts or sums.
        entity: Whom it is about; one of the source's entities.
        events: Of the label's source, each id once, ``n`` rows in any order.
        keys: Encoded keys, length ``m``; entities without any event are fine.
        as_of_us: Instants, shape ``(m,)``.

    Returns:
        Shape ``(m,)``: 0 or 1, or a sum. It depends on nothing but the events in each row's window.
    """
    asked = pc.unique(keys)
    row_codes = _codes(keys, asked)
    event_codes = _codes(entity.encode(events, what=f"events of {label.source.name!r}"), asked)
    given = evaluate(events, [label.input])[label.input.key]
    times = times_us(events.column(label.source.event_time))
    ties = times_us(events.column(TIE)) if TIE in events.column_names else np.zeros(len(times), dtype=np.int64)
    kept = np.flatnonzero(given.used & (event_codes >= 0))
    order = kept[np.lexsort((ties[kept], times[kept], event_codes[kept]))]

    # Entity and rank of the instant in one integer, so that one search finds an edge of a window.
    instants = np.unique(times[order])
    place = event_codes[order] * (len(instants) + 1) + np.searchsorted(instants, times[order])

    def edge(at_us: IntArray) -> IntArray:
        found = np.searchsorted(place, row_codes * (len(instants) + 1) + np.searchsorted(instants, at_us))
        return found.astype(np.int64, copy=False)

    low, high = edge(as_of_us), edge(as_of_us + label.horizon_us)
    if label.kind in ("none", "any"):
        happened = high > low
        values: FloatArray = np.where(happened if label.kind == "any" else ~happened, 1.0, 0.0)
        return values
    return _sums(given.values[order], low, high)


def labels_from_log(event_log: EventLog, label: Label, entity: Entity) -> Callable[[pa.Array, IntArray], FloatArray]:
    """A function that reads a label off the event log, a bucket at a time.

    Args:
        event_log: Where the label's source is kept.
        label: What it counts or sums.
        entity: Whom it is about.

    Returns:
        Takes encoded keys of length ``m`` and instants of shape ``(m,)``, gives labels of shape ``(m,)``.
    """

    def labels_of(keys: pa.Array, as_of_us: IntArray) -> FloatArray:
        values = np.empty(len(keys))
        buckets = entity.buckets(keys, event_log.n_buckets)
        for bucket in np.unique(buckets):
            rows = np.flatnonzero(buckets == bucket)
            instants = as_of_us[rows]
            events = event_log.read_bucket(
                label.source,
                entity,
                int(bucket),
                min_time_us=int(instants.min()),
                max_time_us=int(instants.max()) + label.horizon_us,
            )
            values[rows] = label_values(label, entity, events, keys.take(pa.array(rows)), instants)
        return values

    return labels_of


def _codes(keys: pa.Array, known: pa.Array) -> IntArray:
    """The position of each key among the known ones; -1 where it isn't."""
    found: NDArray[np.int32] = pc.fill_null(pc.index_in(keys, value_set=known), -1).to_numpy()
    return found.astype(np.int64)


def _sums(values: FloatArray, low: IntArray, high: IntArray) -> FloatArray:
    """The sum of each range ``[low, high)``, from its own values alone."""
    some = np.flatnonzero(high > low)
    sums = np.zeros(len(low))
    if len(some):
        edges = np.column_stack([low[some], high[some]]).ravel()
        sums[some] = np.add.reduceat(np.append(values, 0.0), edges)[::2]
    return sums
