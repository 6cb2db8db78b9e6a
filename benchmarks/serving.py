"""The whole inference graph against what a user would first write, side by side.

    python benchmarks/serving.py            # two minutes; writes benchmarks/results/serving.{md,json}
    python benchmarks/serving.py --smoke    # seconds: does it run, do both say the same

Heliostat: the fused graph on Ray Serve behind HAProxy: rings merged at the request's instant,
A/B assignment, LightGBM, every prediction durable in the log before its answer. Peer:
`benchmarks/plain_server.py`, FastAPI and LightGBM on ready-made vectors, one HMGET an entity.
Same machine, same Valkey server, same model, same load generator; they take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import lightgbm
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import load
from benchmarks.peers import ROOT, Report, facts, python_of
from heliostat import cluster
from heliostat.clock import US_PER_DAY, format_instant
from heliostat.ingestion.intake import Intake
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.settings import ClockSettings, RaySettings, ServingSettings, Settings
from heliostat.storage.embedded import EmbeddedServer
from heliostat.workspace import Workspace

PEER_PACKAGES = ("fastapi", "uvicorn", "uvloop", "httptools", "redis", "hiredis", "lightgbm", "numpy")
PEER_PREFIX = "plain:customer:"
MODEL = "churn"
EVENTS_A_CUSTOMER = 8
TREES = 100
_CHUNK = 1_000


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        customers: With events.
        entities: A request, one cell each.
        concurrency: Connections, one cell each.
        seconds: A run.
        rounds: Runs of each contender in each cell.
    """

    customers: int = 2_000
    entities: tuple[int, ...] = (1, 100)
    concurrency: tuple[int, ...] = (1, 16, 64)
    seconds: float = 2.0
    rounds: int = 3


SMOKE = Plan(customers=50, entities=(1, 5), concurrency=(1, 4), seconds=0.3, rounds=1)


@dataclass
class Cell:
    """One contender in one cell, a figure a run."""

    requests_per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    failed: int = 0

    def add(self, found: dict[str, float]) -> None:
        """Add a run of `benchmarks/load.py`."""
        self.requests_per_s.append(found["requests_per_s"])
        self.p50_ms.append(found["p50_ms"])
        self.p99_ms.append(found["p99_ms"])
        self.failed += int(found["failed"])


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


# ── The same data for both ──────────────────────────────────────────────────────────


def prepare(workspace: Workspace, customers: int) -> None:
    """Events of customers ``1 … n`` into the rings, a model, a route; and for the peer the same as hashes."""
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
    reader = FeatureReader(
        spec.feature_refs,
        keys=workspace.online.keys,
        n_buckets=settings.storage.buckets,
        limits=RingLimits.of(settings.ingestion),
    )
    batch, _ = reader.read(workspace.online, [str(each) for each in range(1, customers + 1)], as_of_us=now_us)
    _register(workspace, batch.matrix)
    with workspace.online.client.pipeline(transaction=False) as pipeline:
        for customer, vector in enumerate(batch.matrix.tolist(), start=1):
            values = {name: repr(value) for name, value in zip(batch.names, vector, strict=True) if value == value}
            pipeline.hset(f"{PEER_PREFIX}{customer}", mapping=values)
        pipeline.execute()


