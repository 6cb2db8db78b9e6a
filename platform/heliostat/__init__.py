"""Heliostat: a production machine-learning platform on Ray.

This is the declaring vocabulary; importing it loads no Ray and starts nothing.
"""

from heliostat.features.aggregations import (
    Count,
    DistinctDays,
    First,
    FloatArray,
    Last,
    Latest,
    Max,
    Mean,
    Min,
    Sum,
    TimeSinceLast,
)
from heliostat.features.definitions import Entity, EventSource, FeatureRef, FeatureView
from heliostat.models.definitions import Gate, Label, ModelSpec, Population

__all__ = [
    "Count",
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
    "Sum",
    "TimeSinceLast",
]
