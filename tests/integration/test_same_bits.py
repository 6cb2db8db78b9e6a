"""One version, one request, one instant: the same score bit for bit, whoever computes it; on the CDNOW purchases.

Fused, distributed, batch, offline as training reads its rows, and from the log.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from configs.churn.definitions import churn
from deployments import graph
from heliostat.batch import predict_all
from heliostat.ingestion.sink import Sink
from heliostat.settings import ClockSettings, OnlineSettings, ServingSettings, Settings
from heliostat.workspace import Workspace
from tests.integration.cdnow_shop import JULY_US, fill, rows_of, trained

Scores = dict[int, float]


@pytest.fixture(scope="module")
def workspace(session_home: Path, valkey: str, ray_local: None) -> Iterator[Workspace]:  # noqa: ARG001 - it must run
    """Purchases up to the last day come from history, those of the last day live; a trained version serves."""
    settings = Settings(
        project="bits",
        home=session_home / "bits",
        online=OnlineSettings(url=valkey, timeout_s=10.0),
        clock=ClockSettings(kind="replay", replay_from="1998-07-01", speed=0.0),
        serving=ServingSettings(port=0, deadline_ms=20_000.0),
    )
    with Workspace.open(settings) as opened:
        live = fill(opened, 3_000)
        with httpx.Client(base_url=graph.deploy(opened.settings), timeout=30) as client:
            reply = client.post("/events", json={"source": "purchases", "events": live})
            assert reply.json()["accepted"] == len(live) > 3
        Sink.of(opened).drain_once()
        yield opened
    graph.undeploy()


def asked(url: str, customers: list[int], seed: int) -> Scores:
    """Scores by the HTTP API, in requests of many sizes, in no order."""
    order = np.random.default_rng(seed).permutation(customers).tolist()
    scores: Scores = {}
    with httpx.Client(base_url=url, timeout=30) as client:
        sizes = iter([1] * 40 + [2, 3, 7, 50, 333] + [500] * len(order))
        while order:
            size = next(sizes)
            some, order = order[:size], order[size:]
            reply = client.post("/predict", json={"entity_ids": some})
            assert reply.status_code == 200, reply.text
            answer = reply.json()
            assert {each["source"] for each in answer["entities"]} == {"model"}
            scores.update(zip(some, answer["predictions"], strict=True))
    return scores


def bits(scores: Scores, customers: list[int]) -> np.ndarray:
    return np.array([scores[each] for each in customers]).view(np.int64)


@pytest.mark.slow
def test_fused_distributed_batch_offline_and_logged_scores_are_the_same_bits(workspace: Workspace) -> None:
    settings = workspace.settings
    customers, matrix, _ = rows_of(workspace, JULY_US, labelled=False)
    model = workspace.models.load("churn", 1)
    offline = model.predict(matrix).view(np.int64)
    assert len(customers) > 2_900
    assert len(np.unique(offline)) > 500, "the version tells customers apart"

    fused = asked(graph.deploy(settings), customers, 1)
    np.testing.assert_array_equal(bits(fused, customers), offline)

    spread = settings.model_copy(update={"serving": settings.serving.model_copy(update={"placement": "distributed"})})
    distributed = asked(graph.deploy(spread), customers, 2)
    np.testing.assert_array_equal(bits(distributed, customers), offline)

    predict_all(workspace, churn, version=1, as_of_us=JULY_US)
    batch = workspace.offline_store.read_batch("churn", JULY_US)
    by_batch = dict(zip(batch.column("customer_id").to_pylist(), batch.column("score").to_pylist(), strict=True))
    np.testing.assert_array_equal(bits(by_batch, customers), offline)

    Sink.of(workspace).drain_once()
    rows = workspace.offline_store.read_predictions("churn", start_us=JULY_US, end_us=JULY_US + 1)
    assert rows.num_rows == 2 * len(customers)
    lists = rows.column("features").combine_chunks()
    stored = lists.flatten().to_numpy(zero_copy_only=False).reshape(rows.num_rows, -1)
    np.testing.assert_array_equal(
        model.predict(stored).view(np.int64), rows.column("score").to_numpy().view(np.int64)
    )


@pytest.mark.slow
def test_the_same_seed_trains_the_same_version_and_another_one_another(workspace: Workspace) -> None:
    first = workspace.models.get("churn", 1).artifact
    again, other = (workspace.models.register(churn, trained(workspace, seed), lineage={}) for seed in (7, 8))
    assert again.artifact == first != other.artifact
