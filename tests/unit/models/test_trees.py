"""Trees that are walked side by side say what LightGBM says, bit by bit; what they can't hold is left to it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import lightgbm as lgb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from heliostat.models import trees
from heliostat.models.boosters import BoosterPredictor
from heliostat.models.trees import Trees, compiled

N_COLUMNS = 5

pytestmark = pytest.mark.skipif(not trees.AVAILABLE, reason="built without a compiler")


def _matrix(seed: int, n: int = 400, *, nulls: float = 0.1, zeros: float = 0.1) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    found = random.normal(size=(n, N_COLUMNS)) * 10.0 ** random.integers(-3, 6, N_COLUMNS)
    found[random.random(found.shape) < zeros] = 0.0
    found[random.random(found.shape) < nulls] = np.nan
    found[:, 0] = np.round(found[:, 0])  # many rows on a threshold's side
    return found


def _trained(seed: int = 0, *, objective: str = "binary", rounds: int = 9, **given: object) -> lgb.Booster:
    matrix = _matrix(seed, nulls=float(str(given.pop("nulls", 0.1))))
    labels = np.nansum(np.sign(matrix), axis=1) + np.random.default_rng(seed).normal(size=len(matrix))
    categorical = given.pop("categorical", "auto")
    if categorical != "auto":
        matrix[:, 0] = np.abs(np.nan_to_num(matrix[:, 0])) % 7
        labels += 9 * np.isin(matrix[:, 0], (1, 4))
    target = {
        "binary": labels > 0,
        "cross_entropy": 1 / (1 + np.exp(-labels)),
        "poisson": np.abs(labels),
        "gamma": 0.1 + np.abs(labels),
        "tweedie": np.abs(labels),
        "multiclass": np.digitize(labels, [-1, 1]),
    }.get(objective, labels)
    data = lgb.Dataset(matrix, target.astype(float), categorical_feature=categorical, free_raw_data=False)
    parameters = {
        "objective": objective,
        "verbosity": -1,
        "num_threads": 1,
        "min_data_in_leaf": 3,
        "min_data_per_group": 1,
        "cat_smooth": 0.0,
        "deterministic": True,
        "seed": seed,
        **given,
    }
    return lgb.Booster(model_str=lgb.train(parameters, data, rounds).model_to_string())


def _walked(booster: lgb.Booster) -> Trees:
    found = compiled(booster.model_to_string(), n_columns=N_COLUMNS)
    assert found is not None
    return found


def _same(booster: lgb.Booster, matrix: NDArray[np.float64]) -> bool:
    return _walked(booster)(matrix).tobytes() == np.asarray(booster.predict(matrix, num_threads=1)).tobytes()


BINARY = _trained()
THRESHOLDS = sorted({float(each) for each in _walked(BINARY)._edges[1]})

values = st.one_of(
    st.floats(allow_infinity=True, allow_nan=True, width=64),
    st.sampled_from(THRESHOLDS),
    st.sampled_from([np.nextafter(each, np.inf) for each in THRESHOLDS]),
    st.sampled_from([0.0, -0.0, 1e-35, -1e-35, float(np.float32(1e-35)), np.nextafter(np.float32(1e-35), 1), np.nan]),
)


@settings(max_examples=400)
@given(st.lists(st.tuples(*[values] * N_COLUMNS), min_size=1, max_size=20))
def test_any_rows_are_what_the_library_says(rows: list[tuple[float, ...]]) -> None:
    assert _same(BINARY, np.array(rows, dtype=np.float64))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1_000),
    objective=st.sampled_from(
        ["binary", "regression", "regression_l1", "huber", "fair", "quantile", "mape", "poisson", "gamma", "tweedie"]
    ),
    num_leaves=st.sampled_from([2, 3, 31, 100]),
    use_missing=st.booleans(),
    nulls=st.sampled_from([0.0, 0.3]),
    boosting=st.sampled_from(["gbdt", "dart"]),
    rounds=st.integers(1, 12),
    max_depth=st.sampled_from([-1, 2]),
)
def test_any_booster_over_numbers_is_what_the_library_says(
    seed: int,
    objective: str,
    num_leaves: int,
    use_missing: bool,
    nulls: float,
    boosting: str,
    rounds: int,
    max_depth: int,
) -> None:
    booster = _trained(
        seed,
        objective=objective,
        rounds=rounds,
        num_leaves=num_leaves,
        use_missing=use_missing,
        nulls=nulls,
        boosting=boosting,
        max_depth=max_depth,
    )
    assert BoosterPredictor(booster)._trees is not None
    assert _same(booster, _matrix(seed + 1, 300))
    assert _same(booster, _walked(booster).trial(100))


def test_nulls_that_are_parted_from_all_numbers_are_the_librarys() -> None:
    matrix = np.array([[np.nan], [0.0], [np.inf], [-np.inf], [1e300]] * 40)
    data = lgb.Dataset(matrix, np.isnan(matrix[:, 0]).astype(float))
    given = {"objective": "binary", "verbosity": -1, "num_threads": 1, "min_data_in_leaf": 1, "max_bin": 3}
    booster = lgb.Booster(model_str=lgb.train(given, data, 3).model_to_string())
    assert "threshold=inf" in booster.model_to_string()
    walked = BoosterPredictor(booster)._trees
    assert walked is not None
    assert walked(matrix).tobytes() == np.asarray(booster.predict(matrix, num_threads=1)).tobytes()


def test_a_sigmoid_of_another_steepness_is_the_librarys() -> None:
    assert _same(_trained(sigmoid=0.7), _matrix(3))


def test_cross_entropy_is_the_librarys() -> None:
    assert _same(_trained(objective="cross_entropy"), _matrix(3))


def test_trees_without_a_split_are_the_librarys() -> None:
    booster = _trained(min_data_in_leaf=10_000)
    assert _same(booster, _matrix(3))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 127, 128, 129, 400])
def test_however_many_rows_there_are(n: int) -> None:
    matrix = _matrix(4)
    alone = _walked(BINARY)(matrix)
    assert _walked(BINARY)(matrix[:n].copy()).tobytes() == alone[:n].tobytes()


def test_only_so_many_trees_count_as_the_booster_says() -> None:
    matrix = _matrix(5)
    found = compiled(BINARY.model_to_string(), n_columns=N_COLUMNS, n_trees=4)
    assert found is not None
    assert np.array_equal(found(matrix), BINARY.predict(matrix, num_iteration=4, num_threads=1))
    stopped = lgb.Booster(model_str=BINARY.model_to_string())
    stopped.best_iteration = 4
    assert np.array_equal(BoosterPredictor(stopped)(matrix), found(matrix))


@pytest.mark.parametrize(
    "given",
    [
        {"objective": "multiclass", "num_class": 3},
        {"zero_as_missing": True},
        {"linear_tree": True, "objective": "regression"},
        {"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5},
        {"objective": "regression", "reg_sqrt": True},
        {"categorical": [0]},
    ],
    ids=lambda given: "-".join(given),
)
def test_what_has_another_meaning_is_left_to_the_library(given: dict[str, object]) -> None:
    booster = _trained(**given)  # type: ignore[arg-type] # parameters of LightGBM's
    matrix = _matrix(6)
    predictor = BoosterPredictor(booster)
    assert predictor._trees is None
    assert np.array_equal(predictor(matrix), booster.predict(matrix, num_threads=1))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("left_child=", "left_child=7 "),
        ("left_child=1", "left_child=0"),
        ("split_feature=", "split_feature=9 "),
        ("threshold=", "threshold=x "),
        ("num_leaves=", "num_leaves=2"),
        ("leaf_value=", "other="),
        ("Tree=", "Baum="),
    ],
)
def test_a_text_that_says_what_cant_be_is_left_to_the_library(before: str, after: str) -> None:
    text = BINARY.model_to_string()
    assert before in text
    assert compiled(text.replace(before, after), n_columns=N_COLUMNS) is None


def test_a_feature_that_isnt_there_is_no_tree() -> None:
    assert compiled(BINARY.model_to_string(), n_columns=N_COLUMNS - 1) is None


def test_code_or_rows_of_another_shape_are_refused() -> None:
    walked = _walked(BINARY)
    with pytest.raises(ValueError, match="other columns"):
        walked(np.zeros((3, N_COLUMNS + 1)))
    with pytest.raises(ValueError, match="no trees"):
        Trees(walked._code[:-8], N_COLUMNS, walked._edges)(np.zeros((3, N_COLUMNS)))


def test_trees_that_say_other_things_than_the_package_arent_walked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trees, "_NULLS_LEFT", 0)
    booster = _trained(nulls=0.3)
    assert BoosterPredictor(booster)._trees is None
    assert "predicts otherwise" in caplog.text


def test_threads_share_trees() -> None:
    walked, matrix = _walked(BINARY), _matrix(7)
    expected = walked(matrix)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: walked(matrix), range(40)))
    assert all(np.array_equal(each, expected) for each in found)
