"""Whether what was served is what training would have seen: training-serving skew, measured.

The vectors of sampled predictions are taken from the prediction log, computed again from the
event log for the same entity and the same instant, and compared feature by feature. A
difference that disappears when only events known at that instant count is ``late``: nobody
could have known better. Features that a request gave itself, and what derives from them, aren't
the platform's: they are left out and counted. Any other difference is a fault of the platform.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.errors import MonitoringDataError
from heliostat.features.bucket_join import entity_joins
from heliostat.features.definitions import FeatureRef, FeatureView
from heliostat.monitoring.verdict import Finding, Severity
from heliostat.storage.event_log import EventLog

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

Recompute = Callable[[pa.Array, IntArray, int | None, Mapping[str, FloatArray]], Mapping[str, FloatArray]]
"""Encoded keys and instants, length ``n``, optionally what was known when, and what the requests brought, shape
``(n,)`` by input, to features of shape ``(n,)``."""

TOLERANCE: Final = 1e-9


class Match(StrEnum):
    """How a served value and the recomputed one relate."""

    EQUAL = "equal"
    BOTH_NULL = "both null"
    ONLINE_NULL = "online null"
    OFFLINE_NULL = "offline null"
    MISMATCH = "mismatch"
    LATE = "late"

    @property
    def is_explained(self) -> bool:
        """Whether it is as it should be."""
        return self in (Match.EQUAL, Match.BOTH_NULL, Match.LATE)


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """Vectors as they were served.

    Attributes:
        keys: Encoded entity keys, length ``n``.
        at_us: The instants of the vectors, shape ``(n,)``.
        features: Values by qualified feature name, shape ``(n,)`` each; NaN is null.
        ids: Prediction ids, ``n`` of them: what an example is named by. Never an entity's key, since
            verdicts are kept for ever.
        given: By qualified feature name, the rows whose value is the client's, shape ``(n,)`` each.
        inputs: What the requests brought for derived features, shape ``(n,)`` by name; NaN is null.
    """

    keys: pa.Array
    at_us: IntArray
    features: Mapping[str, FloatArray]
    ids: Sequence[str]
    given: Mapping[str, BoolArray] = field(default_factory=dict)
    inputs: Mapping[str, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FeatureParity:
    """How one feature compares.

    Attributes:
        counts: Rows by how they relate.
        largest_difference: Among mismatches, in the feature's unit; 0 without any.
        example: Prediction id of the first unexplained row, or None.
        left_out: Rows whose value was the client's; in none of the counts.
    """

    counts: Mapping[Match, int]
    largest_difference: float
    example: str | None
    left_out: int = 0

    @property
    def n(self) -> int:
        """All rows that were compared."""
        return sum(self.counts.values())

    @property
    def unexplained(self) -> int:
        """Rows that differ and aren't late."""
        return sum(count for match, count in self.counts.items() if not match.is_explained)


def same(online: FloatArray, offline: FloatArray, tolerance: float = TOLERANCE) -> BoolArray:
    """Where two values are one: both null, or equal within the rounding of a sum's order.

    Args:
        online: Shape ``(n,)``; NaN is null.
        offline: Same shape.
        tolerance: Relative, and absolute for sums that cancel out: the contract allows 1e-12 of the
            window's sum of absolute values.
    """
    return np.isclose(online, offline, rtol=tolerance, atol=tolerance, equal_nan=True)


def compare(served: Served, recompute: Recompute, *, tolerance: float = TOLERANCE) -> dict[str, FeatureParity]:
    """Compute served vectors again and compare them.

    Args:
        served: ``n`` vectors.
        recompute: Computes features from the event log.
        tolerance: How much two values may differ and be one; see `same`.

    Returns:
        By feature, in the served order.

    Raises:
        MonitoringDataError: If a served feature isn't computed offline.
    """
    nobody = np.zeros(len(served.at_us), dtype=np.bool_)
    offline = {**recompute(served.keys, served.at_us, None, served.inputs)}
    missing = sorted(set(served.features) - set(offline))
    for name in [name for name in missing if served.given.get(name, nobody).all()]:
        offline[name] = np.full(len(nobody), np.nan)
        missing.remove(name)
    if missing:
        raise MonitoringDataError(
            "parity",
            f"{', '.join(missing)} can't be computed again",
            "declare the views that the version was trained on",
        )
    differs = nobody.copy()
    for name, online in served.features.items():
        differs |= ~same(online, offline[name], tolerance) & ~served.given.get(name, nobody)
    then = _as_known_then(served, offline, np.flatnonzero(differs), recompute)
    return {
        name: _feature_parity(served, served.given.get(name, nobody), online, offline[name], then[name], tolerance)
        for name, online in served.features.items()
    }


def _as_known_then(
    served: Served, offline: Mapping[str, FloatArray], rows: NDArray[np.intp], recompute: Recompute
) -> dict[str, FloatArray]:
    """The features of some rows with what was known at their own instants; of all others as they are."""
    then = {name: offline[name].copy() for name in served.features}
    for at_us in np.unique(served.at_us[rows]):
        asked = rows[served.at_us[rows] == at_us]
        inputs = {name: values[asked] for name, values in served.inputs.items()}
        known = recompute(served.keys.take(pa.array(asked)), served.at_us[asked], int(at_us), inputs)
        for name, values in known.items():
            if name in then:
                then[name][asked] = values
    return then


