"""The churn use case, in processes where some versions of its model are bad on purpose: for benchmarks/chaos.py.

A version's booster says by one of its parameters what is wrong with it. It predicts well what every version is
tried with before it serves, nulls alone: what is wrong shows with the first real request.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from configs.churn import definitions
from heliostat.models.packaging import LoadedModel

MARK = "[chaos: {}]"
"""A line of a booster's parameters."""

globals().update({name: each for name, each in vars(definitions).items() if not name.startswith("_")})

predict_rightly = LoadedModel.predict


def _predict(self: LoadedModel, matrix: NDArray[np.float64], **how: object) -> NDArray[np.float64]:
    if not np.isnan(matrix).all():
        if MARK.format("raises") in self.package.booster_text:
            raise ZeroDivisionError("a model that raises")
        if MARK.format("hangs") in self.package.booster_text:
            threading.Event().wait()
    return predict_rightly(self, matrix, **how)  # type: ignore[arg-type] # names


LoadedModel.predict = _predict  # type: ignore[method-assign, assignment] # for marked boosters only
