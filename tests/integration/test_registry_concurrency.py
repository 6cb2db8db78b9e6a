"""Several processes, one catalog and one artifact store: nobody loses a write, only one wins a swap."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import orjson
import pytest

from heliostat.clock import ManualClock
from heliostat.experiments.assignment import RoutingDocument
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.models.registry import ModelRegistry
from heliostat.storage.artifact_store import ArtifactStore
from heliostat.storage.catalog import Catalog
from heliostat.storage.catalog_tables import VersionRow
from tests.integration import registry_worker

PROCESSES = 4

Race = Callable[[str, Path], list[Any]]


def _tell(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(line + b"\n")
    process.stdin.flush()


def _answer(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read().decode()
    return orjson.loads(line)


@pytest.fixture(scope="module")
def race() -> Iterator[Race]:
    """Gives every process the same task, waits until all are ready, lets them go, collects what came of it."""
    root = Path(registry_worker.__file__).parents[2]
    running = [
        subprocess.Popen(
            [sys.executable, registry_worker.__file__, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root / "platform")},
        )
        for number in range(PROCESSES)
    ]

    def run(task: str, home: Path) -> list[Any]:
        for process in running:
            _tell(process, orjson.dumps({"task": task, "home": str(home)}))
        assert [_answer(process) for process in running] == ["ready"] * PROCESSES
        for process in running:
            _tell(process, b"go")
        return [_answer(process) for process in running]

    yield run
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def registry(home: Path) -> ModelRegistry:
    """Versions 1 to 4 of a model whose package lies in ``package/``."""
    matrix = np.random.default_rng(3).normal(size=(200, 2))
    data = lgb.Dataset(
        matrix, (matrix[:, 0] > 0).astype(float), feature_name=list(registry_worker.churn.feature_names)
    )
    booster = lgb.train({"objective": "binary", "verbosity": -1, "num_threads": 1}, data, 2)
    package = ModelPackage(booster.model_to_string(), Signature.of(registry_worker.churn), "binary")
    (home / "package").mkdir()
    for name, content in package.to_files().items():
        (home / "package" / name).write_bytes(content)
    catalog = Catalog.open(registry_worker.catalog_url(home))
    registry = ModelRegistry(catalog, ArtifactStore(home / "artifacts"), ManualClock())
    for _ in range(PROCESSES):
        registry.register(registry_worker.churn, package, lineage={})
    return registry


def test_many_processes_create_a_catalog_at_once(home: Path, race: Race) -> None:
    assert sorted(race("open", home)) == list(range(1, PROCESSES + 1))


def test_no_version_is_lost_or_given_twice(home: Path, race: Race, registry: ModelRegistry) -> None:
    numbers = [number for numbers in race("register", home) for number in numbers]
    expected = list(range(PROCESSES + 1, PROCESSES * 6 + 1))
    assert sorted(numbers) == expected
    assert len(registry.list("churn")) == PROCESSES * 6
    assert len({version.artifact for version in registry.list("churn")}) == 1
    registry.load("churn")


def test_one_of_many_promotions_wins(home: Path, race: Race, registry: ModelRegistry) -> None:
    results = race("promote", home)
    winners = [result for result in results if isinstance(result, int)]
    assert results.count("PromotionConflictError") == PROCESSES - 1
    assert [(row.revision, row.version) for row in registry.history("churn")] == [(1, winners[0])]


def test_one_of_many_rollbacks_wins(home: Path, race: Race, registry: ModelRegistry) -> None:
    for version in (1, 2, 3):
        registry.promote("churn", version, gate={"passed": True, "checks": []})
    results = race("rollback", home)
    assert sorted(map(str, results)) == ["2", *["PromotionConflictError"] * (PROCESSES - 1)]
    assert registry.get("churn", "production").version == 2


def test_definitions_are_added_once(home: Path, race: Race) -> None:
    assert sorted(race("apply", home)) == [*[0] * (PROCESSES - 1), 5]


def test_what_is_published_last_is_the_newest_route(home: Path, race: Race) -> None:
    with Catalog.open(registry_worker.catalog_url(home)) as catalog:
        with catalog.write() as rows:
            for version in (1, 2, 3, 4):
                rows.add_version(VersionRow("churn", version, "digest", {}, {}, {}, None, {}, 0))
        assert race("serve", home) == ["done"] * PROCESSES
        with catalog.read() as rows:
            history = rows.route_history("churn")
    assert [row.revision for row in history] == list(range(1, PROCESSES * 10 + 1))
    published = RoutingDocument.from_bytes((home / "route.json").read_bytes())
    assert published.to_document() == history[-1].document
