from __future__ import annotations

import asyncio
import math

import numpy as np
import orjson
import pytest

from heliostat.errors import PredictionLogError
from heliostat.serving.prediction_log import PredictionLog, log_record
from heliostat.serving.requests import EntityAnswer, PredictAnswer
from heliostat.storage.streams import rows_from
from tests.unit.serving.collaborators import Stream

ANSWER = PredictAnswer(
    "r",
    "churn",
    3,
    9,
    (
        EntityAnswer(7, 0.5, "control", 3, "r-0", ("a__b",)),
        EntityAnswer("8", 0.25, "challenger", 4, "r-1", fallback="prior"),
    ),
    logged=True,
)
VECTORS = [np.array([1.0, math.nan]), np.array([2.0])]


def soon() -> float:
    return asyncio.get_running_loop().time() + 5


def test_a_record_becomes_the_rows_of_the_prediction_table() -> None:
    record = log_record(ANSWER, ["7", "8"], VECTORS, at_us=123_000_000, given=[(), ("a__b",)])
    ids, table = rows_from("predictions", [((1, 0), record)])["churn"]
    first, second = table.to_pylist()
    assert ids == [(1, 0), (1, 0)]
    assert (first["prediction_id"], first["entity"], first["variant"]) == ("r-0", "7", "control")
    assert (first["version"], first["score"], first["source"]) == (3, 0.5, "model")
    assert (first["features"], first["missing"]) == ([1.0, None], ["a__b"])
    assert (second["features"], second["source"], second["revision"]) == ([2.0], "fallback", 9)
    assert (first["fallback"], first["given"]) == (None, [])
    assert (second["fallback"], second["given"]) == ("prior", ["a__b"])
    assert first["at"].timestamp() == 123.0


def test_records_of_several_requests_share_a_round_trip() -> None:
    stream = Stream()

    async def scenario() -> bool:
        record = log_record(ANSWER, ["7", "8"], VECTORS, at_us=1)
        return await PredictionLog(stream.append).write([record, record, record], until=soon())

    assert asyncio.run(scenario()) is True
    assert stream.calls == [3]
    assert orjson.loads(stream.records[0])["request_id"] == "r"


def test_what_cant_be_logged_isnt_given_out_unless_that_is_allowed() -> None:
    stream = Stream()
    stream.down = True

    async def scenario() -> None:
        with pytest.raises(PredictionLogError, match="connection refused"):
            await PredictionLog(stream.append).write([b"x"], until=soon())
        assert await PredictionLog(stream.append, when_fails="answer").write([b"x"], until=soon()) is False

    asyncio.run(scenario())


def test_a_log_that_hangs_fails_when_time_is_up() -> None:
    stream = Stream()

    async def scenario() -> None:
        stream.gate = asyncio.Event()
        with pytest.raises(PredictionLogError, match="too long"):
            await PredictionLog(stream.append).write([b"x"], until=asyncio.get_running_loop().time() + 0.01)

    asyncio.run(scenario())
