"""Whether what was served is what training would have seen: training-serving skew, measured.

The vectors of sampled predictions are taken from the prediction log, computed again from the
event log for the same entity and the same instant, and compared feature by feature. A
difference that disappears when only events known at that instant count is ``late``: nobody
could have known better. Any other difference is a fault of the platform or of a client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.errors import MonitoringDataError
from heliostat.features.definitions import Entity, FeatureView
from heliostat.features.offline import compute_features, earliest_us, needed_columns
from heliostat.monitoring.verdict import Finding, Severity
from heliostat.schema import INGESTED, TIE
from heliostat.storage.event_log import EventLog

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

Recompute = Callable[[pa.Array, IntArray, int | None], Mapping[str, FloatArray]]
"""Encoded keys and instants, length ``n``, and optionally what was known when, to features of shape ``(n,)``."""

RELATIVE_TOLERANCE: Final = 1e-9
ABSOLUTE_TOLERANCE: Final = 1e-9  # sums that cancel out: the contract allows 1e-12 of the window's sum of |x|


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
    """

    keys: pa.Array
    at_us: IntArray
    features: Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True)
class FeatureParity:
    """How one feature compares.

    Attributes:
        counts: Rows by how they relate.
        largest_difference: Among mismatches, in the feature's unit; 0 without any.
        example: Entity key and instant of the first unexplained row, or None.
    """

    counts: Mapping[Match, int]
    largest_difference: float
    example: tuple[str, int] | None

    @property
    def n(self) -> int:
        """All rows."""
        return sum(self.counts.values())

    @property
    def unexplained(self) -> int:
        """Rows that differ and aren't late."""
        return sum(count for match, count in self.counts.items() if not match.is_explained)


def same(online: FloatArray, offline: FloatArray) -> BoolArray:
    """Where two values are one: both null, or equal within the rounding of a sum's order.

    Args:
        online: Shape ``(n,)``; NaN is null.
        offline: Same shape.
    """
    return np.isclose(online, offline, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE, equal_nan=True)


def compare(served: Served, recompute: Recompute) -> dict[str, FeatureParity]:
    """Compute served vectors again and compare them.

    Args:
        served: ``n`` vectors.
        recompute: Computes features from the event log.

    Returns:
        By feature, in the served order.

    Raises:
        MonitoringDataError: If a served feature isn't computed offline.
    """
    offline = recompute(served.keys, served.at_us, None)
    missing = sorted(set(served.features) - set(offline))
    if missing:
        raise MonitoringDataError(
            "parity",
            f"{', '.join(missing)} can't be computed again",
            "declare the views that the version was trained on",
        )
    differs = np.zeros(len(served.at_us), dtype=np.bool_)
    for name, online in served.features.items():
        differs |= ~same(online, offline[name])
    then = _as_known_then(served, offline, np.flatnonzero(differs), recompute)
    return {
        name: _feature_parity(served, online, offline[name], then[name]) for name, online in served.features.items()
    }


def _as_known_then(
    served: Served, offline: Mapping[str, FloatArray], rows: NDArray[np.intp], recompute: Recompute
) -> dict[str, FloatArray]:
    """The features of some rows with what was known at their own instants; of all others as they are."""
    then = {name: offline[name].copy() for name in served.features}
    for at_us in np.unique(served.at_us[rows]):
        asked = rows[served.at_us[rows] == at_us]
        known = recompute(served.keys.take(pa.array(asked)), served.at_us[asked], int(at_us))
        for name, values in then.items():
            values[asked] = known[name]
    return then


def _feature_parity(served: Served, online: FloatArray, offline: FloatArray, then: FloatArray) -> FeatureParity:
    null_online, null_offline = np.isnan(online), np.isnan(offline)
    equal, late = same(online, offline), same(online, then)
    kinds: dict[Match, BoolArray] = {
        Match.BOTH_NULL: null_online & null_offline,
        Match.EQUAL: equal & ~null_online,
        Match.LATE: ~equal & late,
        Match.ONLINE_NULL: ~equal & ~late & null_online,
        Match.OFFLINE_NULL: ~equal & ~late & null_offline,
        Match.MISMATCH: ~equal & ~late & ~null_online & ~null_offline,
    }
    unexplained = np.flatnonzero(~equal & ~late)
    far = np.abs(online - offline)[kinds[Match.MISMATCH]]
    example = None
    if len(unexplained):
        row = int(unexplained[0])
        example = (str(served.keys[row].as_py()), int(served.at_us[row]))
    return FeatureParity(
        counts={match: int(kinds[match].sum()) for match in Match},
        largest_difference=float(far.max()) if len(far) else 0.0,
        example=example,
    )


def recompute_from_log(event_log: EventLog, entity: Entity, views: Sequence[FeatureView]) -> Recompute:
    """A function that computes features from the event log, a bucket at a time, in this process.

    Args:
        event_log: Where the views' sources are kept.
        entity: Whom the keys are about.
        views: All of this entity.
    """
    by_source: dict[str, list[FeatureView]] = {}
    for view in views:
        by_source.setdefault(view.source.name, []).append(view)

    def recompute(keys: pa.Array, as_of_us: IntArray, known_at_us: int | None) -> dict[str, FloatArray]:
        columns = {ref.name: np.full(len(keys), np.nan) for view in views for ref in view}
        buckets = entity.buckets(keys, event_log.n_buckets)
        for bucket in np.unique(buckets):
            rows = np.flatnonzero(buckets == bucket)
            asked, instants = keys.take(pa.array(rows)), as_of_us[rows]
            for group in by_source.values():
                events = event_log.read_bucket(
                    group[0].source,
                    entity,
                    int(bucket),
                    columns=[*needed_columns(group), TIE, INGESTED],
                    min_time_us=earliest_us(group, instants),
                    max_time_us=int(instants.max()),
                )
                found = compute_features(group, events, asked, instants, known_at_us=known_at_us, deduplicate=False)
                for name, values in found.items():
                    columns[name][rows] = values
        return columns

    return recompute


def parity_findings(compared: Mapping[str, FeatureParity], *, tolerated: float = 0.001) -> tuple[Finding, ...]:
    """One finding a feature: any unexplained difference warns, more than a trace of them alarms.

    Args:
        compared: What `compare` gave.
        tolerated: Share of rows that may differ before it is an alarm, 0 to 1.
    """
    if not any(parity.n for parity in compared.values()):
        return (Finding("rows", Severity.INSUFFICIENT, "no served vector to compare", {}),)
    return tuple(_finding(name, parity, tolerated) for name, parity in compared.items())


def _finding(name: str, parity: FeatureParity, tolerated: float) -> Finding:
    rate = parity.unexplained / parity.n
    severity = Severity.ALARM if rate > tolerated else Severity.WARNING if rate > 0 else Severity.OK
    told = ", ".join(f"{count:,} {match}" for match, count in parity.counts.items() if count)
    evidence = {
        "n": parity.n,
        "counts": {match.value: count for match, count in parity.counts.items()},
        "unexplained_rate": rate,
        "largest_difference": parity.largest_difference,
        "example": None if parity.example is None else {"entity": parity.example[0], "at_us": parity.example[1]},
    }
    return Finding(name, severity, told, evidence)
