from __future__ import annotations

import asyncio
import math
import time

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import PredictionLogError
from heliostat.serving.answers import PredictAnswer, Predictions
from heliostat.serving.prediction_log import PredictionLog, log_record
from heliostat.storage.stream_entries import rows_from
from heliostat.tracing import Trace
from tests.unit.serving.collaborators import Stream

PREDICTIONS = Predictions(
    scores=[0.5, 0.25, 0.75],
    versions=[3, 4, 3],
    fallbacks=[None, "prior", None],
    vectors=[np.array([1.0, math.nan]), np.array([2.0]), np.array([3.0, 4.0])],
    missing=[("a__b",), (), ()],
    variants=["control", "challenger", "control"],
    absent=[(), (), ("a@1",)],
)
ANSWERS = [
    PredictAnswer("r", "churn", 3, 9, (7, "8"), PREDICTIONS.part(0, 2)),
    PredictAnswer("s", "churn", 3, 9, (9,), PREDICTIONS.part(2, 3)),
]
ENTITIES = ["7", "8", "9"]


def soon() -> float:
    return asyncio.get_running_loop().time() + 5


def test_a_record_becomes_the_rows_of_the_prediction_table() -> None:
    record = log_record(
        ANSWERS, PREDICTIONS, ENTITIES, at_us=123_000_000, given=[(), ("a__b",), ()], inputs={2: {"amount": 4.5}}
    )
    ids, table = rows_from("predictions", [((1, 0), record)])["churn"]
    first, second, third = table.to_pylist()
    assert ids == [(1, 0)] * 3
    assert (first["prediction_id"], first["entity"], first["variant"]) == ("r-0", "7", "control")
    assert (first["version"], first["score"], first["source"]) == (3, 0.5, "model")
    assert (first["features"], first["missing"]) == ([1.0, None], ["a__b"])
    assert (second["features"], second["source"], second["revision"]) == ([2.0], "fallback", 9)
    assert (first["fallback"], first["given"], first["inputs"]) == (None, [], None)
    assert (second["fallback"], second["given"]) == ("prior", ["a__b"])
    assert (third["prediction_id"], third["request_id"], third["features"]) == ("s-0", "s", [3.0, 4.0])
    assert orjson.loads(third["inputs"]) == {"amount": 4.5}
    assert {each["at"].timestamp() for each in (first, second, third)} == {123.0}


def test_a_record_without_anything_out_of_the_ordinary_says_so_by_saying_nothing() -> None:
    plain = Predictions([0.5], [3], [None], np.array([[1.0]]), [()], ["control"], [()])
    record = log_record([PredictAnswer("r", "churn", 3, 9, (7,), plain)], plain, ["7"], at_us=1)
    document = orjson.loads(record.partition(b"\n")[0])
    assert set(document["columns"]) == {"entity", "score"}
    assert document["same"] == {"variant": "control", "version": 3}
    (row,) = rows_from("predictions", [((1, 0), record)])["churn"][1].to_pylist()
    assert (row["missing"], row["given"], row["source"]) == ([], [], "model")
    assert (row["fallback"], row["inputs"]) == (None, None)


@pytest.mark.parametrize("other", [False, True])
def test_what_all_rows_share_is_written_once_and_read_back_for_each(other: bool) -> None:
    versions, variants = ([3, 4, 3], ["a", "b", "a"]) if other else ([3] * 3, ["a"] * 3)
    given = [("v__x", "v__y"), ("v__x",) if other else ("v__x", "v__y"), ("v__x", "v__y")]
    rows = Predictions([0.5] * 3, versions, [None] * 3, np.ones((3, 2)), [()] * 3, variants, [()] * 3)
    record = log_record([PredictAnswer("r", "churn", 3, 9, (7, 8, 9), rows)], rows, ENTITIES, at_us=1, given=given)
    assert record.count(b"v__x") == (3 if other else 1)
    found = rows_from("predictions", [((1, 0), record)])["churn"][1].to_pylist()
    assert [row["version"] for row in found] == versions
    assert [row["variant"] for row in found] == variants
    assert [row["given"] for row in found] == list(map(list, given))


def test_a_row_says_whose_trace_it_is_how_old_the_request_was_and_how_fresh_its_features() -> None:
    traces = [Trace("a" * 32, begun_s=time.perf_counter() - 0.02), None]
    newest_us = np.array([5_000_000.0, math.nan, 7_000_001.0])
    record = log_record(ANSWERS, PREDICTIONS, ENTITIES, at_us=1, newest_us=newest_us, traces=traces)
    first, second, third = rows_from("predictions", [((1, 0), record)])["churn"][1].to_pylist()
    assert [row["trace_id"] for row in (first, second, third)] == ["a" * 32, "a" * 32, None]
    assert 20 <= first["latency_ms"] == second["latency_ms"] < 5_000
    assert third["latency_ms"] is None
    assert (first["newest_event"].timestamp(), second["newest_event"]) == (5.0, None)
    assert third["newest_event"].timestamp() == 7.000001


@pytest.mark.parametrize("ragged", [False, True])
def test_infinite_values_come_back_and_stay_apart_from_nulls(ragged: bool) -> None:
    vectors = [[math.inf, math.nan], [1.0, 2.0], [-math.inf, math.inf]]
    rows = Predictions([0.5] * 3, [1] * 3, [None] * 3, np.array(vectors), [()] * 3, ["control"] * 3, [()] * 3)
    if ragged:
        rows.vectors = [np.array(vectors[0]), np.array([1.0]), np.array(vectors[2])]
    record = log_record([PredictAnswer("r", "churn", 1, 1, (7, 8, 9), rows)], rows, ENTITIES, at_us=1)
    first, second, third = (
        row["features"] for row in rows_from("predictions", [((1, 0), record)])["churn"][1].to_pylist()
    )
    assert (first, third) == ([math.inf, None], [-math.inf, math.inf])
    assert second == ([1.0] if ragged else [1.0, 2.0])


@given(st.lists(st.floats(), min_size=1, max_size=20))
def test_every_float_comes_back_bit_for_bit_but_that_there_is_one_nan(vector: list[float]) -> None:
    values = np.array([vector])
    rows = Predictions([0.1], [1], [None], values, [()], ["control"], [()])
    record = log_record([PredictAnswer("r", "churn", 1, 1, (7,), rows)], rows, ["7"], at_us=1)
    lists = rows_from("predictions", [((1, 0), record)])["churn"][1].column("features").combine_chunks()
    found = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    numbers = ~np.isnan(values[0])
    np.testing.assert_array_equal(found.view(np.int64)[numbers], values[0].view(np.int64)[numbers])
    assert np.isnan(found[~numbers]).all()


def test_what_cant_be_logged_isnt_given_out_unless_that_is_allowed() -> None:
    stream = Stream()
    stream.down = True

    async def scenario() -> None:
        with pytest.raises(PredictionLogError, match="connection refused"):
            await PredictionLog(stream.append).write([b"x"], rows=1, until=soon())
        assert await PredictionLog(stream.append, when_fails="answer").write([b"x"], rows=1, until=soon()) is False

    asyncio.run(scenario())


def test_a_log_that_hangs_fails_when_time_is_up() -> None:
    stream = Stream()

    async def scenario() -> None:
        stream.gate = asyncio.Event()
        with pytest.raises(PredictionLogError, match="too long"):
            await PredictionLog(stream.append).write([b"x"], rows=1, until=asyncio.get_running_loop().time() + 0.01)

    asyncio.run(scenario())
