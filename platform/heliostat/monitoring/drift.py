"""Whether recent values look like those that a version was trained on. Pure.

Both sides are counts in the same bins (the version's reference profile), so that recent profiles
merge by adding, on any number of workers.

An alarm needs an effect above its floor AND significance, corrected over everything that is
compared. Either alone is wrong: a fixed floor is crossed by chance in small samples (the
PSI of no drift at all is about (B - 1)(1/n + 1/m)), and with a million rows everything is
significant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from heliostat.errors import MonitoringDataError
from heliostat.monitoring.verdict import Finding, Severity, tail

FloatArray = NDArray[np.float64]

_LEAST_EXPECTED = 5.0  # Cochran's rule: below it the chi-square approximation fails
_PSEUDO_COUNT = 0.5


@dataclass(frozen=True, slots=True)
class DriftPolicy:
    """When a difference is worth somebody's time.

    Attributes:
        js_floor: Jensen-Shannon distance (base 2, in [0, 1]) below which nothing matters.
        psi_floor: Population stability index below which nothing matters; an alarm needs both.
        alpha: False-discovery rate over all features; with no drift at all, the chance of any alarm.
        min_rows: Rows below which the comparison isn't made.
    """

    js_floor: float = 0.1
    psi_floor: float = 0.1
    alpha: float = 0.01
    min_rows: int = 200


@dataclass(frozen=True, slots=True)
class FeatureDrift:
    """How far one feature has moved.

    Attributes:
        js_distance: Jensen-Shannon distance, base 2: 0 same, 1 disjoint.
        psi: Population stability index, smoothed.
        psi_without_drift: What PSI is expected to be with these numbers of rows and no drift.
        statistic: Two-sample chi-square, over bins pooled until each is large enough.
        p_value: Of the statistic.
        q_value: The same, corrected over all features (Benjamini-Hochberg).
        n_reference: Rows of the reference.
        n_current: Recent rows.
    """

    js_distance: float
    psi: float
    psi_without_drift: float
    statistic: float
    p_value: float
    q_value: float
    n_reference: int
    n_current: int

    def alarms(self, policy: DriftPolicy) -> bool:
        """Whether it is both large and significant."""
        large = self.js_distance >= policy.js_floor and self.psi >= policy.psi_floor
        return large and self.q_value <= policy.alpha


def js_distance(reference: ArrayLike, current: ArrayLike) -> float:
    """Jensen-Shannon distance with base 2: the root of the divergence, a metric in [0, 1].

    Args:
        reference: Counts by bin, shape ``(bins,)``.
        current: Counts in the same bins.

    Raises:
        MonitoringDataError: If the bins differ in number, a count is negative, or a side is empty.
    """
    before, after = _counts(reference, current)
    p, q = before / before.sum(), after / after.sum()
    middle = (p + q) / 2
    divergence = (_entropy_against(p, middle) + _entropy_against(q, middle)) / 2
    return float(np.sqrt(min(max(divergence, 0.0), 1.0)))


def _entropy_against(p: FloatArray, middle: FloatArray) -> float:
    some = p > 0
    return float((p[some] * np.log2(p[some] / middle[some])).sum())


def psi(reference: ArrayLike, current: ArrayLike) -> float:
    """Population stability index, with half a row added to each bin: empty bins stay finite.

    Args:
        reference: Counts by bin, shape ``(bins,)``.
        current: Counts in the same bins.

    Raises:
        MonitoringDataError: As `js_distance`.
    """
    before, after = (side + _PSEUDO_COUNT for side in _counts(reference, current))
    p, q = before / before.sum(), after / after.sum()
    return float(((q - p) * np.log(q / p)).sum())


def chi_square(reference: ArrayLike, current: ArrayLike) -> tuple[float, float]:
    """Pearson's two-sample test of homogeneity; the reference is a sample as well, not the truth.

    The rarest bins are pooled until each expects at least five rows on both sides.

    Args:
        reference: Counts by bin, shape ``(bins,)``.
        current: Counts in the same bins.

    Returns:
        Statistic and p-value; 0 and 1 where a single bin remains.

    Raises:
        MonitoringDataError: As `js_distance`.
    """
    before, after = _pooled(*_counts(reference, current))
    if len(before) < 2:
        return 0.0, 1.0
    n, m = before.sum(), after.sum()
    # The form that needs no table: sum of (b·sqrt(m/n) - a·sqrt(n/m))² / (a + b).
    statistic = float(((before * np.sqrt(m / n) - after * np.sqrt(n / m)) ** 2 / (before + after)).sum())
    return statistic, float(stats.chi2.sf(statistic, len(before) - 1))


def _pooled(before: FloatArray, after: FloatArray) -> tuple[FloatArray, FloatArray]:
    share = min(before.sum(), after.sum()) / (before.sum() + after.sum())
    order = np.argsort(before + after, kind="stable")
    before, after = before[order], after[order]
    expected = (before + after) * share
    # How many of the rarest must go together until the pool and all others are large enough.
    pooled = int(np.searchsorted(expected, _LEAST_EXPECTED))
    while pooled and pooled < len(expected) and expected[:pooled].sum() < _LEAST_EXPECTED:
        pooled += 1
    if pooled < 2:
        some = (before + after) > 0
        return before[some], after[some]
    return (
        np.concatenate([[before[:pooled].sum()], before[pooled:]]),
        np.concatenate([[after[:pooled].sum()], after[pooled:]]),
    )


def benjamini_hochberg(p_values: ArrayLike) -> FloatArray:
    """Adjusted p-values: reject those at most alpha, and the false-discovery rate is at most alpha.

    Source: Benjamini and Hochberg 1995.

    Args:
        p_values: Shape ``(n,)``.

    Returns:
        Shape ``(n,)``, same order.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted


