"""From a request to its predictions: look up, assign, score, log, answer. Plain asyncio.

Requests that wait at the same time go through the stages together: one read of the online
store, one call of each model version, one write of the prediction log for all of them (see
`heliostat.serving.coalescing`). Every stage gets its share of the deadline; what fails or is
late is replaced by the ladder of `heliostat.serving.fallback`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.clock import Clock
from heliostat.errors import (
    DeadlineError,
    DegradedAnswerError,
    DependencyOpenError,
    HeliostatError,
    UnknownAliasError,
    UnservableModelError,
)
from heliostat.errors.base import reason_of
from heliostat.serving.answers import FORCED, Explanation, PredictAnswer, Predictions
from heliostat.serving.batch_scorer import BatchScorer
from heliostat.serving.breaker import Breakers
from heliostat.serving.coalescing import Coalescer
from heliostat.serving.fallback import Rung, VersionLadder, breaker_name
from heliostat.serving.lookup import FeatureBlock, FeatureQuery, FeatureReaders
from heliostat.serving.prediction_log import PredictionLog, RouteChangedError, batch_record
from heliostat.serving.request_batch import RequestBatch, answers_of, deduplicated, joined_query
from heliostat.serving.requests import PredictRequest
from heliostat.serving.routing import Assignment, RouteQuery, SeenRoutes
from heliostat.serving.scoring import ScoreQuery
from heliostat.serving.shadows import Shadows
from heliostat.serving.spare_features import SpareFeatures
from heliostat.serving.telemetry import Meter, cause_of
from heliostat.serving.version_book import VersionBook, VersionFacts
from heliostat.storage.quick_commands import Held
from heliostat.timers import Deadlines

FloatArray = NDArray[np.float64]
_Lane = tuple[str, bool, bool, bool]

_logger = logging.getLogger("heliostat.serving")

# Of the time that is left when a batch starts, features are waited for until this share has
# passed, variants (which the process knows itself) and models until those; the rest is the log's.
_FEATURES_SHARE = 0.5
_VARIANTS_SHARE = 0.6
_MODELS_SHARE = 0.8
# Explanations are made while the log is written, and given up a little before the answer is.
_EXPLANATIONS_SHARE = 0.9
# A hundred rows take fifty times as long to explain as to score: many small requests mustn't make one late batch.
_EXPLAINED_AT_ONCE = 128
# A request with less than this share of its time left gets no place in a batch: it would hurry all others.
_TOO_LATE_SHARE = 0.2
# Of a model: a batch that waits for a store or a model that hangs mustn't hold up all others.
_BATCHES_AT_ONCE = 4
# The log's time ends a little before the request's: an answer that may go out unlogged still has to.
_LOG_SHARE = 0.95

STORE = "online store"
"""The name of the online store's breaker."""


@dataclass(frozen=True, slots=True)
class Stages:
    """What the predictor asks: objects of `lookup`, `routing` and `scoring`, or handles that lead to them.

    Attributes:
        features: Looks features up.
        router: Assigns variants.
        runner: Scores rows, shape ``(n,)``; or explains them.
        spare_router: Assigns variants when ``router`` doesn't answer.
        at_once: Gives what scores so many rows of a model's version without waiting, or None; None: nothing does.
    """

    features: Callable[[FeatureQuery], Awaitable[FeatureBlock]]
    router: Callable[[RouteQuery], Coroutine[Any, Any, Assignment]]
    runner: Callable[[ScoreQuery], Awaitable[FloatArray]]
    spare_router: Callable[[RouteQuery], Awaitable[Assignment]]
    at_once: Callable[[str, int, int], Callable[[FloatArray], FloatArray] | None] | None = None


