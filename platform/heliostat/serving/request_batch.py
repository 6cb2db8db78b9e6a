"""Requests that are answered together: their entities are the rows of one batch, and whom several ask about is one.

An entity that is asked about more than once is looked up, assigned and scored once; its rows are given what was
found before anything is logged or answered. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from heliostat.features.request import UniformOverrides
from heliostat.serving.answers import PredictAnswer, Predictions
from heliostat.serving.fallback import Rung, Scored
from heliostat.serving.lookup import FeatureBlock, FeatureQuery
from heliostat.serving.requests import PredictRequest
from heliostat.serving.routing import Assignment
from heliostat.tracing import random_hex

# Few rows are done sooner than it is found out whether they are about the same entities; and so is a tenth of them.
_FEWEST_ROWS = 64
_WORTHWHILE_SHARE = 0.9


@dataclass(slots=True, eq=False)
class RequestBatch:
    """Requests that are answered together, and their entities row by row.

    Attributes:
        requests: In the order of their rows.
        query: What was looked up.
        block: What was found.
        assignment: Who is served by what.
    """

    requests: list[PredictRequest]
    query: FeatureQuery
    block: FeatureBlock
    assignment: Assignment

    @property
    def model(self) -> str:
        """The model's name."""
        return self.query.model

    def taken(self, rows: NDArray[np.intp]) -> RequestBatch:
        """Other rows: some of these, in any order, as often as wanted; two or more, of a query without overrides."""
        entities = itemgetter(*rows.tolist())(self.query.entities)
        query = replace(self.query, entities=entities)
        return RequestBatch(self.requests, query, self.block.taken(rows), self.assignment.taken(rows))


def joined_query(model: str, names: tuple[str, ...], requests: Sequence[PredictRequest]) -> FeatureQuery:
    """What some requests want to have looked up.

    Args:
        model: The requests'.
        names: Qualified features.
        requests: One or several.
    """
    if len(requests) == 1:
        return FeatureQuery(model, names, requests[0].entities, requests[0].overrides, requests[0].inputs)
    entities = tuple(itertools.chain.from_iterable(request.entities for request in requests))
    overrides = UniformOverrides.joined([request.overrides for request in requests])
    return FeatureQuery(
        model,
        names,
        entities,
        _joined(requests, lambda each: each.overrides) if overrides is None else overrides,
        _joined(requests, lambda each: each.inputs),
    )


def deduplicated(query: FeatureQuery) -> tuple[FeatureQuery, NDArray[np.intp] | None]:
    """The query about each entity once, and the row of it that each of its rows is; None: as it was given.

    Rows with values of their own, which a request gave, stay apart.
    """
    n = len(query.entities)
    if n < _FEWEST_ROWS or query.overrides or query.inputs:
        return query, None
    entities = tuple(dict.fromkeys(query.entities))
    if len(entities) > _WORTHWHILE_SHARE * n:
        return query, None
    places = dict(zip(entities, range(len(entities)), strict=True))
    rows = np.fromiter(map(places.__getitem__, query.entities), np.intp, count=n)
    return replace(query, entities=entities), rows


def answers_of(batch: RequestBatch, predictions: Predictions) -> list[PredictAnswer]:
    """Each request's part of the predictions, under a new name."""
    answers: list[PredictAnswer] = []
    first = 0
    for request in batch.requests:
        last = first + len(request.entities)
        part = predictions.part(first, last)
        served_by = set(part.versions)
        version = served_by.pop() if len(served_by) == 1 else batch.assignment.versions[0]
        answers.append(
            PredictAnswer(random_hex(16), request.model, version, batch.assignment.revision, request.entity_ids, part)
        )
        first = last
    return answers


def mark_stand_ins(
    predictions: Predictions,
    scored: Scored,
    block: FeatureBlock,
    rows: NDArray[np.intp] | None,
    spared: Sequence[Rung] | None,
) -> None:
    """Say of each row what stood in, for the version or for its features, and why.

    Args:
        predictions: Of some rows; it is told there.
        scored: What the ladder gave for them.
        block: Features of all rows.
        rows: Which of those it is about; None: all.
        spared: What stood in for features, by row of the predictions; None: nothing.
    """
    n = len(predictions)
    places = range(n) if rows is None else rows.tolist()
    ages: list[float | None] = [block.ages_s[row] if spared else None for row in places]
    for row in range(n):
        cached = scored.cached.get(row)
        if cached is not None:
            predictions.versions[row], predictions.fallbacks[row] = cached.version, Rung.BATCH
            ages[row] = cached.age_s
        elif predictions.fallbacks[row] is None and spared is not None:
            predictions.fallbacks[row] = spared[row]
    predictions.spared = [None] * n if spared is None else list(spared)
    predictions.ages_s = ages
    predictions.causes = [(block.cause if scored.rung is None else scored.cause) or "error"] * n


def _joined(
    requests: Sequence[PredictRequest], part: Callable[[PredictRequest], Mapping[int, Mapping[str, float]]]
) -> dict[int, Mapping[str, float]]:
    """What requests say of their rows, as of the rows of all of them."""
    joined: dict[int, Mapping[str, float]] = {}
    first = 0
    for request in requests:
        joined.update((first + at, values) for at, values in part(request).items())
        first += len(request.entities)
    return joined
