"""How much waits in the streams for the sink, and since when.

Streams lie in the online server's memory. Where the sink doesn't run they grow until that is full, and nobody who
asks for predictions notices before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence

from heliostat.clock import US_PER_MS, US_PER_S, SystemClock
from heliostat.errors import HeliostatError
from heliostat.serving.telemetry import Board
from heliostat.storage.streams import AsyncStreams

_logger = logging.getLogger("heliostat.serving")

_EVERY_S = 10.0


class Backlog:
    """Looks at streams again and again, and puts into numbers what waits there. Belongs to one event loop.

    Args:
        streams: Reads them.
        names: Keys of streams, by what the numbers call them together.
        board: Takes the numbers.
    """

    def __init__(self, streams: AsyncStreams, names: Mapping[str, Sequence[str]], board: Board) -> None:
        self._streams, self._names, self._board = streams, names, board
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def start(self) -> None:
        """Look again and again, from now on."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._go_on())

    async def close(self) -> None:
        """Look no more; a look that has begun is ended, since redis' client swallows some cancellations."""
        self._closing.set()
        if self._task is not None:
            await self._task
            self._task = None

    async def refresh(self) -> None:
        """Look once.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        for name, keys in self._names.items():
            entries, oldest = await self._streams.backlog(keys)
            # Entries are named by the server's clock, and no replay moves that.
            waited_us = 0 if oldest is None else SystemClock().now_us() - oldest[0] * US_PER_MS
            self._board.set("heliostat_stream_entries", name, value=entries)
            self._board.set("heliostat_stream_age_seconds", name, value=max(0, waited_us) / US_PER_S)

    async def _go_on(self) -> None:
        while not self._closing.is_set():
            try:
                await self.refresh()
            except HeliostatError as error:
                _logger.debug("what waits in the streams isn't known: %s", error)
            except Exception:
                _logger.exception("looking at the streams failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EVERY_S):
                    await self._closing.wait()
