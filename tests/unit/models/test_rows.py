from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.clock import US_PER_DAY
from heliostat.errors import StaleVersionError
from heliostat.features.aggregations import Count, Sum, TimeSinceLast
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.models.definitions import Label, ModelSpec, Population
from heliostat.models.labels import label_values
from heliostat.models.packaging import Signature
from heliostat.models.registry import ModelVersion
from heliostat.models.rows import AS_OF, LABEL, ModelRows, model_sources, population_rows, version_features
from heliostat.schema import times_us
from heliostat.storage.event_log import EventLog
from tests.oracles import Oracle

DAY = US_PER_DAY
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

USER = Entity("user", keys={"user_id": "int64"})
ACCOUNT = Entity("account", keys={"region": "string", "number": "int64"})
SCHEMA = pa.schema(
    {
        "id": pa.int64(),
        "user_id": pa.int64(),
        "region": pa.string(),
        "number": pa.int64(),
        "at": pa.timestamp("us", tz="UTC"),
        "amount": pa.float64(),
    }
)
ORDERS = EventSource("orders", schema=SCHEMA, entity=[USER, ACCOUNT], event_time="at", event_id="id")
VISITS = EventSource("visits", schema=SCHEMA, entity=[USER, ACCOUNT], event_time="at", event_id="id")


def _spec(label: Label, entity: Entity = USER, source: EventSource = ORDERS, **changes: Any) -> ModelSpec:
    view = FeatureView("activity", version=1, source=source, entity=entity, features={"n": Count(window="30d")})
    objective = "regression" if label.kind == "sum" else "binary"
    return ModelSpec("m", entity, [view], label, objective=objective, **changes)


def _events(*rows: tuple[int, float, float | None]) -> pa.Table:
    """Rows of (user, day, amount)."""
    return pa.table(
        {
            "id": list(range(len(rows))),
            "user_id": [user for user, _, _ in rows],
            "region": ["eu" if user % 2 else "us" for user, _, _ in rows],
            "number": [user for user, _, _ in rows],
            "at": [EPOCH + timedelta(days=day) for _, day, _ in rows],
            "amount": [amount for _, _, amount in rows],
        },
        schema=SCHEMA,
    )


def _labelled(spec: ModelSpec, tables: dict[str, pa.Table], *days: float) -> pa.Table:
    rows = population_rows(spec, tables, [int(day * DAY) for day in days])
    keys, label = spec.entity.encode(rows), spec.label
    values = label_values(label, spec.entity, tables[label.source.name], keys, times_us(rows.column(AS_OF)))
    return rows.append_column(LABEL, pa.array(values))


def _found(spec: ModelSpec, events: pa.Table, *days: float) -> dict[tuple[int, float], float]:
    table = _labelled(spec, {"orders": events}, *days)
    return {(row["user_id"], (row[AS_OF] - EPOCH) / timedelta(days=1)): row[LABEL] for row in table.to_pylist()}


def test_event_at_the_instant_is_in_the_label_and_event_at_the_horizons_end_is_not() -> None:
    spec = _spec(Label.any_within("again", ORDERS, "10d"))
    history = [(user, 0.0, 1.0) for user in (1, 2, 3)]
    events = _events(*history, (1, 20.0, 1.0), (2, 30.0, 1.0), (3, 29.999, 1.0))
    assert _found(spec, events, 20) == {(1, 20): 1.0, (2, 20): 0.0, (3, 20): 1.0}


def test_event_at_the_instant_makes_nobody_a_member() -> None:
    spec = _spec(Label.any_within("again", ORDERS, "10d"))
    assert _found(spec, _events((1, 20.0, 1.0), (2, 19.0, 1.0)), 20) == {(2, 20): 0.0}


def test_entity_without_events_in_the_horizon_has_left() -> None:
    spec = _spec(Label.none_within("left", ORDERS, "10d"))
    assert _found(spec, _events((1, 0.0, 1.0), (2, 0.0, 1.0), (2, 25.0, 1.0)), 20) == {(1, 20): 1.0, (2, 20): 0.0}


def test_sum_skips_null_nan_and_infinite_and_is_zero_of_nothing() -> None:
    spec = _spec(Label.sum_within("spend", ORDERS, "amount", "10d"))
    events = _events(
        (1, 0.0, 9.0), (2, 0.0, 9.0),
        (1, 21.0, 2.5), (1, 22.0, None), (1, 23.0, float("nan")), (1, 24.0, float("inf")), (1, 25.0, 4.0),
    )  # fmt: skip
    assert _found(spec, events, 20) == {(1, 20): 6.5, (2, 20): 0.0}


def test_only_events_that_meet_the_labels_condition_count() -> None:
    spec = _spec(Label.none_within("left", ORDERS, "10d", where=pc.field("amount") >= 5))
    events = _events((1, 0.0, 1.0), (2, 0.0, 1.0), (1, 21.0, 4.0), (2, 21.0, 5.0))
    assert _found(spec, events, 20) == {(1, 20): 1.0, (2, 20): 0.0}


