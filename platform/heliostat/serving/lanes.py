"""Calls that may take long, or for ever, in threads of their own.

A thread of a shared pool that hangs is one less for everybody; here it is one less for the model that
hangs. Threads are made for a call and end with it (0.1 ms): what comes here takes longer than that.
They are daemons: one that never ends doesn't keep the process from ending.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from heliostat.errors import HungModelError

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a blocking call gives, from a thread of its own; whoever is cancelled leaves it behind.

    Raises:
        Exception: Whatever the call raises.
    """
    return await _started(call, *args, **kwargs)


def _started(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type] # the call's own
        elif isinstance(error, StopIteration):  # the one exception that a future refuses
            future.set_exception(RuntimeError("the call raised StopIteration"))
        else:
            future.set_exception(error)

    def run() -> None:
        result, raised = None, None
        try:
            result = call(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
            raised = error
        try:
            loop.call_soon_threadsafe(settle, result, raised)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    threading.Thread(target=run, name=getattr(call, "__qualname__", "call"), daemon=True).start()
    return future


class Lane:
    """The threads of one model version: so many calls at once. Belongs to one event loop.

    Args:
        name: Of the version, as errors name it.
        at_once: Calls at once; more wait for their turn.
    """

    def __init__(self, name: str, *, at_once: int = 2) -> None:
        self._name, self._at_once = name, at_once
        self._free = asyncio.Semaphore(at_once)
        self._hanging = 0

    @property
    def hanging(self) -> int:
        """Calls that nobody waits for any more and that haven't ended."""
        return self._hanging

    async def call(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a blocking call gives.

        Raises:
            HungModelError: At once, if as many calls hang as there may be.
            Exception: Whatever the call raises.
        """
        if self._hanging >= self._at_once:
            raise HungModelError(self._name, self._hanging)
        await self._free.acquire()
        future = _started(call, *args, **kwargs)
        future.add_done_callback(self._ended)
        try:
            # Shielded: that somebody gave up doesn't end the thread, and its place is free only when it ends.
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not future.done():
                self._hanging += 1
                future.add_done_callback(self._came_back)
            raise

    def _ended(self, future: asyncio.Future[T]) -> None:
        self._free.release()
        if not future.cancelled():
            future.exception()  # read, or asyncio complains when whoever waited has left

    def _came_back(self, _: asyncio.Future[T]) -> None:
        self._hanging -= 1
