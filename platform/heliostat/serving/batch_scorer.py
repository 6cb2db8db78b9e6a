"""What models say of the requests that are answered together: predictions, and what they are made of.

Each row is scored by the version of its variant, all rows of a version in one call; who stands in for a version that
can't answer is the ladder's (`heliostat.serving.fallback`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import numpy as np
from numpy.typing import NDArray

from heliostat.errors.base import reason_of
from heliostat.serving.answers import Explanation, Predictions
from heliostat.serving.fallback import Rung, VersionLadder
from heliostat.serving.lookup import shown
from heliostat.serving.request_batch import RequestBatch, mark_stand_ins
from heliostat.serving.scoring import ScoreQuery
from heliostat.serving.spare_features import SpareFeatures
from heliostat.serving.version_book import VersionBook
from heliostat.timers import Deadlines

FloatArray = NDArray[np.float64]

_logger = logging.getLogger("heliostat.serving")


class BatchScorer:
    """Asks models about batches. Belongs to one event loop.

    Args:
        runner: Scores rows, shape ``(n,)``; or explains them.
        versions: Facts about model versions.
        ladder: Stands in for versions.
        spares: Stand in for features.
    """

    def __init__(
        self,
        runner: Callable[[ScoreQuery], Awaitable[FloatArray]],
        versions: VersionBook,
        ladder: VersionLadder,
        spares: SpareFeatures,
    ) -> None:
        self._runner, self._versions, self._ladder, self._spares = runner, versions, ladder, spares
        self._deadlines = Deadlines()

    async def scored(self, batch: RequestBatch, *, until: float) -> Predictions:
        """A prediction a row; where the version that should give it can't, by the next rung of the ladder.

        Args:
            batch: Whose entities, features and variants.
            until: When to stop waiting for models, on the event loop's clock, seconds.

        Raises:
            UnservableModelError: If no rung has an answer.
        """
        assignment = batch.assignment
        versions = np.array(assignment.versions)[assignment.chosen]
        distinct = dict.fromkeys(versions.tolist())
        if len(distinct) == 1:
            predictions = await self._score_rows(batch, next(iter(distinct)), None, until=until)
        else:
            rows = {version: np.flatnonzero(versions == version) for version in distinct}
            parts = await asyncio.gather(
                *(self._score_rows(batch, version, each, until=until) for version, each in rows.items())
            )
            predictions = Predictions.merged(parts, np.concatenate(list(rows.values())))
        predictions.variants = [assignment.names[at] for at in assignment.chosen.tolist()]
        predictions.absent = batch.block.absent_views()
        return predictions

    async def _score_rows(
        self, batch: RequestBatch, version: int, rows: NDArray[np.intp] | None, *, until: float
    ) -> Predictions:
        """What one version says, or whoever stands in for it, of some rows or (None) of all."""
        seen: dict[int, tuple[tuple[str, ...], FloatArray]] = {}
        spared: dict[int, list[Rung]] = {}
        block, entities = batch.block, batch.query.entities

        async def score(candidate: int) -> FloatArray:
            facts = await self._versions.usable(batch.model, candidate)
            matrix = block.matrix(facts.wanted, rows)
            if not block.stored:
                matrix, spared[candidate] = self._spares.completed(
                    batch.query, block, matrix, names=facts.names, medians=facts.medians, rows=rows
                )
            seen[candidate] = facts.names, matrix
            return await self._runner(ScoreQuery(batch.model, candidate, matrix))

        scored = await self._ladder.climb(
            batch.model,
            version,
            score,
            control=batch.assignment.versions[0],
            entities=lambda: entities if rows is None else [entities[row] for row in rows],
            rows=len(entities) if rows is None else len(rows),
            until=until,
        )
        by_a_model = scored.rung is None or scored.rung.of_a_model
        if by_a_model:
            names, matrix = seen[scored.version]
        else:
            names, matrix = tuple(map(shown, block.names)), block.matrix(block.names, rows)
        predictions = Predictions.of(scored.scores, scored.version, scored.rung, names, matrix)
        if scored.rung is not None or not block.stored:
            mark_stand_ins(predictions, scored, block, rows, spared.get(scored.version) if by_a_model else None)
        return predictions

    async def explained(
        self, batch: RequestBatch, predictions: Predictions, *, until: float
    ) -> list[Explanation | str]:
        """What each prediction is made of, row by row; or, as a text, why that can't be said.

        Args:
            batch: As it was scored.
            predictions: What `scored` gave for it.
            until: When to give up, on the event loop's clock, seconds.
        """
        found: list[Explanation | str] = [
            f"no model answered, but the fallback {rung}" for rung in predictions.fallbacks
        ]
        for version in dict.fromkeys(predictions.versions):
            rows = [
                row
                for row, (each, rung) in enumerate(zip(predictions.versions, predictions.fallbacks, strict=True))
                if each == version and (rung is None or Rung(rung).of_a_model)
            ]
            if not rows:
                continue
            try:
                with self._deadlines.until(until):
                    facts = await self._versions.usable(batch.model, version)
                    matrix = np.array([predictions.vectors[row] for row in rows])
                    parts = await self._runner(ScoreQuery(batch.model, version, matrix, explain=True))
            except Exception as error:  # noqa: BLE001 - the prediction stands, whatever its explanation does
                _logger.warning("predictions of model %s can't be explained: %s", batch.model, reason_of(error))
                why = "there was no time for it" if isinstance(error, TimeoutError) else "the model gave none"
                for row in rows:
                    found[row] = why
                continue
            for row, (*contributions, base, raw) in zip(rows, parts.tolist(), strict=True):
                named = dict(zip(facts.names, contributions, strict=True))
                found[row] = Explanation(named, base, raw, facts.scale.name, facts.scale.prediction)
        return found
