from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import TrainingDataError
from heliostat.features.aggregations import Count
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.models.definitions import Label, ModelSpec
from heliostat.models.rows import AS_OF, LABEL, ModelRows
from heliostat.schema import TIMESTAMP
from heliostat.storage.event_log import EventLog
from heliostat.training.dataset import Split, TrainingSet, build_training_set, first_event_us, split_instants

DAY = US_PER_DAY
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

USER = Entity("user", keys={"user_id": "int64"})
SCHEMA = pa.schema(
    {
        "id": pa.int64(),
        "user_id": pa.int64(),
        "at": pa.timestamp("us", tz="UTC"),
        "amount": pa.float64(),
    }
)
ORDERS = EventSource("orders", schema=SCHEMA, entity=USER, event_time="at", event_id="id")


def _spec(label: Label) -> ModelSpec:
    view = FeatureView("activity", version=1, source=ORDERS, features={"n": Count(window="30d")})
    return ModelSpec("m", USER, [view], label)


def _events(*rows: tuple[int, float, float | None]) -> pa.Table:
    """Rows of (user, day, amount)."""
    return pa.table(
        {
            "id": list(range(len(rows))),
            "user_id": [user for user, _, _ in rows],
            "at": [EPOCH + timedelta(days=day) for _, day, _ in rows],
            "amount": [amount for _, _, amount in rows],
        },
        schema=SCHEMA,
    )


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
    table = pa.table(
        {
            "user_id": [1, 2, 1, 2],
            AS_OF: pa.array([20 * DAY, 20 * DAY, 40 * DAY, 40 * DAY]).cast(TIMESTAMP),
            LABEL: [0.0, 1.0, 0.0, 0.0],
            "activity__n": [1.0, float("nan"), 0.0, 2.0],
        }
    )
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


# ── The whole set ───────────────────────────────────────────────────────────────────


def _without_ray(rows: ModelRows) -> pa.Table:
    return pa.concat_tables([rows.table(bucket) for bucket in reversed(rows.event_log.buckets)])


def _log(folder: Path, *rows: tuple[int, float, float | None]) -> EventLog:
    log = EventLog(str(folder), n_buckets=4)
    log.append(ORDERS, _events(*rows), ingested_us=50 * DAY)
    return log


def test_set_is_in_order_of_instant_and_key_whatever_order_buckets_come_in(tmp_path: Path) -> None:
    log = _log(tmp_path, *((user, float(user % 7), 1.0) for user in range(30)))
    spec = _spec(Label.none_within("left", ORDERS, "10d"))
    split = Split((10 * DAY,), (30 * DAY,))
    found = build_training_set(spec, log, split, rows_of=_without_ray)
    again = build_training_set(spec, log, split, rows_of=lambda rows: _without_ray(rows).sort_by("user_id"))
    assert found.table.column("user_id").to_pylist() == [*range(30), *range(30)]
    assert found.log_versions == {"orders": log.version(ORDERS, USER)}
    assert found.fingerprint == again.fingerprint
    assert found.matrix(["activity__n"]).shape == (60, 1)


def test_set_without_members_says_when_it_looked_and_for_what(tmp_path: Path) -> None:
    log = _log(tmp_path, (1, 20.0, 1.0))
    spec, split = _spec(Label.none_within("left", ORDERS, "10d")), Split((10 * DAY,), (30 * DAY,))
    assert first_event_us(spec, log) == 20 * DAY
    with pytest.raises(TrainingDataError, match=r"nobody has an event before 1970-01-11.*orders"):
        build_training_set(spec, log, split, rows_of=_without_ray)


def test_log_without_events_is_refused_with_what_to_ingest(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="no events of orders yet; ingest some"):
        first_event_us(_spec(Label.none_within("left", ORDERS, "10d")), EventLog(str(tmp_path), n_buckets=4))
