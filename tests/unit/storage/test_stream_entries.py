"""What lies in streams comes out as it went in."""

from __future__ import annotations

import math

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import StreamEntryError
from heliostat.schema import INGESTED, TIMESTAMP
from heliostat.storage.stream_entries import (
    EVENT_FIELD,
    actual_record,
    event_entries,
    events_from,
    prediction_entry,
    rows_from,
)

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("text", pa.string()),
        ("at", TIMESTAMP),
        ("amount", pa.float64()),
        ("flag", pa.bool_()),
        ("raw", pa.binary()),
        ("tags", pa.list_(pa.string())),
    ]
)
INT64 = st.integers(-(2**63), 2**63 - 1)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.none() | INT64,
            "text": st.none() | st.text(),
            "at": st.none() | st.integers(-(10**15), 10**15),
            "amount": st.none() | st.floats(),
            "flag": st.none() | st.booleans(),
            "raw": st.none() | st.binary(max_size=9),
            "tags": st.none() | st.lists(st.text(max_size=4), max_size=3),
        }
    ),
    max_size=5,
)


@given(rows=ROWS, ingested_us=st.integers(0, 2**62))
def test_events_survive_their_stream(rows: list[dict[str, object]], ingested_us: int) -> None:
    events = pa.Table.from_pylist(rows, schema=SCHEMA)
    entries = event_entries(events, ingested_us=ingested_us)
    assert {field for field, _ in entries} <= {EVENT_FIELD}
    found = events_from([payload for _, payload in entries], SCHEMA)
    assert found.column(INGESTED).to_pylist() == [ingested_us] * len(rows)
    for name in SCHEMA.names:
        expected, got = events.column(name).to_pylist(), found.column(name).to_pylist()
        if name == "amount":
            expected, got = ([_bits(value) for value in each] for each in (expected, got))
        assert got == expected


def _bits(value: float | None) -> object:
    return (
        "nan" if value is not None and math.isnan(value) else None if value is None else np.float64(value).tobytes()
    )


def test_column_that_an_older_entry_lacks_is_null() -> None:
    found = events_from([orjson.dumps({"id": 1, INGESTED: 5})], SCHEMA)
    assert found.column("text").to_pylist() == [None]


@pytest.mark.parametrize("payload", [b"", b"[1]", b'{"id": 1}', b'{"id": "x", "_ingested_us": 1}', b"\xff"])
def test_entry_that_is_no_event_is_refused(payload: bytes) -> None:
    with pytest.raises(StreamEntryError):
        events_from([payload], SCHEMA)


def _record(model: str, *names: str) -> bytes:
    entries = [
        {
            "prediction_id": name,
            "entity": "7",
            "variant": "control",
            "version": 3,
            "score": 1,
            "features": [1.5, None],
            "missing": ["b"],
            "source": "model",
            "added_later": True,
        }
        for name in names
    ]
    return orjson.dumps({"request_id": "r", "model": model, "revision": 2, "at_us": 9, "entries": entries})


def test_request_becomes_one_row_an_entity_by_model() -> None:
    found = rows_from(
        "predictions",
        [((1, 0), _record("churn", "a", "b")), ((2, 0), _record("spend")), ((3, 0), _record("churn", "c"))],
    )
    ids, rows = found["churn"]
    assert ids == [(1, 0), (1, 0), (3, 0)]
    assert rows.column("prediction_id").to_pylist() == ["a", "b", "c"]
    first = rows.slice(0, 1).to_pylist()[0]
    assert (first["features"], first["score"], first["revision"], first["request_id"]) == ([1.5, None], 1.0, 2, "r")
    assert rows.column("at").cast(pa.int64()).to_pylist() == [9, 9, 9]
    assert found["spend"][1].num_rows == 0


VALUES = st.none() | st.floats(allow_nan=False)


EVEN, RAGGED = st.lists(VALUES, min_size=2, max_size=2), st.lists(VALUES, max_size=3)
COLUMNS = {"entity": ["1", "2"], "version": [1, 1], "variant": ["a", "a"], "score": [0.5, 0.5]}


