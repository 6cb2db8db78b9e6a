"""What an experiment has shown: exposures and outcomes to an effect with an interval. Pure.

The unit of analysis is the entity, since the entity is what was randomised: several
predictions of one entity are one cluster, never several independent rows. Analysis is by
assignment (intention to treat): an entity belongs to the variant that it met first.
The estimators and their intervals are in `heliostat.experiments.effects`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from heliostat.clock import US_PER_DAY
from heliostat.errors import ExperimentDataError
from heliostat.experiments.effects import (
    SRM_ALPHA,
    Effect,
    Interval,
    SampleRatio,
    always_valid,
    cuped_difference,
    difference_in_means,
    difference_in_ratios,
    fixed_horizon,
    sample_ratio,
)

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """One row an entity.

    Attributes:
        variants: The variant met first, shape ``(n,)``.
        totals: Sum of the entity's known outcomes, shape ``(n,)``.
        counts: Number of its known outcomes, shape ``(n,)``; 0 where none has matured.
        covariates: A value from before or at the first exposure, shape ``(n,)``; NaN where unknown.
        n_crossed: Entities that met more than one variant. They stay with their first.
        days: From the first exposure of all to the last.
    """

    variants: NDArray[np.str_]
    totals: FloatArray
    counts: FloatArray
    covariates: FloatArray
    n_crossed: int
    days: float

    def exposed(self) -> dict[str, int]:
        """Entities by variant, with or without an outcome."""
        names, counts = np.unique(self.variants, return_counts=True)
        return {str(name): int(count) for name, count in zip(names, counts, strict=True)}

    def of(self, variant: str) -> Units:
        """The entities of one variant that have an outcome."""
        chosen = (self.variants == variant) & (self.counts > 0)
        return Units(
            self.variants[chosen], self.totals[chosen], self.counts[chosen], self.covariates[chosen], 0, self.days
        )


def aggregate(
    entities: ArrayLike,
    variants: ArrayLike,
    at_us: ArrayLike,
    outcomes: ArrayLike,
    covariates: ArrayLike | None = None,
) -> Units:
    """Bring exposures down to one row an entity.

    Args:
        entities: Entity key of each exposure, shape ``(n,)``.
        variants: The variant that served it.
        at_us: When, microseconds since the epoch.
        outcomes: Its outcome; NaN while unknown.
        covariates: Known at the exposure; the first exposure's is kept. NaN while unknown.

    Raises:
        ExperimentDataError: If the columns differ in length.
    """
    keys, arms = np.asarray(entities), np.asarray(variants, dtype=np.str_)
    times, values = np.asarray(at_us, dtype=np.int64), np.asarray(outcomes, dtype=np.float64)
    known = np.full(len(keys), np.nan) if covariates is None else np.asarray(covariates, dtype=np.float64)
    lengths = {len(column) for column in (keys, arms, times, values, known)}
    if len(lengths) > 1:
        raise ExperimentDataError(
            f"the columns of the exposures have {sorted(lengths)} rows",
            "give one value each to every exposure",
        )
    if not len(keys):
        return Units(arms, values, values.copy(), known, 0, 0.0)
    _, codes = np.unique(keys, return_inverse=True)
    order = np.lexsort((arms, times, codes))
    codes, arms, values, known = codes[order], arms[order], values[order], known[order]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    first = arms[starts]
    crossed = np.logical_or.reduceat(arms != np.repeat(first, np.diff(starts, append=len(codes))), starts)
    matured = ~np.isnan(values)
    return Units(
        variants=first,
        totals=np.add.reduceat(np.where(matured, values, 0.0), starts),
        counts=np.add.reduceat(matured.astype(np.float64), starts),
        covariates=known[starts],
        n_crossed=int(crossed.sum()),
        days=float(times.max() - times.min()) / US_PER_DAY,
    )


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything that a report or a promotion needs to know about two arms.

    Attributes:
        control: Name of the control.
        treatment: Name of the treatment.
        exposed: Entities by variant.
        with_outcome: Those whose outcome is known.
        crossed: Entities that met both.
        split: The sample-ratio test.
        effect: Difference of the means over entities; None while an arm has fewer than two.
        interval: Its always-valid interval.
        one_look: Its fixed-horizon interval.
        adjusted: The same difference with CUPED, where covariates are known.
        adjusted_interval: Its always-valid interval.
        per_prediction: The difference of outcomes a prediction, clustered by entity.
        days: From the first exposure to the last.
        minimum_entities: Entities with outcome that each arm needs before anything is concluded.
        minimum_days: Days that exposures must span before anything is concluded.
    """

    control: str
    treatment: str
    exposed: dict[str, int]
    with_outcome: dict[str, int]
    crossed: int
    split: SampleRatio
    effect: Effect | None
    interval: Interval | None
    one_look: Interval | None
    adjusted: Effect | None
    adjusted_interval: Interval | None
    per_prediction: Effect | None
    days: float
    minimum_entities: int
    minimum_days: float

    @property
    def conclusion(self) -> Literal["blocked", "too few", "too early", "higher", "lower", "undecided"]:
        """What may be said: nothing under a mismatch, else where the treatment lies."""
        if self.split.mismatch:
            return "blocked"
        smallest = min(self.with_outcome.get(self.control, 0), self.with_outcome.get(self.treatment, 0))
        interval = self.adjusted_interval or self.interval
        if interval is None or smallest < self.minimum_entities:
            return "too few"
        if self.days < self.minimum_days:
            return "too early"
        if interval.excludes_zero:
            return "higher" if interval.lower > 0 else "lower"
        return "undecided"

    def to_dict(self) -> dict[str, Any]:
        """Everything, the conclusion included, as JSON can carry it (an open end is None)."""
        document: dict[str, Any] = _finite({**asdict(self), "conclusion": self.conclusion})
        return document


