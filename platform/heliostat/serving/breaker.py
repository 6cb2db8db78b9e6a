"""Whether something that failed is worth asking again: a circuit breaker for each dependency.

        closed ──failures in a row──► open ──after a while──► half-open ──success──► closed
                                       ▲                          │
                                       └────────failure───────────┘   (and the while doubles)

While it is open nobody waits for the dependency; half-open, one call at a time tries it. The state
machine is pure, it is told the time; `guarded` puts it around a call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from heliostat.errors import DependencyOpenError, HeliostatError
from heliostat.errors.base import reason_of

QueryT = TypeVar("QueryT")
AnswerT = TypeVar("AnswerT")


class State(StrEnum):
    """Of a breaker."""

    CLOSED = "closed"
    HALF_OPEN = "half-open"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class BreakerRule:
    """When a breaker opens, and for how long.

    Attributes:
        failures: Failures in a row that open it.
        open_s: How long it is open at first, seconds; doubled each time that a trial fails.
        max_open_s: The longest that it is open, seconds.
    """

    failures: int = 3
    open_s: float = 1.0
    max_open_s: float = 30.0


class Breaker:
    """Whether one dependency may be asked. To be used by one thread.

    Whoever asks takes a permit and reports with it. A report that comes when the state has moved on, such as
    that of a call begun before the breaker opened, changes nothing; a permit that is never reported costs a
    half-open breaker one more ``open_s``.

    Args:
        name: Of the dependency, as errors and metrics name it.
        rule: When it opens.
        now: Tells the time, seconds, never backwards.
    """

    def __init__(
        self,
        name: str,
        rule: BreakerRule,
        now: Callable[[], float],
    ) -> None:
        self.name, self.reason = name, ""
        self._rule, self._now = rule, now
        self._state = State.CLOSED
        self._epoch = 0
        self._failures = 0
        self._open_s = rule.open_s
        self._until = 0.0

    @property
    def state(self) -> State:
        """As it is now; an open one that is due for a trial is still open."""
        return self._state

    @property
    def prospect(self) -> State:
        """What the next call would meet: of an open one that is due for a trial, half-open.

        Nobody asks a version again that was rolled back; it isn't to look shut off for ever.
        """
        return self._state if self._state is not State.OPEN or self._now() < self._until else State.HALF_OPEN

    @property
    def opens_in_s(self) -> float:
        """Seconds until the next trial; 0 if the dependency can be asked."""
        return 0.0 if self._state is State.CLOSED else max(0.0, self._until - self._now())

    @property
    def is_shut_off(self) -> bool:
        """Whether `enter` would refuse."""
        return self._state is not State.CLOSED and self._now() < self._until

    def enter(self) -> int | None:
        """A permit to ask the dependency; None if it isn't to be asked now."""
        if self._state is State.CLOSED:
            return self._epoch
        now = self._now()
        if now < self._until:
            return None
        # Open for long enough; or half-open, and whoever was to try never came back.
        self._until = now + self._open_s
        self._go(State.HALF_OPEN)
        return self._epoch

    def succeeded(self, permit: int) -> None:
        """The dependency answered."""
        if permit != self._epoch:
            return
        self._failures = 0
        if self._state is State.HALF_OPEN:
            self._open_s = self._rule.open_s
            self._go(State.CLOSED)

    def failed(self, permit: int, reason: str) -> None:
        """The dependency didn't answer, or not in time, or wrongly."""
        if permit != self._epoch:
            return
        self.reason = reason
        self._failures += 1
        if self._state is State.HALF_OPEN:
            self._open_s = min(2 * self._open_s, self._rule.max_open_s)
        elif self._failures < self._rule.failures:
            return
        self._until = self._now() + self._open_s
        self._go(State.OPEN)

    def _go(self, state: State) -> None:
        self._epoch += 1
        self._failures = 0
        self._state = state


class Breakers:
    """The breakers of a process, by dependency.

    Args:
        rule: Theirs.
        now: Tells the time, seconds, never backwards.
    """

    def __init__(self, rule: BreakerRule | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._rule, self._now = rule or BreakerRule(), now
        self._made: dict[str, Breaker] = {}

    def of(self, name: str) -> Breaker:
        """The breaker of a dependency."""
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = Breaker(name, self._rule, self._now)
        return made

    def states(self) -> dict[str, State]:
        """What the next call would meet, by name (`Breaker.prospect`)."""
        return {name: breaker.prospect for name, breaker in self._made.items()}


def guarded(
    call: Callable[[QueryT], Awaitable[AnswerT]], breaker: Breaker
) -> Callable[[QueryT], Coroutine[Any, Any, AnswerT]]:
    """A call that is refused at once while its breaker is open.

    It fails by any error that isn't the caller's own fault (a status below 500), and by being cancelled:
    nobody but a timeout cancels a call that serves a whole batch.

    Raises:
        DependencyOpenError: If the breaker is open; else what the call raises.
    """

    async def ask(query: QueryT) -> AnswerT:
        permit = breaker.enter()
        if permit is None:
            raise DependencyOpenError(breaker.name, round(breaker.opens_in_s, 3), breaker.reason)
        try:
            answer = await call(query)
        except asyncio.CancelledError:
            breaker.failed(permit, "it took too long")
            raise
        except Exception as error:
            if isinstance(error, HeliostatError) and error.http_status < 500:
                breaker.succeeded(permit)
            else:
                breaker.failed(permit, reason_of(error))
            raise
        breaker.succeeded(permit)
        return answer

    return ask
