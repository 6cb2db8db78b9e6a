from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from heliostat.errors import UnservableModelError
from heliostat.serving.breaker import BreakerRule, Breakers
from heliostat.serving.fallback import Cached, FloatArray, Rung, Scored, VersionLadder


class Models:
    """Versions that answer with their own number, or fail as they are told."""

    def __init__(self, **failing: BaseException | float) -> None:
        self.failing = {int(name.removeprefix("v")): how for name, how in failing.items()}
        self.asked: list[int] = []
        self.priors: dict[int, float] = {1: 0.1, 2: 0.2, 3: 0.3}

    async def score(self, version: int) -> FloatArray:
        self.asked.append(version)
        how = self.failing.get(version, float(version))
        if isinstance(how, BaseException):
            raise how
        if how < 0:  # it hangs
            await asyncio.Event().wait()
        return np.full(2, how)

    async def prior(self, _: str, version: int) -> float | None:
        return self.priors.get(version)


async def climb(
    ladder: VersionLadder, models: Models, version: int, *, control: int = 1, limit_s: float = 5
) -> Scored:
    until = asyncio.get_running_loop().time() + limit_s
    return await ladder.climb(
        "churn", version, models.score, control=control, entities=lambda: ["a", "b"], rows=2, until=until
    )


def ladder_of(models: Models, *, failures: int = 1, open_s: float = 1e9, **how: object) -> VersionLadder:
    rule = BreakerRule(failures, open_s, max(open_s, 1e9))
    return VersionLadder(models.prior, Breakers(rule), **how)  # type: ignore[arg-type] # as the test says


def test_the_version_that_is_asked_answers_unmarked() -> None:
    models = Models()
    scored = asyncio.run(climb(ladder_of(models), models, 2))
    assert (scored.scores.tolist(), scored.version, scored.rung) == ([2.0, 2.0], 2, None)
    assert models.asked == [2]


@pytest.mark.parametrize("how", [RuntimeError("broken"), MemoryError(), math.nan, math.inf])
def test_whatever_a_version_does_the_control_stands_in(how: BaseException | float) -> None:
    models = Models(v2=how)
    scored = asyncio.run(climb(ladder_of(models), models, 2))
    assert (scored.version, scored.rung) == (1, Rung.CONTROL)


def test_a_version_that_gives_another_number_of_scores_counts_as_broken() -> None:
    models = Models()

    async def scenario() -> Scored:
        until = asyncio.get_running_loop().time() + 5
        ladder = ladder_of(models)
        return await ladder.climb("churn", 2, models.score, control=2, entities=list, rows=3, until=until)

    assert asyncio.run(scenario()).rung is Rung.PRIOR


def test_after_the_control_the_version_that_was_in_production_before_stands_in() -> None:
    models = Models(v1=RuntimeError(), v2=RuntimeError())
    ladder = ladder_of(models, last_good=lambda _: (3, 4))
    scored = asyncio.run(climb(ladder, models, 2))
    assert (scored.version, scored.rung) == (3, Rung.LAST_GOOD)
    assert models.asked == [2, 1, 3]


def test_the_settings_say_which_rungs_there_are_and_in_which_order() -> None:
    models = Models(v2=RuntimeError())
    good = {"last_good": lambda _: (3,)}
    for rungs, found in [
        ((Rung.LAST_GOOD, Rung.CONTROL), (3, Rung.LAST_GOOD)),
        ((Rung.CONTROL, Rung.LAST_GOOD), (1, Rung.CONTROL)),
        ((Rung.PRIOR,), (2, Rung.PRIOR)),
    ]:
        scored = asyncio.run(climb(ladder_of(models, rungs=rungs, **good), models, 2))
        assert (scored.version, scored.rung) == found
    with pytest.raises(UnservableModelError):
        asyncio.run(climb(ladder_of(models, rungs=(), **good), models, 2))


