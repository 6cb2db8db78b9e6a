"""What the newer functions keep and answer; the older ones' tests are in test_offline.py and test_definitions.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from heliostat import Count, CountDistinct, Entity, EventSource, FeatureView, StdDev
from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import ExpressionError, InvalidDefinitionError, UnknownColumnError
from heliostat.features.aggregations import Aggregation
from heliostat.features.offline import compute_features, needed_columns

NOON_US = parse_instant_us("2026-03-10T12:00:00Z")
SOURCE = EventSource(
    "sales",
    schema=pa.schema(
        {
            "id": pa.string(),
            "user_id": pa.int64(),
            "at": pa.timestamp("us", "UTC"),
            "amount": pa.float64(),
            "kind": pa.string(),
            "shop": pa.int64(),
            "flag": pa.bool_(),
        }
    ),
    entity=Entity("user", keys={"user_id": "int64"}),
    event_time="at",
    event_id="id",
)


def view(**features: Aggregation) -> FeatureView:
    return FeatureView("facts", version=1, source=SOURCE, features=features)


def value_of(aggregation: Aggregation, **columns: list[Any]) -> float:
    """Of one user's events in the last hours before noon."""
    n = len(next(iter(columns.values())))
    given: dict[str, Any] = {
        "id": [f"e{row}" for row in range(n)],
        "user_id": [1] * n,
        "at": pa.array([NOON_US - 1 - row for row in range(n)], pa.int64()).cast(pa.timestamp("us", "UTC")),
    }
    rest = {field.name: pa.nulls(n, field.type) for field in SOURCE.schema if field.name not in {*given, *columns}}
    events = pa.table({**given, **rest, **columns}).select(SOURCE.schema.names).cast(SOURCE.schema)
    found = compute_features([view(f=aggregation)], events, pa.array([1]), np.array([NOON_US]))
    return float(found["facts__f"][0])


def test_distinct_categories_are_counted_once_each_and_others_not_at_all() -> None:
    kinds = CountDistinct("kind", categories=("visit", "order", "return"), window="1d")
    assert value_of(kinds, kind=["visit", "order", "visit", None, "spam", "visit"]) == 2
    assert np.isnan(value_of(kinds, kind=["spam", None]))
    assert np.isnan(value_of(kinds, kind=[]))


def test_a_condition_and_an_expression_work_for_categories_too() -> None:
    orders = CountDistinct("shop", categories=range(1, 53), where=pc.field("kind") == "order")
    assert value_of(orders, shop=[1, 52, 52, 53, 7], kind=["order", "order", "order", "order", "visit"]) == 2
    lower = CountDistinct(pc.utf8_lower(pc.field("kind")), categories=["a", "b"])
    assert value_of(lower, kind=["A", "a", "B", "c"]) == 2


def test_all_of_52_categories_are_told_apart() -> None:
    many = [f"k{number}" for number in range(52)]
    assert value_of(CountDistinct("kind", categories=many), kind=many * 2) == 52
    for each in (many[0], many[31], many[32], many[51]):
        assert value_of(CountDistinct("kind", categories=many), kind=[each]) == 1


@pytest.mark.parametrize(
    ("categories", "said"),
    [
        ((), "no list of texts or integers"),
        ("visit", "no list of texts or integers"),
        (("visit", 1), "no list of texts or integers"),
        ((True, False), "no list of texts or integers"),
        ((1.5,), "no list of texts or integers"),
        (("visit", "visit"), "there twice"),
        (tuple(range(53)), "53 categories are too many"),
    ],
)
def test_categories_that_cant_be_counted_are_refused(categories: Any, said: str) -> None:
    with pytest.raises(InvalidDefinitionError, match=said):
        CountDistinct("kind", categories=categories)


@pytest.mark.parametrize(
    ("column", "categories"),
    [("kind", (1, 2)), ("shop", ("a",)), ("amount", (1, 2)), ("flag", (0, 1)), ("at", (1,))],
)
def test_categories_that_a_column_cant_hold_are_refused(column: str, categories: Any) -> None:
    with pytest.raises(ExpressionError, match="can't hold the categories"):
        view(f=CountDistinct(column, categories=categories))


def test_a_column_of_categories_has_to_exist_and_is_read() -> None:
    with pytest.raises(UnknownColumnError, match="kid"):
        view(f=CountDistinct("kid", categories=("a",)))
    assert needed_columns([view(f=CountDistinct("kind", categories=("a",)))]) == ("user_id", "at", "kind")


def test_which_categories_count_is_part_of_the_meaning_and_their_order_isnt() -> None:
    one, other = (view(f=CountDistinct("kind", categories=names)) for names in (("a", "b"), ("b", "a")))
    more = view(f=CountDistinct("kind", categories=("a", "b", "c")))
    assert one.content_hash == other.content_hash
    assert one.content_hash != more.content_hash
    assert one.describe()["features"]["f"]["categories"] == ["a", "b"]


def test_a_standard_deviation_is_of_a_sample_and_takes_two_values() -> None:
    assert value_of(StdDev("amount", window="1d"), amount=[2.0, 4.0, None, float("nan"), float("inf")]) == 2**0.5
    assert np.isnan(value_of(StdDev("amount"), amount=[2.0, None]))
    assert value_of(StdDev("amount"), amount=[1e12, 1e12, 1e12]) == 0.0
    assert value_of(StdDev("flag"), flag=[True, False]) == 0.5**0.5


def test_one_entitys_billions_cost_another_window_none_of_its_digits() -> None:
    """The same entity: a huge value that has left the window has left no trace."""
    at_us = [NOON_US - 9 * US_PER_DAY, *(NOON_US - 1 - row for row in range(50))]
    amounts = [1e12, *np.random.default_rng(0).normal(0, 1e-6, 50)]
    events = pa.table(
        {
            "id": [f"e{row}" for row in range(51)],
            "user_id": [1] * 51,
            "at": pa.array(at_us, pa.int64()).cast(pa.timestamp("us", "UTC")),
            "amount": amounts,
        }
    )
    declared = view(week=StdDev("amount", window="7d"), n=Count(window="7d"))
    found = compute_features([declared], events, pa.array([1]), np.array([NOON_US]))
    np.testing.assert_allclose(found["facts__week"], np.std(amounts[1:], ddof=1), rtol=1e-13)
