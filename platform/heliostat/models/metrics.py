"""How good scores are, each figure with an interval: AUC, average precision, log loss, calibration, errors.

Pure numpy and scipy. Training's gate and monitoring's performance check use the same functions, so
that "0.78 in the gate" and "0.74 in production" are the same quantity.

Rows of one entity at several instants aren't independent. Every interval takes ``clusters`` (one
integer a row) and counts entities, not rows: AUC through the clustered form of DeLong's
components, means through cluster totals, everything else by resampling whole entities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from heliostat.errors import InvalidValueError, UndefinedMetricError
from heliostat.models.estimates import (
    CONFIDENCE,
    RESAMPLES,
    Estimate,
    FloatArray,
    IntArray,
    Weighted,
    bessel,
    checked_rows,
    mean_interval,
    normal_interval,
    percentiles,
    quantile,
    resampled,
)

__all__ = [
    "METRICS",
    "Estimate",
    "FloatArray",
    "Metric",
    "auc",
    "auc_difference",
    "auc_interval",
    "average_precision",
    "calibration_error",
    "gain",
    "measure",
    "metric_named",
    "point",
]

_CLIP = float(np.finfo(np.float64).eps)  # a certain and wrong score costs 36, not infinity


# ── AUC ─────────────────────────────────────────────────────────────────────────────


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve; a tie counts one half.

    Args:
        labels: 0 or 1, shape ``(n,)``.
        scores: Any finite scale, shape ``(n,)``.

    Raises:
        UndefinedMetricError: If one of the classes is missing.
    """
    y, s, _ = checked_rows("auc", labels, scores, None, binary=True)
    positives, _negatives = _components(y, s)
    return float(positives.mean())


def auc_interval(
    labels: ArrayLike, scores: ArrayLike, *, clusters: ArrayLike | None = None, confidence: float = CONFIDENCE
) -> Estimate:
    """AUC with DeLong's interval on the logit scale, so that it stays inside (0, 1).

    Source: DeLong, DeLong and Clarke-Pearson 1988 (components); Sun and Xu 2014 (by midranks, in
    n log n); Obuchowski 1997 (clusters; without them it is DeLong's). Perfect separation
    has no variance: there the end is Clopper and Pearson's for ``min(m, n)`` concordant pairs.

    Args:
        labels: 0 or 1, shape ``(n,)``.
        scores: Shape ``(n,)``.
        clusters: Which entity a row belongs to, shape ``(n,)``; without it, rows are independent.
        confidence: Coverage wanted.

    Raises:
        UndefinedMetricError: If one of the classes is missing.
    """
    y, s, groups = checked_rows("auc", labels, scores, clusters, binary=True)
    positives, negatives = _components(y, s)
    value = float(positives.mean())
    if value in (0.0, 1.0):
        members = y == 1
        pairs = min(len(np.unique(groups[members])), len(np.unique(groups[~members])))
        reach = 1.0 - float(((1.0 - confidence) / 2.0) ** (1.0 / pairs))
        low, high = (1.0 - reach, 1.0) if value == 1.0 else (0.0, reach)
        return Estimate(value, low, high, y.size)
    error = np.sqrt(_clustered_variance(y, positives, negatives, groups))
    half_width = quantile(confidence) * error / (value * (1.0 - value))
    centre = np.log(value / (1.0 - value))
    low, high = special.expit([centre - half_width, centre + half_width])
    return Estimate(value, float(low), float(high), y.size)


