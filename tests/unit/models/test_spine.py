"""Rows that somebody chose: what a spine must be, and that its rows are what the kernel computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import (
    InvalidValueError,
    KeyColumnError,
    MissingFileError,
    MissingInputError,
    SpineError,
    TrainingDataError,
)
from heliostat.features.aggregations import Count, Mean
from heliostat.features.definitions import Entity, EventSource, FeatureView, FloatArray
from heliostat.features.offline import compute_features
from heliostat.models.definitions import Label, ModelSpec
from heliostat.models.rows import LABEL, ModelRows
from heliostat.models.spine import AS_OF, ModelSpine, read_spine
from heliostat.schema import TIMESTAMP
from heliostat.storage.event_log import EventLog
from heliostat.training.dataset import build_training_set, split_spine
from heliostat.training.fitting import make_fold

N_BUCKETS = 3
START_US = parse_instant_us("2024-01-01")
NOW_US = START_US + 200 * US_PER_DAY

card = Entity("card", keys={"card": "int64"})
payments = EventSource(
    "payments",
    schema=pa.schema({"id": pa.int64(), "card": pa.int64(), "at": TIMESTAMP, "amount": pa.float64()}),
    entity=card,
    event_time="at",
    event_id="id",
)
spending = FeatureView(
    "spending",
    version=1,
    source=payments,
    features={"n": Count(window="30d"), "mean_amount": Mean("amount", window="30d")},
    request={"amount": "float64"},
)


@spending.derived
def amount_ratio(amount: FloatArray, mean_amount: FloatArray) -> FloatArray:
    return amount / mean_amount


MODEL = ModelSpec("fraud", card, [spending], Label.any_within("again", payments, "5d"))


def events() -> pa.Table:
    rng = np.random.default_rng(5)
    n = 400
    times = START_US + rng.integers(0, 150 * US_PER_DAY, n)
    columns = [np.arange(n), rng.integers(0, 20, n), pa.array(times).cast(TIMESTAMP), rng.gamma(2.0, 10.0, n)]
    return pa.table(columns, schema=payments.schema)


def spine(n: int = 300) -> pa.Table:
    rng = np.random.default_rng(6)
    times = START_US + rng.integers(31 * US_PER_DAY, 150 * US_PER_DAY, n)
    amounts = pa.array(rng.gamma(2.0, 20.0, n), mask=np.arange(n) % 50 == 0)
    return pa.table({"card": rng.integers(0, 25, n), "as_of": pa.array(times).cast(TIMESTAMP), "amount": amounts})


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    log = EventLog(str(tmp_path), {}, N_BUCKETS)
    with log.bulk(payments, ingested_us=NOW_US) as bulk:
        bulk.add(events())
        bulk.commit()
    return log


def all_rows(rows: ModelRows) -> pa.Table:
    return pa.concat_tables([rows.table(bucket) for bucket in range(N_BUCKETS)])


def test_a_spines_rows_are_what_the_kernel_computes_from_its_instants_and_inputs(log: EventLog) -> None:
    given = spine()
    found = all_rows(ModelRows.of(MODEL, log, (), spine=ModelSpine.of(given, MODEL, N_BUCKETS)))
    request = {"amount": given["amount"].to_numpy()}
    as_of_us = given["as_of"].cast(pa.int64()).to_numpy()
    expected = compute_features([spending], events(), card.encode(given), as_of_us, request=request)
    table = pa.table({"card": given["card"], AS_OF: given["as_of"], **{k: pa.array(v) for k, v in expected.items()}})
    order = [(name, "ascending") for name in ("card", AS_OF)]
    for name in expected:
        left, right = found.sort_by(order)[name].to_numpy(), table.sort_by(order)[name].to_numpy()
        np.testing.assert_array_equal(left, right)
    assert np.isfinite(found["spending__amount_ratio"].to_numpy()).sum() > 200
    assert set(found[LABEL].to_pylist()) == {0.0, 1.0}


def test_a_model_that_takes_inputs_has_no_rows_without_a_spine(log: EventLog) -> None:
    with pytest.raises(MissingInputError, match=r"'amount'.*give a spine"):
        ModelRows.of(MODEL, log, [NOW_US])


def test_a_spine_is_split_by_time_with_a_gap_of_the_horizon(log: EventLog) -> None:
    given = ModelSpine.of(spine(), MODEL, N_BUCKETS)
    split = split_spine(given, horizon_us=MODEL.label.horizon_us, now_us=NOW_US)
    found = build_training_set(MODEL, log, split, spine=given, rows_of=all_rows)
    training, validation = found.training, found.validation
    assert len(validation) == pytest.approx(60, abs=2)
    assert training.as_of_us.max() + MODEL.label.horizon_us <= validation.as_of_us.min()
    assert len(training) + len(validation) < 300
    fold = make_fold(found)
    assert fold.fit.as_of_us.max() + MODEL.label.horizon_us <= fold.watch.as_of_us.min()
    assert found.origin()["spine"] == given.digest


def test_validation_begins_where_it_is_told_to() -> None:
    given = ModelSpine.of(spine(), MODEL, N_BUCKETS)
    from_us = START_US + 100 * US_PER_DAY
    split = split_spine(given, [from_us], horizon_us=MODEL.label.horizon_us, now_us=NOW_US)
    assert split.train_us[1] <= from_us - MODEL.label.horizon_us
    assert split.validation_us[0] >= from_us


def test_a_spine_whose_labels_arent_known_yet_is_refused() -> None:
    given = ModelSpine.of(spine(), MODEL, N_BUCKETS)
    with pytest.raises(TrainingDataError, match="leave out rows after 2024-05"):
        split_spine(given, horizon_us=MODEL.label.horizon_us, now_us=START_US + 140 * US_PER_DAY)


def test_the_digest_is_that_of_the_rows() -> None:
    one, same = (ModelSpine.of(spine(), MODEL, N_BUCKETS).digest for _ in range(2))
    assert one == same != ModelSpine.of(spine(299), MODEL, N_BUCKETS).digest


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda table: table.drop_columns(["amount"]), SpineError, "spine of model 'fraud' has no column 'amount'"),
        (lambda table: table.drop_columns(["as_of"]), SpineError, "no column 'as_of'"),
        (lambda table: table.drop_columns(["card"]), KeyColumnError, "'card'"),
        (lambda table: table.slice(0, 0), SpineError, "no rows"),
    ],
)
def test_a_spine_that_lacks_something_says_what(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ModelSpine.of(change(spine()), MODEL, N_BUCKETS)


def test_files_of_both_kinds_are_read(tmp_path: Path) -> None:
    pq.write_table(spine(), tmp_path / "s.parquet")
    pyarrow.csv.write_csv(spine(), tmp_path / "s.csv")
    one, other = (ModelSpine.of(read_spine(tmp_path / name), MODEL, N_BUCKETS) for name in ("s.parquet", "s.csv"))
    assert (one.n_rows, one.first_us, one.last_us) == (other.n_rows, other.first_us, other.last_us)
    with pytest.raises(MissingFileError):
        read_spine(tmp_path / "none.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"no")
    with pytest.raises(InvalidValueError, match="Parquet or CSV"):
        read_spine(tmp_path / "broken.parquet")
