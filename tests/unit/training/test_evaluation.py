from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from heliostat.errors import UndefinedMetricError
from heliostat.features.aggregations import Count, TimeSinceLast
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.models.definitions import Gate, Label, ModelSpec
from heliostat.training.evaluation import (
    GateReport,
    Parity,
    Rows,
    SingleFeatureBaseline,
    baseline_feature,
    default_slices,
    evaluate,
    judge,
)

USER = Entity("user", keys={"user_id": "int64"})
VISITS = EventSource(
    "visits",
    schema=pa.schema({"id": pa.int64(), "user_id": pa.int64(), "at": pa.timestamp("us"), "spent": pa.float64()}),
    entity=USER,
    event_time="at",
    event_id="id",
)
VIEW = FeatureView(
    "activity", version=1, source=VISITS, features={"visits": Count(window="30d"), "since": TimeSinceLast()}
)


def _spec(**changes: Any) -> ModelSpec:
    spec = ModelSpec("leaver", USER, [VIEW], Label.none_within("left", VISITS, "30d"))
    return dataclasses.replace(spec, **changes)


def _rows(n: int = 2_000, seed: int = 0) -> tuple[Rows, np.ndarray]:
    """Calibrated scores, two rows an entity, one slice of each half."""
    rng = np.random.default_rng(seed)
    scores = rng.random(n)
    labels = (rng.random(n) < scores).astype(float)
    entities = np.arange(n) // 2
    half = np.arange(n) < n // 2
    return Rows(labels, entities, {"first half": half, "second half": ~half, "tiny": np.arange(n) < 5}), scores


def _judge(spec: ModelSpec, rows: Rows, scores: np.ndarray, **arguments: Any) -> GateReport:
    arguments.setdefault("signature", spec.feature_names)
    return judge(spec, rows, scores, evaluate(spec, rows, scores), **arguments)


def _failed(report: GateReport) -> list[str]:
    return [check.name for check in report.failures]


def test_evaluation_holds_every_metric_of_the_objective_and_the_slices_large_enough() -> None:
    rows, scores = _rows()
    found = evaluate(_spec(), rows, scores)
    assert set(found.metrics) == {"auc", "average_precision", "log_loss", "brier", "calibration_error"}
    assert set(found.slices) == {"first half", "second half"}
    assert found.main is found.metrics["auc"]
    assert json.loads(json.dumps(found.as_dict()))["metrics"]["auc"]["n"] == 2_000


def test_slice_with_one_class_is_left_out_but_such_rows_are_refused() -> None:
    rows, scores = _rows()
    churned = rows.labels == 1
    sliced = dataclasses.replace(rows, slices={"churned": churned})
    assert evaluate(_spec(), sliced, scores).slices == {}
    with pytest.raises(UndefinedMetricError, match="both classes"):
        evaluate(_spec(), Rows(rows.labels[churned], rows.entities[churned]), scores[churned])


def test_good_candidate_without_production_passes() -> None:
    rows, scores = _rows()
    report = _judge(_spec(gate=Gate(min_metric=0.8, max_calibration_error=0.1)), rows, scores, latency_ms=0.2)
    assert report.passed
    assert [check.name for check in report.checks] == ["signature", "minimum", "calibration", "latency"]


def test_the_intervals_lower_end_must_reach_the_minimum_not_the_point() -> None:
    rows, scores = _rows()
    point = evaluate(_spec(), rows, scores).main
    limit = (point.low + point.value) / 2
    report = _judge(_spec(gate=Gate(min_metric=limit)), rows, scores)
    assert _failed(report) == ["minimum"]
    assert report.failures[0].value == point.low
    assert f"{limit:g}" in report.failures[0].reason


def test_for_a_loss_the_minimum_is_a_maximum() -> None:
    rows, scores = _rows()
    spec = _spec(metric="log_loss")
    loss = evaluate(spec, rows, scores).main
    assert _judge(dataclasses.replace(spec, gate=Gate(min_metric=loss.high + 1e-6)), rows, scores).passed
    too_strict = dataclasses.replace(spec, gate=Gate(min_metric=loss.value))
    assert _failed(_judge(too_strict, rows, scores)) == ["minimum"]


def test_uncalibrated_scores_fail_although_they_rank_as_well() -> None:
    rows, scores = _rows()
    gate = Gate(min_metric=0.8, max_calibration_error=0.1)
    assert _failed(_judge(_spec(gate=gate), rows, scores**3)) == ["calibration"]


def test_candidate_equal_to_production_passes_and_a_worse_one_does_not() -> None:
    rows, scores = _rows()
    assert _judge(_spec(), rows, scores, production=scores).passed
    noisy = np.random.default_rng(1).random(scores.size)
    report = _judge(_spec(gate=Gate(max_calibration_error=None)), rows, 0.7 * scores + 0.3 * noisy, production=scores)
    assert "production" in _failed(report)


