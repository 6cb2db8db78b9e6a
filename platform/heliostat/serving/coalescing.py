"""Many waiting requests, one call: the lever that makes a hop cheap.

A call takes with it everything that waits when it starts, and the next one starts when it is
done: the busier the service is, the larger its batches are, and nobody who comes alone waits for
a timer. Only when a call takes unusually long do others start beside it.

What goes wrong in such code, and is ruled out here: a result set on the future of a
client who has gone ends the drain task, and everybody hangs for ever; one failed item
fails its neighbours; an exception is swallowed and its waiters hang; unbounded calls in
flight form no batches at all; a task that outlives its request keeps that request's
context.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from heliostat.errors import BatchResultError, OverloadedError, ShuttingDownError
from heliostat.timers import Limits

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


# So often the event loop passes without a new item before a call starts; and after a call for one item alone.
_QUIET_PASSES, _LONELY_PASSES = 3, 1


@dataclass(slots=True, eq=False)
class _Waiter(Generic[ItemT, ResultT]):
    item: ItemT
    weight: int
    future: asyncio.Future[ResultT]


class Coalescer(Generic[ItemT, ResultT]):
    """Turns concurrent single calls into few batch calls.

    Belongs to the event loop that first submits to it.

    Args:
        call: Takes the items of a batch, gives as many results in the same order; a result that
            is an exception is raised to that item's waiter alone.
        max_weight: A batch's summed weight at most; a single heavier item is a batch of its own.
        max_in_flight: Calls under way at once, at most.
        patience_s: How long those who wait leave a call alone before another one starts beside it, seconds. Two
            calls at once are two small batches: for work on one processor that is no gain.
        max_waiting: Items that may wait; one more is refused.
        limit_s: How long an item's result is waited for, seconds; None: until it is there.
        weigh: The weight of an item, such as its number of entities; 1 by default.
    """

    def __init__(
        self,
        call: Callable[[list[ItemT]], Awaitable[Sequence[ResultT | Exception]]],
        *,
        max_weight: int,
        max_in_flight: int = 2,
        patience_s: float = 0.0,
        max_waiting: int = 1_024,
        limit_s: float | None = None,
        weigh: Callable[[ItemT], int] | None = None,
    ) -> None:
        self._call = call
        self._max_weight, self._max_in_flight, self._max_waiting = max_weight, max_in_flight, max_waiting
        self._weigh, self._patience_s = weigh, patience_s
        self._limits = None if limit_s is None else Limits(limit_s)
        self._started_at = -math.inf
        self._impatient: asyncio.TimerHandle | None = None
        self._waiting: deque[_Waiter[ItemT, ResultT]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._start_is_due = False
        self._lonely = False
        self._submitted = 0
        self._closed = False

    @property
    def waiting(self) -> int:
        """Items that no call has taken yet."""
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """Calls under way."""
        return len(self._running)

    async def submit(self, item: ItemT) -> ResultT:
        """Wait for one item's result.

        Cancelling the wait is safe at any time: an item that no call has taken yet is dropped.

        Args:
            item: Goes into a call.

        Raises:
            OverloadedError: If too many wait already.
            ShuttingDownError: After `close`.
            TimeoutError: If there is no result in time.
            Exception: Whatever the call raised, or gave as this item's result.
        """
        if self._closed:
            raise ShuttingDownError
        if len(self._waiting) >= self._max_waiting:
            self._forget_the_gone()
            if len(self._waiting) >= self._max_waiting:
                raise OverloadedError(len(self._waiting), self._max_waiting)
        loop = asyncio.get_running_loop()
        weight = 1 if self._weigh is None else self._weigh(item)
        waiter = _Waiter[ItemT, ResultT](item, weight, loop.create_future())
        self._waiting.append(waiter)
        self._submitted += 1
        self._start_soon(loop)
        if self._limits is None:
            return await waiter.future
        due = self._limits.call(partial(_expire, waiter.future))
        try:
            return await waiter.future
        finally:
            due.cancel()

    async def close(self) -> None:
        """Refuse new items and wait until the accepted ones are answered."""
        self._closed = True
        while self._running or self._waiting:
            self._start()
            if self._running:
                await asyncio.wait(self._running)

    def _start_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start calls after everything that is ready to run now had its chance to submit."""
        if len(self._running) >= self._max_in_flight:
            return
        if self._running and self._patience_s:
            self._impatient = self._impatient or loop.call_at(self._started_at + self._patience_s, self._start)
        elif not self._start_is_due:
            self._start_is_due = True
            loop.call_soon(self._start_when_quiet, self._submitted, _LONELY_PASSES if self._lonely else _QUIET_PASSES)

    def _start_when_quiet(self, waited: int, passes: int) -> None:
        """Start calls once the event loop has passed without bringing anything new.

        What has arrived already takes a few passes from its socket to here; where there is nothing, a pass
        takes microseconds.
        """
        arrived = self._submitted
        if arrived != waited:
            passes = _QUIET_PASSES
        if passes and len(self._waiting) < self._max_weight:
            asyncio.get_running_loop().call_soon(self._start_when_quiet, arrived, passes - 1)
        else:
            self._start()

    def _start(self) -> None:
        self._start_is_due = False
        if self._impatient is not None:
            self._impatient.cancel()
            self._impatient = None
        loop = asyncio.get_running_loop()
        while len(self._running) < self._max_in_flight:
            if self._running and loop.time() < self._started_at + self._patience_s:
                if self._waiting:
                    self._start_soon(loop)
                return
            batch = self._take()
            if not batch:
                return
            # A context of its own: the call serves many requests and may outlive the one that woke it.
            task = loop.create_task(self._run(batch), context=contextvars.Context())
            self._started_at, self._lonely = loop.time(), len(batch) == 1
            self._running.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if self._waiting:
            self._start_soon(asyncio.get_running_loop())

    def _take(self) -> list[_Waiter[ItemT, ResultT]]:
        batch: list[_Waiter[ItemT, ResultT]] = []
        weight = 0
        while self._waiting:
            waiter = self._waiting[0]
            if not waiter.future.done():
                if batch and weight + waiter.weight > self._max_weight:
                    break
                weight += waiter.weight
                batch.append(waiter)
            self._waiting.popleft()
        return batch

    def _forget_the_gone(self) -> None:
        self._waiting = deque(waiter for waiter in self._waiting if not waiter.future.done())

    async def _run(self, batch: list[_Waiter[ItemT, ResultT]]) -> None:
        try:
            results = await self._call([waiter.item for waiter in batch])
            if len(results) != len(batch):
                raise BatchResultError(len(batch), len(results))  # noqa: TRY301 - handled like the call's own
        except asyncio.CancelledError:
            for waiter in batch:
                waiter.future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to those who wait
            results = [error] * len(batch)
        for waiter, result in zip(batch, results, strict=True):
            if waiter.future.done():
                continue
            if isinstance(result, StopIteration):  # the one exception that a future refuses
                waiter.future.set_exception(RuntimeError("a batch call gave StopIteration as a result"))
            elif isinstance(result, Exception):
                waiter.future.set_exception(result)
            else:
                waiter.future.set_result(result)


def _expire(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())
