"""The offline kernel, one sentence of the window contract at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from heliostat.clock import US_PER_DAY, US_PER_HOUR, US_PER_MINUTE, parse_instant_us
from heliostat.errors import InvalidValueError
from heliostat.features.aggregations import (
    Aggregation,
    Count,
    DistinctDays,
    First,
    FloatArray,
    Last,
    Max,
    Mean,
    Min,
    Sum,
    TimeSinceLast,
)
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.features.offline import compute_features, needed_columns
from heliostat.features.timeline import Segments
from heliostat.schema import TIMESTAMP, hash64, tie48

NOON_US = parse_instant_us("2026-03-10T12:00:00Z")
USER = Entity("user", keys={"user_id": "int64"})
EVENTS = EventSource(
    "events",
    schema=pa.schema(
        [("event_id", pa.string()), ("user_id", pa.int64()), ("at", TIMESTAMP), ("amount", pa.float64())]
    ),
    entity=USER,
    event_time="at",
    event_id="event_id",
)


def events(*rows: tuple[int, float | None], user: int = 1, ids: list[str] | None = None) -> pa.Table:
    """Events of one user at (microseconds, amount)."""
    return pa.table(
        {
            "event_id": ids or [f"{user}-{number}" for number in range(len(rows))],
            "user_id": [user] * len(rows),
            "at": pa.array([at_us for at_us, _ in rows], pa.int64()).cast(TIMESTAMP),
            "amount": pa.array([amount for _, amount in rows], pa.float64(), from_pandas=False),
        },
        schema=EVENTS.schema,
    )


def view(ttl: str | None = None, hop: str | None = None, **features: Aggregation) -> FeatureView:
    return FeatureView("v", version=1, source=EVENTS, features=features, ttl=ttl, hop=hop)


def value_of(aggregation: Aggregation, table: pa.Table, as_of_us: int = NOON_US, **options: Any) -> float:
    found = compute_features([view(f=aggregation)], table, pa.array([1]), np.array([as_of_us]), **options)
    return float(found["v__f"][0])


def test_event_at_the_query_instant_is_excluded() -> None:
    table = events((NOON_US - 1, 1.0), (NOON_US, 10.0))
    assert value_of(Count(window="1d"), table) == 1
    assert value_of(Count(), table) == 1
    assert value_of(Count(window="1d"), table, NOON_US + 1) == 2


@pytest.mark.parametrize(
    ("window", "hop_us"), [("30d", US_PER_DAY), ("12d", US_PER_DAY), ("11d", US_PER_HOUR), ("6h", 5 * US_PER_MINUTE)]
)
def test_the_lower_edge_is_inclusive_and_rounded_down_to_the_hop(window: str, hop_us: int) -> None:
    count = Count(window=window)
    as_of_us = NOON_US + 123_456_789
    assert count.window_us is not None
    edge_us = (as_of_us - count.window_us) // hop_us * hop_us
    assert value_of(count, events((edge_us, 1.0)), as_of_us) == 1
    assert value_of(count, events((edge_us - 1, 1.0)), as_of_us) == 0


def test_a_view_may_set_its_hop() -> None:
    edge_us = NOON_US - 30 * US_PER_DAY
    daily, hourly = view(f=Count(window="30d")), view(f=Count(window="30d"), hop="1h")
    asked = pa.array([1]), np.array([NOON_US])
    table = events((edge_us - US_PER_HOUR, 1.0))
    assert compute_features([daily], table, *asked)["v__f"][0] == 1
    assert compute_features([hourly], table, *asked)["v__f"][0] == 0


def test_count_and_sum_of_nothing_are_zero_and_all_others_null() -> None:
    nothing = events((NOON_US - 1, None), (NOON_US - 2, math.nan), (NOON_US - 3, math.inf), (NOON_US - 4, -math.inf))
    for table in (nothing, nothing.slice(0, 0)):
        assert value_of(Count("amount"), table) == 0
        assert value_of(Sum("amount", window="30d"), table) == 0
        for function in (Mean, Min, Max, First, Last):
            assert math.isnan(value_of(function("amount", window="30d"), table))
        assert math.isnan(value_of(DistinctDays("amount", window="30d"), table))
        assert math.isnan(value_of(TimeSinceLast(where=pc.field("amount") == 0), table))


def test_first_and_last_of_a_tie_go_by_the_ids_hash_and_not_by_arrival() -> None:
    ids = [f"id {number}" for number in range(6)]
    ties = tie48(hash64(pa.array(ids)))
    table = events(*[(NOON_US - 9, float(number)) for number in range(6)], ids=ids)
    for order in (range(6), range(5, -1, -1)):
        shuffled = table.take(pa.array(list(order)))
        assert value_of(Last("amount"), shuffled) == np.argmax(ties)
        assert value_of(First("amount"), shuffled) == np.argmin(ties)


def test_a_repeated_id_is_one_event_and_the_first_ingested_stays() -> None:
    table = events((NOON_US - 3, 5.0), (NOON_US - 2, 7.0), (NOON_US - 1, 11.0), ids=["a", "a", "b"])
    ingested = pa.array([30, 20, 10], pa.int64())
    assert value_of(Sum("amount"), table) == 16
    assert value_of(Sum("amount"), table.append_column("_ingested_us", ingested)) == 18
    assert value_of(Count(), table, deduplicate=False) == 3


def test_only_what_was_known_counts_when_asked() -> None:
    table = events((NOON_US - 3, 1.0), (NOON_US - 2, 2.0)).append_column("_ingested_us", pa.array([100, 200]))
    assert value_of(Sum("amount"), table, known_at_us=100) == 1
    assert value_of(Sum("amount"), table, known_at_us=99) == 0
    with pytest.raises(InvalidValueError, match="_ingested_us"):
        value_of(Sum("amount"), table.drop_columns("_ingested_us"), known_at_us=100)


def test_one_entitys_billions_cost_another_none_of_its_cents() -> None:
    rich = events(*[(NOON_US - US_PER_DAY * day, 1e12 + 0.3) for day in range(1, 30)], user=2)
    poor = events(*[(NOON_US - US_PER_DAY * day, 0.01) for day in range(1, 30)], user=1)
    table = pa.concat_tables([rich, poor])
    for window in ("30d", None):
        assert value_of(Sum("amount", window=window), table) == pytest.approx(0.29, rel=1e-14)
        assert value_of(Sum("amount", window=window), table) == value_of(Sum("amount", window=window), poor)


def test_what_has_left_the_window_costs_nothing_either() -> None:
    table = events((NOON_US - 40 * US_PER_DAY, 1e12), (NOON_US - US_PER_DAY, 0.1), (NOON_US - 2 * US_PER_DAY, 0.2))
    assert value_of(Sum("amount", window="30d"), table) == 0.1 + 0.2


def test_days_are_counted_once_each() -> None:
    midnight_us = parse_instant_us("2026-03-10")
    table = events(*[(midnight_us + offset_us, 1.0) for offset_us in (-1, 0, 1, US_PER_HOUR)])
    assert value_of(DistinctDays(window="7d"), table) == 2


def test_time_since_the_last_event_has_a_unit() -> None:
    table = events((NOON_US - US_PER_DAY, 1.0), (NOON_US - 6 * US_PER_HOUR, 1.0))
    assert value_of(TimeSinceLast(unit="hour"), table) == 6
    assert value_of(TimeSinceLast(), table) == 0.25


def test_a_vector_older_than_its_time_to_live_reads_as_no_events_at_all() -> None:
    aged = view(ttl="10d", n=Count(), last=Last("amount"), spent=Sum("amount", window="30d"))
    table = events((NOON_US - 10 * US_PER_DAY, 5.0))
    as_of_us = np.array([NOON_US, NOON_US + 1])
    found = compute_features([aged], table, pa.array([1, 1]), as_of_us)
    assert found["v__n"].tolist() == [1, 0]
    assert found["v__spent"].tolist() == [5, 0]
    np.testing.assert_array_equal(found["v__last"], [5, np.nan])


def test_rows_come_back_in_the_order_asked_with_unknown_and_repeated_entities() -> None:
    table = pa.concat_tables([events((NOON_US - 1, float(user)), user=user) for user in (1, 2, 3)])
    keys = pa.array([3, 99, 1, 3, 2, 3])
    as_of_us = np.array([NOON_US, NOON_US, NOON_US, NOON_US - 1, NOON_US, NOON_US])
    found = compute_features([view(f=Sum("amount"))], table, keys, as_of_us)
    assert found["v__f"].tolist() == [3, 0, 1, 0, 2, 3]


def test_no_rows_and_no_events_are_fine() -> None:
    asked = view(a=Sum("amount", window="7d"), b=First("amount"), c=DistinctDays(window="7d"), d=TimeSinceLast())
    none = compute_features([asked], events((NOON_US, 1.0)), pa.array([], pa.int64()), np.array([], np.int64))
    assert {len(values) for values in none.values()} == {0}
    empty = compute_features([asked], events(), pa.array([1]), np.array([NOON_US]))
    np.testing.assert_array_equal([values[0] for values in empty.values()], [0, np.nan, np.nan, np.nan])


def test_derived_features_are_computed_from_the_views_own() -> None:
    scored = view(total=Sum("amount", window="30d"))

    @scored.derived
    def score(total: FloatArray) -> FloatArray:
        return np.log1p(total)

    found = compute_features([scored], events((NOON_US - 1, 3.0)), pa.array([1]), np.array([NOON_US]))
    assert list(found) == ["v__total", "v__score"]
    assert found["v__score"][0] == np.log1p(3.0)


def test_centuries_of_events_are_answered_by_rank() -> None:
    """Entity and instant of many entities over a long time don't fit one integer as they are."""
    rng = np.random.default_rng(3)
    users, n = 2**17, 2**18
    at_us = rng.integers(-(2**55), 2**55, n)
    table = pa.table(
        {
            "event_id": pa.array(np.arange(n)).cast(pa.string()),
            "user_id": rng.integers(0, users, n),
            "at": pa.array(at_us).cast(TIMESTAMP),
            "amount": np.ones(n),
        },
        schema=EVENTS.schema,
    )
    as_of_us = rng.integers(-(2**55), 2**55, users)
    asked = view(n=Count(), recent=Count(window="30d"), total=Sum("amount"))
    found = compute_features([asked], table, pa.array(np.arange(users)), as_of_us)
    before = at_us < as_of_us[table["user_id"].to_numpy()]
    expected = np.bincount(table["user_id"].to_numpy()[before], minlength=users)
    np.testing.assert_array_equal(found["v__n"], expected)
    np.testing.assert_array_equal(found["v__total"], expected)
    assert 0 <= found["v__recent"].sum() <= expected.sum()


