"""Whom several requests of a batch ask about is looked up, assigned and scored once, and nobody can tell."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from heliostat.errors import DegradedAnswerError
from heliostat.experiments.assignment import RoutingDocument
from heliostat.features.request import UniformOverrides
from heliostat.serving.answers import PredictAnswer
from heliostat.serving.lookup import FeatureQuery
from heliostat.serving.request_batch import deduplicated, joined_query
from heliostat.serving.scoring import ScoreQuery
from tests.unit.serving.collaborators import NAMES, House, request, split

EVERYBODY = (1, 2, 3, 404, *range(10, 26))
"""Twenty entities, of whom most are known to nobody."""


def together(house: House, asked: Sequence[tuple[int, ...]]) -> list[PredictAnswer]:
    """The answers to requests that come at the same time."""

    async def scenario() -> list[PredictAnswer]:
        found = await asyncio.gather(*(house.predictor.predict(request(*ids)) for ids in asked))
        await house.predictor.close()
        return list(found)

    return asyncio.run(scenario())


def crowd(n: int = 8) -> list[tuple[int, ...]]:
    """Requests about the same twenty entities, each in another order, one of them twice."""
    rng = np.random.default_rng(3)
    return [(*rng.permutation(EVERYBODY).tolist(), 2) for _ in range(n)]


def alone(setting: Callable[[House], None], asked: Sequence[tuple[int, ...]]) -> list[list[tuple[object, ...]]]:
    """What each entity is told when nobody else asks."""
    return [[told(one) for one in answer_of(setting, ids).entities] for ids in asked]


def answer_of(setting: Callable[[House], None], ids: tuple[int, ...]) -> PredictAnswer:
    house = House()
    setting(house)
    (answer,) = together(house, [ids])
    return answer


def told(entity: object) -> tuple[object, ...]:
    """All that an answer says of an entity but the prediction's name."""
    return tuple(getattr(entity, name) for name in ("entity_id", "score", "variant", "version", "missing", "absent"))


def with_a_split(house: House) -> None:
    house.store.publish(split(2))


def with_one_version(_: House) -> None:
    """As it is."""


@pytest.mark.parametrize("setting", [with_one_version, with_a_split])
def test_each_request_is_told_what_it_is_told_alone(setting: Callable[[House], None]) -> None:
    house = House()
    setting(house)
    answers = together(house, crowd())
    assert [[told(one) for one in answer.entities] for answer in answers] == alone(setting, crowd())


def test_an_entity_is_read_and_scored_once_for_all_who_ask() -> None:
    house = House()
    scored: list[int] = []
    runner = house.runner.__call__

    async def noting(query: ScoreQuery) -> np.ndarray:
        scored.append(len(query.matrix))
        return await runner(query)

    house.predictor._scorer._runner = noting
    together(house, crowd())
    (keys,) = house.store.reads
    assert (keys - 1) % len(EVERYBODY) == 0, "and the routing document"
    assert scored == [len(EVERYBODY)]


def test_every_row_is_in_the_log_under_its_own_name_with_what_it_was_told() -> None:
    house = House()
    with_a_split(house)
    answers = together(house, crowd())
    rows = {row["prediction_id"]: row for row in house.stream.entries()}
    every = list(itertools.chain.from_iterable(answer.entities for answer in answers))
    assert len(rows) == len(every) == 8 * 21
    for entity in every:
        row = rows[entity.prediction_id]
        assert (row["entity"], row["score"], row["variant"], row["version"]) == (
            str(entity.entity_id),
            entity.score,
            entity.variant,
            entity.version,
        )
    first, second = (next(row for row in rows.values() if row["entity"] == entity) for entity in ("1", "2"))
    assert first["features"] != second["features"]
    assert first["newest_event"] != second["newest_event"]


