"""The gateway over real stores: first as a plain ASGI application, then on Ray Serve."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import lightgbm as lgb
import numpy as np
import orjson
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from benchmarks import load, serving
from benchmarks.programs import http_program
from deployments import graph
from deployments.access import forced_variant
from deployments.application import build_app
from deployments.stages import ModelReplica, gateway_parts
from heliostat.errors import DeploymentFailedError, ForcedVariantError, UnknownVersionError
from heliostat.experiments.assignment import RoutingDocument
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.models.profile import Profile
from heliostat.serving.access import CALLER, Caller, granted
from heliostat.serving.scoring import ModelRunner
from heliostat.serving.telemetry import Meter
from heliostat.settings import ClockSettings, OnlineSettings, ServingSettings, Settings
from heliostat.storage.stream_entries import rows_from
from heliostat.workspace import Workspace
from tests.slow_clients import SlowClients
from tests.unit.serving.collaborators import House


def register(workspace: Workspace, seed: int) -> int:
    """Register a small real model; its prediction falls with the number of purchases."""
    spec = workspace.definitions.model("churn")
    rng = np.random.default_rng(seed)
    matrix = rng.uniform(0, 8, (500, len(spec.feature_names)))
    labels = (matrix[:, 0] + rng.normal(0, 1, 500) < 3).astype(float)
    data = lgb.Dataset(matrix, labels, feature_name=list(spec.feature_names), params={"verbosity": -1})
    parameters = {"objective": "binary", "num_leaves": 4, "verbosity": -1, "num_threads": 1, "seed": seed}
    booster = lgb.train(parameters, data, num_boost_round=4 + seed)
    profile = Profile.of(matrix, spec.feature_names, np.asarray(booster.predict(matrix)))
    package = ModelPackage(booster.model_to_string(), Signature.of(spec), "binary", profile=profile.to_document())
    return workspace.models.register(spec, package, lineage={}).version


def purchase(event_id: int, customer_id: int, day: str, amount: float = 10.0) -> dict[str, Any]:
    return {
        "event_id": event_id,
        "customer_id": customer_id,
        "purchased_at": f"{day}T12:00:00Z",
        "quantity": 1,
        "amount": amount,
    }


Client = httpx.AsyncClient
NOWHERE = OnlineSettings(url="redis://127.0.0.1:1/0", timeout_s=0.3)


class Shop:
    """A project with two registered versions, the first of which serves; and its gateway."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.meter = Meter()
        register(workspace, 1)
        register(workspace, 2)
        workspace.rollout.serve("churn", 1, reason="the first one")

    def run(self, scenario: Callable[[Client], Awaitable[None]], **changes: object) -> None:
        """Send requests to a gateway with some settings changed."""
        settings = self.workspace.settings.model_copy(update={"serving": self.serving(), **changes})

        async def main() -> None:
            parts = gateway_parts(Workspace.open(settings), self.meter)
            transport = httpx.ASGITransport(build_app(parts), raise_app_exceptions=False)
            async with Client(transport=transport, base_url="http://gateway") as client:
                await scenario(client)
            await parts.close()

        asyncio.run(main())

    def serving(self, **changes: object) -> ServingSettings:
        """The serving settings with some changed; nobody is in a hurry, however busy the machine is."""
        return self.workspace.settings.serving.model_copy(update={"deadline_ms": 20_000.0, **changes})


@pytest.fixture
def shop(settings: Settings) -> Iterator[Shop]:
    with Workspace.open(settings) as workspace:
        yield Shop(workspace)


# ── Predictions ─────────────────────────────────────────────────────────────────────


