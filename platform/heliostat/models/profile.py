"""What a model's features and predictions looked like when it was trained, as counts that add up.

The reference profile is made once, when a version is trained, and stored with it. It fixes the
bins: open-ended ones at the quantiles of the training rows, one bin a value where a feature has
few values, and one for nulls. Recent rows are counted in the same bins, so that profiles of any
parts of them, made by any number of workers, merge by adding.

Moments are sums of distances from the reference's median: they add up as well, and don't lose
a small spread to a large mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import MonitoringDataError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

PREDICTION: Final = "prediction"
"""The name under which `Profile.counts` gives the scores."""

_FORMAT: Final = 1
_MAD_TO_SIGMA: Final = 0.6745
_OUTLIER: Final = 3.5
_IQR_REACH: Final = 1.5


@dataclass(frozen=True, slots=True)
class Bins:
    """Where one column's values are counted; fixed when the reference is made.

    Attributes:
        edges: Inner edges, ascending, ``k`` of them: bin ``i`` holds ``edges[i-1] <= x < edges[i]``, the first
            and the last are open-ended.
        center: The reference's median; 0 without values.
        low: Values below are outliers.
        high: Values above are outliers.
    """

    edges: tuple[float, ...]
    center: float
    low: float
    high: float

    @classmethod
    def of(cls, values: FloatArray, n_bins: int) -> Bins:
        """Bins for the finite ones of these values, shape ``(n,)``.

        Outliers are those with ``|0.6745 (x − median) / MAD| > 3.5``; where more than half of the values are
        equal (MAD is 0), those 1.5 interquartile ranges beyond the quartiles; where that is 0 too, none.
        Source: Iglewicz and Hoaglin 1993, section 3.
        """
        finite = np.sort(values[np.isfinite(values)])
        if not len(finite):
            return cls((), 0.0, -np.inf, np.inf)
        with np.errstate(over="ignore"):  # an infinite range has no outliers, which is right
            center, lower, upper = (_quantile(finite, share) for share in (0.5, 0.25, 0.75))
            mad = _quantile(np.sort(np.abs(finite - center)), 0.5)
            if mad > 0:
                low, high = center - _OUTLIER * mad / _MAD_TO_SIGMA, center + _OUTLIER * mad / _MAD_TO_SIGMA
            elif upper > lower:
                low, high = lower - _IQR_REACH * (upper - lower), upper + _IQR_REACH * (upper - lower)
            else:
                low, high = -np.inf, np.inf
            edges = _edges(finite, n_bins)
        return cls(tuple(edges.tolist()), center, low, high)


def _quantile(ordered: FloatArray, share: float) -> float:
    """One of the values, never between two of them."""
    return float(ordered[math.ceil(share * len(ordered)) - 1])


def _edges(ordered: FloatArray, n_bins: int) -> FloatArray:
    """Inner edges for at most ``n_bins`` bins of ascending finite values, shape ``(n,)``."""
    distinct = np.unique(ordered)
    if len(distinct) <= n_bins:  # one bin a value
        middles: FloatArray = distinct[:-1] / 2 + distinct[1:] / 2
        # Neighbours in float64 have no middle: there the upper one is the edge.
        between: FloatArray = np.where(middles > distinct[:-1], middles, distinct[1:])
        return between
    quantiles, times = np.unique([_quantile(ordered, i / n_bins) for i in range(1, n_bins)], return_counts=True)
    # A value that fills several bins, such as 0, gets one of its own: it ends where the next value starts.
    heavy = np.searchsorted(distinct, quantiles[times > 1], side="right")
    edges = np.union1d(quantiles, distinct[heavy[heavy < len(distinct)]])
    inner: FloatArray = edges[edges > ordered[0]]  # an edge at the smallest value would leave the first bin empty
    return inner


@dataclass(frozen=True, slots=True)
class ColumnProfile:
    """One column's rows, counted.

    Attributes:
        bins: Where they are counted.
        counts: Rows by bin, ``len(bins.edges) + 1`` of them; infinities are in the outer bins.
        nulls: Rows without a value (NaN).
        outliers: Rows outside ``[bins.low, bins.high]``.
        finite: Rows that the moments are made of.
        total: Sum of ``x - bins.center`` over them.
        total_squares: Sum of ``(x - bins.center)²`` over them.
        least: Smallest of them; +inf without any.
        greatest: Largest of them; -inf without any.
    """

    bins: Bins
    counts: tuple[int, ...]
    nulls: int = 0
    outliers: int = 0
    finite: int = 0
    total: float = 0.0
    total_squares: float = 0.0
    least: float = np.inf
    greatest: float = -np.inf

    @classmethod
    def empty(cls, bins: Bins) -> ColumnProfile:
        """No rows yet."""
        return cls(bins, (0,) * (len(bins.edges) + 1))

    @classmethod
    def of(cls, values: FloatArray, bins: Bins) -> ColumnProfile:
        """Count values, shape ``(n,)``."""
        known = values[~np.isnan(values)]
        places = np.searchsorted(np.asarray(bins.edges, dtype=np.float64), known, side="right")
        finite = known[np.isfinite(known)]
        # Near the largest float, sums of parts may be infinite, and the sum of those no number: it isn't known then.
        with np.errstate(over="ignore", invalid="ignore"):
            distances = finite - bins.center
            total, total_squares = float(distances.sum()), float((distances * distances).sum())
        return cls(
            bins=bins,
            counts=tuple(np.bincount(places, minlength=len(bins.edges) + 1).tolist()),
            nulls=len(values) - len(known),
            outliers=int(((known < bins.low) | (known > bins.high)).sum()),
            finite=len(finite),
            total=total,
            total_squares=total_squares,
            least=float(finite.min(initial=np.inf)),
            greatest=float(finite.max(initial=-np.inf)),
        )

    def merge(self, other: ColumnProfile) -> ColumnProfile:
        """Both sets of rows together.

        Raises:
            MonitoringDataError: If the bins differ.
        """
        if self.bins != other.bins:
            fix = "count both with the same reference profile"
            raise MonitoringDataError("profile", "the two were counted in different bins", fix)
        return ColumnProfile(
            bins=self.bins,
            counts=tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            nulls=self.nulls + other.nulls,
            outliers=self.outliers + other.outliers,
            finite=self.finite + other.finite,
            total=self.total + other.total,
            total_squares=self.total_squares + other.total_squares,
            least=min(self.least, other.least),
            greatest=max(self.greatest, other.greatest),
        )

    @property
    def rows(self) -> int:
        """All rows, nulls included."""
        return sum(self.counts) + self.nulls

    @property
    def mean(self) -> float:
        """Mean of the finite values; NaN without any."""
        return self.bins.center + self.total / self.finite if self.finite else float("nan")

    @property
    def std(self) -> float:
        """Population standard deviation of the finite values; NaN without any."""
        if not self.finite:
            return float("nan")
        shift = self.total / self.finite
        return float(np.sqrt(max(self.total_squares / self.finite - shift * shift, 0.0)))

    @property
    def null_rate(self) -> float:
        """Share of rows without a value; NaN without rows."""
        return self.nulls / self.rows if self.rows else float("nan")

    @property
    def outlier_rate(self) -> float:
        """Share of rows outside the reference's range; NaN without rows."""
        return self.outliers / self.rows if self.rows else float("nan")

    def all_counts(self) -> IntArray:
        """Rows by bin, the null bin last, shape ``(len(bins.edges) + 2,)``."""
        return np.array((*self.counts, self.nulls), dtype=np.int64)