def _feature_parity(
    served: Served, given: BoolArray, online: FloatArray, offline: FloatArray, then: FloatArray, tolerance: float
) -> FeatureParity:
    null_online, null_offline = np.isnan(online), np.isnan(offline)
    equal, late = same(online, offline, tolerance), same(online, then, tolerance)
    kinds: dict[Match, BoolArray] = {
        Match.BOTH_NULL: null_online & null_offline,
        Match.EQUAL: equal & ~null_online,
        Match.LATE: ~equal & late,
        Match.ONLINE_NULL: ~equal & ~late & null_online,
        Match.OFFLINE_NULL: ~equal & ~late & null_offline,
        Match.MISMATCH: ~equal & ~late & ~null_online & ~null_offline,
    }
    unexplained = np.flatnonzero(~equal & ~late & ~given)
    far = np.abs(online - offline)[kinds[Match.MISMATCH] & ~given]
    return FeatureParity(
        counts={match: int((kinds[match] & ~given).sum()) for match in Match},
        largest_difference=float(far.max()) if len(far) else 0.0,
        example=served.ids[int(unexplained[0])] if len(unexplained) else None,
        left_out=int(given.sum()),
    )


def given_rows(
    names: Sequence[Sequence[str] | None], views: Sequence[FeatureView], *, brought: BoolArray | None = None
) -> dict[str, BoolArray]:
    """The rows in which a feature is the client's: given with the request, or derived from what was.

    So is a feature that takes inputs of the request, where the log hasn't got them.

    Args:
        names: For each of ``n`` rows, the qualified features that were given; None: not written down.
        views: Those that the features are of.
        brought: Rows whose inputs are in the log, shape ``(n,)``; None: no row's are.

    Returns:
        Shape ``(n,)`` by qualified feature name; features that nobody gave are left out.
    """
    rows: dict[str, BoolArray] = {}
    for at, given in enumerate(names):
        for name in given or ():
            rows.setdefault(name, np.zeros(len(names), dtype=np.bool_))[at] = True
    for view in views:
        for name, derived in view.derived_features.items():  # in declared order: later ones may build on it
            own = f"{view.prefix}__{name}"
            based_on = [own, *(f"{view.prefix}__{each}" for each in derived.inputs)]
            found = [rows[each] for each in based_on if each in rows]
            if derived.request and (brought is None or not brought.all()):
                found.append(np.ones(len(names), dtype=np.bool_) if brought is None else ~brought)
            if found:
                rows[own] = np.logical_or.reduce(found)
    return rows


def recompute_from_log(event_log: EventLog, features: Sequence[FeatureView | FeatureRef]) -> Recompute:
    """A function that computes features from the event log as it is now, a bucket at a time, in this process.

    Args:
        event_log: Where the views' sources are kept.
        features: All of one entity. An input that the requests haven't brought is null.
    """
    (join,) = entity_joins(features, event_log, None)
    entity = join.entity

    def recompute(
        keys: pa.Array, as_of_us: IntArray, known_at_us: int | None, inputs: Mapping[str, FloatArray]
    ) -> dict[str, FloatArray]:
        buckets = entity.buckets(keys, event_log.n_buckets)
        if not len(keys):
            return {name: np.empty(0) for name in join.names}
        request = {name: inputs.get(name, np.full(len(keys), np.nan)) for name in join.request}
        return replace(join, known_at_us=known_at_us).all_columns(buckets, keys, as_of_us, request)

    return recompute


def parity_findings(
    compared: Mapping[str, FeatureParity], *, max_mismatch_share: float = 0.001
) -> tuple[Finding, ...]:
    """One finding a feature: any unexplained difference warns, more than a trace of them alarms.

    Args:
        compared: What `compare` gave.
        max_mismatch_share: Share of rows that may differ before it is an alarm, 0 to 1.
    """
    found = [_finding(name, parity, max_mismatch_share) for name, parity in compared.items() if parity.n]
    if not found:
        return (Finding("rows", Severity.INSUFFICIENT, "no served vector to compare", {}),)
    passed_over = [name for name, parity in compared.items() if not parity.n]
    if passed_over:
        message = f"{', '.join(passed_over)}: given by every request, or derived from what was"
        found.append(Finding("left out", Severity.OK, message, {"features": passed_over}))
    return tuple(found)


def _finding(name: str, parity: FeatureParity, max_mismatch_share: float) -> Finding:
    rate = parity.unexplained / parity.n
    severity = Severity.ALARM if rate > max_mismatch_share else Severity.WARNING if rate > 0 else Severity.OK
    told = [f"{count:,} {match}" for match, count in parity.counts.items() if count]
    told += [f"{parity.left_out:,} given by requests"] if parity.left_out else []
    evidence = {
        "n": parity.n,
        "counts": {match.value: count for match, count in parity.counts.items()},
        "left_out": parity.left_out,
        "unexplained_rate": rate,
        "largest_difference": parity.largest_difference,
        "example": parity.example,
    }
    return Finding(name, severity, ", ".join(told), evidence)
