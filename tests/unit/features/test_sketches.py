from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat import Count, Entity, EventSource, FeatureView, Quantile
from heliostat.errors import InvalidDefinitionError, WindowError
from heliostat.features.sketches import Bins
from heliostat.features.timeline import Ranges, nth_smallest

errors = st.sampled_from([0.01, 0.05, 0.2, 0.5])
ends = st.sampled_from([(0.01, 100.0), (1.0, 1.5), (1e-12, 1e12), (3.0, 7e5)])
ratios = st.floats(-15, 15).map(lambda power: 10.0**power)


def bins_of(error: float, between: tuple[float, float], *, signed: bool = True) -> Bins:
    return Bins(error, *between, signed)


@settings(deadline=None)
@given(error=errors, between=ends, magnitude=ratios, negative=st.booleans())
def test_a_bin_stands_for_its_numbers_within_the_stated_error(
    error: float, between: tuple[float, float], magnitude: float, negative: bool
) -> None:
    bins = bins_of(error, between)
    number = -magnitude if negative else magnitude
    value = bins.values[bins.of(np.array([number]))][0]
    if magnitude < between[0]:
        assert value == 0.0
    elif magnitude <= between[1]:
        assert abs(value - number) <= error * magnitude * (1 + 1e-12)
    else:
        assert value == (bins.values[0] if negative else bins.values[-1])


@settings(deadline=None)
@given(error=errors, between=ends)
def test_the_ends_and_every_edge_are_inside_too(error: float, between: tuple[float, float]) -> None:
    bins = bins_of(error, between)
    numbers = np.concatenate([bins.edges, np.nextafter(bins.edges, 0)[1:], between])
    values = bins.values[bins.of(numbers)]
    assert (np.abs(values - numbers) <= error * numbers * (1 + 1e-12)).all()
    assert (np.diff(bins.values) > 0).all()


def test_without_a_sign_what_is_below_zero_counts_as_zero() -> None:
    signed, unsigned = bins_of(0.05, (1.0, 1e4)), bins_of(0.05, (1.0, 1e4), signed=False)
    assert signed.width == 2 * signed.n_magnitudes + 1
    assert unsigned.width == unsigned.n_magnitudes + 1
    numbers = np.array([-50.0, -0.0, 0.0, 0.5, 50.0])
    np.testing.assert_array_equal(unsigned.values[unsigned.of(numbers)][:4], 0.0)
    assert unsigned.values[unsigned.of(numbers)][4] == signed.values[signed.of(numbers)][4]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), error=errors, signed=st.booleans())
def test_counts_give_the_quantile_that_sorting_gives(data: st.DataObject, error: float, signed: bool) -> None:
    bins = bins_of(error, (0.01, 100.0), signed=signed)
    numbers = np.array(data.draw(st.lists(st.floats(-1000, 1000), min_size=1, max_size=30)))
    q = data.draw(st.floats(0, 1))
    places = bins.of(numbers)
    counts = np.bincount(places, minlength=bins.width).astype(np.float64)
    expected = np.sort(bins.values[places])[int(np.floor(q * (len(numbers) - 1)))]
    assert bins.quantile(np.stack([counts, counts * 0]), q).tolist()[0] == expected
    assert np.isnan(bins.quantile(counts[None] * 0, q)).all()


@settings(deadline=None, max_examples=100)
@given(data=st.data(), n_values=st.sampled_from([1, 2, 3, 64, 65, 1000]))
def test_the_nth_of_a_range_is_what_sorting_the_range_gives(data: st.DataObject, n_values: int) -> None:
    values = np.array(data.draw(st.lists(st.integers(0, n_values - 1), max_size=40)), np.int64)
    edges = st.integers(0, len(values))
    pairs = [sorted(pair) for pair in data.draw(st.lists(st.tuples(edges, edges), min_size=1, max_size=10))]
    low, high = np.array(pairs).T
    nth = np.array([data.draw(st.integers(0, max(0, stop - start - 1))) for start, stop in pairs])
    found = nth_smallest(values, Ranges(low, high), nth, n_values=n_values)
    for start, stop, place, value in zip(low, high, nth, found, strict=True):
        if start < stop:
            assert value == np.sort(values[start:stop])[place]


# ── Declared ────────────────────────────────────────────────────────────────────────

SOURCE = EventSource(
    "sales",
    schema=pa.schema(
        {"id": pa.string(), "user_id": pa.int64(), "at": pa.timestamp("us", "UTC"), "amount": pa.float64()}
    ),
    entity=Entity("user", keys={"user_id": "int64"}),
    event_time="at",
    event_id="id",
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": 1.5}, "no share"),
        ({"q": float("nan")}, "no share"),
        ({"between": (0.0, 10.0)}, "no two magnitudes"),
        ({"between": (10.0, 1.0)}, "no two magnitudes"),
        ({"between": (1.0, float("inf"))}, "no two magnitudes"),
        ({"between": (1.0, 2.0, 3.0)}, "no range"),
        ({"relative_error": 0.0}, "no share"),
        ({"relative_error": 1.0}, "no share"),
        ({"relative_error": 1e-4}, "allow a larger relative_error"),
        ({"relative_error": 0.01, "between": (1e-6, 1e6)}, "signed=False"),
    ],
)
def test_a_quantile_that_cant_be_is_refused_when_it_is_declared(changes: dict, said: str) -> None:
    with pytest.raises(InvalidDefinitionError, match=said):
        Quantile("amount", **{"q": 0.5, "between": (0.01, 1e4), **changes})


def test_a_ring_that_nobody_wants_to_read_is_refused_and_says_what_to_change() -> None:
    median = Quantile("amount", q=0.5, between=(0.01, 1e4), window="11d")
    assert median.bins.width == 279
    with pytest.raises(InvalidDefinitionError, match=r"265 tiles of 279 bins are 577 KiB.*longer hop"):
        FeatureView("facts", version=1, source=SOURCE, features={"median": median})
    for options in ({"hop": "6h"}, {"hop": "1d"}):
        FeatureView("facts", version=1, source=SOURCE, features={"median": median}, **options)


def test_every_parameter_is_part_of_what_a_feature_means() -> None:
    usual = {"q": 0.5, "between": (0.01, 100.0), "relative_error": 0.05, "signed": True, "window": "30d"}

    def hashed(**changes: object) -> str:
        features = {"f": Quantile("amount", **{**usual, **changes}), "n": Count(window="30d")}
        return FeatureView("facts", version=1, source=SOURCE, features=features).content_hash

    changed = [
        hashed(),
        hashed(q=0.9),
        hashed(between=(0.02, 100.0)),
        hashed(between=(0.01, 200.0)),
        hashed(relative_error=0.1),
        hashed(signed=False),
        hashed(window="14d"),
        hashed(where=pc.field("amount") > 0),
    ]
    assert len(set(changed)) == len(changed)
    assert hashed(between=[0.01, 100]) == hashed()


def test_a_quantile_over_several_windows_is_as_many_features() -> None:
    median = Quantile("amount", q=0.5, between=(0.01, 100.0), windows=("12d", "30d"))
    view = FeatureView("facts", version=1, source=SOURCE, features={"median": median})
    assert view.feature_names == ("median_12d", "median_30d")
    with pytest.raises(WindowError, match="one of them"):
        Quantile("amount", q=0.5, between=(0.01, 100.0), window="12d", windows=("12d", "30d"))
