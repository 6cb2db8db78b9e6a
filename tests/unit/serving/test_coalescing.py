from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import BatchResultError, OverloadedError, ShuttingDownError
from heliostat.serving.coalescing import Coalescer


class Recorder:
    """A batch call that doubles numbers, remembers its batches, and returns when it is let."""

    def __init__(self, *, gated: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self.gate = asyncio.Event()
        if not gated:
            self.gate.set()

    async def __call__(self, items: list[int]) -> list[int | Exception]:
        self.batches.append(items)
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        await self.gate.wait()
        await asyncio.sleep(0)
        self._in_flight -= 1
        return [2 * item if item >= 0 else ValueError(f"{item} is negative") for item in items]


async def settle() -> None:
    """Let everything that can run now run."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_requests_that_arrive_together_share_one_call() -> None:
    async def scenario() -> None:
        call = Recorder()
        coalescer = Coalescer(call, max_weight=100)
        assert await asyncio.gather(*(coalescer.submit(n) for n in range(10))) == [2 * n for n in range(10)]
        assert call.batches == [list(range(10))]

    asyncio.run(scenario())


def test_whoever_comes_alone_again_hardly_waits_and_a_crowd_after_that_shares_a_call() -> None:
    async def passes_until_a_call(coalescer: Coalescer[int, int], call: Recorder, n: int) -> int:
        before, passes = len(call.batches), 0
        task = asyncio.create_task(coalescer.submit(n))
        while len(call.batches) == before:
            await asyncio.sleep(0)
            passes += 1
        await task
        return passes

    async def scenario() -> None:
        call = Recorder()
        coalescer = Coalescer(call, max_weight=100)
        first, second, third = [await passes_until_a_call(coalescer, call, n) for n in range(3)]
        assert second == third < first
        await asyncio.gather(*(coalescer.submit(n) for n in range(10)))
        assert call.batches[3:] == [list(range(10))]
        assert await passes_until_a_call(coalescer, call, 5) == first

    asyncio.run(scenario())


def test_requests_that_arrive_while_all_calls_are_under_way_share_the_next_one() -> None:
    async def scenario() -> None:
        call = Recorder(gated=True)
        coalescer = Coalescer(call, max_weight=100, max_in_flight=2)
        tasks = []
        for n in range(6):
            tasks.append(asyncio.create_task(coalescer.submit(n)))
            await settle()
        assert call.batches == [[0], [1]]
        assert (coalescer.in_flight, coalescer.waiting) == (2, 4)
        call.gate.set()
        assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8, 10]
        assert call.batches == [[0], [1], [2, 3, 4, 5]]
        assert call.most_in_flight == 2

    asyncio.run(scenario())


def test_no_second_call_starts_beside_the_first_while_patience_lasts() -> None:
    async def scenario() -> None:
        call = Recorder(gated=True)
        coalescer = Coalescer(call, max_weight=100, max_in_flight=4, patience_s=60.0)
        tasks = []
        for n in range(4):
            tasks.append(asyncio.create_task(coalescer.submit(n)))
            await settle()
        assert call.batches == [[0]]
        call.gate.set()
        assert await asyncio.gather(*tasks) == [0, 2, 4, 6]
        assert call.batches == [[0], [1, 2, 3]]
        assert await asyncio.wait_for(coalescer.submit(4), timeout=5) == 8  # a timer that is set holds nobody up

    asyncio.run(scenario())


def test_a_call_that_takes_too_long_gets_others_beside_it() -> None:
    async def scenario() -> None:
        call = Recorder(gated=True)
        coalescer = Coalescer(call, max_weight=100, max_in_flight=3, patience_s=0.005)
        tasks = [asyncio.create_task(coalescer.submit(n)) for n in range(2)]
        await settle()
        tasks += [asyncio.create_task(coalescer.submit(n)) for n in range(2, 4)]
        while len(call.batches) < 2:  # noqa: ASYNC110 - only time brings the second one
            await asyncio.sleep(0.001)
        assert call.batches == [[0, 1], [2, 3]]
        call.gate.set()
        assert await asyncio.gather(*tasks) == [0, 2, 4, 6]

    asyncio.run(scenario())


def test_a_failed_item_doesnt_fail_its_neighbours() -> None:
    async def scenario() -> None:
        coalescer = Coalescer(Recorder(), max_weight=100)
        results = await asyncio.gather(*(coalescer.submit(n) for n in (1, -1, 2)), return_exceptions=True)
        assert results[0] == 2
        assert isinstance(results[1], ValueError)
        assert results[2] == 4

    asyncio.run(scenario())


def test_an_exception_of_the_call_reaches_everybody_who_waits_for_it_and_nobody_else() -> None:
    async def scenario() -> None:
        calls = 0

        async def failing_once(items: list[int]) -> list[int | Exception]:
            nonlocal calls
            calls += 1
            await asyncio.sleep(0)
            if calls == 1:
                raise OSError("gone")
            return list(items)

        coalescer = Coalescer(failing_once, max_weight=100)
        results = await asyncio.gather(*(coalescer.submit(n) for n in range(3)), return_exceptions=True)
        assert [type(each) for each in results] == [OSError] * 3
        assert await coalescer.submit(7) == 7

    asyncio.run(scenario())


def test_a_call_that_loses_a_result_is_an_error_for_its_waiters_instead_of_a_hang() -> None:
    async def scenario() -> None:
        async def forgetful(items: list[int]) -> list[int | Exception]:
            return list(items[1:])

        coalescer = Coalescer(forgetful, max_weight=100)
        results = await asyncio.gather(*(coalescer.submit(n) for n in range(3)), return_exceptions=True)
        assert [type(each) for each in results] == [BatchResultError] * 3

    asyncio.run(scenario())


def test_a_result_that_no_future_can_carry_is_an_error_instead_of_a_hang() -> None:
    async def scenario() -> None:
        async def stopping(items: list[int]) -> Sequence[int | Exception]:
            return [StopIteration(), *items[1:]]

        coalescer = Coalescer(stopping, max_weight=100)
        first, second = await asyncio.gather(coalescer.submit(1), coalescer.submit(2), return_exceptions=True)
        assert isinstance(first, RuntimeError)
        assert second == 2

    asyncio.run(scenario())


def test_clients_who_leave_during_a_call_dont_stop_it_for_the_others() -> None:
    async def scenario() -> None:
        call = Recorder(gated=True)
        coalescer = Coalescer(call, max_weight=100, max_in_flight=1)
        tasks = [asyncio.create_task(coalescer.submit(n)) for n in range(4)]
        await settle()
        tasks[0].cancel()
        tasks[2].cancel()
        await settle()
        call.gate.set()
        assert await tasks[1] == 2
        assert await tasks[3] == 6
        assert await coalescer.submit(9) == 18
        await settle()
        assert coalescer.in_flight == 0

    asyncio.run(scenario())


def test_nothing_is_computed_for_clients_who_left_before_the_call() -> None:
    async def scenario() -> None:
        call = Recorder(gated=True)
        coalescer = Coalescer(call, max_weight=100, max_in_flight=1)
        tasks = [asyncio.create_task(coalescer.submit(n)) for n in range(4)]
        await settle()
        late = [asyncio.create_task(coalescer.submit(n)) for n in (10, 11, 12)]
        await settle()
        late[1].cancel()
        call.gate.set()
        await asyncio.gather(*tasks, late[0], late[2])
        assert call.batches == [[0, 1, 2, 3], [10, 12]]

    asyncio.run(scenario())


def test_one_more_than_may_wait_is_refused_and_places_of_those_who_left_are_free_again() -> None:
    async def scenario() -> None:
        call = Recorder(gated=True)
        coalescer = Coalescer(call, max_weight=1, max_in_flight=1, max_waiting=2)
        running = asyncio.create_task(coalescer.submit(0))
        await settle()
        waiting = [asyncio.create_task(coalescer.submit(n)) for n in (1, 2)]
        await settle()
        with pytest.raises(OverloadedError, match="2 requests wait"):
            await coalescer.submit(3)
        waiting[0].cancel()
        await settle()
        taken = asyncio.create_task(coalescer.submit(4))
        call.gate.set()
        assert await asyncio.gather(running, waiting[1], taken) == [0, 4, 8]

    asyncio.run(scenario())


def test_a_batch_is_no_heavier_than_allowed_and_a_single_heavy_item_is_served_alone() -> None:
    async def scenario() -> None:
        call = Recorder()
        coalescer = Coalescer(call, max_weight=10, weigh=lambda item: item)
        await asyncio.gather(*(coalescer.submit(n) for n in (4, 5, 3, 50, 7, 3)))
        assert call.batches == [[4, 5], [3], [50], [7, 3]]

    asyncio.run(scenario())


def test_a_call_runs_in_a_context_of_its_own() -> None:
    request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")

    async def scenario() -> list[str | Exception]:
        async def reading(items: list[int]) -> list[str | Exception]:
            return [request_id.get() for _ in items]

        coalescer: Coalescer[int, str] = Coalescer(reading, max_weight=10)

        async def client(n: int) -> str:
            request_id.set(f"request-{n}")
            return await coalescer.submit(n)

        return list(await asyncio.gather(*(client(n) for n in range(3))))

    assert asyncio.run(scenario()) == ["none"] * 3


def test_whoever_gets_no_result_in_time_stops_waiting_and_the_others_go_on() -> None:
    async def scenario() -> None:
        call = Recorder(gated=True)
        coalescer = Coalescer(call, max_weight=1, max_in_flight=1, limit_s=0.2)
        running = asyncio.create_task(coalescer.submit(1))
        taken = asyncio.create_task(coalescer.submit(2))
        await asyncio.sleep(0.15)
        patient = asyncio.create_task(coalescer.submit(3))
        for late in (running, taken):
            with pytest.raises(TimeoutError):
                await late
        call.gate.set()
        assert await patient == 6
        assert call.batches == [[1], [3]]

    asyncio.run(scenario())


def test_closing_answers_those_who_were_accepted_and_refuses_the_rest() -> None:
    async def scenario() -> None:
        call = Recorder(gated=True)
        coalescer = Coalescer(call, max_weight=2, max_in_flight=1)
        accepted = [asyncio.create_task(coalescer.submit(n)) for n in range(5)]
        await settle()
        closing = asyncio.create_task(coalescer.close())
        await settle()
        with pytest.raises(ShuttingDownError):
            await coalescer.submit(9)
        call.gate.set()
        await closing
        assert await asyncio.gather(*accepted) == [0, 2, 4, 6, 8]

    asyncio.run(scenario())


class Crowd:
    """Clients that come and go, and a call that answers when it is let."""

    def __init__(self, max_in_flight: int, max_weight: int, patience_s: float) -> None:
        self.max_in_flight = max_in_flight
        self.gates: list[asyncio.Event] = []
        self.sizes: list[int] = []
        self.clients: dict[asyncio.Task[int], int] = {}
        self.coalescer = Coalescer(
            self.call, max_weight=max_weight, max_in_flight=max_in_flight, patience_s=patience_s, max_waiting=8
        )

    async def call(self, items: list[int]) -> list[int | Exception]:
        gate = asyncio.Event()
        self.gates.append(gate)
        self.sizes.append(len(items))
        assert self.coalescer.in_flight <= self.max_in_flight
        await gate.wait()
        if any(item % 7 == 6 for item in items):
            raise OSError("gone")
        return [item if item % 5 else ValueError(item) for item in items]

    async def step(self, happening: str, number: int) -> None:
        match happening:
            case "submit":
                self.clients[asyncio.create_task(self.coalescer.submit(number))] = number
            case "leave" if self.clients:
                list(self.clients)[number % len(self.clients)].cancel()
            case "release" if self.gates:
                self.gates[number % len(self.gates)].set()
            case _:
                await settle()

    async def finish(self) -> None:
        while self.coalescer.in_flight or any(not task.done() for task in self.clients):
            await settle()
            for gate in self.gates:
                gate.set()
        await settle()

    def wrong_answers(self) -> list[tuple[int, object]]:
        expected = OSError | ValueError | OverloadedError
        ended = [(task, number) for task, number in self.clients.items() if not task.cancelled()]
        failed = [(number, task.exception()) for task, number in ended if task.exception() is not None]
        served = [(number, task.result()) for task, number in ended if task.exception() is None]
        return [each for each in failed if not isinstance(each[1], expected)] + [
            (number, result) for number, result in served if result != number
        ]


@given(
    st.lists(
        st.tuples(st.sampled_from(["submit", "leave", "run", "release"]), st.integers(0, 30)),
        max_size=60,
    ),
    st.integers(1, 4),
    st.integers(1, 12),
    st.sampled_from([0.0, 1e-4, 60.0]),
)
def test_whatever_the_order_of_arrivals_departures_and_failures_everybody_gets_their_own_answer(
    happenings: list[tuple[str, int]], max_in_flight: int, max_weight: int, patience_s: float
) -> None:
    async def scenario() -> None:
        crowd = Crowd(max_in_flight, max_weight, patience_s)
        for happening, number in happenings:
            await crowd.step(happening, number)
        await asyncio.wait_for(crowd.finish(), timeout=10)  # a hang is a failure, not a long wait
        assert crowd.wrong_answers() == []
        assert max(crowd.sizes, default=0) <= max_weight
        assert (crowd.coalescer.in_flight, crowd.coalescer.waiting) == (0, 0)

    asyncio.run(scenario())
