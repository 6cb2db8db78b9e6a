"""From rings to vectors: the key plan, absent and null, overrides and derived features."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import InvalidDefinitionError, InvalidValueError, RingCorruptError, UnknownFeatureError
from heliostat.features.aggregations import Count, Last, Sum, TimeSinceLast
from heliostat.features.definitions import Entity, EventSource, FeatureRef, FeatureView, FloatArray
from heliostat.features.offline import compute_features
from heliostat.online import compiled
from heliostat.online.backfill import BucketRings, RingPlan
from heliostat.online.retrieval import FeatureBatch, FeatureReader
from heliostat.online.tiles import RingLimits, ring_layout
from heliostat.schema import ID_HASH, TIMESTAMP, hash64
from heliostat.storage.bundles import bundles, rings_in
from heliostat.storage.online_store import OnlineKeys
from tests.rings import bundled

KEYS = OnlineKeys("hs", "test")
LIMITS = RingLimits(US_PER_DAY, 60_000_000)
NOW_US = parse_instant_us("2020-06-01T12:00:00")
N_BUCKETS = 4

user = Entity("user", keys={"user_id": "int64"})
shop = Entity("shop", keys={"shop": "string"})
orders = EventSource(
    "orders",
    schema=pa.schema(
        {
            "order_id": pa.string(),
            "user_id": pa.int64(),
            "shop": pa.string(),
            "at": TIMESTAMP,
            "amount": pa.float64(),
        }
    ),
    entity=(user, shop),
    event_time="at",
    event_id="order_id",
)
recent = FeatureView(
    "recent",
    version=3,
    source=orders,
    entity=user,
    features={
        "n": Count(window="30d"),
        "n_hour": Count(window="1h"),
        "amount": Sum("amount", window="30d"),
        "last": Last("amount", window="30d"),
        "since": TimeSinceLast(unit="hour"),
    },
    ttl="10d",
)


@recent.derived
def mean(amount: FloatArray, n: FloatArray) -> FloatArray:
    return amount / n


@recent.derived
def log_mean(mean: FloatArray) -> FloatArray:
    return np.log(mean)


always = FeatureView("always", version=1, source=orders, entity=user, features={"n": Count(), "total": Sum("amount")})
by_shop = FeatureView("by_shop", version=1, source=orders, entity=shop, features={"n": Count(window="7d")})


def order(order_id: str, user_id: int, before_h: float, amount: float | None) -> dict[str, Any]:
    at_us = NOW_US - int(before_h * 3_600_000_000)
    return {"order_id": order_id, "user_id": user_id, "shop": "s", "at": at_us, "amount": amount}


EVENTS = pa.Table.from_pylist(
    [
        order("a", 1, 0.5, 4.0),
        order("b", 1, 48, 8.0),
        order("c", 2, 20 * 24, 3.0),
        order("d", 3, 5, None),
    ],
    schema=orders.schema,
)
USERS = ["1", "2", "3", "404"]


def reader(*features: FeatureRef) -> FeatureReader:
    return FeatureReader(features, keys=KEYS, n_buckets=N_BUCKETS, limits=LIMITS)


def stored(views: Sequence[FeatureView], events: pa.Table = EVENTS) -> Mapping[str, bytes]:
    """A store's content: the bundles with the views' rings."""
    hashes = hash64(events["order_id"]).view(np.int64)
    events = events.append_column(ID_HASH, pa.array(hashes))
    buckets = user.buckets(user.encode(events), N_BUCKETS)
    plan = RingPlan(tuple(views), KEYS, NOW_US, LIMITS)
    own = [events.filter(pa.array(buckets == bucket)) for bucket in range(N_BUCKETS)]
    ids = [group.ring_id for group in plan.groups]
    return {
        key: bundle
        for bucket, each in enumerate(own)
        for write in BucketRings.of(plan, bucket, each, each).writes()
        for key, bundle in zip(write.keys, bundles(ids, write.rings).split(), strict=True)
        if bundle
    }


def read(reader: FeatureReader, users: Sequence[str] = USERS, overrides: Any = None) -> FeatureBatch:
    content = stored([recent, always])
    return reader.decode([content.get(key) for key in reader.keys(users)], as_of_us=NOW_US, overrides=overrides)


def test_columns_come_in_the_order_asked_for_whatever_the_views() -> None:
    batch = read(reader(always["total"], recent["n"], always["n"]))
    assert batch.names == ("always__total", "recent__n", "always__n")
    assert batch.matrix[0].tolist() == [12.0, 2.0, 2.0]
    assert batch.views == ("always@1", "recent@3")


def test_a_vector_is_what_the_offline_kernel_computes() -> None:
    found = read(reader(*recent, *always))
    offline = compute_features([recent, always], EVENTS, user.encoded(USERS), np.full(len(USERS), NOW_US))
    np.testing.assert_allclose(found.matrix, np.column_stack([offline[name] for name in found.names]), rtol=1e-14)


def test_an_entity_is_one_key_however_many_views_of_a_source_are_read() -> None:
    other = EventSource("other", schema=orders.schema, entity=user, event_time="at", event_id="order_id")
    later = FeatureView("later", version=1, source=other, entity=user, features={"n": Count()})
    assert len(reader(always["n"]).keys(["1", "2"])) == 2
    assert len(reader(always["n"], recent["n_hour"], recent["log_mean"]).keys(["1", "2"])) == 2
    assert len(reader(always["n"], later["n"], recent["n"]).keys(["1", "2"])) == 4


def test_keys_name_the_source_the_bucket_and_the_entity() -> None:
    (key,) = reader(always["n"]).keys(["1"])
    bucket = user.buckets(user.encoded(["1"]), N_BUCKETS)[0]
    assert key == f"hs:test:r:orders:user:{{b{bucket}}}:1"


def test_absent_and_null_are_told_apart() -> None:
    batch = read(reader(recent["n"], recent["last"], always["n"]))
    # 1 is there; 2 is older than the ttl of one view; 3 is there, with a null; 404 is nowhere.
    assert batch.absent.tolist() == [[False, False], [True, False], [False, False], [True, True]]
    assert batch.null.tolist() == [
        [False, False, False],
        [False, True, False],
        [False, True, False],
        [False, True, False],
    ]
    assert batch.missing(3) == ["recent__last"]


@pytest.mark.parametrize("view", [recent, always, by_shop])
def test_the_newest_tile_of_an_entity_is_told_and_no_event_is_more_than_it_younger(view: FeatureView) -> None:
    asked = reader(view["n"])
    found = read(asked) if view is not by_shop else asked.decode([None] * 4, as_of_us=NOW_US)
    if view is by_shop:
        assert np.isnan(found.newest_us).all()
        return
    newest_us = {
        user_id: NOW_US - int(before_h * 3_600_000_000) for user_id, before_h in ((1, 0.5), (2, 480), (3, 5))
    }
    tile_us = ring_layout(view, LIMITS).group_of("n").hop_us
    for row, event_us in enumerate(newest_us.values()):
        assert found.newest_us[row] == event_us // tile_us * tile_us or np.isnan(found.newest_us[row])
    assert not np.isnan(found.newest_us[[0, 2]]).any()
    assert np.isnan(found.newest_us[3])


def test_of_several_views_the_one_with_the_newest_tile_counts() -> None:
    both = read(reader(recent["n"], always["n"])).newest_us
    each = [read(reader(view["n"])).newest_us for view in (recent, always)]
    np.testing.assert_array_equal(both, np.fmax(*each))


def test_an_absent_view_reads_as_no_events_at_all() -> None:
    batch = read(reader(*recent))
    nothing = [0.0, 0.0, 0.0, *[np.nan] * 4]
    np.testing.assert_array_equal(batch.matrix[1], nothing)
    np.testing.assert_array_equal(batch.matrix[3], nothing)


def test_an_override_replaces_the_stored_value_before_derived_features() -> None:
    batch = read(
        reader(recent["amount"], recent["mean"], recent["log_mean"]), overrides=[{"amount": 20}, None, None, None]
    )
    np.testing.assert_allclose(batch.matrix[0], [20.0, 10.0, np.log(10.0)])
    plain = read(reader(recent["amount"], recent["mean"], recent["log_mean"]))
    np.testing.assert_array_equal(batch.matrix[1:], plain.matrix[1:])


def test_an_override_of_an_input_that_isnt_asked_for_reaches_what_derives_from_it() -> None:
    batch = read(reader(recent["mean"]), overrides=[{"recent__n": 4.0}] * 4)
    assert batch.matrix[0, 0] == 3.0


def test_a_derived_feature_that_is_given_stays_and_feeds_what_derives_from_it() -> None:
    overrides = [{"amount": 20.0, "mean": 1.0}, {}, {}, {}]
    batch = read(reader(recent["amount"], recent["mean"], recent["log_mean"]), overrides=overrides)
    assert batch.matrix[0].tolist() == [20.0, 1.0, 0.0]


def test_an_override_doesnt_leak_into_a_feature_with_the_same_state() -> None:
    view = FeatureView("twin", version=1, source=orders, entity=user, features={"a": Count(), "b": Count()})
    content = stored([view])
    twin = reader(view["a"], view["b"])
    values = [content.get(key) for key in twin.keys(["1"])]
    assert twin.decode(values, as_of_us=NOW_US, overrides=[{"a": 9}]).matrix.tolist() == [[9.0, 2.0]]


def test_what_all_rows_give_alike_means_the_same_as_row_by_row() -> None:
    asked = reader(recent["amount"], recent["mean"], recent["log_mean"], always["total"])
    alike = [{"amount": 20.0 + row, "recent__n": math.nan if row == 2 else 4.0} for row in range(len(USERS))]
    one_by_one = [dict(sorted(each.items(), reverse=row % 2 == 0)) for row, each in enumerate(alike)]
    for overrides in (one_by_one, [{name: np.float64(value) for name, value in each.items()} for each in alike]):
        np.testing.assert_array_equal(read(asked, overrides=alike).matrix, read(asked, overrides=overrides).matrix)


class Content:
    """A store's content that notes which keys are asked for."""

    def __init__(self) -> None:
        self.values = {**stored([recent, always]), "route": b"document"}
        self.asked: list[str] = []

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        self.asked += keys
        return [self.values.get(key) for key in keys]


