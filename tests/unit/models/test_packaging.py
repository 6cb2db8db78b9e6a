from __future__ import annotations

import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import InvalidPackageError, SignatureMismatchError, UnknownFeatureError
from heliostat.models.packaging import (
    MODEL_FILE,
    PACKAGE_FILE,
    PROFILE_FILE,
    SIGNATURE_FILE,
    Calibration,
    ModelPackage,
    Signature,
)

NAMES = ("behaviour__recency", "behaviour__frequency", "behaviour__spend")


def _matrix(n: int = 400) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(n, 3))


@pytest.fixture(scope="module")
def booster() -> lgb.Booster:
    matrix = _matrix()
    labels = (matrix[:, 0] + matrix[:, 1] > 0).astype(float)
    data = lgb.Dataset(matrix, labels, feature_name=list(NAMES))
    return lgb.train({"objective": "binary", "verbosity": -1, "num_threads": 1}, data, 8)


@pytest.fixture
def package(booster: lgb.Booster) -> ModelPackage:
    return ModelPackage(
        booster_text=booster.model_to_string(),
        signature=Signature(NAMES),
        objective="binary",
        profile={"format": 1, "features": {}},
        metrics={"auc": 0.75},
        parameters={"num_leaves": 31},
    )


def test_a_package_predicts_what_the_booster_did(booster: lgb.Booster, package: ModelPackage) -> None:
    loaded = ModelPackage.from_files(package.to_files()).load()
    np.testing.assert_array_equal(loaded.predict(_matrix(), names=NAMES), booster.predict(_matrix()))


@pytest.fixture(scope="module")
def opinionated() -> ModelPackage:
    """A booster of many trees that has seen nulls, with a calibration."""
    matrix = np.where(np.random.default_rng(3).random((2_000, 3)) < 0.2, np.nan, _matrix(2_000))
    labels = np.nansum(matrix, axis=1) + np.random.default_rng(4).normal(size=2_000) > 0
    parameters = {"objective": "binary", "verbosity": -1, "num_threads": 1, "num_leaves": 63, "min_data_in_leaf": 5}
    booster = lgb.train(parameters, lgb.Dataset(matrix, labels.astype(float), feature_name=list(NAMES)), 150)
    calibration = Calibration((0.0, 0.3, 0.7, 1.0), (0.1, 0.2, 0.75, 0.9))
    return ModelPackage(booster.model_to_string(), Signature(NAMES), "binary", calibration=calibration)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_row_scores_the_same_bits_alone_among_others_and_in_any_order(
    opinionated: ModelPackage, calibrated: bool
) -> None:
    package = opinionated if calibrated else replace(opinionated, calibration=None)
    model, again = package.load(), ModelPackage.from_files(package.to_files()).load()
    matrix = np.where(np.random.default_rng(5).random((500, 3)) < 0.2, np.nan, _matrix(500))
    together = model.predict(matrix).view(np.int64)
    alone = np.concatenate([again.predict(matrix[row : row + 1]) for row in range(500)]).view(np.int64)
    np.testing.assert_array_equal(alone, together)
    order = np.random.default_rng(6).permutation(500)
    np.testing.assert_array_equal(model.predict(np.ascontiguousarray(matrix[order])).view(np.int64), together[order])
    twice = model.predict(np.concatenate([matrix, matrix])).view(np.int64)
    np.testing.assert_array_equal(twice, np.concatenate([together, together]))


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_the_number_of_threads_changes_no_bit_of_a_score(opinionated: ModelPackage, threads: int) -> None:
    booster = lgb.Booster(model_str=opinionated.booster_text)
    matrix = np.where(np.random.default_rng(5).random((5_000, 3)) < 0.2, np.nan, _matrix(5_000))
    one = np.asarray(booster.predict(matrix, num_threads=1)).view(np.int64)
    np.testing.assert_array_equal(np.asarray(booster.predict(matrix, num_threads=threads)).view(np.int64), one)


def test_a_package_comes_back_from_its_files(package: ModelPackage) -> None:
    calibrated = replace(package, calibration=Calibration((0.1, 0.9), (0.2, 0.7)))
    assert ModelPackage.from_files(calibrated.to_files()) == calibrated
    assert ModelPackage.from_files(replace(package, profile=None).to_files()).profile is None


