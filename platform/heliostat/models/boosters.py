"""A LightGBM booster's predictions, without what takes longer than they do; the package's own, bit by bit.

Trees over numbers are walked by our own code (`heliostat.models.trees`), eight rows at once: a quarter of the
library's time. For all others the library's C function is called directly: the package builds a predictor, a text of
parameters and several objects of ctypes for each call, 60 µs or more, where the library takes 6 µs for a row. Where
the installed release isn't one whose interface is known, the package is asked; and whatever gives other bits than the
package in a trial isn't used.

Source: LightGBM's C API, https://lightgbm.readthedocs.io/en/stable/C-API.html, ``LGBM_BoosterPredictForMat``.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from heliostat.models.trees import compiled

if TYPE_CHECKING:
    import lightgbm as lgb

FloatArray = NDArray[np.float64]

_logger = logging.getLogger("heliostat.models")

_KNOWN_RELEASES: Final = ("4",)
# Of the C API: C_API_DTYPE_FLOAT64, C_API_PREDICT_NORMAL, and rows one after the other.
_FLOAT64, _NORMAL, _ROW_MAJOR = 1, 0, 1
# One thread: a replica scores small batches, and its neighbours have the other cores.
_PARAMETERS: Final = b"num_threads=1"
_TRIAL_ROWS = 64


class BoosterPredictor:
    """Predicts; threads may share it.

    Args:
        booster: What predicts.
        text: What it was made of, if that is at hand.
    """

    def __init__(self, booster: lgb.Booster, text: str | None = None) -> None:
        self._booster = booster
        self._columns = booster.num_feature()
        trees = compiled(
            text or booster.model_to_string(),
            n_columns=self._columns,
            n_trees=booster.best_iteration if booster.best_iteration > 0 else None,
        )
        if trees is not None and not self._agrees(trees, trees.trial(_TRIAL_ROWS)):
            _logger.warning("LightGBM's trees aren't walked here: its Python package predicts otherwise")
            trees = None
        self._trees = trees
        call = _function()
        if call is not None and not self._fits(call):
            _logger.warning("LightGBM's library isn't called directly: its Python package predicts otherwise")
            call = None
        self._call = call

    def __call__(self, matrix: FloatArray) -> FloatArray:
        """Predictions, shape ``(n,)``, for features as float64, shape ``(n, n_features)``, with ``n`` at least 1.

        Raises:
            lightgbm.basic.LightGBMError: If the matrix doesn't fit.
        """
        if self._trees is not None and matrix.shape[1] == self._columns:
            return self._trees(np.ascontiguousarray(matrix))
        found = None if self._call is None else self._directly(self._call, matrix)
        if found is None:
            found = self._by_the_package(matrix)
        return found

    def _by_the_package(self, matrix: FloatArray) -> FloatArray:
        return np.asarray(self._booster.predict(matrix, num_threads=1), dtype=np.float64)

    def _directly(self, call: Any, matrix: FloatArray) -> FloatArray | None:  # noqa: ANN401 - a C function
        """The same from the library itself; None if it can't say."""
        rows, columns = matrix.shape
        if columns != self._columns:
            return None
        data, scores, written = np.ascontiguousarray(matrix), np.empty(rows), ctypes.c_int64(0)
        status = call(
            self._booster._handle,
            data.__array_interface__["data"][0],
            _FLOAT64,
            rows,
            columns,
            _ROW_MAJOR,
            _NORMAL,
            0,
            self._booster.best_iteration,
            _PARAMETERS,
            ctypes.byref(written),
            scores.__array_interface__["data"][0],
        )
        return scores if status == 0 and written.value == rows else None

    def _fits(self, call: Any) -> bool:  # noqa: ANN401 - a C function
        """Whether the library says what the package says; of a row of nulls, and others."""
        if self._booster.num_model_per_iteration() != 1:
            return False
        trial = np.random.default_rng(0).normal(scale=100.0, size=(_TRIAL_ROWS, self._columns))
        trial[0] = np.nan
        return self._agrees(partial(self._directly, call), trial)

    def _agrees(self, predict: Callable[[FloatArray], FloatArray | None], trial: FloatArray) -> bool:
        """Whether something says of rows what the package says."""
        found = predict(trial)
        return found is not None and found.tobytes() == self._by_the_package(trial).tobytes()


@functools.cache
def _function() -> Any:  # noqa: ANN401 - a C function, or None
    """The library's function; None if the release isn't known to have it as we call it."""
    import lightgbm as lgb

    library = getattr(lgb.basic, "_LIB", None)
    if lgb.__version__.partition(".")[0] not in _KNOWN_RELEASES or not isinstance(library, ctypes.CDLL):
        return None
    # The library that is loaded already, under a name of our own: types that we declare aren't the package's.
    function = ctypes.CDLL(library._name).LGBM_BoosterPredictForMat
    function.restype = ctypes.c_int
    function.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    return function
