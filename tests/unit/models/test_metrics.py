from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from heliostat.errors import InvalidValueError, UndefinedMetricError
from heliostat.models import metrics


def _sample(seed: int, n: int = 400, *, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=n)
    labels = (rng.random(n) < 1 / (1 + np.exp(-signal))).astype(float)
    scores = 1 / (1 + np.exp(-(signal + rng.normal(size=n))))
    return labels, np.round(scores, 1) if ties else scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_points_equal_scikit_learn(seed: int, ties: bool) -> None:
    y, s = _sample(seed, ties=ties)
    assert metrics.auc(y, s) == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)
    assert metrics.average_precision(y, s) == pytest.approx(sk.average_precision_score(y, s), abs=1e-12)
    assert metrics.measure("log_loss", y, s).value == pytest.approx(sk.log_loss(y, s), rel=1e-9)
    assert metrics.measure("brier", y, s).value == pytest.approx(sk.brier_score_loss(y, s), rel=1e-12)
    assert metrics.measure("rmse", y, s).value == pytest.approx(sk.root_mean_squared_error(y, s), rel=1e-12)
    assert metrics.measure("mae", y, s).value == pytest.approx(sk.mean_absolute_error(y, s), rel=1e-12)
    assert metrics.measure("r2", y, s).value == pytest.approx(sk.r2_score(y, s), rel=1e-12)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_point_is_the_intervals_value(name: str) -> None:
    y, s = _sample(6)
    assert metrics.point(name, y, s) == pytest.approx(metrics.measure(name, y, s, resamples=20).value, rel=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40))
@settings(max_examples=200, deadline=None)
def test_auc_is_the_share_of_concordant_pairs(rows: list[tuple[bool, int]]) -> None:
    y = np.array([row[0] for row in rows], dtype=float)
    s = np.array([row[1] for row in rows], dtype=float)
    if y.min() == y.max():
        with pytest.raises(UndefinedMetricError, match="both classes"):
            metrics.auc(y, s)
        return
    above, below = s[y == 1][:, None], s[y == 0][None, :]
    assert metrics.auc(y, s) == pytest.approx(((above > below) + 0.5 * (above == below)).mean(), abs=1e-12)


def _delong_variance(y: np.ndarray, s: np.ndarray) -> float:
    """The textbook's double loop."""
    above, below = s[y == 1][:, None], s[y == 0][None, :]
    kernel = (above > below) + 0.5 * (above == below)
    return float(kernel.mean(axis=1).var(ddof=1) / len(above) + kernel.mean(axis=0).var(ddof=1) / below.size)


@pytest.mark.parametrize("ties", [False, True])
def test_without_clusters_the_variance_is_delongs(ties: bool) -> None:
    y, s = _sample(3, ties=ties)
    found = metrics.auc_interval(y, s)
    error = np.sqrt(_delong_variance(y, s)) / (found.value * (1 - found.value))
    centre = np.log(found.value / (1 - found.value))
    assert found.low == pytest.approx(1 / (1 + np.exp(-(centre - 1.959964 * error))), abs=1e-6)
    assert found.high == pytest.approx(1 / (1 + np.exp(-(centre + 1.959964 * error))), abs=1e-6)


def _bootstrap_sd(y: np.ndarray, s: np.ndarray, other: np.ndarray | None, groups: np.ndarray) -> float:
    rng = np.random.default_rng(7)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    drawn = []
    for _ in range(400):
        rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        value = metrics.auc(y[rows], s[rows])
        drawn.append(value - (metrics.auc(y[rows], other[rows]) if other is not None else 0.0))
    return float(np.std(drawn))


def test_auc_interval_agrees_with_a_bootstrap_of_rows() -> None:
    y, s = _sample(11, 600)
    found = metrics.auc_interval(y, s)
    sd = _bootstrap_sd(y, s, None, np.arange(y.size))
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(sd, rel=0.12)


def test_clustered_intervals_agree_with_a_bootstrap_of_entities_and_are_wider() -> None:
    rng = np.random.default_rng(5)
    entity = np.repeat(np.arange(200), 4)
    trait = rng.normal(size=200)[entity]
    y = (rng.random(800) < 1 / (1 + np.exp(-1.5 * trait))).astype(float)
    s = trait + 0.3 * rng.normal(size=800)
    other = trait + rng.normal(size=200)[entity]
    alone, clustered = metrics.auc_interval(y, s), metrics.auc_interval(y, s, clusters=entity)
    assert clustered.value == alone.value
    assert clustered.high - clustered.low > 1.12 * (alone.high - alone.low)
    sd = _bootstrap_sd(y, s, None, entity)
    assert (clustered.high - clustered.low) / (2 * 1.96) == pytest.approx(sd, rel=0.12)
    difference = metrics.auc_difference(y, s, other, clusters=entity)
    assert (difference.high - difference.low) / (2 * 1.96) == pytest.approx(
        _bootstrap_sd(y, s, other, entity), rel=0.12
    )


