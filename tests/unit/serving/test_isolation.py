"""One bad model beside a healthy one: the healthy one's requests don't notice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from heliostat.errors import ArtifactCorruptError, ModelTooLargeError
from heliostat.experiments.assignment import RoutingDocument
from heliostat.models.packaging import LoadedModel
from heliostat.serving.breaker import BreakerRule
from heliostat.serving.scoring import ModelRunner, ScoreQuery
from tests.unit.serving.collaborators import NAMES, House, Versions, request, trained

DEADLINE_MS = 1_000.0


class Bad:
    """A model that predicts as it is told."""

    def __init__(self, model: LoadedModel, predict: Callable[[np.ndarray], np.ndarray]) -> None:
        self.signature, self.package, self.predict = model.signature, model.package, predict


def house_with(bad: Callable[[str, int], object]) -> House:
    """Beside churn, which is healthy, a model `upsell` that is loaded by somebody else."""
    house = House(deadline_ms=DEADLINE_MS, rule=BreakerRule(3, 60.0, 60.0))
    house.store.publish(RoutingDocument.single("upsell", 1, revision=1))
    load = house.versions.load
    house.runner._load = lambda *which: bad(*which) if which[0] == "upsell" else load(*which)  # type: ignore[assignment, return-value]
    return house


def both(house: House) -> None:
    """Both models are asked at once: each is answered in time, the healthy one by itself and soon."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        await house.predictor.predict(request(1))
        spent: list[float] = []

        async def healthy() -> None:
            for _ in range(20):
                begin = loop.time()
                answer = await house.predictor.predict(request(1))
                spent.append(loop.time() - begin)
                assert answer.entities[0].fallback is None
                await asyncio.sleep(0.01)

        async def bad() -> None:
            for _ in range(6):
                answer = await house.predictor.predict(replace(request(1), model="upsell"))
                assert answer.entities[0].fallback == "prior"

        await asyncio.gather(healthy(), bad())
        assert max(spent) < DEADLINE_MS / 1e3 / 2

    asyncio.run(scenario())


def test_a_model_that_raises_takes_nobody_down() -> None:
    def raising(_: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError

    both(house_with(lambda *_: Bad(trained(1).load(), raising)))


def test_a_model_that_hangs_when_it_is_tried_takes_nobody_down() -> None:
    release = threading.Event()

    def hanging(_: np.ndarray) -> np.ndarray:
        release.wait()
        raise RuntimeError

    both(house_with(lambda *_: Bad(trained(1).load(), hanging)))
    release.set()


def test_a_model_that_hangs_while_it_is_loaded_takes_nobody_down() -> None:
    release = threading.Event()
    both(house_with(lambda *_: release.wait()))
    release.set()


def test_a_model_that_hangs_later_takes_nobody_down_where_every_call_is_made_in_a_thread() -> None:
    release, calls = threading.Event(), 0

    def hangs_later(matrix: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > 3:  # it has been tried by then
            release.wait()
        return np.zeros(len(matrix))

    house = house_with(lambda *_: Bad(trained(1).load(), hangs_later))
    house.runner._isolated = True
    both(house)
    assert house.runner._held["upsell", 1].lane.hanging <= 2
    release.set()


def test_a_model_that_hangs_on_real_features_only_takes_nobody_down() -> None:
    release = threading.Event()

    def hangs(matrix: np.ndarray) -> np.ndarray:
        if not np.isnan(matrix).all():  # as it is tried with
            release.wait()
        return np.zeros(len(matrix))

    house = house_with(lambda *_: Bad(trained(1).load(), hangs))
    both(house)
    assert house.runner._held["upsell", 1].lane.hanging <= 2
    release.set()


def test_a_version_is_asked_on_the_event_loop_once_it_has_shown_itself_on_real_features() -> None:
    versions, threads = Versions(), []

    async def scenario() -> None:
        runner = ModelRunner(versions.load)
        await runner(ScoreQuery("churn", 1, np.full((1, len(NAMES)), np.nan)))
        held = runner._held["churn", 1]
        predict = held.model.predict

        def watched(matrix: np.ndarray) -> np.ndarray:
            threads.append(threading.current_thread() is threading.main_thread())
            return predict(matrix)

        held.model.predict = watched  # type: ignore[method-assign, assignment]
        for value in [*([np.nan] * 3), *([0.0] * 34)]:
            await runner(ScoreQuery("churn", 1, np.full((1, len(NAMES)), value)))

    asyncio.run(scenario())
    assert threads == [False] * 35 + [True] * 2


def test_a_corrupt_artifact_takes_nobody_down() -> None:
    def corrupt(*_: object) -> LoadedModel:
        raise ArtifactCorruptError("abc", "/artifacts", "file 'model.txt' was changed")

    both(house_with(corrupt))


def test_a_model_that_is_larger_than_all_may_be_is_refused_and_drops_nobody() -> None:
    versions = Versions()

    async def scenario() -> None:
        runner = ModelRunner(versions.load, capacity_bytes=trained(1).memory_bytes)
        matrix = np.zeros((1, len(NAMES)))
        await runner(ScoreQuery("churn", 1, matrix))
        with pytest.raises(ModelTooLargeError, match="serving.model_memory_bytes"):
            await runner(ScoreQuery("churn", 3, matrix))
        await runner(ScoreQuery("churn", 1, matrix))
        assert versions.loads == [1, 3]
        assert runner.bytes_held == trained(1).memory_bytes

    asyncio.run(scenario())


def test_a_version_that_holds_up_the_event_loop_again_and_again_is_moved_to_threads() -> None:
    versions, threads = Versions(), set()

    async def scenario() -> None:
        runner = ModelRunner(versions.load)
        query = ScoreQuery("churn", 1, np.zeros((1, len(NAMES))))
        await runner(query)
        held = runner._held["churn", 1]
        held.proving = 0  # it has shown itself on real features
        predict = held.model.predict

        def slow(matrix: np.ndarray) -> np.ndarray:
            threads.add(threading.current_thread() is threading.main_thread())
            if True in threads and len(threads) == 1:
                threading.Event().wait(0.11)
            return predict(matrix)

        held.model.predict = slow  # type: ignore[method-assign, assignment]
        for _ in range(3):
            await runner(query)
        assert (threads, held.rows_on_loop) == ({True}, 0)
        await runner(query)
        assert threads == {True, False}

    asyncio.run(scenario())