@dataclass(frozen=True)
class Profile:
    """A model's rows, counted: the reference, or recent ones in the reference's bins.

    Attributes:
        features: By qualified name, in the signature's order.
        prediction: The scores; None where there were none.
    """

    features: Mapping[str, ColumnProfile]
    prediction: ColumnProfile | None = None

    @classmethod
    def of(
        cls, matrix: FloatArray, names: Sequence[str], predictions: FloatArray | None = None, *, n_bins: int = 10
    ) -> Profile:
        """The reference profile of training rows.

        Args:
            matrix: Features, shape ``(n, n_features)``; NaN where there is none.
            names: The columns' names.
            predictions: The model's scores of these rows, shape ``(n,)``.
            n_bins: Bins a column, at most, the null bin apart.

        Raises:
            MonitoringDataError: If the shapes don't fit.
        """
        if n_bins < 2:
            raise MonitoringDataError("profile", f"{n_bins} bins tell nothing apart", "use at least 2")
        _check_shapes(matrix, tuple(names), predictions)
        bins = [Bins.of(matrix[:, column], n_bins) for column in range(len(names))]
        empty = cls(
            {name: ColumnProfile.empty(each) for name, each in zip(names, bins, strict=True)},
            None if predictions is None else ColumnProfile.empty(Bins.of(predictions, n_bins)),
        )
        return empty.count(matrix, predictions)

    @property
    def names(self) -> tuple[str, ...]:
        """The features' names, in order."""
        return tuple(self.features)

    @property
    def rows(self) -> int:
        """How many rows were counted."""
        return next((column.rows for column in self.features.values()), 0)

    def empty(self) -> Profile:
        """The same bins without rows: what changes nothing when merged."""
        return Profile(
            {name: ColumnProfile.empty(column.bins) for name, column in self.features.items()},
            None if self.prediction is None else ColumnProfile.empty(self.prediction.bins),
        )

    def count(self, matrix: FloatArray, predictions: FloatArray | None = None) -> Profile:
        """Count other rows in this profile's bins.

        Args:
            matrix: Features in the order of `names`, shape ``(n, n_features)``.
            predictions: The scores, shape ``(n,)``; None if there are none.

        Raises:
            MonitoringDataError: If the shapes don't fit, or there are scores and the profile has no bins for them.
        """
        _check_shapes(matrix, self.names, predictions)
        if predictions is not None and self.prediction is None:
            raise MonitoringDataError("profile", "it has no bins for predictions", "give them when it is made")
        scored = self.prediction and ColumnProfile.empty(self.prediction.bins)
        if predictions is not None and self.prediction is not None:
            scored = ColumnProfile.of(predictions, self.prediction.bins)
        return Profile(
            {
                name: ColumnProfile.of(matrix[:, column], self.features[name].bins)
                for column, name in enumerate(self.names)
            },
            scored,
        )

    def merge(self, other: Profile) -> Profile:
        """Both sets of rows together; the order doesn't matter.

        Raises:
            MonitoringDataError: If features or bins differ.
        """
        if self.names != other.names or (self.prediction is None) != (other.prediction is None):
            problem = f"one has the features {', '.join(self.names)}, the other {', '.join(other.names)}"
            raise MonitoringDataError("profile", problem, "count both with the same reference profile")
        scored = self.prediction
        if scored is not None and other.prediction is not None:
            scored = scored.merge(other.prediction)
        return Profile({name: self.features[name].merge(other.features[name]) for name in self.names}, scored)

    def counts(self) -> dict[str, IntArray]:
        """Rows by bin, the null bin last, for every feature and for ``prediction``: what drift compares."""
        columns = {name: column.all_counts() for name, column in self.features.items()}
        if self.prediction is not None:
            columns[PREDICTION] = self.prediction.all_counts()
        return columns

    def to_document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "format": _FORMAT,
            "features": {name: _to_document(column) for name, column in self.features.items()},
            "names": list(self.names),
            "prediction": None if self.prediction is None else _to_document(self.prediction),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Profile:
        """The reverse of `to_document`.

        Raises:
            MonitoringDataError: If it is no profile of this format.
        """
        if document.get("format") != _FORMAT:
            problem = f"the document's format is {document.get('format')!r}, not {_FORMAT}"
            raise MonitoringDataError("profile", problem, "train the version again with this release")
        prediction = document["prediction"]
        return cls(
            {name: _from_document(document["features"][name]) for name in document["names"]},
            None if prediction is None else _from_document(prediction),
        )