def test_a_prediction_over_http_says_who_answered_and_what_was_missing(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        reply = await client.post("/predict", json={"entity_ids": [1, "2"]})
        assert reply.status_code == 200
        answer = reply.json()
        assert set(answer) >= {"predictions", "model_version", "latency_ms", "entities"}
        assert answer["model_version"] == 1
        assert answer["predictions"] == [each["prediction"] for each in answer["entities"]]
        assert [each["entity_id"] for each in answer["entities"]] == [1, "2"]
        first = answer["entities"][0]
        assert (first["variant"], first["model_version"], first["source"]) == ("control", 1, "model")
        assert "purchase_history__recency_days" in first["missing_features"]
        assert first["absent_views"] == ["recent_purchases@1", "purchase_history@1"]
        assert answer["latency_ms"] > 0

    shop.run(scenario)


def test_a_model_is_asked_by_its_path_and_the_path_holds(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        reply = await client.post("/models/churn/predict", json={"entity_ids": [1], "explain": True})
        assert (
            reply.json()["predictions"]
            == (await client.post("/predict", json={"entity_ids": [1]})).json()["predictions"]
        )
        told = reply.json()["entities"][0]["explanation"]
        assert told["scale"] == "log-odds"
        assert len(told["contributions"]) == len(shop.workspace.definitions.model("churn").feature_names)
        wrong = await client.post("/models/churn/predict", json={"entity_ids": [1], "model": "other"})
        assert (wrong.status_code, wrong.json()["error"]) == (422, "invalid_field")
        unknown = await client.post("/models/nope/predict", json={"entity_ids": [1]})
        assert (unknown.status_code, unknown.json()["error"]) == (404, "unknown_model")

    shop.run(scenario)
    assert shop.meter.board.value("heliostat_requests_total", "/models/{model}/predict", 200)


def test_an_event_changes_the_features_and_the_prediction_of_the_next_request(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        before = (await client.post("/predict", json={"entity_ids": [7]})).json()
        events = [purchase(n, 7, "1998-06-20") for n in range(1, 7)]
        reply = await client.post("/events", json={"source": "purchases", "events": events})
        assert reply.status_code == 200
        assert (reply.json()["accepted"], reply.json()["rejected"]) == (6, 0)
        after = (await client.post("/predict", json={"entity_ids": [7]})).json()
        assert after["predictions"][0] < before["predictions"][0]
        assert after["entities"][0]["missing_features"] == []
        features = (await client.get("/features/recent_purchases/7")).json()
        assert features["absent"] is False
        assert features["features"]["count_30d"] == 6.0
        assert features["view"] == "recent_purchases@1"

    shop.run(scenario)
    assert shop.meter.board.value("heliostat_events_total", "purchases", "accepted") == 6
    assert shop.meter.board.value("heliostat_predictions_total", "churn", 1, "control") == 2
    assert shop.meter.board.value("heliostat_requests_total", "/features/{view}/{entity:path}", 200)
    assert shop.meter.board.value("heliostat_requests_total", "/predict", 200)


def test_wrong_events_are_refused_one_by_one_with_reasons_and_the_right_ones_taken_once(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        good = purchase(1, 5, "1998-06-01")
        events = [good, {**good, "event_id": 2, "customer_id": None}, purchase(3, 5, "2031-01-01"), 17, good]
        document = (await client.post("/events", json={"source": "purchases", "events": events})).json()
        assert [each["status"] for each in document["results"]] == [
            "accepted",
            "rejected",
            "rejected",
            "rejected",
            "duplicate",
        ]
        assert "customer_id is missing" in document["results"][1]["reason"]
        assert "after now" in document["results"][2]["reason"]
        all_wrong = await client.post("/events", json={"source": "purchases", "events": {"event_id": 1}})
        assert all_wrong.status_code == 422
        assert all_wrong.json()["rejected"] == 1

    shop.run(scenario)


def test_a_large_batch_of_events_is_taken_in_parts_and_too_large_a_one_not_at_all(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        events = [purchase(n, n % 7, "1998-06-01") for n in range(251)]
        document = (await client.post("/events", json={"source": "purchases", "events": events})).json()
        assert (document["accepted"], len(document["results"])) == (251, 251)
        assert [each["event_id"] for each in document["results"]] == list(range(251))
        many = [purchase(n, n % 7, "1998-06-02") for n in range(1_000, 2_001)]
        reply = await client.post("/events", json={"source": "purchases", "events": many})
        assert (reply.status_code, reply.json()["error"]) == (413, "too_many_events")
        features = (await client.get("/features/recent_purchases/0")).json()["features"]
        assert features["count_90d"] == 36.0

    shop.run(scenario)


def test_every_prediction_is_in_the_stream_when_its_answer_arrives(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        replies = await asyncio.gather(*(client.post("/predict", json={"entity_ids": [n, n + 1]}) for n in range(20)))
        ids = {each["prediction_id"] for reply in replies for each in reply.json()["entities"]}
        stream = shop.workspace.streams.record_stream("predictions")
        _, rows = rows_from("predictions", shop.workspace.streams.read(stream))["churn"]
        logged = rows.column("prediction_id").to_pylist()
        assert set(logged) == ids
        assert len(logged) == 40

    shop.run(scenario)


def test_a_promotion_reaches_the_next_request(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        assert (await client.post("/predict", json={"entity_ids": [1]})).json()["model_version"] == 1
        shop.workspace.rollout.serve("churn", 2, reason="better")
        assert (await client.post("/predict", json={"entity_ids": [1]})).json()["model_version"] == 2

    shop.run(scenario)


def test_a_split_serves_two_versions_and_keeps_each_entity_at_its_own(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        shop.workspace.rollout.start_split("churn", experiment="e", control=1, challenger=2, weight=0.5)
        asked = {"entity_ids": list(range(60))}
        first, second = [(await client.post("/predict", json=asked)).json() for _ in range(2)]
        variants = [each["variant"] for each in first["entities"]]
        assert {"control", "challenger"} == set(variants)
        assert variants == [each["variant"] for each in second["entities"]]
        versions = {(each["variant"], each["model_version"]) for each in first["entities"]}
        assert versions == {("control", 1), ("challenger", 2)}

    shop.run(scenario)


def test_features_of_the_request_override_stored_ones(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        given = {"entity_ids": [1, 2], "features": {"2": {"recent_purchases__count_30d": 7}}}
        plain, loyal = (await client.post("/predict", json=given)).json()["predictions"]
        assert loyal < plain
        as_list = {"entity_ids": [1, 2], "features": [None, {"count_30d": 7}]}
        assert (await client.post("/predict", json=as_list)).json()["predictions"] == [plain, loyal]

    shop.run(scenario)


def test_a_request_that_gives_all_features_is_scored_by_them_and_logged_as_given(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        model = shop.workspace.models.load("churn", 1)
        names = model.signature.names
        matrix = np.random.default_rng(3).uniform(0, 8, (3, len(names)))
        rows = [dict(zip(names, row, strict=True)) for row in matrix.tolist()]
        whole = {"entity_ids": [7, 8, 9], "features": rows}
        # Requests that wait together share a batch, whatever they give.
        answers = await asyncio.gather(
            client.post("/predict", json=whole),
            client.post("/predict", json={"entity_ids": [7]}),
            client.post("/predict", json={"entity_ids": [7], "features": [{names[0]: 3}]}),
        )
        alone = (await client.post("/predict", json=whole)).json()
        given, stored, partly = (each.json() for each in answers)
        assert given["predictions"] == alone["predictions"] == model.predict(matrix).tolist()
        assert stored["predictions"] != partly["predictions"]
        assert {each["source"] for each in given["entities"]} == {"model"}
        stream = shop.workspace.streams.record_stream("predictions")
        _, logged = rows_from("predictions", shop.workspace.streams.read(stream))["churn"]
        told = {row["prediction_id"]: row for row in logged.to_pylist()}
        for answer in (given, alone):
            kept = [told[each["prediction_id"]] for each in answer["entities"]]
            np.testing.assert_array_equal([row["features"] for row in kept], matrix)
            assert all(row["given"] == sorted(names) for row in kept)

    shop.run(scenario)


def test_actuals_are_appended_by_prediction_or_by_entity(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        answer = (await client.post("/predict", json={"entity_ids": [1]})).json()
        prediction_id = answer["entities"][0]["prediction_id"]
        actuals = [
            {"prediction_id": prediction_id, "value": 1},
            {"entity_id": 4, "as_of": "1998-04-01", "value": False},
        ]
        reply = await client.post("/actuals", json={"actuals": actuals})
        assert reply.json() == {"accepted": 2}
        stream = shop.workspace.streams.record_stream("actuals")
        first, second = (orjson.loads(payload) for _, payload in shop.workspace.streams.read(stream))
        assert (first["prediction_id"], first["value"], first["model"]) == (prediction_id, 1.0, "churn")
        assert (second["entity"], second["value"]) == ("4", 0.0)

    shop.run(scenario)


# ── Look-ups ────────────────────────────────────────────────────────────────────────


def test_models_say_what_serves_and_a_version_says_what_it_was_made_of(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        (model,) = (await client.get("/models")).json()["models"]
        assert model["model"] == "churn"
        assert model["serving"]["variants"][0]["version"] == 1
        assert [each["version"] for each in model["versions"]] == [1, 2]
        version = (await client.get("/models/churn/2")).json()
        assert version["features"][0] == "recent_purchases__count_30d"
        assert (await client.get("/models/churn/latest")).json()["version"] == 2

    shop.run(scenario)


def test_the_documentation_can_be_read_and_other_methods_are_told_which_there_are(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        assert (await client.get("/docs")).status_code == 200
        for path, allowed in [("/predict", "POST"), ("/models", "GET"), ("/v2", "GET")]:
            reply = await client.delete(path)
            assert (reply.status_code, reply.headers["allow"]) == (405, allowed)

    shop.run(scenario)


def test_health_and_readiness_tell_apart_what_runs_and_what_can_be_reached(shop: Shop) -> None:
    async def healthy(client: Client) -> None:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        await client.post("/predict", json={"entity_ids": [1]})
        ready = (await client.get("/readyz")).json()
        assert ready["status"] == "ready"
        assert ready["breakers"]["model churn/1"] == ready["breakers"]["online store"] == "closed"

    async def without_store(client: Client) -> None:
        assert (await client.get("/healthz")).status_code == 200
        reply = await client.get("/readyz")
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert "online_store" in reply.json()["problems"]

    shop.run(healthy)
    shop.run(without_store, online=NOWHERE)


def test_nobody_is_ready_before_a_version_serves_or_while_what_serves_cant_be_loaded(settings: Settings) -> None:
    async def main(workspace: Workspace) -> None:
        parts = gateway_parts(Workspace.open(workspace.settings), Meter())
        transport = httpx.ASGITransport(build_app(parts), raise_app_exceptions=False)
        async with Client(transport=transport, base_url="http://gateway") as client:

            async def state() -> tuple[int, list[str]]:
                await asyncio.sleep(1.05)  # it is looked for once a second
                reply = await client.get("/readyz")
                assert (await client.get("/v2/health/ready")).status_code == reply.status_code
                return reply.status_code, list(reply.json().get("problems", ()))

            assert await state() == (503, ["model churn"])
            workspace.rollout.serve("churn", register(workspace, 1), reason="the first one")
            assert await state() == (200, [])
            second = register(workspace, 2)
            (workspace.settings.home / "data" / "artifacts" / workspace.models.get("churn", second).artifact).rename(
                workspace.settings.home / "elsewhere"
            )
            workspace.rollout.serve("churn", second, reason="whose files are gone")
            assert await state() == (503, ["model churn"])
            assert (await client.get("/healthz")).status_code == 200
            answer = (await client.post("/predict", json={"entity_ids": [1]})).json()
            assert answer["fallback"] == "last_good_version"
        await parts.close()

    with Workspace.open(settings) as workspace:
        asyncio.run(main(workspace))


def test_one_model_of_several_that_cant_be_loaded_keeps_no_replica_from_starting() -> None:
    asyncio.run(graph.warm_up(House().predictor, ["churn", "upsell"]))  # of which nothing serves yet
    house = House()
    house.catalog["churn"] = RoutingDocument.single("churn", 1, revision=1)
    house.catalog["upsell"] = RoutingDocument.single("upsell", 3, revision=1)
    house.versions.broken.add(3)
    asyncio.run(graph.warm_up(house.predictor, ["upsell", "churn"]))
    with pytest.raises(UnknownVersionError):
        asyncio.run(graph.warm_up(house.predictor, ["upsell"]))


def test_a_model_stage_takes_calls_once_what_serves_is_loaded(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    # It reports to Serve, which isn't here.
    monkeypatch.setattr("deployments.stages.Exporter", lambda _: SimpleNamespace(start=lambda: None))

    async def main() -> None:
        stage = object.__new__(ModelReplica)
        await stage.__init__(shop.workspace.settings)  # as Serve does it
        loaded = set(stage._stage._held)
        await stage._standby.close()
        assert ("churn", 1) in loaded

    asyncio.run(main())


# ── What goes wrong ─────────────────────────────────────────────────────────────────

BAD = [
    ("/predict", b"{not json", 400, "malformed_body", "application/json"),
    ("/predict", b"", 400, "malformed_body", "it is empty"),
    ("/predict", b"[1, 2]", 422, "invalid_field", "an object"),
    ("/predict", b"{}", 422, "invalid_field", "'entity_ids' is missing"),
    ("/predict", b'{"entity_ids": 3}', 422, "invalid_field", "a list"),
    ("/predict", b'{"entity_ids": []}', 422, "invalid_field", "at least one"),
    ("/predict", b'{"entity_ids": ["x"]}', 422, "invalid_value", "an integer"),
    ("/predict", b'{"entity_ids": [1.5]}', 422, "invalid_value", "an integer"),
    ("/predict", b'{"entity_ids": [null]}', 422, "invalid_value", "an integer"),
    ("/predict", b'{"entity_ids": [1], "model": "nope"}', 404, "unknown_model", "churn"),
    ("/predict", b'{"entity_ids": [1], "model": 3}', 422, "invalid_field", "the name of a model"),
    ("/predict", b'{"entity_ids": [1], "entities": 3}', 422, "invalid_field", "entity_ids, features"),
    ("/predict", b'{"entity_ids": [1], "features": [{"nope": 1}]}', 422, "unknown_override", "count_30d"),
    ("/predict", b'{"entity_ids": [1], "features": [{"count_30d": "x"}]}', 422, "invalid_field", "a finite number"),
    ("/predict", b'{"entity_ids": [1], "features": [false]}', 422, "invalid_field", "an object of values by feature"),
    ("/predict", b'{"entity_ids": [1], "inputs": [[]]}', 422, "invalid_field", "an object of values by input"),
    ("/predict", b'{"entity_ids": [1], "features": []}', 422, "invalid_field", "one for each of the 1"),
    ("/predict", b'{"entity_ids": [1], "features": {"2": {}}}', 422, "invalid_field", "only entities asked for"),
    ("/events", b'{"source": "nope", "events": []}', 422, "invalid_field", "at least one"),
    ("/events", b'{"source": "nope", "events": [{}]}', 404, "unknown_source", "purchases"),
    ("/events", b'{"events": [{}]}', 422, "invalid_field", "the name of an event source"),
    ("/actuals", b'{"actuals": [{"value": 1}]}', 422, "invalid_field", "prediction_id"),
    ("/actuals", b'{"actuals": [{"prediction_id": "a", "value": "x"}]}', 422, "invalid_field", "a finite number"),
]


def test_each_bad_body_gets_its_status_its_code_and_what_to_do(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        for path, body, status, code, hint in BAD:
            reply = await client.post(path, content=body)
            assert (reply.status_code, reply.json()["error"]) == (status, code), (body, reply.text)
            assert hint in reply.text, (body, reply.text)

    shop.run(scenario)


def test_paths_and_names_that_dont_exist_are_told_with_those_that_do(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        for path, status, code, hint in [
            ("/features/nope/1", 404, "unknown_view", "recent_purchases@1"),
            ("/features/recent_purchases/x", 422, "invalid_value", "an integer"),
            ("/models/nope/1", 404, "unknown_model", "churn"),
            ("/models/churn/9", 404, "unknown_version", "1, 2"),
            ("/models/churn/blue", 404, "unknown_alias", "promote"),
            ("/nope", 404, "unknown_path", "/docs"),
        ]:
            reply = await client.get(path)
            assert (reply.status_code, reply.json()["error"]) == (status, code), (path, reply.text)
            assert hint in reply.text, (path, reply.text)
        reply = await client.get("/predict")
        assert (reply.status_code, reply.json()["error"]) == (405, "method_not_allowed")
        unknown = await client.get("/features/recent_purchases/123456")
        assert (unknown.status_code, unknown.json()["absent"]) == (200, True)

    shop.run(scenario)


def test_too_large_a_body_is_refused_while_it_arrives_whatever_its_header_says(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            for _ in range(1_000):
                sent += 500
                yield b" " * 500

        streamed = await client.post("/predict", content=endless())
        assert (streamed.status_code, streamed.json()["error"]) == (413, "body_too_large")
        declared = await client.post("/events", content=b"x" * 3_000)
        assert declared.status_code == 413
        assert "2000 bytes" in declared.json()["message"]

    shop.run(scenario, serving=shop.serving(max_body_bytes=2_000))


def test_a_body_that_doesnt_arrive_is_given_up_and_its_sender_is_told(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        async def stalled() -> AsyncIterator[bytes]:
            yield b'{"entity_ids"'
            await asyncio.sleep(30)

        for path in ("/predict", "/events", "/v2/models/churn/infer"):
            reply = await client.post(path, content=stalled())
            assert reply.status_code == 408, reply.text
            assert "serving.body_timeout_s" in reply.text

    shop.run(scenario, serving=shop.serving(body_timeout_s=0.05))


def test_without_the_store_there_is_503_and_when_to_try_again(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        for path, body in [
            ("/predict", {"entity_ids": [1]}),
            ("/events", {"source": "purchases", "events": purchase(1, 1, "1998-06-01")}),
            ("/actuals", {"actuals": {"prediction_id": "a", "value": 1}}),
        ]:
            reply = await client.post(path, json=body)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1"), (path, reply.text)
        assert (await client.get("/features/recent_purchases/1")).status_code == 503

    shop.run(scenario, online=NOWHERE)


def test_without_the_store_answers_are_marked_where_the_settings_allow_them(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        asked = {"entity_ids": [1], "features": [{"recent_purchases__count_30d": 7}]}
        answer = (await client.post("/predict", json=asked)).json()
        assert answer["logged"] is False
        (entity,) = answer["entities"]
        assert (entity["source"], entity["fallback"]) == ("fallback", "training_medians")
        assert "recent_purchases__count_30d" not in entity["missing_features"]

    shop.run(scenario, online=NOWHERE, serving=shop.serving(when_log_fails="answer"))


def break_artifact(workspace: Workspace, version: int) -> None:
    """Write other bytes over a version's booster."""
    folder = workspace.settings.home / "data" / "artifacts" / workspace.models.get("churn", version).artifact
    (folder / "model.txt").write_text("tree\nwrong\nend of trees\n")


def test_a_broken_artifact_is_answered_by_the_version_that_was_in_production_before(shop: Shop) -> None:
    break_artifact(shop.workspace, 2)

    async def scenario(client: Client) -> None:
        expected = (await client.post("/predict", json={"entity_ids": [1]})).json()["predictions"]
        shop.workspace.rollout.serve("churn", 2, reason="broken")
        for _ in range(5):
            answer = (await client.post("/predict", json={"entity_ids": [1]})).json()
            assert (answer["model_version"], answer["fallback"]) == (1, "last_good_version")
            assert answer["predictions"] == expected
        assert shop.meter.board.value("heliostat_breaker_state", "model churn/2") == 2

    shop.run(scenario)


def test_a_client_that_wants_no_fallback_is_told_what_failed_and_when_to_come_back(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        asked = {"entity_ids": [1], "on_fallback": "error"}
        reply = await client.post("/predict", json=asked)
        assert (reply.status_code, reply.json()["error"]) == (503, "degraded_answer")
        assert "the online store doesn't answer" in reply.json()["message"]
        assert reply.headers["retry-after"] == "1"
        wrong = await client.post("/predict", json={**asked, "on_fallback": "never"})
        assert (wrong.status_code, wrong.json()["fix"]) == (422, "one of: answer, error")

    shop.run(scenario, online=NOWHERE, serving=shop.serving(when_log_fails="answer"))


def test_a_batch_prediction_that_is_cached_stands_in_where_no_version_answers(shop: Shop) -> None:
    workspace = shop.workspace
    key = workspace.online.keys.batch("churn", "7")
    cached = {"entity": "7", "score": 0.93, "version": 2, "model": "churn", "as_of": "1998-06-30T12:00:00Z"}
    workspace.online.put_many({key: orjson.dumps(cached)})
    break_artifact(workspace, 1)

    async def scenario(client: Client) -> None:
        answer = (await client.post("/predict", json={"entity_ids": [7]})).json()
        (entity,) = answer["entities"]
        assert (entity["prediction"], entity["model_version"], answer["fallback"]) == (0.93, 2, "batch_prediction")
        assert 43_200.0 <= entity["fallback_age_s"] < 43_300.0
        strict = await client.post("/predict", json={"entity_ids": [7], "on_fallback": "error"})
        assert "the model churn/1 doesn't answer" in strict.json()["message"]

    shop.run(scenario, serving=shop.serving(fallback=("batch_prediction",)))


def test_a_forced_variant_is_for_those_who_may_and_no_exposure(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        shop.workspace.rollout.start_split("churn", experiment="forced", control=1, challenger=2, weight=0.0001)
        answer = await client.post(
            "/predict", json={"entity_ids": [1, 2]}, headers={"X-Heliostat-Variant": "challenger"}
        )
        told = {(each["variant"], each["model_version"]) for each in answer.json()["entities"]}
        assert told == {("forced:challenger", 2)}
        reply = await client.post("/predict", json={"entity_ids": [1]}, headers={"X-Heliostat-Variant": "nope"})
        assert (reply.status_code, reply.json()["known"]) == (422, ["control", "challenger"])

    shop.run(scenario)


@pytest.mark.parametrize("scopes", [(), ("read", "predict", "ingest")])
def test_nobody_forces_a_variant_without_scope_admin(scopes: tuple[str, ...]) -> None:
    scope = {
        "headers": [(b"host", b"x"), (b"x-heliostat-variant", b"challenger")],
        CALLER: Caller("k", granted(scopes)),
    }
    with pytest.raises(ForcedVariantError, match="scope admin"):
        forced_variant(scope)
    assert forced_variant({**scope, CALLER: Caller("k", granted(["admin"]))}) == "challenger"
    assert forced_variant({**scope, "headers": []}) is None


def test_what_is_registered_is_loaded_before_it_serves(shop: Shop) -> None:
    async def main() -> None:
        settings = shop.workspace.settings
        parts = gateway_parts(Workspace.open(settings.model_copy(update={"serving": shop.serving()})), shop.meter)
        runner = parts.predictor._stages.runner
        assert isinstance(runner, ModelRunner)
        try:
            async with asyncio.timeout(20):
                while ("churn", 2) not in runner._held:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.01)
        finally:
            await parts.close()

    asyncio.run(main())


def test_more_requests_than_may_wait_are_told_when_to_come_back(shop: Shop) -> None:
    async def scenario(client: Client) -> None:
        replies = await asyncio.gather(*(client.post("/predict", json={"entity_ids": [1]}) for _ in range(30)))
        refused = [reply for reply in replies if reply.status_code != 200]
        assert 0 < len(refused) < 30
        assert {(each.status_code, each.json()["error"]) for each in refused} == {(503, "overloaded")}
        assert {each.headers["retry-after"] for each in refused} == {"1"}

    shop.run(scenario, serving=shop.serving(max_queued_requests=2))


# ── On Ray Serve ────────────────────────────────────────────────────────────────────


def settings_on_serve(home: Path, valkey: str, **serving: Any) -> Settings:
    """Of a project that is named as its home is, at one instant, on any free port."""
    return Settings(
        project=home.name,
        home=home,
        online=OnlineSettings(url=valkey),
        clock=ClockSettings(kind="replay", replay_from="1998-07-01", speed=0.0),
        serving=ServingSettings(port=0, **serving),
    )


@pytest.fixture(scope="module")
def shop_on_serve(session_home: Path, valkey: str, ray_local: None) -> Iterator[Shop]:  # noqa: ARG001 - it must run
    with Workspace.open(settings_on_serve(session_home / "on-serve", valkey)) as workspace:
        yield Shop(workspace)
    graph.undeploy()


@pytest.fixture(scope="module")
def fused_url(shop_on_serve: Shop) -> str:
    return graph.deploy(shop_on_serve.workspace.settings.model_copy(update={"serving": shop_on_serve.serving()}))


def test_on_serve_a_promotion_under_load_drops_no_request_and_mixes_no_versions(
    shop_on_serve: Shop, fused_url: str
) -> None:
    shop_on_serve.workspace.rollout.serve("churn", 1, reason="the first one")

    async def scenario() -> None:
        async with Client(base_url=fused_url, timeout=20) as client:
            versions: list[int] = []
            warm, promoted = asyncio.Event(), asyncio.Event()

            async def ask() -> None:
                for _ in range(40):
                    expected = promoted.is_set()
                    reply = await client.post("/predict", json={"entity_ids": [1, 2, 3]})
                    assert reply.status_code == 200, reply.text
                    version = reply.json()["model_version"]
                    assert {each["model_version"] for each in reply.json()["entities"]} == {version}
                    assert version == 2 or not expected, "a request after the promotion got the old version"
                    versions.append(version)
                    if len(versions) == 80:
                        warm.set()

            async def promote() -> None:
                await warm.wait()
                await asyncio.to_thread(shop_on_serve.workspace.rollout.serve, "churn", 2, reason="better")
                promoted.set()

            await asyncio.gather(promote(), *(ask() for _ in range(8)))
            assert set(versions) == {1, 2}
            assert len(versions) == 320

    asyncio.run(scenario())


def test_on_serve_clients_who_hang_up_leave_everybody_else_served(fused_url: str) -> None:
    host, port = fused_url.removeprefix("http://").split(":")
    body = orjson.dumps({"entity_ids": list(range(50))})
    head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def rude(pause_s: float) -> None:
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head + body)
        await writer.drain()
        await asyncio.sleep(pause_s)
        writer.transport.abort()

    async def scenario() -> None:
        async with Client(base_url=fused_url, timeout=20) as client:

            async def ask() -> None:
                for _ in range(20):
                    reply = await client.post("/predict", json={"entity_ids": [1]})
                    assert reply.status_code == 200, reply.text

            await asyncio.gather(*(rude(n % 20 / 1_000) for n in range(100)), ask(), ask())
            assert (await client.get("/readyz")).json()["status"] == "ready"

    asyncio.run(scenario())


@pytest.mark.slow  # a slow client takes its time
def test_on_serve_a_thousand_slow_clients_stall_nobody_else(fused_url: str) -> None:
    async def scenario() -> None:
        them = SlowClients(fused_url, expected=1_000)
        kinds = [*[them.sender] * 600, *[them.reader] * 300, *[them.silent] * 100]
        slow = [asyncio.create_task(kind()) for kind in kinds]
        await them.connected.wait()
        async with Client(base_url=fused_url, timeout=20) as client:

            async def ask() -> None:
                for number in range(40):
                    reply = await client.post("/predict", json={"entity_ids": [number]})
                    assert reply.status_code == 200, reply.text
                    assert reply.json()["entities"][0]["source"] == "model"

            await asyncio.gather(*(ask() for _ in range(8)))
            waiting = sum(not each.done() for each in slow)
            told = Counter(await asyncio.gather(*slow))
        assert waiting > 100, "the others were to be answered while the slow ones were still at it"
        assert told == {"200": 900, "408": 100}

    asyncio.run(scenario())


def test_on_serve_errors_keep_their_status_and_their_document(fused_url: str) -> None:
    with httpx.Client(base_url=fused_url) as client:
        reply = client.post("/predict", content=b"{not json")
        assert (reply.status_code, reply.json()["error"]) == (400, "malformed_body")
        reply = client.post("/predict", content=b" " * 1_100_000)
        assert (reply.status_code, reply.json()["error"]) == (413, "body_too_large")
        reply = client.get("/nope")
        assert (reply.status_code, reply.json()["error"]) == (404, "unknown_path")


@pytest.mark.slow
def test_a_deployment_that_cant_load_what_serves_is_refused_and_the_replicas_before_it_go_on(
    shop_on_serve: Shop, fused_url: str
) -> None:
    workspace = shop_on_serve.workspace
    workspace.rollout.serve("churn", 1, reason="the first one", end_split=True)
    files = workspace.settings.home / "data" / "artifacts" / workspace.models.get("churn", 1).artifact
    content = (files / "model.txt").read_bytes()
    with httpx.Client(base_url=fused_url, timeout=20) as client:
        assert client.post("/predict", json={"entity_ids": [1]}).json()["entities"][0]["source"] == "model"
        (files / "model.txt").write_text("broken")
        with pytest.raises(DeploymentFailedError, match=r"file 'model\.txt' was changed"):
            graph.deploy(workspace.settings.model_copy(update={"serving": shop_on_serve.serving(deadline_ms=900)}))
        assert client.post("/predict", json={"entity_ids": [1]}).json()["entities"][0]["source"] == "model"
    (files / "model.txt").write_bytes(content)


@pytest.mark.slow
def test_the_distributed_graph_says_what_the_fused_one_says_and_marks_what_fails(
    shop_on_serve: Shop, fused_url: str
) -> None:
    workspace = shop_on_serve.workspace
    workspace.rollout.serve("churn", 1, reason="back to the first one")
    asked = {"entity_ids": list(range(1, 41)), "features": {"3": {"count_30d": 7}}, "explain": True}
    with httpx.Client(base_url=fused_url, timeout=20) as client:
        events = [purchase(n, 1 + n % 9, "1998-06-20") for n in range(40)]
        assert client.post("/events", json={"source": "purchases", "events": events}).status_code == 200
        workspace.rollout.start_split("churn", experiment="placements", control=1, challenger=2, weight=0.5)
        fused = client.post("/predict", json=asked).json()
    distributed = workspace.settings.model_copy(update={"serving": shop_on_serve.serving(placement="distributed")})
    with httpx.Client(base_url=graph.deploy(distributed), timeout=20) as client:
        spread = client.post("/predict", json=asked).json()
        assert spread["predictions"] == fused["predictions"]
        for left, right in zip(fused["entities"], spread["entities"], strict=True):
            assert {**left, "prediction_id": ""} == {**right, "prediction_id": ""}
        assert {each["variant"] for each in spread["entities"]} == {"control", "challenger"}
        for each in spread["entities"]:
            told = each["explanation"]
            assert sum(told["contributions"].values()) + told["base_value"] == pytest.approx(
                told["raw_score"], abs=1e-9
            )
            assert each["prediction"] == pytest.approx(1 / (1 + math.exp(-told["raw_score"])), abs=1e-12)
        folder = workspace.settings.home / "data" / "artifacts"
        third = register(workspace, 3)
        (folder / workspace.models.get("churn", third).artifact / "model.txt").write_text("broken")
        workspace.rollout.stop("churn", reason="enough")
        workspace.rollout.serve("churn", third, reason="broken on purpose")
        answer = client.post("/predict", json=asked).json()
        assert {each["fallback"] for each in answer["entities"]} == {"last_good_version"}


def test_the_deploy_file_fits_serve_and_the_graphs_arguments() -> None:
    document = yaml.safe_load(Path("configs/serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(document).applications
    assert application.import_path == "deployments.graph:build"
    assert graph.GraphArguments.model_validate(application.args).placement == "distributed"
    with pytest.raises(ValueError, match="extra"):
        graph.GraphArguments.model_validate({"colour": "blue"})


def test_a_server_that_isnt_there_is_counted_and_named() -> None:
    outcome = asyncio.run(load.generate("http://127.0.0.1:1/predict", [b"{}"], concurrency=2, seconds=1, most=6))
    assert (outcome.requests, outcome.failed) == (0, 6)
    assert "ConnectionRefusedError" in outcome.first_failure


@pytest.mark.slow
@pytest.mark.benchmark
def test_the_serving_benchmark_runs_and_both_servers_say_the_same() -> None:
    command = [sys.executable, "benchmarks/serving.py", "--smoke"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "req/s ratio" in done.stdout
    assert "Failed requests: Heliostat 0, plain 0, pipelined 0, bare 0, fused 0, distributed 0." in done.stdout
    assert "the load generator against a constant" in done.stdout


def test_goals_of_the_serving_benchmark_are_told_reached_or_not() -> None:
    def cell(requests_per_s: float, p99_ms: float) -> serving.Cell:
        return serving.Cell([requests_per_s], [1.0], [p99_ms])

    here = {
        "heliostat": cell(900, 20),
        "plain": cell(1_000, 30),
        "bare": cell(1_200, 5),
        "fused": cell(900, 20),
        "distributed": cell(400, 50),
    }
    assert list(serving.goals({(1, 16): here})) == [
        "1 entities at 16: 0.90 of plain's requests/s, goal 1: NOT reached.",
        "1 entities at 16: 0.75 of bare's requests/s, goal 0.75: reached.",
        "1 entities at 16: p99 20.0 ms, below plain's 30.0: reached.",
    ]
    # Turn by turn: the machine was twice as quick in the third.
    fused, spread = serving.Cell([800, 900, 1_800], [1.0], [20]), serving.Cell([352, 405, 774], [1.0], [50])
    at_64 = {"heliostat": cell(600, 20), "fused": fused, "distributed": spread}
    assert list(serving.goals({(100, 64): at_64})) == [
        "100 entities at 64: 0.44 of the fused placement's requests/s, distributed, goal 0.5: NOT reached."
    ]


def test_the_load_generators_own_ceiling_counts_whole_answers_alone() -> None:
    program = str(serving.ROOT / "benchmarks" / "constant_server.py")
    with http_program(sys.executable, program) as url:
        asked = load.bodies(100, 50, seed=1)
        outcome = asyncio.run(load.generate(f"{url}/predict", asked, concurrency=4, seconds=5, most=400))
    assert (outcome.requests, outcome.failed) == (400, 0)


@pytest.mark.slow
@pytest.mark.benchmark
def test_the_memory_benchmark_runs() -> None:
    command = [sys.executable, "benchmarks/memory.py", "--smoke"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2,000 requests" in done.stdout
    assert "bytes behind" in done.stdout
