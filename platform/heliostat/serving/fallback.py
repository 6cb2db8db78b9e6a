"""The ladder: what answers when a part of the way fails, and how the answer says so.

Features, when the online store doesn't answer, each entity by itself:

1. what this replica saw last of the entity, if that isn't too old (`Rung.LAST_SEEN`);
2. the training medians of the version that is asked (`Rung.MEDIANS`); nulls where it has none (`Rung.NULLS`).

What the request gives stays as it is. Scores, when a version can't be loaded, raises, takes too long or gives
no finite number:

3. the control's version (`Rung.CONTROL`);
4. the version that was in production before (`Rung.LAST_GOOD`);
5. the entity's batch prediction, if one is cached (`Rung.BATCH`);
6. the mean prediction that the version had in training (`Rung.PRIOR`), one constant;
7. not even that is known: an error, never a made-up number.

Settings say which rungs there are (`serving.feature_fallback`, `serving.fallback`). A version that failed
several times isn't asked for a while (see `heliostat.serving.breaker`). An answer by any rung is marked, in the
HTTP answer and in the prediction log: it is no exposure of its variant.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from heliostat.clock import US_PER_S, Clock, parse_instant_us
from heliostat.errors import UnservableModelError
from heliostat.errors.base import reason_of
from heliostat.serving.breaker import Breaker, Breakers, State
from heliostat.serving.telemetry import Board, cause_of
from heliostat.storage.online_store import OnlineKeys
from heliostat.timers import Deadlines

FloatArray = NDArray[np.float64]

_logger = logging.getLogger("heliostat.serving")


class Rung(StrEnum):
    """What took the place of the normal way, the nearest to it first."""

    LAST_SEEN = "last_seen_features"
    MEDIANS = "training_medians"
    NULLS = "stored_features_unavailable"
    CONTROL = "control"
    LAST_GOOD = "last_good_version"
    BATCH = "batch_prediction"
    PRIOR = "prior"

    @property
    def of_features(self) -> bool:
        """Whether it stands in for features; the others do for scores."""
        return self in (Rung.LAST_SEEN, Rung.MEDIANS, Rung.NULLS)

    @property
    def of_a_model(self) -> bool:
        """Whether a model gave the prediction, be it another one or with other features."""
        return self not in (Rung.BATCH, Rung.PRIOR)


FURTHER = {rung: place for place, rung in enumerate(Rung)}
"""How far a rung is from the normal way."""

EVERY_RUNG = tuple(rung for rung in Rung if not rung.of_features)


@dataclass(frozen=True, slots=True)
class Cached:
    """A batch prediction.

    Attributes:
        score: The prediction.
        version: The version that made it.
        age_s: How long ago its features were true, seconds.
    """

    score: float
    version: int
    age_s: float


class BatchCache:
    """Batch predictions that are cached in the online store.

    Args:
        read: Gives the values of keys, None where there is none.
        keys: The store's key names.
        clock: Tells how old they are.
    """

    def __init__(
        self, read: Callable[[Sequence[str]], Awaitable[list[bytes | None]]], keys: OnlineKeys, clock: Clock
    ) -> None:
        self._read, self._keys, self._clock = read, keys, clock
        self._hits = self._misses = 0

    def report(self, board: Board) -> None:
        """Put into numbers how many predictions were there when they were needed."""
        board.set("heliostat_cache_total", "batch_predictions", "hit", value=self._hits)
        board.set("heliostat_cache_total", "batch_predictions", "miss", value=self._misses)

    async def __call__(self, model: str, entities: Sequence[str]) -> dict[int, Cached]:
        """The predictions that are there, by position.

        Raises:
            HeliostatError: If the store doesn't answer.
        """
        found = await self._read([self._keys.batch(model, entity) for entity in entities])
        now_us = self._clock.now_us()
        documents = [(row, orjson.loads(each)) for row, each in enumerate(found) if each is not None]
        self._hits += len(documents)
        self._misses += len(found) - len(documents)
        return {
            row: Cached(each["score"], each["version"], (now_us - parse_instant_us(each["as_of"])) / US_PER_S)
            for row, each in documents
        }


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores, and who gave them.

    Attributes:
        scores: Shape ``(n,)``, all finite.
        version: The version that answered, or whose prior did.
        rung: None if the version that was asked answered.
        cause: Why it didn't (see `heliostat.serving.telemetry.CAUSES`).
        cached: Batch predictions that are among the scores, by row.
    """

    scores: FloatArray
    version: int
    rung: Rung | None = None
    cached: Mapping[int, Cached] = field(default_factory=dict)
    cause: str | None = None


class Refusal(NamedTuple):
    """Why a version gave no scores.

    Attributes:
        reason: As a text.
        cause: In a word (see `heliostat.serving.telemetry.CAUSES`).
    """

    reason: str
    cause: str