def test_a_shadow_has_a_row_for_each_row_that_was_answered() -> None:
    house = House()
    house.store.publish(RoutingDocument.single("churn", 1, revision=3, shadow=(2,)))
    together(house, crowd())
    shadows = [row["entity"] for row in house.stream.entries("shadow")]
    assert sorted(shadows) == sorted(str(each) for ids in crowd() for each in ids)


def test_without_the_store_each_row_says_what_stood_in() -> None:
    house = House()

    async def scenario() -> list[PredictAnswer]:
        await house.predictor.predict(request(1, 2, 3))
        house.store.down = True
        return list(await asyncio.gather(*(house.predictor.predict(request(*ids)) for ids in crowd())))

    for answer in asyncio.run(scenario()):
        document = answer.document(1.0)
        assert len(document["entities"]) == 21
        for entity in document["entities"]:
            known = entity["entity_id"] in (1, 2, 3)
            assert entity["fallback"] == ("last_seen_features" if known else "stored_features_unavailable")
            assert (entity["fallback_age_s"] is None) != known


def test_who_wants_no_fallback_is_refused_for_the_rows_it_asked_for() -> None:
    house = House()
    with_a_split(house)
    house.versions.broken = {2}
    by_control = [each for each in EVERYBODY if split(2).assign([str(each)])[0] == 0]
    spared = tuple(by_control[:4]) * 5

    async def scenario() -> list[PredictAnswer | BaseException]:
        asked = [spared, *crowd(4)]
        return list(
            await asyncio.gather(
                *(house.predictor.predict(replace(request(*ids), strict=True)) for ids in asked),
                return_exceptions=True,
            )
        )

    first, *others = asyncio.run(scenario())
    assert isinstance(first, PredictAnswer)
    assert [each.entity_id for each in first.entities] == list(spared)
    assert all(isinstance(each, DegradedAnswerError) for each in others)


def test_what_stood_in_is_counted_for_every_row_that_was_answered() -> None:
    house = House()
    with_a_split(house)
    house.versions.broken = {2}
    answers = together(house, crowd())
    fallbacks = [each.fallback for answer in answers for each in answer.entities]
    assert 0 < fallbacks.count("control") < len(fallbacks)
    counted = house.meter.board.value("heliostat_fallbacks_total", "churn", "control", "error")
    assert counted == fallbacks.count("control")


def test_rows_with_values_of_their_own_stay_apart() -> None:
    house = House()
    plain, own = request(*(1,) * 40), request(*(1,) * 40, count_30d=9.0)

    async def scenario() -> list[PredictAnswer]:
        return list(await asyncio.gather(house.predictor.predict(plain), house.predictor.predict(own)))

    first, second = asyncio.run(scenario())
    assert len({each.score for each in first.entities}) == 1
    assert [each.score for each in second.entities[1:]] == [first.entities[0].score] * 39
    assert next(itertools.islice(house.stream.entries(), 40, None))["features"][0] == 9.0


def test_few_rows_and_rows_that_differ_are_taken_as_they_are() -> None:
    few = FeatureQuery("churn", NAMES, ("1",) * 63)
    assert deduplicated(few) == (few, None)
    differing = FeatureQuery("churn", NAMES, tuple(map(str, range(100))))
    assert deduplicated(differing) == (differing, None)
    asked = replace(request(*(1, 2) * 40), inputs={0: {"amount": 1.0}})
    assert deduplicated(joined_query("churn", NAMES, [asked]))[1] is None
    uniform = replace(few, entities=("1",) * 80, overrides=UniformOverrides(("usage__mean",), np.ones((80, 1))))
    assert deduplicated(uniform)[1] is None


def test_rows_are_found_again_in_any_order() -> None:
    entities = tuple(str(each) for each in np.random.default_rng(1).integers(0, 50, 400))
    once, rows = deduplicated(FeatureQuery("churn", NAMES, entities))
    assert rows is not None
    assert len(set(once.entities)) == len(once.entities)
    assert tuple(once.entities[row] for row in rows.tolist()) == entities
