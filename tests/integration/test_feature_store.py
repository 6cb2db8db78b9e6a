"""The feature store for programs, on real stores. Faults that other feature stores have had each get a test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from heliostat import Count, Entity, EventSource, FeatureView, FloatArray, Label, ModelSpec, PrecomputedView, Sum
from heliostat.clock import US_PER_DAY, ManualClock, format_instant, parse_instant_us
from heliostat.errors import (
    DefinitionConflictError,
    HeliostatError,
    InvalidDefinitionError,
    InvalidValueError,
    KeyColumnError,
    SchemaMismatchError,
    SpineError,
    UnknownFeatureError,
    UnknownTableError,
    UnknownViewError,
)
from heliostat.feature_store import FeatureStore
from heliostat.features.definitions import FeatureRef
from heliostat.models.definitions import Definitions
from heliostat.models.rows import ModelRows
from heliostat.settings import Settings
from heliostat.workspace import Workspace

NOW = "2026-05-01T12:00:00Z"
NOW_US = parse_instant_us(NOW)

CUSTOMER = Entity("customer", keys={"customer_id": "int64"})
SHOP = Entity("shop", keys={"country": "string", "number": "int64"})
SCORES = PrecomputedView(
    "scores", version=1, entity=CUSTOMER, features={"risk": "Of not paying", "norm": ""}, ttl="30d", owner="risk"
)
SHOPS = PrecomputedView("shops", version=1, entity=SHOP, features=["size"])
SALES = EventSource(
    "sales",
    schema=pa.schema(
        {
            "id": pa.int64(),
            "customer_id": pa.int64(),
            "country": pa.string(),
            "number": pa.int64(),
            "at": pa.timestamp("us"),
            "amount": pa.float64(),
        }
    ),
    entity=(CUSTOMER, SHOP),
    event_time="at",
    event_id="id",
)
SPENDING = FeatureView(
    "spending",
    version=1,
    source=SALES,
    entity=CUSTOMER,
    features={"orders": Count(), "spent": Sum("amount", window="30d")},
    request={"amount": "float64"},
)


@SPENDING.derived
def share(spent: FloatArray, amount: FloatArray) -> FloatArray:
    return amount / spent


@pytest.fixture
def store(settings: Settings) -> Iterator[FeatureStore]:
    """Views are registered, nothing is written; it is noon."""
    with Workspace.open(settings) as workspace:
        workspace.clock = ManualClock(NOW_US)
        workspace.definitions = Definitions.of([SCORES, SHOPS, SPENDING])
        opened = FeatureStore(workspace)
        opened.register([SCORES, SHOPS, SPENDING])
        yield opened


def _scores(*rows: tuple[int, str, float | None]) -> pd.DataFrame:
    """Rows of the view: customer, timestamp, risk; the norm is ten times the risk."""
    return pd.DataFrame(
        {
            "customer_id": pd.array([row[0] for row in rows], "int64"),
            "computed_at": pd.to_datetime([row[1] for row in rows], utc=True, format="ISO8601"),
            "risk": [row[2] for row in rows],
            "norm": [None if row[2] is None else 10 * row[2] for row in rows],
        }
    ).astype({"risk": "float64", "norm": "float64"})


def _sales(*rows: tuple[int, int, str, float]) -> pa.Table:
    return pa.table(
        {
            "id": [row[0] for row in rows],
            "customer_id": [row[1] for row in rows],
            "country": ["dk"] * len(rows),
            "number": [1] * len(rows),
            "at": pa.array([parse_instant_us(row[2]) for row in rows], pa.int64()).cast(pa.timestamp("us", "UTC")),
            "amount": [row[3] for row in rows],
        }
    )


def _spine(*rows: tuple[int, str]) -> pd.DataFrame:
    at = pd.to_datetime([row[1] for row in rows], utc=True, format="ISO8601")
    return pd.DataFrame({"customer_id": [row[0] for row in rows], "as_of": at})


def _log(store: FeatureStore, events: pa.Table) -> None:
    store._workspace.event_log.append(SALES, events, ingested_us=NOW_US)


# ── Faults of peers ─────────────────────────────────────────────────────────────────


def test_no_row_is_dropped_where_keys_and_instants_repeat(store: FeatureStore) -> None:
    store.write_offline(_scores((1, "2026-04-01", 0.1), (1, "2026-04-01", 0.1), (1, "2026-04-10", 0.2)), "scores")
    spine = _spine((1, "2026-04-20"), (9, "2026-04-20"), (1, "2026-04-20"), (1, "2026-04-05"), (1, "2026-04-20"))
    found = store.get_historical(spine, ["scores__risk", "spending__orders"])
    assert found["customer_id"].tolist() == [1, 9, 1, 1, 1]
    np.testing.assert_array_equal(found["scores__risk"], [0.2, np.nan, 0.2, 0.1, 0.2])
    assert found["spending__orders"].tolist() == [0.0] * 5


def test_the_ttl_means_the_same_online_and_offline(store: FeatureStore) -> None:
    written = _scores((1, "2026-04-01T12:00:00", 0.1), (2, "2026-04-01T11:59:59.999999", 0.2), (3, "2026-04-30", 0.3))
    store.write_online(written, "scores")
    store.flush()
    online = store.get_online([1, 2, 3, 4], "scores")
    assert online["scores__is_absent"].tolist() == [False, True, False, True], "30 days to the microsecond"
    offline = store.get_historical(_spine(*((customer, NOW) for customer in (1, 2, 3, 4))), ["scores"])
    np.testing.assert_array_equal(online["scores__risk"], offline["scores__risk"])
    np.testing.assert_array_equal(online["scores__risk"], [0.1, np.nan, 0.3, np.nan])


def test_nothing_of_the_future_is_seen_not_even_a_microsecond_of_it(store: FeatureStore) -> None:
    store.write_offline(_scores((1, "2026-04-01T08:00:00.000001", 0.5)), "scores")
    spine = _spine((1, "2026-04-01T08:00:00"), (1, "2026-04-01T08:00:00.000001"), (1, "2026-04-01T08:00:00.000002"))
    found = store.get_historical(spine, ["scores__risk"])
    np.testing.assert_array_equal(found["scores__risk"], [np.nan, np.nan, 0.5])


def test_nanoseconds_arent_rounded_into_the_past(store: FeatureStore) -> None:
    frame = _scores((1, "2026-04-01", 0.5))
    frame["computed_at"] += pd.Timedelta(1, "ns")
    for write in (store.write_offline, store.write_online):
        with pytest.raises(SchemaMismatchError, match="rounded down, they leak the future"):
            write(frame, "scores")
    spine = _spine((1, "2026-04-01"))
    spine["as_of"] += pd.Timedelta(1, "ns")
    with pytest.raises(SpineError, match="whole microseconds"):
        store.get_historical(spine, ["scores__risk"])


@pytest.mark.parametrize("write", ["write_online", "write_offline"])
def test_the_order_of_writes_doesnt_matter(store: FeatureStore, write: str) -> None:
    rows = [(1, "2026-04-10", 0.2), (1, "2026-04-10", 0.9), (1, "2026-04-03", 0.1), (1, "2026-02-01", 0.7)]
    found = []
    for version, order in enumerate(itertools.permutations(rows), start=2):
        view = PrecomputedView("scores", version=version, entity=CUSTOMER, features=["risk", "norm"])
        store.register([view])
        for row in order:
            getattr(store, write)(_scores(row), view)
        if write == "write_online":
            online = store.get_online([1], view)["scores__risk"][0]
            store.flush()
            assert store.get_historical(_spine((1, NOW)), [view])["scores__risk"][0] == online
        joined = store.get_historical(_spine((1, "2026-04-05"), (1, "2026-04-11"), (1, "2026-03-01")), [view])
        kept = store.get_offline([1], view, "2026-01-01", NOW)
        found.append([*joined["scores__risk"], *kept["scores__risk"]])
    assert len(found) == 24
    assert all(each == found[0] for each in found)
    assert found[0][0] == 0.1
    assert found[0][2] == 0.7
    assert found[0][3:] == [0.7, 0.1, found[0][1]], "one row an instant, and it is the one that the join sees"


def test_an_aggregation_over_all_time_ends_at_the_rows_own_instant(store: FeatureStore) -> None:
    _log(store, _sales((1, 1, "2026-01-01", 5.0), (2, 1, "2026-02-01", 5.0), (3, 1, "2026-04-30", 5.0)))
    spine = _spine((1, "2025-12-31"), (1, "2026-01-15"), (1, "2026-04-01"), (1, NOW))
    assert store.get_historical(spine, ["spending__orders"])["spending__orders"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_what_is_known_of_nobody_is_said_and_not_passed_over(store: FeatureStore) -> None:
    store.write_online(_scores((1, "2026-04-30", None), (2, "2026-04-30", 0.1)), "scores")
    found = store.get_online([1, 2, 3], ["scores", "spending"])
    assert found["scores__is_absent"].tolist() == [False, False, True], "a null isn't an absence"
    assert found["spending__is_absent"].tolist() == [True, True, True]
    with pytest.raises(UnknownFeatureError, match=r"'rsk'.*scores__risk, scores__norm"):
        store.get_online([1], "scores", ["rsk"])
    with pytest.raises(UnknownViewError, match=r"'score'.*scores@1"):
        store.get_online([1], "score")
    with pytest.raises(UnknownFeatureError, match="rsk"):
        store.get_historical(_spine((1, NOW)), ["scores__rsk"])


def test_versions_of_a_view_have_rows_of_their_own(store: FeatureStore) -> None:
    second = PrecomputedView("scores", version=2, entity=CUSTOMER, features=["risk", "norm"])
    store.register([second])
    store.write_offline(_scores((1, "2026-04-10", 0.1)), "scores@1")
    store.write_offline(_scores((1, "2026-04-10", 0.2)), second)
    found = store.get_historical(_spine((1, NOW)), ["scores@1__risk", "scores@2__risk", "scores__norm"])
    assert found.iloc[0, 2:].tolist() == [0.1, 0.2, 2.0]
    with pytest.raises(InvalidDefinitionError, match=r"scores@1 and scores@2 under one name.*pinned"):
        store.get_historical(_spine((1, NOW)), [SCORES, second])
    store.materialize()
    online = store.get_online([1], ["scores@1", "scores@2"])
    assert (online["scores@1__risk"][0], online["scores@2__risk"][0]) == (0.1, 0.2)


# ── Writing ─────────────────────────────────────────────────────────────────────────


def test_what_is_written_online_is_read_at_once_and_reaches_the_log_once(store: FeatureStore) -> None:
    rows = _scores((1, "2026-04-30", 0.1), (2, "2026-04-29", 0.2))
    assert (store.write_online(rows, "scores").new, store.write_online(rows, "scores").known) == (2, 2)
    assert store.get_online([2, 1], "scores")["scores__risk"].tolist() == [0.2, 0.1]
    assert store.write_offline(rows, "scores").new == 2, "the sink hasn't been there yet"
    moved = store.flush()
    assert (moved.events, moved.duplicates) == (0, 2)
    assert len(store.get_offline([1, 2], "scores", "2026-04-01", NOW)) == 2
    store.materialize()
    assert store.get_online([2, 1], "scores")["scores__risk"].tolist() == [0.2, 0.1]


def test_what_is_written_offline_is_read_online_once_it_is_materialized(store: FeatureStore) -> None:
    done = store.write_offline(_scores((1, "2026-04-20", 0.1), (1, "2026-04-25", 0.3)), "scores")
    assert (done.new, done.known) == (2, 0)
    assert store.get_online([1], "scores")["scores__is_absent"].tolist() == [True]
    store.materialize(["scores"])
    assert store.get_online([1], "scores")["scores__risk"].tolist() == [0.3]


@pytest.mark.parametrize("day", ["2026-04-10", "2026-05-01"])
def test_a_materialization_before_the_sink_loses_nothing_that_was_written_online(
    store: FeatureStore, day: str
) -> None:
    store.write_offline(_scores((1, "2026-04-05", 0.1), (2, "2026-04-05", 0.2)), "scores")
    store.write_online(_scores((1, day, 0.9)), "scores")
    for _ in range(2):
        store.materialize()
        assert store.get_online([1, 2], "scores")["scores__risk"].tolist() == [0.9, 0.2]
        store.flush()


def test_the_newest_row_is_the_record_its_nulls_included(store: FeatureStore) -> None:
    store.write_online(_scores((1, "2026-04-20", 0.1), (1, "2026-04-25", None)), "scores")
    store.flush()
    assert np.isnan(store.get_online([1], "scores")["scores__risk"][0])
    assert np.isnan(store.get_historical(_spine((1, NOW)), ["scores__risk"])["scores__risk"][0])


@pytest.mark.parametrize(
    ("timestamp", "expected"),
    [
        ("2026-04-30", "2026-04-30"),
        (None, NOW),
        ("when", "2026-04-02"),
        (parse_instant_us("2026-04-03"), "2026-04-03"),
    ],
)
def test_a_timestamp_is_a_column_an_instant_or_now(
    store: FeatureStore, timestamp: str | int | None, expected: str
) -> None:
    frame = _scores((1, "2026-04-02", 0.1)).rename(columns={"computed_at": "when"})
    if timestamp != "when":
        frame = frame.drop(columns="when")
    store.write_offline(frame, "scores", timestamp)
    kept = store.get_offline(None, "scores", "2026-01-01", "2026-06-01")
    assert kept.column("as_of").cast(pa.int64()).to_pylist() == [parse_instant_us(expected)]


def _changed(**columns: object) -> pd.DataFrame:
    frame = _scores((1, "2026-04-02", 0.1), (2, "2026-04-02", 0.1))
    return frame.assign(**columns)


@pytest.mark.parametrize(
    ("frame", "error", "says"),
    [
        (_changed().drop(columns="risk"), SchemaMismatchError, "'risk' is missing"),
        (_changed(rsk=1.0), SchemaMismatchError, "'rsk' is unknown"),
        (_changed(scores__risk=1.0), SchemaMismatchError, "'risk' is there twice"),
        (_changed(risk=["a", "b"]), SchemaMismatchError, "'risk' is .*string"),
        (_changed(risk=[2**60 + 1, 1]), SchemaMismatchError, "no float64 can"),
        (_changed(risk=[np.inf, 1.0]), InvalidValueError, "±Inf in 1 rows"),
        (_changed().drop(columns="customer_id"), SchemaMismatchError, "'customer_id' is missing"),
        (_changed(customer_id=[1, None]), KeyColumnError, "is null in 1 rows"),
        (_changed(customer_id=["x", "y"]), KeyColumnError, "not int64"),
        (_changed(computed_at=pd.to_datetime(["2026-04-01", None])), KeyColumnError, "'computed_at' is null"),
        (_changed(computed_at=["now", "then"]), SchemaMismatchError, "no instants"),
        (_changed(computed_at=pd.to_datetime(["2026-04-01", "2026-06-01"])), InvalidValueError, "2026-06-01"),
        (_changed(risk=pd.Series([1, "a"], dtype=object)), SpineError, "mixed types"),
        ([1, 2], SpineError, "pandas frame, an Arrow table or a Ray Dataset"),
    ],
)
@pytest.mark.parametrize("write", ["write_online", "write_offline"])
def test_a_frame_that_doesnt_fit_is_refused_whole(
    store: FeatureStore, write: str, frame: Any, error: type[HeliostatError], says: str
) -> None:
    with pytest.raises(error, match=says):
        getattr(store, write)(frame, "scores")
    assert store.flush().events == 0
    assert store.get_offline(None, "scores", "2020-01-01", "2030-01-01").num_rows == 0
    assert store.get_online([1, 2], "scores")["scores__is_absent"].all()


def test_a_timestamp_that_is_neither_column_nor_instant_is_refused(store: FeatureStore) -> None:
    with pytest.raises(InvalidValueError, match="written_at"):
        store.write_offline(_changed(), "scores", "written_at")


def test_values_computed_from_events_cant_be_written(store: FeatureStore) -> None:
    for write in (store.write_online, store.write_offline):
        with pytest.raises(InvalidDefinitionError, match=r"spending@1.*events of 'sales'.*PrecomputedView"):
            write(pd.DataFrame({"customer_id": [1], "orders": [1.0], "spent": [1.0]}), "spending")


# ── Reading ─────────────────────────────────────────────────────────────────────────


def test_several_views_of_several_entities_come_in_one_read(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_online(_scores((1, "2026-04-30", 0.1)), "scores")
    size = pd.DataFrame({"country": ["dk", "d|e"], "number": [1, 2], "size": [30, 40]})
    store.write_online(size, "shops", "2026-04-30")
    online, reads = store._workspace.online, []
    read = online.read
    monkeypatch.setattr(online, "read", lambda keys: (reads.append(len(keys)), read(keys))[1])
    asked = pd.DataFrame({"customer_id": [1, 2], "country": ["dk", "d|e"], "number": [1, 2]}, index=["a", "b"])
    found = store.get_online(asked, ["scores", "shops", "spending"], ["risk", "size", "spending__orders"])
    assert len(reads) == 1
    assert found.index.tolist() == ["a", "b"]
    np.testing.assert_array_equal(found["scores__risk"], [0.1, np.nan])
    assert found["shops__size"].tolist() == [30.0, 40.0]
    assert found["spending__orders"].tolist() == [0.0, 0.0]
    assert "scores__norm" not in found


def test_what_features_take_from_a_request_is_a_column_of_the_frame(store: FeatureStore) -> None:
    _log(store, _sales((1, 1, "2026-04-20", 50.0)))
    store.materialize(["spending"])
    assert "spending__share" not in store.get_online([1], "spending")
    frame = pd.DataFrame({"customer_id": [1], "amount": [5.0]})
    assert store.get_online(frame, "spending")["spending__share"].tolist() == [0.1]
    with pytest.raises(SpineError, match="'amount'"):
        store.get_online([1], "spending", ["share"])
    spine = _spine((1, NOW)).assign(amount=5.0)
    assert store.get_historical(spine, [SPENDING["share"]])["spending__share"].tolist() == [0.1]


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ([1, 2], pd.DataFrame),
        (np.array([1, 2]), pd.DataFrame),
        (["1", "2"], pd.DataFrame),
        ([{"customer_id": 1}, {"customer_id": 2}], pd.DataFrame),
        (pd.Series([1, 2]), pd.DataFrame),
        (pd.DataFrame({"customer_id": [1, 2]}), pd.DataFrame),
        (pa.array([1, 2]), pa.Table),
        (pa.table({"customer_id": [1, 2]}), pa.Table),
    ],
)
def test_what_goes_in_comes_out(store: FeatureStore, given: Any, kind: type) -> None:
    store.write_offline(_scores((1, "2026-04-30", 0.1), (2, "2026-04-29", 0.2)), "scores")
    store.materialize()
    online = store.get_online(given, "scores")
    offline = store.get_offline(given, "scores", "2026-04-01", NOW)
    for found in (online, offline):
        assert isinstance(found, kind)
        values = found["scores__risk"]
        assert sorted(values.to_pylist() if kind is pa.Table else values) == [0.1, 0.2]


@pytest.mark.parametrize("given", ["1", 1, {"customer_id": 1}, None])
def test_what_is_no_list_of_keys_is_refused(store: FeatureStore, given: Any) -> None:
    with pytest.raises(InvalidValueError, match="a list of keys"):
        store.get_online(given, "scores")


def test_no_entities_give_no_rows(store: FeatureStore) -> None:
    assert len(store.get_online(pd.DataFrame({"customer_id": pd.array([], "int64")}), "scores")) == 0
    assert store.get_historical(
        pa.table({"customer_id": pa.array([], pa.int64()), "as_of": pa.array([], pa.int64())}), ["scores"]
    ).column_names == ["customer_id", "as_of", "scores__risk", "scores__norm"]


def test_known_at_asks_what_was_known_then(store: FeatureStore) -> None:
    store.write_offline(_scores((1, "2026-04-10", 0.1)), "scores")
    clock = store._workspace.clock
    assert isinstance(clock, ManualClock)
    clock.advance(US_PER_DAY)
    store.write_offline(_scores((1, "2026-04-11", 0.2)), "scores")
    spine = _spine((1, "2026-04-12"))
    then = store.get_historical(spine, ["scores__risk"], known_at=NOW)
    now = store.get_historical(spine, ["scores__risk"])
    assert (then["scores__risk"][0], now["scores__risk"][0]) == (0.1, 0.2)


def test_daily_snapshots_are_read_back_between_two_instants(store: FeatureStore) -> None:
    with pytest.raises(UnknownTableError, match="spending@1"):
        store.get_offline([1], "spending", "2026-04-01", "2026-04-10")
    for day in ("2026-04-01", "2026-04-02", "2026-04-03"):
        spine = pa.table({"customer_id": [1, 2], "as_of": pa.array([parse_instant_us(day)] * 2)})
        rows = store.get_historical(spine, [FeatureRef(SPENDING, name) for name in SPENDING.stored_features])
        at = rows.column("as_of").cast(pa.timestamp("us", "UTC"))
        store._workspace.offline_store.write_day("spending@1", parse_instant_us(day), rows.set_column(1, "as_of", at))
    found = store.get_offline([2], "spending", "2026-04-02", "2026-04-03")
    assert found.columns.tolist() == ["customer_id", "as_of", "spending__orders", "spending__spent"]
    assert found["customer_id"].tolist() == [2]
    assert found["as_of"].tolist() == [pd.Timestamp("2026-04-02", tz="UTC")]
    assert store.get_offline(None, "spending@1", "2026-04-02", NOW).column_names[2] == "spending@1__orders"
    with pytest.raises(InvalidValueError, match="not before"):
        store.get_offline([2], "spending", "2026-04-02", "2026-04-01")


def test_a_model_may_read_written_vectors_beside_aggregates(store: FeatureStore) -> None:
    _log(store, _sales((1, 1, "2026-03-01", 5.0), (2, 2, "2026-03-01", 7.0)))
    store.write_offline(_scores((1, "2026-03-20", 0.1), (2, "2026-04-01", 0.2)), "scores")
    model = ModelSpec("default", CUSTOMER, [SPENDING["orders"], SCORES], Label.any_within("bought", SALES, "7d"))
    store.register([model])
    rows = ModelRows.of(model, store._workspace.event_log, [parse_instant_us("2026-03-25")])
    table = pa.concat_tables([rows.table(bucket) for bucket in rows.event_log.buckets]).sort_by("customer_id")
    assert table.column("customer_id").to_pylist() == [1, 2]
    np.testing.assert_array_equal(table.column("scores__risk").to_numpy(), [0.1, np.nan])
    (info,) = store.features("scores norm")
    assert (info.used_by, info.source, info.columns) == (("default",), "scores_v1", ("computed_at", "norm"))


# ── Registering ─────────────────────────────────────────────────────────────────────


def test_registering_adds_and_never_takes_away(store: FeatureStore) -> None:
    more = PrecomputedView("more", version=1, entity=CUSTOMER, features=["x"])
    plan = store.register([more])
    assert [change.ref for change in plan.added] == ["more_v1@1", "more@1"]
    assert {info.view for info in store.features()} == {"scores", "shops", "spending", "more"}
    assert set(store.definitions.views) == {"scores@1", "shops@1", "spending@1", "more@1"}


def test_a_cell_that_is_run_again_registers_the_same_thing(store: FeatureStore) -> None:
    def cell() -> PrecomputedView:
        customer = Entity("customer", keys={"customer_id": "int64"})
        return PrecomputedView("again", version=1, entity=customer, features=["x"])

    store.register([cell()])
    again = cell()
    assert store.register([again]).is_empty
    store.write_online(pd.DataFrame({"customer_id": [1], "x": [2.0]}), again, "2026-04-30")
    assert store.get_online([1], again)["again__x"].tolist() == [2.0]


def test_a_changed_view_needs_a_higher_version(store: FeatureStore) -> None:
    changed = PrecomputedView("scores", version=1, entity=CUSTOMER, features=["risk"], ttl="30d")
    with pytest.raises(DefinitionConflictError, match=r"norm.*Raise its version to 2"):
        store.register([changed])
    with pytest.raises(UnknownViewError):
        store.write_online(_scores((1, "2026-04-30", 0.1)).drop(columns="norm"), changed)


def test_a_view_that_nobody_registered_is_unknown(store: FeatureStore) -> None:
    stranger = PrecomputedView("stranger", version=1, entity=CUSTOMER, features=["x"])
    with pytest.raises(UnknownViewError, match=r"stranger@1.*scores@1"):
        store.get_online([1], stranger)


# ── Random writes ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(4))
def test_online_and_offline_agree_with_a_table_that_is_searched_through(store: FeatureStore, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [
        (
            int(rng.integers(0, 8)),
            format_instant(NOW_US - int(rng.integers(1, 60)) * US_PER_DAY // 2),
            None if rng.random() < 0.2 else round(float(rng.normal()), 3),
        )
        for _ in range(80)
    ]
    for first in range(0, 80, 20):
        frame = _scores(*rows[first : first + 20])
        [store.write_online, store.write_offline][int(rng.integers(0, 2))](frame, "scores")
    store.flush()
    store.materialize()
    customers = list(range(9))
    online = store.get_online(customers, "scores")["scores__risk"].to_numpy()
    offline = store.get_historical(_spine(*((each, NOW) for each in customers)), ["scores"])[
        "scores__risk"
    ].to_numpy()
    np.testing.assert_array_equal(online, offline)
    for customer in customers:
        own = [(at, value) for who, at, value in rows if who == customer]
        newest = max((at for at, _ in own), default=None)
        allowed = {None if value is None else value for at, value in own if at == newest} or {None}
        expired = newest is None or parse_instant_us(newest) < NOW_US - 30 * US_PER_DAY
        value = None if np.isnan(online[customer]) else online[customer]
        assert value in ({None} if expired else allowed)
