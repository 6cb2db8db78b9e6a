from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from heliostat.clock import US_PER_DAY, US_PER_S
from heliostat.models.profile import Profile
from heliostat.monitoring.quality import (
    QualityPolicy,
    Rate,
    freshness_finding,
    profile_findings,
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


# ── Profiles ────────────────────────────────────────────────────────────────────────


def _profile_findings(reference: NDArray[np.float64], current: NDArray[np.float64]) -> dict[str, Severity]:
    """Two features, and a prediction that never changes."""
    before = Profile.of(reference, ["a", "b"], np.linspace(0, 1, len(reference)))
    after = before.count(current, np.linspace(0, 1, len(current)))
    return {each.subject: each.severity for each in profile_findings(before, after, POLICY)}


def test_the_outlier_rate_is_judged_against_the_references() -> None:
    random = np.random.default_rng(2)
    reference, current = random.lognormal(sigma=1.5, size=(20_000, 2)), random.lognormal(sigma=1.5, size=(1_000, 2))
    current[:, 1] = random.lognormal(sigma=2.5, size=1_000)
    assert Profile.of(reference, ["a", "b"]).features["a"].outlier_rate > 0.05, "a skewed feature always has some"
    found = _profile_findings(reference, current)
    assert {name for name, severity in found.items() if severity is Severity.ALARM} == {"b outliers"}


def test_nulls_are_found_by_feature_and_are_no_outliers() -> None:
    random = np.random.default_rng(3)
    reference, current = random.normal(size=(5_000, 2)), random.normal(size=(500, 2))
    current[::3, 0] = np.nan
    found = _profile_findings(reference, current)
    assert {name for name, severity in found.items() if severity is Severity.ALARM} == {"a null"}


def test_outliers_are_counted_among_known_values() -> None:
    random = np.random.default_rng(4)
    reference, current = random.normal(size=(5_000, 2)), random.normal(size=(1_000, 2))
    current[:800, 0] = np.nan
    current[-20:, 0] = 50.0
    before = Profile.of(reference, ["a", "b"])
    findings = {each.subject: each for each in profile_findings(before, before.count(current), POLICY)}
    assert findings["a outliers"].evidence["rate"] == pytest.approx(20 / 200, abs=0.006)


def test_the_predictions_are_looked_at_as_well() -> None:
    random = np.random.default_rng(5)
    before = Profile.of(random.normal(size=(2_000, 1)), ["a"], random.normal(size=2_000))
    after = before.count(random.normal(size=(500, 1)), random.normal(size=500) * 10)
    found = {each.subject: each.severity for each in profile_findings(before, after, POLICY)}
    assert found["prediction outliers"] is Severity.ALARM
    assert found["a outliers"] is Severity.OK


def test_a_feature_with_hardly_any_value_does_not_silence_the_others() -> None:
    random = np.random.default_rng(6)
    current = random.normal(size=(500, 2))
    current[:490, 0] = np.nan
    found = _profile_findings(random.normal(size=(5_000, 2)), current)
    assert found["a null"] is Severity.ALARM
    assert found["b outliers"] is Severity.OK
    assert "a outliers" not in found
