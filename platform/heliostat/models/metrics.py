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
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from heliostat.errors import InvalidValueError, UndefinedMetricError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
# Weights of the rows, shape (n,) -> the metric.
_Weighted = Callable[[FloatArray], float]

CONFIDENCE = 0.95
RESAMPLES = 300
_CLIP = float(np.finfo(np.float64).eps)  # a certain and wrong score costs 36, not infinity


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


# ── AUC ─────────────────────────────────────────────────────────────────────────────


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve; a tie counts one half.

    Args:
        labels: 0 or 1, shape ``(n,)``.
        scores: Any finite scale, shape ``(n,)``.

    Raises:
        UndefinedMetricError: If one of the classes is missing.
    """
    y, s, _ = _checked("auc", labels, scores, None, binary=True)
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
    y, s, groups = _checked("auc", labels, scores, clusters, binary=True)
    positives, negatives = _components(y, s)
    value = float(positives.mean())
    if value in (0.0, 1.0):
        members = y == 1
        pairs = min(len(np.unique(groups[members])), len(np.unique(groups[~members])))
        reach = 1.0 - float(((1.0 - confidence) / 2.0) ** (1.0 / pairs))
        low, high = (1.0 - reach, 1.0) if value == 1.0 else (0.0, reach)
        return Estimate(value, low, high, y.size)
    error = np.sqrt(_auc_variance(y, positives, negatives, groups))
    half_width = _z(confidence) * error / (value * (1.0 - value))
    centre = np.log(value / (1.0 - value))
    return Estimate(value, _expit(centre - half_width), _expit(centre + half_width), y.size)


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
    y, s, groups = _checked("auc", labels, scores, clusters, binary=True)
    _, other, _ = _checked("auc", labels, reference, clusters, binary=True)
    ours, theirs = _components(y, s), _components(y, other)
    positives, negatives = ours[0] - theirs[0], ours[1] - theirs[1]
    return _normal(float(positives.mean()), _auc_variance(y, positives, negatives, groups), y.size, confidence)


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


def _auc_variance(y: FloatArray, positives: FloatArray, negatives: FloatArray, groups: IntArray) -> float:
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
        _bessel(with_positives) * (of_positives @ of_positives) / m**2
        + _bessel(with_negatives) * (of_negatives @ of_negatives) / n**2
        + 2.0 * _bessel(n_groups) * (of_positives @ of_negatives) / (m * n)
    )
    return max(float(variance), 0.0)


def _bessel(groups: int) -> float:
    return groups / (groups - 1) if groups > 1 else 1.0


# ── Means of a loss ─────────────────────────────────────────────────────────────────


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
    _, values, groups = _checked("mean", losses, losses, clusters, binary=False)
    return _normal(float(values.mean()), _mean_variance(values, groups), values.size, confidence)


def _mean_variance(values: FloatArray, groups: IntArray) -> float:
    totals = np.bincount(groups, weights=values - values.mean())
    return float(_bessel(totals.size) * (totals @ totals) / values.size**2)


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
    y, s, _ = _checked("average_precision", labels, scores, None, binary=True)
    return _average_precision(y, s)(np.ones_like(y))


def _average_precision(y: FloatArray, s: FloatArray) -> _Weighted:
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
    y, s, _ = _checked("calibration_error", labels, scores, None, binary=True, classes=False)
    return _calibration_error(y, s, bins=bins)(np.ones_like(y))


def _calibration_error(y: FloatArray, s: FloatArray, *, bins: int = 10) -> _Weighted:
    edges = np.unique(np.quantile(s, np.linspace(0.0, 1.0, bins + 1)[1:-1]))
    place = np.searchsorted(edges, s, side="left")
    gap = s - y

    def weighted(weights: FloatArray) -> float:
        return float(np.abs(np.bincount(place, weights=weights * gap)).sum() / weights.sum())

    return weighted


def _r2(y: FloatArray, s: FloatArray) -> _Weighted:
    def weighted(weights: FloatArray) -> float:
        spread = weights @ (y - (weights @ y) / weights.sum()) ** 2
        return float(1.0 - (weights @ (y - s) ** 2) / spread) if spread > 0 else np.nan

    return weighted


def _bootstrap(of: _Weighted, groups: IntArray, resamples: int, seed: int) -> FloatArray:
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


# ── By name ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Metric:
    """A named metric.

    Attributes:
        name: As in a model's declaration.
        objective: ``"binary"`` or ``"regression"``.
        larger_is_better: Its direction.
        lightgbm: What LightGBM watches while it trains for this metric.
    """

    name: str
    objective: str
    larger_is_better: bool
    lightgbm: str


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

    weighted: Callable[[FloatArray, FloatArray], _Weighted]
    reflected: bool = False


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("auc", "binary", True, "auc"),
        Resampled("average_precision", "binary", True, "average_precision", _average_precision),
        MeanLoss("log_loss", "binary", False, "binary_logloss", _log_losses),
        MeanLoss("brier", "binary", False, "binary_logloss", _squared),
        Resampled("calibration_error", "binary", False, "binary_logloss", _calibration_error, reflected=True),
        MeanLoss("rmse", "regression", False, "rmse", _squared, root=True),
        MeanLoss("mae", "regression", False, "l1", _absolute),
        Resampled("r2", "regression", True, "rmse", _r2),
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
    y, s, groups = _checked(name, labels, scores, clusters, binary=metric.objective == "binary", classes=False)
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
    drawn = _bootstrap(of, groups, resamples, seed)
    low, high = _percentiles(drawn, confidence)
    if isinstance(metric, Resampled) and metric.reflected:
        low, high = max(2.0 * value - high, 0.0), max(2.0 * value - low, 0.0)
    return Estimate(value, low, high, y.size)


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
    y, s, groups = _checked(name, labels, scores, clusters, binary=binary, classes=False)
    _, other, _ = _checked(name, labels, reference, clusters, binary=binary, classes=False)
    if isinstance(metric, MeanLoss) and not metric.root:
        return mean_interval(metric.losses(y, other) - metric.losses(y, s), clusters=groups, confidence=confidence)
    ours, theirs = _as_weighted(metric, y, s), _as_weighted(metric, y, other)
    sign = 1.0 if metric.larger_is_better else -1.0

    def difference(weights: FloatArray) -> float:
        return sign * (ours(weights) - theirs(weights))

    value = difference(np.ones_like(y))
    if not np.isfinite(value):
        raise UndefinedMetricError(name, f"all {y.size} labels are {y[0]:g}", "take more rows")
    low, high = _percentiles(_bootstrap(difference, groups, resamples, seed), confidence)
    return Estimate(value, low, high, y.size)


def _as_weighted(metric: Metric, y: FloatArray, s: FloatArray) -> _Weighted:
    if isinstance(metric, Resampled):
        return metric.weighted(y, s)
    if isinstance(metric, MeanLoss):
        losses = metric.losses(y, s)
        return lambda weights: float(np.sqrt((weights @ losses) / weights.sum()))
    raise InvalidValueError("metric", metric.name, "one that is resampled")


# ── Shared ──────────────────────────────────────────────────────────────────────────


def _checked(
    name: str,
    labels: ArrayLike,
    scores: ArrayLike,
    clusters: ArrayLike | None,
    *,
    binary: bool,
    classes: bool = True,
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Labels, scores, and clusters numbered from 0; refused where a metric isn't defined."""
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


def _normal(value: float, variance: float, n: int, confidence: float) -> Estimate:
    half_width = _z(confidence) * float(np.sqrt(variance))
    return Estimate(value, value - half_width, value + half_width, n)


def _percentiles(drawn: FloatArray, confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return float(low), float(high)


def _z(confidence: float) -> float:
    return float(stats.norm.ppf(0.5 + confidence / 2.0))


def _expit(value: float) -> float:
    return float(1.0 / (1.0 + np.exp(-value)))
