from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from functools import partial

import pytest

from heliostat.timers import Deadlines, Limits


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
        return len(limits._deadlines._waiting)

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


def test_work_that_waits_for_nothing_is_given_no_limit() -> None:
    async def at_once(result: int) -> int:
        if result < 0:
            raise ValueError(result)
        return result

    async def scenario() -> None:
        limits = Limits(30.0)
        assert await limits.keep(at_once(5)) == 5
        with pytest.raises(ValueError, match="-1"):
            await limits.keep(at_once(-1))
        assert limits._deadlines._waiting == []

    asyncio.run(scenario())


def test_work_that_has_begun_gets_what_it_waits_for_and_raises_what_it_raises() -> None:
    async def adding(results: list[asyncio.Future[int]]) -> int:
        found = 0
        for result in results:
            try:
                found += await result
            except KeyError:
                found += 1_000
        await asyncio.sleep(0)
        if found > 5_000:
            raise ValueError(found)
        return found

    async def scenario(*values: int) -> int:
        loop = asyncio.get_running_loop()
        results = [loop.create_future() for _ in values]
        for at, (result, value) in enumerate(zip(results, values, strict=True)):
            told = partial(result.set_exception, KeyError()) if value < 0 else partial(result.set_result, value)
            loop.call_later(0.001 * at, told)
        return await Limits(30.0).keep(adding(results))

    assert asyncio.run(scenario(1, -1, 3)) == 1_004
    with pytest.raises(ValueError, match="6000"):
        asyncio.run(scenario(6_000))


def test_whoever_is_cancelled_by_others_is_cancelled() -> None:
    async def scenario() -> None:
        task = asyncio.create_task(Limits(30.0).keep(asyncio.sleep(30.0)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())


def test_calls_at_any_instants_are_made_in_order_of_those() -> None:
    async def scenario() -> None:
        loop, deadlines, made = asyncio.get_running_loop(), Deadlines(), list[int]()
        begin = loop.time()
        dues = {ms: deadlines.call_at(begin + ms / 1e3, partial(made.append, ms)) for ms in (90, 30, 60, 31, 120)}
        dues[60].cancel()
        await asyncio.sleep(0.02)
        assert made == []
        dues[31].cancel()
        deadlines.call_at(begin - 1.0, lambda: made.append(-1))  # over already: at once
        await asyncio.sleep(0.3)
        assert made == [-1, 30, 90, 120]

    asyncio.run(scenario())


def test_one_call_that_raises_takes_no_other_along() -> None:
    async def scenario() -> list[str]:
        loop, deadlines, made, failed = asyncio.get_running_loop(), Deadlines(), list[str](), list[object]()
        loop.set_exception_handler(lambda _, told: failed.append(told["exception"]))
        now = loop.time()
        deadlines.call_at(now + 0.01, lambda: [][1])
        deadlines.call_at(now + 0.01, lambda: made.append("same instant"))
        deadlines.call_at(now + 0.05, lambda: made.append("later"))
        await asyncio.sleep(0.2)
        assert len(failed) == 1
        return made

    assert asyncio.run(scenario()) == ["same instant", "later"]


def test_work_that_is_given_up_leaves_nothing_for_the_collector() -> None:
    class Held:
        pass

    async def work(held: Held) -> None:
        await asyncio.sleep(30.0)
        raise AssertionError(held)

    async def scenario() -> bool:
        held = Held()
        watch, coroutine = weakref.ref(held), work(held)
        del held
        with pytest.raises(TimeoutError):
            await Limits(0.01).keep(coroutine)
        del coroutine
        await asyncio.sleep(0)  # until then the loop has hold of it
        return watch() is None

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(scenario())
    finally:
        gc.enable()


def test_the_loop_is_asked_for_one_timer_however_many_limits_there_are() -> None:
    asked = list[float]()

    async def scenario() -> None:
        loop, deadlines = asyncio.get_running_loop(), Deadlines()
        call_at, begin = loop.call_at, loop.time()
        loop.call_at = lambda at, *rest, **more: (asked.append(at), call_at(at, *rest, **more))[1]  # type: ignore[method-assign, assignment]
        for request in range(100):
            for share in (0.5, 0.6, 0.8):
                with deadlines.until(begin + 30.0 + request / 1e3 + share):
                    await asyncio.sleep(0)
        assert len(asked) == 1
        assert len(deadlines._waiting) < 100

    asyncio.run(scenario())


def test_a_block_that_takes_too_long_is_given_up_and_its_task_goes_on() -> None:
    async def scenario() -> None:
        loop, deadlines = asyncio.get_running_loop(), Deadlines()
        task = asyncio.current_task()
        assert task is not None
        for delay_s in (0.05, 0.0, -1.0):
            with pytest.raises(TimeoutError), deadlines.until(loop.time() + delay_s):
                await asyncio.sleep(30.0)
            assert task.cancelling() == 0
        with deadlines.until(loop.time() - 1.0):
            pass  # nothing was waited for: nothing was given up
        await asyncio.sleep(0.05)
        with deadlines.until(loop.time() + 0.01), contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(30.0)  # whoever catches its cancellation has made the best of it
        assert task.cancelling() == 0

    asyncio.run(scenario())


def test_of_two_blocks_that_are_due_at_once_the_outer_one_is_given_up() -> None:
    async def scenario() -> list[str]:
        loop, deadlines, told = asyncio.get_running_loop(), Deadlines(), list[str]()
        at = loop.time() + 0.02
        try:
            with deadlines.until(at):
                try:
                    with deadlines.until(at):
                        await asyncio.sleep(30.0)
                except TimeoutError:
                    told.append("inner")
        except TimeoutError:
            told.append("outer")
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        return told

    assert asyncio.run(scenario()) == ["outer"]


def test_a_task_that_was_cancelled_before_may_still_have_limits() -> None:
    told = list[str]()

    async def work() -> None:
        deadlines = Deadlines()
        try:
            await asyncio.sleep(30.0)
        finally:
            try:
                with deadlines.until(asyncio.get_running_loop().time() + 0.01):
                    await asyncio.sleep(30.0)
            except TimeoutError:
                told.append("given up")

    async def scenario() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert told == ["given up"]


def test_limits_hold_on_the_next_loop_when_theirs_is_over() -> None:
    deadlines = Deadlines()

    async def scenario() -> None:
        deadlines.call_at(asyncio.get_running_loop().time() + 0.02, print)  # left behind
        with pytest.raises(TimeoutError), deadlines.until(asyncio.get_running_loop().time() + 0.05):
            await asyncio.sleep(30.0)

    for _ in range(2):
        asyncio.run(scenario())