def test_the_same_model_has_the_same_bytes(package: ModelPackage) -> None:
    other = replace(package, metrics=dict(reversed({"brier": 0.1, "auc": 0.75}.items())))
    assert other.to_files() == replace(package, metrics={"brier": 0.1, "auc": 0.75}).to_files()


CALIBRATION = Calibration((0.1, 0.9), (0.2, 0.7))


@pytest.mark.parametrize(
    ("parameters", "calibration", "scale"),
    [
        ({"objective": "binary"}, None, "log-odds"),
        ({"objective": "binary", "sigmoid": 2.0}, None, "log-odds"),
        ({"objective": "binary"}, CALIBRATION, "log-odds"),
        ({"objective": "regression"}, None, "value"),
        ({"objective": "huber"}, None, "value"),
        ({"objective": "regression", "reg_sqrt": True}, None, "square root"),
        ({"objective": "poisson"}, None, "log"),
        ({"objective": "tweedie", "boosting": "dart"}, None, "log"),
    ],
)
def test_contributions_add_up_to_a_raw_score_that_the_formula_turns_into_the_prediction(
    parameters: dict[str, object], calibration: Calibration | None, scale: str
) -> None:
    matrix = _matrix()
    labels = (matrix[:, 0] + matrix[:, 1] > 0).astype(float)
    data = lgb.Dataset(matrix, labels, feature_name=list(NAMES))
    trained = lgb.train({**parameters, "verbosity": -1, "num_threads": 1}, data, 8)
    package = ModelPackage(trained.model_to_string(), Signature(NAMES), "binary", calibration=calibration)
    seen = np.vstack([matrix, np.full((1, 3), np.nan)])
    *contributions, base, raw = package.load().contributions(seen).T
    assert len(contributions) == len(NAMES)
    np.testing.assert_allclose(np.sum(contributions, axis=0) + base, raw, rtol=0, atol=1e-9)
    assert package.raw_scale.name == scale
    words = {"raw_score": raw, "exp": np.exp, "sign": np.sign, "calibrated": calibration}
    said = eval(package.raw_scale.prediction, {}, words)  # noqa: S307 - our own formula
    np.testing.assert_allclose(said, package.load().predict(seen), rtol=1e-9)


def test_no_rows_have_no_contributions(package: ModelPackage) -> None:
    assert package.load().contributions(np.empty((0, 3))).shape == (0, 5)


def test_null_features_and_no_rows_are_predicted(package: ModelPackage) -> None:
    loaded = package.load()
    assert np.isfinite(loaded.predict(np.full((2, 3), np.nan))).all()
    assert loaded.predict(np.empty((0, 3))).shape == (0,)


def test_a_matrix_of_any_memory_order_gives_the_same_scores(package: ModelPackage) -> None:
    loaded = package.load()
    np.testing.assert_array_equal(loaded.predict(np.asfortranarray(_matrix())), loaded.predict(_matrix()))
    np.testing.assert_array_equal(loaded.predict(_matrix()[::2]), loaded.predict(_matrix())[::2])


def test_threads_may_share_a_loaded_model(package: ModelPackage) -> None:
    loaded = package.load()
    expected = loaded.predict(_matrix())
    differing: list[int] = []

    def predict() -> None:
        for _ in range(50):
            differing.extend([1] * (not np.array_equal(loaded.predict(_matrix()), expected)))

    threads = [threading.Thread(target=predict) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differing == []


# ── The signature ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (NAMES[:2], "'behaviour__spend' is missing"),
        ((*NAMES, "behaviour__mood"), "'behaviour__mood' isn't expected"),
        ((NAMES[1], NAMES[0], NAMES[2]), "column 0 is 'behaviour__frequency', not 'behaviour__recency'"),
        ((*NAMES, NAMES[0]), "4 columns, not 3"),
    ],
)
def test_other_columns_are_refused_by_name(package: ModelPackage, names: tuple[str, ...], problem: str) -> None:
    with pytest.raises(SignatureMismatchError, match=problem):
        package.load().predict(np.zeros((1, len(names))), names=names)


@pytest.mark.parametrize("matrix", [np.zeros((1, 2)), np.zeros(3), np.zeros((1, 3), dtype=np.float32)])
def test_a_matrix_of_another_shape_or_type_is_refused(package: ModelPackage, matrix: np.ndarray) -> None:
    with pytest.raises(SignatureMismatchError, match="the feature matrix"):
        package.load().predict(matrix)


