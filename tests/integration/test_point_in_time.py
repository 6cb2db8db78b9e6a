"""The point-in-time join over a real Ray and a real event log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray.data

from heliostat.clock import US_PER_DAY, US_PER_HOUR, parse_instant_us
from heliostat.errors import (
    BucketCountError,
    DuplicateNameError,
    KeyColumnError,
    SpineError,
    UnknownFeatureError,
)
from heliostat.features import point_in_time
from heliostat.features.aggregations import Count, FloatArray, Last, Mean, Sum, TimeSinceLast
from heliostat.features.definitions import Entity, EventSource, FeatureRef, FeatureView
from heliostat.features.point_in_time import entities_known, historical_features, snapshot
from heliostat.schema import TIMESTAMP
from heliostat.storage.event_log import EventLog
from tests.oracles import Oracle, derived
from tests.ray_work import counted

pytestmark = pytest.mark.usefixtures("ray_local")

ORIGIN_US = parse_instant_us("2026-05-01")

USER = Entity("user", keys={"user_id": "int64"})
ITEM = Entity("item", keys={"shop": "string", "sku": "int64"})
SALES = EventSource(
    "sales",
    schema=pa.schema(
        [
            ("sale_id", pa.string()),
            ("user_id", pa.int64()),
            ("shop", pa.string()),
            ("sku", pa.int64()),
            ("at", TIMESTAMP),
            ("amount", pa.float64()),
            ("note", pa.string()),
        ]
    ),
    entity=(USER, ITEM),
    event_time="at",
    event_id="sale_id",
)
VISITS = EventSource(
    "visits",
    schema=pa.schema([("visit_id", pa.int64()), ("user_id", pa.int64()), ("at", TIMESTAMP), ("pages", pa.int64())]),
    entity=USER,
    event_time="at",
    event_id="visit_id",
)
SPENDING = FeatureView(
    "spending",
    version=1,
    source=SALES,
    entity=USER,
    features={
        "orders": Count(window="30d"),
        "spent": Sum("amount", window="7d"),
        "last_amount": Last("amount", where=pc.field("amount") > 0),
    },
)
RECENCY = FeatureView("recency", version=1, source=SALES, entity=USER, features={"days": TimeSinceLast()}, ttl="10d")
BROWSING = FeatureView("browsing", version=2, source=VISITS, features={"pages": Mean("pages", window="12h")})
DEMAND = FeatureView("demand", version=1, source=SALES, entity=ITEM, features={"sold": Sum("amount", window="14d")})


@SPENDING.derived
def spent_log(spent: FloatArray) -> FloatArray:
    return np.log1p(np.abs(spent))


VIEWS = [SPENDING, RECENCY, BROWSING, DEMAND]
NAMES = [ref.name for view in VIEWS for ref in view]


def instants_of(rng: np.random.Generator, n: int) -> np.ndarray:
    """Whole hours, so that events and instants meet."""
    return ORIGIN_US + rng.integers(0, 40 * 24, n) * US_PER_HOUR


def make_sales(rng: np.random.Generator, n: int) -> pa.Table:
    amounts: list[float | None] = [None if each < 0.1 else round(each * 100 - 20, 2) for each in rng.random(n)]
    return pa.table(
        {
            "sale_id": [f"s{number}" for number in range(n)],
            "user_id": rng.integers(1, 60, n),
            "shop": rng.choice(["north", "south|east", "w%7Cst"], n).tolist(),
            "sku": rng.integers(1, 5, n),
            "at": pa.array(instants_of(rng, n)).cast(TIMESTAMP),
            "amount": amounts,
            "note": ["x" * 10] * n,
        },
        schema=SALES.schema,
    )


def make_visits(rng: np.random.Generator, n: int) -> pa.Table:
    return pa.table(
        {
            "visit_id": np.arange(n),
            "user_id": rng.integers(1, 80, n),
            "at": pa.array(instants_of(rng, n)).cast(TIMESTAMP),
            "pages": rng.integers(1, 9, n),
        },
        schema=VISITS.schema,
    )


def make_spine(rng: np.random.Generator, n: int) -> pa.Table:
    """Known and unknown entities, repeated rows, a column that passes through."""
    spine = pa.table(
        {
            "label": [f"row {number % 7}" for number in range(n)],
            "user_id": rng.integers(1, 90, n),
            "sku": rng.integers(1, 6, n),
            "as_of": pa.array(instants_of(rng, n)).cast(TIMESTAMP),
            "shop": rng.choice(["north", "south|east", "nowhere"], n).tolist(),
        }
    )
    return pa.concat_tables([spine, spine.slice(0, n // 10)]).combine_chunks()


class History:
    """A filled event log and the oracles of its views."""

    def __init__(self, root: Path) -> None:
        rng = np.random.default_rng(11)
        self.sales, self.visits = make_sales(rng, 1500), make_visits(rng, 800)
        self.spine = make_spine(rng, 120)
        self.log = EventLog(str(root), n_buckets=5)
        half = self.sales.num_rows // 2
        # Two appends, the second a week later and overlapping the first.
        self.late_us = ORIGIN_US + 60 * US_PER_DAY
        self.log.append(SALES, self.sales.slice(0, half), ingested_us=ORIGIN_US)
        self.log.append(SALES, self.sales.slice(half - 100), ingested_us=self.late_us)
        self.log.append(VISITS, self.visits, ingested_us=ORIGIN_US)
        self.known = {"sales": self.sales.slice(0, half), "visits": self.visits}
        self.all = {"sales": self.sales, "visits": self.visits}

    def expected(self, spine: pa.Table, *, known: bool = False) -> dict[str, list[Any]]:
        events = self.known if known else self.all
        rows = spine.to_pylist()
        columns: dict[str, list[Any]] = {name: [] for name in NAMES}
        for view in VIEWS:
            oracle = Oracle(view, events[view.source.name])
            for row in rows:
                key = tuple(row[column] for column in view.entity.key_columns)
                answers = oracle.answer(key, int(row["as_of"].timestamp()) * 1_000_000)
                for name, answer in answers.items():
                    columns[f"{view.name}__{name}"].append(answer)
        return columns

    def check(self, spine: pa.Table, found: pa.Table, *, known: bool = False) -> None:
        expected = self.expected(spine, known=known)
        for name, answers in expected.items():
            if not answers:
                continue
            for answer, value in zip(answers, found[name].to_pylist(), strict=True):
                assert answer.accepts(value), (name, answer, value)
        own = [{"spent": value} for value in found["spending__spent"].to_pylist()]
        logs = [derived(SPENDING, each)["spent_log"] for each in own]
        np.testing.assert_allclose(found["spending__spent_log"].to_numpy(), logs, rtol=1e-14)


@pytest.fixture(params=["here", "on Ray"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small as these joins are: once as they are answered, once as large ones would be."""
    if request.param == "on Ray":
        monkeypatch.setattr(point_in_time, "SMALL_JOIN", -1)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    return History(tmp_path_factory.mktemp("history"))


