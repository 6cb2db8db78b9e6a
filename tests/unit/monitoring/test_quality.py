from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from heliostat.clock import US_PER_DAY, US_PER_S
from heliostat.errors import MonitoringDataError
from heliostat.monitoring.quality import (
    QualityPolicy,
    Rate,
    Spread,
    freshness_finding,
    null_rate,
    outlier_findings,
    rate_findings,
)
from heliostat.monitoring.verdict import Finding, Severity

POLICY = QualityPolicy(min_rows=50)
NOW_US = 900_000_000 * US_PER_S


def _freshness(age_us: int) -> Finding:
    return freshness_finding(
        "purchases", NOW_US - age_us, now_us=NOW_US, max_age_us=2 * US_PER_DAY, future_tolerance_us=60 * US_PER_S
    )


# ── Freshness ───────────────────────────────────────────────────────────────────────


def test_three_days_and_ten_minutes_are_not_ten_minutes() -> None:
    finding = _freshness(3 * US_PER_DAY + 600 * US_PER_S)
    assert finding.severity is Severity.ALARM
    assert finding.evidence["age_s"] == 3 * 86_400 + 600
    assert "3.0 d old" in finding.message


def test_recent_events_are_fresh() -> None:
    assert _freshness(600 * US_PER_S).severity is Severity.OK


def test_a_stamp_from_the_future_is_a_fault_and_not_fresh() -> None:
    finding = _freshness(-3 * US_PER_DAY)
    assert finding.severity is Severity.ALARM
    assert "3.0 d in the future" in finding.message


def test_a_clock_that_is_a_little_ahead_is_tolerated() -> None:
    assert _freshness(-59 * US_PER_S).severity is Severity.OK
    assert _freshness(-61 * US_PER_S).severity is Severity.ALARM


def test_no_event_at_all_is_an_alarm() -> None:
    finding = freshness_finding("purchases", None, now_us=NOW_US, max_age_us=1)
    assert finding.severity is Severity.ALARM


# ── Nulls ───────────────────────────────────────────────────────────────────────────


def _nulls(reference: dict[str, Rate], current: dict[str, Rate]) -> dict[str, Finding]:
    found = rate_findings("null", reference, current, max_increase=POLICY.max_null_increase, policy=POLICY)
    return {finding.subject: finding for finding in found}


def test_a_null_rate_is_judged_against_the_reference_and_not_against_zero() -> None:
    findings = _nulls(
        {"often": Rate(500, 1_000), "never": Rate(0, 1_000)}, {"often": Rate(105, 200), "never": Rate(40, 200)}
    )
    assert findings["often null"].severity is Severity.OK
    assert findings["never null"].severity is Severity.ALARM
    assert findings["never null"].evidence["rate"] == 0.2


def test_a_small_increase_is_no_alarm_however_significant() -> None:
    finding = _nulls({"x": Rate(0, 10**6)}, {"x": Rate(20_000, 10**6)})["x null"]
    assert finding.evidence["q_value"] < 1e-9
    assert finding.severity is Severity.OK


def test_fewer_nulls_than_before_are_no_alarm() -> None:
    assert _nulls({"x": Rate(900, 1_000)}, {"x": Rate(0, 1_000)})["x null"].severity is Severity.OK


def test_few_rows_say_nothing_about_rates() -> None:
    (finding,) = _nulls({"x": Rate(0, 1_000)}, {"x": Rate(10, 10)}).values()
    assert finding.severity is Severity.INSUFFICIENT


def test_nan_counts_as_null_and_infinity_does_not() -> None:
    assert null_rate([1.0, np.nan, np.inf]) == Rate(1, 3)


# ── Outliers ────────────────────────────────────────────────────────────────────────


def test_outliers_do_not_hide_themselves() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(size=95), np.full(5, 1_000.0)])
    z_scores = np.abs(stats.zscore(values))
    assert Spread.of(values).outliers(values).tolist() == [False] * 95 + [True] * 5
    assert z_scores.max() < 5, "a z-score of twenty per cent contamination says almost nothing"


def test_a_normal_value_is_an_outlier_once_in_two_thousand() -> None:
    values = np.random.default_rng(1).normal(50, 7, 400_000)
    # 2·(1 - Phi(3.5)) = 0.000465
    assert Spread.of(values).outliers(values).mean() == pytest.approx(0.000465, rel=0.3)


def test_where_half_of_the_values_are_equal_the_quartiles_stand_in() -> None:
    values = np.concatenate([np.zeros(60), np.linspace(1, 5, 40)])
    spread = Spread.of(values)
    assert spread.mad == 0
    assert spread.iqr > 0
    assert spread.outliers([0.0, 5.0, 500.0, np.nan]).tolist() == [False, False, True, False]


def test_where_nothing_varies_only_infinity_is_an_outlier() -> None:
    assert Spread.of([3.0] * 9).outliers([3.0, 4.0, np.inf]).tolist() == [False, False, True]


def test_a_spread_of_nothing_is_refused() -> None:
    with pytest.raises(MonitoringDataError, match="no finite value"):
        Spread.of([np.nan, np.inf])


def test_the_outlier_rate_is_judged_against_the_references() -> None:
    random = np.random.default_rng(2)
    reference = random.lognormal(sigma=1.5, size=20_000)
    spread = Spread.of(reference)
    usual = Rate(int(spread.outliers(reference).sum()), len(reference))
    assert usual.value > 0.05, "a skewed feature always has outliers"
    same, wild = random.lognormal(sigma=1.5, size=1_000), random.lognormal(sigma=2.5, size=1_000)
    known = {"same": (spread, usual), "wild": (spread, usual)}
    findings = {each.subject: each.severity for each in outlier_findings(known, {"same": same, "wild": wild}, POLICY)}
    assert findings == {"same outliers": Severity.OK, "wild outliers": Severity.ALARM}
