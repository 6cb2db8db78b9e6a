from __future__ import annotations

import asyncio
import math
import threading
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import orjson
import pytest

from heliostat.clock import US_PER_DAY, US_PER_S
from heliostat.errors import (
    DeadlineError,
    DegradedAnswerError,
    OnlineStoreUnavailableError,
    PredictionLogError,
    ShuttingDownError,
    UnknownAliasError,
    UnknownVariantError,
    UnknownVersionError,
    UnservableModelError,
)
from heliostat.experiments.assignment import RoutingDocument
from heliostat.models.packaging import LoadedModel
from heliostat.serving.answers import EntityAnswer, Explanation, PredictAnswer
from heliostat.serving.breaker import BreakerRule, State
from heliostat.serving.lookup import FeatureQuery
from heliostat.serving.predictor import STORE
from heliostat.serving.requests import PredictRequest
from heliostat.serving.scoring import ScoreQuery
from heliostat.tracing import CURRENT, Trace
from tests.unit.serving.collaborators import KEYS, NAMES, House, request, split, trained


def expected(version: int, *rows: list[float]) -> list[float]:
    return trained(version).load().predict(np.array(rows)).tolist()


ONE = [2.0, 30.0, 15.0, 4.0]
TWO = [1.0, 5.0, 5.0, 2.0]
NOBODY = [0.0, 0.0, math.nan, 0.0]