def auc_difference(
    labels: ArrayLike,
    scores: ArrayLike,
    reference: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """AUC of one model minus another's on the same rows; their correlation is accounted for.

    Source: DeLong et al. 1988, paired; Obuchowski 1997 for clusters.

    Args:
        labels: 0 or 1, shape ``(n,)``.
        scores: The model's, shape ``(n,)``.
        reference: The other model's, shape ``(n,)``.
        clusters: Which entity a row belongs to, shape ``(n,)``.
        confidence: Coverage wanted.

    Raises:
        UndefinedMetricError: If one of the classes is missing.
    """
    y, s, groups = checked_rows("auc", labels, scores, clusters, binary=True)
    _, other, _ = checked_rows("auc", labels, reference, clusters, binary=True)
    ours, theirs = _components(y, s), _components(y, other)
    positives, negatives = ours[0] - theirs[0], ours[1] - theirs[1]
    return normal_interval(
        float(positives.mean()), _clustered_variance(y, positives, negatives, groups), y.size, confidence
    )


def _components(y: FloatArray, s: FloatArray) -> tuple[FloatArray, FloatArray]:
    """DeLong's components: for each positive the share of negatives below it, for each negative of positives above.

    Returns:
        Shapes ``(m,)`` and ``(n,)``, in row order; the mean of either is the AUC.
    """
    positive = y == 1
    everywhere = stats.rankdata(s)
    above, below = s[positive], s[~positive]
    positives: FloatArray = (everywhere[positive] - stats.rankdata(above)) / below.size
    negatives: FloatArray = 1.0 - (everywhere[~positive] - stats.rankdata(below)) / above.size
    return positives, negatives


def _clustered_variance(y: FloatArray, positives: FloatArray, negatives: FloatArray, groups: IntArray) -> float:
    """Variance of the mean component, clusters kept together; linear, so differences may be passed.

    Source: Obuchowski 1997, eq. 3 to 6.
    """
    positive = y == 1
    m, n = positives.size, negatives.size
    value = positives.mean()
    n_groups = int(groups.max()) + 1
    of_positives = np.bincount(groups[positive], weights=positives - value, minlength=n_groups)
    of_negatives = np.bincount(groups[~positive], weights=negatives - value, minlength=n_groups)
    with_positives = np.unique(groups[positive]).size
    with_negatives = np.unique(groups[~positive]).size
    variance = (
        bessel(with_positives) * (of_positives @ of_positives) / m**2
        + bessel(with_negatives) * (of_negatives @ of_negatives) / n**2
        + 2.0 * bessel(n_groups) * (of_positives @ of_negatives) / (m * n)
    )
    return max(float(variance), 0.0)


# ── Means of a loss ─────────────────────────────────────────────────────────────────


def _log_losses(y: FloatArray, s: FloatArray) -> FloatArray:
    kept = np.clip(s, _CLIP, 1.0 - _CLIP)
    losses: FloatArray = -(y * np.log(kept) + (1.0 - y) * np.log1p(-kept))
    return losses


def _squared(y: FloatArray, s: FloatArray) -> FloatArray:
    return (y - s) ** 2


def _absolute(y: FloatArray, s: FloatArray) -> FloatArray:
    return np.abs(y - s)


# ── Everything else, by resampling entities ─────────────────────────────────────────


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Precision averaged over the steps of recall, without interpolation.

    Raises:
        UndefinedMetricError: If there is no positive label.
    """
    y, s, _ = checked_rows("average_precision", labels, scores, None, binary=True)
    return _average_precision(y, s)(np.ones_like(y))


def _average_precision(y: FloatArray, s: FloatArray) -> Weighted:
    order = np.argsort(-s, kind="stable")
    hits = y[order]
    ends = np.flatnonzero(np.r_[np.diff(s[order]) != 0, True])  # the last row of each score: ties enter together

    def weighted(weights: FloatArray) -> float:
        ranked = weights[order]
        true = np.cumsum(ranked * hits)[ends]
        all_ = np.cumsum(ranked)[ends]
        precision = np.divide(true, all_, out=np.zeros_like(true), where=all_ > 0)
        return float(precision @ np.diff(true, prepend=0.0) / true[-1]) if true[-1] > 0 else np.nan

    return weighted


def calibration_error(labels: ArrayLike, scores: ArrayLike, *, bins: int = 10) -> float:
    """Expected calibration error: mean distance of predicted and observed rate, over bins of equal size.

    Source: Naeini et al. 2015, with the equal-mass bins of Nguyen and O'Connor 2015.

    Args:
        labels: 0 or 1, shape ``(n,)``.
        scores: Probabilities, shape ``(n,)``.
        bins: How many bins; fewer where scores are tied.
    """
    y, s, _ = checked_rows("calibration_error", labels, scores, None, binary=True, classes=False)
    return _calibration_error(y, s, bins=bins)(np.ones_like(y))


def _calibration_error(y: FloatArray, s: FloatArray, *, bins: int = 10) -> Weighted:
    edges = np.unique(np.quantile(s, np.linspace(0.0, 1.0, bins + 1)[1:-1]))
    place = np.searchsorted(edges, s, side="left")
    gap = s - y

    def weighted(weights: FloatArray) -> float:
        return float(np.abs(np.bincount(place, weights=weights * gap)).sum() / weights.sum())

    return weighted


def _r2(y: FloatArray, s: FloatArray) -> Weighted:
    def weighted(weights: FloatArray) -> float:
        spread = weights @ (y - (weights @ y) / weights.sum()) ** 2
        return float(1.0 - (weights @ (y - s) ** 2) / spread) if spread > 0 else np.nan

    return weighted


# ── By name ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Metric:
    """A named metric.

    Attributes:
        name: As in a model's declaration.
        objective: ``"binary"`` or ``"regression"``.
        larger_is_better: Its direction.
    """

    name: str
    objective: str
    larger_is_better: bool


@dataclass(frozen=True, slots=True)
class MeanLoss(Metric):
    """A metric that is the mean of a loss of each row, or the root of that mean."""

    losses: Callable[[FloatArray, FloatArray], FloatArray]
    root: bool = False


@dataclass(frozen=True, slots=True)
class Resampled(Metric):
    """A metric whose interval comes from resampling entities.

    Attributes:
        weighted: Labels and scores -> the metric as a function of the rows' weights.
        reflected: Whether the interval is the reflected ("basic") one: resampling adds noise, which
            a distance from perfect calibration takes for miscalibration.
    """

    weighted: Callable[[FloatArray, FloatArray], Weighted]
    reflected: bool = False


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("auc", "binary", True),
        Resampled("average_precision", "binary", True, _average_precision),
        MeanLoss("log_loss", "binary", False, _log_losses),
        MeanLoss("brier", "binary", False, _squared),
        Resampled("calibration_error", "binary", False, _calibration_error, reflected=True),
        MeanLoss("rmse", "regression", False, _squared, root=True),
        MeanLoss("mae", "regression", False, _absolute),
        Resampled("r2", "regression", True, _r2),
    )
}


def metric_named(name: str) -> Metric:
    """Look a metric up.

    Raises:
        InvalidValueError: If there is none of that name.
    """
    if name not in METRICS:
        raise InvalidValueError("metric", name, f"one of {', '.join(METRICS)}")
    return METRICS[name]


def measure(
    name: str,
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A metric by name, with its interval.

    Args:
        name: A key of `METRICS`.
        labels: Shape ``(n,)``.
        scores: Shape ``(n,)``.
        clusters: Which entity a row belongs to, shape ``(n,)``.
        confidence: Coverage wanted.
        resamples: How often entities are resampled, for metrics without an analytic interval.
        seed: Of the resampling.

    Raises:
        InvalidValueError: If the metric is unknown.
        UndefinedMetricError: If it isn't defined on these rows.
    """
    metric = metric_named(name)
    if name == "auc":
        return auc_interval(labels, scores, clusters=clusters, confidence=confidence)
    y, s, groups = checked_rows(name, labels, scores, clusters, binary=metric.objective == "binary", classes=False)
    if isinstance(metric, MeanLoss):
        mean = mean_interval(metric.losses(y, s), clusters=groups, confidence=confidence)
        if not metric.root:
            return Estimate(mean.value, max(mean.low, 0.0), mean.high, mean.n)
        low, value, high = (float(np.sqrt(max(end, 0.0))) for end in (mean.low, mean.value, mean.high))
        return Estimate(value, low, high, mean.n)
    of = _as_weighted(metric, y, s)
    value = of(np.ones_like(y))
    if not np.isfinite(value):
        raise UndefinedMetricError(name, f"all {y.size} labels are {y[0]:g}", "take more rows")
    drawn = resampled(of, groups, resamples, seed)
    low, high = percentiles(drawn, confidence)
    if isinstance(metric, Resampled) and metric.reflected:
        low, high = max(2.0 * value - high, 0.0), max(2.0 * value - low, 0.0)
    return Estimate(value, low, high, y.size)


def point(name: str, labels: ArrayLike, scores: ArrayLike) -> float:
    """A metric by name, without its interval: what a search compares.

    Raises:
        InvalidValueError: If the metric is unknown.
        UndefinedMetricError: If it isn't defined on these rows.
    """
    metric = metric_named(name)
    if name == "auc":
        return auc(labels, scores)
    y, s, _ = checked_rows(name, labels, scores, None, binary=metric.objective == "binary", classes=False)
    value = _as_weighted(metric, y, s)(np.ones_like(y))
    if not np.isfinite(value):
        raise UndefinedMetricError(name, f"all {y.size} labels are {y[0]:g}", "take more rows")
    return value


def gain(
    name: str,
    labels: ArrayLike,
    scores: ArrayLike,
    reference: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """How much better one model is than another on the same rows; above zero is better, for every metric.

    Args:
        name: A key of `METRICS`.
        labels: Shape ``(n,)``.
        scores: The model's, shape ``(n,)``.
        reference: The other model's, shape ``(n,)``.
        clusters: Which entity a row belongs to, shape ``(n,)``.
        confidence: Coverage wanted.
        resamples: How often entities are resampled, for metrics without an analytic interval.
        seed: Of the resampling.

    Raises:
        InvalidValueError: If the metric is unknown.
        UndefinedMetricError: If it isn't defined on these rows.
    """
    metric = metric_named(name)
    if name == "auc":
        return auc_difference(labels, scores, reference, clusters=clusters, confidence=confidence)
    binary = metric.objective == "binary"
    y, s, groups = checked_rows(name, labels, scores, clusters, binary=binary, classes=False)
    _, other, _ = checked_rows(name, labels, reference, clusters, binary=binary, classes=False)
    if isinstance(metric, MeanLoss) and not metric.root:
        return mean_interval(metric.losses(y, other) - metric.losses(y, s), clusters=groups, confidence=confidence)
    ours, theirs = _as_weighted(metric, y, s), _as_weighted(metric, y, other)
    sign = 1.0 if metric.larger_is_better else -1.0

    def difference(weights: FloatArray) -> float:
        return sign * (ours(weights) - theirs(weights))

    value = difference(np.ones_like(y))
    if not np.isfinite(value):
        raise UndefinedMetricError(name, f"all {y.size} labels are {y[0]:g}", "take more rows")
    low, high = percentiles(resampled(difference, groups, resamples, seed), confidence)
    return Estimate(value, low, high, y.size)


def _as_weighted(metric: Metric, y: FloatArray, s: FloatArray) -> Weighted:
    if isinstance(metric, Resampled):
        return metric.weighted(y, s)
    if isinstance(metric, MeanLoss):
        losses, power = metric.losses(y, s), 0.5 if metric.root else 1.0
        return lambda weights: float((weights @ losses) / weights.sum()) ** power
    raise InvalidValueError("metric", metric.name, "one that is resampled")