@pytest.mark.usefixtures("both_ways")
def test_a_table_keeps_its_rows_order_and_columns_and_gets_what_the_oracle_says(history: History) -> None:
    found = historical_features(history.spine, VIEWS, history.log)
    assert found.column_names == [*history.spine.column_names, *NAMES]
    assert found.select(history.spine.column_names) == history.spine
    history.check(history.spine, found)


@pytest.mark.usefixtures("both_ways")
def test_a_pandas_frame_comes_back_as_one_with_its_index(history: History) -> None:
    frame = history.spine.to_pandas()
    frame.index = pd.Index([f"i{number}" for number in range(len(frame))], name="row")
    frame["anything"] = [{"kept": number} for number in range(len(frame))]
    found = historical_features(frame, [SPENDING["spent"], DEMAND], history.log)
    assert isinstance(found, pd.DataFrame)
    pd.testing.assert_frame_equal(found[frame.columns], frame)
    table = historical_features(history.spine, VIEWS, history.log)
    for name in ("spending__spent", "demand__sold"):
        np.testing.assert_array_equal(found[name].to_numpy(), table[name].to_numpy())
    assert list(found.columns) == [*frame.columns, "spending__spent", "demand__sold"]


@pytest.mark.slow
def test_a_ray_dataset_comes_back_as_one_with_the_rows_numbers(history: History) -> None:
    blocks = [history.spine.slice(start, 50) for start in range(0, history.spine.num_rows, 50)]
    found = historical_features(ray.data.from_arrow(blocks), VIEWS, history.log)
    assert isinstance(found, ray.data.Dataset)
    table = pa.concat_tables(
        [batch for batch in found.iter_batches(batch_size=None, batch_format="pyarrow") if batch.num_rows],
        promote_options="permissive",
    ).sort_by("spine_row")
    assert table["spine_row"].to_pylist() == list(range(history.spine.num_rows))
    assert set(table.column_names) == {*history.spine.column_names, *NAMES, "spine_row"}
    assert table.select(history.spine.column_names).equals(history.spine)
    history.check(history.spine, table)


@pytest.mark.usefixtures("both_ways")
def test_events_that_came_later_are_left_out_when_asked_what_was_known(history: History) -> None:
    found = historical_features(history.spine, VIEWS, history.log, known_at_us=history.late_us - 1)
    history.check(history.spine, found, known=True)


def test_integer_and_zoned_and_daily_instants_mean_the_same(history: History) -> None:
    midnights = pc.floor_temporal(history.spine["as_of"], unit="day")
    spine = history.spine.drop_columns("as_of")
    results = []
    for column in (
        midnights.cast(pa.int64()),
        midnights.cast(pa.timestamp("ms", tz="Asia/Tokyo")),
        midnights.cast(pa.timestamp("us")),
        midnights.cast(pa.date32()),
    ):
        found = historical_features(spine.append_column("when", column), [SPENDING], history.log, as_of="when")
        results.append(found.drop_columns("when"))
        assert found["when"].type == column.type
    for each in results[1:]:
        pd.testing.assert_frame_equal(each.to_pandas(), results[0].to_pandas())


