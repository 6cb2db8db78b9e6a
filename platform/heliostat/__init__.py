"""Heliostat: a production machine-learning platform on Ray.

This is the declaring vocabulary; importing it loads no Ray and starts nothing. A name is loaded
when it is first used, so that a program that only talks to a gateway (`heliostat.client`) loads
neither Arrow nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heliostat.features.aggregations import (
        Count,
        CountDistinct,
        DistinctDays,
        First,
        FloatArray,
        Last,
        Latest,
        Max,
        Mean,
        Min,
        Quantile,
        StdDev,
        Sum,
        TimeSinceLast,
    )
    from heliostat.features.definitions import Entity, EventSource, FeatureRef, FeatureView, ProfileSource
    from heliostat.features.precomputed import PrecomputedView
    from heliostat.models.definitions import Gate, Label, ModelSpec, Population

__all__ = [
    "Count",
    "CountDistinct",
    "DistinctDays",
    "Entity",
    "EventSource",
    "FeatureRef",
    "FeatureView",
    "First",
    "FloatArray",
    "Gate",
    "Label",
    "Last",
    "Latest",
    "Max",
    "Mean",
    "Min",
    "ModelSpec",
    "Population",
    "PrecomputedView",
    "ProfileSource",
    "Quantile",
    "StdDev",
    "Sum",
    "TimeSinceLast",
]

_ROOMS = (
    "heliostat.features.aggregations",
    "heliostat.features.definitions",
    "heliostat.features.precomputed",
    "heliostat.models.definitions",
)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the vocabulary holds
    if name in __all__:
        for room in _ROOMS:
            found = getattr(import_module(room), name, None)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module 'heliostat' has no attribute {name!r}; its vocabulary is {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
