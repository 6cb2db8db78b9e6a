"""What models say of the requests that are answered together: predictions, and what they are made of.

Each row is scored by the version of its variant, all rows of a version in one call; who stands in for a version that
can't answer is the ladder's (`heliostat.serving.fallback`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import SignatureMismatchError
from heliostat.errors.base import reason_of
from heliostat.serving.answers import Explanation, Predictions
from heliostat.serving.fallback import Refusal, Rung, Scored, VersionLadder
from heliostat.serving.lookup import FeatureBlock, shown
from heliostat.serving.request_batch import RequestBatch, mark_stand_ins
from heliostat.serving.scoring import ScoreQuery
from heliostat.serving.spare_features import SpareFeatures
from heliostat.serving.version_book import VersionBook
from heliostat.timers import Deadlines

FloatArray = NDArray[np.float64]

_logger = logging.getLogger("heliostat.serving")


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What one version said of some rows, or who stood in for it.

    Attributes:
        rows: Which; None: all.
        scored: What was said.
        names: The features that were asked by.
        matrix: They, shape ``(n, len(names))``.
        spared: What stood in for features, row by row; None: nothing.
    """

    rows: NDArray[np.intp] | None
    scored: Scored
    names: tuple[str, ...]
    matrix: FloatArray
    spared: Sequence[Rung] | None = None

    def predictions(self, block: FeatureBlock) -> Predictions:
        """The same, a value an entity in each column; ``block`` has the features of all rows."""
        scored = self.scored
        versions = [scored.version] * len(self.matrix)
        found = Predictions.of(scored.scores, versions, scored.rung, self.names, self.matrix)
        if scored.rung is not None or not block.stored:
            mark_stand_ins(found, scored, block, self.rows, self.spared)
        return found


class BatchScorer:
    """Asks models about batches. Belongs to one event loop.

    Args:
        runner: Scores rows, shape ``(n,)``; or explains them.
        versions: Facts about model versions.
        ladder: Stands in for versions.
        spares: Stand in for features.
        at_once: Gives what scores so many rows of a model's version without waiting, or None; None: nothing does.
    """

    def __init__(
        self,
        runner: Callable[[ScoreQuery], Awaitable[FloatArray]],
        versions: VersionBook,
        ladder: VersionLadder,
        spares: SpareFeatures,
        at_once: Callable[[str, int, int], Callable[[FloatArray], FloatArray] | None] | None = None,
    ) -> None:
        self._runner, self._versions, self._ladder, self._spares = runner, versions, ladder, spares
        self._at_once = at_once
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
        of_rows = np.array(assignment.versions)[assignment.chosen]
        versions: list[int] = of_rows.tolist()
        distinct = dict.fromkeys(versions)
        rows: dict[int, NDArray[np.intp] | None] = dict.fromkeys(distinct)
        if len(distinct) > 1:
            rows = {version: (of_rows == version).nonzero()[0] for version in distinct}
        # What answers at once needs no task, and no limit, of its own; those that have to be waited for share theirs.
        found = [self._asked_at_once(batch, version, rows[version]) for version in distinct]
        parts = [each for each in found if isinstance(each, _Part)]
        late = [
            self._climbed(batch, version, rows[version], refused=each, until=until)
            for version, each in zip(distinct, found, strict=True)
            if not isinstance(each, _Part)
        ]
        if len(late) == 1:
            parts.append(await late[0])
        elif late:
            parts += await asyncio.gather(*late)
        predictions = _joined(parts, versions, batch.block)
        predictions.variants = [assignment.names[at] for at in assignment.chosen.tolist()]
        predictions.absent = batch.block.absent_views()
        return predictions

    def _asked_at_once(
        self, batch: RequestBatch, version: int, rows: NDArray[np.intp] | None
    ) -> _Part | Refusal | None:
        """What one version says of some rows or (None) of all, or why not; None if that has to be waited for."""
        facts, block = self._versions.known(batch.model, version), batch.block
        if self._at_once is None or facts is None or facts.stale or not block.stored:
            return None
        n = len(block.values) if rows is None else len(rows)
        score = self._at_once(batch.model, version, n)
        if score is None:
            return None
        try:
            matrix = block.matrix(facts.wanted, rows)
        except SignatureMismatchError:  # what stands in then is the ladder's
            return None
        scores = self._ladder.ask_at_once(batch.model, version, partial(score, matrix), rows=n)
        if scores is None or isinstance(scores, Refusal):
            return scores
        return _Part(rows, Scored(scores, version), facts.names, matrix)

    async def _climbed(
        self,
        batch: RequestBatch,
        version: int,
        rows: NDArray[np.intp] | None,
        *,
        refused: Refusal | None,
        until: float,
    ) -> _Part:
        """What one version says, or whoever stands in for it (at once if it ``refused``), of some rows or of all."""
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
            refused=refused,
        )
        if scored.rung is None or scored.rung.of_a_model:
            return _Part(rows, scored, *seen[scored.version], spared.get(scored.version))
        return _Part(rows, scored, tuple(map(shown, block.names)), block.matrix(block.names, rows))

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


def _joined(parts: Sequence[_Part], versions: list[int], block: FeatureBlock) -> Predictions:
    """Predictions of all rows.

    Args:
        parts: About some rows each, or one about all.
        versions: That should answer, row by row.
        block: Features of all rows.
    """
    first, *others = parts
    if not others:
        return first.predictions(block)
    plain = block.stored and all(each.scored.rung is None and each.names == first.names for each in parts)
    if not plain:
        rows = [each.rows for each in parts if each.rows is not None]
        return Predictions.merged([each.predictions(block) for each in parts], np.concatenate(rows))
    scores, matrix = np.empty(len(versions)), np.empty((len(versions), len(first.names)))
    for each in parts:
        scores[each.rows], matrix[each.rows] = each.scored.scores, each.matrix
    return Predictions.of(scores, versions, None, first.names, matrix)
