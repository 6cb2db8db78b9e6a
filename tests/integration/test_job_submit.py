"""A job, submitted as a user would, to a cluster that keeps running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from configs.churn.cdnow import write_parquet
from configs.churn.definitions import churn, purchases
from heliostat import cluster
from heliostat.batch import SCORE, VERSION
from heliostat.clock import parse_instant_us
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.settings import Settings
from heliostat.workspace import Workspace

ROOT = Path(__file__).parents[2]
JULY = parse_instant_us("1998-07-01")
CUSTOMERS = 500


@pytest.fixture
def head(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a running cluster takes jobs; `python` there is this one."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("HELIOSTAT_HOME", str(settings.home))
    cluster.start_head(settings)
    try:
        address = cluster.jobs_address(settings.home)
        assert address is not None
        yield address
    finally:
        cluster.stop_head(settings.home)


def _constant(score_bias: float) -> ModelPackage:
    """A booster that was told next to nothing."""
    rng = np.random.default_rng(0)
    matrix, labels = rng.normal(size=(200, len(churn.feature_names))), rng.random(200) < score_bias
    rows = lgb.Dataset(matrix, labels.astype(float), feature_name=list(churn.feature_names))
    booster = lgb.train({"objective": "binary", "verbosity": -1, "num_threads": 1}, rows, num_boost_round=3)
    return ModelPackage(booster.model_to_string(), Signature.of(churn), churn.objective)


@pytest.mark.slow
def test_batch_prediction_is_submitted_to_a_running_cluster_and_its_rows_are_there(
    head: str, settings: Settings
) -> None:
    with Workspace.open(settings) as workspace:
        write_parquet(settings.home / "purchases.parquet")
        events = pq.read_table(settings.home / "purchases.parquet").filter(pc.field("customer_id") <= CUSTOMERS)
        workspace.event_log.append(purchases, events, ingested_us=JULY)
        workspace.models.register(churn, _constant(0.8), lineage={})
        workspace.models.promote("churn", 1, force=True, reason="a test")

        command = [
            str(Path(sys.executable).with_name("ray")),
            *("job", "submit", "--address", head, "--working-dir", ".", "--"),
            *("python", "jobs/batch_predict.py", "--model", "churn", "--as-of", "1998-07-01", "--json"),
        ]
        environment = {**os.environ, "RAY_AUTH_MODE": "token"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
        )

        assert done.returncode == 0, done.stdout + done.stderr
        printed = next(line for line in done.stdout.splitlines() if line.startswith('{"model"'))
        found = workspace.offline_store.read_batch("churn", JULY)
        assert json.loads(printed)["entities"] == found.num_rows == CUSTOMERS
        assert set(found.column(VERSION).to_pylist()) == {1}
        assert pc.all(pc.is_finite(found.column(SCORE))).as_py()
