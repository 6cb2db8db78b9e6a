"""From a request to its predictions: look up, assign, score, log, answer. Plain asyncio.

Requests that wait at the same time go through the stages together: one read of the online
store, one call of each model version, one write of the prediction log for all of them (see
`heliostat.serving.coalescing`). Every stage gets its share of the deadline; what fails or is
late is replaced by the ladder of `heliostat.serving.fallback`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.clock import Clock
from heliostat.errors import DeadlineError, HeliostatError, StaleVersionError, UnknownAliasError
from heliostat.models.packaging import AS_IT_IS, RawScale
from heliostat.serving.answers import Explanation, PredictAnswer, Predictions
from heliostat.serving.coalescing import Coalescer
from heliostat.serving.fallback import Rung, VersionLadder
from heliostat.serving.prediction_log import PredictionLog, log_record
from heliostat.serving.requests import PredictRequest
from heliostat.serving.stages import Assignment, FeatureBlock, FeatureQuery, FeatureReaders, RouteQuery, ScoreQuery

FloatArray = NDArray[np.float64]

_logger = logging.getLogger("heliostat.serving")

SHADOW_NAME = "shadow"
"""The variant of predictions that answered nobody."""

# Of the time that is left when a batch starts, features are waited for until this share has
# passed, models until that one; the rest is the log's.
_FEATURES_SHARE = 0.5
_MODELS_SHARE = 0.8
# Explanations are made while the log is written, and given up a little before the answer is.
_EXPLANATIONS_SHARE = 0.9
# A hundred rows take fifty times as long to explain as to score: many small requests mustn't make one late batch.
_EXPLAINED_AT_ONCE = 128
# A request with less than this share of its time left gets no place in a batch: it would hurry all others.
_TOO_LATE_SHARE = 0.2
_SHADOWS_AT_ONCE = 4
# Of a model: a batch that waits for a store or a model that hangs mustn't hold up all others.
_BATCHES_AT_ONCE = 4
_ANSWERED_BY_A_MODEL = (None, Rung.FEATURES, Rung.VERSION)


@dataclass(frozen=True, slots=True)
class Stages:
    """What the predictor awaits: objects of `heliostat.serving.stages`, or handles that lead to them.

    Attributes:
        features: Looks features up.
        router: Assigns variants.
        runner: Scores rows, shape ``(n,)``; or explains them.
        spare_router: Assigns variants when ``router`` doesn't answer.
    """

    features: Callable[[FeatureQuery], Awaitable[FeatureBlock]]
    router: Callable[[RouteQuery], Awaitable[Assignment]]
    runner: Callable[[ScoreQuery], Awaitable[FloatArray]]
    spare_router: Callable[[RouteQuery], Awaitable[Assignment]]


@dataclass(frozen=True, slots=True)
class VersionFacts:
    """What must be known of a version to ask for its scores, or to do without them.

    Attributes:
        names: Qualified features, in the order of its matrix.
        prior: Its mean prediction in training; None if nobody wrote it down.
        stale: Views that are declared otherwise now than when it was trained: it can't be asked.
        wanted: What is looked up for them: ``view@version__feature`` where it was trained on another version of
            a view than the highest; by default ``names``.
        scale: What contributions to its predictions are measured in.
    """

    names: tuple[str, ...]
    prior: float | None = None
    stale: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()
    scale: RawScale = AS_IT_IS

    def __post_init__(self) -> None:
        if not self.wanted:
            object.__setattr__(self, "wanted", self.names)


class VersionBook:
    """Facts about versions. A version never changes, so each is read once.

    Args:
        read: Reads a version's facts from the catalog; may block, and may raise.
    """

    def __init__(self, read: Callable[[str, int], VersionFacts]) -> None:
        self._read = read
        self._known: dict[tuple[str, int], VersionFacts] = {}

    async def usable(self, model: str, version: int) -> VersionFacts:
        """Facts about a version that can be asked.

        Raises:
            StaleVersionError: If its views are declared otherwise now.
            HeliostatError: If there is no such version, or the catalog can't be read.
        """
        facts = self._known.get((model, version)) or await self._facts(model, version)
        if facts.stale:
            raise StaleVersionError(model, version, facts.stale)
        return facts

    async def prior(self, model: str, version: int) -> float | None:
        """Its mean prediction, None if it isn't known."""
        try:
            return (await self._facts(model, version)).prior
        except HeliostatError:
            return None

    async def _facts(self, model: str, version: int) -> VersionFacts:
        known = self._known.get((model, version))
        if known is None:
            known = self._known[model, version] = await asyncio.to_thread(self._read, model, version)
        return known


