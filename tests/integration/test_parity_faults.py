"""Planted faults are found by the parity check and told apart: a ring's byte changed by hand, a late event."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest

from heliostat.clock import US_PER_DAY, US_PER_HOUR, ManualClock, parse_instant_us
from heliostat.experiments.assignment import RoutingDocument
from heliostat.ingestion.intake import Intake
from heliostat.ingestion.sink import Sink
from heliostat.models.packaging import LoadedModel, ModelPackage, Signature
from heliostat.models.registry import ModelRegistry
from heliostat.monitoring.checks import run_checks
from heliostat.monitoring.verdict import Severity, Verdict
from heliostat.online.tiles import RingLimits, ring_layout
from heliostat.serving.lookup import FeatureLookup, FeatureReaders
from heliostat.serving.prediction_log import PredictionLog
from heliostat.serving.predictor import Predictor, Stages
from heliostat.serving.requests import PredictRequest
from heliostat.serving.routing import ABRouter
from heliostat.serving.scoring import ModelRunner
from heliostat.serving.version_book import VersionBook, VersionFacts
from heliostat.settings import ClockSettings, OnlineSettings, Settings
from heliostat.storage.bundles import rings_in
from heliostat.storage.online_store import AsyncOnlineStore
from heliostat.storage.streams import AsyncStreams
from heliostat.workspace import Workspace
from tests.integration.erasure_declarations import USER, churn, user_sales
from tests.rings import bundled

NOW_US = parse_instant_us("2026-03-01T12:00:00Z")
NAMES = churn.feature_names
USERS = [f"u{number}" for number in range(20)]


@pytest.fixture
def workspace(home: Path, valkey: str) -> Iterator[Workspace]:
    """Version 1 is in production; the clock stands still until a test moves it."""
    settings = Settings(
        project=f"p{home.name}",
        home=home,
        definitions="tests.integration.erasure_declarations",
        online=OnlineSettings(url=valkey),
        clock=ClockSettings(kind="replay", replay_from="2026-03-01T12:00:00Z", speed=0),
    )
    rng = np.random.default_rng(7)
    matrix = rng.uniform(0, 10, (200, len(NAMES)))
    labels = (matrix[:, 0] > 5).astype(float)
    parameters = {"objective": "binary", "num_leaves": 4, "verbosity": -1, "num_threads": 1}
    booster = lgb.train(parameters, lgb.Dataset(matrix, labels, feature_name=list(NAMES)), num_boost_round=3)
    with Workspace.open(settings) as opened:
        opened.clock = ManualClock(NOW_US)
        registry = ModelRegistry(opened.catalog, opened.artifacts, opened.clock)
        package = ModelPackage(booster.model_to_string(), Signature.of(churn), "binary")
        lineage = {"view_hashes": {user_sales.ref: user_sales.content_hash}}
        version = registry.register(churn, package, lineage=lineage)
        registry.promote("churn", version.version, gate={"passed": True, "checks": []})
        yield opened


def send(workspace: Workspace, *events: dict[str, Any]) -> None:
    intake = Intake(
        workspace.online,
        list(workspace.definitions.sources.values()),
        list(workspace.definitions.views.values()),
        clock=workspace.clock,
        settings=workspace.settings.ingestion,
        n_buckets=workspace.settings.storage.buckets,
    )
    results = intake.submit("sales", list(events))
    assert {each.status for each in results} == {"accepted"}


def event(user: str, name: str, days: float, amount: float = 10.0) -> dict[str, Any]:
    at_us = NOW_US - int(days * US_PER_DAY)
    return {"event_id": name, "user": user, "shop": "s", "device": "d", "at": at_us, "amount": amount}


def serve(workspace: Workspace, users: list[str]) -> None:
    """Predictions of all of them by the real predictor, logged to the real stream."""
    definitions, settings = workspace.definitions, workspace.settings
    readers = FeatureReaders(
        definitions,
        keys=workspace.online.keys,
        n_buckets=settings.storage.buckets,
        limits=RingLimits.of(settings.ingestion),
    )
    route = RoutingDocument.single("churn", 1, revision=1)

    def load(model: str, version: int) -> LoadedModel:
        return workspace.models.package(model, version).load()

    async def run() -> None:
        async with AsyncOnlineStore.open(settings) as store:
            streams = AsyncStreams(workspace.online_config, store.client)
            router = ABRouter(lambda _: route)
            predictor = Predictor(
                Stages(FeatureLookup(store, readers, workspace.clock), router, ModelRunner(load), router),
                readers,
                VersionBook(lambda model, version: VersionFacts(NAMES)),  # noqa: ARG005
                PredictionLog(streams.append_predictions),
                workspace.clock,
                deadline_ms=20_000,
            )
            answer = await predictor.predict(PredictRequest("churn", tuple(users), tuple(users), {}))
            assert answer.logged
            assert {each.source for each in answer.entities} == {"model"}

    asyncio.run(run())


def parity(workspace: Workspace) -> dict[str, Any]:
    Sink.of(workspace).drain_once()
    (verdict,) = run_checks(workspace, workspace.settings, ["parity"])
    assert isinstance(verdict, Verdict)
    return {finding.subject: finding for finding in verdict.findings}


@pytest.fixture
def served(workspace: Workspace) -> Workspace:
    send(workspace, *(event(user, f"{user}-{n}", days=n + 0.5, amount=n + 1.0) for user in USERS for n in range(3)))
    return workspace


def test_untouched_rings_are_what_training_would_have_seen(served: Workspace) -> None:
    serve(served, USERS)
    findings = parity(served)
    assert set(findings) == set(NAMES)
    assert {finding.severity for finding in findings.values()} == {Severity.OK}
    assert {finding.evidence["counts"]["equal"] for finding in findings.values()} == {20}


@pytest.mark.parametrize(
    ("feature", "life", "byte"), [("user_sales__n_30d", False, 0x40), ("user_sales__largest", True, 0x41)]
)
def test_a_byte_of_a_ring_that_was_changed_by_hand_is_a_mismatch_and_an_alarm(
    served: Workspace, feature: str, life: bool, byte: int
) -> None:
    client, key = served.online.client, bundle_key(served, "u7")
    limits = RingLimits.of(served.settings.ingestion)
    (changed,) = [group for group in ring_layout(user_sales, limits).groups if group.life == life]
    rings = rings_in(client.get(key))
    ring = bytearray(rings[changed.ring_id])
    ring[state_byte(ring)] ^= byte
    client.set(key, bundled(rings | {changed.ring_id: bytes(ring)}))
    serve(served, USERS)
    findings = parity(served)
    wrong = findings[feature]
    assert wrong.severity is Severity.ALARM
    assert (wrong.evidence["counts"]["mismatch"], wrong.evidence["counts"]["equal"]) == (1, 19)
    assert wrong.evidence["unexplained_rate"] == 0.05
    example = served.offline_store.read_predictions("churn", start_us=0, end_us=NOW_US + 1).to_pylist()
    assert {row["entity"] for row in example if row["prediction_id"] == wrong.evidence["example"]} == {"u7"}
    assert {name for name, each in findings.items() if each.severity is not Severity.OK} == {feature}


def bundle_key(workspace: Workspace, user: str) -> str:
    (bucket,) = USER.buckets(USER.encoded([user]), workspace.settings.storage.buckets).tolist()
    return workspace.online.keys.bundle("sales", USER.name, user, bucket)


def state_byte(ring: bytearray) -> int:
    """Where the highest byte but one of a state lies, in the first slot that events of these days went into."""
    values = np.frombuffer(bytes(ring), dtype="<f8")
    newest = NOW_US // US_PER_DAY
    tile = next(at for at, value in enumerate(values) if newest - 40 < value < newest + 1)
    return 8 * (tile + 1) + 6


def test_a_ring_that_was_lost_is_told_as_what_it_is(served: Workspace) -> None:
    served.online.client.unlink(bundle_key(served, "u3"))
    serve(served, USERS)
    findings = parity(served)
    assert findings["user_sales__n_30d"].evidence["counts"]["mismatch"] == 1, "a count of nothing is 0, not null"
    assert findings["user_sales__largest"].evidence["counts"]["online null"] == 1


def test_an_event_that_came_after_the_prediction_is_late_and_no_fault(served: Workspace) -> None:
    clock = served.clock
    assert isinstance(clock, ManualClock)
    serve(served, USERS)
    clock.advance(US_PER_HOUR)
    send(served, event("u5", "late", days=0.2, amount=99.0))
    findings = parity(served)
    for feature in NAMES:
        assert findings[feature].severity is Severity.OK
        assert findings[feature].evidence["counts"]["late"] == 1
        assert findings[feature].evidence["counts"]["equal"] == 19
