"""A project on real purchases, with a version that was trained on them; what tests of scores share."""

from __future__ import annotations

from typing import Any

import lightgbm as lgb
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.churn.cdnow import write_parquet
from configs.churn.definitions import churn, purchases
from heliostat.clock import parse_instant_us
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.models.profile import Profile
from heliostat.models.rows import LABEL, ModelRows
from heliostat.online.materialize import materialize
from heliostat.online.tiles import RingLimits
from heliostat.schema import times_us
from heliostat.workspace import Workspace

JULY_US = parse_instant_us("1998-07-01")
LIVE_US = parse_instant_us("1998-06-30")
TRAINED_AT_US = parse_instant_us("1998-01-01")


def fill(workspace: Workspace, customers: int) -> list[dict[str, Any]]:
    """Take in the purchases of the first customers, but those of the last day; train and serve version 1.

    Args:
        workspace: With a clock at `JULY_US`.
        customers: Ids up to this one.

    Returns:
        The purchases of the last day, as ``POST /events`` takes them.
    """
    file = workspace.settings.home / "purchases.parquet"
    write_parquet(file)
    events = pq.read_table(file).filter(pc.field("customer_id") <= customers)
    times = times_us(events.column("purchased_at"))
    workspace.event_log.append(purchases, events.filter(times < LIVE_US), ingested_us=LIVE_US)
    materialize(
        churn.views,
        event_log=workspace.event_log,
        online=workspace.online_config,
        as_of_us=JULY_US,
        limits=RingLimits.of(workspace.settings.ingestion),
        on_ray=False,
    )
    workspace.models.register(churn, trained(workspace, 7), lineage={})
    workspace.rollout.serve("churn", 1, reason="the first one")
    live = events.filter(times >= LIVE_US).to_pylist()
    return [{**each, "purchased_at": each["purchased_at"].isoformat()} for each in live]


def rows_of(workspace: Workspace, at_us: int, *, labelled: bool) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Customers, feature matrix and labels (or nothing) as training reads them."""
    rows = ModelRows.of(churn, workspace.event_log, [at_us], labelled=labelled)
    tables = [rows.table(bucket) for bucket in workspace.event_log.buckets]
    keys = [key for table in tables for key in table.column("customer_id").to_pylist()]
    matrix = np.concatenate(
        [np.column_stack([table.column(name).to_numpy() for name in churn.feature_names]) for table in tables]
    )
    labels = np.concatenate([table.column(LABEL).to_numpy() for table in tables]) if labelled else np.empty(0)
    return keys, np.ascontiguousarray(matrix), labels


def trained(workspace: Workspace, seed: int) -> ModelPackage:
    """A version of the churn model, fitted to what the log says as of January."""
    _, matrix, labels = rows_of(workspace, TRAINED_AT_US, labelled=True)
    parameters = {"objective": "binary", "num_leaves": 31, "verbosity": -1, "num_threads": 1, "seed": seed}
    parameters |= {"bagging_fraction": 0.7, "bagging_freq": 1, "feature_fraction": 0.8}
    booster = lgb.train(parameters, lgb.Dataset(matrix, labels, feature_name=list(churn.feature_names)), 60)
    profile = Profile.of(matrix, churn.feature_names, np.asarray(booster.predict(matrix)))
    return ModelPackage(booster.model_to_string(), Signature.of(churn), "binary", profile=profile.to_document())