class VersionLadder:
    """Asks version after version for scores until one answers, and then whatever else is known.

    Args:
        prior: The mean prediction of a version, or None if it isn't known.
        breakers: Remember which versions failed.
        rungs: What stands in, in this order.
        last_good: The versions that were in production before the one that is, the last one first.
        cached: Gives batch predictions by position in the entities; None: there are none.
    """

    def __init__(
        self,
        prior: Callable[[str, int], Awaitable[float | None]],
        breakers: Breakers,
        *,
        rungs: Sequence[Rung] = EVERY_RUNG,
        last_good: Callable[[str], tuple[int, ...]] | None = None,
        cached: Callable[[str, Sequence[str]], Awaitable[dict[int, Cached]]] | None = None,
    ) -> None:
        self._prior, self._breakers, self._rungs = prior, breakers, tuple(rungs)
        self._last_good, self._cached = last_good or (lambda _: ()), cached
        self._deadlines = Deadlines()

    def ask_at_once(
        self, model: str, version: int, score: Callable[[], FloatArray], *, rows: int
    ) -> FloatArray | Refusal | None:
        """A version's scores, shape ``(rows,)``, or why there are none; None if its breaker isn't closed.

        Args:
            model: The model's name.
            version: The version that should answer.
            score: Gives its scores; may raise anything.
            rows: How many scores are expected.
        """
        breaker = self._breakers.of(breaker_name(model, version))
        permit = breaker.enter() if breaker.state is State.CLOSED else None
        if permit is None:
            return None
        try:
            scores = score()
            _check(scores, rows)
        except Exception as error:  # noqa: BLE001 - whatever a model does, the request is answered
            return _refused(model, version, breaker, permit, error)
        breaker.succeeded(permit)
        return scores

    async def climb(
        self,
        model: str,
        version: int,
        score: Callable[[int], Awaitable[FloatArray]],
        *,
        control: int,
        entities: Callable[[], Sequence[str]],
        rows: int,
        until: float,
        refused: Refusal | None = None,
    ) -> Scored:
        """Scores of one version, or of the next that can give them.

        Args:
            model: The model's name.
            version: The version that should answer.
            score: Gives the scores of a version, shape ``(rows,)``; may raise anything.
            control: The version of the control variant.
            entities: Gives the keys of those who are asked about, ``rows`` of them.
            rows: How many scores are expected.
            until: When to stop waiting for models, on the event loop's clock, seconds.
            refused: Why the first version gave none, if it was asked already.

        Raises:
            UnservableModelError: If no rung has an answer.
        """
        candidates = list(self._candidates(model, version, control))
        first = Refusal("there was no time for it", "timeout")
        for at, (rung, candidate) in enumerate(candidates):
            found: FloatArray | Refusal | None = refused if at == 0 else None
            if found is None:
                last = at == len(candidates) - 1
                found = await self._ask(model, candidate, score, rows=rows, until=until, last=last)
            if isinstance(found, Refusal):
                first = found if at == 0 else first
            elif found is not None:
                return Scored(found, candidate, rung, cause=None if rung is None else first.cause)
        versions = [each for _, each in candidates]
        scored = await self._without_a_model(model, versions, entities, rows, until, first.reason)
        return replace(scored, cause=first.cause)

    def _candidates(self, model: str, version: int, control: int) -> Iterator[tuple[Rung | None, int]]:
        yield None, version
        told = {version}
        for rung in self._rungs:
            others = (control,) if rung is Rung.CONTROL else self._last_good(model) if rung is Rung.LAST_GOOD else ()
            for other in others:
                if other not in told:
                    told.add(other)
                    yield rung, other

    async def _ask(
        self,
        model: str,
        version: int,
        score: Callable[[int], Awaitable[FloatArray]],
        *,
        rows: int,
        until: float,
        last: bool,
    ) -> FloatArray | Refusal | None:
        """A version's scores; or why there are none; or None if there is no time to ask."""
        now = asyncio.get_running_loop().time()
        if now >= until:
            return None
        breaker = self._breakers.of(breaker_name(model, version))
        permit = breaker.enter()
        if permit is None:
            return Refusal(breaker.reason, "open")
        # Who could stand in gets its share of the time as well.
        share = (until - now) * (1.0 if last else 0.5)
        try:
            with self._deadlines.until(now + share):
                scores = await score(version)
            _check(scores, rows)
        except Exception as error:  # noqa: BLE001 - whatever a model does, the request is answered
            return _refused(model, version, breaker, permit, error)
        breaker.succeeded(permit)
        return scores

    async def _without_a_model(
        self,
        model: str,
        versions: list[int],
        entities: Callable[[], Sequence[str]],
        rows: int,
        until: float,
        reason: str,
    ) -> Scored:
        cached: dict[int, Cached] = {}
        # What models leave of their time, but at least a moment: it is a read, or known already.
        until = max(until, asyncio.get_running_loop().time() + 0.02)
        for rung in self._rungs:
            if rung is Rung.BATCH and self._cached is not None:
                try:
                    with self._deadlines.until(until):
                        cached = await self._cached(model, entities())
                except Exception as error:  # noqa: BLE001 - whatever is there, the next rung answers
                    _logger.warning("batch predictions of model %s can't be read: %s", model, reason_of(error))
                if len(cached) == rows:
                    return Scored(np.array([cached[row].score for row in range(rows)]), versions[0], rung, cached)
            if rung is Rung.PRIOR:
                for version in versions:
                    prior = await self._prior_of(model, version, until)
                    if prior is not None:
                        scores = np.full(rows, prior)
                        for row, each in cached.items():
                            scores[row] = each.score
                        return Scored(scores, version, rung, cached)
        raise UnservableModelError(model, versions[0], reason)

    async def _prior_of(self, model: str, version: int, until: float) -> float | None:
        try:
            with self._deadlines.until(until):
                return await self._prior(model, version)
        except TimeoutError:
            return None


def _check(scores: FloatArray, rows: int) -> None:
    if scores.shape != (rows,) or not np.isfinite(scores).all():
        raise ValueError(f"it gave no finite number for each of {rows} rows")


def _refused(model: str, version: int, breaker: Breaker, permit: int, error: Exception) -> Refusal:
    reason = reason_of(error)
    breaker.failed(permit, reason)
    _logger.warning("version %d of model %s can't answer: %s", version, model, reason)
    return Refusal(reason, cause_of(error))


def breaker_name(model: str, version: int) -> str:
    """The name of a model version's breaker."""
    return f"model {model}/{version}"