def mean_prediction(document: Mapping[str, Any] | None) -> float | None:
    """The mean prediction in training, of a profile as a JSON object: what answers when no version can.

    Args:
        document: The package's profile, or None.

    Returns:
        None if it has none that is finite.
    """
    scores = None if document is None else Profile.from_document(document).prediction
    return None if scores is None or not math.isfinite(scores.mean) else scores.mean


def _check_shapes(matrix: FloatArray, names: tuple[str, ...], predictions: FloatArray | None) -> None:
    if matrix.ndim != 2 or matrix.shape[1] != len(names) or len(set(names)) != len(names):
        problem = f"a matrix of shape {matrix.shape} doesn't hold the {len(names)} features {', '.join(names)}"
        raise MonitoringDataError("profile", problem, "give one column a feature, in order")
    if predictions is not None and predictions.shape != (len(matrix),):
        problem = f"there are predictions of shape {predictions.shape} for {len(matrix)} rows"
        raise MonitoringDataError("profile", problem, "give one score a row")


def _to_document(column: ColumnProfile) -> dict[str, Any]:
    return {
        "edges": list(column.bins.edges),
        "center": column.bins.center,
        "range": [_or_none(column.bins.low), _or_none(column.bins.high)],
        "counts": list(column.counts),
        "nulls": column.nulls,
        "outliers": column.outliers,
        "finite": column.finite,
        "total": _or_none(column.total),
        "total_squares": _or_none(column.total_squares),
        "extremes": [_or_none(column.least), _or_none(column.greatest)],
    }


def _from_document(document: Mapping[str, Any]) -> ColumnProfile:
    low, high = document["range"]
    least, greatest = document["extremes"]
    bins = Bins(
        tuple(document["edges"]),
        document["center"],
        -np.inf if low is None else low,
        np.inf if high is None else high,
    )
    return ColumnProfile(
        bins=bins,
        counts=tuple(document["counts"]),
        nulls=document["nulls"],
        outliers=document["outliers"],
        finite=document["finite"],
        total=np.nan if document["total"] is None else document["total"],
        total_squares=np.inf if document["total_squares"] is None else document["total_squares"],
        least=np.inf if least is None else least,
        greatest=-np.inf if greatest is None else greatest,
    )


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None  # JSON has no infinity