def test_slice_that_got_worse_fails_although_the_whole_is_better() -> None:
    rows, scores = _rows(8_000)
    first = rows.slices["first half"]
    noise = np.random.default_rng(2).random(scores.size)
    production = np.where(first, scores, 0.1 * scores + 0.9 * noise)
    candidate = np.where(first, 0.3 * scores + 0.7 * noise, scores)
    report = _judge(_spec(gate=Gate(max_calibration_error=None)), rows, candidate, production=production)
    assert _failed(report) == ["slice first half"]


def test_booster_with_other_features_fails_and_the_reason_names_them() -> None:
    rows, scores = _rows()
    report = _judge(_spec(), rows, scores, signature=("activity__visits", "activity__age"))
    assert _failed(report) == ["signature"]
    assert "activity__since" in report.failures[0].reason
    assert "activity__age" in report.failures[0].reason
    swapped = _judge(_spec(), rows, scores, signature=("activity__since", "activity__visits"))
    assert "another order" in swapped.failures[0].reason


def test_slow_candidate_fails() -> None:
    rows, scores = _rows()
    assert _failed(_judge(_spec(gate=Gate(max_latency_ms=1.0)), rows, scores, latency_ms=1.5)) == ["latency"]


@pytest.mark.parametrize(
    ("parity", "passed", "told"),
    [
        (None, True, "nothing is served yet"),
        (Parity(0.001), True, "0.100% of the served values"),
        (Parity(0.02), False, "2.000% of the served values of a feature differ from training's, at most 0.500% may"),
        (Parity(None, "no parity check"), False, "no parity check; run jobs/monitor_model.py --check parity"),
    ],
)
def test_gate_that_asks_for_parity_wants_what_was_served_to_be_what_training_saw(
    parity: Parity | None, passed: bool, told: str
) -> None:
    rows, scores = _rows()
    asked = _judge(_spec(gate=Gate(max_parity_mismatch=0.005)), rows, scores, parity=parity)
    assert (asked.passed, asked.checks[-1].name) == (passed, "parity")
    assert told in asked.checks[-1].reason
    assert "parity" not in {check.name for check in _judge(_spec(), rows, scores, parity=parity).checks}


def test_parity_is_the_worst_feature_of_a_verdict_that_is_new_enough() -> None:
    findings = [{"evidence": {"unexplained_rate": rate}} for rate in (0.0, 0.25, 0.01)] + [{"evidence": {}}]
    told = {"version": 3, "at_us": 100, "oldest_us": 100}
    assert Parity.of({"findings": findings}, **told).share == 0.25
    assert Parity.of({"findings": findings}, version=3, at_us=99, oldest_us=100).share is None
    assert "couldn't say anything" in Parity.of({"findings": [{"evidence": {}}]}, **told).problem
    assert "no parity check has looked at version 3" in Parity.of(None, version=3, at_us=0, oldest_us=0).problem


def test_report_is_json_with_every_check() -> None:
    rows, scores = _rows()
    report = _judge(_spec(), rows, scores, production=scores, latency_ms=1.0)
    read = json.loads(json.dumps(report.as_dict()))
    assert read["passed"] is True
    assert [check["name"] for check in read["checks"]] == [check.name for check in report.checks]
    assert "slice first half" in {check["name"] for check in read["checks"]}


def test_default_slices_cover_each_row_once_by_instant_and_once_by_feature() -> None:
    as_of = np.array([0, 0, 0, 86_400_000_000, 86_400_000_000, 86_400_000_000])
    values = np.array([1.0, 2.0, 3.0, np.nan, 5.0, 6.0])
    slices = default_slices(as_of, {"since": values})
    instants = [mask for name, mask in slices.items() if name.startswith("as_of=")]
    thirds = [mask for name, mask in slices.items() if "since" in name]
    assert np.array_equal(np.sum(instants, axis=0), np.ones(6))
    assert np.array_equal(np.sum(thirds, axis=0), np.ones(6))
    assert np.array_equal(slices["since is null"], np.isnan(values))


def test_baseline_finds_its_direction_and_fills_nulls_with_the_middle() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, np.nan])
    baseline = SingleFeatureBaseline.fit("f", values, np.array([1.0, 1.0, 0.0, 0.0, 1.0]), objective="binary")
    scores = baseline.score(values)
    assert (np.diff(scores[:4]) < 0).all()
    assert scores[4] == pytest.approx(-2.5)


def test_regression_baseline_is_the_least_squares_line() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=500)
    y = 3.0 - 2.0 * x + 0.1 * rng.normal(size=500)
    baseline = SingleFeatureBaseline.fit("f", x, y, objective="regression")
    slope, intercept = np.polyfit(x, y, 1)
    assert baseline.score(np.array([0.0, 1.0])) == pytest.approx([intercept, intercept + slope])


def test_baseline_of_a_feature_that_is_always_null_says_the_same_of_everyone() -> None:
    nothing = np.full(3, np.nan)
    baseline = SingleFeatureBaseline.fit("f", nothing, np.array([0.0, 1.0, 1.0]), objective="binary")
    assert np.unique(baseline.score(nothing)).size == 1


def test_baseline_sorts_by_the_first_time_since_something() -> None:
    assert baseline_feature(_spec()) == "activity__since"
    assert baseline_feature(_spec(features=[VIEW["visits"]])) == "activity__visits"
