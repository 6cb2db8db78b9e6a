"""Many time limits, one timer of the event loop.

Hardly any limit is ever reached, and yet asyncio's own cost 9 µs each, most of it for a timer that is set and
cancelled: with seven a prediction they were a twentieth of what a lone one takes. Here the loop is asked to ring for
the limit that is due first, and what is over by then is passed by.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context
from functools import partial
from heapq import heappop, heappush
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

# A loop's clock may be read a moment before the instant for which it rang.
_EARLY_S = 0.001


class Interruption:
    """A block that others may end: their cancellation of its task comes out as an error, anybody else's as it is.

    Args:
        error: What is raised.
    """

    __slots__ = ("_before", "_error", "_made", "_task")

    def __init__(self, error: type[Exception]) -> None:
        self._error, self._made = error, False
        self._task = asyncio.current_task()
        self._before = 0 if self._task is None else self._task.cancelling()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._made or self._task is None:
            return
        # Whether it was this one alone, which is over then.
        if self._task.uncancel() <= self._before and kind is asyncio.CancelledError:
            raise self._error from None

    def make(self) -> None:
        """End it; from outside, while its task waits."""
        if self._task is not None:
            self._made = True
            self._task.cancel()


class Due:
    """One call that is due some day.

    Attributes:
        at: When, on the event loop's clock, seconds.
    """

    __slots__ = ("_call", "at")

    def __init__(self, at: float, call: Callable[[], object]) -> None:
        self.at = at
        self._call: Callable[[], object] | None = call

    @property
    def is_over(self) -> bool:
        """Whether it was made or cancelled."""
        return self._call is None

    def cancel(self) -> None:
        """Don't make it any more."""
        self._call = None

    def make(self) -> None:
        """Make it, unless it is over."""
        call, self._call = self._call, None
        if call is not None:
            call()


class Deadlines:
    """Calls that are due at any instants. Belongs to one event loop; to the next one, when that is over."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Due]] = []
        self._order = count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = math.inf

    def call_at(self, at: float, call: Callable[[], object]) -> Due:
        """Make a call at an instant, unless it is cancelled until then.

        Args:
            at: On the event loop's clock, seconds; at once, if that is over.
            call: Takes nothing.
        """
        loop, waiting = asyncio.get_running_loop(), self._waiting
        if loop is not self._loop:
            self._loop, self._timer, self._rings_at = loop, None, math.inf
            waiting.clear()
        while waiting and waiting[0][2]._call is None:  # is_over, without a call for it
            heappop(waiting)
        due = Due(at, call)
        heappush(waiting, (at, next(self._order), due))
        if waiting[0][0] < self._rings_at:
            self._set(loop, waiting[0][0])
        return due

    def until(self, at: float) -> Deadline:
        """A block of the running task that is given up at an instant, on the event loop's clock, seconds.

        ::

            with deadlines.until(at):
                await work()

        Raises:
            TimeoutError: In the block's place, if it was given up.
        """
        return Deadline(self, at)

    async def keep(self, work: Coroutine[Any, Any, T], at: float) -> T:
        """What some work gives, cancelled at an instant, on the event loop's clock, seconds.

        Work that waits for nothing has no limit, and costs none.

        Raises:
            TimeoutError: If it was cancelled for that.
        """
        try:
            waits_for = work.send(None)
        except StopIteration as done:
            found: T = done.value
            return found
        with self.until(at):
            return await _Begun(work, waits_for)

    def _set(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # A context of its own: it rings for many requests.
        self._timer, self._rings_at = loop.call_at(at, self._ring, context=Context()), at

    def _ring(self) -> None:
        loop, waiting = asyncio.get_running_loop(), self._waiting
        self._timer, self._rings_at = None, math.inf
        now = loop.time() + _EARLY_S
        try:
            while waiting and (waiting[0][0] <= now or waiting[0][2].is_over):
                heappop(waiting)[2].make()
        finally:  # one call that raises mustn't take the others along
            if waiting and waiting[0][0] < self._rings_at:  # a call may have set a timer of its own
                self._set(loop, waiting[0][0])


class Deadline(Interruption):
    """See `Deadlines.until`."""

    __slots__ = ("_due",)

    def __init__(self, deadlines: Deadlines, at: float) -> None:
        super().__init__(TimeoutError)
        self._due = deadlines.call_at(at, self.make)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._due.cancel()
        super().__exit__(kind, error, trace)


class Limits:
    """Calls that are due after the same delay. Belongs to one event loop, as `Deadlines` do.

    Args:
        delay_s: How long after they were asked for, seconds.

    Attributes:
        delay_s: The same.
    """

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self._deadlines = Deadlines()

    def call(self, call: Callable[[], object]) -> Due:
        """Make a call when the delay is over, unless it is cancelled until then."""
        return self._deadlines.call_at(asyncio.get_running_loop().time() + self.delay_s, call)

    def keep(self, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """What some work gives, cancelled when the delay, from this call on, is over (see `Deadlines.keep`)."""
        return self._deadlines.keep(work, asyncio.get_running_loop().time() + self.delay_s)


class _Begun(Awaitable[T]):
    """The rest of a coroutine that waits for something already."""

    def __init__(self, work: Coroutine[Any, Any, T], waits_for: object) -> None:
        self._work, self._waits_for = work, waits_for

    def __await__(self) -> Generator[Any, Any, T]:
        work, waits_for = self._work, self._waits_for
        while True:
            try:
                sent = yield waits_for
            except GeneratorExit:
                work.close()
                raise
            except BaseException as error:  # noqa: BLE001 - a cancellation: it is the work's
                step = partial(work.throw, error)
            else:
                step = partial(work.send, sent)
            try:
                waits_for = step()
            except StopIteration as done:
                found: T = done.value
                return found
            finally:
                del step  # it may hold an error whose traceback holds this frame
