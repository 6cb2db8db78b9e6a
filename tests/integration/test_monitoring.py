"""Monitors, experiment analysis and the retraining decision over real stores and the CDNOW log; no Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from configs.churn.cdnow import write_parquet
from configs.churn.definitions import churn, customer, purchases
from heliostat.clock import US_PER_DAY, ManualClock, parse_instant_us
from heliostat.experiments.rollout import Rollout
from heliostat.features.offline import compute_features
from heliostat.models.labels import label_values
from heliostat.models.metrics import measure
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.models.profile import Profile
from heliostat.models.registry import ModelRegistry
from heliostat.monitoring.checks import run_checks
from heliostat.monitoring.exposures import analyze_split
from heliostat.monitoring.verdict import ATTENTION_EXIT_CODE, Severity, latest
from heliostat.retraining import DUE_EXIT_CODE, decide, state_of
from heliostat.schema import TIMESTAMP
from heliostat.settings import (
    CatalogSettings,
    ClockSettings,
    ExperimentSettings,
    MonitoringSettings,
    OnlineSettings,
    ParitySettings,
    Settings,
)
from heliostat.storage.delta import Progress
from heliostat.storage.offline_store import PREDICTIONS
from heliostat.training.trainer import _parity
from heliostat.workspace import Workspace

TRAINED_US = parse_instant_us("1997-10-01")
SERVED_US = parse_instant_us("1998-03-01")
NOW_US = parse_instant_us("1998-07-01")
NAMES = churn.feature_names


def _features(events: pa.Table, keys: pa.Array, at_us: NDArray[np.int64]) -> NDArray[np.float64]:
    columns = compute_features(churn.views, events, keys, at_us)
    return np.column_stack([columns[name] for name in NAMES])


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    target = tmp_path_factory.mktemp("cdnow") / "purchases.parquet"
    write_parquet(target)
    return pq.read_table(target)


@pytest.fixture(scope="module")
def model(events: pa.Table) -> tuple[ModelPackage, NDArray[np.float64]]:
    """A model of October 1997 with its profile, and its scores of all customers in March 1998."""
    keys = pa.array(np.arange(1, 8_001), pa.int64())
    then = np.full(len(keys), TRAINED_US)
    matrix, labels = _features(events, keys, then), label_values(churn.label, customer, events, keys, then)
    parameters = {"objective": "binary", "num_leaves": 7, "verbosity": -1, "num_threads": 1, "seed": 7}
    booster = lgb.train(parameters, lgb.Dataset(matrix, labels, feature_name=list(NAMES)), num_boost_round=40)
    scores = np.asarray(booster.predict(matrix), dtype=np.float64)
    package = ModelPackage(
        booster_text=booster.model_to_string(),
        signature=Signature.of(churn),
        objective="binary",
        profile=Profile.of(matrix, NAMES, scores).to_document(),
        metrics={"metric": "auc", "metrics": {"auc": measure("auc", labels, scores).as_dict()}},
        parameters=parameters,
    )
    return package, scores


@pytest.fixture
def workspace(home: Path, events: pa.Table, model: tuple[ModelPackage, NDArray[np.float64]]) -> Iterator[Workspace]:
    """The log is ingested; version 1, registered in March 1998, is in production; it is July."""
    settings = Settings(
        project=f"t{home.name}",
        home=home,
        clock=ClockSettings(kind="replay", replay_from="1998-07-01", speed=0),
        # Nothing here may touch the online store: this address answers nobody.
        online=OnlineSettings(url=f"unix://{home}/nobody.sock"),
        catalog=CatalogSettings(url=f"sqlite:///{home}/catalog.db"),
        monitoring=MonitoringSettings(window="60d"),
        experiments=ExperimentSettings(min_exposures=100, min_days=0),
    )
    with Workspace.open(settings) as opened:
        opened.event_log.append(purchases, events, ingested_us=SERVED_US - 1)
        registry = ModelRegistry(opened.catalog, opened.artifacts, ManualClock(SERVED_US - US_PER_DAY))
        version = registry.register(churn, model[0], lineage={})
        registry.promote("churn", version.version, gate={"passed": True, "checks": []})
        yield opened


def _serve(
    workspace: Workspace,
    keys: Sequence[int] | NDArray[np.int64],
    vectors: NDArray[np.float64],
    *,
    at_us: int,
    variants: Sequence[str] | None = None,
    versions: Sequence[int] | None = None,
    revision: int = 1,
    given: Sequence[str] = (),
) -> None:
    """Predictions of the production version, as the sink leaves them in the log."""
    n = len(vectors)
    scores = workspace.models.load("churn").predict(vectors)
    columns = {
        "prediction_id": [uuid.uuid4().hex for _ in range(n)],
        "request_id": ["r"] * n,
        "model": ["churn"] * n,
        "revision": pa.array([revision] * n, pa.int64()),
        "at": pa.array([at_us] * n, pa.int64()).cast(TIMESTAMP),
        "entity": [str(key) for key in keys],
        "variant": list(variants or ["control"] * n),
        "version": pa.array(list(versions or [1] * n), pa.int64()),
        "score": scores,
        "features": [[None if np.isnan(x) else x for x in row] for row in vectors],
        "missing": [[]] * n,
        "source": ["model"] * n,
        "given": [list(given)] * n,
    }
    rows = pa.table(
        {field.name: columns.get(field.name, pa.nulls(n, field.type)) for field in PREDICTIONS}, schema=PREDICTIONS
    )
    workspace.offline_store.append_stream("predictions", "churn", rows, Progress(before={}, after={}))


def _checked(workspace: Workspace, check: str, **options: Any) -> Any:
    (verdict,) = run_checks(workspace, workspace.settings, [check], **options)
    assert latest(workspace.catalog, "churn", check, version=1) == verdict, "the verdict is kept"
    return verdict


def _job(workspace: Workspace, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **workspace.settings.environment(), "PYTHONPATH": "platform:."}
    return subprocess.run(
        [sys.executable, f"jobs/{script}", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


# Customers are numbered by their first purchase: any range of numbers would be a group of its own.
KEYS = np.sort(np.random.default_rng(7).choice(np.arange(1, 8_001), size=2_000, replace=False))


@pytest.fixture
def vectors(events: pa.Table) -> NDArray[np.float64]:
    return _features(events, pa.array(KEYS, pa.int64()), np.full(len(KEYS), SERVED_US))


# ── The checks ──────────────────────────────────────────────────────────────────────


def test_predictions_like_the_training_rows_are_no_drift(workspace: Workspace, events: pa.Table) -> None:
    same = _features(events, pa.array(KEYS, pa.int64()), np.full(len(KEYS), TRAINED_US))
    _serve(workspace, KEYS, same, at_us=SERVED_US)
    verdict = _checked(workspace, "drift", until_us=SERVED_US + US_PER_DAY)
    assert verdict.status is Severity.OK
    assert verdict.n_rows == 2_000
    assert {finding.subject for finding in verdict.findings} == {*NAMES, "prediction"}


def test_customers_who_buy_less_than_in_training_are_drift(
    workspace: Workspace, vectors: NDArray[np.float64]
) -> None:
    # In October 1997 all had bought within nine months; in March 1998 most have long been silent.
    _serve(workspace, KEYS, vectors, at_us=SERVED_US)
    verdict = _checked(workspace, "drift", until_us=SERVED_US + US_PER_DAY)
    alarms = {finding.subject for finding in verdict.findings if finding.severity is Severity.ALARM}
    assert "purchase_history__recency_days" in alarms
    assert "purchase_history__first_amount" not in alarms


def test_repeated_predictions_of_one_entity_count_once(workspace: Workspace, vectors: NDArray[np.float64]) -> None:
    for hour in range(3):
        _serve(workspace, KEYS[:150], vectors[:150], at_us=SERVED_US + hour)
    verdict = _checked(workspace, "drift", until_us=SERVED_US + US_PER_DAY)
    assert verdict.n_rows == 150
    assert verdict.status is Severity.INSUFFICIENT


def test_performance_is_judged_on_matured_labels_of_the_event_log(
    workspace: Workspace, vectors: NDArray[np.float64], events: pa.Table
) -> None:
    _serve(workspace, KEYS, vectors, at_us=SERVED_US)
    _serve(workspace, KEYS[:500], vectors[:500], at_us=parse_instant_us("1998-06-20"))
    verdict = _checked(workspace, "performance")
    (finding,) = verdict.findings
    assert finding.evidence["coverage"] == pytest.approx(0.8)
    truth = label_values(churn.label, customer, events, pa.array(KEYS, pa.int64()), np.full(len(KEYS), SERVED_US))
    expected = measure("auc", truth, workspace.models.load("churn").predict(vectors), clusters=KEYS)
    assert finding.evidence["current"] == pytest.approx(expected.as_dict())
    assert 0.6 < expected.value < 0.95


def test_no_label_is_claimed_after_the_last_event_of_a_stalled_source(
    workspace: Workspace, vectors: NDArray[np.float64]
) -> None:
    _serve(workspace, KEYS, vectors, at_us=parse_instant_us("1998-04-02"))
    # 90 days after April 2 is July 1, and the log ends on June 30.
    verdict = _checked(workspace, "performance")
    assert verdict.status is Severity.INSUFFICIENT
    assert verdict.findings[0].evidence["n_due"] == 0


def test_served_vectors_are_recomputed_and_a_tampered_feature_is_found(
    workspace: Workspace, vectors: NDArray[np.float64]
) -> None:
    _serve(workspace, KEYS, vectors, at_us=SERVED_US)
    until_us = SERVED_US + US_PER_DAY
    verdict = _checked(workspace, "parity", until_us=until_us)
    assert (verdict.status, verdict.n_rows) == (Severity.OK, 500)
    tampered = vectors.copy()
    tampered[:, NAMES.index("purchase_history__spent")] += 0.01
    _serve(workspace, KEYS, tampered, at_us=SERVED_US)
    verdict = _checked(workspace, "parity", until_us=until_us)
    assert verdict.status is Severity.ALARM
    assert [f.subject for f in verdict.findings if f.severity is not Severity.OK] == ["purchase_history__spent"]


def test_features_that_requests_gave_are_left_out_of_parity_and_counted(
    workspace: Workspace, vectors: NDArray[np.float64]
) -> None:
    _serve(workspace, KEYS[:300], vectors[:300], at_us=SERVED_US)
    told = vectors[300:500].copy()
    told[:, NAMES.index("purchase_history__spent")] = 1e6
    _serve(workspace, KEYS[300:500], told, at_us=SERVED_US, given=["purchase_history__spent"])
    verdict = _checked(workspace, "parity", until_us=SERVED_US + US_PER_DAY)
    assert (verdict.status, verdict.n_rows) == (Severity.OK, 500)
    by_name = {finding.subject: finding.evidence for finding in verdict.findings}
    assert (by_name["purchase_history__spent"]["n"], by_name["purchase_history__spent"]["left_out"]) == (300, 200)
    assert by_name["purchase_history__frequency"]["left_out"] == 0


def test_the_tolerance_and_the_share_of_mismatches_are_settings(
    workspace: Workspace, vectors: NDArray[np.float64]
) -> None:
    off = vectors[:400].copy()
    off[:4, NAMES.index("purchase_history__spent")] += 0.01
    _serve(workspace, KEYS[:400], off, at_us=SERVED_US)

    def status(**parity: float) -> Severity:
        settings = workspace.settings.model_copy(
            update={"monitoring": MonitoringSettings(window="60d", parity=ParitySettings(**parity))}
        )
        (verdict,) = run_checks(workspace, settings, ["parity"], until_us=SERVED_US + US_PER_DAY)
        return verdict.status

    assert status() is Severity.ALARM
    assert status(max_mismatch_share=0.02) is Severity.WARNING
    assert status(tolerance=0.1) is Severity.OK


def test_a_gate_that_asks_for_parity_reads_the_newest_check_of_what_serves(
    workspace: Workspace, vectors: NDArray[np.float64]
) -> None:
    assert "no parity check has looked at version 1" in _parity(workspace, churn, 1).problem
    tampered = vectors[:400].copy()
    tampered[:100, NAMES.index("purchase_history__spent")] += 0.01
    _serve(workspace, KEYS[:400], tampered, at_us=SERVED_US)
    _checked(workspace, "parity", until_us=SERVED_US + US_PER_DAY)
    assert _parity(workspace, churn, 1).share == 0.25
    assert _parity(workspace, churn, 2).share is None, "it is about the version that serves"


def test_quality_sees_nulls_and_a_source_that_has_gone_quiet(
    workspace: Workspace, vectors: NDArray[np.float64]
) -> None:
    broken = vectors.copy()
    broken[::2, NAMES.index("purchase_history__monetary")] = np.nan
    _serve(workspace, KEYS, broken, at_us=NOW_US)
    verdict = _checked(workspace, "quality")
    alarms = {finding.subject for finding in verdict.findings if finding.severity is Severity.ALARM}
    assert "purchase_history__monetary null" in alarms
    assert "purchase_history__spent null" not in alarms
    assert "source purchases" not in alarms
    strict = workspace.settings.monitoring.model_copy(update={"max_feature_age": "12h"})
    (late,) = run_checks(workspace, workspace.settings.model_copy(update={"monitoring": strict}), ["quality"])
    assert "source purchases" in {f.subject for f in late.findings if f.severity is Severity.ALARM}


# ── The jobs ────────────────────────────────────────────────────────────────────────


def test_the_monitor_job_reports_stores_and_ends_with_an_honest_code(
    workspace: Workspace, vectors: NDArray[np.float64]
) -> None:
    _serve(workspace, KEYS, vectors, at_us=SERVED_US)
    until = ["--until", "1998-03-02"]
    drift = _job(workspace, "monitor_model.py", "--check", "drift", "--check", "parity", "--json", *until)
    assert drift.returncode == ATTENTION_EXIT_CODE, drift.stderr
    report = json.loads(drift.stdout)
    assert report["status"] == "alarm"
    assert [verdict["check"] for verdict in report["verdicts"]] == ["drift", "parity"]
    parity = _job(workspace, "monitor_model.py", "--check", "parity", *until)
    assert parity.returncode == 0, parity.stderr
    assert parity.stdout.startswith("parity: OK  churn version 1, 500 rows")
    with workspace.catalog.read() as rows:
        assert len(rows.verdicts("churn", kind="parity")) == 2


def test_the_retraining_job_decides_by_age_performance_and_drift(
    workspace: Workspace, vectors: NDArray[np.float64]
) -> None:
    _serve(workspace, KEYS, vectors, at_us=SERVED_US)
    run_checks(workspace, workspace.settings, ["performance"])
    run_checks(workspace, workspace.settings, ["drift"], until_us=SERVED_US + US_PER_DAY)
    decision = decide(state_of(workspace, "churn"), workspace.settings.retraining, now_us=NOW_US)
    wants = {reason.trigger: reason.wants for reason in decision.reasons}
    assert wants["age"] == "retrain"
    assert wants["drift"] == "look"
    job = _job(workspace, "retrain_model.py", "--decide", "--json")
    assert job.returncode == DUE_EXIT_CODE, job.stderr
    assert json.loads(job.stdout)["due"] is True


def test_a_check_of_a_model_that_nobody_declares_is_not_found(workspace: Workspace) -> None:
    job = _job(workspace, "monitor_model.py", "--model", "fraud", "--check", "drift")
    assert job.returncode == 4
    assert "there is no model 'fraud'; known are: churn" in job.stderr


# ── The experiment ──────────────────────────────────────────────────────────────────


def test_a_split_of_two_equal_versions_shows_no_difference_and_a_sound_split(
    workspace: Workspace, vectors: NDArray[np.float64], model: tuple[ModelPackage, NDArray[np.float64]]
) -> None:
    clock = ManualClock(SERVED_US)
    ModelRegistry(workspace.catalog, workspace.artifacts, clock).register(churn, model[0], lineage={"try": 2})
    rollout = Rollout(workspace.catalog, clock, lambda name, document: None)  # noqa: ARG005
    route = rollout.start_split("churn", experiment="spring", control=1, challenger=2, weight=0.5)
    names = [variant.name for variant in route.variants]
    chosen = route.assign([str(key) for key in KEYS])
    for day in (0, 1):  # everybody is exposed twice
        _serve(
            workspace,
            KEYS,
            vectors,
            at_us=SERVED_US + day * US_PER_DAY,
            variants=[names[index] for index in chosen],
            versions=[route.variants[index].version for index in chosen],
            revision=route.revision,
        )
    report = analyze_split(workspace, workspace.settings)
    (analysis,) = report.analyses
    assert report.n_exposures == 4_000
    assert sum(analysis.exposed.values()) == 2_000
    assert not analysis.split.mismatch
    assert analysis.conclusion == "undecided"
    assert analysis.interval is not None
    assert analysis.adjusted_interval is not None
    plain = analysis.interval.upper - analysis.interval.lower
    assert analysis.adjusted_interval.upper - analysis.adjusted_interval.lower < plain, (
        "the score explains some of it"
    )

    job = _job(workspace, "analyze_experiment.py", "--experiment", "spring")
    assert job.returncode == 0, job.stderr
    assert "challenger against control: UNDECIDED" in job.stdout
    unknown = _job(workspace, "analyze_experiment.py", "--experiment", "autumn")
    assert unknown.returncode == 3
    assert "splits so far: spring" in unknown.stderr
