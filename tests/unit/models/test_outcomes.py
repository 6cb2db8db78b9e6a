from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat import Entity, EventSource, Label
from heliostat.clock import US_PER_DAY
from heliostat.models.outcomes import label_values

customer = Entity("customer", keys={"customer_id": "int64"})
SCHEMA = pa.schema(
    {"event_id": pa.int64(), "customer_id": pa.int64(), "at": pa.timestamp("us", "UTC"), "amount": pa.float64()}
)
purchases = EventSource("purchases", schema=SCHEMA, entity=customer, event_time="at", event_id="event_id")
LABELS = {
    "none": Label.none_within("churned", purchases, "3d"),
    "any": Label.any_within("bought", purchases, "3d", where=pc.field("amount") > 5),
    "sum": Label.sum_within("spent", purchases, "amount", "3d"),
}

Event = tuple[int, int, int, float | None]


def _table(events: list[Event]) -> pa.Table:
    rows = [{"event_id": e[0], "customer_id": e[1], "at": e[2], "amount": e[3]} for e in events]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _label(kind: str, events: list[Event], rows: list[tuple[int, int]]) -> list[float]:
    keys, instants = (
        pa.array([row[0] for row in rows], pa.int64()),
        np.array([row[1] for row in rows], dtype=np.int64),
    )
    return label_values(LABELS[kind], customer, _table(events), keys, instants).tolist()


def _expected(kind: str, events: list[Event], key: int, instant: int) -> float:
    """The definition, word for word."""
    first = {}
    for event in events:
        first.setdefault(event[0], event)
    inside = [e for e in first.values() if e[1] == key and instant <= e[2] < instant + 3 * US_PER_DAY]
    if kind == "none":
        return float(not inside)
    if kind == "any":
        return float(any(e[3] is not None and e[3] > 5 for e in inside))
    amounts = [e[3] for e in inside if e[3] is not None and np.isfinite(e[3])]
    return float(sum(amounts))


days = st.integers(0, 12).map(lambda day: day * US_PER_DAY) | st.integers(0, 12 * US_PER_DAY)
events = st.lists(
    st.tuples(
        st.integers(0, 30),
        st.integers(0, 4),
        days,
        st.none() | st.sampled_from([float("nan"), float("inf"), 0.0, 5.0, 7.5, 1e12, -3.0]),
    ),
    max_size=30,
)


@given(st.sampled_from(list(LABELS)), events, st.lists(st.tuples(st.integers(0, 6), days), max_size=12))
def test_every_row_follows_the_definition(kind: str, events: list[Event], rows: list[tuple[int, int]]) -> None:
    expected = [_expected(kind, events, *row) for row in rows]
    assert _label(kind, events, rows) == pytest.approx(expected)


def test_an_event_at_the_instant_is_in_the_label_and_one_at_its_end_is_not() -> None:
    events = [(1, 1, 0, 10.0), (2, 2, 3 * US_PER_DAY, 10.0)]
    assert _label("none", events, [(1, 0), (2, 0)]) == [0.0, 1.0]


def test_one_entitys_fortune_costs_another_no_cents() -> None:
    events = [(1, 1, 0, 1e16), (2, 2, 0, 0.01), (3, 3, 0, -1e16)]
    assert _label("sum", events, [(1, 0), (2, 0), (3, 0)]) == [1e16, 0.01, -1e16]
