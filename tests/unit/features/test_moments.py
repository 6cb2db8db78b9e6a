from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.features import moments

EPSILON = 1e-12

magnitudes = st.one_of(
    st.floats(-12, 12).map(lambda power: 10.0**power),
    st.sampled_from([0.0, 1e12, 1e12 + 1, 1e-12, 0.1, 0.2, 0.3]),
)
numbers = st.lists(st.tuples(magnitudes, st.sampled_from([-1, 1])).map(math.prod), max_size=40)


def exact(values: list[float]) -> tuple[float, float]:
    """The standard deviation, and how far from it the contract allows to be."""
    n = len(values)
    if n < 2:
        return math.nan, 0.0
    mean = sum(map(Fraction, values)) / n
    variance = sum((Fraction(value) - mean) ** 2 for value in values) / (n - 1)
    root = math.sqrt(sum(Fraction(value) ** 2 for value in values) / n)
    return math.sqrt(variance), EPSILON * root if variance else 0.0


def assert_accepted(parts: np.ndarray, values: list[float]) -> None:
    expected, tolerance = exact(values)
    (found,) = moments.deviation(parts.reshape(1, 3))
    assert (math.isnan(found) and math.isnan(expected)) or abs(found - expected) <= tolerance


@st.composite
def cut_numbers(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    """Numbers, and where runs of them begin."""
    values = draw(numbers.filter(bool))
    starts = sorted({0, *draw(st.lists(st.integers(0, len(values) - 1), max_size=6))})
    return values, starts


def parts_of(values: list[float]) -> np.ndarray:
    return moments.moments_of(np.array(values), np.ones(len(values), dtype=bool))


@settings(deadline=None)
@given(cut=cut_numbers())
def test_one_after_the_other_run_by_run_or_slot_by_slot_is_the_standard_deviation(
    cut: tuple[list[float], list[int]],
) -> None:
    values, starts = cut
    parts = parts_of(values)
    # One event after the other, as the server's script does it.
    one = np.zeros((1, 3))
    for part in parts:
        one = moments.merged(one, part[None])
    assert_accepted(one, values)
    # Tiles of neighbours, then all tiles of a ring: as materializing and reading do it.
    runs = moments.merged_runs(parts, np.array(starts))
    for begin, end, run in zip(starts, [*starts[1:], len(values)], runs, strict=True):
        assert_accepted(run, values[begin:end])
    assert_accepted(moments.merged_runs(runs, np.array([0])), values)
    # From the beginning and from the end: as the offline kernel does it.
    ends = np.array([*starts[1:], len(values)])
    forwards = moments.running(parts, np.array(starts), ends)
    backwards = moments.running(parts, np.array(starts), ends, backwards=True)
    for begin, end in zip(starts, ends.tolist(), strict=True):
        for place in range(begin, end):
            assert_accepted(forwards[place], values[begin : place + 1])
            assert_accepted(backwards[place], values[place:end])


@settings(deadline=None)
@given(value=magnitudes, lengths=st.lists(st.integers(1, 200), min_size=1, max_size=5))
def test_equal_numbers_deviate_by_exactly_nothing_in_whatever_order_they_merge(
    value: float, lengths: list[int]
) -> None:
    values = [value] * sum(lengths)
    starts = np.cumsum([0, *lengths])[:-1]
    parts = parts_of(values)
    runs = moments.merged_runs(parts, starts)
    merged = moments.merged_runs(runs, np.array([0]))
    running = moments.running(parts, np.array([0]), np.array([len(values)]))
    for found in (merged[0], running[-1], moments.merged(runs[:1], runs[-1:])[0]):
        assert found[1] == value
        assert found[2] == 0.0


@settings(deadline=None)
@given(cut=cut_numbers(), seed=st.integers(0, 2**32 - 1))
def test_what_isnt_used_changes_nothing(cut: tuple[list[float], list[int]], seed: int) -> None:
    values, _ = cut
    used = np.random.default_rng(seed).random(len(values)) < 0.5
    whole = moments.moments_of(np.where(used, values, np.nan), used)
    run = moments.merged_runs(whole, np.array([0]))[0]
    kept = [value for value, takes in zip(values, used, strict=True) if takes]
    assert run[0] == len(kept)
    assert_accepted(run, kept)


def test_a_hundred_thousand_large_numbers_keep_their_small_spread() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(size=100_000)
    for centre in (0.0, 1e6, 1e9, 1e12):
        values = centre + noise
        expected = np.std(values - centre, ddof=1)
        promised = EPSILON * math.sqrt(np.mean(values**2))
        parts = moments.moments_of(values, np.ones(len(values), dtype=bool))
        one = np.zeros((1, 3))
        for part in parts[:3_000]:
            one = moments.merged(one, part[None])
        assert abs(moments.deviation(one)[0] - np.std(values[:3_000] - centre, ddof=1)) <= promised
        run = moments.merged_runs(parts, np.array([0]))
        last = moments.running(parts, np.array([0]), np.array([len(parts)]))[-1:]
        for found in (run, last):
            assert abs(moments.deviation(found)[0] - expected) <= promised


def test_fewer_than_two_numbers_have_no_spread() -> None:
    parts = np.array([[0.0, 0.0, 0.0], [1.0, 5.0, 0.0], [2.0, 5.0, 8.0]])
    np.testing.assert_array_equal(moments.deviation(parts), [np.nan, np.nan, math.sqrt(8.0)])