def test_a_small_join_begins_no_task_and_a_large_one_gives_the_same_bits(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = counted(monkeypatch, point_in_time, "over_blocks")
    small = historical_features(history.spine, VIEWS, history.log)
    assert begun == []
    monkeypatch.setattr(point_in_time, "SMALL_JOIN", 0)
    large = historical_features(history.spine, VIEWS, history.log)
    assert len(begun) == 2, "one join an entity"
    for name in NAMES:
        assert small[name].to_numpy().tobytes() == large[name].to_numpy().tobytes(), name


@pytest.mark.usefixtures("both_ways")
def test_an_empty_spine_and_an_empty_log_give_what_nothing_gives(history: History, tmp_path: Path) -> None:
    empty = historical_features(history.spine.slice(0, 0), VIEWS, history.log)
    assert empty.num_rows == 0
    assert empty.column_names == [*history.spine.column_names, *NAMES]
    nothing = historical_features(history.spine, [SPENDING], EventLog(str(tmp_path), n_buckets=3))
    assert set(nothing["spending__orders"].to_pylist()) == {0.0}
    assert np.isnan(nothing["spending__last_amount"].to_numpy()).all()


@pytest.mark.usefixtures("both_ways")
def test_what_is_missing_is_named(history: History) -> None:
    spine, log = history.spine, history.log
    with pytest.raises(UnknownFeatureError, match="'nope'.*orders, spent, last_amount, spent_log"):
        historical_features(spine, [FeatureRef(SPENDING, "nope")], log)
    with pytest.raises(KeyColumnError, match="'sku'.*label, user_id, as_of, shop"):
        historical_features(spine.drop_columns("sku"), [DEMAND], log)
    with pytest.raises(KeyColumnError, match=r"'user_id' is string, not int64"):
        historical_features(spine.set_column(1, "user_id", spine["label"]), [SPENDING], log)
    users = pa.array([None, *spine["user_id"].to_pylist()[1:]], pa.int64())
    with pytest.raises(KeyColumnError, match=r"'user_id' is null in 1 rows"):
        historical_features(spine.set_column(1, "user_id", users), [SPENDING], log)
    with pytest.raises(SpineError, match=r"no column 'as_of'.*label, user_id, sku, shop"):
        historical_features(spine.drop_columns("as_of"), [SPENDING], log)
    with pytest.raises(SpineError, match="type string"):
        historical_features(spine, [SPENDING], log, as_of="label")
    with pytest.raises(SpineError, match="null"):
        historical_features(spine.append_column("t", pa.nulls(spine.num_rows, TIMESTAMP)), [SPENDING], log, as_of="t")
    with pytest.raises(SpineError, match="'recency__days' already"):
        historical_features(spine.append_column("recency__days", spine["sku"]), [RECENCY], log)
    with pytest.raises(SpineError, match="is a list"):
        historical_features([1, 2], [RECENCY], log)
    with pytest.raises(DuplicateNameError, match="recency__days"):
        historical_features(spine, [RECENCY, RECENCY["days"]], log)
    with pytest.raises(SpineError, match="no column 'as_of'"):
        historical_features(ray.data.from_arrow(spine.drop_columns("as_of")), [SPENDING], log)


@pytest.mark.usefixtures("both_ways")
def test_a_fault_inside_a_task_keeps_its_kind(history: History) -> None:
    other = EventLog(history.log.root, n_buckets=6)
    with pytest.raises(BucketCountError, match="created with 5 buckets"):
        historical_features(history.spine, [SPENDING], other)


def test_entities_are_known_from_their_first_event_on(history: History) -> None:
    at_us = ORIGIN_US + 3 * US_PER_DAY
    past = history.sales.filter(pc.less(history.sales["at"].cast(pa.int64()), at_us))
    known = entities_known(history.log, SALES, ITEM, at_us)
    pairs = set(zip(past["shop"].to_pylist(), past["sku"].to_pylist(), strict=True))
    assert len(known) == len(pairs)
    assert {(row["shop"], row["sku"]) for row in known.to_pylist()} == pairs
    assert entities_known(history.log, SALES, ITEM, ORIGIN_US).num_rows == 0


def test_a_snapshot_is_the_join_of_all_known_entities(history: History) -> None:
    at_us = ORIGIN_US + 20 * US_PER_DAY + 1
    whole = snapshot(SPENDING, history.log, as_of_us=at_us).sort_by("user_id")
    users = entities_known(history.log, SALES, USER, at_us).sort_by("user_id")
    assert whole["user_id"].to_pylist() == users["user_id"].to_pylist()
    some = snapshot(SPENDING, history.log, as_of_us=at_us, entities=users)
    assert some.equals(whole)
    assert whole.column_names == ["user_id", "as_of", *(ref.name for ref in SPENDING)]
