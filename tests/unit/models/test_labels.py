from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.clock import US_PER_DAY
from heliostat.features.definitions import Entity, EventSource
from heliostat.models.definitions import Label
from heliostat.models.labels import label_values, labels_from_log
from heliostat.storage.event_log import EventLog

USER = Entity("user", keys={"user_id": "int64"})
SCHEMA = pa.schema(
    {"id": pa.int64(), "user_id": pa.int64(), "at": pa.timestamp("us", tz="UTC"), "amount": pa.float64()}
)
ORDERS = EventSource("orders", schema=SCHEMA, entity=USER, event_time="at", event_id="id")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _events(rows: list[tuple[int, int, float | None]]) -> pa.Table:
    return pa.table(
        {
            "id": list(range(len(rows))),
            "user_id": [user for user, _, _ in rows],
            "at": [EPOCH + timedelta(days=day) for _, day, _ in rows],
            "amount": [amount for _, _, amount in rows],
        },
        schema=SCHEMA,
    )


def _values(label: Label, events: pa.Table, rows: list[tuple[int, int]]) -> np.ndarray:
    keys = pa.array([user for user, _ in rows], pa.int64())
    return label_values(label, USER, events, keys, np.array([day * US_PER_DAY for _, day in rows], dtype=np.int64))


@given(
    events=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(0, 15),
            st.one_of(st.none(), st.just(float("inf")), st.floats(-1e12, 1e12, allow_subnormal=False)),
        ),
        max_size=25,
    ),
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 18)), max_size=12),
    horizon=st.integers(1, 6),
    kind=st.sampled_from(["none", "any", "sum"]),
)
@settings(max_examples=400, deadline=None)
def test_labels_equal_a_walk_over_all_events(
    events: list[tuple[int, int, float | None]], rows: list[tuple[int, int]], horizon: int, kind: Any
) -> None:
    label = Label("y", ORDERS, kind=kind, within=f"{horizon}d", column="amount" if kind == "sum" else None)
    found = _values(label, _events(events), rows)
    assert found.shape == (len(rows),)
    for (user, day), value in zip(rows, found, strict=True):
        inside = [amount for each, at, amount in events if each == user and day <= at < day + horizon]
        if kind == "sum":
            usable = [amount for amount in inside if amount is not None and np.isfinite(amount)]
            exact = float(sum(map(Fraction, usable), Fraction()))
            assert abs(value - exact) <= 1e-12 * sum(map(abs, usable))
        else:
            assert value == float(bool(inside) == (kind == "any"))


def test_a_huge_amount_of_one_row_costs_another_none_of_its_cents() -> None:
    label = Label.sum_within("spend", ORDERS, "amount", "2d")
    events = _events([(1, 0, 1e16), (1, 5, 0.01), (2, 0, 1e16), (2, 5, 0.02)])
    assert _values(label, events, [(1, 5), (2, 5), (1, 0)]).tolist() == [0.01, 0.02, 1e16]


def test_order_of_events_changes_no_bit_of_a_sum() -> None:
    rng = np.random.default_rng(0)
    rows = [(1, int(day), float(value)) for day, value in zip(range(12), rng.normal(size=12), strict=True)]
    label = Label.sum_within("spend", ORDERS, "amount", "30d")
    one = _values(label, _events(rows), [(1, 0)])
    assert _values(label, _events(rows[::-1]), [(1, 0)]).tobytes() == one.tobytes()


@pytest.mark.parametrize(("kind", "value"), [("none", 1.0), ("any", 0.0)])
def test_no_events_at_all_is_an_answer(kind: Any, value: float) -> None:
    label = Label("y", ORDERS, kind=kind, within="1d")
    assert _values(label, SCHEMA.empty_table(), [(7, 3), (8, 3)]).tolist() == [value, value]


def test_labels_off_the_log_are_those_of_all_events_whatever_the_bucket(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = list(zip(rng.integers(0, 40, 300).tolist(), rng.integers(0, 60, 300).tolist(), [1.0] * 300, strict=True))
    log = EventLog(str(tmp_path), n_buckets=8)
    log.append(ORDERS, _events(rows), ingested_us=0)
    label = Label.sum_within("spend", ORDERS, "amount", "5d")
    asked = list(zip(rng.integers(0, 50, 200).tolist(), rng.integers(0, 60, 200).tolist(), strict=True))
    keys = pa.array([user for user, _ in asked], pa.int64())
    found = labels_from_log(log, label, USER)(keys, np.array([day * US_PER_DAY for _, day in asked]))
    assert np.array_equal(found, _values(label, _events(rows), asked))
    assert found.max() > 1