def test_a_booster_of_other_features_is_refused(package: ModelPackage) -> None:
    with pytest.raises(SignatureMismatchError, match="the booster"):
        replace(package, signature=Signature(tuple(reversed(NAMES)))).load()


def test_a_feature_knows_its_column() -> None:
    assert Signature(NAMES).column("behaviour__spend") == 2
    with pytest.raises(UnknownFeatureError, match="behaviour__mood"):
        Signature(NAMES).column("behaviour__mood")


@pytest.mark.parametrize("names", [(), ("a", "a")])
def test_a_signature_has_every_feature_once(names: tuple[str, ...]) -> None:
    with pytest.raises(InvalidPackageError, match="each once"):
        Signature(names)


# ── What can't be trusted ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("cut", [0, 10, 1_000])
def test_half_of_a_model_is_refused_before_it_is_parsed(package: ModelPackage, cut: int) -> None:
    with pytest.raises(InvalidPackageError, match="isn't a whole LightGBM model"):
        replace(package, booster_text=package.booster_text[:cut])


@pytest.mark.parametrize("name", [MODEL_FILE, SIGNATURE_FILE, PACKAGE_FILE])
def test_a_missing_file_is_told(package: ModelPackage, name: str) -> None:
    files = package.to_files()
    del files[name]
    with pytest.raises(InvalidPackageError, match=f"{name}.*missing"):
        ModelPackage.from_files(files)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format": 2}'])
@pytest.mark.parametrize("name", [SIGNATURE_FILE, PACKAGE_FILE])
def test_a_file_of_another_format_is_told(package: ModelPackage, name: str, content: bytes) -> None:
    with pytest.raises(InvalidPackageError, match=name):
        ModelPackage.from_files({**package.to_files(), name: content})


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", [MODEL_FILE, SIGNATURE_FILE, PACKAGE_FILE, PROFILE_FILE])
def test_a_pickle_in_a_package_is_refused_and_never_run(
    package: ModelPackage, name: str, protocol: int, tmp_path: Path
) -> None:
    trap = pickle.dumps(_Trap(tmp_path / "ran"), protocol)
    with pytest.raises(InvalidPackageError, match=name.partition(".")[0]):
        ModelPackage.from_files({**package.to_files(), name: trap}).load()
    beside = ModelPackage.from_files({**package.to_files(), "model.pkl": trap})
    assert beside.load().predict(_matrix(2)).shape == (2,)
    assert not (tmp_path / "ran").exists()
    pickle.loads(trap)
    assert (tmp_path / "ran").exists(), "it would have"


def test_features_of_another_type_are_told(package: ModelPackage) -> None:
    signature = orjson.dumps({"format": 1, "features": [["a", "float32"]]})
    with pytest.raises(InvalidPackageError, match="float32"):
        ModelPackage.from_files({**package.to_files(), SIGNATURE_FILE: signature})


def test_an_unknown_objective_is_refused(package: ModelPackage) -> None:
    with pytest.raises(InvalidPackageError, match="ranking"):
        replace(package, objective="ranking")


def test_the_profile_is_a_file_of_its_own(package: ModelPackage) -> None:
    assert orjson.loads(package.to_files()[PROFILE_FILE]) == package.profile


# ── Calibration ─────────────────────────────────────────────────────────────────────


def test_calibration_is_applied_to_the_scores(package: ModelPackage) -> None:
    halved = replace(package, calibration=Calibration((0.0, 1.0), (0.0, 0.5))).load()
    np.testing.assert_allclose(halved.predict(_matrix()), package.load().predict(_matrix()) / 2, rtol=1e-12)


@pytest.mark.parametrize(
    ("scores", "values"),
    [
        ((), ()),
        ((0.1,), (0.1, 0.2)),
        ((0.2, 0.1), (0.1, 0.2)),
        ((0.1, 0.2), (0.2, 0.1)),
        ((0.1, float("nan")), (0.1, 0.2)),
    ],
)
def test_calibration_that_is_no_rising_line_is_refused(scores: tuple[float, ...], values: tuple[float, ...]) -> None:
    with pytest.raises(InvalidPackageError, match="calibration"):
        Calibration(scores, values)


@given(scores=st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_calibration_keeps_the_order_of_scores(scores: list[float]) -> None:
    mapped = Calibration((0.1, 0.3, 0.8), (0.05, 0.05, 0.9))(np.sort(scores))
    assert (np.diff(mapped) >= 0).all()
    assert mapped.min() >= 0.05
    assert mapped.max() <= 0.9
