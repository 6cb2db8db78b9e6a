"""Versions that answer nobody: scored and logged beside those that do, and never in their way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import numpy as np
from numpy.typing import NDArray

from heliostat.serving.answers import Predictions
from heliostat.serving.lookup import FeatureReaders
from heliostat.serving.prediction_log import PredictionLog, batch_record
from heliostat.serving.request_batch import RequestBatch, answers_of
from heliostat.serving.scoring import ScoreQuery
from heliostat.serving.version_book import VersionBook
from heliostat.timers import Deadlines

_logger = logging.getLogger("heliostat.serving")

SHADOW_NAME = "shadow"
"""The variant of predictions that answered nobody."""

_SHADOWS_AT_ONCE = 4


class Shadows:
    """Scores versions that answer nobody; drops what there is no time for. Belongs to one event loop.

    Args:
        runner: Scores rows, shape ``(n,)``.
        versions: Facts about model versions.
        readers: Tell what the requests gave themselves.
        log: Where predictions are made durable.
        limit_s: How long a batch may take, seconds.
    """

    def __init__(
        self,
        runner: Callable[[ScoreQuery], Awaitable[NDArray[np.float64]]],
        versions: VersionBook,
        readers: FeatureReaders,
        log: PredictionLog,
        *,
        limit_s: float,
    ) -> None:
        self._runner, self._versions, self._readers, self._log, self._limit_s = (
            runner,
            versions,
            readers,
            log,
            limit_s,
        )
        self._running: set[asyncio.Task[None]] = set()
        self._deadlines = Deadlines()

    def start(self, batch: RequestBatch) -> None:
        """Score what was answered, beside the answer; or nothing, if there is no time for it."""
        if not batch.assignment.shadow or not batch.block.stored or len(self._running) >= _SHADOWS_AT_ONCE:
            return
        task = asyncio.get_running_loop().create_task(self._score(batch))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Wait for those that are under way."""
        if self._running:
            await asyncio.wait(self._running)

    async def _score(self, batch: RequestBatch) -> None:
        until = asyncio.get_running_loop().time() + self._limit_s
        for version in batch.assignment.shadow:
            try:
                facts = await self._versions.usable(batch.model, version)
                matrix = batch.block.matrix(facts.wanted)
                with self._deadlines.until(until):
                    scores = await self._runner(ScoreQuery(batch.model, version, matrix, beside=True))
                shadow = Predictions.of(scores, [version] * len(scores), None, facts.names, matrix)
                shadow.variants = [SHADOW_NAME] * len(shadow)
                record = batch_record(batch, answers_of(batch, shadow), shadow, self._readers.given(batch.query))
                await self._log.write([record], rows=len(shadow), until=until)
            except Exception as error:  # noqa: BLE001 - a shadow never disturbs those who serve
                _logger.warning("shadow version %d of model %s isn't logged: %s", version, batch.model, error)
