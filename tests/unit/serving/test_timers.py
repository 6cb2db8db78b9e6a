from __future__ import annotations

import asyncio

import pytest

from heliostat.serving.timers import Limits


def test_calls_are_made_in_order_when_their_delay_is_over_and_not_before() -> None:
    async def scenario() -> None:
        loop, limits, made = asyncio.get_running_loop(), Limits(0.1), list[tuple[str, float]]()
        begin = loop.time()
        limits.call(lambda: made.append(("first", loop.time() - begin)))
        await asyncio.sleep(0.06)
        limits.call(lambda: made.append(("second", loop.time() - begin)))
        await asyncio.sleep(0.2)
        assert [name for name, _ in made] == ["first", "second"]
        assert made[0][1] >= 0.098
        assert made[1][1] >= 0.158

    asyncio.run(scenario())


def test_what_is_cancelled_is_never_made_and_holds_up_nobody() -> None:
    async def scenario() -> None:
        limits, made = Limits(0.05), list[int]()
        dues = [limits.call(lambda n=n: made.append(n)) for n in range(5)]  # type: ignore[misc]
        for at in (0, 3, 4):
            dues[at].cancel()
        await asyncio.sleep(0.2)
        assert made == [1, 2]
        assert all(due.is_over for due in dues)
        limits.call(lambda: made.append(9))  # also after everything was over
        await asyncio.sleep(0.2)
        assert made == [1, 2, 9]

    asyncio.run(scenario())


def test_what_is_over_is_forgotten_long_before_it_would_have_been_due() -> None:
    async def scenario() -> int:
        limits = Limits(3600.0)
        for _ in range(1_000):
            limits.call(print).cancel()
        return len(limits._waiting)

    assert asyncio.run(scenario()) == 1


def test_work_that_takes_too_long_is_cancelled_and_that_is_no_cancellation_of_whoever_waits() -> None:
    cleaned = list[str]()

    async def work(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        finally:
            cleaned.append("cleaned")
        return "done"

    async def scenario() -> None:
        limits = Limits(0.05)
        assert await limits.keep(work(0.0)) == "done"
        with pytest.raises(TimeoutError):
            await limits.keep(work(30.0))
        await asyncio.sleep(0)  # the task itself goes on, as if nothing had been
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(scenario())
    assert cleaned == ["cleaned"] * 2


def test_whoever_is_cancelled_by_others_is_cancelled() -> None:
    async def scenario() -> None:
        task = asyncio.create_task(Limits(30.0).keep(asyncio.sleep(30.0)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
