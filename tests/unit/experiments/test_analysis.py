from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import ExperimentDataError
from heliostat.experiments.analysis import Analysis, Units, aggregate, analyze

EVEN = {"control": 0.5, "treatment": 0.5}


def _experiment(seed: int, n: int, lift: float, *, treated_share: float = 0.5) -> Units:
    random = np.random.default_rng(seed)
    treated = random.random(n) < treated_share
    covariate = random.normal(size=n)
    outcome = covariate + lift * treated + random.normal(size=n)
    return aggregate(
        np.arange(n), np.where(treated, "treatment", "control"), np.zeros(n, dtype=np.int64), outcome, covariate
    )


def _analyze(units: Units) -> Analysis:
    return analyze(units, weights=EVEN, control="control", treatment="treatment")


# ── One row an entity ───────────────────────────────────────────────────────────────


def test_several_predictions_of_one_entity_are_one_row() -> None:
    units = aggregate([7, 8, 7], ["a", "b", "a"], [10, 20, 30], [1.0, 0.0, 3.0])
    assert units.variants.tolist() == ["a", "b"]
    assert units.totals.tolist() == [4.0, 0.0]
    assert units.counts.tolist() == [2.0, 1.0]


def test_an_entity_belongs_to_the_variant_that_it_met_first() -> None:
    units = aggregate(["x", "x", "y"], ["late", "first", "late"], [200, 100, 50], [1.0, 2.0, 3.0], [0.1, 0.2, 0.3])
    assert units.variants.tolist() == ["first", "late"]
    assert units.covariates.tolist() == [0.2, 0.3]
    assert units.n_crossed == 1


def test_unknown_outcomes_count_as_exposed_but_not_as_outcomes() -> None:
    units = aggregate([1, 2, 2], ["a", "a", "a"], [0, 0, 1], [np.nan, np.nan, 5.0])
    assert units.exposed() == {"a": 2}
    assert units.of("a").totals.tolist() == [5.0]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.sampled_from("ab"), st.integers(0, 9), st.sampled_from([0.0, 1.0, float("nan")])
        ),
        max_size=40,
    ),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_exposures_does_not_matter(rows: list[tuple[int, str, int, float]], random: object) -> None:
    def units(of: list[tuple[int, str, int, float]]) -> Units:
        return aggregate([r[0] for r in of], [r[1] for r in of], [r[2] for r in of], [r[3] for r in of])

    shuffled = rows.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = units(rows), units(shuffled)
    assert one.variants.tolist() == other.variants.tolist()
    assert one.totals.tolist() == other.totals.tolist()
    assert one.counts.tolist() == other.counts.tolist()
    assert one.n_crossed == other.n_crossed
    assert one.counts.sum() == sum(r[3] == r[3] for r in rows)


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ExperimentDataError, match="one value each"):
        aggregate([1, 2], ["a"], [0, 0], [1.0, 1.0])


# ── Conclusions ─────────────────────────────────────────────────────────────────────


def test_a_real_lift_is_concluded() -> None:
    analysis = _analyze(_experiment(1, 3_000, 0.3))
    assert analysis.conclusion == "higher"
    assert analysis.interval is not None
    assert analysis.interval.lower < 0.3 < analysis.interval.upper


def test_no_lift_is_undecided() -> None:
    assert _analyze(_experiment(2, 3_000, 0.0)).conclusion == "undecided"


def test_a_broken_split_blocks_even_a_clear_effect() -> None:
    analysis = _analyze(_experiment(3, 3_000, 1.0, treated_share=0.42))
    assert analysis.split.mismatch
    assert analysis.conclusion == "blocked"


def test_few_entities_conclude_nothing_however_clear() -> None:
    assert _analyze(_experiment(4, 60, 5.0)).conclusion == "too few"


def test_a_clear_effect_of_one_day_waits_for_the_week() -> None:
    units = _experiment(1, 3_000, 0.3)
    analysis = analyze(units, weights=EVEN, control="control", treatment="treatment", minimum_days=7)
    assert analysis.conclusion == "too early"


def test_before_any_label_has_matured_there_is_no_effect_but_a_split() -> None:
    units = aggregate([1, 2, 3, 4], ["control", "treatment"] * 2, [0] * 4, [np.nan] * 4)
    analysis = _analyze(units)
    assert analysis.effect is None
    assert analysis.split.p_value == pytest.approx(1.0)
    assert analysis.conclusion == "too few"


def test_the_covariate_narrows_the_interval() -> None:
    analysis = _analyze(_experiment(5, 3_000, 0.1))
    assert analysis.interval is not None
    assert analysis.adjusted_interval is not None
    plain = analysis.interval.upper - analysis.interval.lower
    assert analysis.adjusted_interval.upper - analysis.adjusted_interval.lower < 0.8 * plain


def test_a_variant_without_weight_is_refused_with_the_split() -> None:
    with pytest.raises(ExperimentDataError, match="'shadow' has no weight"):
        analyze(_experiment(6, 10, 0.0), weights=EVEN, control="control", treatment="shadow")


def test_the_report_is_json_even_where_an_interval_is_open() -> None:
    units = aggregate([1, 2, 3, 4], ["control", "treatment"] * 2, [0] * 4, [0.0, 1.0, 0.0, 1.0])
    document = _analyze(units).to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["interval"]["lower"] is None
    assert document["conclusion"] == "too few"
