"""What is served when serving is measured: customers in the rings, two versions of a model, the graph on Serve."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lightgbm
import numpy as np

from benchmarks.peers import ROOT
from heliostat import cluster
from heliostat.clock import US_PER_DAY, format_instant
from heliostat.ingestion.intake import Intake
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.online.retrieval import FeatureBatch, FeatureReader
from heliostat.settings import ClockSettings, RaySettings, ServingSettings, Settings
from heliostat.storage.embedded import EmbeddedServer
from heliostat.workspace import Workspace

PEER_PREFIX = "plain:customer:"
MODEL = "churn"
EVENTS_A_CUSTOMER = 8
TREES = 100
DISTRIBUTED = "distributed"
"""The second graph's application, and where it answers."""
_CHUNK = 1_000


@contextlib.contextmanager
def project() -> Iterator[Settings]:
    """Settings of a project that is there while the block runs: churn, at one instant, any free port."""
    home = Path(tempfile.mkdtemp(prefix="hs-bench-"))
    os.chdir(ROOT)  # where the definitions are imported from, here and in the replicas
    try:
        yield Settings(
            project="bench",
            home=home,
            clock=ClockSettings(kind="replay", replay_from="1998-07-01", speed=0.0),
            ray=RaySettings(object_store_bytes=200_000_000),
            serving=ServingSettings(port=0),
        )
    finally:
        EmbeddedServer.stop(home)
        shutil.rmtree(home, ignore_errors=True)


def prepare(workspace: Workspace, customers: int) -> FeatureBatch:
    """Events of customers ``1 … n`` into the rings, two versions, a split; and for the peer the same as hashes.

    Returns:
        The customers' features, in order.
    """
    rng = np.random.default_rng(7)
    now_us = workspace.clock.now_us()
    count = customers * EVENTS_A_CUSTOMER
    ages_us = (rng.exponential(60.0, count) * US_PER_DAY).astype(np.int64) + US_PER_DAY
    events = [
        {
            "event_id": number,
            "customer_id": 1 + number % customers,
            "purchased_at": format_instant(now_us - int(age_us)),
            "quantity": int(quantity),
            "amount": round(float(amount), 2),
        }
        for number, (age_us, quantity, amount) in enumerate(
            zip(ages_us, rng.integers(1, 6, count), rng.gamma(2.0, 15.0, count), strict=True)
        )
    ]
    definitions, settings = workspace.definitions, workspace.settings
    intake = Intake.of(workspace, workspace.online)
    for first in range(0, count, _CHUNK):
        intake.submit("purchases", events[first : first + _CHUNK])
    spec = definitions.model(MODEL)
    reader = FeatureReader.open(spec.feature_refs, settings)
    batch, _ = reader.read(workspace.online, [str(each) for each in range(1, customers + 1)], as_of_us=now_us)
    control, challenger = (_register(workspace, batch.matrix, seed) for seed in (7, 8))
    workspace.rollout.serve(MODEL, control, reason="benchmark")
    workspace.rollout.start_split(MODEL, experiment="benchmark", control=control, challenger=challenger, weight=0.5)
    home = workspace.settings.home
    (home / "model.txt").write_text(workspace.models.package(MODEL, control).booster_text)
    (home / "features.json").write_text(json.dumps(list(spec.feature_names)))
    with workspace.online.client.pipeline(transaction=False) as pipeline:
        for customer, vector in enumerate(batch.matrix.tolist(), start=1):
            values = {name: repr(value) for name, value in zip(batch.names, vector, strict=True) if value == value}
            pipeline.hset(f"{PEER_PREFIX}{customer}", mapping=values)
        pipeline.execute()
    return batch


def _register(workspace: Workspace, matrix: np.ndarray[tuple[int, int], np.dtype[np.float64]], seed: int) -> int:
    spec = workspace.definitions.model(MODEL)
    rng = np.random.default_rng(seed)
    names = list(spec.feature_names)
    labels = (rng.random(len(matrix)) < 1 / (1 + matrix[:, 0])).astype(float)
    parameters = {"objective": "binary", "num_leaves": 15, "min_data_in_leaf": 5, "verbosity": -1, "seed": seed}
    data = lightgbm.Dataset(matrix, labels, feature_name=names, params={"verbosity": -1})
    booster = lightgbm.train(parameters, data, num_boost_round=TREES)
    package = ModelPackage(booster.model_to_string(), Signature.of(spec), spec.objective)
    return workspace.models.register(spec, package, lineage={}).version


@contextlib.contextmanager
def graph(workspace: Workspace) -> Iterator[str]:
    """The fused graph on a Ray of its own while the block runs; gives its address."""
    cluster.set_environment()
    from deployments import graph as served  # Ray reads its environment when it is imported

    with cluster.connect(workspace.settings):
        url = served.deploy(workspace.settings)
        try:
            yield url
        finally:
            served.undeploy()


@contextlib.contextmanager
def distributed(workspace: Workspace, url: str) -> Iterator[str]:
    """The distributed placement beside the fused one while the block runs, on the same Serve; gives its address."""
    from ray import serve  # as in `graph`

    from deployments import graph as served

    serving = workspace.settings.serving.model_copy(update={"placement": "distributed"})
    application = served.graph(workspace.settings.model_copy(update={"serving": serving}))
    own = f"{url}/{DISTRIBUTED}"
    try:
        serve.run(application, name=DISTRIBUTED, route_prefix=f"/{DISTRIBUTED}")
        served.wait_for(f"{own}/healthz", 30.0)
        yield own
    finally:
        serve.delete(DISTRIBUTED)
