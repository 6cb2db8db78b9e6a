"""A trained model as a few readable files, and back: never a pickle.

``model.txt``       LightGBM's own text
``signature.json``  the features that the matrix's columns are, in order, with their types
``profile.json``    the reference profile that drift is measured against, if there is one
``package.json``    objective, calibration, parameters, metrics, known categories

The files say the same things the same way each time, so that the same model has the same
digest (see `heliostat.storage.artifact_store`). The profile is any JSON document here: what
it means is `heliostat.models.profile`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from heliostat.errors import InvalidPackageError, SignatureMismatchError, UnknownFeatureError
from heliostat.models.boosters import BoosterPredictor
from heliostat.models.categories import Categories
from heliostat.models.definitions import ModelSpec

if TYPE_CHECKING:
    import lightgbm as lgb

FloatArray = NDArray[np.float64]
Document = Mapping[str, Any]

MODEL_FILE: Final = "model.txt"
SIGNATURE_FILE: Final = "signature.json"
PROFILE_FILE: Final = "profile.json"
PACKAGE_FILE: Final = "package.json"
_FORMAT: Final = 1
_DTYPE: Final = "float64"
_CATEGORY: Final = "category"


@dataclass(frozen=True, slots=True)
class Signature:
    """What the columns of a model's matrix are.

    Attributes:
        names: Qualified feature names, ``view__feature``, in the matrix's order.
        categorical: Those of them that are categories: codes of texts.
        inputs: What a request has to bring: name and type.
    """

    names: tuple[str, ...]
    categorical: tuple[str, ...] = ()
    inputs: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise InvalidPackageError("signature", "it needs features, each once")

    @classmethod
    def of(cls, spec: ModelSpec) -> Signature:
        """The signature that a declared model's versions have."""
        return cls(spec.feature_names, spec.categorical, tuple(spec.inputs.items()))

    def check(self, names: Sequence[str], *, what: str) -> None:
        """Refuse other names, other numbers and another order.

        Args:
            names: The columns that are there.
            what: How the message names them.

        Raises:
            SignatureMismatchError: Saying which are missing, unexpected or out of order.
        """
        given = tuple(names)
        if given == self.names:
            return
        problems = [f"{name!r} is missing" for name in self.names if name not in given]
        problems += [f"{name!r} isn't expected" for name in given if name not in self.names]
        if not problems and len(given) != len(self.names):
            problems.append(f"there are {len(given)} columns, not {len(self.names)}")
        if not problems:
            first = next(i for i, name in enumerate(self.names) if given[i] != name)
            problems.append(f"column {first} is {given[first]!r}, not {self.names[first]!r}")
        raise SignatureMismatchError(what, tuple(problems), self.names)

    def column(self, name: str) -> int:
        """The column of a feature.

        Raises:
            UnknownFeatureError: If the model doesn't use it.
        """
        try:
            return self.names.index(name)
        except ValueError:
            raise UnknownFeatureError(name, "the model's signature", self.names) from None

    def to_document(self) -> dict[str, Any]:
        """As a JSON object."""
        types = dict.fromkeys(self.names, _DTYPE) | dict.fromkeys(self.categorical, _CATEGORY)
        document = {"format": _FORMAT, "features": [[name, types[name]] for name in self.names]}
        return {**document, "inputs": [list(each) for each in self.inputs]} if self.inputs else document

    @classmethod
    def from_document(cls, document: Document) -> Signature:
        """The reverse of `to_document`.

        Raises:
            InvalidPackageError: If the document is of another format.
        """
        _check_format(document, SIGNATURE_FILE)
        for name, dtype in document["features"]:
            if dtype not in (_DTYPE, _CATEGORY):
                known = f"{_DTYPE} and {_CATEGORY}"
                raise InvalidPackageError(SIGNATURE_FILE, f"feature {name!r} is {dtype}; this release reads {known}")
        return cls(
            tuple(name for name, _ in document["features"]),
            tuple(name for name, dtype in document["features"] if dtype == _CATEGORY),
            tuple((name, dtype) for name, dtype in document.get("inputs", ())),
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """A monotone, piecewise linear map from scores to probabilities; constant beyond its ends.

    Attributes:
        scores: The model's own scores, strictly ascending, at least one.
        values: What they are mapped to, not descending.
    """

    scores: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        scores, values = np.asarray(self.scores), np.asarray(self.values)
        if not self.scores or len(self.scores) != len(self.values):
            raise InvalidPackageError("calibration", "it needs as many values as scores, and at least one")
        if not (np.isfinite(scores).all() and np.isfinite(values).all()):
            raise InvalidPackageError("calibration", "its points must be finite")
        if (np.diff(scores) <= 0).any() or (np.diff(values) < 0).any():
            raise InvalidPackageError("calibration", "its scores must rise and its values not fall")

    def __call__(self, scores: FloatArray) -> FloatArray:
        """Map scores, shape ``(n,)``."""
        return np.interp(scores, self.scores, self.values)


@dataclass(frozen=True, slots=True)
class RawScale:
    """What a booster adds up, and how a prediction comes of it.

    Attributes:
        name: ``log-odds``, ``log``, ``square root`` or ``value``: what a raw score, and so a contribution, is.
        prediction: The prediction as a formula of ``raw_score``.
    """

    name: str
    prediction: str

    @classmethod
    def of(cls, booster_text: str, *, calibrated: bool) -> RawScale:
        """The scale of a booster, as its text tells it."""
        objective, *options = (booster_text.partition("\nobjective=")[2].partition("\n")[0] or "none").split()
        name, formula = "value", "raw_score"
        if objective == "binary":
            sigmoid = next((each.removeprefix("sigmoid:") for each in options if each.startswith("sigmoid:")), "1")
            name = "log-odds"
            formula = "1 / (1 + exp(-raw_score))" if sigmoid == "1" else f"1 / (1 + exp(-{sigmoid} * raw_score))"
        elif objective in ("poisson", "gamma", "tweedie"):
            name, formula = "log", "exp(raw_score)"
        elif "sqrt" in options:
            name, formula = "square root", "sign(raw_score) * raw_score ** 2"
        return cls(name, f"calibrated({formula})" if calibrated else formula)


AS_IT_IS: Final = RawScale("value", "raw_score")
"""Where a prediction is what was added up."""


@dataclass(frozen=True)
class ModelPackage:
    """Everything about a trained model that goes with it wherever it is used.

    Attributes:
        booster_text: LightGBM's text, ``booster.model_to_string()``, of the best iteration.
        signature: Its features, in order.
        objective: ``binary`` (scores are probabilities) or ``regression``.
        profile: The reference profile as a JSON object, or None.
        metrics: Figures from its evaluation, as a JSON object.
        parameters: What it was trained with, as a JSON object.
        calibration: Applied to the booster's scores, or None.
        categories: What the booster knows of each categorical feature.

    Raises:
        InvalidPackageError: If the parts contradict each other or can't be read.
    """

    booster_text: str
    signature: Signature
    objective: str
    profile: Document | None = None
    metrics: Document = field(default_factory=dict)
    parameters: Document = field(default_factory=dict)
    calibration: Calibration | None = None
    categories: Categories = field(default_factory=Categories)

    def __post_init__(self) -> None:
        # LightGBM ends the whole process when it is given half of a model, so it isn't.
        if not self.booster_text.startswith("tree\n") or "\nend of trees\n" not in self.booster_text:
            raise InvalidPackageError(MODEL_FILE, "it isn't a whole LightGBM model")
        if self.objective not in ("binary", "regression"):
            raise InvalidPackageError(PACKAGE_FILE, f"objective {self.objective!r} isn't binary or regression")

    @property
    def memory_bytes(self) -> int:
        """What it takes when it is loaded, about: its text, as much for the booster, and half of it for its trees."""
        return 5 * len(self.booster_text) // 2 + 65_536

    @property
    def raw_scale(self) -> RawScale:
        """What contributions to its predictions are measured in."""
        return RawScale.of(self.booster_text, calibrated=self.calibration is not None)

    def to_files(self) -> dict[str, bytes]:
        """The files, by name: what an artifact store keeps."""
        calibration = self.calibration and [list(self.calibration.scores), list(self.calibration.values)]
        package = {
            "format": _FORMAT,
            "objective": self.objective,
            "calibration": calibration,
            "metrics": self.metrics,
            "parameters": self.parameters,
        }
        if self.categories:
            package["categories"] = self.categories.to_document()
        files = {
            MODEL_FILE: self.booster_text.encode(),
            SIGNATURE_FILE: _to_json(self.signature.to_document()),
            PACKAGE_FILE: _to_json(package),
        }
        if self.profile is not None:
            files[PROFILE_FILE] = _to_json(self.profile)
        return files

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> ModelPackage:
        """The reverse of `to_files`.

        Raises:
            InvalidPackageError: If a file is missing, or of another format.
        """
        for name in (MODEL_FILE, SIGNATURE_FILE, PACKAGE_FILE):
            if name not in files:
                raise InvalidPackageError(name, f"the file is missing; there are: {', '.join(files) or 'none'}")
        package = _from_json(PACKAGE_FILE, files[PACKAGE_FILE])
        _check_format(package, PACKAGE_FILE)
        calibration = package["calibration"]
        return cls(
            booster_text=_to_text(MODEL_FILE, files[MODEL_FILE]),
            signature=Signature.from_document(_from_json(SIGNATURE_FILE, files[SIGNATURE_FILE])),
            objective=package["objective"],
            profile=_from_json(PROFILE_FILE, files[PROFILE_FILE]) if PROFILE_FILE in files else None,
            metrics=package["metrics"],
            parameters=package["parameters"],
            calibration=None if calibration is None else Calibration(tuple(calibration[0]), tuple(calibration[1])),
            categories=Categories.from_document(package.get("categories", {})),
        )

    def load(self) -> LoadedModel:
        """A model that predicts.

        Raises:
            InvalidPackageError: If the booster can't be read.
            SignatureMismatchError: If the booster was trained on other features.
        """
        # It imports scikit-learn and scipy: programs that only look at versions don't wait for that.
        import lightgbm as lgb

        try:
            booster = lgb.Booster(model_str=self.booster_text)
        except lgb.basic.LightGBMError as error:
            raise InvalidPackageError(MODEL_FILE, str(error)) from error
        self.signature.check(booster.feature_name(), what="the booster")
        return LoadedModel(self, booster)


class LoadedModel:
    """A model that predicts; threads may share it.

    Args:
        package: Where it comes from.
        booster: The package's booster.
    """

    def __init__(self, package: ModelPackage, booster: lgb.Booster) -> None:
        self.package = package
        self._booster, self._scores = booster, BoosterPredictor(booster, package.booster_text)

    @property
    def signature(self) -> Signature:
        """The features of the matrix's columns, in order."""
        return self.package.signature

    def predict(self, matrix: FloatArray, *, names: Sequence[str] | None = None) -> FloatArray:
        """Scores: probabilities for a binary objective, else values. Runs on the calling thread alone.

        Args:
            matrix: Features, shape ``(n, n_features)``, float64; NaN where there is none.
            names: The columns' names, checked if given.

        Returns:
            Shape ``(n,)``.

        Raises:
            SignatureMismatchError: If names, order, number or type of the columns don't fit.
        """
        if names is not None:
            self.signature.check(names, what="the feature matrix")
        if len(known := self._encoded(matrix)) == 0:
            return np.empty(0, dtype=np.float64)
        scores = self._scores(known)
        return scores if self.package.calibration is None else self.package.calibration(scores)

    def contributions(self, matrix: FloatArray) -> FloatArray:
        """What features add to the raw score (`ModelPackage.raw_scale`): ten to fifty times as slow as `predict`.

        Args:
            matrix: As for `predict`.

        Returns:
            Shape ``(n, n_features + 2)``: a column a feature, then the base value, which is the score of nobody
            in particular, then the raw score: the sum of all columns before it, but for rounding.

        Raises:
            SignatureMismatchError: If number or type of the columns don't fit.
        """
        if len(known := self._encoded(matrix)) == 0:
            return np.empty((0, len(self.signature.names) + 2), dtype=np.float64)
        parts = np.asarray(self._booster.predict(known, pred_contrib=True, num_threads=1), dtype=np.float64)
        raw = np.asarray(self._booster.predict(known, raw_score=True, num_threads=1), dtype=np.float64)
        return np.column_stack([parts, raw])

    def _encoded(self, matrix: FloatArray) -> FloatArray:
        """A matrix as the booster takes it, if it is one that fits the signature."""
        expected = self.signature.names
        if matrix.ndim != 2 or matrix.shape[1] != len(expected):
            problem = f"it has shape {matrix.shape}, not (n, {len(expected)})"
            raise SignatureMismatchError("the feature matrix", (problem,), expected)
        if matrix.dtype != np.float64:
            raise SignatureMismatchError("the feature matrix", (f"it is {matrix.dtype}, not {_DTYPE}",), expected)
        return self.package.categories.encoded(matrix, expected)


def _check_format(document: Document, file: str) -> None:
    if document.get("format") != _FORMAT:
        raise InvalidPackageError(file, f"its format is {document.get('format')!r}; this release reads {_FORMAT}")


def _to_json(document: Document) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY)


def _to_text(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InvalidPackageError(name, f"it is no text: {error.reason}") from error


def _from_json(name: str, content: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise InvalidPackageError(name, f"it isn't JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidPackageError(name, "it isn't a JSON object")
    return document
