from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import TrainingDataError
from heliostat.features.aggregations import Count
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.models.definitions import Label, ModelSpec, Population
from heliostat.training.dataset import (
    AS_OF,
    LABEL,
    Split,
    TrainingSet,
    model_sources,
    spine_rows,
    split_instants,
)

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


def _found(spec: ModelSpec, events: pa.Table, *days: float) -> dict[tuple[int, float], float]:
    table = spine_rows(spec, {"orders": events}, [int(day * DAY) for day in days])
    return {(row["user_id"], (row[AS_OF] - EPOCH) / timedelta(days=1)): row[LABEL] for row in table.to_pylist()}


# ── Labels ──────────────────────────────────────────────────────────────────────────


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
    rows = spine_rows(spec, tables, [20 * DAY]).to_pylist()
    assert [(row["user_id"], row[LABEL]) for row in rows] == [(1, 1.0), (2, 0.0)]


def test_keys_of_several_columns_come_back_as_columns() -> None:
    spec = _spec(Label.any_within("again", ORDERS, "10d"), ACCOUNT)
    table = spine_rows(spec, {"orders": _events((1, 0.0, 1.0), (2, 0.0, 1.0), (2, 21.0, 1.0))}, [20 * DAY])
    assert table.column_names == ["region", "number", AS_OF, LABEL]
    assert {(row["region"], row["number"]): row[LABEL] for row in table.to_pylist()} == {
        ("eu", 1): 0.0,
        ("us", 2): 1.0,
    }


