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


async def proved(house: House) -> None:
    """Have versions 1 and 2 loaded, so that they answer on the event loop."""
    for version in (1, 2):
        await house.runner(ScoreQuery("churn", version, NULLS))
        house.runner._held["churn", version].proving = 0


def asked(house: House, times: int = 1, *, waiting: bool = False) -> list[PredictAnswer]:
    """Answers about everybody, one request after the other."""

    async def scenario() -> list[PredictAnswer]:
        if not waiting:
            await proved(house)
        found = [await house.predictor.predict(request(*IDS)) for _ in range(times)]
        await house.predictor.close()
        return found

    return asyncio.run(scenario())


def told(answer: PredictAnswer) -> list[tuple[object, ...]]:
    names = ("entity_id", "score", "variant", "version", "missing", "absent", "fallback")
    return [tuple(getattr(entity, name) for name in names) for entity in answer.entities]


def raising(house: House, version: int) -> list[int]:
    """Have a version raise from now on, on the event loop; the rows of its calls."""
    calls: list[int] = []
    now = house.predictor._scorer._runner_now
    assert now is not None

    def broken(query: ScoreQuery) -> np.ndarray | None:
        if query.version != version:
            return now(query)
        calls.append(len(query.matrix))
        raise RuntimeError("broken")

    house.predictor._scorer._runner_now = broken
    return calls


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
    (at_once,), (later,) = asked(quick), asked(slow, waiting=True)
    assert waited == []
    assert told(at_once) == told(later)
    for left, right in zip(quick.stream.entries(), slow.stream.entries(), strict=True):
        assert left["features"] == right["features"]


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
    assert {each.fallback for each in first.entities} == {None, Rung.CONTROL}
    assert {each.fallback for each in second.entities} == {None}, "by the waiting way, which isn't broken"
    assert {each.fallback for each in third.entities} == {None, Rung.CONTROL}, "its breaker is closed again"
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (None, None),
        (np.array([0.1, np.nan]), Refusal),
        (np.array([0.1]), Refusal),
        (np.array([0.1, 0.2]), np.ndarray),
    ],
)
def test_what_isnt_done_at_once_blames_nobody_and_what_is_has_to_be_finite(
    scores: list[float] | None, found: type | None
) -> None:
    house = House(rule=BreakerRule(failures=1))
    given = None if scores is None else np.array(scores)
    answer = house.predictor._scorer._ladder.ask_now("churn", 1, lambda: given, rows=2)
    assert type(answer) is (type(None) if found is None else found)
    state = house.breakers.of(breaker_name("churn", 1)).state
    assert state is (State.OPEN if found is Refusal else State.CLOSED)
