"""Twenty changes of a route under load, over two replicas on Ray Serve."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import orjson
import pytest

from deployments import graph
from heliostat.experiments.assignment import RoutingDocument
from heliostat.workspace import Workspace
from tests.integration.test_serving import register, settings_on_serve

ENTITIES = list(range(1, 9))
ASKED = {"entity_ids": ENTITIES, "features": [{"count_30d": each % 5} for each in ENTITIES]}
VERSIONS = (1, 2, 3)


@pytest.fixture
def shop(session_home: Path, valkey: str, ray_local: None) -> Iterator[Workspace]:  # noqa: ARG001 - it must run
    with Workspace.open(
        settings_on_serve(session_home / "live-promotion", valkey, replicas=2, deadline_ms=20_000.0)
    ) as workspace:
        for seed in VERSIONS:
            register(workspace, seed)
        yield workspace
    graph.undeploy()


def moves(shop: Workspace) -> Iterator[Callable[[], object]]:
    """Promotions, rollbacks, and a split that begins, widens and ends; over and over."""
    for turn in itertools.count():
        yield lambda: shop.promote("churn", 2, reason="better", force=True)
        yield lambda: shop.roll_back("churn", reason="it wasn't")
        yield lambda: shop.promote("churn", 3, reason="better", force=True)
        yield lambda turn=turn: shop.rollout.start_split(
            "churn", experiment=f"e{turn}", control=3, challenger=2, weight=0.5, coverage=0.2
        )
        yield lambda: shop.rollout.widen("churn", 1.0)
        yield lambda: shop.roll_back("churn", reason="neither")


def test_twenty_promotions_rollbacks_and_splits_drop_no_request_and_mix_no_versions(shop: Workspace) -> None:
    shop.promote("churn", 1, reason="the first one", force=True)
    url = graph.deploy(shop.settings)
    # One looks features up, and the route with them; one brings them all, and the log sees whether its route holds.
    names = shop.definitions.model("churn").feature_names
    given = [{name: float(each * at % 8) for at, name in enumerate(names, 1)} for each in ENTITIES]
    alone = {"entity_ids": ENTITIES, "features": given}
    bodies = (ASKED, alone)
    scores: dict[tuple[int, int], list[float]] = {}
    sent: dict[str, tuple[int, list[int]]] = {}

    async def scenario() -> None:
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=url, timeout=20, limits=limits) as client:
            for version in VERSIONS:
                shop.rollout.serve("churn", version, reason="what does it say")
                for which, body in enumerate(bodies):
                    scores[which, version] = (await client.post("/predict", json=body)).json()["predictions"]
            shop.rollout.serve("churn", 1, reason="the first one again")
            done = asyncio.Event()
            acknowledged = revision(shop)

            async def ask(which: int) -> None:
                while not done.is_set():
                    known = acknowledged
                    reply = await client.post("/predict", json=bodies[which])
                    assert reply.status_code == 200, reply.text
                    answer = reply.json()
                    assert answer["degraded"] is False
                    versions = [each["model_version"] for each in answer["entities"]]
                    right = [scores[which, version][row] for row, version in enumerate(versions)]
                    assert answer["predictions"] == right, "scores of another version"
                    sent[answer["request_id"]] = known, versions

            async def move() -> None:
                nonlocal acknowledged
                try:
                    for change in itertools.islice(moves(shop), 20):
                        before = len(sent)
                        await asyncio.to_thread(change)
                        acknowledged = revision(shop)
                        while len(sent) < before + 20:  # noqa: ASYNC110 - some requests by each route
                            await asyncio.sleep(0.005)
                finally:
                    done.set()

            await asyncio.gather(move(), *(ask(each % len(bodies)) for each in range(8)))

    asyncio.run(scenario())
    assert len({tuple(each) for each in scores.values()}) == len(VERSIONS) * len(bodies)
    routes = {row.revision: RoutingDocument.from_document(row.document) for row in shop.rollout.history("churn")}
    logged: dict[str, int] = {}
    for _, payload in shop.streams.read(shop.streams.record_stream("predictions")):
        record = orjson.loads(payload.partition(b"\n")[0])
        for each in record["requests"]:
            assert each["request_id"] not in logged
            logged[each["request_id"]] = record["revision"]
    used = set()
    for request_id, (known, versions) in sent.items():
        at = logged[request_id]
        assert at >= known, "a request that came after a change was acknowledged got the route before it"
        route = routes[at]
        variants = [route.variant_of(str(entity)) or route.control for entity in ENTITIES]
        assert versions == [variant.version for variant in variants], "no route ever said that"
        used.add(at)
    assert len(used) >= 20


def revision(shop: Workspace) -> int:
    found = shop.rollout.current("churn")
    assert found is not None
    return found.revision