@dataclass(slots=True, eq=False)
class _Waiting:
    request: PredictRequest
    deadline: float


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What is answered together, and until when."""

    requests: list[PredictRequest]
    query: FeatureQuery
    rows: NDArray[np.intp] | None
    since: float
    deadline: float
    marks: list[float]

    def until(self, share: float) -> float:
        """When a share of the time is over, on the event loop's clock, seconds."""
        return self.since + share * (self.deadline - self.since)


class Predictor:
    """Answers prediction requests. Belongs to one event loop.

    Args:
        stages: Features, router, runner.
        readers: Plans of what is looked up; gives nulls when the look-up fails.
        versions: Facts about model versions.
        log: Where predictions are made durable.
        clock: Tells the instant of features that couldn't be looked up.
        deadline_ms: How long a request may take, milliseconds.
        max_batch_entities: Entities that go through the stages together, at most.
        max_waiting: Requests of a model that may wait for their turn.
        patience_s: How long a batch may take before another one starts beside it, seconds.
        breakers: Remember what failed: model versions, and by `STORE` the online store, which guards itself.
        spares: Stand in for features; by default what was seen last and medians.
        ladder: Stands in for versions; by default without knowing any that was good before, or batch predictions.
        meter: Counts; by default for nobody.
    """

    def __init__(
        self,
        stages: Stages,
        readers: FeatureReaders,
        versions: VersionBook,
        log: PredictionLog,
        clock: Clock,
        *,
        deadline_ms: float = 1_000.0,
        max_batch_entities: int = 2_048,
        max_waiting: int = 256,
        patience_s: float = 0.01,
        breakers: Breakers | None = None,
        spares: SpareFeatures | None = None,
        ladder: VersionLadder | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._stages, self._readers, self._versions, self._log, self._clock = stages, readers, versions, log, clock
        self._deadline_ms = deadline_ms
        self._max_batch_entities, self._max_waiting, self._patience_s = max_batch_entities, max_waiting, patience_s
        self._breakers = breakers or Breakers()
        self._spares = spares or SpareFeatures(readers, clock)
        ladder = ladder or VersionLadder(versions.prior, self._breakers)
        self._scorer = BatchScorer(stages.runner, versions, ladder, self._spares, stages.at_once)
        self._shadows = Shadows(stages.runner, versions, readers, log, limit_s=deadline_ms / 1e3)
        self._meter = meter or Meter()
        self._meter.watch(self._lines)
        self._queues: dict[_Lane, Coalescer[_Waiting, PredictAnswer]] = {}
        self._names: dict[str, tuple[str, ...]] = {}
        self._routes = SeenRoutes()
        self._deadlines = Deadlines()

    async def predict(self, request: PredictRequest) -> PredictAnswer:
        """Answer a request; its predictions are in the log by then.

        Raises:
            DeadlineError: If there is no answer in time.
            OverloadedError: If too many wait already.
            UnknownAliasError: If no version of the model serves.
            UnservableModelError: If no version can answer and no prior is known.
            DegradedAnswerError: If only a fallback can answer, and the request wants none.
            UnknownVariantError: If the request forces a variant that there isn't.
            PredictionLogError: If the log can't be written, and that isn't allowed.
        """
        # Requests that want explanations wait for each other, and nobody else for them.
        lane = request.model, request.explain, request.strict, request.variant is not None
        queue = self._queues.get(lane)
        if queue is None:
            queue = self._queues[lane] = Coalescer(
                self._answer_in_time,
                max_weight=self._weight_of(request),
                max_in_flight=_BATCHES_AT_ONCE,
                patience_s=self._patience_s,
                max_waiting=self._max_waiting,
                limit_s=self._deadline_ms / 1e3,
                weigh=lambda waiting: len(waiting.request.entities),
            )
        deadline = asyncio.get_running_loop().time() + self._deadline_ms / 1e3
        try:
            return await queue.submit(_Waiting(request, deadline))
        except TimeoutError:
            raise DeadlineError(self._deadline_ms) from None

    def _lines(self) -> Iterator[tuple[str, int, int]]:
        """How many requests wait, and how many batches are under way, by model."""
        for model in {lane[0] for lane in self._queues}:
            lanes = [queue for lane, queue in self._queues.items() if lane[0] == model]
            yield f"predict {model}", sum(each.waiting for each in lanes), sum(each.in_flight for each in lanes)

    def _weight_of(self, request: PredictRequest) -> int:
        """How many entities a batch may have: who forces a variant is alone."""
        if request.variant is not None:
            return 1
        return min(self._max_batch_entities, _EXPLAINED_AT_ONCE) if request.explain else self._max_batch_entities

    async def warm_up(self, model: str) -> None:
        """Do for a model what its first request would wait for.

        Raises:
            UnknownAliasError: If no version of it serves.
            HeliostatError: If a version that serves can't be loaded.
        """
        route = await self._stages.spare_router(RouteQuery(model, None, ()))
        for version in dict.fromkeys(route.versions):
            await self.prepare(model, version)

    async def check(self, model: str) -> None:
        """Go the way of a request for a model, for nobody: features and route, variants, every version that serves.

        Raises:
            DeadlineError: If it takes longer than a request may.
            UnknownAliasError: If no version of it serves.
            HeliostatError: Whatever doesn't answer.
        """
        try:
            with self._deadlines.until(asyncio.get_running_loop().time() + self._deadline_ms / 1e3):
                block = await self._stages.features(FeatureQuery(model, self._looked_up(model), ()))
                route = await self._stages.router(RouteQuery(model, block.route, ()))
                for version in dict.fromkeys(route.versions):
                    await self.prepare(model, version)
        except TimeoutError:
            raise DeadlineError(self._deadline_ms) from None

    async def prepare(self, model: str, version: int) -> None:
        """Do for a version what its first request would wait for.

        Raises:
            HeliostatError: If it can't be loaded.
        """
        names = (await self._versions.usable(model, version)).names
        await self._stages.runner(ScoreQuery(model, version, np.full((1, len(names)), np.nan)))

    async def close(self) -> None:
        """Answer those who were accepted, and refuse the rest."""
        for queue in self._queues.values():
            await queue.close()
        await self._shadows.close()
        await self._log.close()

    async def _answer_in_time(self, waiting: list[_Waiting]) -> list[PredictAnswer | Exception]:
        now, limit_s = asyncio.get_running_loop().time(), self._deadline_ms / 1e3
        too_late = now + _TOO_LATE_SHARE * limit_s
        in_time = [each for each in waiting if each.deadline > too_late]
        if not in_time:
            return [DeadlineError(self._deadline_ms) for _ in waiting]
        requests = [each.request for each in in_time]
        marks = [now]
        try:
            answers = iter(await self._answer(requests, min(each.deadline for each in in_time), marks))
        finally:
            count = self._meter.of(requests[0].model).batch
            waited_s = [limit_s - each.deadline + now for each in in_time]
            rows = sum(len(each.entities) for each in requests)
            self._meter.later(partial(count, waited_s, rows=rows, marks_s=marks))
        return [next(answers) if each.deadline > too_late else DeadlineError(self._deadline_ms) for each in waiting]

    async def _answer(
        self, requests: list[PredictRequest], deadline: float, marks: list[float]
    ) -> list[PredictAnswer | Exception]:
        """Answers; ``marks`` takes the times, on the event loop's clock, at which stages were done."""
        model = requests[0].model
        query, rows = deduplicated(joined_query(model, self._looked_up(model), requests))
        asked = _Asked(requests, query, rows, asyncio.get_running_loop().time(), deadline, marks)
        given = self._given_alone(requests[0], query)
        if given is not None:
            try:
                return await self._answer_with(asked, given, checked=True)
            except (RouteChangedError, UnservableModelError):  # that was another route's version
                del marks[1:]
                asked = replace(asked, since=asyncio.get_running_loop().time())
        return await self._answer_with(asked, await self._features(query, until=asked.until(_FEATURES_SHARE)))

    async def _answer_with(
        self, asked: _Asked, block: FeatureBlock, *, checked: bool = False
    ) -> list[PredictAnswer | Exception]:
        """Answers; if ``checked``, only if the route holds when they are logged."""
        loop, marks, first = asyncio.get_running_loop(), asked.marks, asked.requests[0]
        marks.append(loop.time())
        assignment = await self._assign(asked.query, block, until=asked.until(_VARIANTS_SHARE), forced=first.variant)
        batch = RequestBatch(asked.requests, asked.query, block, assignment)
        batch = await self._widened(batch, until=asked.until(_MODELS_SHARE))
        marks.append(loop.time())
        predictions = await self._scorer.scored(batch, until=asked.until(_MODELS_SHARE))
        if asked.rows is not None:
            batch, predictions = batch.taken(asked.rows), predictions.taken(asked.rows)
        marks.append(loop.time())
        if first.strict and any(predictions.fallbacks):  # whoever shares a queue shares this
            self._meter.of(batch.model).fell_back(predictions.fallbacks, predictions.causes)
            return await self._refuse(batch, predictions, asked.deadline)
        answers = answers_of(batch, predictions)
        explaining: asyncio.Task[list[Explanation | str]] | None = None
        if first.explain:  # whoever shares a queue shares this
            until = asked.until(_EXPLANATIONS_SHARE)
            explaining = asyncio.create_task(self._scorer.explained(batch, predictions, until=until))
        try:
            logged = await self._log_answers(
                batch, answers, predictions, until=asked.until(_LOG_SHARE), route=block.route if checked else None
            )
            explanations = None if explaining is None else await explaining
        finally:
            if explaining is not None:
                explaining.cancel()
            marks.append(loop.time())
        meter = self._meter.of(batch.model)
        meter.fell_back(predictions.fallbacks, predictions.causes)
        meter.routed(assignment.revision, assignment.versions[0])
        columns = predictions.versions, predictions.variants, predictions.missing
        self._meter.later(partial(meter.predicted, *columns, logged=logged))
        if not logged:
            answers = [replace(answer, logged=False) for answer in answers]
        if explanations is not None:
            told = iter(explanations)
            answers = [replace(each, explanations=tuple(islice(told, len(each.entity_ids)))) for each in answers]
        self._shadows.start(batch)
        return [*answers]

    async def _log_answers(
        self,
        batch: RequestBatch,
        answers: list[PredictAnswer],
        predictions: Predictions,
        *,
        until: float,
        route: bytes | None,
    ) -> bool:
        """Log what is to be answered, as long as a route holds or (None) whichever does; says whether it is durable.

        Raises:
            RouteChangedError: If it doesn't.
            PredictionLogError: If it isn't durable, and that isn't allowed.
        """
        record, rows = batch_record(batch, answers, predictions, self._readers.given(batch.query)), len(predictions)
        if route is None:
            return await self._log.write([record], rows=rows, until=until)
        held, logged = Held(self._readers.keys.route(batch.model), route), False
        try:
            logged = await self._log.write([record], rows=rows, until=until, held=held)
        finally:
            self._routes.see(batch.model, route if logged else None)
        return logged

    async def _refuse(
        self, batch: RequestBatch, predictions: Predictions, deadline: float
    ) -> list[PredictAnswer | Exception]:
        """Errors for those requests that only a fallback could answer; answers for the others, by themselves."""
        found: list[PredictAnswer | Exception | None] = []
        first = 0
        for request in batch.requests:
            rows = range(first, first + len(request.entities))
            first = rows.stop
            worst = max((row for row in rows if predictions.fallbacks[row]), default=None)
            found.append(None if worst is None else self._refusal(batch, predictions, worst))
        clean = [request for request, error in zip(batch.requests, found, strict=True) if error is None]
        answers = iter(await self._answer(clean, deadline, []) if clean else ())
        return [next(answers) if error is None else error for error in found]

    def _refusal(self, batch: RequestBatch, predictions: Predictions, row: int) -> DegradedAnswerError:
        rung = Rung(str(predictions.fallbacks[row]))
        version = batch.assignment.versions[batch.assignment.chosen[row]]
        name = STORE if rung.of_features else breaker_name(batch.model, version)
        return DegradedAnswerError(batch.model, rung, f"the {name}", self._breakers.of(name).reason)

    # ── Features and variants ───────────────────────────────────────────────────────

    def _looked_up(self, model: str) -> tuple[str, ...]:
        """The features that are looked up for a model: those it declares, until a version that serves needs more."""
        names = self._names.get(model)
        if names is None:
            declared = self._readers.definitions
            names = self._names[model] = declared.lookup_names(declared.model(model).pinned_names)
        return names

    async def _features(self, query: FeatureQuery, *, until: float) -> FeatureBlock:
        try:
            with self._deadlines.until(until):
                block = await self._stages.features(query)
        except DependencyOpenError as error:
            return replace(self._spares.block(query), cause=cause_of(error))
        except Exception as error:  # noqa: BLE001 - whatever a stage does, the request is answered
            _logger.warning("features of model %s can't be read: %s", query.model, reason_of(error))
            return replace(self._spares.block(query), cause=cause_of(error))
        self._spares.keep(query, block)
        self._routes.see(query.model, block.route)
        return block

    def _given_alone(self, request: PredictRequest, query: FeatureQuery) -> FeatureBlock | None:
        """Features that requests give themselves, all of them, and the route as it was a moment ago.

        Whether it still is is seen when the predictions are logged: a round trip less. None if something else has to
        be read, if the log can't see that, or if what the route says may be an error. The request is one of them.
        """
        if not query.overrides or not self._log.checks or request.strict or request.variant is not None:
            return None
        route = self._routes.recent(query.model)
        if route is None:
            return None
        return self._readers.given_alone(query, as_of_us=self._clock.now_us(), route=route)

    async def _assign(
        self, query: FeatureQuery, block: FeatureBlock, *, until: float, forced: str | None = None
    ) -> Assignment:
        routing = RouteQuery(query.model, block.route, query.entities)
        try:
            found = await self._deadlines.keep(self._stages.router(routing), until)
        except UnknownAliasError:
            raise
        except DependencyOpenError:
            found = await self._stages.spare_router(routing)
        except Exception as error:  # noqa: BLE001 - whatever a stage does, the request is answered
            _logger.warning("the router of model %s doesn't answer: %s", query.model, reason_of(error))
            found = await self._stages.spare_router(routing)
        return found if forced is None else found.forced(query.model, forced, prefix=FORCED)

    async def _widened(self, batch: RequestBatch, *, until: float) -> RequestBatch:
        """Look up again if a version that serves needs more: once, after a version with other features went live."""
        needed = dict.fromkeys(batch.query.names)
        for version in set(batch.assignment.versions):
            facts = self._versions.known(batch.model, version) or await self._told_of(batch.model, version, until)
            if facts is not None and not facts.stale:
                needed.update(dict.fromkeys(facts.wanted))
        if len(needed) == len(batch.query.names):
            return batch
        names = self._names[batch.model] = tuple(needed)
        query = replace(batch.query, names=names)
        return replace(batch, query=query, block=await self._features(query, until=until))

    async def _told_of(self, model: str, version: int, until: float) -> VersionFacts | None:
        """Facts of a version that serves for the first time; None if it can't be asked: that is the ladder's."""
        if self._breakers.of(breaker_name(model, version)).is_shut_off:
            return None
        now = asyncio.get_running_loop().time()
        try:
            with self._deadlines.until(now + (until - now) / 2):
                return await self._versions.usable(model, version)
        except (HeliostatError, TimeoutError):
            return None
