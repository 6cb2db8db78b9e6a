"""The ladder: what answers when a part of the way fails, and how the answer says so.

1. The online store doesn't answer: features are those that the request gave, the others null
   (`Rung.FEATURES`). A model that was trained with nulls still says something.
2. A version can't be loaded, raises, or gives no finite number: the control variant's version,
   then the last version that answered, does (`Rung.VERSION`).
3. None does: the mean prediction that the version had in training (`Rung.PRIOR`), one constant.
4. Not even that is known: an error, never a made-up number.

A version that failed isn't asked again for a while, so that a broken one costs one request's
time, not every request's. An answer by any rung is marked, in the HTTP answer and in the
prediction log: it is no exposure of its variant.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import UnservableModelError

FloatArray = NDArray[np.float64]

_logger = logging.getLogger("heliostat.serving")


class Rung(StrEnum):
    """What took the place of the normal way."""

    FEATURES = "stored_features_unavailable"
    VERSION = "other_version"
    PRIOR = "prior"


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores, and who gave them.

    Attributes:
        scores: Shape ``(n,)``, all finite.
        version: The version that answered, or whose prior did.
        rung: None if the version that was asked answered.
    """

    scores: FloatArray
    version: int
    rung: Rung | None = None


class VersionLadder:
    """Asks version after version for scores until one answers. Remembers who failed.

    Args:
        prior: The mean prediction of a version, or None if it isn't known.
        skip_s: How long a version that failed isn't asked again, seconds.
    """

    def __init__(self, prior: Callable[[str, int], Awaitable[float | None]], *, skip_s: float = 2.0) -> None:
        self._prior, self._skip_s = prior, skip_s
        self._skipped_until: dict[tuple[str, int], float] = {}
        self._answered_last: dict[str, int] = {}

    async def climb(
        self,
        model: str,
        version: int,
        score: Callable[[int], Awaitable[FloatArray]],
        *,
        control: int,
        rows: int,
        until: float,
    ) -> Scored:
        """Scores of one version, or of the next that can give them.

        Args:
            model: The model's name.
            version: The version that should answer.
            score: Gives the scores of a version, shape ``(rows,)``; may raise anything.
            control: The version of the control variant: the first to stand in.
            rows: How many scores are expected.
            until: When to stop waiting, on the event loop's clock, seconds.

        Raises:
            UnservableModelError: If no version answers and no prior is known.
        """
        loop = asyncio.get_running_loop()
        candidates = list(dict.fromkeys((version, control, self._answered_last.get(model, version))))
        reason = "it failed a moment ago"
        for at, candidate in enumerate(candidates):
            now = loop.time()
            if now >= until or self._is_skipped(model, candidate, now):
                continue
            # Who could stand in gets its share of the time as well.
            share = (until - now) if at == len(candidates) - 1 else (until - now) / 2
            try:
                async with asyncio.timeout_at(now + share):
                    scores = await score(candidate)
                if scores.shape != (rows,) or not np.isfinite(scores).all():
                    problem = f"it gave no finite number for each of {rows} rows"
                    self._note_failure(model, candidate, problem)
                    continue
            except Exception as error:  # noqa: BLE001 - whatever a model does, the request is answered
                reason = str(error) or type(error).__name__
                self._note_failure(model, candidate, reason)
                continue
            self._answered_last[model] = candidate
            return Scored(scores, candidate, None if candidate == version else Rung.VERSION)
        for candidate in candidates:
            prior = await self._prior(model, candidate)
            if prior is not None:
                return Scored(np.full(rows, prior), candidate, Rung.PRIOR)
        raise UnservableModelError(model, version, reason)

    def _is_skipped(self, model: str, version: int, now: float) -> bool:
        until = self._skipped_until.get((model, version))
        if until is None:
            return False
        if until <= now:
            del self._skipped_until[model, version]
        return until > now

    def _note_failure(self, model: str, version: int, reason: str) -> None:
        self._skipped_until[model, version] = asyncio.get_running_loop().time() + self._skip_s
        _logger.warning("version %d of model %s can't answer: %s", version, model, reason)
