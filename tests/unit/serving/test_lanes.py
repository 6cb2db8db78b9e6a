from __future__ import annotations

import asyncio
import threading
import time

import pytest

from heliostat.errors import HungModelError
from heliostat.serving.lanes import Lane, in_thread


async def all_back(lane: Lane) -> None:
    while lane.hanging:  # noqa: ASYNC110 - a thread ends, and nobody is told
        await asyncio.sleep(0.001)


def test_a_call_gives_its_result_or_raises_its_error() -> None:
    async def scenario() -> None:
        lane = Lane("churn/1")
        assert await lane.call(lambda a, b: a + b, 1, b=2) == 3
        assert await in_thread(lambda: threading.current_thread().daemon)
        with pytest.raises(ZeroDivisionError):
            await lane.call(lambda: 1 / 0)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await in_thread(next, iter(()))

    asyncio.run(scenario())


def test_no_more_calls_run_at_once_than_may() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def call() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    async def scenario() -> None:
        lane = Lane("churn/1", at_once=2)
        await asyncio.gather(*(lane.call(call) for _ in range(10)))

    asyncio.run(scenario())
    assert most == 2


def test_when_all_threads_hang_the_next_caller_hears_of_it_at_once_and_when_they_come_back_it_goes_on() -> None:
    release = threading.Event()

    async def scenario() -> None:
        lane = Lane("churn/1", at_once=2)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await lane.call(release.wait)
        assert lane.hanging == 2
        with pytest.raises(HungModelError, match="2 calls of churn/1 hang"):
            await lane.call(release.wait)
        release.set()
        await all_back(lane)
        assert await lane.call(int) == 0

    asyncio.run(scenario())


def test_a_call_that_nobody_waits_for_any_more_may_fail() -> None:
    release = threading.Event()

    def fails() -> None:
        release.wait()
        raise ValueError("too late")

    async def scenario() -> None:
        lane = Lane("churn/1", at_once=1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await lane.call(fails)
        release.set()
        await all_back(lane)

    asyncio.run(scenario())
