"""How good a version's predictions turned out, on labels that have matured.

A label counts once its horizon has passed and its events have had time to arrive; a prediction
that isn't due yet is neither right nor wrong. What fraction is due is part of every verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.errors import MonitoringDataError, UndefinedMetricError
from heliostat.models.definitions import ModelSpec
from heliostat.models.estimates import Estimate
from heliostat.models.metrics import measure, metric_named
from heliostat.monitoring.verdict import Finding, Severity
from heliostat.storage.event_log import EventLog

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LabelsOf = Callable[[pa.Array, IntArray], FloatArray]
"""Encoded entity keys and their as-of instants, length ``n`` each, to labels of shape ``(n,)``; NaN: unknown."""


@dataclass(frozen=True, slots=True, eq=False)
class Matured:
    """Predictions whose truth is known.

    Attributes:
        labels: The truth, shape ``(n,)``.
        scores: What was predicted, shape ``(n,)``.
        entities: Whom it was about, shape ``(n,)``: rows of one entity aren't independent.
        n_predictions: All predictions looked at.
        n_due: Those whose horizon has passed.
    """

    labels: FloatArray
    scores: FloatArray
    entities: NDArray[np.generic]
    n_predictions: int
    n_due: int

    @property
    def coverage(self) -> float:
        """Part of all predictions whose truth is known."""
        return len(self.labels) / self.n_predictions if self.n_predictions else 0.0


def watermark_us(event_log: EventLog, spec: ModelSpec, *, now_us: int, lateness_us: int) -> int:
    """The instant up to which a model's labels are complete.

    Events may be late; and a source that has stalled must not look like customers who stay away.

    Args:
        event_log: Where the label's source is kept.
        spec: Says which label.
        now_us: The present, microseconds since the epoch.
        lateness_us: How late an event may come.
    """
    newest_us = event_log.statistics(spec.label.source, spec.entity).max_time_us
    return 0 if newest_us is None else min(now_us - lateness_us, newest_us)


def mature(
    entities: pa.Array,
    at_us: IntArray,
    scores: FloatArray,
    labels_of: LabelsOf,
    *,
    horizon_us: int,
    complete_until_us: int,
    reported: FloatArray | None = None,
) -> Matured:
    """Give predictions their labels, those that are due.

    Args:
        entities: Encoded entity keys of the predictions, length ``n``.
        at_us: Their as-of instants, shape ``(n,)``.
        scores: Their scores, shape ``(n,)``.
        labels_of: Computes labels from the event log.
        horizon_us: How far ahead a label looks.
        complete_until_us: The watermark: events before it have all arrived.
        reported: Labels that somebody has reported, shape ``(n,)``, NaN where none; they go before the
            event log's, but wait for the horizon too: those that come early are mostly of one kind.

    Raises:
        MonitoringDataError: If the columns differ in length.
    """
    if not len(entities) == len(at_us) == len(scores):
        raise MonitoringDataError(
            "performance",
            f"{len(entities)} keys, {len(at_us)} instants, {len(scores)} scores",
            "give one each to every prediction",
        )
    due = (at_us + horizon_us <= complete_until_us) & np.isfinite(scores)
    keys = entities.filter(pa.array(due))
    n_due = int((at_us + horizon_us <= complete_until_us).sum())
    labels = labels_of(keys, at_us[due]) if due.any() else np.empty(0)
    if reported is not None:
        labels = np.where(np.isnan(reported[due]), labels, reported[due])
    known = ~np.isnan(labels)
    names = np.asarray(keys.to_numpy(zero_copy_only=False))
    return Matured(labels[known], scores[due][known], names[known], len(at_us), n_due)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A metric now against what it was when the version was trained.

    Attributes:
        change: Now minus then, turned so that below zero is worse, for every metric.
        low: Lower end of its interval.
        high: Upper end.
        ratio: Now over then, turned so that below one is worse.
    """

    change: float
    low: float
    high: float
    ratio: float


def against(current: Estimate, reference: Estimate, *, larger_is_better: bool) -> Comparison:
    """The change between two independent estimates, its interval made from theirs.

    Source: Zou and Donner 2008 (MOVER): it keeps the lopsidedness of each interval.

    Args:
        current: The metric now.
        reference: The metric when the version was trained.
        larger_is_better: The metric's direction.
    """
    new, old = (current, reference) if larger_is_better else (reference, current)
    change = new.value - old.value
    low = change - float(np.hypot(new.value - new.low, old.high - old.value))
    high = change + float(np.hypot(new.high - new.value, old.value - old.low))
    ratio = new.value / old.value if old.value else (1.0 if new.value == old.value else float("inf"))
    return Comparison(change, low, high, ratio)


def performance_finding(
    matured: Matured, metric: str, reference: Estimate | None, *, min_rows: int, seed: int = 0
) -> Finding:
    """Judge matured predictions: an alarm when the interval of the change, not its point, is below zero.

    Args:
        matured: Predictions with their truth.
        metric: The metric that the model was declared with.
        reference: The same metric on the rows that the version was validated with; None: unknown.
        min_rows: Labels below which nothing is said.
        seed: Of the resampling, for metrics that need it.
    """
    coverage = {
        "n_predictions": matured.n_predictions,
        "n_due": matured.n_due,
        "n_labels": len(matured.labels),
        "coverage": matured.coverage,
    }
    share = f"{len(matured.labels):,} of {matured.n_predictions:,} predictions have a label ({matured.coverage:.0%})"
    if len(matured.labels) < min_rows:
        return Finding(metric, Severity.INSUFFICIENT, f"{share}; at least {min_rows} are needed", coverage)
    try:
        current = measure(metric, matured.labels, matured.scores, clusters=matured.entities, seed=seed)
    except UndefinedMetricError as error:
        return Finding(metric, Severity.INSUFFICIENT, f"{share}; {error}", coverage)
    evidence = {**coverage, "current": current.as_dict(), "base_rate": float(matured.labels.mean())}
    if reference is None:
        return Finding(metric, Severity.OK, f"{current}; no reference to compare with; {share}", evidence)
    compared = against(current, reference, larger_is_better=metric_named(metric).larger_is_better)
    evidence |= {
        "reference": reference.as_dict(),
        "change": compared.change,
        "change_low": compared.low,
        "change_high": compared.high,
        "ratio": compared.ratio,
    }
    worse = compared.high < 0
    said = "worse than when trained" if worse else "not shown to be worse than when trained"
    message = f"{said}: {current} now, {reference} then; {share}"
    return Finding(metric, Severity.ALARM if worse else Severity.OK, message, evidence)