@dataclass(slots=True, eq=False)
class _Waiting:
    request: PredictRequest
    deadline: float


@dataclass(slots=True, eq=False)
class _Batch:
    """Requests that are answered together, and their entities row by row."""

    requests: list[PredictRequest]
    query: FeatureQuery
    block: FeatureBlock
    assignment: Assignment

    @property
    def model(self) -> str:
        return self.query.model


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
    ) -> None:
        self._stages, self._readers, self._versions, self._log, self._clock = stages, readers, versions, log, clock
        self._deadline_ms = deadline_ms
        self._max_batch_entities, self._max_waiting, self._patience_s = max_batch_entities, max_waiting, patience_s
        self._ladder = VersionLadder(versions.prior)
        self._queues: dict[tuple[str, bool], Coalescer[_Waiting, PredictAnswer]] = {}
        self._names: dict[str, tuple[str, ...]] = {}
        self._shadows: set[asyncio.Task[None]] = set()

    async def predict(self, request: PredictRequest) -> PredictAnswer:
        """Answer a request; its predictions are in the log by then.

        Raises:
            DeadlineError: If there is no answer in time.
            OverloadedError: If too many wait already.
            UnknownAliasError: If no version of the model serves.
            UnservableModelError: If no version can answer and no prior is known.
            PredictionLogError: If the log can't be written, and that isn't allowed.
        """
        # Requests that want explanations wait for each other, and nobody else for them.
        lane = request.model, request.explain
        queue = self._queues.get(lane)
        if queue is None:
            queue = self._queues[lane] = Coalescer(
                self._answer_in_time,
                max_weight=min(self._max_batch_entities, _EXPLAINED_AT_ONCE if request.explain else sys.maxsize),
                max_in_flight=_BATCHES_AT_ONCE,
                patience_s=self._patience_s,
                max_waiting=self._max_waiting,
                weigh=lambda waiting: len(waiting.request.entities),
            )
        deadline = asyncio.get_running_loop().time() + self._deadline_ms / 1e3
        try:
            return await queue.submit(_Waiting(request, deadline), until=deadline)
        except TimeoutError:
            raise DeadlineError(self._deadline_ms) from None

    async def warm_up(self, model: str) -> None:
        """Do for a model what its first request would wait for.

        Raises:
            UnknownAliasError: If no version of it serves.
            HeliostatError: If a version that serves can't be loaded.
        """
        route = await self._stages.spare_router(RouteQuery(model, None, ()))
        for version in dict.fromkeys(route.versions):
            names = (await self._versions.usable(model, version)).names
            await self._stages.runner(ScoreQuery(model, version, np.full((1, len(names)), np.nan)))

    async def close(self) -> None:
        """Answer those who were accepted, and refuse the rest."""
        for queue in self._queues.values():
            await queue.close()
        if self._shadows:
            await asyncio.wait(self._shadows)
        await self._log.close()

    async def _answer_in_time(self, waiting: list[_Waiting]) -> list[PredictAnswer | Exception]:
        too_late = asyncio.get_running_loop().time() + _TOO_LATE_SHARE * self._deadline_ms / 1e3
        in_time = [each for each in waiting if each.deadline > too_late]
        if not in_time:
            return [DeadlineError(self._deadline_ms) for _ in waiting]
        answers = iter(await self._answer([each.request for each in in_time], min(each.deadline for each in in_time)))
        return [next(answers) if each.deadline > too_late else DeadlineError(self._deadline_ms) for each in waiting]

    async def _answer(self, requests: list[PredictRequest], deadline: float) -> list[PredictAnswer]:
        now = asyncio.get_running_loop().time()
        features_until, models_until = (now + share * (deadline - now) for share in (_FEATURES_SHARE, _MODELS_SHARE))
        query = self._query(requests)
        block = await self._features(query, until=features_until)
        assignment = await self._assign(query, block, until=models_until)
        batch = await self._widened(_Batch(requests, query, block, assignment), until=models_until)
        predictions = await self._score(batch, until=models_until)
        answers = _answers(batch, predictions)
        explaining: asyncio.Task[list[Explanation | str]] | None = None
        if requests[0].explain:  # whoever shares a queue shares this
            explaining = asyncio.create_task(
                self._explain(batch, predictions, until=now + _EXPLANATIONS_SHARE * (deadline - now))
            )
        try:
            logged = await self._log.write(
                [self._record(batch, answers, predictions)], rows=len(predictions), until=deadline
            )
            explanations = None if explaining is None else await explaining
        finally:
            if explaining is not None:
                explaining.cancel()
        if not logged:
            answers = [replace(answer, logged=False) for answer in answers]
        if explanations is not None:
            told = iter(explanations)
            answers = [replace(each, explanations=tuple(islice(told, len(each.entity_ids)))) for each in answers]
        self._start_shadows(batch)
        return answers

    # ── Features and variants ───────────────────────────────────────────────────────

    def _query(self, requests: list[PredictRequest]) -> FeatureQuery:
        model = requests[0].model
        names = self._names.get(model)
        if names is None:
            declared = self._readers.definitions
            names = self._names[model] = declared.lookup_names(declared.model(model).pinned_names)
        if len(requests) == 1:
            return FeatureQuery(model, names, requests[0].entities, requests[0].overrides, requests[0].inputs)
        overrides: dict[int, Mapping[str, float]] = {}
        inputs: dict[int, Mapping[str, float]] = {}
        first = 0
        for request in requests:
            overrides.update({first + at: values for at, values in request.overrides.items()})
            inputs.update({first + at: values for at, values in request.inputs.items()})
            first += len(request.entities)
        entities = tuple(itertools.chain.from_iterable(request.entities for request in requests))
        return FeatureQuery(model, names, entities, overrides, inputs)

    async def _features(self, query: FeatureQuery, *, until: float) -> FeatureBlock:
        try:
            async with asyncio.timeout_at(until):
                return await self._stages.features(query)
        except Exception as error:  # noqa: BLE001 - whatever a stage does, the request is answered
            _logger.warning("features of model %s can't be read: %s", query.model, _told(error))
            return self._readers.blank(query, as_of_us=self._clock.now_us())

    async def _assign(self, query: FeatureQuery, block: FeatureBlock, *, until: float) -> Assignment:
        routing = RouteQuery(query.model, block.route, query.entities)
        try:
            async with asyncio.timeout_at(until):
                return await self._stages.router(routing)
        except UnknownAliasError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a stage does, the request is answered
            _logger.warning("the router of model %s doesn't answer: %s", query.model, _told(error))
            return await self._stages.spare_router(routing)

    async def _widened(self, batch: _Batch, *, until: float) -> _Batch:
        """Look up again if a version that serves needs more: once, after a version with other features went live."""
        needed = dict.fromkeys(batch.query.names)
        for version in set(batch.assignment.versions):
            try:
                needed.update(dict.fromkeys((await self._versions.usable(batch.model, version)).wanted))
            except HeliostatError:
                continue  # it can't be asked; the ladder deals with that
        if len(needed) == len(batch.query.names):
            return batch
        names = self._names[batch.model] = tuple(needed)
        query = replace(batch.query, names=names)
        return replace(batch, query=query, block=await self._features(query, until=until))

    # ── Scores ──────────────────────────────────────────────────────────────────────

    async def _score(self, batch: _Batch, *, until: float) -> Predictions:
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
            predictions = _merged(parts, np.concatenate(list(rows.values())))
        predictions.variants = [assignment.names[at] for at in assignment.chosen.tolist()]
        predictions.absent = batch.block.absent_views()
        return predictions

    async def _score_rows(
        self, batch: _Batch, version: int, rows: NDArray[np.intp] | None, *, until: float
    ) -> Predictions:
        """What one version says, or whoever stands in for it, of some rows or (None) of all."""
        seen: dict[int, tuple[tuple[str, ...], FloatArray]] = {}

        async def score(candidate: int) -> FloatArray:
            facts = await self._versions.usable(batch.model, candidate)
            matrix = batch.block.matrix(facts.wanted, rows)
            seen[candidate] = facts.names, matrix
            return await self._stages.runner(ScoreQuery(batch.model, candidate, matrix))

        scored = await self._ladder.climb(
            batch.model,
            version,
            score,
            control=batch.assignment.versions[0],
            rows=len(batch.query.entities) if rows is None else len(rows),
            until=until,
        )
        nobody = tuple(map(_shown, batch.block.names)), batch.block.matrix(batch.block.names, rows)
        names, matrix = seen.get(scored.version) or nobody
        rung = scored.rung if scored.rung is not None or batch.block.stored else Rung.FEATURES
        return _predictions(scored.scores, scored.version, rung, names, matrix)

    async def _explain(self, batch: _Batch, predictions: Predictions, *, until: float) -> list[Explanation | str]:
        """What each prediction is made of, row by row; or, as a text, why that can't be said."""
        found: list[Explanation | str] = [
            f"no model answered, but the fallback {rung}" for rung in predictions.fallbacks
        ]
        for version in dict.fromkeys(predictions.versions):
            rows = [
                row
                for row, (each, rung) in enumerate(zip(predictions.versions, predictions.fallbacks, strict=True))
                if each == version and rung in _ANSWERED_BY_A_MODEL
            ]
            if not rows:
                continue
            try:
                async with asyncio.timeout_at(until):
                    facts = await self._versions.usable(batch.model, version)
                    matrix = np.array([predictions.vectors[row] for row in rows])
                    parts = await self._stages.runner(ScoreQuery(batch.model, version, matrix, explain=True))
            except Exception as error:  # noqa: BLE001 - the prediction stands, whatever its explanation does
                _logger.warning("predictions of model %s can't be explained: %s", batch.model, _told(error))
                why = "there was no time for it" if isinstance(error, TimeoutError) else "the model gave none"
                for row in rows:
                    found[row] = why
                continue
            for row, (*contributions, base, raw) in zip(rows, parts.tolist(), strict=True):
                named = dict(zip(facts.names, contributions, strict=True))
                found[row] = Explanation(named, base, raw, facts.scale.name, facts.scale.prediction)
        return found

    def _record(self, batch: _Batch, answers: list[PredictAnswer], predictions: Predictions) -> bytes:
        return log_record(
            answers,
            predictions,
            batch.query.entities,
            at_us=batch.block.as_of_us,
            given=self._readers.given(batch.query),
            inputs=batch.query.inputs,
            newest_us=batch.block.newest_us,
            traces=[each.trace for each in batch.requests],
        )

    def _start_shadows(self, batch: _Batch) -> None:
        """Score the versions that answer nobody, beside the answer; dropped when there is no time for it."""
        if not batch.assignment.shadow or not batch.block.stored or len(self._shadows) >= _SHADOWS_AT_ONCE:
            return
        task = asyncio.get_running_loop().create_task(self._score_shadows(batch))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _score_shadows(self, batch: _Batch) -> None:
        until = asyncio.get_running_loop().time() + self._deadline_ms / 1e3
        for version in batch.assignment.shadow:
            try:
                facts = await self._versions.usable(batch.model, version)
                matrix = batch.block.matrix(facts.wanted)
                async with asyncio.timeout_at(until):
                    scores = await self._stages.runner(ScoreQuery(batch.model, version, matrix))
                shadow = _predictions(scores, version, None, facts.names, matrix)
                shadow.variants = [SHADOW_NAME] * len(shadow)
                await self._log.write(
                    [self._record(batch, _answers(batch, shadow), shadow)], rows=len(shadow), until=until
                )
            except Exception as error:  # noqa: BLE001 - a shadow never disturbs those who serve
                _logger.warning("shadow version %d of model %s isn't logged: %s", version, batch.model, error)


