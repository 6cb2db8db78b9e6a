from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from heliostat.errors import UnservableModelError
from heliostat.serving.fallback import FloatArray, Rung, Scored, VersionLadder


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
    return await ladder.climb("churn", version, models.score, control=control, rows=2, until=until)


def test_the_version_that_is_asked_answers_unmarked() -> None:
    models = Models()
    scored = asyncio.run(climb(VersionLadder(models.prior), models, 2))
    assert (scored.scores.tolist(), scored.version, scored.rung) == ([2.0, 2.0], 2, None)
    assert models.asked == [2]


@pytest.mark.parametrize("how", [RuntimeError("broken"), MemoryError(), math.nan, math.inf])
def test_whatever_a_version_does_the_control_stands_in(how: BaseException | float) -> None:
    models = Models(v2=how)
    scored = asyncio.run(climb(VersionLadder(models.prior), models, 2))
    assert (scored.version, scored.rung) == (1, Rung.VERSION)


def test_a_version_that_gives_another_number_of_scores_counts_as_broken() -> None:
    models = Models()

    async def scenario() -> Scored:
        until = asyncio.get_running_loop().time() + 5
        ladder = VersionLadder(models.prior)
        return await ladder.climb("churn", 2, models.score, control=2, rows=3, until=until)

    assert asyncio.run(scenario()).rung is Rung.PRIOR


def test_after_the_control_the_last_version_that_answered_stands_in() -> None:
    models = Models()

    async def scenario() -> Scored:
        ladder = VersionLadder(models.prior)
        await climb(ladder, models, 3)
        models.failing = {1: RuntimeError(), 2: RuntimeError()}
        return await climb(ladder, models, 2)

    scored = asyncio.run(scenario())
    assert (scored.version, scored.rung) == (3, Rung.VERSION)


def test_a_version_that_failed_isnt_asked_again_for_a_while() -> None:
    models = Models(v2=RuntimeError())

    async def scenario() -> None:
        ladder = VersionLadder(models.prior, skip_s=1e9)
        for _ in range(3):
            assert (await climb(ladder, models, 2)).version == 1
        assert models.asked == [2, 1, 1, 1]

    asyncio.run(scenario())


def test_a_version_that_recovered_answers_again_once_the_while_is_over() -> None:
    models = Models(v2=RuntimeError())

    async def scenario() -> None:
        ladder = VersionLadder(models.prior, skip_s=0.0)
        assert (await climb(ladder, models, 2)).version == 1
        models.failing = {}
        assert (await climb(ladder, models, 2)).rung is None

    asyncio.run(scenario())


def test_a_version_that_hangs_leaves_time_for_the_control() -> None:
    models = Models(v2=-1.0)
    scored = asyncio.run(climb(VersionLadder(models.prior), models, 2, limit_s=0.4))
    assert (scored.version, scored.rung) == (1, Rung.VERSION)


def test_when_time_is_up_the_prior_answers_at_once_and_nobody_is_blamed() -> None:
    models = Models()

    async def scenario() -> None:
        ladder = VersionLadder(models.prior)
        late = await climb(ladder, models, 2, limit_s=-1)
        assert (late.scores.tolist(), late.version, late.rung) == ([0.2, 0.2], 2, Rung.PRIOR)
        assert models.asked == []
        assert (await climb(ladder, models, 2)).rung is None

    asyncio.run(scenario())


def test_the_prior_of_the_version_that_was_asked_comes_before_the_controls() -> None:
    models = Models(v1=RuntimeError(), v2=RuntimeError())
    assert asyncio.run(climb(VersionLadder(models.prior), models, 2)).scores.tolist() == [0.2, 0.2]
    del models.priors[2]
    assert asyncio.run(climb(VersionLadder(models.prior), models, 2)).scores.tolist() == [0.1, 0.1]


def test_no_number_is_made_up() -> None:
    models = Models(v1=RuntimeError("the disk is gone"))
    models.priors = {}
    with pytest.raises(UnservableModelError, match="the disk is gone"):
        asyncio.run(climb(VersionLadder(models.prior), models, 1))