def test_bucket_without_events_has_no_rows_but_a_schema() -> None:
    spec = _spec(Label.any_within("again", ORDERS, "10d"))
    table = spine_rows(spec, {"orders": SCHEMA.empty_table()}, [20 * DAY])
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
def test_spine_equals_a_walk_over_all_events(
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


# ── Instants ────────────────────────────────────────────────────────────────────────


def _us(*texts: str) -> tuple[int, ...]:
    return tuple(parse_instant_us(text) for text in texts)


def _split(instants: tuple[str, ...] = (), validation: tuple[str, ...] = (), now: str = "1998-07-01") -> Split:
    return split_instants(
        _us(*instants),
        _us(*validation),
        horizon_us=90 * DAY,
        now_us=_us(now)[0],
        first_event_us=_us("1997-01-01")[0],
        model="churn",
    )


def test_given_instants_are_kept_when_a_horizon_lies_between() -> None:
    split = _split(("1997-10-01", "1997-07-01"), ("1998-04-01", "1998-01-01"))
    assert split.train_us == _us("1997-07-01", "1997-10-01")
    assert split.validation_us == _us("1998-01-01", "1998-04-01")


def test_training_label_may_end_on_the_very_instant_that_validation_starts() -> None:
    assert _split(("1997-10-03",), ("1998-01-01",)).train_us == _us("1997-10-03")
    with pytest.raises(TrainingDataError, match="train at or before 1997-10-03T00:00:00Z"):
        _split(("1997-10-03T00:00:00.000001",), ("1998-01-01",))


def test_overlap_names_the_instants_to_blame_and_the_latest_possible() -> None:
    with pytest.raises(TrainingDataError) as caught:
        _split(("1997-07-01", "1997-11-01", "1997-12-01"), ("1998-01-01",))
    text = str(caught.value)
    assert "1997-11-01T00:00:00Z, 1997-12-01T00:00:00Z" in text
    assert "1997-07-01" not in text
    assert "at or before 1997-10-03" in text


def test_label_that_is_not_known_yet_is_refused_with_the_latest_instant() -> None:
    with pytest.raises(TrainingDataError, match="at or before 1998-04-02T00:00:00Z"):
        _split(("1997-07-01",), ("1998-05-01",))


def test_without_validation_the_last_instant_validates_and_the_gap_is_left_out() -> None:
    split = _split(("1997-07-01", "1997-10-01", "1998-01-01", "1998-03-01", "1998-04-01"))
    assert split.validation_us == _us("1998-04-01")
    assert split.train_us == _us("1997-07-01", "1997-10-01", "1998-01-01")
    assert split.gap_us == _us("1998-03-01")


def test_without_instants_the_latest_known_label_validates_and_a_grid_trains() -> None:
    split = _split()
    assert split.validation_us == _us("1998-04-02")
    assert split.train_us[-1] == _us("1998-01-02")[0]
    assert set(np.diff(split.train_us)) == {30 * DAY}
    assert split.train_us[0] > _us("1997-01-01")[0]


def test_validation_alone_gets_a_grid_before_it() -> None:
    assert _split((), ("1998-01-01",)).train_us[-1] == _us("1997-10-03")[0]


@pytest.mark.parametrize(
    ("instants", "now"),
    [(("1997-07-01",), "1998-07-01"), ((), "1997-06-01"), (("1997-03-01", "1997-04-01"), "1998-01-01")],
)
def test_too_little_time_is_refused_with_what_is_needed(instants: tuple[str, ...], now: str) -> None:
    with pytest.raises(TrainingDataError, match="no training instant is left"):
        _split(instants, now=now)


@given(
    train=st.lists(st.integers(0, 400), max_size=6),
    validation=st.lists(st.integers(0, 400), max_size=3),
    horizon=st.integers(1, 120),
)
@settings(max_examples=300, deadline=None)
def test_no_accepted_split_overlaps_or_looks_into_the_future(
    train: list[int], validation: list[int], horizon: int
) -> None:
    try:
        split = split_instants(
            [day * DAY for day in train],
            [day * DAY for day in validation],
            horizon_us=horizon * DAY,
            now_us=400 * DAY,
            first_event_us=0,
        )
    except TrainingDataError:
        return
    assert max(split.train_us) + horizon * DAY <= min(split.validation_us)
    assert max(split.validation_us) + horizon * DAY <= 400 * DAY
    assert not set(split.gap_us) & set(split.all_us)


# ── Fingerprint ─────────────────────────────────────────────────────────────────────


def _training_set(**changes: Any) -> TrainingSet:
    spec = _spec(Label.any_within("again", ORDERS, "10d"))
    spine = spine_rows(spec, {"orders": _events((1, 0.0, 1.0), (2, 1.0, 1.0), (2, 21.0, 1.0))}, [20 * DAY, 40 * DAY])
    table = spine.append_column("activity__n", pa.array([1.0, float("nan"), 0.0, 2.0]))
    kept = {"spec": spec, "table": table, "split": Split((20 * DAY,), (40 * DAY,)), "log_versions": {"orders": 3}}
    return TrainingSet(**{**kept, **changes})


def test_fingerprint_is_the_same_for_equal_rows_however_they_are_laid_out() -> None:
    one = _training_set()
    other = dataclasses.replace(one, table=pa.concat_tables([one.table.slice(0, 1), one.table.slice(1)]))
    other_nan = np.array([0x7FF8000000000001], dtype=np.uint64).view(np.float64)
    values = one.table.column("activity__n").to_numpy().copy()
    values[np.isnan(values)] = other_nan[0]
    values[values == 0] = -0.0
    relaid = dataclasses.replace(one, table=one.table.set_column(3, "activity__n", pa.array(values)))
    assert one.fingerprint == other.fingerprint == relaid.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"log_versions": {"orders": 4}},
        {"split": Split((20 * DAY,), (41 * DAY,))},
        {"spec": _spec(Label.any_within("again", ORDERS, "11d"))},
    ],
)
def test_fingerprint_changes_with_whatever_the_rows_follow_from(changes: dict[str, Any]) -> None:
    assert _training_set(**changes).fingerprint != _training_set().fingerprint


def test_fingerprint_changes_with_one_bit_of_one_value() -> None:
    one = _training_set()
    values = one.table.column("activity__n").to_numpy().copy()
    values[3] = np.nextafter(values[3], 3.0)
    other = dataclasses.replace(one, table=one.table.set_column(3, "activity__n", pa.array(values)))
    assert one.fingerprint != other.fingerprint


def test_training_and_validation_rows_are_those_of_their_instants() -> None:
    found = _training_set()
    assert found.training.labels.tolist() == [0.0, 1.0]
    assert found.validation.labels.tolist() == [0.0, 0.0]
    assert found.training.matrix.shape == (2, 1)
    assert np.array_equal(found.training.entities, found.validation.entities)