def analyze(
    units: Units,
    *,
    weights: Mapping[str, float],
    control: str,
    treatment: str,
    alpha: float = 0.05,
    tuned_at: int = 5_000,
    minimum_entities: int = 100,
    minimum_days: float = 0.0,
    srm_alpha: float = SRM_ALPHA,
) -> Analysis:
    """Compare one treatment with the control.

    Args:
        units: One row an entity, of all variants.
        weights: Intended share of each variant.
        control: Name of the control.
        treatment: Name of the treatment.
        alpha: Error rate of the intervals.
        tuned_at: Entities at which the confidence sequence is tightest: the planned number.
        minimum_entities: Entities with outcome that each arm needs before anything is concluded.
        minimum_days: Days that exposures must span before anything is concluded: a week has two weekend days.
        srm_alpha: Below this p-value the split is broken.

    Raises:
        ExperimentDataError: If a named variant has no weight.
    """
    missing = [name for name in (control, treatment) if weights.get(name, 0) <= 0]
    if missing:
        raise ExperimentDataError(
            f"variant {missing[0]!r} has no weight; the split is {dict(weights)}",
            "name variants of the experiment",
        )
    exposed = units.exposed()
    before, after = units.of(control), units.of(treatment)
    effect = interval = one_look = adjusted = adjusted_interval = per_prediction = None
    if min(len(before.totals), len(after.totals)) >= 2:
        before_means, after_means = before.totals / before.counts, after.totals / after.counts
        effect = difference_in_means(before_means, after_means)
        interval = always_valid(effect, alpha=alpha, tuned_at=tuned_at)
        one_look = fixed_horizon(before_means, after_means, alpha=alpha)
        per_prediction = difference_in_ratios(before.totals, before.counts, after.totals, after.counts)
        if np.isfinite(np.concatenate([before.covariates, after.covariates])).any():
            adjusted = cuped_difference(before_means, before.covariates, after_means, after.covariates)
            adjusted_interval = always_valid(adjusted, alpha=alpha, tuned_at=tuned_at)
    return Analysis(
        control=control,
        treatment=treatment,
        exposed=exposed,
        with_outcome={control: len(before.totals), treatment: len(after.totals)},
        crossed=units.n_crossed,
        split=sample_ratio(exposed, weights, alpha=srm_alpha),
        effect=effect,
        interval=interval,
        one_look=one_look,
        adjusted=adjusted,
        adjusted_interval=adjusted_interval,
        per_prediction=per_prediction,
        days=units.days,
        minimum_entities=minimum_entities,
        minimum_days=minimum_days,
    )


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
