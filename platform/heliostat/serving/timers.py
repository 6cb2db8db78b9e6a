"""Many time limits of the same length, one timer of the event loop.

Hardly any limit is ever reached, and yet a timer of the loop costs 4 µs to set and to cancel: three of them were a
tenth of what a request costs us. Limits of the same length are due in the order in which they began, so that one
timer, for the oldest, is enough for all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")

# A loop's clock may be read a moment before the instant for which it rang.
_EARLY_S = 0.001


class Interruption:
    """A block that others may end: their cancellation of its task comes out as an error, anybody else's as it is.

    Args:
        error: What is raised.
    """

    __slots__ = ("_error", "_made", "_task")

    def __init__(self, error: type[Exception]) -> None:
        self._error, self._task, self._made = error, asyncio.current_task(), False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Whether it was this one alone, which is over then.
        if kind is asyncio.CancelledError and self._made and self._task is not None and self._task.uncancel() == 0:
            raise self._error from None

    def make(self) -> None:
        """End it."""
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


class Limits:
    """Calls that are due after the same delay. Belongs to the event loop that first uses it.

    Args:
        delay_s: How long after they were asked for, seconds.

    Attributes:
        delay_s: The same.
    """

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self._waiting: deque[Due] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def call(self, call: Callable[[], object]) -> Due:
        """Make a call when the delay is over, unless it is cancelled until then."""
        loop, waiting = asyncio.get_running_loop(), self._waiting
        while waiting and waiting[0].is_over:
            waiting.popleft()
        due = Due(loop.time() + self.delay_s, call)
        waiting.append(due)
        if self._timer is None:
            self._timer = loop.call_at(due.at, self._ring)
        return due

    async def keep(self, work: Awaitable[T]) -> T:
        """What some work gives, cancelled when the delay is over; to be awaited by a task of its own.

        Raises:
            TimeoutError: If it was cancelled for that.
        """
        with Interruption(TimeoutError) as giving_up:
            due = self.call(giving_up.make)
            try:
                return await work
            finally:
                due.cancel()

    def _ring(self) -> None:
        loop, waiting = asyncio.get_running_loop(), self._waiting
        self._timer = None
        now = loop.time() + _EARLY_S
        while waiting and (waiting[0].is_over or waiting[0].at <= now):
            waiting.popleft().make()
        if waiting:
            self._timer = loop.call_at(waiting[0].at, self._ring)
