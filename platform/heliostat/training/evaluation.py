"""Is a candidate good, and may it serve: its figures, its slices, a plain baseline, and the gate.

Everything is judged on validation rows that no training step has seen, each figure with its
interval, and against the production version on the very same rows. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from heliostat.clock import format_instant
from heliostat.errors import UndefinedMetricError
from heliostat.features.aggregations import TimeSinceLast
from heliostat.models.definitions import Gate, ModelSpec
from heliostat.models.metrics import METRICS, Estimate, FloatArray, auc, gain, measure, metric_named

Mask = NDArray[np.bool_]

MIN_SLICE_ROWS = 200
SLICE_MARGIN = 0.05


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows on which models are judged.

    Attributes:
        labels: The truth, shape ``(n,)``.
        entities: Which entity a row is about, any integers or texts, shape ``(n,)``.
        slices: Name -> which rows, shape ``(n,)`` each.
    """

    labels: FloatArray
    entities: NDArray[Any]
    slices: Mapping[str, Mask] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What a model shows on the rows.

    Attributes:
        metric: The metric that the model was declared with.
        metrics: All metrics of its objective, by name.
        slices: The declared metric by slice; only slices where it is defined.
    """

    metric: str
    metrics: Mapping[str, Estimate]
    slices: Mapping[str, Estimate]

    @property
    def main(self) -> Estimate:
        """The declared metric."""
        return self.metrics[self.metric]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "metric": self.metric,
            "metrics": {name: estimate.as_dict() for name, estimate in self.metrics.items()},
            "slices": {name: estimate.as_dict() for name, estimate in self.slices.items()},
        }


@dataclass(frozen=True)
class Parity:
    """What is known of training-serving skew.

    Attributes:
        share: The largest share of a feature's served values that differ without an explanation; None: unknown.
        problem: Why it is unknown.
    """

    share: float | None
    problem: str = ""

    @classmethod
    def of(cls, verdict: Mapping[str, Any] | None, *, version: int, at_us: int, oldest_us: int) -> Parity:
        """From the newest stored parity verdict on a version.

        Args:
            verdict: Its document, None if there is none.
            version: The version that serves.
            at_us: When the verdict was concluded.
            oldest_us: Verdicts from before this instant count no more.
        """
        if verdict is None:
            return cls(None, f"no parity check has looked at version {version}, which serves")
        if at_us < oldest_us:
            return cls(None, f"the last parity check of version {version} is of {format_instant(at_us)}")
        rates = [each["evidence"].get("unexplained_rate") for each in verdict["findings"]]
        known = [float(rate) for rate in rates if rate is not None]
        return cls(max(known)) if known else cls(None, f"the parity check of version {version} couldn't say anything")


@dataclass(frozen=True)
class GateCheck:
    """One condition of the gate.

    Attributes:
        name: ``minimum``, ``calibration``, ``production``, ``slice <name>``, ``signature``, ``latency``, ``parity``.
        passed: Whether it holds.
        value: What was seen; None if it couldn't be.
        limit: What it is held against; None where there is no number.
        reason: The same as a sentence.
    """

    name: str
    passed: bool
    value: float | None
    limit: float | None
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "passed": self.passed,
            "value": self.value,
            "limit": self.limit,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class GateReport:
    """Every check of the gate; it is passed if all of them are."""

    checks: tuple[GateCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether the candidate may serve."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[GateCheck, ...]:
        """The checks that don't hold."""
        return tuple(check for check in self.checks if not check.passed)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the evidence that a promotion is recorded with."""
        return {"passed": self.passed, "checks": [check.as_dict() for check in self.checks]}


def evaluate(spec: ModelSpec, rows: Rows, scores: FloatArray, *, seed: int = 0) -> Evaluation:
    """All metrics of a model's objective, and the declared one by slice.

    Args:
        spec: Says objective and metric.
        rows: Validation rows, ``n`` of them.
        scores: The model's, shape ``(n,)``.
        seed: Of the resampling.

    Raises:
        UndefinedMetricError: If a metric isn't defined on all of the rows.
    """
    names = [name for name, metric in METRICS.items() if metric.objective == spec.objective]
    metrics = {name: measure(name, rows.labels, scores, clusters=rows.entities, seed=seed) for name in names}
    slices: dict[str, Estimate] = {}
    for name, mask in rows.slices.items():
        if int(mask.sum()) < MIN_SLICE_ROWS:
            continue
        try:
            slices[name] = measure(
                spec.metric, rows.labels[mask], scores[mask], clusters=rows.entities[mask], seed=seed
            )
        except UndefinedMetricError:
            continue  # a slice with one class says nothing about ranking
    return Evaluation(spec.metric, metrics, slices)


def judge(
    spec: ModelSpec,
    rows: Rows,
    scores: FloatArray,
    evaluation: Evaluation,
    *,
    signature: Sequence[str],
    production: FloatArray | None = None,
    incomparable: str | None = None,
    latency_ms: float | None = None,
    parity: Parity | None = None,
    slice_margin: float = SLICE_MARGIN,
    seed: int = 0,
) -> GateReport:
    """Hold a candidate against its gate.

    The ends of intervals are compared, not the points: a candidate has to *show* that it reaches the
    minimum and that it isn't worse than production by more than the gate allows. A slice fails
    if it is shown to be worse by more than the margin: small slices can't show much.

    Args:
        spec: Its gate and its features.
        rows: Validation rows, ``n`` of them.
        scores: The candidate's, shape ``(n,)``.
        evaluation: What `evaluate` gave for these scores.
        signature: Feature names that the candidate's booster was trained with, in order.
        production: Scores of the current production version on the same rows; None: there is none.
        incomparable: Why there is a production version but no scores of it; that fails the gate: only a
            person or an experiment can say that the candidate is no worse.
        latency_ms: Median of scoring one row; None: it wasn't measured.
        parity: What the newest parity check said of the production version; None: nothing serves.
        slice_margin: How much worse than production a slice may be.
        seed: Of the resampling.
    """
    checks = [
        _signature_check(spec, signature),
        *_minimum_checks(spec.gate, evaluation),
        *_calibration_checks(spec.gate, evaluation),
    ]
    if production is not None:
        checks.append(_production_check(spec, rows, scores, production, seed))
        checks.extend(_slice_checks(spec, rows, scores, production, evaluation, slice_margin, seed))
    if incomparable:
        reason = f"production can't be compared on the same rows: {incomparable}; run an experiment, or force it"
        checks.append(GateCheck("production", False, None, -spec.gate.max_regression, reason))
    if spec.gate.max_latency_ms is not None and latency_ms is not None:
        limit = spec.gate.max_latency_ms
        reason = f"scoring one row takes {latency_ms:.3g} ms, at most {limit:g} ms are allowed"
        checks.append(GateCheck("latency", latency_ms <= limit, latency_ms, limit, reason))
    return GateReport((*checks, *_parity_checks(spec.gate, parity)))


def _parity_checks(gate: Gate, parity: Parity | None) -> list[GateCheck]:
    limit = gate.max_parity_mismatch
    if limit is None:
        return []
    if parity is None:
        return [GateCheck("parity", True, None, limit, "nothing is served yet, so nothing can differ from training")]
    if parity.share is None:
        fix = "run jobs/monitor_model.py --check parity, after the sink"
        return [GateCheck("parity", False, None, limit, f"{parity.problem}; {fix}")]
    reason = f"{parity.share:.3%} of the served values of a feature differ from training's, at most {limit:.3%} may"
    return [GateCheck("parity", parity.share <= limit, parity.share, limit, reason)]


def _signature_check(spec: ModelSpec, signature: Sequence[str]) -> GateCheck:
    wanted, found = spec.feature_names, tuple(signature)
    if wanted == found:
        return GateCheck("signature", True, None, None, f"the {len(found)} features of the declaration, in order")
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    problem = f"lacks {missing}, adds {extra}" if missing or extra else "has the features in another order"
    return GateCheck("signature", False, None, None, f"the booster {problem}; train it again from the declaration")


def _minimum_checks(gate: Gate, evaluation: Evaluation) -> list[GateCheck]:
    if gate.min_metric is None:
        return []
    found, limit = evaluation.main, gate.min_metric
    if metric_named(evaluation.metric).larger_is_better:
        reason = f"{evaluation.metric} {found}: its lower end must reach {limit:g}"
        return [GateCheck("minimum", found.low >= limit, found.low, limit, reason)]
    reason = f"{evaluation.metric} {found}: its upper end may be {limit:g} at most"
    return [GateCheck("minimum", found.high <= limit, found.high, limit, reason)]


def _calibration_checks(gate: Gate, evaluation: Evaluation) -> list[GateCheck]:
    found = evaluation.metrics.get("calibration_error")
    if gate.max_calibration_error is None or found is None:
        return []
    limit = gate.max_calibration_error
    reason = f"calibration error {found}: its upper end may be {limit:g} at most"
    return [GateCheck("calibration", found.high <= limit, found.high, limit, reason)]


def _production_check(
    spec: ModelSpec, rows: Rows, scores: FloatArray, production: FloatArray, seed: int
) -> GateCheck:
    found = gain(spec.metric, rows.labels, scores, production, clusters=rows.entities, seed=seed)
    limit = -spec.gate.max_regression
    reason = f"gain in {spec.metric} over production {found}: its lower end must reach {limit:g}"
    return GateCheck("production", found.low >= limit, found.low, limit, reason)


def _slice_checks(
    spec: ModelSpec,
    rows: Rows,
    scores: FloatArray,
    production: FloatArray,
    evaluation: Evaluation,
    margin: float,
    seed: int,
) -> list[GateCheck]:
    checks: list[GateCheck] = []
    for name in evaluation.slices:
        mask = rows.slices[name]
        found = gain(
            spec.metric, rows.labels[mask], scores[mask], production[mask], clusters=rows.entities[mask], seed=seed
        )
        reason = f"gain in {spec.metric} over production {found}: its upper end must reach {-margin:g}"
        checks.append(GateCheck(f"slice {name}", found.high >= -margin, found.high, -margin, reason))
    return checks


_SLICED_INSTANTS = 24  # more of them than that are a spine's, each with a row or two


def default_slices(as_of_us: NDArray[np.int64], columns: Mapping[str, FloatArray]) -> dict[str, Mask]:
    """Slices that every model has: by as-of instant (thirds, where they are many), and by thirds of some features.

    Args:
        as_of_us: As-of instants of the rows, shape ``(n,)``.
        columns: Feature values by name, shape ``(n,)`` each.

    Returns:
        Name -> which rows; ``null`` is a slice of its own.
    """
    slices: dict[str, Mask] = {}
    instants = np.unique(as_of_us)
    if len(instants) > _SLICED_INSTANTS:
        first_us, second_us = (int(instants[len(instants) * part // 3]) for part in (1, 2))
        begin, end = format_instant(first_us), format_instant(second_us)
        slices[f"as_of<={begin}"] = as_of_us <= first_us
        slices[f"{begin}<as_of<={end}"] = (as_of_us > first_us) & (as_of_us <= second_us)
        slices[f"as_of>{end}"] = as_of_us > second_us
    elif len(instants) > 1:
        slices.update({f"as_of={format_instant(int(each))}": as_of_us == each for each in instants})
    for name, values in columns.items():
        known = np.isfinite(values)
        if not known.any():
            continue
        first, second = (float(edge) for edge in np.quantile(values[known], [1 / 3, 2 / 3]))
        slices[f"{name}<={first:.4g}"] = known & (values <= first)
        slices[f"{first:.4g}<{name}<={second:.4g}"] = known & (values > first) & (values <= second)
        slices[f"{name}>{second:.4g}"] = known & (values > second)
        if not known.all():
            slices[f"{name} is null"] = ~known
    return {name: mask for name, mask in slices.items() if mask.any()}


# ── The baseline ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SingleFeatureBaseline:
    """What a person would do without a model: sort by one feature (or draw one line through it).

    Attributes:
        feature: Its qualified name.
        slope: Direction (binary) or slope (regression).
        intercept: 0 for a binary objective: its scores rank, they are no probabilities.
        fill: Value that stands for null.
    """

    feature: str
    slope: float
    intercept: float
    fill: float

    @classmethod
    def fit(
        cls, feature: str, values: FloatArray, labels: FloatArray, *, objective: Literal["binary", "regression"]
    ) -> SingleFeatureBaseline:
        """Learn it from training rows.

        Args:
            feature: Qualified name.
            values: The feature, shape ``(n,)``; NaN where null.
            labels: Shape ``(n,)``.
            objective: A ranking or a line.
        """
        known = np.isfinite(values)
        if not known.any():
            return cls(feature, 0.0, float(labels.mean()), 0.0)
        fill = float(values[known].mean())
        filled = np.where(known, values, fill)
        if objective == "binary":
            return cls(feature, 1.0 if auc(labels, filled) >= 0.5 else -1.0, 0.0, fill)
        spread = float(filled.var())
        slope = float(np.mean((filled - fill) * (labels - labels.mean()))) / spread if spread > 0 else 0.0
        return cls(feature, slope, float(labels.mean()) - slope * float(filled.mean()), fill)

    def score(self, values: FloatArray) -> FloatArray:
        """Scores of shape ``(n,)``: larger means a label that is more likely or larger."""
        return self.intercept + self.slope * np.where(np.isfinite(values), values, self.fill)


def baseline_feature(spec: ModelSpec) -> str:
    """The feature that the baseline sorts by: the first time since something, else the first quantity of all."""
    for ref in spec.feature_refs:
        if isinstance(ref.view.base_features.get(ref.feature), TimeSinceLast):
            return ref.name
    return next((name for name in spec.feature_names if name not in spec.categorical), spec.feature_names[0])
