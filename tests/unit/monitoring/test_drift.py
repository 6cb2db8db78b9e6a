from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon

from heliostat.errors import MonitoringDataError
from heliostat.monitoring.drift import (
    DriftPolicy,
    benjamini_hochberg,
    chi_square,
    compare,
    drift_findings,
    js_distance,
    psi,
)
from heliostat.monitoring.verdict import Severity

POLICY = DriftPolicy(min_rows=50)


def _binned(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(edges) + 1)


def _edges(reference: np.ndarray, bins: int = 10) -> np.ndarray:
    """Inner edges of quantile bins, as a reference profile has them."""
    return np.unique(np.quantile(reference, np.linspace(0, 1, bins + 1)[1:-1]))


def _both(reference: np.ndarray, current: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    edges = _edges(reference)
    return _binned(reference, edges), _binned(current, edges)


# ── The measures ────────────────────────────────────────────────────────────────────


def test_disjoint_counts_are_at_distance_one() -> None:
    assert js_distance([5, 0], [0, 9]) == pytest.approx(1.0)


@given(st.integers(2, 12).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 999), min_size=n, max_size=n)] * 2)))
def test_js_distance_is_scipys_and_symmetric(sides: tuple[list[int], list[int]]) -> None:
    before, after = np.array(sides[0]) + np.eye(len(sides[0]))[0], np.array(sides[1]) + np.eye(len(sides[1]))[1]
    ours = js_distance(before, after)
    theirs = jensenshannon(before, after, base=2)
    # scipy takes the root of a rounding error for equal counts.
    assert ours == pytest.approx(float(np.nan_to_num(theirs)), abs=1e-7)
    assert ours**2 == pytest.approx(js_distance(after, before) ** 2, abs=1e-12)
    assert 0 <= ours <= 1


def test_distance_does_not_depend_on_how_many_rows_there_are() -> None:
    assert js_distance([10, 30], [20, 20]) == pytest.approx(js_distance([1_000, 3_000], [2, 2]))


def test_psi_of_a_textbook_shift() -> None:
    # (0.5 - 0.25)·ln(0.5 / 0.25) + (0.5 - 0.75)·ln(0.5 / 0.75) = 0.2747
    assert psi([250_000, 750_000], [500_000, 500_000]) == pytest.approx(0.27465, abs=1e-4)


def test_an_empty_bin_keeps_psi_finite() -> None:
    assert math.isfinite(psi([100, 0, 50], [0, 80, 70]))


def test_chi_square_is_pearsons_on_the_two_rows() -> None:
    before, after = [120, 90, 40, 60], [30, 40, 20, 25]
    expected = stats.chi2_contingency([before, after], correction=False)
    statistic, p_value = chi_square(before, after)
    assert statistic == pytest.approx(expected.statistic)
    assert p_value == pytest.approx(expected.pvalue)


def test_rare_bins_are_pooled_until_five_rows_are_expected() -> None:
    before, after = [1, 1, 2, 500, 500], [2, 0, 1, 480, 520]
    pooled = stats.chi2_contingency([[4, 500, 500], [3, 480, 520]], correction=False)
    # Seven rare rows expect 3.5 a side: the next bin joins them.
    joined = stats.chi2_contingency([[504, 500], [483, 520]], correction=False)
    assert chi_square(before, after)[1] == pytest.approx(joined.pvalue)
    assert chi_square(before, after)[1] != pytest.approx(pooled.pvalue)


def test_a_single_used_bin_shows_nothing() -> None:
    assert chi_square([100, 0], [50, 0]) == (0.0, 1.0)


def test_counts_of_different_bins_are_refused() -> None:
    with pytest.raises(MonitoringDataError, match="same reference profile"):
        js_distance([1, 2], [1, 2, 3])


def test_counts_merge_by_adding() -> None:
    random = np.random.default_rng(0)
    reference, one, other = random.normal(size=(3, 500))
    edges = _edges(reference)
    together = _binned(np.concatenate([one, other]), edges)
    assert (_binned(one, edges) + _binned(other, edges)).tolist() == together.tolist()


# ── Several features ────────────────────────────────────────────────────────────────