def _prediction(n: int, **more: object) -> dict[str, object]:
    columns = {name: values[:1] * n for name, values in COLUMNS.items()}
    return {"model": "churn", "at_us": 1, "requests": [{"request_id": "r", "rows": n}], "columns": columns, **more}


@given(st.lists(EVEN, min_size=1, max_size=4), st.lists(RAGGED, min_size=1, max_size=4))
def test_what_models_saw_is_read_back_bit_for_bit(
    even: list[list[float | None]], ragged: list[list[float | None]]
) -> None:
    for vectors in (even, ragged):
        arrays = [np.array(each, dtype=np.float64) for each in vectors]
        for given_as in [arrays, np.array(arrays)] if vectors is even else [arrays]:
            entry = prediction_entry(_prediction(len(vectors)), given_as)
            rows = rows_from("predictions", [((1, 0), entry)])["churn"][1].to_pylist()
            found = [[_bits(value) for value in row["features"]] for row in rows]
            assert found == [[_bits(value) for value in row] for row in vectors]


@pytest.mark.parametrize("width", [2, -3, [3], [1, 2], [7, -1], [3, 4], "3", None, [None, 3]])
def test_vectors_that_arent_what_they_say_are_refused(width: object) -> None:
    entry = prediction_entry(_prediction(2), np.ones((2, 3)))
    assert rows_from("predictions", [((1, 0), entry)])["churn"][1].num_rows == 2
    line, _, numbers = entry.partition(b"\n")
    other = orjson.dumps({**orjson.loads(line), "width": width})
    for wrong in (line, line + b"\n" + numbers[:-8], line + b"\n" + numbers[:-1], other + b"\n" + numbers):
        with pytest.raises(StreamEntryError):
            rows_from("predictions", [((1, 0), wrong)])


def test_infinite_values_of_an_entry_of_an_earlier_release_come_back() -> None:
    columns = {"entity": ["1", "2"], "score": [0.5, 0.5], "features": [[None, 1.0], [None, None]]}
    columns["infinite"] = [None, [[0, 1], [1, -1]]]
    entry = {"model": "churn", "at_us": 1, "requests": [{"request_id": "r", "rows": 2}], "columns": columns}
    entry["same"] = {"version": 1, "variant": "a"}
    rows = rows_from("predictions", [((1, 0), orjson.dumps(entry))])["churn"][1].to_pylist()
    assert [row["features"] for row in rows] == [[None, 1.0], [math.inf, -math.inf]]


@pytest.mark.parametrize("vector", [[[1, 2], [3, 4]], "12", ["x"], 5, [[], 1]])
def test_vector_of_an_earlier_release_that_is_none_is_refused(vector: object) -> None:
    columns = {"entity": ["1"], "score": [0.5], "features": [vector]}
    entry = {"model": "churn", "at_us": 1, "requests": [{"request_id": "r", "rows": 1}], "columns": columns}
    with pytest.raises(StreamEntryError):
        rows_from("predictions", [((1, 0), orjson.dumps({**entry, "same": {"version": 1, "variant": "a"}}))])


def test_actual_is_read_back() -> None:
    record = actual_record(model="churn", value=1.0, at_us=5, entity="7", as_of_us=3)
    ids, rows = rows_from("actuals", [((1, 2), record)])["churn"]
    assert ids == [(1, 2)]
    (row,) = rows.to_pylist()
    assert (row["entity"], row["value"], row["prediction_id"]) == ("7", 1.0, None)
    assert rows.column("as_of").cast(pa.int64()).to_pylist() == [3]


@pytest.mark.parametrize("model", [None, 5, "../evil", "", "a b"])
def test_record_that_names_no_model_is_refused(model: object) -> None:
    with pytest.raises(StreamEntryError, match="names no model"):
        rows_from("predictions", [((1, 0), orjson.dumps({"model": model, "entries": []}))])


def test_record_of_a_wrong_shape_is_refused() -> None:
    for wrong in (
        {"at_us": 2**63, "entries": [{}]},
        {"entries": [{"score": "high"}]},
        {"entries": [5]},
        {"entries": 5},
        {"at_us": None},
        {},
    ):
        record = orjson.dumps({"model": "churn", "at_us": 1, **wrong})
        with pytest.raises(StreamEntryError):
            rows_from("predictions", [((1, 0), record)])