def test_active_population_looks_back_just_so_far_lower_edge_inclusive() -> None:
    spec = _spec(Label.any_within("again", ORDERS, "10d"), population=Population(active_within="5d"))
    assert set(_found(spec, _events((1, 15.0, 1.0), (2, 14.999, 1.0)), 20)) == {(1, 20)}


def test_member_known_from_another_source_is_labelled_by_the_labels_own() -> None:
    spec = _spec(Label.any_within("bought", ORDERS, "10d"), source=VISITS)
    assert [source.name for source in model_sources(spec)] == ["visits", "orders"]
    tables = {"visits": _events((1, 1.0, None), (2, 2.0, None), (2, 21.0, None)), "orders": _events((1, 21.0, 3.0))}
    rows = _labelled(spec, tables, 20).to_pylist()
    assert [(row["user_id"], row[LABEL]) for row in rows] == [(1, 1.0), (2, 0.0)]


def test_keys_of_several_columns_come_back_as_columns() -> None:
    spec = _spec(Label.any_within("again", ORDERS, "10d"), ACCOUNT)
    table = _labelled(spec, {"orders": _events((1, 0.0, 1.0), (2, 0.0, 1.0), (2, 21.0, 1.0))}, 20)
    assert table.column_names == ["region", "number", AS_OF, LABEL]
    assert {(row["region"], row["number"]): row[LABEL] for row in table.to_pylist()} == {
        ("eu", 1): 0.0,
        ("us", 2): 1.0,
    }


def test_bucket_without_events_has_no_rows_but_a_schema() -> None:
    spec = _spec(Label.any_within("again", ORDERS, "10d"))
    table = _labelled(spec, {"orders": SCHEMA.empty_table()}, 20)
    assert (table.num_rows, table.column_names) == (0, ["user_id", AS_OF, LABEL])


_rows = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.integers(0, 40).map(lambda half: half / 2),
        st.one_of(st.none(), st.floats(-100, 100), st.just(float("nan"))),
    ),
    max_size=30,
)


@given(
    rows=_rows,
    days=st.lists(st.integers(0, 22), min_size=1, max_size=4, unique=True),
    kind=st.sampled_from(["none", "any", "sum"]),
    horizon=st.integers(1, 12),
    active=st.one_of(st.none(), st.integers(1, 12)),
)
@settings(max_examples=300, deadline=None)
def test_rows_equal_a_walk_over_all_events(
    rows: list[tuple[int, float, float | None]], days: list[int], kind: Any, horizon: int, active: int | None
) -> None:
    where = pc.field("user_id") != 3
    label = Label(
        "y", ORDERS, kind=kind, within=f"{horizon}d", column="amount" if kind == "sum" else None, where=where
    )
    spec = _spec(label, population=Population(None if active is None else f"{active}d"))
    expected: dict[tuple[int, float], float] = {}
    for day in days:
        for user in {user for user, at, _ in rows if at < day and (active is None or at >= day - active)}:
            future = [amount for each, at, amount in rows if each == user != 3 and day <= at < day + horizon]
            total = sum(amount for amount in future if amount is not None and np.isfinite(amount))
            expected[user, day] = {"none": float(not future), "any": float(bool(future)), "sum": total}[kind]
    found = _found(spec, _events(*rows), *days)
    assert found.keys() == expected.keys()
    assert list(found) == sorted(found, key=lambda row: (row[1], row[0]))
    for row, value in expected.items():
        assert found[row] == pytest.approx(value, abs=1e-9)


# ── Off the event log ───────────────────────────────────────────────────────────────


def _log(folder: Path, **tables: pa.Table) -> EventLog:
    log = EventLog(str(folder), n_buckets=4)
    for source in (ORDERS, VISITS):
        if source.name in tables:
            log.append(source, tables[source.name], ingested_us=50 * DAY)
    return log


def _random_events(seed: int, n: int = 300) -> pa.Table:
    rng = np.random.default_rng(seed)
    days = np.round(rng.uniform(0, 60, n), 3)
    return _events(*zip(rng.integers(0, 20, n).tolist(), days.tolist(), rng.normal(size=n).tolist(), strict=True))


@pytest.mark.parametrize("active", [None, "20d"])
def test_every_bucket_together_gives_each_member_once_with_the_oracles_features(
    tmp_path: Path, active: str | None
) -> None:
    recent = FeatureView(
        "recent",
        version=1,
        source=ORDERS,
        entity=USER,
        features={"n": Count(window="12d"), "spent": Sum("amount", window="12d", where=pc.field("amount") > 0)},
    )
    seen = FeatureView("seen", version=1, source=VISITS, entity=USER, features={"since": TimeSinceLast(window="15d")})
    spec = ModelSpec(
        "m",
        USER,
        [seen["since"], recent],
        Label.sum_within("spend", ORDERS, "amount", "10d"),
        objective="regression",
        population=Population(active),
    )
    tables = {"orders": _random_events(1), "visits": _random_events(2)}
    rows = ModelRows.of(spec, _log(tmp_path, **tables), [40 * DAY, 30 * DAY])
    found = pa.concat_tables([rows.table(bucket) for bucket in range(4)])

    assert found.column_names == ["user_id", AS_OF, LABEL, *spec.feature_names]
    expected = _labelled(spec, tables, 30, 40)
    order = [(AS_OF, "ascending"), ("user_id", "ascending")]
    assert found.select(["user_id", AS_OF]).sort_by(order).equals(expected.select(["user_id", AS_OF]))
    assert found.sort_by(order).column(LABEL).to_numpy() == pytest.approx(expected.column(LABEL).to_numpy())
    oracles = {view.name: Oracle(view, tables[view.source.name]) for view in (recent, seen)}
    for row in found.to_pylist():
        at_us = (row[AS_OF] - EPOCH) // timedelta(microseconds=1)
        for name in spec.feature_names:
            view, _, feature = name.partition("__")
            answer = oracles[view].answer((row["user_id"],), at_us)[feature]
            assert answer.accepts(row[name]), (name, row)


