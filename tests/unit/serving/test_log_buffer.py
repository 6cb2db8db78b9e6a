"""The prediction log with a buffer: answers don't wait, and what can be lost is bounded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from heliostat.errors import OnlineStoreUnavailableError, PredictionLogError
from heliostat.serving.prediction_log import PredictionLog
from tests.unit.serving.collaborators import House, Stream, request


def soon(seconds: float = 5.0) -> float:
    return asyncio.get_running_loop().time() + seconds


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10))  # type: ignore[arg-type] # all of them are coroutines


def test_an_answer_leaves_before_the_server_has_its_row_and_the_row_follows() -> None:
    stream = Stream()

    async def scenario() -> None:
        stream.gate = asyncio.Event()
        log = PredictionLog(stream.append, buffer_rows=10)
        assert [await log.write([name], rows=2, until=soon()) for name in (b"a", b"b")] == [False, False]
        assert (stream.records, log.buffered_rows) == ([], 4)
        stream.gate.set()
        await log.close()
        assert (stream.records, log.buffered_rows) == ([b"a", b"b"], 0)

    run(scenario)


def test_rows_that_came_while_others_were_written_go_together() -> None:
    stream = Stream()

    async def scenario() -> None:
        stream.gate = asyncio.Event()
        log = PredictionLog(stream.append, buffer_rows=100)
        await log.write([b"0"], rows=1, until=soon())
        await asyncio.sleep(0)  # its write begins
        await asyncio.sleep(0)
        for name in (b"1", b"2", b"3"):
            await log.write([name], rows=1, until=soon())
        stream.gate.set()
        await log.close()
        assert (stream.calls, stream.records) == ([1, 3], [b"0", b"1", b"2", b"3"])

    run(scenario)


def test_a_full_buffer_makes_answers_wait_and_they_are_refused_when_the_server_is_away() -> None:
    stream = Stream()

    async def scenario() -> None:
        stream.gate = asyncio.Event()
        log = PredictionLog(stream.append, buffer_rows=3)
        await log.write([b"a"], rows=2, until=soon())
        waiting = asyncio.create_task(log.write([b"b"], rows=2, until=soon()))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        with pytest.raises(PredictionLogError, match="too long"):
            await log.write([b"c"], rows=2, until=soon(0.01))
        assert log.buffered_rows == 2
        stream.gate.set()
        assert await waiting is True
        await log.close()
        assert sorted(stream.records) == [b"a", b"b"]

    run(scenario)


def test_a_buffer_whose_oldest_row_waits_too_long_takes_no_more_until_it_is_written() -> None:
    stream = Stream()

    async def scenario() -> None:
        stream.down = True
        log = PredictionLog(stream.append, buffer_rows=1_000, max_delay_s=0.05)
        assert await log.write([b"a"], rows=1, until=soon()) is False
        await asyncio.sleep(0.06)
        with pytest.raises(PredictionLogError, match="connection refused"):
            await log.write([b"b"], rows=1, until=soon())
        stream.down = False
        assert log._flushing is not None
        await log._flushing
        assert await log.write([b"c"], rows=1, until=soon()) is False
        await log.close()
        assert stream.records == [b"a", b"c"]

    run(scenario)


def test_after_close_writes_wait_and_what_couldnt_be_written_is_said(caplog: pytest.LogCaptureFixture) -> None:
    stream = Stream()

    async def scenario() -> None:
        log = PredictionLog(stream.append, buffer_rows=10)
        await log.close()
        assert await log.write([b"a"], rows=1, until=soon()) is True
        stream.down = True
        lost = PredictionLog(stream.append, buffer_rows=10)
        await lost.write([b"b"], rows=7, until=soon())
        await lost.close()
        assert stream.records == [b"a"]

    with caplog.at_level(logging.ERROR, "heliostat.serving"):
        run(scenario)
    assert "7 predictions that were answered are lost" in caplog.text


def test_a_predictor_with_a_buffer_says_that_nothing_is_durable_yet_and_loses_nothing_when_it_is_closed() -> None:
    house = House()

    async def scenario() -> None:
        house.predictor._log = PredictionLog(house.stream.append, buffer_rows=100)
        house.stream.gate = asyncio.Event()
        answers = await asyncio.gather(*(house.predictor.predict(request(each)) for each in (1, 2, 3)))
        assert {answer.logged for answer in answers} == {False}
        assert house.stream.records == []
        asyncio.get_running_loop().call_later(0.05, house.stream.gate.set)
        await house.predictor.close()
        logged = {entry["prediction_id"] for entry in house.stream.entries()}
        assert logged == {each.prediction_id for answer in answers for each in answer.entities}

    run(scenario)


def test_rows_of_answers_that_went_out_while_the_server_was_away_follow_when_it_is_back() -> None:
    stream = Stream()

    async def scenario() -> None:
        away = True

        async def append(records: list[bytes]) -> None:
            if away:
                raise OnlineStoreUnavailableError("redis://nowhere", "refused")
            await stream.append(records)

        log = PredictionLog(append, when_fails="answer", late_rows=3)
        assert [await log.write([name], rows=1, until=soon()) for name in (b"a", b"b", b"c", b"d")] == [False] * 4
        assert log.buffered_rows == 3
        away = False
        while log.buffered_rows:  # noqa: ASYNC110 - it is written when it is tried again
            await asyncio.sleep(0.005)
        assert stream.records == [b"a", b"b", b"c"], "no more than there is room for"
        assert await log.write([b"e"], rows=1, until=soon())
        await log.close()

    run(scenario)
