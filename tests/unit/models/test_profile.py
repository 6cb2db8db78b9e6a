from __future__ import annotations

import json

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from heliostat.errors import MonitoringDataError
from heliostat.models.profile import Bins, ColumnProfile, Profile

FloatArray = NDArray[np.float64]

ANY = st.floats(width=64) | st.sampled_from([0.0, 0.0, 1.0, np.nan, np.inf, -np.inf, 5e-324, 1.7e308, -1.7e308])
ORDINARY = st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0, np.nan])


def columns(elements: st.SearchStrategy[float], least: int = 0) -> st.SearchStrategy[FloatArray]:
    return arrays.arrays(np.float64, st.integers(least, 40), elements=elements)


def matrices(elements: st.SearchStrategy[float]) -> st.SearchStrategy[FloatArray]:
    return arrays.arrays(np.float64, st.tuples(st.integers(0, 30), st.just(2)), elements=elements)


def _normal(n: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(size=n)


def _close(left: ColumnProfile, right: ColumnProfile) -> bool:
    """Counts are equal; sums, whose order of addition differs, nearly so."""
    exact = ("bins", "counts", "nulls", "outliers", "finite", "least", "greatest")
    scale = 1.0 + abs(left.total_squares)
    return all(getattr(left, name) == getattr(right, name) for name in exact) and all(
        abs(getattr(left, name) - getattr(right, name)) <= 1e-9 * scale for name in ("total", "total_squares")
    )


# ── Merging ─────────────────────────────────────────────────────────────────────────


@given(reference=matrices(ORDINARY), one=matrices(ORDINARY), two=matrices(ORDINARY))
def test_merged_profiles_are_the_profile_of_all_rows(reference: FloatArray, one: FloatArray, two: FloatArray) -> None:
    bins = Profile.of(reference, ("a", "b"), reference[:, 0], n_bins=5)
    merged = bins.count(one, one[:, 1]).merge(bins.count(two, two[:, 1]))
    whole = bins.count(np.concatenate([one, two]), np.concatenate([one, two])[:, 1])
    assert all(_close(merged.features[name], whole.features[name]) for name in ("a", "b"))
    assert merged.prediction is not None
    assert whole.prediction is not None
    assert _close(merged.prediction, whole.prediction)


@given(reference=matrices(ORDINARY), one=matrices(ORDINARY), two=matrices(ORDINARY))
def test_the_order_of_merging_does_not_matter(reference: FloatArray, one: FloatArray, two: FloatArray) -> None:
    bins = Profile.of(reference, ("a", "b"))
    assert bins.count(one).merge(bins.count(two)) == bins.count(two).merge(bins.count(one))


@given(reference=matrices(ORDINARY), rows=matrices(ORDINARY))
def test_an_empty_profile_changes_nothing(reference: FloatArray, rows: FloatArray) -> None:
    bins = Profile.of(reference, ("a", "b"), reference[:, 0])
    counted = bins.count(rows, rows[:, 0])
    assert bins.empty().merge(counted) == counted == counted.merge(bins.empty())
    assert bins.empty().rows == 0


def test_other_bins_do_not_merge() -> None:
    one, two = (Profile.of(_normal(100, seed)[:, None], ("a",)) for seed in (1, 2))
    with pytest.raises(MonitoringDataError, match="different bins"):
        one.merge(two)
    with pytest.raises(MonitoringDataError, match="one has the features a, the other b"):
        one.merge(Profile.of(_normal(100)[:, None], ("b",)))


# ── Counting ────────────────────────────────────────────────────────────────────────


@given(reference=columns(ANY), rows=columns(ANY))
def test_every_row_is_counted_once_whatever_it_holds(reference: FloatArray, rows: FloatArray) -> None:
    column = ColumnProfile.of(rows, Bins.of(reference, 5))
    assert column.rows == len(rows)
    assert column.nulls == int(np.isnan(rows).sum())
    assert column.finite == int(np.isfinite(rows).sum())
    assert column.all_counts().sum() == len(rows)


@given(reference=columns(ANY), n_bins=st.integers(2, 12))
@example(reference=np.array([1e307, 1.7e308, 0.0, 0.0, -1.7e308, -1e307, 0.0, 0.0]), n_bins=3)  # inf - inf in a sum
def test_edges_rise_are_at_most_as_many_as_asked_and_leave_no_bin_empty(reference: FloatArray, n_bins: int) -> None:
    bins = Bins.of(reference, n_bins)
    assert len(bins.edges) < n_bins
    assert (np.diff(bins.edges) > 0).all()
    finite = reference[np.isfinite(reference)]
    if len(finite):
        assert min(ColumnProfile.of(finite, bins).counts) > 0


@given(values=columns(st.sampled_from([-3.0, 0.0, 0.5, 7.0]), least=1))
def test_few_values_get_a_bin_each(values: FloatArray) -> None:
    _, times = np.unique(values, return_counts=True)
    assert ColumnProfile.of(values, Bins.of(values, 5)).counts == tuple(times.tolist())


def test_many_values_are_split_at_quantiles() -> None:
    values = _normal(10_000)
    counts = ColumnProfile.of(values, Bins.of(values, 10)).counts
    assert len(counts) == 10
    assert max(counts) - min(counts) <= 2


def test_a_value_that_is_most_rows_has_a_bin_of_its_own() -> None:
    values = np.concatenate([np.zeros(600), np.linspace(1, 2, 400)])
    counts = ColumnProfile.of(values, Bins.of(values, 10)).counts
    assert counts[0] == 600
    assert len(counts) == 5


def test_values_beyond_the_reference_are_in_the_outer_bins() -> None:
    bins = Bins.of(_normal(1_000), 10)
    counts = ColumnProfile.of(np.array([-np.inf, -1e9, 1e9, np.inf, np.inf]), bins).counts
    assert (counts[0], counts[-1], sum(counts[1:-1])) == (2, 3, 0)


def test_moments_are_those_of_the_finite_values() -> None:
    values = np.concatenate([_normal(1_000) * 3 + 1e9, [np.nan, np.inf]])
    column = ColumnProfile.of(values, Bins.of(values, 10))
    finite = values[np.isfinite(values)]
    assert column.mean == pytest.approx(finite.mean(), rel=1e-15)
    assert column.std == pytest.approx(finite.std(), rel=1e-9)
    assert (column.least, column.greatest) == (finite.min(), finite.max())
    assert (column.null_rate, column.finite) == (1 / 1_002, 1_000)


def test_outliers_are_far_from_the_median_in_deviations_from_it() -> None:
    values = _normal(10_001)
    median = np.median(values)
    mad = np.median(np.abs(values - median))
    bins = Bins.of(values, 10)
    expected = np.abs(0.6745 * (values - median) / mad) > 3.5
    assert ColumnProfile.of(values, bins).outliers == int(expected.sum()) > 0
    assert ColumnProfile.of(np.array([1e6, 0.0, -1e6, np.nan]), bins).outlier_rate == 0.5


def test_where_most_values_are_equal_the_quartiles_tell_outliers() -> None:
    values = np.array([0.0] * 60 + [1.0] * 40)
    assert (Bins.of(values, 10).low, Bins.of(values, 10).high) == (-1.5, 2.5)


def test_a_constant_has_no_outliers() -> None:
    assert ColumnProfile.of(np.array([5.0, 6.0]), Bins.of(np.full(10, 5.0), 10)).outliers == 0


def test_no_values_at_all_make_one_bin() -> None:
    profile = Profile.of(np.full((3, 1), np.nan), ("a",))
    assert profile.features["a"].counts == (0,)
    assert (profile.rows, profile.features["a"].nulls) == (3, 3)
    assert np.isnan(profile.features["a"].mean)
    assert profile.count(np.ones((2, 1))).features["a"].counts == (2,)


# ── The whole ───────────────────────────────────────────────────────────────────────


def test_counts_end_with_nulls_and_hold_the_prediction() -> None:
    matrix = np.array([[0.0, 1.0], [1.0, np.nan], [1.0, 1.0]])
    counts = Profile.of(matrix, ("a", "b"), np.array([0.1, 0.2, 0.2])).counts()
    assert {name: column.tolist() for name, column in counts.items()} == {
        "a": [1, 2, 0],
        "b": [2, 1],
        "prediction": [1, 2, 0],
    }


@given(matrix=matrices(ANY))
def test_a_profile_comes_back_from_json(matrix: FloatArray) -> None:
    profile = Profile.of(matrix, ("a", "b"), matrix[:, 0])
    text = orjson.dumps(profile.to_document(), option=orjson.OPT_SORT_KEYS)
    again = Profile.from_document(json.loads(text))
    assert again.to_document() == profile.to_document()
    assert again.names == ("a", "b")
    assert again.empty() == profile.empty()


def test_a_profile_without_predictions_has_no_place_for_them() -> None:
    profile = Profile.of(_normal(10)[:, None], ("a",))
    assert Profile.from_document(profile.to_document()) == profile
    with pytest.raises(MonitoringDataError, match="no bins for predictions"):
        profile.count(np.ones((1, 1)), np.ones(1))


def test_features_without_scores_are_counted_all_the_same() -> None:
    counted = Profile.of(_normal(10)[:, None], ("a",), _normal(10)).count(np.ones((2, 1)))
    assert counted.prediction is not None
    assert (counted.rows, counted.prediction.rows) == (2, 0)


@pytest.mark.parametrize(
    ("matrix", "names", "predictions"),
    [
        (np.ones((2, 2)), ("a",), None),
        (np.ones(2), ("a",), None),
        (np.ones((2, 2)), ("a", "a"), None),
        (np.ones((2, 1)), ("a",), np.ones(3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    matrix: FloatArray, names: tuple[str, ...], predictions: FloatArray | None
) -> None:
    with pytest.raises(MonitoringDataError, match="one (column|score)"):
        Profile.of(matrix, names, predictions)


def test_a_single_bin_is_refused() -> None:
    with pytest.raises(MonitoringDataError, match="at least 2"):
        Profile.of(np.ones((2, 1)), ("a",), n_bins=1)


def test_a_document_of_another_format_is_refused() -> None:
    with pytest.raises(MonitoringDataError, match="format is 2"):
        Profile.from_document({"format": 2})