def test_batch_predictions_stand_in_for_those_who_have_one_and_the_prior_for_the_others() -> None:
    models = Models(v1=RuntimeError())
    asked: list[list[str]] = []

    async def cached(model: str, entities: list[str]) -> dict[int, Cached]:
        asked.append([model, *entities])
        return {1: Cached(0.9, 7, 3_600.0)}

    async def scenario() -> Scored:
        ladder = ladder_of(models, cached=cached)
        assert (await climb(ladder, models, 2)).rung is None
        assert asked == [], "nobody reads them while a version answers"
        return await climb(ladder, models, 1)

    scored = asyncio.run(scenario())
    assert asked == [["churn", "a", "b"]]
    assert (scored.scores.tolist(), scored.rung, scored.cached[1].age_s) == ([0.1, 0.9], Rung.PRIOR, 3_600.0)


def test_when_all_have_a_batch_prediction_no_prior_is_needed() -> None:
    models = Models(v1=RuntimeError())
    models.priors = {}

    async def cached(_: str, entities: list[str]) -> dict[int, Cached]:
        return {row: Cached(0.5 + row, 7, 1.0) for row in range(len(entities))}

    scored = asyncio.run(climb(ladder_of(models, cached=cached), models, 1))
    assert (scored.scores.tolist(), scored.rung) == ([0.5, 1.5], Rung.BATCH)


def test_batch_predictions_that_cant_be_read_in_a_moment_are_passed_over() -> None:
    models = Models(v1=RuntimeError())

    async def hanging(*_: object) -> dict[int, Cached]:
        await asyncio.Event().wait()
        raise AssertionError

    scored = asyncio.run(climb(ladder_of(models, cached=hanging), models, 1, limit_s=0.05))
    assert (scored.scores.tolist(), scored.rung) == ([0.1, 0.1], Rung.PRIOR)


def test_a_version_that_failed_isnt_asked_again_for_a_while() -> None:
    models = Models(v2=RuntimeError())

    async def scenario() -> None:
        ladder = ladder_of(models)
        for _ in range(3):
            assert (await climb(ladder, models, 2)).version == 1
        assert models.asked == [2, 1, 1, 1]

    asyncio.run(scenario())


def test_a_version_that_recovered_answers_again_once_the_while_is_over() -> None:
    models = Models(v2=RuntimeError())

    async def scenario() -> None:
        ladder = ladder_of(models, open_s=0.0)
        assert (await climb(ladder, models, 2)).version == 1
        models.failing = {}
        assert (await climb(ladder, models, 2)).rung is None

    asyncio.run(scenario())


def test_a_version_that_hangs_leaves_time_for_the_control() -> None:
    models = Models(v2=-1.0)
    scored = asyncio.run(climb(ladder_of(models), models, 2, limit_s=0.4))
    assert (scored.version, scored.rung) == (1, Rung.CONTROL)


def test_when_time_is_up_the_prior_answers_at_once_and_nobody_is_blamed() -> None:
    models = Models()

    async def scenario() -> None:
        ladder = ladder_of(models)
        late = await climb(ladder, models, 2, limit_s=-1)
        assert (late.scores.tolist(), late.version, late.rung) == ([0.2, 0.2], 2, Rung.PRIOR)
        assert models.asked == []
        assert (await climb(ladder, models, 2)).rung is None

    asyncio.run(scenario())


def test_the_prior_of_the_version_that_was_asked_comes_before_the_controls() -> None:
    models = Models(v1=RuntimeError(), v2=RuntimeError())
    assert asyncio.run(climb(ladder_of(models), models, 2)).scores.tolist() == [0.2, 0.2]
    del models.priors[2]
    assert asyncio.run(climb(ladder_of(models), models, 2)).scores.tolist() == [0.1, 0.1]


def test_no_number_is_made_up() -> None:
    models = Models(v1=RuntimeError("the disk is gone"))
    models.priors = {}
    with pytest.raises(UnservableModelError, match="the disk is gone"):
        asyncio.run(climb(ladder_of(models), models, 1))
