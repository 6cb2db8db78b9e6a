"""Snapshots, predictions, batches and dead letters: written once, whoever repeats it."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from heliostat.clock import US_PER_DAY
from heliostat.errors import StaleProgressError, TableUnavailableError, UnknownTableError
from heliostat.schema import TIMESTAMP
from heliostat.storage.delta import Progress
from heliostat.storage.offline_store import _STREAMED, ACTUALS, DEAD_LETTERS, PREDICTIONS, OfflineStore


@pytest.fixture
def store(tmp_path: Path) -> OfflineStore:
    return OfflineStore(str(tmp_path))


def snapshot(day: int, *values: float) -> pa.Table:
    return pa.table(
        {
            "user_id": pa.array(range(len(values)), pa.int64()),
            "as_of": pa.array([day * US_PER_DAY] * len(values), TIMESTAMP),
            "spent": pa.array(values, pa.float64()),
        }
    )


def predictions(*rows: tuple[str, int]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"prediction_id": name, "at": at, "score": 0.5, "features": [1.0, None], "missing": ["f"], "version": 1}
            for name, at in rows
        ],
        schema=PREDICTIONS,
    )


def _spent(store: OfflineStore, first_day: int, last_day: int, **rest: Any) -> list[float]:
    found = store.read("sales@1", start_us=first_day * US_PER_DAY, end_us=(last_day + 1) * US_PER_DAY, **rest)
    return sorted(found.column("spent").to_pylist())


def test_day_that_is_written_again_is_replaced_and_others_stay(store: OfflineStore) -> None:
    store.write_day("sales@1", 0, snapshot(0, 1.0, 2.0))
    store.write_day("sales@1", US_PER_DAY, snapshot(1, 5.0))
    store.write_day("sales@1", US_PER_DAY - 1, snapshot(0, 3.0, 4.0))
    assert store.days("sales@1") == ["1970-01-01", "1970-01-02"]
    assert _spent(store, 0, 0) == [3.0, 4.0]
    assert _spent(store, 0, 1) == [3.0, 4.0, 5.0]


# What each release has added to a prediction's row, the newest last.
ADDED = [["fallback", "given"], ["inputs"], ["trace_id", "newest_event", "latency_ms", "forced"]]


@pytest.mark.parametrize("releases", range(1, len(ADDED) + 1))
def test_a_table_of_an_earlier_release_is_read_with_nulls_and_gains_its_columns_with_the_next_append(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, releases: int
) -> None:
    new = [name for names in ADDED[-releases:] for name in names]
    assert PREDICTIONS.names[-len(new) :] == new
    with monkeypatch.context() as earlier:
        old = pa.schema([each for each in PREDICTIONS if each.name not in new])
        earlier.setitem(_STREAMED, "predictions", old)
        OfflineStore(str(tmp_path)).append_stream(
            "predictions", "churn", predictions(("a", 1)).select(old.names), Progress({}, {"s": (1, 0)})
        )
    store = OfflineStore(str(tmp_path))
    nothing = dict.fromkeys(new)
    before = store.read_predictions("churn", start_us=0, end_us=9, columns=["prediction_id", *new])
    assert before.to_pylist() == [{"prediction_id": "a", **nothing}]
    assert store.find_prediction("a", "churn").select(new).to_pylist() == [nothing]
    at = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    told = {
        "fallback": "prior",
        "given": ["v__x"],
        "inputs": "{}",
        "trace_id": "f" * 32,
        "newest_event": at,
        "latency_ms": 1.5,
        "forced": True,
    }
    rows = pa.Table.from_pylist([{**predictions(("b", 2)).to_pylist()[0], **told}], schema=PREDICTIONS)
    store.append_stream("predictions", "churn", rows, Progress({"s": (1, 0)}, {"s": (2, 0)}))
    assert store.compact("predictions", "churn", min_files=2) == 2
    after = store.read_predictions("churn", start_us=0, end_us=9)
    assert after.schema.names == PREDICTIONS.names
    assert after.select(["prediction_id", *new]).to_pylist() == [
        {"prediction_id": "a", **nothing},
        {"prediction_id": "b", **{name: told[name] for name in new}},
    ]


def test_one_prediction_is_found_by_its_id(store: OfflineStore) -> None:
    assert store.find_prediction("b", "churn").num_rows == 0
    for number, name in enumerate("abc"):
        progress = Progress({"s": (number, 0) if number else None}, {"s": (number + 1, 0)})
        store.append_stream("predictions", "churn", predictions((name, number * US_PER_DAY)), progress)
    assert store.find_prediction("b", "churn").column("at").cast(pa.int64()).to_pylist() == [US_PER_DAY]
    assert store.find_prediction("z", "churn").schema.names == PREDICTIONS.names


def test_empty_day_replaces_a_full_one(store: OfflineStore) -> None:
    store.write_day("sales@1", 0, snapshot(0, 1.0))
    store.write_day("sales@1", 0, snapshot(0))
    assert _spent(store, 0, 9) == []


def test_snapshot_is_read_for_some_entities(store: OfflineStore) -> None:
    store.write_day("sales@1", 0, snapshot(0, 1.0, 2.0, 3.0))
    assert _spent(store, 0, 0, entities=pa.table({"user_id": [0, 2, 99]})) == [1.0, 3.0]


def test_end_of_a_read_is_exclusive(store: OfflineStore) -> None:
    store.write_day("sales@1", 0, snapshot(0, 1.0))
    store.write_day("sales@1", US_PER_DAY, snapshot(1, 2.0))
    assert store.read("sales@1", start_us=0, end_us=US_PER_DAY).column("spent").to_pylist() == [1.0]


def test_view_without_a_snapshot_is_refused_with_those_that_have_one(store: OfflineStore) -> None:
    store.write_day("sales@1", 0, snapshot(0, 1.0))
    with pytest.raises(UnknownTableError, match=r"features/sales@2; it has: sales@1"):
        store.read("sales@2", start_us=0, end_us=1)


def test_stream_rows_and_progress_become_visible_together(store: OfflineStore) -> None:
    assert store.progress("predictions", "churn", ["s"]) == {"s": None}
    store.append_stream("predictions", "churn", predictions(("a", 5)), Progress({"s": None}, {"s": (1, 0)}))
    assert store.progress("predictions", "churn", ["s"]) == {"s": (1, 0)}
    with pytest.raises(StaleProgressError):
        store.append_stream("predictions", "churn", predictions(("a", 5)), Progress({"s": None}, {"s": (1, 0)}))
    (found,) = store.read_predictions("churn", start_us=0, end_us=10).to_pylist()
    assert (found["prediction_id"], found["features"], found["missing"]) == ("a", [1.0, None], ["f"])


def test_predictions_are_read_by_time_over_days(store: OfflineStore) -> None:
    rows = predictions(("a", 0), ("b", US_PER_DAY - 1), ("c", US_PER_DAY), ("d", 3 * US_PER_DAY))
    store.append_stream("predictions", "churn", rows, Progress({"s": None}, {"s": (1, 0)}))
    found = store.read_predictions("churn", start_us=1, end_us=3 * US_PER_DAY, columns=["prediction_id"])
    assert sorted(found.column("prediction_id").to_pylist()) == ["b", "c"]
    assert found.column_names == ["prediction_id"]


def test_model_without_predictions_reads_as_empty(store: OfflineStore) -> None:
    assert store.read_predictions("churn", start_us=0, end_us=1).schema.equals(PREDICTIONS)
    assert store.read_actuals("churn", start_us=0, end_us=1, columns=["value"]).num_rows == 0


def test_compaction_of_predictions_changes_no_row(store: OfflineStore) -> None:
    for number in range(4):
        before, after = (None if number == 0 else (number, 0)), (number + 1, 0)
        rows = predictions((f"p{number}", 9 - number))
        store.append_stream("predictions", "churn", rows, Progress({"s": before}, {"s": after}))
    assert store.compact("predictions", "churn", min_files=4) == 4
    found = store.read_predictions("churn", start_us=0, end_us=10)
    assert found.column("prediction_id").to_pylist() == ["p3", "p2", "p1", "p0"]
    assert store.progress("predictions", "churn", ["s"]) == {"s": (4, 0)}


def test_actuals_have_a_table_of_their_own(store: OfflineStore) -> None:
    row = {"model": "churn", "prediction_id": "a", "value": 1.0, "at": 5}
    store.append_stream(
        "actuals", "churn", pa.Table.from_pylist([row], schema=ACTUALS), Progress({"s": None}, {"s": (1, 0)})
    )
    assert store.read_actuals("churn", start_us=0, end_us=10).column("value").to_pylist() == [1.0]
    assert (store.tables("actuals"), store.tables("predictions")) == (["churn"], [])


def test_batch_of_the_same_instant_is_replaced(store: OfflineStore) -> None:
    store.write_batch("churn", 5, snapshot(0, 1.0, 2.0))
    store.write_batch("churn", 9, snapshot(0, 9.0))
    store.write_batch("churn", 5, snapshot(0, 3.0))
    assert store.batches("churn") == [5, 9]
    assert store.read_batch("churn", 5).column("spent").to_pylist() == [3.0]
    assert store.read_batch("churn").column("spent").to_pylist() == [9.0]


def test_parts_of_a_batch_are_seen_all_at_once_and_may_be_committed_twice(store: OfflineStore) -> None:
    store.write_batch("churn", 5, snapshot(0, 1.0))
    parts = [store.write_batch_part("churn", 5, snapshot(0, value)) for value in (7.0, 8.0)]
    assert store.read_batch("churn").column("spent").to_pylist() == [1.0]
    version = store.commit_batch("churn", 5, parts)
    assert sorted(store.read_batch("churn").column("spent").to_pylist()) == [7.0, 8.0]
    assert store.commit_batch("churn", 5, parts) == version


def test_batch_that_was_never_made_is_refused_with_those_that_were(store: OfflineStore) -> None:
    with pytest.raises(UnknownTableError, match="any instant"):
        store.read_batch("churn")
    store.write_batch("churn", 0, snapshot(0, 1.0))
    with pytest.raises(UnknownTableError, match="it has: 1970-01-01T00:00:00Z"):
        store.read_batch("churn", US_PER_DAY)


def test_dead_letter_is_kept_once(store: OfflineStore) -> None:
    letter = {"file": "f.csv", "row": 3, "reason": "no key", "event": "{}", "rejected_at": 1}
    other = {**letter, "row": 4}
    rows = pa.Table.from_pylist([letter, other], schema=DEAD_LETTERS)
    assert store.append_dead_letters("sales", rows.slice(0, 1)) == 1
    assert store.append_dead_letters("sales", rows) == 1
    assert store.append_dead_letters("sales", rows) == 0
    assert store.append_dead_letters("sales", rows.slice(0, 0)) == 0
    assert store.read_dead_letters("sales").sort_by("row").column("row").to_pylist() == [3, 4]
    assert store.read_dead_letters("others").num_rows == 0


def test_store_behind_an_object_store_address_does_the_same(tmp_path: Path) -> None:
    store = OfflineStore(str(tmp_path))
    store.root = f"file://{tmp_path}"  # no plain path: goes through the object store's client
    store.write_day("sales@1", 0, snapshot(0, 1.0))
    store.write_day("sales@1", 0, snapshot(0, 2.0))
    assert _spent(store, 0, 0) == [2.0]
    assert (store.tables("features"), store.tables("batch")) == (["sales@1"], [])
    assert store.version("features", "sales@1") == 2


def test_folder_that_cant_be_listed_is_said_to_be_unavailable(
    store: OfflineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append_stream("predictions", "churn", predictions(("a", 5)), Progress({"s": None}, {"s": (1, 0)}))
    assert store.tables("predictions") == ["churn"]

    def too_many(_: Path) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "iterdir", too_many)
    with pytest.raises(TableUnavailableError, match=r"predictions.*Too many open files"):
        store.tables("predictions")