def test_a_busy_day_is_summed_in_order_of_time() -> None:
    """A tile with many events takes another way than one with few: the sum is the same, to the bit."""
    rng = np.random.default_rng(5)
    amounts = rng.normal(size=1000) * 10.0 ** rng.integers(-9, 9, 1000)
    at_us = NOON_US - US_PER_HOUR + np.arange(1000)
    order = rng.permutation(1000)
    table = events(*[(int(at_us[position]), float(amounts[position])) for position in order])
    asked = np.array([int(at_us[count]) for count in (1, 40, 49, 60, 999)])
    found = compute_features([view(f=Sum("amount", window="30d"))], table, pa.array([1] * 5), asked)["v__f"]
    totals = np.add.accumulate(amounts)
    assert found.tolist() == [totals[count - 1] for count in (1, 40, 49, 60, 999)]


def test_needed_columns_are_those_of_keys_time_inputs_and_conditions() -> None:
    assert needed_columns([view(f=Count())]) == ("user_id", "at")
    assert needed_columns([view(f=Count(where=pc.field("amount") > 0))]) == ("user_id", "at", "amount")
    assert needed_columns([view(f=Sum(pc.field("amount") * 2))]) == ("user_id", "at", "amount")


def test_running_of_nothing_is_nothing() -> None:
    assert len(Segments(np.array([], dtype=np.int64), 0).running(np.add, np.array([]))) == 0


def test_a_sum_beyond_all_numbers_is_infinite_and_others_are_not_touched() -> None:
    huge = events((NOON_US - 2, 1.5e308), (NOON_US - 1, 1.5e308), user=2)
    table = pa.concat_tables([huge, events((NOON_US - 1, 0.25))])
    asked = view(ever=Sum("amount"), recent=Sum("amount", window="30d"))
    found = compute_features([asked], table, pa.array([1, 2]), np.array([NOON_US, NOON_US]))
    assert found["v__ever"].tolist() == found["v__recent"].tolist() == [0.25, math.inf]


def test_zero_has_one_sign() -> None:
    table = events((NOON_US - 2, -0.0), (NOON_US - 1, 0.0))
    for function in (Min, Max, Sum, First, Last):
        for rows in (table, table.slice(0, 1)):
            assert math.copysign(1.0, value_of(function("amount", window="30d"), rows)) == 1.0
