"""Whether the values that come in can be used at all: freshness, nulls, outliers. Pure.

Rates are compared with the reference profile's, never with zero: a feature that was null for
half of the training rows is fine when it is null for half of today's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scipy import stats

from heliostat.clock import US_PER_DAY, US_PER_HOUR, US_PER_MINUTE, US_PER_S, format_instant
from heliostat.models.profile import PREDICTION, Profile
from heliostat.monitoring.drift import benjamini_hochberg
from heliostat.monitoring.verdict import Finding, Severity, tail


@dataclass(frozen=True, slots=True)
class QualityPolicy:
    """When a rate is worth somebody's time.

    Attributes:
        max_null_increase: How far above the reference's a null rate may be, 0 to 1.
        max_outlier_increase: How far above the reference's an outlier rate may be, 0 to 1.
        alpha: False-discovery rate over all features.
        min_rows: Rows below which rates aren't compared.
    """

    max_null_increase: float = 0.05
    max_outlier_increase: float = 0.05
    alpha: float = 0.01
    min_rows: int = 200


@dataclass(frozen=True, slots=True)
class Rate:
    """How many rows of a feature show something.

    Attributes:
        hits: Rows that do.
        rows: All rows.
    """

    hits: int
    rows: int

    @property
    def value(self) -> float:
        """Their share; 0 without rows."""
        return self.hits / self.rows if self.rows else 0.0


# ── Freshness ───────────────────────────────────────────────────────────────────────


def freshness_finding(
    subject: str, newest_us: int | None, *, now_us: int, max_age_us: int, future_tolerance_us: int = 0
) -> Finding:
    """How old the newest event is. A stamp from the future is a fault of its own: it looks fresh for ever.

    Args:
        subject: The source or view.
        newest_us: Event time of its newest event; None: there is no event.
        now_us: The present, microseconds since the epoch.
        max_age_us: Older than this is an alarm.
        future_tolerance_us: How far ahead of the present a stamp may be.
    """
    if newest_us is None:
        return Finding(subject, Severity.ALARM, "there is no event at all", {"max_age_s": max_age_us / US_PER_S})
    age_us = now_us - newest_us
    evidence = {"newest_us": newest_us, "age_s": age_us / US_PER_S, "max_age_s": max_age_us / US_PER_S}
    newest = f"the newest event is of {format_instant(newest_us)}"
    if age_us < -future_tolerance_us:
        return Finding(subject, Severity.ALARM, f"{newest}, {_length(-age_us)} in the future", evidence)
    if age_us > max_age_us:
        message = f"{newest}, {_length(age_us)} old; at most {_length(max_age_us)} is allowed"
        return Finding(subject, Severity.ALARM, message, evidence)
    return Finding(subject, Severity.OK, f"{newest}, {_length(max(age_us, 0))} old", evidence)


def _length(length_us: int) -> str:
    for unit_us, unit in ((US_PER_DAY, "d"), (US_PER_HOUR, "h"), (US_PER_MINUTE, "min")):
        if length_us >= unit_us:
            return f"{length_us / unit_us:.1f} {unit}"
    return f"{length_us / US_PER_S:.1f} s"


# ── Rates against the reference ─────────────────────────────────────────────────────


def profile_findings(reference: Profile, current: Profile, policy: QualityPolicy) -> tuple[Finding, ...]:
    """Null and outlier rates of every feature, and outliers of the predictions, against the reference's.

    Args:
        reference: The version's reference profile: it says what an outlier is.
        current: Recent rows, counted in its bins.
        policy: When a rate is an alarm.
    """
    before, after = dict(reference.features), dict(current.features)
    nulls = rate_findings(
        "null",
        {name: Rate(column.nulls, column.rows) for name, column in before.items()},
        {name: Rate(column.nulls, column.rows) for name, column in after.items()},
        max_increase=policy.max_null_increase,
        policy=policy,
    )
    if reference.prediction is not None and current.prediction is not None:
        before[PREDICTION], after[PREDICTION] = reference.prediction, current.prediction
    # Of the rows that have a value: a null is no outlier, and mustn't hide one.
    outliers = rate_findings(
        "outliers",
        {name: Rate(column.outliers, sum(column.counts)) for name, column in before.items()},
        {name: Rate(column.outliers, sum(column.counts)) for name, column in after.items()},
        max_increase=policy.max_outlier_increase,
        policy=policy,
    )
    return (*nulls, *outliers)


def rate_findings(
    what: str,
    reference: Mapping[str, Rate],
    current: Mapping[str, Rate],
    *,
    max_increase: float,
    policy: QualityPolicy,
) -> tuple[Finding, ...]:
    """Compare rates of many features with the reference's: one finding a feature.

    An alarm needs an increase above ``max_increase`` and significance (Fisher's exact test, one-sided,
    Benjamini-Hochberg over the features).

    Args:
        what: What the rate counts, such as ``"null"``.
        reference: By feature.
        current: By feature; features without a reference or with too few rows are passed over.
        max_increase: How far above the reference's a rate may be, 0 to 1.
        policy: Significance and fewest rows.
    """
    names = [name for name in current if name in reference and current[name].rows >= policy.min_rows]
    if not names:
        rows = max((rate.rows for rate in current.values()), default=0)
        message = f"{rows} recent rows; at least {policy.min_rows} are needed"
        return (Finding(f"{what} rates", Severity.INSUFFICIENT, message, {"n_current": rows}),)
    adjusted = benjamini_hochberg([_increase_p(reference[name], current[name]) for name in names])
    findings: list[Finding] = []
    for name, q_value in zip(names, adjusted, strict=True):
        before, after = reference[name], current[name]
        worse = after.value - before.value > max_increase and q_value <= policy.alpha
        findings.append(
            Finding(
                f"{name} {what}",
                Severity.ALARM if worse else Severity.OK,
                f"{after.value:.1%} {what}, {before.value:.1%} in the reference ({tail('q', float(q_value))})",
                {
                    "rate": after.value,
                    "reference_rate": before.value,
                    "q_value": float(q_value),
                    "max_increase": max_increase,
                    "n_reference": before.rows,
                    "n_current": after.rows,
                },
            )
        )
    return tuple(findings)


def _increase_p(before: Rate, after: Rate) -> float:
    if not before.rows or not after.rows:
        return 1.0
    table = [[after.hits, after.rows - after.hits], [before.hits, before.rows - before.hits]]
    return float(stats.fisher_exact(table, alternative="greater").pvalue)