def test_auc_interval_covers_the_truth_as_often_as_it_says() -> None:
    # Two normals one standard deviation apart: the AUC is Phi(1 / sqrt 2).
    truth, rng, hits = 0.7602499, np.random.default_rng(1), 0
    for _ in range(400):
        y = np.r_[np.ones(40), np.zeros(60)]
        found = metrics.auc_interval(y, np.r_[rng.normal(1, 1, 40), rng.normal(0, 1, 60)])
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_paired_difference_is_narrower_than_two_separate_intervals() -> None:
    y, s = _sample(2)
    better = s + 0.05 * y
    paired = metrics.auc_difference(y, better, s)
    assert paired.low > 0
    apart = metrics.auc_interval(y, s)
    assert paired.high - paired.low < apart.high - apart.low


def test_paired_auc_difference_equals_delongs_covariance_formula() -> None:
    y, a = _sample(21)
    b = a + np.random.default_rng(1).normal(0, 0.2, a.size)
    above, below = [(s[y == 1][:, None], s[y == 0][None, :]) for s in (a, b)]
    kernels = [(x > z) + 0.5 * (x == z) for x, z in (above, below)]
    rows = np.cov([kernel.mean(axis=1) for kernel in kernels]) / (y == 1).sum()
    columns = np.cov([kernel.mean(axis=0) for kernel in kernels]) / (y == 0).sum()
    covariance = rows + columns
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    found = metrics.auc_difference(y, a, b)
    assert found.value == pytest.approx(kernels[0].mean() - kernels[1].mean(), abs=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * np.sqrt(variance), rel=1e-6)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_a_model_gains_nothing_over_itself(name: str) -> None:
    y, s = _sample(4)
    found = metrics.gain(name, y, s, s, resamples=20)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_gain_is_positive_for_the_better_model_whatever_the_metric(name: str) -> None:
    rng = np.random.default_rng(9)
    p = rng.random(3_000)
    y = (rng.random(3_000) < p).astype(float)
    worse = (0.5 * p + 0.5 * rng.random(3_000)) ** 1.5
    found = metrics.gain(name, y, p, worse, resamples=60)
    assert 0 < found.low < found.value < found.high


@pytest.mark.parametrize("name", metrics.METRICS)
def test_interval_contains_its_point_and_shrinks_with_rows(name: str) -> None:
    small, large = (metrics.measure(name, *_sample(8, n), resamples=80) for n in (200, 6_000))
    assert small.low <= small.value <= small.high
    assert large.high - large.low < small.high - small.low
    assert (small.n, large.n) == (200, 6_000)


def test_perfect_separation_still_has_an_interval() -> None:
    found = metrics.auc_interval([0, 0, 0, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7])
    assert found.value == found.high == 1.0
    assert found.low == pytest.approx(0.025 ** (1 / 3))
    upside_down = metrics.auc_interval([1, 1, 1, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7])
    assert (upside_down.low, upside_down.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 3)))


def test_calibrated_scores_have_an_interval_that_reaches_zero_and_shifted_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(2, 3, 4_000)
    y = (rng.random(4_000) < p).astype(float)
    calibrated = metrics.measure("calibration_error", y, p)
    shifted = metrics.measure("calibration_error", y, np.clip(p + 0.1, 0, 1))
    assert calibrated.low <= 0.003
    assert calibrated.value < 0.03
    assert shifted.low > 0.07


def test_calibration_error_of_two_bins_is_the_textbook_sum() -> None:
    y, s = [0, 1, 1, 1], [0.2, 0.2, 0.6, 0.6]
    assert metrics.calibration_error(y, s, bins=2) == pytest.approx(0.5 * 0.3 + 0.5 * 0.4)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([], [], "no rows"),
        ([0, 1], [0.5], "one score a label"),
        ([0, 2], [0.1, 0.2], "use 0 and 1"),
        ([0, 1], [np.nan, 0.2], "aren't finite"),
        ([1, 1], [0.3, 0.2], "both classes"),
    ],
)
def test_undefined_input_is_refused_with_a_fix(labels: list[float], scores: list[float], message: str) -> None:
    with pytest.raises(UndefinedMetricError, match=message):
        metrics.measure("auc", labels, scores)


def test_unknown_metric_lists_what_there_is() -> None:
    with pytest.raises(InvalidValueError, match="average_precision"):
        metrics.measure("accuracy", [0, 1], [0.1, 0.9])


def test_constant_target_has_no_r2() -> None:
    with pytest.raises(UndefinedMetricError, match="r2"):
        metrics.measure("r2", [3.0, 3.0], [1.0, 2.0])
