"""Requests that bring all features: their route is what it was a moment ago, and the log sees whether it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from heliostat.errors import PredictionLogError, UnknownAliasError, UnknownVariantError, UnservableModelError
from heliostat.experiments.assignment import RoutingDocument
from heliostat.features.request import UniformOverrides
from heliostat.serving.prediction_log import PredictionLog
from heliostat.serving.requests import PredictRequest
from heliostat.serving.routing import SeenRoutes
from heliostat.serving.scoring import ScoreQuery
from tests.unit.serving.collaborators import NAMES, House, OnlineMemory, request, split, trained

VALUES = [[2.0, 30.0, 15.0, 4.0], [9.0, 5.0, 5.0, 2.0]]


def given(*entity_ids: int) -> PredictRequest:
    """A request that gives all features of every entity itself."""
    rows = [dict(zip(NAMES, VALUES[each % 2], strict=True)) for each in entity_ids]
    uniform = UniformOverrides.of(rows)
    assert uniform is not None
    return replace(request(*entity_ids), overrides=uniform)


def scores(version: int, *entity_ids: int) -> list[float]:
    found: list[float] = trained(version).load().predict(np.array([VALUES[each % 2] for each in entity_ids])).tolist()
    return found


def run(house: House, scenario: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await house.predictor.predict(given(1))  # it sees the route
        house.store.reads.clear()
        house.stream.records.clear()
        await scenario()

    asyncio.run(asyncio.wait_for(whole(), 20))


def test_nothing_is_read_once_the_route_was_seen_and_every_prediction_is_logged() -> None:
    house = House()

    async def scenario() -> None:
        for ids in ((1,), (2, 3)):
            answer = await house.predictor.predict(given(*ids))
            assert [each.score for each in answer.entities] == scores(1, *ids)
            assert (answer.version, answer.revision, answer.logged) == (1, 1, True)

    run(house, scenario)
    assert house.store.reads == []
    assert [entry["entity"] for entry in house.stream.entries()] == ["1", "2", "3"]


def test_a_promotion_is_served_with_the_very_next_request_and_the_log_has_what_was_answered_alone() -> None:
    house = House()

    async def scenario() -> None:
        house.store.publish(RoutingDocument.single("churn", 2, revision=2))
        answer = await house.predictor.predict(given(1, 2))
        assert [each.score for each in answer.entities] == scores(2, 1, 2)
        assert (answer.version, answer.revision) == (2, 2)
        again = await house.predictor.predict(given(1))
        assert (again.version, again.revision) == (2, 2)

    run(house, scenario)
    assert house.store.reads == [1]
    assert [(entry["entity"], entry["version"]) for entry in house.stream.entries()] == [("1", 2), ("2", 2), ("1", 2)]


def test_a_promotion_in_the_middle_of_a_request_is_one_or_the_other_and_never_both() -> None:
    house = House()

    async def scenario() -> None:
        house.stream.gate = asyncio.Event()
        asking = [asyncio.create_task(house.predictor.predict(given(each))) for each in (1, 2)]
        await asyncio.sleep(0.02)  # the log has seen the old route
        house.store.publish(RoutingDocument.single("churn", 2, revision=2))
        house.stream.gate.set()
        before = await asyncio.gather(*asking)
        assert {(each.version, each.revision) for each in before} == {(1, 1)}
        assert (await house.predictor.predict(given(3))).revision == 2

    run(house, scenario)
    assert [(entry["entity"], entry["version"]) for entry in house.stream.entries()] == [("1", 1), ("2", 1), ("3", 2)]


def test_a_version_that_only_the_old_route_knows_and_nobody_can_load_is_no_reason_to_fail() -> None:
    house = House()

    async def scenario() -> None:
        house.versions.broken, house.versions.priors[3] = {3}, None
        house.store.publish(RoutingDocument.single("churn", 3, revision=2))
        for _ in range(2):  # the second knows the route, and reads it again before it gives up
            with pytest.raises(UnservableModelError):
                await house.predictor.predict(given(1))
        house.store.publish(RoutingDocument.single("churn", 2, revision=3))
        assert (await house.predictor.predict(given(1))).version == 2

    run(house, scenario)


def test_there_is_time_to_read_the_new_route_when_the_old_ones_version_was_slow() -> None:
    house = House(deadline_ms=3_000.0)
    scorer = house.predictor._scorer

    async def slow(query: ScoreQuery) -> np.ndarray:
        if query.version == 1:
            await asyncio.sleep(1.8)  # more than what features may take of the time
        return await house.runner(query)

    async def as_a_server_does(keys: Sequence[str]) -> list[bytes | None]:
        await asyncio.sleep(0.02)
        return await OnlineMemory.read(house.store, keys)

    async def scenario() -> None:
        scorer._runner, house.store.read = slow, as_a_server_does  # type: ignore[method-assign]
        house.store.publish(RoutingDocument.single("churn", 2, revision=2))
        answer = await house.predictor.predict(given(1))
        assert (answer.version, answer.revision) == (2, 2)
        assert answer.entities[0].fallback is None

    run(house, scenario)
    assert house.store.reads == [1]


def test_what_the_route_may_make_an_error_of_reads_it_first() -> None:
    house = House()

    async def scenario() -> None:
        house.store.publish(split(2))
        answer = await house.predictor.predict(replace(given(1), variant="challenger"))
        assert (answer.version, answer.revision) == (2, 2)
        house.store.publish(RoutingDocument.single("churn", 1, revision=3))
        with pytest.raises(UnknownVariantError):
            await house.predictor.predict(replace(given(1), variant="challenger"))
        assert (await house.predictor.predict(replace(given(1), strict=True))).revision == 3
        assert house.store.reads == [1, 1, 1]

    run(house, scenario)


def test_features_that_the_request_doesnt_give_are_looked_up_and_the_route_with_them() -> None:
    house = House()

    async def scenario() -> None:
        part = UniformOverrides.of([{NAMES[0]: 1.0}])
        assert part is not None
        await house.predictor.predict(replace(request(1), overrides=part))
        assert house.store.reads == [len(house.readers.of(NAMES).keys(["1"])) + 1]

    run(house, scenario)


def test_a_route_that_was_seen_too_long_ago_is_read_again() -> None:
    house = House()
    house.predictor._routes = SeenRoutes(hold_s=0.0)

    async def scenario() -> None:
        await house.predictor.predict(given(1))
        assert house.store.reads == [1]

    run(house, scenario)


def test_an_emptied_store_is_answered_by_the_catalogs_route() -> None:
    house = House()
    house.catalog["churn"] = RoutingDocument.single("churn", 2, revision=7)

    async def scenario() -> None:
        house.store.values.clear()
        for _ in range(2):
            await house.predictor.predict(given(1))
        answer = await house.predictor.predict(given(1))
        assert (answer.version, answer.revision, answer.logged) == (2, 7, True)

    run(house, scenario)


def test_a_model_that_is_withdrawn_isnt_answered_by_the_route_it_had() -> None:
    house = House()
    house.router._load = _nothing

    async def scenario() -> None:
        house.store.values.clear()
        house.router._documents.clear()
        with pytest.raises(UnknownAliasError):
            await house.predictor.predict(given(1))

    run(house, scenario)
    assert house.stream.records == []


async def _nothing(_: str) -> None:
    return None


def test_a_log_that_cant_be_written_withholds_the_answer_and_the_route_is_read_again() -> None:
    house = House()

    async def scenario() -> None:
        house.stream.down = True
        with pytest.raises(PredictionLogError):
            await house.predictor.predict(given(1))
        house.stream.down = False
        assert (await house.predictor.predict(given(1))).logged
        assert house.store.reads == [1]

    run(house, scenario)
    assert len(house.stream.records) == 1


def test_where_answers_dont_wait_for_the_log_the_route_is_read() -> None:
    house = House()
    house.predictor._log = PredictionLog(house.stream.append, house.stream.append_while, buffer_rows=100)

    async def scenario() -> None:
        house.store.publish(RoutingDocument.single("churn", 2, revision=2))
        assert (await house.predictor.predict(given(1))).revision == 2
        assert house.store.reads == [1]

    run(house, scenario)


def test_a_server_that_cant_check_is_asked_for_the_route() -> None:
    house = House()
    house.predictor._log = PredictionLog(house.stream.append)

    async def scenario() -> None:
        assert (await house.predictor.predict(given(1))).logged
        assert house.store.reads == [1]

    run(house, scenario)