def compare(reference: Mapping[str, ArrayLike], current: Mapping[str, ArrayLike]) -> dict[str, FeatureDrift]:
    """Compare every feature of the reference.

    Args:
        reference: Counts by bin, shape ``(bins,)``, by feature.
        current: Counts in the same bins, by feature.

    Raises:
        MonitoringDataError: If a feature has no recent counts, or its bins don't fit.
    """
    missing = sorted(set(reference) - set(current))
    if missing:
        raise MonitoringDataError(
            "drift", f"there are no recent counts of {', '.join(missing)}", "profile the same features on both sides"
        )
    tests = {name: chi_square(reference[name], current[name]) for name in reference}
    adjusted = benjamini_hochberg([p_value for _, p_value in tests.values()])
    compared: dict[str, FeatureDrift] = {}
    for (name, (statistic, p_value)), q_value in zip(tests.items(), adjusted, strict=True):
        before, after = _counts(reference[name], current[name])
        used = int(((before + after) > 0).sum())
        compared[name] = FeatureDrift(
            js_distance=js_distance(before, after),
            psi=psi(before, after),
            psi_without_drift=(used - 1) * (1 / before.sum() + 1 / after.sum()),
            statistic=statistic,
            p_value=p_value,
            q_value=float(q_value),
            n_reference=int(before.sum()),
            n_current=int(after.sum()),
        )
    return compared


def drift_findings(
    reference: Mapping[str, ArrayLike], current: Mapping[str, ArrayLike], policy: DriftPolicy
) -> tuple[Finding, ...]:
    """What `compare` says, judged by a policy: one finding a feature.

    A caller that logs several rows an entity passes one of them: repeated rows aren't
    independent, and would make everything significant.

    Raises:
        MonitoringDataError: As `compare`.
    """
    rows = min((int(np.asarray(counts).sum()) for counts in current.values()), default=0)
    if rows < policy.min_rows:
        return (
            Finding(
                "rows",
                Severity.INSUFFICIENT,
                f"{rows} recent rows; at least {policy.min_rows} are needed",
                {"n_current": rows, "min_rows": policy.min_rows},
            ),
        )
    return tuple(_finding(name, drift, policy) for name, drift in compare(reference, current).items())


def _finding(name: str, drift: FeatureDrift, policy: DriftPolicy) -> Finding:
    alarms = drift.alarms(policy)
    figures = f"JS distance {drift.js_distance:.3f}, PSI {drift.psi:.3f}, {tail('q', drift.q_value)}"
    said = "has moved" if alarms else "looks the same" if drift.q_value > policy.alpha else "moved less than matters"
    return Finding(
        name,
        Severity.ALARM if alarms else Severity.OK,
        f"{said}: {figures}",
        {**asdict(drift), "js_floor": policy.js_floor, "psi_floor": policy.psi_floor, "alpha": policy.alpha},
    )


def _counts(reference: ArrayLike, current: ArrayLike) -> tuple[FloatArray, FloatArray]:
    before, after = np.asarray(reference, dtype=np.float64), np.asarray(current, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 1:
        raise MonitoringDataError(
            "drift",
            f"the reference has {before.shape} bins and the recent rows {after.shape}",
            "count both with the same reference profile",
        )
    if (before < 0).any() or (after < 0).any() or before.sum() <= 0 or after.sum() <= 0:
        raise MonitoringDataError("drift", "a side has no rows, or a count is negative", "pass counts of rows")
    return before, after
