"""Two versions of a view side by side, the whole way: served, applied, materialized, trained, promoted, retired."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from configs.churn.cdnow import write_parquet
from configs.churn.definitions import purchases
from deployments.application import build_app
from deployments.stages import gateway_parts
from heliostat.batch import scorer_of
from heliostat.clock import parse_instant_us
from heliostat.errors import StaleVersionError, ViewInUseError
from heliostat.feature_store import FeatureStore
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.models.rows import ModelRows, version_features
from heliostat.serving.telemetry import Meter
from heliostat.settings import Settings
from heliostat.training.dataset import build_training_set, split_instants
from heliostat.training.fitting import Recipe, Trial
from heliostat.training.trainer import Production, TrainingReport, conclude, promote_candidate
from heliostat.workspace import Workspace

COMMON = """
from configs.churn.definitions import churned, customer, purchases
from heliostat import Count, FeatureView, Gate, ModelSpec, Sum
"""
RECENT_1 = """
recent_1 = FeatureView("recent", version=1, source=purchases,
    features={"count": Count(window="90d"), "amount": Sum("amount", window="90d")})
"""
RECENT_2 = """
recent_2 = FeatureView("recent", version=2, source=purchases,
    features={"count": Count(window="180d"), "amount": Sum("amount", window="30d"), "bought": Count(window="365d")})
"""
CHURN = """
churn = ModelSpec("churn", entity=customer, features=[%s], label=churned, gate=Gate(max_regression=0.5),
    params={"num_leaves": 7, "min_data_in_leaf": 20, "seed": 7})