def test_benjamini_hochberg_of_the_papers_example() -> None:
    # Benjamini and Hochberg 1995, section 3.2: at 0.05 the first four of fifteen are rejected.
    p = [
        0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528,
        0.7590, 1.0,
    ]  # fmt: skip
    assert (benjamini_hochberg(p) <= 0.05).tolist() == [True] * 4 + [False] * 11


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_benjamini_hochberg_is_scipys(p_values: list[float]) -> None:
    assert benjamini_hochberg(p_values) == pytest.approx(stats.false_discovery_control(p_values))


def test_a_feature_without_recent_counts_is_named() -> None:
    with pytest.raises(MonitoringDataError, match="no recent counts of spent"):
        compare({"spent": [1, 2], "visits": [1, 2]}, {"visits": [1, 2]})


# ── When it alarms ──────────────────────────────────────────────────────────────────


def _false_alarms(policy: DriftPolicy, *, n: int, runs: int, features: int = 10) -> float:
    random = np.random.default_rng(20_261_122)
    alarms = 0
    for _ in range(runs):
        sides = [_both(random.normal(size=4_000), random.normal(size=n)) for _ in range(features)]
        reference = {str(index): before for index, (before, _) in enumerate(sides)}
        current = {str(index): after for index, (_, after) in enumerate(sides)}
        alarms += any(drift.alarms(policy) for drift in compare(reference, current).values())
    return alarms / runs


def test_without_drift_significance_alone_keeps_its_false_alarm_rate() -> None:
    rate = _false_alarms(DriftPolicy(js_floor=0.0, psi_floor=0.0, alpha=0.05), n=300, runs=400)
    # 400 runs at a true rate of 0.05 stay below 0.085 with probability 0.998; far below would be blind.
    assert 0.01 <= rate <= 0.085


def test_without_drift_the_policy_hardly_ever_alarms_in_small_windows() -> None:
    assert _false_alarms(POLICY, n=100, runs=300) <= 0.02


def test_a_fixed_floor_alone_would_alarm_all_the_time_in_small_windows() -> None:
    assert _false_alarms(DriftPolicy(alpha=1.0), n=100, runs=100) > 0.5


def test_a_real_shift_is_found() -> None:
    random = np.random.default_rng(2)
    found = 0
    for _ in range(100):
        sides = {"moved": _both(random.normal(size=4_000), random.normal(0.6, 1, 300))}
        sides |= {str(index): _both(random.normal(size=4_000), random.normal(size=300)) for index in range(9)}
        drifts = compare({k: v[0] for k, v in sides.items()}, {k: v[1] for k, v in sides.items()})
        found += drifts["moved"].alarms(POLICY)
    assert found >= 95


def test_a_million_rows_do_not_make_a_trifle_an_alarm() -> None:
    random = np.random.default_rng(3)
    before, after = _both(random.normal(size=1_000_000), random.normal(0.02, 1, 1_000_000))
    drift = compare({"x": before}, {"x": after})["x"]
    assert drift.q_value < 1e-6
    assert not drift.alarms(POLICY)


def test_the_expected_psi_without_drift_is_stated() -> None:
    random = np.random.default_rng(4)
    drifts = []
    for _ in range(200):
        before, after = _both(random.normal(size=2_000), random.normal(size=200))
        drifts.append(compare({"x": before}, {"x": after})["x"])
    assert np.mean([drift.psi for drift in drifts]) == pytest.approx(drifts[0].psi_without_drift, rel=0.15)


def test_findings_name_what_moved_with_its_figures() -> None:
    random = np.random.default_rng(5)
    moved = _both(random.normal(size=2_000), random.normal(1.0, 1, 400))
    still = _both(random.normal(size=2_000), random.normal(size=400))
    findings = drift_findings({"a": moved[0], "b": still[0]}, {"a": moved[1], "b": still[1]}, POLICY)
    severities = {finding.subject: finding.severity for finding in findings}
    assert severities == {"a": Severity.ALARM, "b": Severity.OK}
    assert findings[0].evidence["n_current"] == 400


def test_too_few_rows_are_insufficient_and_not_ok() -> None:
    (finding,) = drift_findings({"a": [500, 500]}, {"a": [10, 0]}, POLICY)
    assert finding.severity is Severity.INSUFFICIENT
    assert "10 recent rows" in finding.message
