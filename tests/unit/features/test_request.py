"""Request inputs: the same numbers from a spine and from a request, the same vector in both engines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import (
    DuplicateNameError,
    InvalidDefinitionError,
    MissingInputError,
    SpineError,
    UnknownFeatureError,
)
from heliostat.features.aggregations import Count, Mean
from heliostat.features.bucket_join import check_spine, entity_joins
from heliostat.features.definitions import Entity, EventSource, FeatureView, FloatArray, request_types
from heliostat.features.offline import compute_features
from heliostat.features.request import RequestTypes, UniformOverrides, request_columns, request_value
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.schema import TIMESTAMP
from heliostat.storage.event_log import EventLog
from heliostat.storage.online_store import OnlineKeys
from tests.rings import rings_of

NOW_US = parse_instant_us("2020-06-01T12:00:00")
LIMITS = RingLimits(US_PER_DAY, 60_000_000)
KEYS = OnlineKeys("hs", "test")

card = Entity("card", keys={"card": "int64"})
payments = EventSource(
    "payments",
    schema=pa.schema({"id": pa.int64(), "card": pa.int64(), "at": TIMESTAMP, "amount": pa.float64()}),
    entity=card,
    event_time="at",
    event_id="id",
)


def declared(name: str = "spending", request: RequestTypes | None = None) -> FeatureView:
    """A view with a feature of its past, one of past and request, one of that, and one of the request alone."""
    view = FeatureView(
        name,
        version=1,
        source=payments,
        features={"n": Count(window="30d"), "mean_amount": Mean("amount", window="30d")},
        request={"amount": "float64", "abroad": "bool"} if request is None else request,
    )

    @view.derived
    def amount_ratio(amount: FloatArray, mean_amount: FloatArray) -> FloatArray:
        return amount / mean_amount

    @view.derived
    def log_ratio(amount_ratio: FloatArray) -> FloatArray:
        return np.log(amount_ratio)

    @view.derived
    def risky(amount: FloatArray, abroad: FloatArray) -> FloatArray:
        return amount * abroad

    return view


spending = declared()
EVENTS = pa.Table.from_pylist(
    [
        {"id": each, "card": each % 3, "at": NOW_US - each * US_PER_DAY, "amount": float(each * each)}
        for each in range(1, 40)
    ],
    schema=payments.schema,
)
CARDS = ["0", "1", "2", "404"]
REQUESTS: list[dict[str, Any]] = [
    {"amount": 120, "abroad": True},
    {"amount": 7.25, "abroad": False},
    {"amount": None, "abroad": True},
    {"amount": 1.5, "abroad": None},
]


def served(names: tuple[str, ...], requests: list[dict[str, Any]]) -> FloatArray:
    """The vectors that a request gets, from rings."""
    reader = FeatureReader([spending[name] for name in names], keys=KEYS, n_buckets=1, limits=LIMITS)
    rings = rings_of([spending], EVENTS, keys=KEYS, n_buckets=1, as_of_us=NOW_US, limits=LIMITS)
    inputs = {
        name: np.array([request_value(each[name], dtype) for each in requests])
        for name, dtype in reader.request.items()
    }
    values = [rings.get(key) for key in reader.keys(CARDS)]
    return reader.decode(values, as_of_us=NOW_US, inputs=inputs).matrix


def trained(names: tuple[str, ...], spine: pa.Table) -> FloatArray:
    """The vectors that training sees, from events and a spine."""
    request = request_columns(spine, spending.request_of(names))
    found = compute_features([spending], EVENTS, card.encoded(CARDS), np.full(len(CARDS), NOW_US), request=request)
    return np.column_stack([found[f"spending__{name}"] for name in names])


@pytest.mark.parametrize("frame", ["arrow", "pandas"])
def test_the_vector_of_a_request_is_what_training_computes_from_the_spines_columns(frame: str) -> None:
    names = spending.feature_names
    spine = pa.Table.from_pylist(REQUESTS)
    if frame == "pandas":
        spine = pa.Table.from_pandas(pd.DataFrame(REQUESTS), preserve_index=False)
    offline, online = trained(names, spine), served(names, REQUESTS)
    np.testing.assert_allclose(online, offline, rtol=1e-14)
    assert offline[0, names.index("amount_ratio")] == pytest.approx(
        120 / np.mean([each**2 for each in range(3, 31, 3)])
    )
    assert offline[1, names.index("risky")] == 0.0
    assert np.isnan(offline[2, names.index("risky")])


def test_features_that_need_no_input_are_computed_without_a_request() -> None:
    found = compute_features([spending], EVENTS, card.encoded(CARDS), np.full(len(CARDS), NOW_US))
    assert list(found) == ["spending__n", "spending__mean_amount"]
    assert spending.stored_features == ("n", "mean_amount")


def test_only_the_inputs_that_the_features_need_are_asked_for() -> None:
    assert spending.request_of(["n"]) == {}
    assert spending.request_of(["log_ratio"]) == {"amount": "float64"}
    assert spending.request_of(spending.feature_names) == {"amount": "float64", "abroad": "bool"}
    np.testing.assert_array_equal(served(("risky",), REQUESTS)[:2, 0], [120.0, 0.0])


def test_a_read_without_an_input_says_which() -> None:
    reader = FeatureReader([spending["log_ratio"]], keys=KEYS, n_buckets=1, limits=LIMITS)
    with pytest.raises(MissingInputError, match=r"'amount'.*\{\"amount\": …\}"):
        reader.decode([None] * len(reader.keys(CARDS)), as_of_us=NOW_US)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (None, "no column 'amount'; add it as float64"),
        (pa.array(["1", "2"]), "column 'amount' that is string; make it float64"),
        (pa.array([True, False]), "column 'amount' that is bool; make it float64"),
        (pa.array([1.0, float("inf")]), "infinite values in column 'amount'"),
    ],
)
def test_a_spine_whose_column_cant_be_an_input_is_refused(column: pa.Array | None, message: str) -> None:
    table = pa.table({"card": [1, 2]} if column is None else {"card": [1, 2], "amount": column})
    with pytest.raises(SpineError, match=message):
        request_columns(table, {"amount": "float64"})


def test_whole_numbers_and_nothing_else_are_integers_in_both() -> None:
    columns = request_columns(pa.table({"k": pa.array([3.0, None])}), {"k": "int64"})
    np.testing.assert_array_equal(columns["k"], [3.0, np.nan])
    assert request_value(3.0, "int64") == 3.0
    with pytest.raises(SpineError, match="no int64"):
        request_columns(pa.table({"k": [3.5]}), {"k": "int64"})
    with pytest.raises(ValueError, match="whole number"):
        request_value(3.5, "int64")


@pytest.mark.parametrize(
    ("value", "dtype"), [("3", "float64"), (True, "float64"), (1, "bool"), (float("inf"), "float64")]
)
def test_a_request_takes_no_other_types_than_a_spine(value: Any, dtype: Any) -> None:
    with pytest.raises(ValueError, match="null"):
        request_value(value, dtype)


def test_a_join_asks_the_spine_for_what_its_features_need(tmp_path: Any) -> None:
    log = EventLog(str(tmp_path), {}, 2)
    (join,) = entity_joins([spending], log, None)
    with pytest.raises(SpineError, match="no column 'amount'"):
        check_spine(["card", "as_of"], [join], "as_of")
    check_spine(["card", "as_of", "amount", "abroad"], [join], "as_of")
    (plain,) = entity_joins([spending["n"]], log, None)
    check_spine(["card", "as_of"], [plain], "as_of")


def test_the_content_hash_changes_with_an_inputs_type_and_not_with_an_unused_input() -> None:
    same = declared(request={"amount": "float64", "abroad": "bool", "shoe_size": "float64"})
    assert same.content_hash == spending.content_hash
    other = declared(request={"amount": "int64", "abroad": "bool"})
    assert other.content_hash != spending.content_hash


def test_an_input_is_no_feature_and_a_parameter_is_one_of_both() -> None:
    with pytest.raises(DuplicateNameError, match="'n'"):
        FeatureView("twice", version=1, source=payments, features={"n": Count()}, request={"n": "float64"})
    with pytest.raises(InvalidDefinitionError, match="float64, int64, bool"):
        FeatureView("typed", version=1, source=payments, features={"n": Count()}, request={"day": "date"})  # type: ignore[dict-item]
    with pytest.raises(UnknownFeatureError, match=r"'price'.*amount, abroad"):

        @declared().derived
        def dear(price: FloatArray) -> FloatArray:
            return price


def test_a_name_is_one_input_for_all_views_of_a_vector() -> None:
    other = declared("other", request={"amount": "int64", "abroad": "bool"})
    with pytest.raises(DuplicateNameError, match="'amount'"):
        request_types([*spending, *other])
    twin = declared("twin")
    assert request_types([*spending, *twin]) == {"amount": "float64", "abroad": "bool"}


# ── What rows give alike ────────────────────────────────────────────────────────────


def test_rows_that_give_the_same_features_are_one_array_and_still_a_mapping_by_row() -> None:
    rows: list[dict[str, Any]] = [{"a": 1.5, "b": 2}, {"a": float("nan"), "b": -4}]
    found = UniformOverrides.of(rows)
    assert found is not None
    assert found.names == ("a", "b")
    np.testing.assert_array_equal(found.matrix, [[1.5, 2.0], [np.nan, -4.0]])
    assert (len(found), list(found), found[0], found.get(2), -1 in found) == (2, [0, 1], rows[0], None, False)
    joined = UniformOverrides.joined([found, found])
    assert joined is not None
    assert joined[2] == rows[0]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{}],
        [None],
        [{"a": 1.0}, None],
        [{"a": 1.0}, {"b": 1.0}],
        [{"a": 1.0, "b": 1.0}, {"b": 1.0, "a": 1.0}],
        [{"a": True}],
        [{"a": "1"}],
        [{"a": None}],
        [{"a": float("inf")}],
        [{"a": 10**400}],
    ],
)
def test_rows_that_dont_give_the_same_or_no_finite_numbers_arent_uniform(rows: list[Any]) -> None:
    assert UniformOverrides.of(rows) is None


def test_only_what_names_the_same_is_joined() -> None:
    one, other = UniformOverrides.of([{"a": 1.0}]), UniformOverrides.of([{"b": 1.0}])
    assert one is not None
    assert other is not None
    assert UniformOverrides.joined([one, other]) is None
    assert UniformOverrides.joined([one, {}]) is None
    assert UniformOverrides.joined([{}, {}]) is None
