"""Versions that answer at once say what they say when they are waited for, and fail as they fail there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from heliostat.serving.answers import PredictAnswer
from heliostat.serving.breaker import BreakerRule, State
from heliostat.serving.fallback import Refusal, Rung, breaker_name
from heliostat.serving.scoring import ScoreQuery
from tests.unit.serving.collaborators import NAMES, House, request, split

IDS = (1, 2, 3, 404, *range(10, 40))
NULLS = np.full((1, len(NAMES)), np.nan)


def asked(house: House, times: int = 1, *, at_once: tuple[int, ...] = (1, 2)) -> list[PredictAnswer]:
    """Answers about everybody, one request after the other; these versions answer on the event loop."""

    async def scenario() -> list[PredictAnswer]:
        for version in at_once:
            await house.runner(ScoreQuery("churn", version, NULLS))
            house.runner._held["churn", version].proving = 0
        found = [await house.predictor.predict(request(*IDS)) for _ in range(times)]
        await house.predictor.close()
        return found

    return asyncio.run(scenario())


def told(answer: PredictAnswer) -> list[tuple[object, ...]]:
    names = ("entity_id", "score", "variant", "version", "missing", "absent", "fallback")
    return [tuple(getattr(entity, name) for name in names) for entity in answer.entities]


def raising(house: House, version: int) -> list[int]:
    """Have a version raise on the event loop, whenever it answers there; the rows of its calls."""
    calls: list[int] = []
    at_once = house.predictor._scorer._at_once
    assert at_once is not None

    def broken(matrix: np.ndarray) -> np.ndarray:
        calls.append(len(matrix))
        raise RuntimeError("broken")

    def instead(model: str, asked: int, rows: int) -> Callable[[np.ndarray], np.ndarray] | None:
        score = at_once(model, asked, rows)
        return score if score is None or asked != version else broken

    house.predictor._scorer._at_once = instead
    return calls


def raising_when_waited_for(house: House, version: int) -> None:
    """Have a version raise whenever it is waited for."""
    runner = house.predictor._scorer._runner

    async def broken(query: ScoreQuery) -> np.ndarray:
        if query.version == version:
            raise RuntimeError("broken")
        return await runner(query)

    house.predictor._scorer._runner = broken


def split_of_the_same_features(house: House) -> None:
    house.store.publish(split(2))


def split_of_other_features(house: House) -> None:
    house.store.publish(split(2))
    house.versions.names[2] = NAMES[::-1]


def one_version(_: House) -> None:
    """As it is."""


@pytest.mark.parametrize("setting", [one_version, split_of_the_same_features, split_of_other_features])
def test_what_is_said_at_once_is_what_is_said_when_it_is_waited_for(setting: Callable[[House], None]) -> None:
    quick, slow = House(), House()
    for house in (quick, slow):
        setting(house)
    waited: list[ScoreQuery] = []

    async def never(query: ScoreQuery) -> np.ndarray:
        waited.append(query)
        raise AssertionError(query)

    quick.predictor._scorer._runner = never
    (at_once,), (later,) = asked(quick), asked(slow, at_once=())
    assert waited == []
    assert told(at_once) == told(later)
    assert [each["features"] for each in quick.stream.entries()] == [
        each["features"] for each in slow.stream.entries()
    ]


@pytest.mark.parametrize("setting", [split_of_the_same_features, split_of_other_features])
@pytest.mark.parametrize("at_once", [(1,), (2,)])
def test_of_two_versions_one_may_answer_at_once_and_one_later(
    setting: Callable[[House], None], at_once: tuple[int, ...]
) -> None:
    mixed, slow = House(), House()
    for house in (mixed, slow):
        setting(house)
    (found,), (expected,) = asked(mixed, at_once=at_once), asked(slow, at_once=())
    assert told(found) == told(expected)
    assert {each.version for each in found.entities} == {1, 2}


def test_a_version_that_raises_at_once_fails_as_one_does_that_is_waited_for() -> None:
    quick, slow = House(), House()
    for house in (quick, slow):
        house.store.publish(split(2))
    raising(quick, 2)
    raising_when_waited_for(slow, 2)
    (at_once,), (later,) = asked(quick), asked(slow, at_once=())
    assert told(at_once) == told(later)
    assert at_once.predictions.causes == later.predictions.causes
    assert {each.fallback for each in at_once.entities} == {None, Rung.CONTROL}


def test_versions_that_would_answer_at_once_are_told_what_stands_in_for_the_store() -> None:
    found = []
    for at_once in ((1, 2), ()):
        house = House()
        house.store.publish(split(2))
        house.versions.medians = dict.fromkeys((1, 2), tuple(float(at) for at in range(len(NAMES))))
        house.catalog["churn"] = split(2)
        house.store.down = True
        found += [told(answer) for answer in asked(house, at_once=at_once)]
    assert found[0] == found[1]
    assert {fallback for *_, fallback in found[0]} == {Rung.MEDIANS}


def test_a_version_that_answered_at_once_isnt_asked_by_other_definitions() -> None:
    house = House()
    house.store.publish(split(2))
    house.versions.stale[2] = ("usage@1",)
    (answer,) = asked(house)
    assert {each.version for each in answer.entities} == {1}
    assert {each.fallback for each in answer.entities} == {None, Rung.CONTROL}


def test_a_version_that_raises_at_once_is_asked_once_a_batch_until_its_breaker_opens() -> None:
    house = House(rule=BreakerRule(failures=3, open_s=1e9, max_open_s=1e9))
    house.store.publish(split(2))
    calls = raising(house, 2)
    for answer in asked(house, times=5):
        for entity in answer.entities:
            expected = Rung.CONTROL if entity.variant == "challenger" else None
            assert (entity.fallback, entity.version) == (expected, 1)
    assert len(calls) == 3
    assert house.breakers.of(breaker_name("churn", 2)).state is State.OPEN


def test_a_version_that_failed_before_is_tried_where_it_can_be_waited_for() -> None:
    house = House(rule=BreakerRule(failures=1, open_s=0.0, max_open_s=0.0))
    house.store.publish(split(2))
    calls = raising(house, 2)
    first, second, third = asked(house, times=3)
    healthy = House()
    healthy.store.publish(split(2))
    assert told(second) == told(*asked(healthy))
    assert {each.fallback for each in first.entities} == {None, Rung.CONTROL}
    assert {each.fallback for each in second.entities} == {None}, "by the waiting way, which isn't broken"
    assert {each.fallback for each in third.entities} == {None, Rung.CONTROL}, "its breaker is closed again"
    assert len(calls) == 2


@pytest.mark.parametrize(("scores", "found"), [([0.1, np.nan], Refusal), ([0.1], Refusal), ([0.1, 0.2], np.ndarray)])
def test_what_is_said_at_once_has_to_be_finite_numbers(scores: list[float], found: type) -> None:
    house = House(rule=BreakerRule(failures=1))
    ladder = house.predictor._scorer._ladder
    answer = ladder.ask_at_once("churn", 1, lambda: np.array(scores), rows=2)
    assert type(answer) is found
    state = house.breakers.of(breaker_name("churn", 1)).state
    assert state is (State.OPEN if found is Refusal else State.CLOSED)
    if found is Refusal:
        assert ladder.ask_at_once("churn", 1, lambda: np.array([0.1, 0.2]), rows=2) is None, "its breaker is open"
