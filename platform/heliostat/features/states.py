"""Partial results: what is kept of events, and how two of a kind become one.

A `State` merges with another of its kind in any order, so that tiles can be added up offline,
inside the online server and at read time, with the same outcome.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from heliostat.features.inputs import Input

Operator = Literal["add", "min", "max", "first", "last"]
StateInput = Literal["one", "value", "time"]

IDENTITY: Mapping[str, float] = {"add": 0.0, "min": np.inf, "max": -np.inf, "first": np.inf, "last": -np.inf}
"""What an empty state holds; of ``first`` and ``last`` it is the time's, their tie and value are 0."""


@dataclass(frozen=True, eq=False)
class State:
    """One mergeable partial result.

    Attributes:
        op: How two partials of the same tile merge.
        of: What an event contributes: 1, the input's value, or its event time in microseconds.
        source: The column and condition behind it.
        across: How partials of different tiles merge; the same as ``op`` except for `DistinctDays`.
    """

    op: Operator
    of: StateInput
    source: Input
    across: Operator | None = None

    @property
    def width(self) -> int:
        """How many f8 columns it takes: ``first`` and ``last`` keep (event time, tie, value)."""
        return 3 if self.op in ("first", "last") else 1

    @property
    def merge_across(self) -> Operator:
        """How partials of different tiles merge."""
        return self.across or self.op

    @property
    def key(self) -> str:
        """Equal for states that two aggregations can share."""
        return f"{self.op}/{self.merge_across} {self.of} {self.source.key}"