def _shown(name: str) -> str:
    """``view__feature`` of what was looked up as ``view@version__feature``."""
    view, _, feature = name.partition("__")
    return f"{view.partition('@')[0]}__{feature}"


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


def _predictions(
    scores: FloatArray, version: int, rung: Rung | None, names: tuple[str, ...], matrix: FloatArray
) -> Predictions:
    """What one version, or whatever stood in for it, says of some rows."""
    n = len(matrix)
    nulls = np.isnan(matrix)
    missing: list[tuple[str, ...]] = [()] * n
    if nulls.any():
        missing = [tuple(itertools.compress(names, row)) for row in nulls.tolist()]
    return Predictions(scores.tolist(), [version] * n, [rung] * n, matrix, missing)


def _merged(parts: Sequence[Predictions], rows: NDArray[np.intp]) -> Predictions:
    """Parts that are about some rows each, two or more in all, as one about all of them, in order."""
    order = np.argsort(rows)
    in_order = itemgetter(*order.tolist())

    def column(name: str) -> list[Any]:
        return list(in_order(list(itertools.chain.from_iterable(getattr(part, name) for part in parts))))

    one_matrix = len({part.vectors[0].shape for part in parts}) == 1
    return Predictions(
        column("scores"),
        column("versions"),
        column("fallbacks"),
        np.concatenate([part.vectors for part in parts])[order] if one_matrix else column("vectors"),
        column("missing"),
    )


def _answers(batch: _Batch, predictions: Predictions) -> list[PredictAnswer]:
    answers: list[PredictAnswer] = []
    first = 0
    for request in batch.requests:
        last = first + len(request.entities)
        part = predictions.part(first, last)
        served_by = set(part.versions)
        version = served_by.pop() if len(served_by) == 1 else batch.assignment.versions[0]
        answers.append(
            PredictAnswer(
                secrets.token_hex(16), request.model, version, batch.assignment.revision, request.entity_ids, part
            )
        )
        first = last
    return answers
