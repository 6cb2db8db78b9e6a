from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from heliostat.errors import ExperimentDataError
from heliostat.experiments.effects import (
    Effect,
    always_valid,
    cuped_difference,
    difference_in_means,
    difference_in_ratios,
    fixed_horizon,
    half_width,
    minimum_detectable_effect,
    plan,
    sample_ratio,
    tuned_rho,
)

# ── The confidence sequence ─────────────────────────────────────────────────────────


def test_rho_is_the_papers_at_five_thousand_entities() -> None:
    # sqrt((-2 ln 0.05 + ln(1 - 2 ln 0.05)) / 5000), by hand: sqrt((5.99146 + 1.94469) / 5000)
    assert tuned_rho(0.05, 5_000) == pytest.approx(0.039840, abs=1e-6)


def test_the_tuned_interval_is_the_narrowest_at_its_number_of_entities() -> None:
    tuned = half_width(1.0, 2_000, tuned_rho(0.05, 2_000), 0.05)
    others = [half_width(1.0, 2_000, tuned_rho(0.05, at), 0.05) for at in (50, 200, 800, 5_000, 20_000, 200_000)]
    # The paper's rho is an approximation to the minimiser: within half a percent of the best on a fine grid.
    best = min(half_width(1.0, 2_000, rho, 0.05) for rho in np.geomspace(1e-4, 1, 2_000))
    assert all(tuned < other for other in others)
    assert tuned == pytest.approx(best, rel=0.005)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_the_p_value_reaches_alpha_exactly_where_the_interval_touches_zero(alpha: float) -> None:
    width = half_width(0.03, 900, tuned_rho(alpha, 5_000), alpha)
    touching = Effect("means", 0.0, width, width, 0.03, 450, 450)
    interval = always_valid(touching, alpha=alpha)
    assert interval.lower == pytest.approx(0.0, abs=1e-12)
    assert interval.p_value == pytest.approx(alpha, rel=1e-9)


def test_the_confidence_sequence_is_wider_than_one_planned_look() -> None:
    random = np.random.default_rng(5)
    control, treatment = random.normal(size=400), random.normal(size=500)
    looked_often = always_valid(difference_in_means(control, treatment))
    looked_once = fixed_horizon(control, treatment)
    assert looked_often.upper - looked_often.lower > looked_once.upper - looked_once.lower


def _looks(seed: int, *, runs: int, entities: int, every: int) -> tuple[float, float]:
    """The part of null experiments in which either interval excluded zero at any look."""
    random = np.random.default_rng(seed)
    wrong_sequence = wrong_t_test = 0
    for _ in range(runs):
        # Skewed outcomes, as revenue is; no difference between the arms.
        control, treatment = random.exponential(size=(2, entities))
        looks = np.arange(100, entities + 1, every)
        means, variances = [], []
        for arm in (control, treatment):
            total, squares = np.cumsum(arm)[looks - 1], np.cumsum(arm**2)[looks - 1]
            means.append(total / looks)
            variances.append((squares - total**2 / looks) / (looks - 1) / looks)
        difference, error = means[1] - means[0], np.sqrt(variances[0] + variances[1])
        sequence = [
            always_valid(Effect("means", 0, d, d, e, n, n), tuned_at=2_000).excludes_zero
            for d, e, n in zip(difference.tolist(), error.tolist(), looks.tolist(), strict=True)
        ]
        wrong_sequence += any(sequence)
        wrong_t_test += bool(np.any(np.abs(difference) > stats.norm.ppf(0.975) * error))
    return wrong_sequence / runs, wrong_t_test / runs


def test_looking_all_the_time_keeps_the_error_rate_that_a_t_test_loses() -> None:
    sequence, t_test = _looks(20_261_122, runs=400, entities=2_000, every=20)
    # 400 runs at a true rate of 0.05 stay below 0.085 with probability 0.998.
    assert sequence <= 0.085
    assert t_test > 0.2


