"""Every row is judged by itself, and what is refused says why."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.clock import US_PER_S, parse_instant_us
from heliostat.errors import SchemaMismatchError
from heliostat.features.definitions import Entity, EventSource
from heliostat.ingestion.checking import EventCheck, as_json
from heliostat.schema import TIMESTAMP

NOW_US = parse_instant_us("2020-06-01")

USER = Entity("user", keys={"user_id": "int64"})
SHOP = Entity("shop", keys={"shop": "string"})
SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("shop", pa.string()),
        ("event_id", pa.string()),
        ("at", TIMESTAMP),
        ("amount", pa.float64()),
        ("gift", pa.bool_()),
        pa.field("channel", pa.string(), nullable=False),
    ]
)
SALES = EventSource("sales", schema=SCHEMA, entity=[USER, SHOP], event_time="at", event_id="event_id")
CHECK = EventCheck(SALES, future_tolerance_us=60 * US_PER_S)

GOOD: dict[str, Any] = {
    "user_id": 1,
    "shop": "a",
    "event_id": "x",
    "at": "2020-05-01T12:00:00Z",
    "amount": 2.5,
    "gift": False,
    "channel": "web",
}


def _reason(**changes: Any) -> str:
    checked = CHECK.check([{**GOOD, **changes}], now_us=NOW_US)
    assert checked.accepted.num_rows == 0
    return checked.reasons[0]


def _accepted(**changes: Any) -> dict[str, Any]:
    checked = CHECK.check([{**GOOD, **changes}], now_us=NOW_US)
    assert checked.reasons == ()
    row: dict[str, Any] = checked.accepted.to_pylist()[0]
    return row


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"user_id": None}, "user_id is missing"),
        ({"shop": None}, "shop is missing"),
        ({"shop": ""}, "shop is an empty text"),
        ({"event_id": None}, "event_id is missing"),
        ({"at": None}, "at is missing"),
        ({"channel": None}, "channel is missing"),
        ({"user_id": "seven"}, "user_id is 'seven', which is no int64"),
        ({"user_id": 1.5}, "user_id is 1.5, which is no int64"),
        ({"user_id": True}, "user_id is True, which is no int64"),
        ({"user_id": 2**63}, "user_id is 9223372036854775808"),
        ({"user_id": [1]}, r"user_id is \[1\]"),
        ({"shop": 5}, "shop is 5, which is no string"),
        ({"at": "yesterday"}, "at is 'yesterday', which is no timestamp"),
        ({"at": {"year": 2020}}, "at is {'year': 2020}"),
        ({"amount": "much"}, "amount is 'much', which is no double"),
        ({"amount": False}, "amount is False, which is no double"),
        ({"gift": 1}, "gift is 1, which is no bool"),
        ({"at": "2020-06-01T00:01:00.000001Z"}, r"at is after now \(2020-06-01T00:00:00Z\) by more than 1m"),
        ({"at": -(2**62)}, "at is before the year 1"),
    ],
)
def test_wrong_value_is_refused_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    assert re.match(reason, _reason(**changes))


def test_event_at_the_edge_of_the_tolerance_is_taken() -> None:
    assert _accepted(at=NOW_US + 60 * US_PER_S)["at"].minute == 1


@pytest.mark.parametrize(
    "at",
    [
        "2020-05-01T12:00:00Z",
        "2020-05-01 12:00:00",
        "2020-05-01T14:00:00+02:00",
        parse_instant_us("2020-05-01T12:00:00"),
    ],
)
def test_times_are_iso_texts_or_microseconds_and_without_a_zone_utc(at: Any) -> None:
    assert _accepted(at=at)["at"].isoformat() == "2020-05-01T12:00:00+00:00"


def test_numbers_and_truths_may_be_written_as_texts_and_whole_floats_are_integers() -> None:
    row = _accepted(user_id="7", amount="1.5", gift="true")
    assert (row["user_id"], row["amount"], row["gift"]) == (7, 1.5, True)
    assert _accepted(user_id=7.0)["user_id"] == 7


def test_columns_that_may_be_null_may_be_left_out_and_others_are_dropped() -> None:
    event = {name: value for name, value in GOOD.items() if name not in ("amount", "gift")}
    checked = CHECK.check([{**event, "surprise": 1}], now_us=NOW_US)
    assert checked.accepted.schema.names == SCHEMA.names
    assert checked.accepted.column("amount").to_pylist() == [None]


@pytest.mark.parametrize("event", [None, 5, "text", [GOOD]])
def test_what_is_no_object_is_refused(event: Any) -> None:
    checked = CHECK.check([event, GOOD], now_us=NOW_US)
    assert "not an object" in checked.reasons[0]
    assert checked.rows.tolist() == [1]


def test_nothing_is_checked_as_nothing() -> None:
    checked = CHECK.check([], now_us=NOW_US)
    assert (checked.accepted.num_rows, checked.reasons) == (0, ())
    assert CHECK.check(SCHEMA.empty_table(), now_us=NOW_US).accepted.schema == SCHEMA


WRONG = (
    {"user_id": "x"},
    {"at": None},
    {"amount": []},
    {"shop": ""},
    {"at": "2021-01-01"},
    {"user_id": "x", "gift": 3},
)


@given(kinds=st.lists(st.integers(-len(WRONG), len(WRONG) - 1), max_size=30))
def test_wrong_rows_cost_nobody_else_anything(kinds: list[int]) -> None:
    events = [{**GOOD, "event_id": str(row), **(WRONG[kind] if kind >= 0 else {})} for row, kind in enumerate(kinds)]
    checked = CHECK.check(events, now_us=NOW_US)
    right = [row for row, kind in enumerate(kinds) if kind < 0]
    assert checked.rows.tolist() == right
    assert checked.accepted.column("event_id").to_pylist() == [str(row) for row in right]
    assert sorted([*checked.rows.tolist(), *checked.rejected.tolist()]) == list(range(len(kinds)))
    assert len(checked.reasons) == len(checked.rejected)


@given(texts=st.lists(st.none() | st.sampled_from(["1", "-2", "x", "", "3.5", "9" * 30]), max_size=20))
def test_column_of_texts_is_read_as_each_text_alone_would_be(texts: list[str | None]) -> None:
    n = len(texts)
    table = pa.table(
        {
            **{name: pa.array([GOOD[name]] * n, pa.string()) for name in ("shop", "event_id", "at", "channel")},
            "user_id": pa.array(texts, pa.string()),
            "amount": pa.nulls(n, pa.string()),
            "gift": pa.nulls(n, pa.string()),
        }
    )
    CHECK.require_columns(table.schema, what="a file")
    whole = CHECK.check(table, now_us=NOW_US)
    alone = [CHECK.check(table.slice(row, 1), now_us=NOW_US) for row in range(n)]
    assert whole.rows.tolist() == [row for row, each in enumerate(alone) if each.accepted.num_rows]
    assert list(whole.reasons) == [reason for each in alone for reason in each.reasons]
    assert set(whole.accepted.column("user_id").to_pylist()) <= {1, -2}


def test_table_with_a_hopeless_column_is_refused_whole() -> None:
    schema = pa.schema(
        [("user_id", pa.list_(pa.int64())), *((name, SCHEMA.field(name).type) for name in ("shop", "at"))]
    )
    with pytest.raises(SchemaMismatchError) as caught:
        CHECK.require_columns(schema, what="f.parquet")
    for part in ("f.parquet", "'user_id' is list", "'event_id' is missing", "there are: user_id, shop, at"):
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", [pa.int32(), pa.string(), pa.float64(), pa.dictionary(pa.int8(), pa.string())])
def test_table_with_a_column_that_can_be_cast_is_taken(dtype: pa.DataType) -> None:
    table = CHECK.check([GOOD], now_us=NOW_US).accepted
    value = pa.array(["1"], pa.string()) if not pa.types.is_primitive(dtype) else pa.array([1])
    table = table.set_column(0, "user_id", value.cast(dtype))
    CHECK.require_columns(table.schema, what="a file")
    assert CHECK.check(table, now_us=NOW_US).accepted.column("user_id").to_pylist() == [1]


def test_refused_event_is_kept_as_json_whatever_it_holds() -> None:
    event = {"big": 2**80, "at": np.datetime64("2020-01-01"), "nested": {"ö": [None, 1.5]}}
    assert json.loads(as_json(event)) == {"big": 2**80, "at": "2020-01-01", "nested": {"ö": [None, 1.5]}}
