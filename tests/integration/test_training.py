"""Training on a part of CDNOW: rows, search, fit, verdict, registration, promotion."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from configs.churn.cdnow import write_parquet
from configs.churn.definitions import churn, purchases, recent_purchases
from heliostat.clock import parse_instant_us
from heliostat.errors import GateFailedError, PromotionConflictError
from heliostat.features.aggregations import Count
from heliostat.features.definitions import FeatureView
from heliostat.models.definitions import Definitions, Gate, ModelSpec
from heliostat.models.metrics import auc
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.models.profile import Profile
from heliostat.models.rows import ModelRows
from heliostat.settings import ClockSettings, OnlineSettings, Settings, StorageSettings, TrainingSettings
from heliostat.training.dataset import TrainingSet, build_training_set, split_instants
from heliostat.training.fitting import Recipe, Trial, fit_final
from heliostat.training.trainer import Production, TrainingReport, conclude, promote_candidate, train
from heliostat.workspace import Workspace

CUSTOMERS = 4_000
TRAINING = TrainingSettings(
    instants=("1997-05-01", "1997-07-01", "1997-10-01"),
    validation_instants=("1998-01-01", "1998-04-01"),
    trials=2,
    rounds=60,
)
PARAMETERS = {"num_leaves": 7, "learning_rate": 0.1}


@pytest.fixture(scope="module")
def data_root(session_home: Path) -> str:
    """An event log with the purchases of the first customers."""
    folder = session_home / "training"
    folder.mkdir()
    write_parquet(folder / "purchases.parquet")
    events = pq.read_table(folder / "purchases.parquet")
    settings = Settings(home=folder)
    with Workspace.open(settings) as workspace:
        some = events.filter(pc.field("customer_id") <= CUSTOMERS)
        workspace.event_log.append(purchases, some, ingested_us=workspace.clock.now_us())
    return settings.data_root


@pytest.fixture
def workspace(home: Path, valkey: str, data_root: str) -> Iterator[Workspace]:
    """An empty registry beside that log."""
    settings = Settings(
        project=f"t{home.name}",
        home=home,
        storage=StorageSettings(root=data_root),
        online=OnlineSettings(url=valkey),
        clock=ClockSettings(kind="replay", replay_from="1998-07-01"),
        training=TRAINING,
    )
    with Workspace.open(settings) as opened:
        yield opened


def _without_ray(rows: ModelRows) -> pa.Table:
    return pa.concat_tables([rows.table(bucket) for bucket in rows.event_log.buckets])


def _set(workspace: Workspace, spec: ModelSpec = churn, production: Production | None = None) -> TrainingSet:
    split = split_instants(
        [parse_instant_us(each) for each in TRAINING.instants],
        [parse_instant_us(each) for each in TRAINING.validation_instants],
        horizon_us=spec.label.horizon_us,
        now_us=workspace.clock.now_us(),
        first_event_us=0,
    )
    extra = () if production is None else production.features
    return build_training_set(spec, workspace.event_log, split, extra=extra, rows_of=_without_ray)


def _fitted(training_set: TrainingSet, *, rounds: int = 30, noise: float = 0.0) -> ModelPackage:
    """A booster of this process; noise in the labels makes a bad one."""
    spec, training = training_set.spec, training_set.training
    recipe = Recipe.of(spec, seed=7)
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(len(training)) < noise, rng.integers(0, 2, len(training)), training.labels)
    rows = lgb.Dataset(training.matrix, labels, feature_name=list(spec.feature_names))
    booster = lgb.train({**recipe.parameters, **PARAMETERS, "num_threads": 1}, rows, num_boost_round=rounds)
    return ModelPackage(booster.model_to_string(), Signature.of(spec), spec.objective)


def _concluded(workspace: Workspace, spec: ModelSpec = churn, **how: Any) -> TrainingReport:
    production = Production.of(workspace, spec)
    training_set = _set(workspace, spec, production)
    trials = (Trial(PARAMETERS, 30, 0.8, 0.4),)
    return conclude(workspace, spec, training_set, _fitted(training_set, **how), trials, production=production)


def _checks(report: TrainingReport) -> dict[str, bool]:
    return {check.name: check.passed for check in report.gate.checks}


# ── With Ray ────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_one_call_leads_from_declarations_to_a_version_in_production(workspace: Workspace) -> None:
    told: list[str] = []
    report = train(workspace, churn, promote=True, progress=told.append)

    assert report.promoted
    assert report.gate.passed
    assert len(told) == 5
    assert [trial.parameters for trial in report.trials].count({}) == 1
    assert len(report.trials) == 2
    assert report.evaluation.main.low > 0.7
    assert report.baseline.feature == "purchase_history__recency_days"
    assert json.loads(json.dumps(report.as_dict()))["version"] == 1
    assert any("0." in line for line in report.lines())
    assert list(workspace.settings.home.glob("training-*")) == []

    version = workspace.models.get("churn", "production")
    assert version.version == 1
    assert version.metrics["metrics"]["auc"]["value"] == report.evaluation.main.value
    assert version.lineage["log_versions"] == {"purchases": 1}
    assert version.lineage["train"] == ["1997-05-01T00:00:00Z", "1997-07-01T00:00:00Z", "1997-10-01T00:00:00Z"]
    assert version.lineage["packages"]["lightgbm"] == lgb.__version__
    assert set(version.lineage["view_hashes"]) == {"recent_purchases@1", "purchase_history@1"}
    assert version.parameters["rounds"] == report.trials[0].rounds

    # Whoever reads the registry can check every figure.
    training_set = _set(workspace)
    assert version.lineage["fingerprint"] == training_set.fingerprint
    package = workspace.models.package("churn", 1)
    scores = package.load().predict(training_set.validation.matrix)
    assert auc(training_set.validation.labels, scores) == report.evaluation.main.value
    assert Profile.from_document(package.profile or {}).rows == report.rows[0] == len(training_set.training)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_two_workers_fit_one_model_that_is_as_good_as_one_workers(workspace: Workspace, home: Path) -> None:
    training_set = _set(workspace)
    recipe, trial = Recipe.of(churn, seed=7), Trial(PARAMETERS, 30, None, 0.0)
    text = fit_final(recipe, training_set.training, trial, workers=2, storage=str(home))
    assert "[machines:" not in text
    both = ModelPackage(text, Signature.of(churn), "binary").load()
    alone = _fitted(training_set).load()
    validation = training_set.validation
    values = [auc(validation.labels, model.predict(validation.matrix)) for model in (both, alone)]
    assert values[0] == pytest.approx(values[1], abs=0.01)


# ── The verdict, without Ray ────────────────────────────────────────────────────────


def test_first_version_is_judged_alone_and_later_ones_against_production(workspace: Workspace) -> None:
    first = _concluded(workspace)
    assert first.compared_with is None
    assert set(_checks(first)) == {"signature", "minimum", "calibration", "latency"}
    promote_candidate(workspace, first, production=None)

    second = _concluded(workspace, rounds=31)
    assert second.compared_with == 1
    assert _checks(second)["production"]
    assert "slice as_of=1998-01-01T00:00:00Z" in _checks(second)
    assert workspace.models.get("churn", "production").version == 1
    promote_candidate(workspace, second, production=Production.of(workspace, churn), reason="a test")
    moved = workspace.models.history("churn")[-1]
    assert (moved.version, moved.previous, moved.reason) == (2, 1, "a test")
    assert moved.evidence["gate"]["passed"]
    assert moved.evidence["fingerprint"] == second.fingerprint


def test_worse_candidate_is_registered_but_not_let_through(workspace: Workspace) -> None:
    promote_candidate(workspace, _concluded(workspace), production=None)
    worse = _concluded(workspace, noise=0.97)
    assert not worse.gate.passed
    assert not _checks(worse)["production"]
    assert workspace.models.get("churn", 2).status == "candidate"
    assert (workspace.models.gate_report("churn", 2) or {})["passed"] is False
    with pytest.raises(GateFailedError, match="gain in auc over production"):
        promote_candidate(workspace, worse, production=Production.of(workspace, churn))
    assert workspace.models.get("churn", "production").version == 1


def test_promotion_fails_if_production_moved_since_it_was_compared(workspace: Workspace) -> None:
    first, second = _concluded(workspace), _concluded(workspace, rounds=31)
    promote_candidate(workspace, first, production=None)
    with pytest.raises(PromotionConflictError):
        promote_candidate(workspace, second, production=None)
    assert workspace.models.get("churn", "production").version == 1


def test_production_on_other_features_is_scored_on_its_own(workspace: Workspace) -> None:
    promote_candidate(workspace, _concluded(workspace), production=None)
    fewer = dataclasses.replace(churn, features=[churn.views[1]])
    report = _concluded(workspace, fewer)
    assert report.compared_with == 1
    assert "production" in _checks(report)
    again = workspace.models.load("churn", 1)
    training_set = _set(workspace, fewer, Production.of(workspace, fewer))
    whole = training_set.matrix(again.signature.names)
    assert np.array_equal(whole, _set(workspace).matrix(churn.feature_names), equal_nan=True)


def test_production_that_means_something_else_now_lets_nobody_through(workspace: Workspace) -> None:
    promote_candidate(workspace, _concluded(workspace), production=None)
    changed = FeatureView(
        "recent_purchases", version=2, source=purchases, features={"count_30d": Count(window="40d")}
    )
    spec = dataclasses.replace(churn, features=[changed, churn.views[1]])
    workspace.definitions = Definitions.of([spec])  # type: ignore[misc]
    report = _concluded(workspace, spec)
    assert report.compared_with is None
    assert [check.name for check in report.gate.failures] == ["production"]
    assert "recent_purchases@1, which it was trained on, isn't declared any more" in report.gate.failures[0].reason
    assert recent_purchases.content_hash != changed.content_hash


def test_gate_of_the_declaration_is_the_one_that_judges(workspace: Workspace) -> None:
    strict = dataclasses.replace(churn, gate=Gate(min_metric=0.99))
    report = _concluded(workspace, strict)
    assert [check.name for check in report.gate.failures] == ["minimum"]
    assert "must reach 0.99" in "\n".join(report.lines())
