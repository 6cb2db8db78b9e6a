"""One of several processes that want the same thing at the same time; see test_registry_concurrency.

For each task that comes in as a line, it opens everything, says so, waits for another line, does
what it was told, and prints what came of it as JSON. It ends with its standard input.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from heliostat.clock import SystemClock
from heliostat.errors import ConflictError
from heliostat.experiments.rollout import Rollout
from heliostat.features.aggregations import Count, Sum
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.features.registry import FeatureRegistry
from heliostat.models.definitions import Definitions, Label, ModelSpec
from heliostat.models.packaging import ModelPackage
from heliostat.models.registry import ModelRegistry
from heliostat.schema import TIMESTAMP
from heliostat.storage.artifact_store import ArtifactStore
from heliostat.storage.catalog import Catalog

customer = Entity("customer", keys={"customer_id": "int64"})
purchases = EventSource(
    "purchases",
    schema=pa.schema([("customer_id", pa.int64()), ("at", TIMESTAMP), ("id", pa.string()), ("amount", pa.float64())]),
    entity=customer,
    event_time="at",
    event_id="id",
)
behaviour = FeatureView(
    "behaviour",
    version=1,
    source=purchases,
    features={"n": Count(window="30d"), "spend": Sum("amount", window="30d")},
)
churn = ModelSpec("churn", customer, [behaviour], Label.none_within("churned", purchases, "90d"))
definitions = Definitions.of([churn])


def catalog_url(home: Path) -> str:
    return f"sqlite:///{home}/catalog.db"


def package_of(home: Path) -> ModelPackage:
    return ModelPackage.from_files({file.name: file.read_bytes() for file in (home / "package").iterdir()})


def act(task: str, home: Path, number: int, catalog: Catalog) -> Any:
    models = ModelRegistry(catalog, ArtifactStore(home / "artifacts"), SystemClock())
    try:
        match task:
            case "register":
                return [models.register(churn, package_of(home), lineage={"by": number}).version for _ in range(5)]
            case "promote":
                gate = {"passed": True, "checks": []}
                return models.promote("churn", number + 1, expected_revision=0, gate=gate).version
            case "rollback":
                return models.rollback("churn", reason=f"{number}", expected_revision=3).version
            case "apply":
                return len(FeatureRegistry(catalog, SystemClock()).apply(definitions).added)
            case "serve":
                route = home / "route.json"

                def publish(_: str, document: bytes) -> None:
                    draft = route.with_suffix(f".{number}")
                    draft.write_bytes(document)
                    draft.replace(route)

                for turn in range(10):
                    Rollout(catalog, SystemClock(), publish).serve("churn", number % 4 + 1, reason=f"{number}.{turn}")
                return "done"
            case _:
                raise SystemExit(f"unknown task {task}")
    except ConflictError as error:
        return type(error).__name__


def _answer(value: Any) -> None:
    sys.stdout.write(orjson.dumps(value).decode() + "\n")
    sys.stdout.flush()


def _work(task: str, home: Path, number: int) -> Any:
    if task == "open":  # opening itself is what is raced for
        _answer("ready")
        sys.stdin.readline()
        with Catalog.open(catalog_url(home)) as catalog, catalog.write() as rows:
            return rows.start_run("open", str(number), started_us=0)
    with Catalog.open(catalog_url(home)) as catalog:
        _answer("ready")
        sys.stdin.readline()
        return act(task, home, number, catalog)


if __name__ == "__main__":
    for line in sys.stdin:
        wanted = orjson.loads(line)
        _answer(_work(wanted["task"], Path(wanted["home"]), int(sys.argv[1])))
