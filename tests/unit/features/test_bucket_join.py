"""What a join asks for, and one bucket's answer: no Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from heliostat.clock import US_PER_DAY
from heliostat.errors import DuplicateNameError, SpineError, UnknownFeatureError
from heliostat.features import bucket_join
from heliostat.features.aggregations import (
    Count,
    CountDistinct,
    DistinctDays,
    First,
    FloatArray,
    Last,
    Latest,
    Max,
    Mean,
    Quantile,
    StdDev,
    Sum,
    TimeSinceLast,
)
from heliostat.features.bucket_join import (
    JoinRows,
    check_spine,
    entity_joins,
    single_features,
    spine_instants_us,
)
from heliostat.features.definitions import Entity, EventSource, FeatureRef, FeatureView
from heliostat.features.offline import compute_features
from heliostat.schema import TIMESTAMP
from heliostat.storage.delta import Table
from heliostat.storage.event_log import EventLog

DAY_US = 20_000 * US_PER_DAY

USER, SHOP = Entity("user", keys={"user_id": "int64"}), Entity("shop", keys={"shop": "string"})
SALES = EventSource(
    "sales",
    schema=pa.schema(
        [
            ("id", pa.int64()),
            ("user_id", pa.int64()),
            ("shop", pa.string()),
            ("at", TIMESTAMP),
            ("amount", pa.float64()),
        ]
    ),
    entity=(USER, SHOP),
    event_time="at",
    event_id="id",
)
SPENDING = FeatureView(
    "spending", version=1, source=SALES, entity=USER, features={"n": Count(), "sum": Sum("amount", window="30d")}
)
DEMAND = FeatureView("demand", version=1, source=SALES, entity=SHOP, features={"n": Count()})


def sales(first: int, n: int) -> pa.Table:
    ids = np.arange(first, first + n)
    return pa.table(
        {
            "id": ids,
            "user_id": ids % 7,
            "shop": [f"shop {number % 3}" for number in ids],
            "at": pa.array(DAY_US - US_PER_DAY * (1 + ids % 5)).cast(TIMESTAMP),
            "amount": ids.astype(float),
        },
        schema=SALES.schema,
    )


def test_features_are_grouped_by_entity_and_keep_their_order(tmp_path: Path) -> None:
    asked = [SPENDING["sum"], DEMAND, SPENDING["n"]]
    assert [ref.name for ref in single_features(asked)] == ["spending__sum", "demand__n", "spending__n"]
    joins = entity_joins(asked, EventLog(str(tmp_path), n_buckets=2), None)
    assert [(join.entity.name, join.names) for join in joins] == [
        ("user", ("spending__sum", "spending__n")),
        ("shop", ("demand__n",)),
    ]


def test_a_feature_that_is_unknown_or_asked_for_twice_is_named(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), n_buckets=2)
    with pytest.raises(UnknownFeatureError, match="'nope'; it defines: n, sum"):
        entity_joins([FeatureRef(SPENDING, "nope")], log, None)
    with pytest.raises(DuplicateNameError, match="spending__n"):
        entity_joins([SPENDING, SPENDING["n"]], log, None)


def test_rows_of_all_buckets_are_answered_from_the_version_the_join_began_with(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), n_buckets=3)
    log.append(SALES, sales(0, 70), ingested_us=1)
    (join,) = entity_joins([SPENDING], log, None)
    log.append(SALES, sales(70, 70), ingested_us=2)
    keys = pa.array([*range(7), 99])
    as_of_us = np.full(8, DAY_US)
    found = join.all_columns(USER.buckets(keys, 3), keys, as_of_us)
    amounts = np.bincount(np.arange(70) % 7, weights=np.arange(70.0), minlength=8)
    assert found["spending__n"].tolist() == [10.0] * 7 + [0.0]
    assert found["spending__sum"].tolist() == amounts.tolist()
    (later,) = entity_joins([SPENDING], log, None)
    assert later.all_columns(USER.buckets(keys, 3), keys, as_of_us)["spending__n"].tolist() == [20.0] * 7 + [0.0]
    (known,) = entity_joins([SPENDING], log, 1)
    assert known.all_columns(USER.buckets(keys, 3), keys, as_of_us)["spending__n"].tolist() == [10.0] * 7 + [0.0]


def test_each_row_is_answered_as_of_its_own_instant(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), n_buckets=3)
    log.append(SALES, sales(0, 70), ingested_us=1)
    (join,) = entity_joins([DEMAND], log, None)
    keys, as_of_us = pa.array(["shop 1"] * 3), DAY_US - US_PER_DAY * np.array([0, 5, 2])
    found = join.all_columns(SHOP.buckets(keys, 3), keys, as_of_us)
    ids = np.arange(70)[np.arange(70) % 3 == 1]
    expected = [int(np.sum(1 + ids % 5 > back)) for back in (0, 5, 2)]
    assert found["demand__n"].tolist() == expected


def test_a_log_that_does_not_exist_yet_has_no_events(tmp_path: Path) -> None:
    (join,) = entity_joins([DEMAND], EventLog(str(tmp_path), n_buckets=3), None)
    keys = pa.array(["shop 1"])
    assert join.all_columns(SHOP.buckets(keys, 3), keys, np.array([DAY_US]))["demand__n"].tolist() == [0.0]


def test_no_rows_give_columns_without_rows(tmp_path: Path) -> None:
    (join,) = entity_joins([SPENDING], EventLog(str(tmp_path), n_buckets=3), None)
    none = join.all_columns(np.array([], np.int32), pa.array([], pa.int64()), np.array([], np.int64))
    assert {name: len(values) for name, values in none.items()} == {"spending__n": 0, "spending__sum": 0}


@pytest.mark.parametrize(
    "instants",
    [
        pa.array([DAY_US]),
        pa.array([DAY_US]).cast(pa.timestamp("us")),
        pa.array([DAY_US]).cast(pa.timestamp("us")).cast(pa.timestamp("s")),
        pa.array([DAY_US]).cast(pa.timestamp("us", tz="America/New_York")),
        pa.array([DAY_US // US_PER_DAY], pa.int32()).cast(pa.date32()),
    ],
    ids=str,
)
def test_instants_of_every_kind_are_microseconds(instants: pa.Array) -> None:
    assert spine_instants_us(pa.table({"q": instants}), "q").tolist() == [DAY_US]


@pytest.mark.parametrize(
    ("instants", "problem"),
    [
        (pa.array([None], TIMESTAMP), "is null"),
        (pa.array(["2026-01-01"]), "type string"),
        (pa.array([1.5]), "type double"),
        (pa.array([1]).cast(pa.timestamp("ns")), "aren't whole microseconds"),
    ],
)
def test_instants_that_are_none_are_refused(instants: pa.Array, problem: str) -> None:
    with pytest.raises(SpineError, match=problem):
        spine_instants_us(pa.table({"q": instants}), "q")


def test_a_spine_without_instants_or_with_a_features_name_is_refused(tmp_path: Path) -> None:
    joins = entity_joins([DEMAND], EventLog(str(tmp_path), n_buckets=3), None)
    with pytest.raises(SpineError, match="no column 'as_of'.*shop, when"):
        check_spine(["shop", "when"], joins, "as_of")
    with pytest.raises(SpineError, match="'demand__n' already"):
        check_spine(["shop", "as_of", "demand__n"], joins, "as_of")


def test_texts_in_dictionaries_give_the_features_that_plain_texts_give(tmp_path: Path) -> None:
    """The log hands out texts as its files have them: a dictionary a row group, another in each file."""
    log = EventLog(str(tmp_path), n_buckets=1)
    small = pc.field("shop") == "shop 0"
    mixed = pc.if_else(pc.field("shop") == "shop 1", pc.field("amount"), 0.5)
    features = {
        "small": Count(where=small),
        "weight": Sum(pc.if_else(small, 2.0, 1.0), window="30d"),
        "mixed": Sum(mixed, window="30d"),
        "shops": CountDistinct("shop", categories=("shop 0", "shop 2"), window="30d"),
        "last_shop": Last("shop", window="30d"),
    }
    views = [
        FeatureView("by_shop", version=1, source=SALES, entity=SHOP, features=features),
        FeatureView("by_user", version=1, source=SALES, entity=USER, features=features),
    ]
    for first in (0, 500, 1_000):
        some = sales(first, 500 if first else 200)
        log.append(SALES, some.slice(first % 3), ingested_us=first)
    texts = log.read_bucket(SALES, SHOP, 0, columns=["shop"], raw=True).column("shop")
    assert texts.num_chunks > 1
    assert pa.types.is_dictionary(texts.type)
    as_of_us = np.array([DAY_US, DAY_US - 2 * US_PER_DAY, DAY_US, DAY_US])
    asked = pa.array(["shop 2", "shop 0", "none", "shop 1"]), pa.array([1, 2, 99, 5])
    for view, keys in zip(views, asked, strict=True):
        (join,) = entity_joins([view], log, None)
        found = join.columns([0], keys, as_of_us)
        plain = compute_features([view], log.read_bucket(SALES, view.entity, 0), keys, as_of_us)
        assert list(found) == list(plain)
        for name, values in found.items():
            assert np.array_equal(values, plain[name], equal_nan=True), name
        assert found[f"{view.name}__small"].sum() > 0


EVERYTHING = FeatureView(
    "everything",
    version=1,
    source=SALES,
    entity=USER,
    ttl="9d",
    request={"offer": "float64"},
    features={
        "n": Count(window="7d"),
        "sum": Sum("amount", window="30d"),
        "all": Sum("amount"),
        "mean": Mean("amount", window="3d"),
        "spread": StdDev("amount", window="30d"),
        "most": Max("amount", window="12h"),
        "median": Quantile("amount", q=0.5, between=(0.01, 1e4), window="30d"),
        "first": First("amount", window="30d", where=pc.field("amount") > 0),
        "last": Last("amount"),
        "latest": Latest("amount"),
        "shop": Latest("shop", window="30d"),
        "days": DistinctDays(window="30d"),
        "since": TimeSinceLast(),
    },
)


@EVERYTHING.derived
def offered(offer: FloatArray, latest: FloatArray) -> FloatArray:
    """What a request brings goes with its row."""
    return offer - latest


def busy_log(root: Path, n_buckets: int, *, n: int = 4_000) -> EventLog:
    """Many events of few instants, in several files a bucket: ties, nulls, users with thousands and with none."""
    rng = np.random.default_rng(7)
    amounts = np.round(rng.lognormal(2.0, 3.0, n), 2) * rng.choice([1.0, -1.0, 1e12], n, p=[0.8, 0.19, 0.01])
    events = pa.table(
        {
            "id": np.arange(n),
            "user_id": np.where(rng.random(n) < 0.3, 3, rng.integers(0, 200, n)),
            "shop": rng.choice(["a", "b", "c|d"], n).tolist(),
            "at": pa.array(DAY_US - rng.integers(0, 40 * 8, n) * (US_PER_DAY // 8)).cast(TIMESTAMP),
            "amount": pa.array(amounts, mask=rng.random(n) < 0.1),
        },
        schema=SALES.schema,
    )
    log = EventLog(str(root), n_buckets=n_buckets)
    for first in range(0, n, n // 3):
        log.append(SALES, events.slice(first, n // 3), ingested_us=first)
    return log


def busy_spine(n: int = 900) -> pa.Table:
    """Rows at the events' own instants, repeated ones, and unknown entities; some buckets have no row."""
    rng = np.random.default_rng(8)
    asked = pa.table(
        {
            "user_id": rng.choice(np.array([*range(0, 260, 3), 10_000]), n),
            "shop": rng.choice(["a", "c|d", "nowhere"], n).tolist(),
            "as_of": pa.array(DAY_US - rng.integers(0, 45 * 8, n) * (US_PER_DAY // 8)).cast(TIMESTAMP),
            "offer": rng.random(n),
        }
    )
    return pa.concat_tables([asked, asked.slice(0, n // 5)])


@pytest.mark.parametrize("n_buckets", [1, 7, 64])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("at_once", [1, 700, 2**17])
def test_buckets_answered_together_give_the_bits_that_each_gives_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_buckets: int, threads: int, at_once: int
) -> None:
    log, spine = busy_log(tmp_path, n_buckets), busy_spine()
    joins = entity_joins([EVERYTHING, SPENDING, DEMAND], log, 3_000)
    asked = JoinRows.of(spine, joins, "as_of")
    monkeypatch.setattr(bucket_join, "_AT_ONCE", at_once)
    monkeypatch.setattr(bucket_join, "_FEWEST_AT_ONCE", at_once)
    for rows in asked:
        together = rows.columns_here(threads)
        assert list(together) == list(rows.join.names)
        for bucket in np.unique(rows.buckets):
            own = np.flatnonzero(rows.buckets == bucket)
            request = {name: values[own] for name, values in rows.request.items()}
            alone = rows.join.columns([int(bucket)], rows.keys.take(pa.array(own)), rows.as_of_us[own], request)
            for name, values in alone.items():
                assert values.tobytes() == together[name][own].tobytes(), name


def test_a_join_opens_a_table_once_however_many_buckets_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, spine = busy_log(tmp_path, 64, n=300), busy_spine(100)
    opened: list[str] = []
    opens = Table.open

    def counting(self: Table, version: int | None = None) -> object:
        opened.append(self.uri.rpartition("/")[2])
        return opens(self, version)

    monkeypatch.setattr(Table, "open", counting)
    joins = entity_joins([SPENDING, EVERYTHING, DEMAND], log, None)
    for rows in JoinRows.of(spine, joins, "as_of"):
        assert rows.size > 0
        rows.columns_here()
    assert opened == ["user", "shop"]


def test_a_joins_size_is_its_rows_and_the_events_of_the_files_it_would_open(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), n_buckets=3)
    log.append(SALES, sales(0, 70), ingested_us=1)
    joins = entity_joins([SPENDING, DEMAND], log, None)
    spine = pa.table({"user_id": [*range(7)] * 2, "shop": ["shop 1"] * 14, "as_of": [DAY_US] * 14})
    users, shops = JoinRows.of(spine, joins, "as_of")
    assert users.size == 14 + 70
    of_bucket = log.statistics(SALES, SHOP).rows_by_bucket[int(shops.buckets[0])]
    assert shops.size == 14 + of_bucket < 14 + 70
    before = pa.table({"user_id": [1], "shop": ["shop 1"], "as_of": [DAY_US - 50 * US_PER_DAY]})
    assert [rows.size for rows in JoinRows.of(before, joins, "as_of")] == [1, 1]
