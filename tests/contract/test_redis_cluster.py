"""The online store's contract on a Redis Cluster of three primaries: events, rings, streams, routes, erasure."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.features.definitions import FeatureView
from heliostat.features.offline import compute_features
from heliostat.forgetting import forget
from heliostat.ingestion.intake import Intake
from heliostat.ingestion.sink import Sink
from heliostat.online.materialize import materialize
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.settings import ClockSettings, OnlineSettings, Settings
from heliostat.storage.erasure import ServerEraser
from heliostat.storage.online_store import AsyncOnlineStore
from heliostat.storage.streams import AsyncStreams, record_key
from heliostat.workspace import Workspace
from tests.integration.erasure_declarations import SALES, USER, shop_sales, user_sales

pytestmark = pytest.mark.slow

NOW_US = parse_instant_us("2026-03-01")
USERS = [f"user-{number}" for number in range(40)]
SHOPS = [f"shop-{number}" for number in range(5)]


@pytest.fixture
def workspace(home: Path, cluster_url: str) -> Iterator[Workspace]:
    settings = Settings(
        project=f"c{uuid.uuid4().hex[:8]}",
        home=home,
        definitions="tests.integration.erasure_declarations",
        online=OnlineSettings(url=cluster_url, cluster=True, timeout_s=10.0),
        clock=ClockSettings(kind="replay", replay_from="2026-03-01", speed=0),
    )
    with Workspace.open(settings) as opened:
        yield opened


def intake_of(workspace: Workspace) -> Intake:
    return Intake(
        workspace.online,
        [SALES],
        list(workspace.definitions.views.values()),
        clock=workspace.clock,
        settings=workspace.settings.ingestion,
        n_buckets=workspace.settings.storage.buckets,
    )


def events(n: int = 200, seed: int = 7) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    sent = [
        {
            "event_id": f"e{seed}-{number}",
            "user": USERS[rng.integers(len(USERS))],
            "shop": SHOPS[rng.integers(len(SHOPS))],
            "device": "phone",
            "at": NOW_US - int(rng.integers(1, 40 * US_PER_DAY)),
            "amount": float(rng.integers(1, 100)),
        }
        for number in range(n)
    ]
    return sorted(sent, key=lambda each: int(each["at"]))


def reader(workspace: Workspace, view: FeatureView) -> FeatureReader:
    return FeatureReader(
        list(view),
        keys=workspace.online.keys,
        n_buckets=workspace.settings.storage.buckets,
        limits=RingLimits.of(workspace.settings.ingestion),
    )


def online(workspace: Workspace, view: FeatureView, texts: list[str]) -> Any:
    batch, _ = reader(workspace, view).read(workspace.online, texts, as_of_us=NOW_US)
    return batch.matrix


def offline(workspace: Workspace, view: FeatureView, texts: list[str]) -> Any:
    log = workspace.event_log.read(SALES, view.entity)
    instants = np.full(len(texts), NOW_US)
    columns = compute_features([view], log, view.entity.encoded(texts), instants, deduplicate=False)
    return np.column_stack([columns[ref.name] for ref in view])


def test_keys_are_spread_over_all_primaries(workspace: Workspace) -> None:
    intake_of(workspace).submit("sales", events())
    assert workspace.online.info().nodes == 3
    held = {
        node.port: sum(1 for _ in client.scan_iter(f"{workspace.online.keys.root}:*"))
        for node in workspace.online.client.get_primaries()
        for client in [workspace.online.client.get_redis_connection(node)]
    }
    assert len(held) == 3
    assert min(held.values()) > 0


def test_live_events_reach_rings_and_log_once_and_both_agree(workspace: Workspace) -> None:
    intake, sent = intake_of(workspace), events()
    first = intake.submit("sales", sent)
    again = intake.submit("sales", sent[:50])
    assert {each.status for each in first} == {"accepted"}
    assert {each.status for each in again} == {"duplicate"}
    assert Sink.of(workspace).drain_once().events == len(sent)
    assert workspace.event_log.read(SALES, USER).num_rows == len(sent)
    for view, texts in ((user_sales, USERS), (shop_sales, SHOPS)):
        np.testing.assert_allclose(online(workspace, view, texts), offline(workspace, view, texts), rtol=1e-12)


def test_history_is_materialized_beside_live_events(workspace: Workspace) -> None:
    intake = intake_of(workspace)
    intake.submit("sales", events(seed=1))
    Sink.of(workspace).drain_once()
    workspace.online.remove(
        [key for keys in workspace.online.scan(f"{workspace.online.keys.root}:r:") for key in keys]
    )
    intake.submit("sales", events(n=20, seed=2))
    for _ in range(2):
        materialize(
            workspace.definitions.views.values(),
            event_log=workspace.event_log,
            online=workspace.online_config,
            as_of_us=NOW_US,
            limits=RingLimits.of(workspace.settings.ingestion),
            on_ray=False,
        )
    Sink.of(workspace).drain_once()
    for view, texts in ((user_sales, USERS), (shop_sales, SHOPS)):
        np.testing.assert_allclose(online(workspace, view, texts), offline(workspace, view, texts), rtol=1e-12)


def test_asyncio_reads_features_and_the_route_and_logs_predictions(workspace: Workspace) -> None:
    intake_of(workspace).submit("sales", events())
    keys = workspace.online.keys
    workspace.online.put_many({keys.route("churn"): b"a route"})

    async def ask() -> tuple[Any, list[bytes | None]]:
        async with AsyncOnlineStore.open(workspace.settings) as store:
            streams = AsyncStreams(workspace.online_config, store.client)
            entry = {
                "prediction_id": "p", "entity": "user-1", "variant": "control", "version": 1, "score": 0.5,
                "features": [], "missing": [], "source": "model", "fallback": None, "given": [],
            }  # fmt: skip
            record = {"request_id": "p", "model": "churn", "revision": 1, "at_us": NOW_US, "entries": [entry]}
            await streams.append_predictions([orjson.dumps(record)])
            predictions, actuals = (record_key(workspace.online_config, each) for each in ("predictions", "actuals"))
            waiting, oldest = await streams.backlog([predictions, actuals])
            assert (waiting, oldest is None) == (1, False)
            batch, route = await reader(workspace, user_sales).aread(
                store, USERS, as_of_us=NOW_US, also=[keys.route("churn")]
            )
            return batch.matrix, route

    matrix, route = asyncio.run(ask())
    assert route == [b"a route"]
    np.testing.assert_array_equal(matrix, online(workspace, user_sales, USERS))
    assert Sink.of(workspace).drain_once().predictions == 1


def test_a_forgotten_entity_is_in_no_key_of_any_primary(workspace: Workspace) -> None:
    intake_of(workspace).submit("sales", events(400))
    before = online(workspace, user_sales, USERS[1:])
    report = forget(workspace, USER, "user-0")
    assert report.left == ()
    with ServerEraser(workspace.online_config) as server:
        assert [key for key in server.find("user-0") if key.endswith("user-0")] == []
    np.testing.assert_array_equal(online(workspace, user_sales, USERS[1:]), before)
    np.testing.assert_allclose(
        online(workspace, shop_sales, SHOPS), offline(workspace, shop_sales, SHOPS), rtol=1e-12
    )
    assert offline(workspace, user_sales, ["user-0"])[0, 0] == 0