def test_extra_features_follow_the_models_own_and_rows_without_labels_have_none(tmp_path: Path) -> None:
    spec = _spec(Label.any_within("again", ORDERS, "10d"))
    older = FeatureView("older", version=1, source=VISITS, entity=USER, features={"n": Count(window="30d")})
    log = _log(tmp_path, orders=_random_events(1), visits=_random_events(2))
    rows = ModelRows.of(spec, log, [30 * DAY], labelled=False, extra=[spec.views[0]["n"], older["n"]])
    assert rows.feature_names == ("activity__n", "older__n")
    found = pa.concat_tables([rows.table(bucket) for bucket in range(4)])
    assert found.column_names == ["user_id", AS_OF, "activity__n", "older__n"]
    assert found.column("older__n").null_count == 0


def _trained(names: tuple[str, ...], *views: FeatureView) -> ModelVersion:
    hashes = {view.ref: view.content_hash for view in views}
    return ModelVersion("m", 3, "", Signature(names), {}, {"view_hashes": hashes}, {}, None, 0)


def test_a_version_reads_the_views_that_it_was_trained_on_pinned_beside_others(tmp_path: Path) -> None:
    spec = _spec(Label.any_within("again", ORDERS, "10d"))
    new = spec.views[0]
    old = FeatureView(
        "activity", version=new.version + 1, source=ORDERS, entity=USER, features={"n": Count(window="7d")}
    )
    declared = {view.ref: view for view in (old, new)}
    version = _trained(("activity__n",), old)
    assert version.pinned_names == (f"{old.ref}__n",)
    (alone,) = version_features(version, declared)
    (beside,) = version_features(version, declared, spec)
    assert (alone.name, beside.name) == ("activity__n", f"{old.ref}__n")
    assert (alone.view, beside.view) == (old, old.pinned)
    (same,) = version_features(_trained(("activity__n",), new), declared, spec)
    assert (same.name, same.view) == ("activity__n", new)

    log = _log(tmp_path, orders=_random_events(1))
    rows = ModelRows.of(spec, log, [30 * DAY], labelled=False, extra=[beside])
    found = pa.concat_tables([rows.table(bucket) for bucket in range(4)])
    both = [found.column(name).to_numpy() for name in ("activity__n", beside.name)]
    assert (both[0] >= both[1]).all()
    assert (both[0] > both[1]).any(), "30 days beside 7"


def test_a_version_is_stale_if_its_view_is_gone_or_means_something_else() -> None:
    old = FeatureView("activity", version=1, source=ORDERS, entity=USER, features={"n": Count()})
    new = FeatureView("activity", version=2, source=ORDERS, entity=USER, features={"n": Count()})
    changed = FeatureView("activity", version=1, source=ORDERS, entity=USER, features={"n": Count(window="7d")})
    lacking = FeatureView("activity", version=1, source=ORDERS, entity=USER, features={"m": Count()})
    version = _trained(("activity__n",), old)
    for declared in ({}, {new.ref: new}, {changed.ref: changed}, {lacking.ref: lacking}):
        with pytest.raises(StaleVersionError, match="activity@1"):
            version_features(version, declared)
    assert version_features(version, {old.ref: old, new.ref: new})[0].view is old


def test_events_appended_after_the_rows_were_asked_for_are_in_no_bucket(tmp_path: Path) -> None:
    log = _log(tmp_path, orders=_events((1, 0.0, 1.0)))
    rows = ModelRows.of(_spec(Label.any_within("again", ORDERS, "10d")), log, [30 * DAY])
    more = _events((5, 0.0, 1.0), (6, 0.0, 1.0)).slice(1)
    log.append(ORDERS, more, ingested_us=60 * DAY)
    found = pa.concat_tables([rows.table(bucket) for bucket in range(4)])
    assert found.column("user_id").to_pylist() == [1]


def test_log_without_any_table_has_no_rows(tmp_path: Path) -> None:
    rows = ModelRows.of(_spec(Label.any_within("again", ORDERS, "10d")), _log(tmp_path), [30 * DAY])
    assert rows.log_versions == {"orders": -1}
    assert rows.table(0).num_rows == 0