async def settle() -> None:
    """Let everything that can run now run."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_prediction_is_the_models_answer_to_the_stored_features() -> None:
    house = House()
    answer = asyncio.run(house.predictor.predict(request(1, 2)))
    assert [each.score for each in answer.entities] == expected(1, ONE, TWO)
    assert (answer.model, answer.version, answer.revision, answer.logged) == ("churn", 1, 1, True)
    assert [each.entity_id for each in answer.entities] == [1, 2]
    assert {each.variant for each in answer.entities} == {"control"}
    assert {each.source for each in answer.entities} == {"model"}


def test_contributions_add_up_to_the_raw_score_of_the_version_that_answered() -> None:
    house = House()
    house.store.publish(split(2))
    asked = replace(request(*range(1, 21), count_30d=9.0), explain=True)
    answer = asyncio.run(house.predictor.predict(asked))
    assert {each.version for each in answer.entities} == {1, 2}
    assert answer.explanations is not None
    for entity, explanation in zip(answer.entities, answer.explanations, strict=True):
        assert isinstance(explanation, Explanation)
        assert tuple(explanation.contributions) == NAMES
        total = explanation.base_value + sum(explanation.contributions.values())
        assert total == pytest.approx(explanation.raw_score, abs=1e-9)
        assert 1 / (1 + math.exp(-explanation.raw_score)) == pytest.approx(entity.score, abs=1e-12)
    assert answer.explanations[0] != answer.explanations[1]


def test_nobody_who_doesnt_ask_waits_for_an_explanation_or_gets_one() -> None:
    house = House()
    seen: list[ScoreQuery] = []
    runner = house.runner.__call__

    async def noting(query: ScoreQuery) -> np.ndarray:
        seen.append(query)
        return await runner(query)

    house.predictor._scorer._runner = noting

    async def scenario() -> tuple[PredictAnswer, ...]:
        explained = replace(request(2), explain=True)
        return tuple(await asyncio.gather(*map(house.predictor.predict, (request(1), explained, request(3)))))

    plain, explained, other = asyncio.run(scenario())
    assert (plain.explanations, other.explanations) == (None, None)
    assert "explanation" not in plain.document(1.0)["entities"][0]
    assert explained.explanations is not None
    assert [(len(each.matrix), each.explain) for each in seen] == [(2, False), (1, False), (1, True)]


def test_a_constant_that_stands_in_has_no_explanation_and_says_so() -> None:
    house = House()
    house.versions.broken = {1}
    answer = asyncio.run(house.predictor.predict(replace(request(1), explain=True)))
    (entity,) = answer.document(1.0)["entities"]
    assert (entity["prediction"], entity["explanation"]) == (0.25, None)
    assert entity["unexplained"] == "no model answered, but the fallback prior"


def test_a_prediction_stands_when_its_explanation_fails() -> None:
    house = House()
    runner = house.runner.__call__

    async def failing(query: ScoreQuery) -> np.ndarray:
        if query.explain:
            raise ZeroDivisionError
        return await runner(query)

    house.predictor._scorer._runner = failing
    answer = asyncio.run(house.predictor.predict(replace(request(1), explain=True)))
    assert [each.score for each in answer.entities] == expected(1, ONE)
    assert answer.explanations == ("the model gave none",)
    assert len(house.stream.entries()) == 1


def test_an_unknown_entity_is_answered_and_its_absence_is_said_apart_from_nulls() -> None:
    house = House()
    known, unknown = asyncio.run(house.predictor.predict(request(1, 404))).entities
    assert unknown.score == expected(1, NOBODY)[0]
    assert unknown.absent == ("usage@1",)
    assert unknown.missing == ("usage__mean",)
    assert (known.absent, known.missing) == ((), ())


def test_features_of_the_request_replace_stored_ones_and_what_derives_from_them_follows() -> None:
    house = House()
    answer = asyncio.run(house.predictor.predict(request(1, 2, count_30d=9.0)))
    assert [each.score for each in answer.entities] == expected(1, [9.0, 30.0, 15.0, 18.0], TWO)
    assert house.stream.entries()[0]["features"] == [9.0, 30.0, 15.0, 18.0]


def test_the_log_says_which_features_the_request_gave_and_whose() -> None:
    house = House()

    async def scenario() -> None:
        await asyncio.gather(
            house.predictor.predict(request(404)),
            house.predictor.predict(request(1, 2, mean=4.0, count_30d=9.0)),
            house.predictor.predict(PredictRequest("churn", ("2",), (2,), {0: {"mean": 1.0}})),
        )

    asyncio.run(scenario())
    given = {entry["prediction_id"]: entry["given"] for entry in house.stream.entries()}
    assert list(given.values()) == [[], ["usage__count_30d", "usage__mean"], [], ["usage__mean"]]


def test_the_log_says_which_rung_of_the_fallback_answered() -> None:
    house = House()
    house.store.down = True
    house.catalog["churn"] = RoutingDocument.single("churn", 1, revision=1)
    asyncio.run(house.predictor.predict(request(1)))
    house.store.down, house.versions.broken, house.last_good["churn"] = False, {3}, (1,)
    house.store.publish(RoutingDocument.single("churn", 3, revision=2))
    asyncio.run(house.predictor.predict(request(1)))
    told = [(entry["source"], entry["fallback"]) for entry in house.stream.entries()]
    assert told == [("fallback", "stored_features_unavailable"), ("fallback", "last_good_version")]


def test_the_log_has_what_the_model_saw_before_the_answer_leaves() -> None:
    house = House()
    token = CURRENT.set(Trace("a" * 32))
    answer = asyncio.run(house.predictor.predict(request(1, 404)))
    CURRENT.reset(token)
    first, second = house.stream.entries()
    assert 0 < first.pop("latency_ms") < 5_000
    assert first == {
        "prediction_id": answer.entities[0].prediction_id,
        "request_id": answer.request_id,
        "model": "churn",
        "revision": 1,
        "at": datetime.fromtimestamp(house.clock.now_us() / 1e6, UTC),
        "entity": "1",
        "variant": "control",
        "version": 1,
        "score": answer.entities[0].score,
        "features": ONE,
        "missing": [],
        "source": "model",
        "fallback": None,
        "given": [],
        "inputs": None,
        "trace_id": "a" * 32,
        "newest_event": datetime.fromtimestamp((house.clock.now_us() - US_PER_DAY) / 1e6, UTC).replace(hour=0),
        "forced": None,
    }
    assert second["features"] == [0.0, 0.0, None, 0.0]
    assert second["missing"] == ["usage__mean"]
    assert second["newest_event"] is None


def test_prediction_ids_are_never_used_twice() -> None:
    house = House()

    async def scenario() -> list[str]:
        answers = await asyncio.gather(*(house.predictor.predict(request(1, 2, 1)) for _ in range(20)))
        return [each.prediction_id for answer in answers for each in answer.entities]

    ids = asyncio.run(scenario())
    assert len(set(ids)) == len(ids) == 60


def test_concurrent_requests_share_one_read_one_call_and_one_log_write() -> None:
    house = House()

    async def scenario() -> None:
        await house.predictor.predict(request(1))
        house.store.reads.clear()
        house.stream.calls.clear()
        answers = await asyncio.gather(
            house.predictor.predict(request(1, 2)),
            house.predictor.predict(request(404, count_30d=9.0)),
            house.predictor.predict(request(2, count_30d=9.0)),
        )
        scores = [[each.score for each in answer.entities] for answer in answers]
        assert scores[0] == expected(1, ONE, TWO)
        assert scores[1] == expected(1, [9.0, 0.0, math.nan, 18.0])
        assert scores[2] == expected(1, [9.0, 5.0, 5.0, 18.0])

    asyncio.run(scenario())
    assert len(house.store.reads) == 1
    assert house.stream.calls == [1]
    assert house.stream.requests == 1 + 3


def test_a_promotion_is_served_with_the_very_next_request() -> None:
    house = House()

    async def scenario() -> list[int]:
        before = await house.predictor.predict(request(1))
        house.store.publish(RoutingDocument.single("churn", 2, revision=2))
        after = await house.predictor.predict(request(1))
        assert after.entities[0].score == expected(2, ONE)[0]
        assert after.revision == 2
        return [before.version, after.version]

    assert asyncio.run(scenario()) == [1, 2]


def test_a_split_serves_each_entity_by_its_own_variant_and_logs_who_saw_what() -> None:
    house = House()
    document = split(5)
    house.store.publish(document)
    ids = tuple(range(1, 41))
    answer = asyncio.run(house.predictor.predict(request(*ids)))
    for each in answer.entities:
        variant = document.variant_of(str(each.entity_id))
        assert variant is not None
        assert (each.variant, each.version) == (variant.name, variant.version)
        row = {1: ONE, 2: TWO}.get(each.entity_id, NOBODY)
        if each.entity_id != 3:
            assert each.score == expected(each.version, row)[0]
    assert {each.version for each in answer.entities} == {1, 2}
    assert answer.version == 1
    assert [entry["entity"] for entry in house.stream.entries()] == [str(each) for each in ids]


def test_whoever_is_outside_of_the_experiment_is_served_by_the_control_and_not_counted_for_it() -> None:
    house = House()
    house.store.publish(split(5, coverage=0.0))
    answer = asyncio.run(house.predictor.predict(request(1, 2)))
    assert {(each.variant, each.version) for each in answer.entities} == {("outside", 1)}


def test_a_shadow_is_scored_and_logged_but_answers_nobody() -> None:
    house = House()
    house.store.publish(RoutingDocument.single("churn", 1, revision=3, shadow=(2,)))

    async def scenario() -> None:
        answer = await house.predictor.predict(request(1))
        await house.predictor.close()
        assert [each.score for each in answer.entities] == expected(1, ONE)

    asyncio.run(scenario())
    (entry,) = house.stream.entries("shadow")
    assert (entry["version"], entry["score"]) == (2, expected(2, ONE)[0])


def test_a_shadow_that_fails_disturbs_nobody() -> None:
    house = House()
    house.store.publish(RoutingDocument.single("churn", 1, revision=3, shadow=(2,)))
    house.versions.broken = {2}

    async def scenario() -> None:
        answer = await house.predictor.predict(request(1))
        await house.predictor.close()
        assert answer.entities[0].source == "model"

    asyncio.run(scenario())
    assert house.stream.entries("shadow") == []


# ── The ladder ──────────────────────────────────────────────────────────────────────


def test_without_the_store_the_model_sees_what_was_seen_last_and_the_answer_says_so_and_how_old_it_is() -> None:
    house = House()

    async def scenario() -> None:
        await house.predictor.predict(request(1, 2))
        house.clock.advance(40 * US_PER_S)
        house.store.down = True
        answer = await house.predictor.predict(request(1, 2, count_30d=9.0))
        assert [each.score for each in answer.entities] == expected(1, [9.0, 30.0, 15.0, 18.0], TWO)
        document = answer.document(1.0)
        told = [(each["degraded"], each["fallback"], each["fallback_age_s"]) for each in document["entities"]]
        assert told == [(True, "last_seen_features", 40.0)] * 2
        assert (document["degraded"], document["fallback"]) == (True, "last_seen_features")

    asyncio.run(scenario())
    assert house.stream.entries()[-1]["source"] == "fallback"


def test_what_a_request_gave_is_never_what_was_seen_last_for_another() -> None:
    house = House()

    async def scenario() -> None:
        await house.predictor.predict(request(1, 2, count_30d=9.0))
        house.store.down = True
        mine, other = (await house.predictor.predict(request(1, 2))).entities
        assert (mine.fallback, other.fallback) == ("stored_features_unavailable", "last_seen_features")

    asyncio.run(scenario())


def test_what_was_seen_too_long_ago_gives_way_to_the_training_medians_of_the_version_that_is_asked() -> None:
    house = House()
    house.versions.medians = {1: (3.0, 8.0, math.nan, 6.0)}

    async def scenario() -> None:
        await house.predictor.predict(request(1))
        house.clock.advance(301 * US_PER_S)
        house.store.down = True
        (entity,) = (await house.predictor.predict(request(1))).entities
        assert entity.score == expected(1, [3.0, 8.0, math.nan, 6.0])[0]
        assert (entity.fallback, entity.missing) == ("training_medians", ("usage__mean",))
        (given,) = (await house.predictor.predict(request(1, count_30d=9.0, amount_30d=math.nan))).entities
        assert given.score == expected(1, [9.0, math.nan, math.nan, 18.0])[0]

    asyncio.run(scenario())


def test_without_the_store_and_without_anything_known_the_model_sees_the_requests_features_and_nulls() -> None:
    house = House()
    house.catalog["churn"] = RoutingDocument.single("churn", 1, revision=1)
    house.store.down = True

    async def scenario() -> None:
        given, plain = (await house.predictor.predict(request(1, 2, count_30d=9.0))).entities
        unknown = math.nan
        assert [given.score, plain.score] == expected(1, [9.0, unknown, unknown, 18.0], [unknown] * 4)
        assert given.fallback == plain.fallback == "stored_features_unavailable"
        assert given.missing == ("usage__amount_30d", "usage__mean")
        assert plain.missing == NAMES
        assert plain.absent == ()

    asyncio.run(scenario())


def test_a_split_without_the_store_marks_each_entity_by_itself() -> None:
    house = House()
    house.store.publish(split(5))
    house.versions.medians = {1: (3.0, 8.0, 2.0, 6.0)}
    ids = tuple(range(1, 21))

    async def scenario() -> None:
        await house.predictor.predict(request(1, 2))
        house.store.down = True
        rungs = {each.entity_id: (each.version, each.fallback) for each in await told(house, *ids)}
        assert {rungs[1][1], rungs[2][1]} == {"last_seen_features"}
        others = {rungs[each] for each in ids[2:]}
        assert others == {(1, "training_medians"), (2, "stored_features_unavailable")}

    asyncio.run(scenario())


async def told(house: House, *entity_ids: int) -> tuple[EntityAnswer, ...]:
    return (await house.predictor.predict(request(*entity_ids))).entities


def test_once_the_stores_breaker_is_open_nobody_waits_for_it_and_when_it_is_back_everybody_has_it_again() -> None:
    house = House(deadline_ms=400, rule=BreakerRule(3, 0.3, 0.3))

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        await told(house, 1)
        house.store.gate = asyncio.Event()
        for _ in range(3):
            assert (await told(house, 1))[0].fallback == "last_seen_features"
        assert house.breakers.states()[STORE] is State.OPEN
        reads, begin = len(house.store.reads), loop.time()
        for _ in range(20):
            assert (await told(house, 1))[0].fallback == "last_seen_features"
        assert (len(house.store.reads), loop.time() - begin < 0.2) == (reads, True)
        house.store.gate.set()
        await asyncio.sleep(0.3)
        assert (await told(house, 1))[0].fallback is None
        assert house.breakers.states()[STORE] is State.CLOSED

    asyncio.run(scenario())


def test_a_check_goes_the_way_of_a_request_for_nobody_and_says_what_doesnt_answer() -> None:
    async def scenario() -> None:
        house = House(deadline_ms=200)
        await house.predictor.check("churn")
        assert (len(house.store.reads), house.versions.loads, house.stream.records) == (1, [1], [])
        house.store.gate = asyncio.Event()
        with pytest.raises(DeadlineError):
            await house.predictor.check("churn")
        house.store.gate.set()
        house.store.down = True
        with pytest.raises(OnlineStoreUnavailableError):
            await house.predictor.check("churn")
        house.store.down = False
        house.store.publish(split(2, challenger=3))
        house.versions.broken.add(3)
        with pytest.raises(UnknownVersionError):
            await house.predictor.check("churn")
        with pytest.raises(UnknownAliasError):
            await house.predictor.check("upsell")

    asyncio.run(scenario())


def test_a_hanging_store_and_a_hanging_log_still_leave_an_answer_within_the_deadline_where_it_may_go_unlogged() -> (
    None
):
    house = House(deadline_ms=500, when_log_fails="answer")

    async def scenario() -> None:
        await told(house, 1)
        house.store.gate = house.stream.gate = asyncio.Event()
        answer = await house.predictor.predict(request(1))
        assert (answer.logged, answer.entities[0].fallback) == (False, "last_seen_features")

    asyncio.run(scenario())


def test_a_batch_prediction_answers_whom_no_version_can_with_its_age_and_its_version() -> None:
    house = House()
    as_of = "2026-03-01T11:00:00Z"
    document = {"entity": "2", "score": 0.97, "version": 8, "model": "churn", "as_of": as_of}
    house.store.values[KEYS.batch("churn", "2")] = orjson.dumps(document)
    house.versions.broken = {1}

    async def scenario() -> None:
        answer = await house.predictor.predict(request(1, 2))
        prior, cached = answer.document(1.0)["entities"]
        assert (prior["prediction"], prior["fallback"], prior["fallback_age_s"]) == (0.25, "prior", None)
        assert (cached["prediction"], cached["fallback"], cached["model_version"]) == (0.97, "batch_prediction", 8)
        assert cached["fallback_age_s"] == 3_600.0
        assert answer.document(1.0)["fallback"] == "prior"

    asyncio.run(scenario())


def test_a_request_that_wants_no_fallback_gets_an_error_that_names_what_failed_and_its_neighbours_get_answers() -> (
    None
):
    house = House()
    house.store.publish(split(5))
    house.versions.broken = {2}
    variants = {n: split(5).variant_of(str(n)) for n in range(1, 40)}
    good, bad = (
        tuple(n for n, variant in variants.items() if variant is not None and variant.version == version)[:3]
        for version in (1, 2)
    )

    async def scenario() -> None:
        asked = [replace(request(*ids), strict=True) for ids in (good, bad, good[:1])]
        found = await asyncio.gather(*map(house.predictor.predict, asked), return_exceptions=True)
        assert isinstance(found[1], DegradedAnswerError)
        assert (found[1].http_status, found[1].dependency) == (503, "the model churn/2")
        for answer in (found[0], found[2]):
            assert isinstance(answer, PredictAnswer)
            assert {each.fallback for each in answer.entities} == {None}
        house.store.down = True
        with pytest.raises(DegradedAnswerError, match="the online store doesn't answer"):
            await house.predictor.predict(asked[0])
        assert (await house.predictor.predict(request(*bad))).entities[0].fallback == "control"

    asyncio.run(scenario())
    answered = [entry["entity"] for entry in house.stream.entries()]
    assert answered == [str(n) for n in (*good, good[0], *bad)], "what wasn't given out isn't logged"


def test_a_forced_variant_answers_whoever_is_assigned_elsewhere_and_counts_for_no_variant() -> None:
    house = House()
    house.store.publish(split(5, 0.0001))

    async def scenario() -> None:
        answer = await house.predictor.predict(replace(request(1, 2), variant="challenger"))
        assert [each.score for each in answer.entities] == expected(2, ONE, TWO)
        with pytest.raises(UnknownVariantError, match="control, challenger"):
            await house.predictor.predict(replace(request(1), variant="outside"))
        assert (await told(house, 1))[0].variant == "control"

    asyncio.run(scenario())
    assert [entry["variant"] for entry in house.stream.entries()] == ["forced:challenger"] * 2 + ["control"]
    assert [entry["forced"] for entry in house.stream.entries()] == [True, True, None]


def test_a_shadow_that_hangs_in_its_own_code_holds_nobody_up() -> None:
    house = House(deadline_ms=1_000)
    house.store.publish(RoutingDocument.single("churn", 1, revision=3, shadow=(2,)))
    release = threading.Event()

    async def scenario() -> None:
        await told(house, 1)
        await house.predictor.prepare("churn", 2)
        held = house.runner._held["churn", 2]
        held.model.predict = lambda _: release.wait()  # type: ignore[method-assign]
        loop = asyncio.get_running_loop()
        slowest = 0.0
        for _ in range(30):
            begin = loop.time()
            assert (await told(house, 1))[0].fallback is None
            slowest = max(slowest, loop.time() - begin)
        assert slowest < 0.25
        release.set()
        await house.predictor.close()

    asyncio.run(scenario())


def test_a_version_that_hangs_as_soon_as_it_is_tried_never_reaches_the_event_loop() -> None:
    house = House(deadline_ms=600, rule=BreakerRule(1, 60.0, 60.0))
    release = threading.Event()

    class Hanging:
        def __init__(self, model: LoadedModel) -> None:
            self.signature, self.package = model.signature, model.package

        def predict(self, _: np.ndarray) -> np.ndarray:
            release.wait()
            raise RuntimeError

    load = house.versions.load
    house.runner._load = lambda *which: Hanging(load(*which)) if which[1] == 2 else load(*which)  # type: ignore
    house.last_good["churn"] = (1,)

    async def scenario() -> None:
        await told(house, 1)
        house.store.publish(RoutingDocument.single("churn", 2, revision=2))
        loop, ticks = asyncio.get_running_loop(), 0
        asked = asyncio.create_task(told(house, 1))
        while not asked.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert ((await asked)[0].version, (await asked)[0].fallback) == (1, "last_good_version")
        assert ticks > 10, "the loop went on meanwhile"
        begin = loop.time()
        for _ in range(10):
            assert (await told(house, 1))[0].fallback == "last_good_version"
        assert loop.time() - begin < 0.2, "nobody pays for it again"
        release.set()

    asyncio.run(scenario())


def test_a_store_that_hangs_costs_half_of_the_deadline_and_not_the_answer() -> None:
    house = House(deadline_ms=600)

    async def scenario() -> None:
        await house.predictor.predict(request(1))
        house.store.gate = asyncio.Event()
        loop = asyncio.get_running_loop()
        begin = loop.time()
        answer = await house.predictor.predict(request(1))
        assert answer.entities[0].fallback == "last_seen_features"
        assert loop.time() - begin < 0.6

    asyncio.run(scenario())


def test_a_version_that_cant_be_loaded_is_replaced_by_the_controls() -> None:
    house = House()
    house.store.publish(split(2, 0.999))
    house.versions.broken = {2}
    (entity,) = asyncio.run(house.predictor.predict(request(1))).entities
    assert (entity.variant, entity.version, entity.fallback) == ("challenger", 1, "control")
    assert entity.score == expected(1, ONE)[0]


def test_a_promoted_version_that_cant_be_loaded_is_replaced_by_the_one_before() -> None:
    house = House()

    async def scenario() -> None:
        await house.predictor.predict(request(1))
        house.store.publish(RoutingDocument.single("churn", 2, revision=2))
        house.versions.broken, house.last_good["churn"] = {2}, (1,)
        answer = await house.predictor.predict(request(1))
        assert (answer.version, answer.entities[0].fallback) == (1, "last_good_version")

    asyncio.run(scenario())


def test_when_no_version_answers_the_mean_prediction_does() -> None:
    house = House()
    house.versions.broken = {1}
    (entity,) = asyncio.run(house.predictor.predict(request(1))).entities
    assert (entity.score, entity.version, entity.fallback) == (0.25, 1, "prior")


def test_without_a_version_and_without_a_prior_there_is_an_error_and_no_number() -> None:
    house = House()
    house.versions.broken = {1}
    house.versions.priors[1] = None
    with pytest.raises(UnservableModelError, match="version 1 of model 'churn'"):
        asyncio.run(house.predictor.predict(request(1)))
    assert house.stream.records == []


def test_a_version_trained_on_other_definitions_is_not_asked() -> None:
    house = House()
    house.versions.stale = {1: ("usage@1",)}
    (entity,) = asyncio.run(house.predictor.predict(request(1))).entities
    assert entity.fallback == "prior"
    assert house.versions.loads == []


def test_a_version_with_other_features_gets_them_with_the_request_that_first_needs_it() -> None:
    house = House()
    house.versions.names = {2: ("usage__mean", "usage__count_30d")}
    house.store.publish(split(2, 0.5))

    async def scenario() -> None:
        await house.predictor.predict(request(1, 2, 3))

    asyncio.run(scenario())
    shapes = {entry["version"]: len(entry["features"]) for entry in house.stream.entries()}  # type: ignore[arg-type]
    assert shapes[1] == 4
    assert set(shapes.values()) <= {4, 2}


def test_a_log_that_cant_be_written_withholds_the_answer() -> None:
    house = House()
    house.stream.down = True
    with pytest.raises(PredictionLogError, match="when_log_fails"):
        asyncio.run(house.predictor.predict(request(1)))


def test_a_log_that_cant_be_written_is_admitted_where_that_is_allowed() -> None:
    house = House(when_log_fails="answer")
    house.stream.down = True
    answer = asyncio.run(house.predictor.predict(request(1)))
    assert answer.logged is False
    assert [each.score for each in answer.entities] == expected(1, ONE)


def test_a_model_without_a_route_says_how_to_get_one() -> None:
    house = House()
    house.store.values = {}
    with pytest.raises(UnknownAliasError, match="heliostat models promote churn"):
        asyncio.run(house.predictor.predict(request(1)))


def test_an_emptied_store_is_answered_by_the_catalogs_route() -> None:
    house = House()
    house.store.values = {}
    house.catalog["churn"] = RoutingDocument.single("churn", 2, revision=7)
    answer = asyncio.run(house.predictor.predict(request(1)))
    assert (answer.version, answer.revision) == (2, 7)
    assert answer.entities[0].absent == ("usage@1",)


def test_a_request_whose_turn_doesnt_come_in_time_is_refused_and_those_after_it_are_served() -> None:
    house = House(deadline_ms=1_000, when_log_fails="answer")

    async def scenario() -> None:
        await house.predictor.predict(request(1))
        house.stream.gate = asyncio.Event()
        (queue,) = house.predictor._queues.values()
        stuck = []
        for calls in (1, 2, 3, 4, 4):  # as many as there may be are under way, and one request waits for its turn
            stuck.append(asyncio.create_task(house.predictor.predict(request(1))))
            await settle()
            while queue.in_flight < calls:  # noqa: ASYNC110 - only time brings another one
                await asyncio.sleep(0.001)
        assert queue.waiting == 1
        answers = await asyncio.gather(*stuck, return_exceptions=True)
        assert isinstance(answers[4], DeadlineError)
        house.stream.gate.set()
        assert (await house.predictor.predict(request(1))).version == 1

    asyncio.run(scenario())


def test_clients_who_leave_dont_keep_others_waiting() -> None:
    house = House()

    async def scenario() -> None:
        await house.predictor.predict(request(1))
        house.store.gate = asyncio.Event()
        tasks = [asyncio.create_task(house.predictor.predict(request(1))) for _ in range(6)]
        await settle()
        for task in tasks[::2]:
            task.cancel()
        house.store.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(each, asyncio.CancelledError) for each in answers] == [True, False] * 3

    asyncio.run(scenario())


def test_after_closing_nothing_is_taken_in() -> None:
    house = House()

    async def scenario() -> None:
        await house.predictor.predict(request(1))
        await house.predictor.close()
        with pytest.raises(ShuttingDownError):
            await house.predictor.predict(request(1))

    asyncio.run(scenario())


def test_warming_up_loads_what_serves_and_tells_what_cant() -> None:
    house = House()
    house.catalog["churn"] = split(1)
    asyncio.run(house.predictor.warm_up("churn"))
    assert house.versions.loads == [1, 2]
    with pytest.raises(UnknownAliasError):
        asyncio.run(House().predictor.warm_up("churn"))


def test_the_store_being_down_is_reported_by_its_stage() -> None:
    house = House()
    house.store.down = True
    with pytest.raises(OnlineStoreUnavailableError):
        asyncio.run(house.lookup(FeatureQuery("churn", house.predictor._looked_up("churn"), ("1",))))