def test_no_ring_is_read_where_the_request_gives_all_that_is_asked_for() -> None:
    asked = reader(always["total"], recent["n"], recent["log_mean"])
    given = [{"n": 1.0 + row, "log_mean": math.nan, "total": 0.5, "mean": 7.0} for row in range(len(USERS))]
    given = [{f"recent__{name}" if name == "n" else name: value for name, value in each.items()} for each in given]
    store = Content()
    batch, also = asked.read(cast("Any", store), USERS, as_of_us=NOW_US, overrides=given, also=["route"])
    assert (store.asked, also) == (["route"], [b"document"])
    np.testing.assert_array_equal(batch.matrix, read(asked, overrides=given).matrix)
    assert batch.names == asked.names
    assert not batch.absent.any()
    assert np.isnan(batch.newest_us).all()


def test_one_reader_takes_what_is_given_by_any_naming_in_any_order() -> None:
    columns = (always["total"], recent["log_mean"], recent["amount"], recent["mean"], always["n"])
    asked = reader(*columns)
    values = {each.name: float(at) for at, each in enumerate(columns)} | {"recent__n": 5.0}
    bare = {"always__total": "total", "recent__log_mean": "log_mean"}
    qualified, shorter = list(values), [bare.get(name, name) for name in values]
    values |= {short: values[whole] for whole, short in bare.items()}
    namings = [*itertools.islice(itertools.permutations(qualified), 300)]
    namings += itertools.islice(itertools.permutations(shorter), 10)
    for naming in [*namings, *namings[:10]]:
        given = {name: values[name] for name in naming}
        batch, _ = asked.read(cast("Any", store := Content()), USERS, as_of_us=NOW_US, overrides=[given] * len(USERS))
        assert (store.asked, batch.matrix[0].tolist()) == ([], [0.0, 1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("lacking", ["log_mean", "total"])
def test_rings_are_read_for_what_a_request_doesnt_give(lacking: str) -> None:
    asked = reader(always["total"], recent["log_mean"])
    given = [{"log_mean": 1.0, "total": 0.5} for _ in USERS]
    given[1].pop(lacking)
    batch, _ = asked.read(cast("Any", store := Content()), USERS, as_of_us=NOW_US, overrides=given)
    assert store.asked == asked.keys(USERS)
    np.testing.assert_array_equal(batch.matrix, read(asked, overrides=given).matrix)


def test_null_and_truth_values_are_overrides_too() -> None:
    batch = read(reader(recent["n"], recent["amount"]), overrides=[{"n": None, "amount": True}, None, None, None])
    assert np.isnan(batch.matrix[0, 0])
    assert batch.matrix[0, 1] == 1.0
    assert batch.missing(0) == ["recent__n"]


def test_a_bare_name_that_two_views_have_isnt_taken() -> None:
    both = reader(recent["n"], always["n"])
    with pytest.raises(UnknownFeatureError, match="recent__n"):
        read(both, overrides=[{"n": 1}, None, None, None])
    assert read(both, overrides=[{"always__n": 7}, None, None, None]).matrix[0].tolist() == [2.0, 7.0]


def test_versions_of_a_view_are_read_side_by_side_from_rings_of_their_own() -> None:
    longer = FeatureView("always", version=2, source=orders, entity=user, features={"n": Count(window="1h")})
    both = reader(always["n"], longer.pinned["n"])
    assert both.names == ("always__n", "always@2__n")
    assert both.views == ("always@1", "always@2")
    content = stored([always, longer])
    batch = both.decode([content.get(key) for key in both.keys(USERS)], as_of_us=NOW_US)
    alone = [read(reader(always["n"])).matrix[:, 0].tolist(), batch.matrix[:, 0].tolist()]
    assert alone[0] == alone[1]
    assert batch.matrix[:, 0].tolist() != batch.matrix[:, 1].tolist()


def test_an_override_reaches_every_version_of_the_view_that_is_read() -> None:
    longer = FeatureView("always", version=2, source=orders, entity=user, features={"n": Count(window="1h")})
    both = reader(always["n"], longer.pinned["n"])
    content = stored([always, longer])
    for name in ("n", "always__n"):
        batch = both.decode(
            [content.get(key) for key in both.keys(USERS)],
            as_of_us=NOW_US,
            overrides=[{name: 42.0}, None, None, None],
        )
        assert batch.matrix[0].tolist() == [42.0, 42.0]
        assert 42.0 not in batch.matrix[1:]


@pytest.mark.parametrize("value", ["3", float("inf"), [1], {}])
def test_an_override_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(InvalidValueError, match="feature 'n'"):
        read(reader(recent["n"]), overrides=[{"n": value}, None, None, None])


def test_an_override_that_isnt_read_says_what_is() -> None:
    with pytest.raises(UnknownFeatureError, match=r"'colour'.*recent__n"):
        read(reader(recent["n"]), overrides=[{"colour": 1}, None, None, None])


def test_a_vector_may_hold_features_of_two_entities_if_each_row_has_a_key_of_both() -> None:
    both = reader(recent["n"], by_shop["n"])
    keys = both.keys({"user": ["1", "2"], "shop": ["s", "t"]})
    assert [key.rsplit(":", 1)[1] for key in keys if ":orders:shop:" in key] == ["s", "t"]
    assert [key.rsplit(":", 1)[1] for key in keys if ":orders:user:" in key] == ["1", "2"]
    assert both.decode([None] * len(keys), as_of_us=NOW_US).matrix.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("texts", [["1"], {"user": ["1"]}, {"user": ["1"], "shop": ["s", "t"]}])
def test_keys_that_lack_one_of_two_entities_are_refused(texts: Any) -> None:
    with pytest.raises(InvalidValueError, match="as many keys of each of user, shop"):
        reader(recent["n"], by_shop["n"]).keys(texts)


def test_a_reader_without_features_is_refused() -> None:
    with pytest.raises(InvalidDefinitionError, match="no features"):
        reader()


@pytest.mark.parametrize(
    "value",
    [
        b"123",
        bytes(8),
        struct.pack("<d", 1.0),
        struct.pack("<d", float("nan")) + bytes(64),
        struct.pack("<d16sd", 1.0, b"", 8.0),
        struct.pack("<d16sd", 1.0, b"", -8.0),
        struct.pack("<d16sd", 1.0, b"", float("inf")) + bytes(8),
        struct.pack("<d16sd", 2.0, b"", 8.0) + bytes(8),
        struct.pack("<d16sd", 1e300, b"", 8.0) + bytes(8),
        struct.pack("<d16sd", 1.0, b"", 8.0) + bytes(16),
    ],
)
def test_bytes_that_are_no_bundle_are_never_read_as_one(value: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RingCorruptError, match=rf"always@1.*{len(value)}.*not all of them bundles"):
        reader(always["n"]).decode([value], as_of_us=NOW_US)
    with pytest.raises(ValueError, match="no bundle"):
        rings_in(value)
    monkeypatch.setattr(compiled, "AVAILABLE", False)
    with pytest.raises(RingCorruptError, match="not all of them bundles"):
        reader(always["n"]).decode([value], as_of_us=NOW_US)


def test_bytes_that_are_no_ring_are_never_read_as_one() -> None:
    life = reader(always["n"])
    (group,) = ring_layout(always, LIMITS).groups
    with pytest.raises(RingCorruptError, match=f"always@1.*no multiple of the {group.slot_bytes} of a slot"):
        life.decode([bundled({group.ring_id: bytes(8)})], as_of_us=NOW_US)


def test_no_entities_give_an_empty_matrix() -> None:
    batch = read(reader(*recent), users=[])
    assert batch.matrix.shape == (0, len(recent.feature_names))
    assert batch.absent.shape == (0, 1)