"""
FIRST = COMMON + RECENT_1 + CHURN % "recent_1"
BOTH = COMMON + RECENT_1 + RECENT_2 + CHURN % "recent_2"
SECOND = COMMON + RECENT_2 + CHURN % "recent_2"

CUSTOMERS = list(range(1, 41))


class Project:
    """One project under several definitions modules, one after the other."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings, self._folder = settings, folder

    def settings(self, code: str) -> Settings:
        module = f"versions_{abs(hash(code))}"
        (self._folder / f"{module}.py").write_text(code)
        importlib.invalidate_caches()
        return self._settings.model_copy(update={"definitions": module})

    def open(self, code: str) -> Workspace:
        return Workspace.open(self.settings(code))

    def serve(self, code: str, scenario: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        """Send requests to a gateway that was deployed with these definitions."""
        settings = self.settings(code)
        patient = settings.serving.model_copy(update={"deadline_ms": 20_000.0})

        async def main() -> Any:
            workspace = Workspace.open(settings.model_copy(update={"serving": patient}))
            parts = gateway_parts(workspace, Meter())
            transport = httpx.ASGITransport(build_app(parts), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                answer = await scenario(client)
            await parts.close()
            return answer

        return asyncio.run(main())

    def predict(self, code: str) -> dict[str, Any]:
        async def scenario(client: httpx.AsyncClient) -> dict[str, Any]:
            return (await client.post("/predict", json={"entity_ids": CUSTOMERS})).json()

        answer: dict[str, Any] = self.serve(code, scenario)
        return answer


@pytest.fixture
def project(settings: Settings, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The purchases of the first 2,000 customers are in the log; nothing is registered."""
    monkeypatch.syspath_prepend(str(home))
    write_parquet(tmp_path / "purchases.parquet")
    events = pq.read_table(tmp_path / "purchases.parquet").filter(pc.field("customer_id") <= 2_000)
    with Workspace.open(settings) as workspace:
        workspace.event_log.append(purchases, events, ingested_us=workspace.clock.now_us())
    return Project(settings, home)


def _without_ray(rows: ModelRows) -> pa.Table:
    return pa.concat_tables([rows.table(bucket) for bucket in rows.event_log.buckets])


def _train(workspace: Workspace) -> tuple[TrainingReport, Production | None]:
    """As jobs/train_model.py does, with one fixed trial in this process."""
    spec = workspace.definitions.model("churn")
    production = Production.of(workspace, spec)
    split = split_instants(
        [parse_instant_us(day) for day in ("1997-05-01", "1997-07-01")],
        [parse_instant_us("1997-12-01")],
        horizon_us=spec.label.horizon_us,
        now_us=workspace.clock.now_us(),
        first_event_us=0,
    )
    extra = () if production is None else production.features
    training_set = build_training_set(spec, workspace.event_log, split, extra=extra, rows_of=_without_ray)
    training = training_set.training
    rows = lgb.Dataset(training.matrix, training.labels, feature_name=list(spec.feature_names))
    parameters = {**Recipe.of(spec, seed=7).parameters, "num_threads": 1}
    booster = lgb.train(parameters, rows, num_boost_round=20)
    package = ModelPackage(booster.model_to_string(), Signature.of(spec), spec.objective)
    trials = (Trial({}, 20, 0.8, 0.4),)
    return conclude(workspace, spec, training_set, package, trials, production=production), production


def _first_version_serves(project: Project) -> None:
    with project.open(FIRST) as workspace:
        workspace.features.apply(workspace.definitions)
        FeatureStore(workspace).materialize()
        report, production = _train(workspace)
        promote_candidate(workspace, report, production=production)


def test_a_new_version_of_a_view_goes_the_whole_way_and_the_old_model_notices_nothing(project: Project) -> None:
    _first_version_serves(project)
    before = project.predict(FIRST)
    assert before["model_version"] == 1
    assert len(set(before["predictions"])) > 5, "the model tells customers apart"

    with project.open(BOTH) as workspace:
        plan = workspace.features.apply(workspace.definitions)
        assert [(each.ref, each.beside) for each in plan.added] == [("recent@2", (1,))]
        FeatureStore(workspace).materialize(["recent@2"])
    during = project.predict(BOTH)
    assert (during["model_version"], during["predictions"]) == (1, before["predictions"])
    assert all(each["source"] == "model" for each in during["entities"])

    with project.open(BOTH) as workspace:
        report, production = _train(workspace)
        assert report.compared_with == 1, "the old version is judged on its own features, on the same rows"
        assert workspace.models.get("churn", 2).to_document()["views"] == ["recent@2"]
        promote_candidate(workspace, report, production=production)
    after = project.predict(BOTH)
    assert after["model_version"] == 2
    assert after["predictions"] != before["predictions"]

    with project.open(SECOND) as workspace:
        assert [each.ref for each in workspace.features.apply(workspace.definitions).removed] == ["recent@1"]
    assert project.predict(SECOND)["predictions"] == after["predictions"]


def test_a_live_event_reaches_the_rings_of_both_versions(project: Project) -> None:
    with project.open(BOTH) as workspace:
        FeatureStore(workspace).materialize()
    event = {
        "event_id": 10**9,
        "customer_id": 7,
        "purchased_at": "1998-06-30T12:00:00Z",
        "quantity": 1,
        "amount": 5.0,
    }

    async def scenario(client: httpx.AsyncClient) -> tuple[dict[str, Any], dict[str, Any]]:
        before = {
            view: (await client.get(f"/features/{view}/7")).json() for view in ("recent@1", "recent@2", "recent")
        }
        sent = await client.post("/events", json={"source": "purchases", "events": event})
        assert sent.json()["accepted"] == 1
        return before, {view: (await client.get(f"/features/{view}/7")).json() for view in before}

    before, after = project.serve(BOTH, scenario)
    assert [each["view"] for each in after.values()] == ["recent@1", "recent@2", "recent@2"]
    for view in before:
        counts = [each[view]["features"]["count"] for each in (before, after)]
        assert counts[1] == counts[0] + 1, view


def test_the_gateway_lists_and_searches_features_of_all_versions(project: Project) -> None:
    _first_version_serves(project)
    with project.open(BOTH) as workspace:
        workspace.features.apply(workspace.definitions)

    async def scenario(client: httpx.AsyncClient) -> tuple[list[Any], list[Any]]:
        every, found = await client.get("/features"), await client.get("/features", params={"search": "count 90d"})
        assert (every.status_code, found.status_code) == (200, 200)
        return every.json()["features"], found.json()["features"]

    every, found = project.serve(BOTH, scenario)
    assert [each["ref"] for each in every] == [
        "recent@1__count",
        "recent@1__amount",
        "recent@2__count",
        "recent@2__amount",
        "recent@2__bought",
    ]
    (one,) = found
    assert (one["ref"], one["used_by"], one["versions"]) == ("recent@1__count", [], ["churn@1"])
    assert (one["source"], one["columns"], one["entity"]) == ("purchases", ["purchased_at"], "customer")


def test_versions_are_told_apart_online_and_offline(project: Project) -> None:
    spine = pa.table({"customer_id": CUSTOMERS, "as_of": [parse_instant_us("1998-06-30")] * len(CUSTOMERS)})
    with project.open(BOTH) as workspace:
        store = FeatureStore(workspace)
        store.materialize()
        joined = store.get_historical(spine, ["recent@1", "recent@2__count", "recent__bought"])
        alone = store.get_historical(spine, [workspace.definitions.view("recent@1")])
        online = store.get_online(CUSTOMERS, ["recent@1", "recent@2"])
    assert joined.column_names[2:] == [
        "recent@1__count",
        "recent@1__amount",
        "recent@2__count",
        "recent__bought",
    ]
    assert alone.column("recent__count") == joined.column("recent@1__count")
    assert joined.column("recent@1__count") != joined.column("recent@2__count")
    for name in ("recent@1__count", "recent@2__count"):
        window = {"recent@1__count": "1998-04-01", "recent@2__count": "1998-01-01"}[name]
        assert np.nansum(online[name]) > 0, window


def test_a_view_that_production_or_staging_reads_cant_go(project: Project) -> None:
    _first_version_serves(project)
    with (
        project.open(SECOND) as workspace,
        pytest.raises(
            ViewInUseError, match=r"recent@1 can't go: model 'churn' version 1 \(production\) still reads it"
        ),
    ):
        workspace.features.apply(workspace.definitions)
    with project.open(SECOND) as workspace:
        assert [row.version for row in workspace.features.list("view")] == [1], "nothing was registered"


def test_one_request_is_answered_by_versions_that_read_different_versions_of_a_view(project: Project) -> None:
    _first_version_serves(project)
    alone = project.predict(FIRST)["predictions"]
    with project.open(BOTH) as workspace:
        workspace.features.apply(workspace.definitions)
        FeatureStore(workspace).materialize()
        report, _ = _train(workspace)
        workspace.rollout.serve("churn", report.version, reason="alone, to compare with")
    new = project.predict(BOTH)["predictions"]
    with project.open(BOTH) as workspace:
        workspace.rollout.serve("churn", 1, reason="the old one again")
        workspace.rollout.start_split(
            "churn", experiment="both", control=1, challenger=report.version, weight=0.5, reason="side by side"
        )
    both = project.predict(BOTH)
    variants = [each["variant"] for each in both["entities"]]
    assert {"control", "challenger"} == set(variants)
    expected = [
        old if variant == "control" else young for variant, old, young in zip(variants, alone, new, strict=True)
    ]
    assert both["predictions"] == expected
    assert {each["source"] for each in both["entities"]} == {"model"}


def test_an_override_reaches_every_version_that_is_read(project: Project) -> None:
    _first_version_serves(project)

    async def scenario(client: httpx.AsyncClient) -> list[float]:
        asked = [{"recent__count": 50, "recent__amount": 900.0}]
        reply = await client.post("/predict", json={"entity_ids": [10**6], "features": asked})
        assert reply.status_code == 200, reply.text
        assert reply.json()["entities"][0]["missing_features"] == []
        return list(reply.json()["predictions"])

    with project.open(BOTH) as workspace:
        workspace.features.apply(workspace.definitions)
    assert project.serve(BOTH, scenario) == project.serve(FIRST, scenario)


def test_a_batch_reads_the_versions_of_views_that_its_model_version_was_trained_on(project: Project) -> None:
    _first_version_serves(project)
    with project.open(FIRST) as workspace:
        spec = workspace.definitions.model("churn")
        scorer = scorer_of(workspace, spec, version=1)
        expected = scorer.score(3)
    with project.open(BOTH) as workspace:
        scorer = scorer_of(workspace, workspace.definitions.model("churn"), version=1)
        assert set(scorer.names) == {"recent@1__count", "recent@1__amount"}
        assert scorer.score(3).column("score").equals(expected.column("score"))


def test_a_model_version_whose_view_is_gone_is_stale(project: Project) -> None:
    _first_version_serves(project)
    with project.open(SECOND) as workspace, pytest.raises(StaleVersionError, match="recent@1"):
        version_features(workspace.models.get("churn", 1), workspace.definitions.views)
