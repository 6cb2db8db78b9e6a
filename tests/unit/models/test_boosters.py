from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import lightgbm as lgb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from heliostat.models import boosters
from heliostat.models.boosters import BoosterPredictor

RANDOM = np.random.default_rng(11)
MATRIX = RANDOM.normal(size=(500, 4))
MATRIX[RANDOM.random(MATRIX.shape) < 0.1] = np.nan


def _trained(objective: str, **parameters: object) -> lgb.Booster:
    labels = np.nansum(MATRIX, axis=1)
    target = {"binary": labels > 0, "multiclass": np.digitize(labels, [-1, 1]), "poisson": np.abs(labels)}
    data = lgb.Dataset(MATRIX, target.get(objective, labels).astype(float))
    given = {"objective": objective, "verbosity": -1, "num_threads": 1, "min_data_in_leaf": 5, **parameters}
    return lgb.Booster(model_str=lgb.train(given, data, 12).model_to_string())


BINARY = _trained("binary")
PREDICTOR = BoosterPredictor(BINARY)

values = st.floats(allow_infinity=True, allow_nan=True, width=64)


def test_the_library_that_is_installed_is_called_directly() -> None:
    assert PREDICTOR._call is not None


@given(st.lists(st.tuples(*[values] * 4), min_size=1, max_size=40))
def test_predictions_are_those_of_the_package_bit_by_bit(rows: list[tuple[float, ...]]) -> None:
    matrix = np.array(rows)
    assert PREDICTOR(matrix).tobytes() == BINARY.predict(matrix, num_threads=1).tobytes()


@pytest.mark.parametrize("objective", ["regression", "poisson", "binary", "multiclass", "quantile"])
def test_whatever_the_objective(objective: str) -> None:
    booster = _trained(objective, **({"num_class": 3} if objective == "multiclass" else {}))
    assert np.array_equal(BoosterPredictor(booster)(MATRIX), booster.predict(MATRIX, num_threads=1))


@pytest.mark.parametrize("laid_out", [np.asfortranarray(MATRIX), np.repeat(MATRIX, 2, axis=0)[::2], MATRIX[::-1]])
def test_however_the_matrix_lies_in_memory(laid_out: NDArray[np.float64]) -> None:
    assert PREDICTOR(laid_out).tobytes() == BINARY.predict(np.ascontiguousarray(laid_out), num_threads=1).tobytes()


def test_a_matrix_that_does_not_fit_is_refused_as_the_package_refuses_it() -> None:
    with pytest.raises(lgb.basic.LightGBMError, match="number of features"):
        PREDICTOR(MATRIX[:, :3])


def test_threads_share_a_predictor() -> None:
    expected = BINARY.predict(MATRIX, num_threads=1)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: PREDICTOR(MATRIX), range(40)))
    assert all(np.array_equal(each, expected) for each in found)


def test_without_a_known_release_the_package_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    boosters._function.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(lgb, "__version__", "5.0.0")
            predictor = BoosterPredictor(BINARY)
    finally:
        boosters._function.cache_clear()
    assert predictor._call is None
    assert np.array_equal(predictor(MATRIX), BINARY.predict(MATRIX, num_threads=1))


def test_a_library_that_says_other_things_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(boosters, "_NORMAL", 1)  # raw scores
    predictor = BoosterPredictor(BINARY)
    assert predictor._call is None
    assert "predicts otherwise" in caplog.text
    assert np.array_equal(predictor(MATRIX), BINARY.predict(MATRIX, num_threads=1))
