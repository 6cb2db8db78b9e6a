from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from scipy import stats

from heliostat.clock import US_PER_DAY
from heliostat.errors import MonitoringDataError
from heliostat.models.estimates import Estimate
from heliostat.models.metrics import measure
from heliostat.monitoring.performance import Matured, against, mature, performance_finding
from heliostat.monitoring.verdict import Severity

HORIZON_US = 90 * US_PER_DAY


def _matured(seed: int, n: int, strength: float, n_predictions: int | None = None) -> Matured:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, n).astype(np.float64)
    scores = random.normal(size=n) + strength * labels
    return Matured(labels, scores, np.arange(n), n_predictions or n, n)


REFERENCE = measure("auc", (_good := _matured(0, 3_000, 1.5)).labels, _good.scores)


def _labels(keys: pa.Array, at_us: NDArray[np.int64]) -> NDArray[np.float64]:
    """Known for everybody but entity 9: whether the key is even."""
    values = keys.to_numpy().astype(np.float64)
    assert len(values) == len(at_us)
    return np.where(values == 9, np.nan, values % 2 == 0)


def _mature(entities: list[int], at_days: list[int], scores: list[float], *, complete_day: int) -> Matured:
    return mature(
        pa.array(entities, pa.int64()),
        np.array(at_days, dtype=np.int64) * US_PER_DAY,
        np.array(scores),
        _labels,
        horizon_us=HORIZON_US,
        complete_until_us=complete_day * US_PER_DAY,
    )


# ── Maturity ────────────────────────────────────────────────────────────────────────


def test_a_prediction_whose_horizon_has_not_passed_has_no_label() -> None:
    matured = _mature([1, 2, 3], [0, 10, 11], [0.1, 0.2, 0.3], complete_day=100)
    assert matured.entities.tolist() == [1, 2]
    assert matured.labels.tolist() == [0.0, 1.0]
    assert matured.scores.tolist() == [0.1, 0.2]
    assert matured.coverage == pytest.approx(2 / 3)


def test_unknown_labels_and_missing_scores_are_left_out_and_lower_the_coverage() -> None:
    matured = _mature([9, 2, 3, 4], [0, 0, 0, 0], [0.1, np.nan, 0.3, 0.4], complete_day=100)
    assert matured.entities.tolist() == [3, 4]
    assert (matured.n_predictions, matured.n_due, matured.coverage) == (4, 4, 0.5)


def test_before_the_first_horizon_no_label_is_computed() -> None:
    matured = _mature([1, 2], [50, 60], [0.1, 0.2], complete_day=100)
    assert (len(matured.labels), matured.n_due, matured.coverage) == (0, 0, 0.0)


def test_reported_labels_go_first_but_wait_for_the_horizon_too() -> None:
    matured = mature(
        pa.array([1, 2, 4], pa.int64()),
        np.array([0, 0, 50]) * US_PER_DAY,
        np.array([0.1, 0.2, 0.3]),
        _labels,
        horizon_us=HORIZON_US,
        complete_until_us=100 * US_PER_DAY,
        reported=np.array([1.0, np.nan, 1.0]),
    )
    assert matured.labels.tolist() == [1.0, 1.0]
    assert matured.entities.tolist() == [1, 2]


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(MonitoringDataError, match="2 keys, 1 instants"):
        _mature([1, 2], [0], [0.1, 0.2], complete_day=100)


# ── The comparison ──────────────────────────────────────────────────────────────────


def test_the_interval_of_a_change_is_wider_than_each_side() -> None:
    current, reference = Estimate(0.70, 0.65, 0.74, 500), Estimate(0.80, 0.77, 0.82, 900)
    compared = against(current, reference, larger_is_better=True)
    assert compared.change == pytest.approx(-0.10)
    assert compared.low == pytest.approx(-0.10 - np.hypot(0.05, 0.02))
    assert compared.high == pytest.approx(-0.10 + np.hypot(0.04, 0.03))
    assert compared.ratio == pytest.approx(0.875)


def test_a_larger_loss_is_worse() -> None:
    compared = against(Estimate(0.6, 0.5, 0.7, 9), Estimate(0.3, 0.2, 0.4, 9), larger_is_better=False)
    assert compared.change == pytest.approx(-0.3)
    assert compared.high < 0
    assert compared.ratio == pytest.approx(0.5)


def test_the_interval_of_no_change_covers_zero_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        one, other = _matured(1_000 + seed, 400, 1.0), _matured(5_000 + seed, 900, 1.0)
        estimates = [measure("auc", each.labels, each.scores) for each in (one, other)]
        compared = against(*estimates, larger_is_better=True)
        covered += compared.low <= 0 <= compared.high
    assert 0.915 <= covered / 200 <= 0.995


# ── The finding ─────────────────────────────────────────────────────────────────────


def test_a_model_that_got_worse_is_an_alarm() -> None:
    finding = performance_finding(_matured(1, 800, 0.7), "auc", REFERENCE, min_rows=200)
    assert finding.severity is Severity.ALARM
    assert finding.evidence["change_high"] < 0
    assert finding.evidence["ratio"] < 0.95


def test_the_same_model_is_no_alarm() -> None:
    finding = performance_finding(_matured(2, 800, 1.5), "auc", REFERENCE, min_rows=200)
    assert finding.severity is Severity.OK


def test_a_lower_point_with_a_wide_interval_is_no_alarm() -> None:
    # Thirty of each class, exactly normal: an AUC of 0.8 where 0.86 was promised.
    normal = stats.norm.ppf((np.arange(30) + 0.5) / 30)
    few = Matured(np.repeat([0.0, 1.0], 30), np.concatenate([normal, normal + 1.2]), np.arange(60), 60, 60)
    finding = performance_finding(few, "auc", REFERENCE, min_rows=50)
    assert finding.evidence["current"]["value"] == pytest.approx(0.8, abs=0.02)
    assert finding.evidence["change"] < 0
    assert finding.severity is Severity.OK


def test_the_coverage_is_always_reported() -> None:
    finding = performance_finding(_matured(3, 300, 1.5, n_predictions=1_200), "auc", REFERENCE, min_rows=200)
    assert "300 of 1,200 predictions have a label (25%)" in finding.message
    assert finding.evidence["coverage"] == 0.25


def test_too_few_labels_are_insufficient() -> None:
    finding = performance_finding(_matured(4, 30, 1.5), "auc", REFERENCE, min_rows=200)
    assert finding.severity is Severity.INSUFFICIENT


def test_labels_of_one_class_are_insufficient_and_say_why() -> None:
    one_class = Matured(np.ones(300), np.linspace(0, 1, 300), np.arange(300), 300, 300)
    finding = performance_finding(one_class, "auc", REFERENCE, min_rows=200)
    assert finding.severity is Severity.INSUFFICIENT
    assert "all 300 labels are 1" in finding.message


def test_without_a_reference_the_figure_is_told_and_nothing_is_judged() -> None:
    finding = performance_finding(_matured(5, 300, 1.5), "auc", None, min_rows=200)
    assert finding.severity is Severity.OK
    assert "no reference" in finding.message