def test_a_real_difference_is_found_while_looking() -> None:
    random = np.random.default_rng(11)
    found = 0
    for _ in range(50):
        control, treatment = random.normal(size=2_000), random.normal(loc=0.2, size=2_000)
        found += always_valid(difference_in_means(control, treatment), tuned_at=4_000).lower > 0
    assert found >= 45


def test_no_variance_shows_nothing() -> None:
    interval = always_valid(difference_in_means([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]))
    assert (interval.lower, interval.upper, interval.p_value) == (-math.inf, math.inf, 1.0)


# ── Welch ───────────────────────────────────────────────────────────────────────────


def test_the_fixed_horizon_interval_is_welchs() -> None:
    random = np.random.default_rng(1)
    control, treatment = random.normal(0, 1, 30), random.normal(0.5, 3, 12)
    expected = stats.ttest_ind(treatment, control, equal_var=False)
    ends = expected.confidence_interval(0.95)
    interval = fixed_horizon(control, treatment)
    assert interval.kind == "fixed-horizon"
    assert interval.p_value == pytest.approx(expected.pvalue)
    assert (interval.lower, interval.upper) == (pytest.approx(ends.low), pytest.approx(ends.high))


def test_an_arm_of_one_entity_is_refused_by_name() -> None:
    with pytest.raises(ExperimentDataError, match="treatment has 1 entities"):
        difference_in_means([1.0, 2.0], [1.0])


# ── CUPED ───────────────────────────────────────────────────────────────────────────


def _with_covariate(
    random: np.random.Generator, n: int, shift: float, correlation: float
) -> tuple[np.ndarray, np.ndarray]:
    covariate = random.normal(size=n)
    return shift + correlation * covariate + math.sqrt(1 - correlation**2) * random.normal(size=n), covariate


def test_cuped_takes_away_the_variance_that_the_covariate_explains() -> None:
    random = np.random.default_rng(3)
    control, control_x = _with_covariate(random, 4_000, 0.0, 0.8)
    treatment, treatment_x = _with_covariate(random, 4_000, 0.1, 0.8)
    plain = difference_in_means(control, treatment)
    adjusted = cuped_difference(control, control_x, treatment, treatment_x)
    # The variance that remains is 1 - correlation².
    assert (adjusted.standard_error / plain.standard_error) ** 2 == pytest.approx(1 - 0.8**2, rel=0.06)
    assert adjusted.difference == pytest.approx(0.1, abs=3 * adjusted.standard_error)


def test_cuped_is_unbiased_and_its_standard_error_is_true() -> None:
    random = np.random.default_rng(4)
    differences, errors = [], []
    for _ in range(400):
        control, control_x = _with_covariate(random, 150, 0.0, 0.7)
        treatment, treatment_x = _with_covariate(random, 150, 0.3, 0.7)
        adjusted = cuped_difference(control, control_x, treatment, treatment_x)
        differences.append(adjusted.difference)
        errors.append(adjusted.standard_error)
    assert np.mean(differences) == pytest.approx(0.3, abs=4 * np.std(differences) / math.sqrt(400))
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.1)


@pytest.mark.parametrize("covariate", [np.nan, 7.0])
def test_a_covariate_that_says_nothing_changes_nothing(covariate: float) -> None:
    control, treatment = np.array([1.0, 2.0, 4.0]), np.array([2.0, 5.0, 9.0, 1.0])
    plain = difference_in_means(control, treatment)
    adjusted = cuped_difference(control, np.full(3, covariate), treatment, np.full(4, covariate))
    assert adjusted.difference == pytest.approx(plain.difference)
    assert adjusted.standard_error == pytest.approx(plain.standard_error)


# ── Ratios ──────────────────────────────────────────────────────────────────────────


def test_ratio_of_one_prediction_each_is_the_mean() -> None:
    random = np.random.default_rng(6)
    control, treatment = random.normal(size=40), random.normal(size=50)
    ratio = difference_in_ratios(control, np.ones(40), treatment, np.ones(50))
    means = difference_in_means(control, treatment)
    assert ratio.difference == pytest.approx(means.difference)
    assert ratio.standard_error == pytest.approx(means.standard_error)