def _register(workspace: Workspace, matrix: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> None:
    spec = workspace.definitions.model(MODEL)
    rng = np.random.default_rng(7)
    names = list(spec.feature_names)
    labels = (rng.random(len(matrix)) < 1 / (1 + matrix[:, 0])).astype(float)
    parameters = {"objective": "binary", "num_leaves": 15, "min_data_in_leaf": 5, "verbosity": -1, "seed": 7}
    data = lightgbm.Dataset(matrix, labels, feature_name=names, params={"verbosity": -1})
    booster = lightgbm.train(parameters, data, num_boost_round=TREES)
    package = ModelPackage(booster.model_to_string(), Signature.of(spec), spec.objective)
    version = workspace.models.register(spec, package, lineage={}).version
    workspace.rollout.serve(MODEL, version, reason="benchmark")
    (workspace.settings.home / "model.txt").write_text(package.booster_text)
    (workspace.settings.home / "features.json").write_text(json.dumps(names))


# ── The contenders ──────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def peer(workspace: Workspace, python: Path) -> Iterator[str]:
    """The plain server while the block runs; gives its address."""
    home = workspace.settings.home
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [str(python), str(ROOT / "benchmarks" / "plain_server.py")]
    options = ["--redis", str(workspace.settings.online.url), "--prefix", PEER_PREFIX, "--port", str(port)]
    files = ["--model", str(home / "model.txt"), "--features", str(home / "features.json")]
    process = subprocess.Popen([*program, *options, *files])
    try:
        limit = time.monotonic() + 60
        while time.monotonic() < limit and process.poll() is None:
            with contextlib.closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


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


def check_agreement(ours: str, plain: str, customers: int) -> None:
    """Refuse to compare servers that say different things.

    Raises:
        SystemExit: If they do.
    """
    asked = {"entity_ids": list(range(1, min(customers, 500) + 1))}
    answers = [httpx.post(f"{url}/predict", json=asked, timeout=30).json() for url in (ours, plain)]
    left, right = (np.array(each["predictions"]) for each in answers)
    if not np.array_equal(left, right):
        raise SystemExit(f"the servers disagree by up to {np.abs(left - right).max():.3g}")


def measure(ours: str, plain: str, plan: Plan) -> dict[tuple[int, int], dict[str, Cell]]:
    """All cells; in each the contenders take turns."""
    cells: dict[tuple[int, int], dict[str, Cell]] = {}
    for entities in plan.entities:
        for concurrency in plan.concurrency:
            cell = cells[entities, concurrency] = {"heliostat": Cell(), "plain": Cell()}
            for turn in range(-1, plan.rounds):  # the first turn warms up
                for name, url in (("heliostat", ours), ("plain", plain)):
                    seconds = plan.seconds if turn >= 0 else min(plan.seconds, 0.5)
                    found = load.run(
                        f"{url}/predict",
                        seconds=seconds,
                        entities=entities,
                        population=plan.customers,
                        concurrency=concurrency,
                        seed=turn,
                    )
                    if turn >= 0:
                        cell[name].add(found)
            told = ", ".join(f"{name} {statistics.median(each.requests_per_s):,.0f}/s" for name, each in cell.items())
            print(f"{entities} entities, concurrency {concurrency}: {told}", flush=True)
    return cells


def report(cells: dict[tuple[int, int], dict[str, Cell]], plan: Plan) -> Report:
    """The table: medians, and the ratio of the medians."""
    rows: list[list[object]] = []
    for (entities, concurrency), cell in cells.items():
        row: list[object] = [entities, concurrency]
        for name in ("requests_per_s", "p50_ms", "p99_ms"):
            ours, plain = (statistics.median(getattr(cell[each], name)) for each in ("heliostat", "plain"))
            row += [ours, plain, ours / plain]
        rows.append(row)
    failed = {name: sum(cell[name].failed for cell in cells.values()) for name in ("heliostat", "plain")}
    columns = ["entities", "concurrency"]
    columns += [f"{what} {who}" for what in ("req/s", "p50 ms", "p99 ms") for who in ("Heliostat", "plain", "ratio")]
    return Report(
        title="Serving: the whole fused graph against a plain FastAPI program",
        columns=columns,
        rows=rows,
        notes=(
            "ratio: Heliostat over plain; above 1 is better for req/s, below 1 for latencies.",
            f"Medians of {plan.rounds} runs of {plan.seconds:g} s each; the contenders took turns in one run.",
            "Heliostat merges rings at the request's instant, so that an event shows in the next request.",
            "It also assigns variants, and writes every prediction to a durable log before it answers.",
            "Plain reads ready-made vectors, one HMGET an entity in a pipeline, and does nothing else.",
            "Plain is one uvicorn process with uvloop and httptools; Heliostat one replica behind HAProxy.",
            "Both gave the same predictions, bit by bit, before anything was timed.",
            f"Failed requests: Heliostat {failed['heliostat']}, plain {failed['plain']}.",
        ),
        facts=facts(
            "ray", "fastapi", "redis", "lightgbm", customers=plan.customers, trees=TREES, events=EVENTS_A_CUSTOMER
        ),
    )


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="as small as it gets, in this Python, nothing written")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of a run")
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="runs of each contender in each cell")
    given = parser.parse_args()
    plan = SMOKE if given.smoke else Plan(seconds=given.seconds, rounds=given.rounds)
    same = [f"{name}=={importlib.metadata.version(name)}" for name in PEER_PACKAGES]
    python = Path(sys.executable) if given.smoke else python_of("plain-server", same)
    with project() as settings, Workspace.open(settings) as workspace:
        prepare(workspace, plan.customers)
        with peer(workspace, python) as plain, graph(workspace) as ours:
            check_agreement(ours, plain, plan.customers)
            found = report(measure(ours, plain, plan), plan)
    print(found.markdown())
    if not given.smoke:
        print(f"written to {found.write('serving').relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
