"""The properties draw what they say: every function of the vocabulary, over every kind of window."""

from __future__ import annotations

import pytest

from heliostat.clock import US_PER_DAY
from heliostat.features import aggregations
from heliostat.features.aggregations import Aggregation, DistinctDays, First, Last, Latest, Quantile
from tests.strategies import AGGREGATIONS

FUNCTIONS = {each for each in vars(aggregations).values() if isinstance(each, type) and issubclass(each, Aggregation)}


def test_every_function_is_drawn_under_every_hop() -> None:
    for prepared in AGGREGATIONS.values():
        assert {type(each) for each in prepared} == FUNCTIONS - {Aggregation}


@pytest.mark.parametrize("hop", AGGREGATIONS)
def test_every_function_is_drawn_over_every_window_of_its_hop(hop: str | None) -> None:
    drawn: dict[type[Aggregation], set[int | None]] = {}
    for each in AGGREGATIONS[hop]:
        drawn.setdefault(type(each), set()).add(each.window_us)
    windows = set.union(*drawn.values())
    assert None in windows, "a lifetime"
    assert len(windows) >= 4
    days = {window for window in windows if window is not None and window % US_PER_DAY == 0}
    assert drawn.pop(DistinctDays) == days
    assert drawn.pop(Quantile) <= windows, "but not over those whose rings were too large"
    for function, over in drawn.items():
        assert over == windows, function


def test_texts_are_drawn_as_their_codes() -> None:
    for prepared in AGGREGATIONS.values():
        of_texts = {type(each) for each in prepared if isinstance(each.column, str) and each.column == "kind"}
        assert of_texts >= {First, Last, Latest}