def test_ratio_counts_clusters_and_not_predictions() -> None:
    random = np.random.default_rng(7)
    n = 300
    differences, errors, naive = [], [], []
    for _ in range(300):
        totals, counts = [], []
        for _ in range(2):
            # One draw an entity, repeated in each of its many predictions.
            size = random.integers(1, 20, n).astype(np.float64)
            totals.append(random.binomial(1, 0.3, n) * size)
            counts.append(size)
        effect = difference_in_ratios(totals[0], counts[0], totals[1], counts[1])
        differences.append(effect.difference)
        errors.append(effect.standard_error)
        naive.append(math.sqrt(0.3 * 0.7 * (1 / counts[0].sum() + 1 / counts[1].sum())))
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.1)
    assert np.mean(naive) < 0.5 * np.std(differences)


# ── Sample-ratio mismatch ───────────────────────────────────────────────────────────


def test_srm_gives_the_textbooks_value() -> None:
    # Kohavi, Tang and Xu, Trustworthy Online Controlled Experiments, chapter 3: p = 1.8e-6.
    split = sample_ratio({"control": 821_588, "treatment": 815_482}, {"control": 0.5, "treatment": 0.5})
    assert split.p_value == pytest.approx(1.8e-6, rel=0.02)
    assert split.mismatch


def test_srm_leaves_arms_of_weight_zero_out() -> None:
    weights = {"control": 9.0, "treatment": 1.0, "shadow": 0.0}
    split = sample_ratio({"control": 900, "treatment": 100, "shadow": 50}, weights)
    assert split.observed == {"control": 900, "treatment": 100}
    assert split.p_value == pytest.approx(1.0)


def test_srm_sees_an_arm_that_nobody_met() -> None:
    assert sample_ratio({"control": 100}, {"control": 1, "treatment": 1}).mismatch


def test_srm_is_silent_on_sound_splits() -> None:
    random = np.random.default_rng(8)
    wrong = 0
    for _ in range(3_000):
        treatment = int(random.binomial(2_000, 0.1))
        wrong += sample_ratio({"a": 2_000 - treatment, "b": treatment}, {"a": 0.9, "b": 0.1}).mismatch
    assert wrong <= 10  # 3 are expected


def test_srm_needs_two_arms() -> None:
    with pytest.raises(ExperimentDataError, match="at least two"):
        sample_ratio({"control": 10}, {"control": 1.0, "treatment": 0.0})


# ── Power ───────────────────────────────────────────────────────────────────────────


def test_one_look_needs_the_textbooks_sixty_three_entities_an_arm() -> None:
    # Cohen's d = 0.5, alpha 0.05, power 0.8: 62.8 an arm by the normal approximation.
    needed = plan(0.5, 1.0, entities_a_day=10, sequential=False)
    assert (needed.n, needed.days) == (126, 13)
    assert needed.minimum_detectable_effect <= 0.5


def test_looking_at_any_time_costs_entities() -> None:
    assert plan(0.5, 1.0, entities_a_day=10).n > plan(0.5, 1.0, entities_a_day=10, sequential=False).n


def test_the_detectable_effect_is_detected_as_often_as_planned() -> None:
    random = np.random.default_rng(9)
    n = 800
    effect = minimum_detectable_effect(1.0, n, power=0.8)
    found = sum(
        always_valid(
            difference_in_means(random.normal(size=n // 2), random.normal(effect, 1, n // 2)), tuned_at=n
        ).lower
        > 0
        for _ in range(500)
    )
    assert found / 500 == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize(("effect", "a_day"), [(0.0, 10.0), (0.1, 0.0)])
def test_a_plan_for_nothing_is_refused(effect: float, a_day: float) -> None:
    with pytest.raises(ExperimentDataError):
        plan(effect, 1.0, entities_a_day=a_day)
