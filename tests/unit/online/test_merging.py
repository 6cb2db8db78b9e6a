"""Slots merged as of an instant: what counts, what doesn't, and what must not leak into what does."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pytest

from heliostat.clock import US_PER_DAY
from heliostat.features.aggregations import Count, First, Last, Mean, Sum
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.features.states import FloatArray
from heliostat.online import compiled
from heliostat.online.merging import MergePlan, merge_rings, parse_rings
from heliostat.online.tiles import RingLimits, Rings, ring_layout
from heliostat.schema import TIMESTAMP

NOW_US = 20_000 * US_PER_DAY + US_PER_DAY // 2
LIMITS = RingLimits(US_PER_DAY, 0)

user = Entity("user", keys={"user_id": "int64"})
sales = EventSource(
    "sales",
    schema=pa.schema({"id": pa.int64(), "user_id": pa.int64(), "at": TIMESTAMP, "amount": pa.float64()}),
    entity=user,
    event_time="at",
    event_id="id",
)
view = FeatureView(
    "recent",
    version=1,
    source=sales,
    features={
        "n": Count(window="20d"),
        "mean": Mean("amount", window="20d"),
        "n_short": Count(window="12d"),
        "total_short": Sum("amount", window="12d"),
        "last": Last("amount", window="20d"),
        "first": First("amount", window="20d"),
    },
)
LAYOUT = ring_layout(view, LIMITS)
(GROUP,) = LAYOUT.groups


def ring(*tiles: tuple[int, float, float, float]) -> FloatArray:
    """One entity's slots from (days ago, sum of amounts, time of the only event, tie)."""
    slots = np.tile(GROUP.empty_slot, (len(tiles), 1))
    for slot, (days, total, time_us, tie) in zip(slots, sorted(tiles, reverse=True), strict=True):
        slot[0] = 20_000 - days
        for state in GROUP.states:
            place = GROUP.columns[state.key]
            one: list[float] = [time_us, tie, total] if state.width == 3 else [1.0 if state.of == "one" else total]
            slot[place] = one
    return slots


def merged(*rings: FloatArray) -> dict[str, list[float]]:
    read = Rings(np.concatenate(rings), np.array([len(each) for each in rings]))
    found = merge_rings(MergePlan(LAYOUT, list(view.base_features)), {GROUP.label: read}, as_of_us=NOW_US)
    return {name: values.tolist() for name, values in found.columns.items()}


def test_one_product_adds_up_what_counts_for_each_window() -> None:
    found = merged(ring((1, 4.0, 100.0, 1.0), (15, 6.0, 50.0, 1.0), (40, 99.0, 1.0, 1.0)), ring())
    assert found["n"] == [2.0, 0.0]
    assert found["mean"][0] == 5.0
    assert np.isnan(found["mean"][1])
    assert (found["n_short"], found["total_short"]) == ([1.0, 0.0], [4.0, 0.0])


@pytest.mark.parametrize("huge", [np.inf, -np.inf, np.nan])
def test_a_sum_beyond_all_numbers_costs_nobody_who_doesnt_count_it(huge: float) -> None:
    found = merged(ring((1, 4.0, 100.0, 1.0), (15, huge, 50.0, 1.0)), ring((2, 3.0, 90.0, 1.0)))
    assert found["total_short"] == [4.0, 3.0]
    assert not np.isfinite(found["mean"][0])
    assert found["mean"][1] == 3.0


def test_of_two_slots_with_one_time_the_tie_decides() -> None:
    early, late = (1, 4.0, 100.0, 7.0), (2, 8.0, 100.0, 9.0)
    found = merged(ring(early, late), ring((1, 5.0, 80.0, 1.0)), ring())
    assert found["last"][:2] == [8.0, 5.0]
    assert found["first"][:2] == [4.0, 5.0]
    assert np.isnan([found["last"][2], found["first"][2]]).all()


def test_a_ring_of_half_a_slot_is_never_read() -> None:
    slot = GROUP.empty_slot.tobytes()
    with pytest.raises(ValueError, match="length"):
        parse_rings(GROUP, [slot, slot[8:]])
    with pytest.raises(ValueError, match="length"):
        parse_rings(GROUP, [slot + slot[:8], slot[:-8]])


def test_a_ring_has_as_many_slots_as_it_has_tiles() -> None:
    rings = parse_rings(GROUP, [ring((3, 1.0, 5.0, 1.0), (9, 2.0, 4.0, 1.0)).tobytes(), b"", b""])
    assert rings.counts.tolist() == [2, 0, 0]
    assert rings.slots[:, 0].tolist() == [20_000 - 9, 20_000 - 3]
    assert [len(each) for each in rings.to_bytes().split()] == [2 * GROUP.slot_bytes, 0, 0]


def test_the_online_read_is_compiled_wherever_there_is_a_compiler() -> None:
    assert compiled.AVAILABLE or shutil.which("cc") is None


def test_a_long_run_is_added_up_one_after_the_other() -> None:
    amounts = np.random.default_rng(3).normal(0, 1e6, 21).tolist()
    total = 0.0
    for amount in reversed(amounts):  # the oldest is the first
        total += amount
    found = merged(*(ring(*((day, amount, 9.0, 1.0) for day, amount in enumerate(amounts))) for _ in range(2)))
    assert found["mean"] == [total / 21] * 2
