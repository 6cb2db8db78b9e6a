"""An estimate with its interval, and the ways that intervals come about.

Rows of one entity at several instants aren't independent: ``clusters`` says which rows belong
together, and entities are counted, not rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from heliostat.errors import UndefinedMetricError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Weighted = Callable[[FloatArray], float]
"""A metric as a function of the rows' weights, shape ``(n,)``."""

CONFIDENCE = 0.95
RESAMPLES = 300


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its two-sided confidence interval.

    Attributes:
        value: The point estimate.
        low: Lower end.
        high: Upper end.
        n: Rows it rests on.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"

    def as_dict(self) -> dict[str, float | int]:
        """Plain numbers for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def checked_rows(
    name: str,
    labels: ArrayLike,
    scores: ArrayLike,
    clusters: ArrayLike | None,
    *,
    binary: bool,
    classes: bool = True,
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Labels, scores and clusters as arrays, refused where a metric isn't defined on them.

    Args:
        name: The metric.
        labels: Shape ``(n,)``.
        scores: Shape ``(n,)``, finite.
        clusters: Which entity a row belongs to, shape ``(n,)``; None: rows are independent.
        binary: Whether labels have to be 0 or 1.
        classes: Whether both of them have to occur.

    Returns:
        Shape ``(n,)`` each; clusters are numbered from 0.

    Raises:
        UndefinedMetricError: Saying what doesn't fit.
    """
    y, s = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if y.ndim != 1 or y.shape != s.shape:
        raise UndefinedMetricError(name, f"labels have shape {y.shape}, scores {s.shape}", "pass one score a label")
    if not y.size:
        raise UndefinedMetricError(name, "there are no rows", "take more instants or a larger slice")
    unusable = int((~np.isfinite(y)).sum() + (~np.isfinite(s)).sum())
    if unusable:
        raise UndefinedMetricError(name, f"{unusable} labels or scores aren't finite", "leave those rows out")
    if binary:
        kinds = np.unique(y)
        if not np.isin(kinds, (0.0, 1.0)).all():
            raise UndefinedMetricError(name, f"labels hold {kinds[:5].tolist()}", "use 0 and 1")
        if classes and kinds.size < 2:
            reason = f"all {y.size} labels are {kinds[0]:g}"
            raise UndefinedMetricError(name, reason, "take more rows, so that both classes occur")
    if clusters is None:
        return y, s, np.arange(y.size)
    numbered: Any = np.unique(np.asarray(clusters), return_inverse=True)[1]
    if numbered.shape != y.shape:
        raise UndefinedMetricError(name, f"clusters have shape {numbered.shape}", "pass one cluster a label")
    return y, s, numbered.astype(np.int64)


def normal_interval(value: float, variance: float, n: int, confidence: float) -> Estimate:
    """The interval of a value that is about normal."""
    half_width = quantile(confidence) * float(np.sqrt(variance))
    return Estimate(value, value - half_width, value + half_width, n)


def percentiles(drawn: FloatArray, confidence: float) -> tuple[float, float]:
    """The middle of resampled values, shape ``(resamples,)``: as much of it as the confidence says."""
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return float(low), float(high)


def quantile(confidence: float) -> float:
    """How many standard errors the interval reaches to either side: 1.96 for 95 %."""
    return float(stats.norm.ppf(0.5 + confidence / 2.0))


def mean_interval(
    losses: ArrayLike, *, clusters: ArrayLike | None = None, confidence: float = CONFIDENCE
) -> Estimate:
    """A mean over rows whose entities, not rows, are independent.

    The mean is a ratio of cluster totals; its variance is the delta method's.

    Args:
        losses: Shape ``(n,)``.
        clusters: Which entity a row belongs to, shape ``(n,)``.
        confidence: Coverage wanted.
    """
    _, values, groups = checked_rows("mean", losses, losses, clusters, binary=False)
    return normal_interval(float(values.mean()), _mean_variance(values, groups), values.size, confidence)


def _mean_variance(values: FloatArray, groups: IntArray) -> float:
    totals = np.bincount(groups, weights=values - values.mean())
    return float(bessel(totals.size) * (totals @ totals) / values.size**2)


def resampled(of: Weighted, groups: IntArray, resamples: int, seed: int) -> FloatArray:
    """The metric on resampled entities.

    Returns:
        Shape ``(resamples,)`` at most: resamples where it isn't defined are left out.
    """
    rng = np.random.default_rng(seed)
    n_groups = int(groups.max()) + 1
    drawn = np.empty(resamples)
    for index in range(resamples):
        counts = np.bincount(rng.integers(0, n_groups, n_groups), minlength=n_groups)
        drawn[index] = of(counts[groups].astype(np.float64))
    return drawn[np.isfinite(drawn)]


def bessel(clusters: int) -> float:
    """What corrects a variance for the mean having been taken from the same clusters."""
    return clusters / (clusters - 1) if clusters > 1 else 1.0
