"""Rings in memory: events packed as history has them, merged as a request reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliostat.clock import US_PER_DAY, US_PER_HOUR, parse_instant_us
from heliostat.features.aggregations import (
    Count,
    CountDistinct,
    DistinctDays,
    First,
    Last,
    Max,
    Mean,
    Quantile,
    StdDev,
    Sum,
    TimeSinceLast,
    evaluate,
)
from heliostat.features.definitions import FeatureView
from heliostat.features.offline import unique_events
from heliostat.online.merging import MergePlan, merge_rings, parse_rings
from heliostat.online.tiles import (
    RingLayout,
    RingLimits,
    Rings,
    event_slots,
    pack_rings,
    ring_layout,
    tile_states,
)
from heliostat.schema import hash64, tie48, times_us
from tests.oracles import Oracle
from tests.strategies import KEYS, ORIGIN_US, SOURCES, SPAN_US, USER, event_streams, views

LIMITS = RingLimits(lateness_us=US_PER_DAY, future_tolerance_us=60_000_000)
NOW_US = parse_instant_us("1998-04-20T10:00:00")


def view_of(features: dict[str, Any], **options: Any) -> FeatureView:
    return FeatureView("view", version=1, source=SOURCES[USER.name], features=features, **options)


def rings_of(layout: RingLayout, events: pa.Table, keys: list[tuple[Any, ...]], as_of_us: int) -> dict[str, Rings]:
    """The rings of the keys' entities, by group label."""
    source, entity = layout.view.source, layout.view.entity
    events = unique_events(source, events)
    events = events.filter(pc.less(events[source.event_time].cast(pa.int64()), as_of_us))
    order = {
        text: code for code, text in enumerate(entity.encoded([entity.text(key[0]) for key in keys]).to_pylist())
    }
    codes = np.array([order[key] for key in entity.encode(events).to_pylist()], np.int64)
    times, ties = times_us(events[source.event_time]), tie48(hash64(events[source.event_id]))
    by_time = np.lexsort((ties, times, codes))
    events, codes, times, ties = events.take(pa.array(by_time)), codes[by_time], times[by_time], ties[by_time]
    inputs = evaluate(events, layout.inputs)
    return {
        group.label: pack_rings(
            group,
            tile_states(group, codes, times, ties, inputs),
            len(keys),
            as_of_us=as_of_us,
            limits=layout.limits,
        )
        for group in layout.groups
    }


def features_of(layout: RingLayout, rings: dict[str, Rings], as_of_us: int) -> dict[str, np.ndarray]:
    with np.errstate(all="raise"):
        return merge_rings(MergePlan(layout, list(layout.view.base_features)), rings, as_of_us=as_of_us).columns


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_packed_and_merged_rings_are_what_the_contract_says(data: st.DataObject) -> None:
    events, view = data.draw(event_streams()), data.draw(views())
    as_of_us = data.draw(st.integers(ORIGIN_US, ORIGIN_US + SPAN_US))
    limits = RingLimits(data.draw(st.sampled_from([1, US_PER_HOUR, 3 * US_PER_DAY])), 60_000_000)
    layout, keys = ring_layout(view, limits), KEYS[USER.name]
    found = features_of(layout, rings_of(layout, events, keys, as_of_us), as_of_us)
    oracle = Oracle(view, events)
    for row, key in enumerate(keys):
        for name, answer in oracle.answer(key, as_of_us).items():
            assert answer.accepts(found[name][row]), (view.describe(), key, name, found[name][row], answer)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_rings_made_earlier_answer_a_later_question_as_long_as_nothing_happened(data: st.DataObject) -> None:
    events, view = data.draw(event_streams()), data.draw(views())
    layout, keys = ring_layout(view, LIMITS), KEYS[USER.name]
    made_us = ORIGIN_US + SPAN_US + 1
    asked_us = made_us + data.draw(st.integers(0, 40 * US_PER_DAY))
    found = features_of(layout, rings_of(layout, events, keys, made_us), asked_us)
    oracle = Oracle(view, events)
    for row, key in enumerate(keys):
        for name, answer in oracle.answer(key, asked_us).items():
            assert answer.accepts(found[name][row]), (view.describe(), key, name, found[name][row], answer)


def test_a_ring_reaches_over_the_contracts_tiles_and_one_for_events_from_the_future() -> None:
    layout = ring_layout(view_of({"n": Count(window="30d"), "m": Count(window="12d")}), LIMITS)
    (group,) = layout.groups
    assert (group.label, group.n_slots) == ("1d", 30 + 1 + 1)


def test_windows_of_different_hops_are_rings_of_their_own_and_no_window_is_life() -> None:
    view = view_of({"a": Count(window="30d"), "b": Count(window="1d"), "c": Count(window="5m"), "d": Count()})
    assert [group.label for group in ring_layout(view, LIMITS).groups] == ["5m", "1h", "1d", "life"]


def test_equal_states_are_kept_once() -> None:
    view = view_of(
        {"n": Count("amount", window="30d"), "s": Sum("amount", window="12d"), "m": Mean("amount", window="20d")}
    )
    (group,) = ring_layout(view, LIMITS).groups
    assert group.width == 1 + 2


def test_a_life_ring_reaches_back_as_far_as_events_may_be_late() -> None:
    view = view_of({"n": Count()})
    (one_day,) = ring_layout(view, LIMITS).groups
    (ten_days,) = ring_layout(view, RingLimits(10 * US_PER_DAY, 60_000_000)).groups
    assert (one_day.n_slots, ten_days.n_slots) == (1 + 3, 1 + 12)


def test_the_order_of_features_doesnt_change_the_bytes() -> None:
    features = {"n": Count(window="30d"), "s": Sum("amount", window="30d"), "l": Last("quantity", window="30d")}
    (one,) = ring_layout(view_of(features), LIMITS).groups
    (other,) = ring_layout(view_of(dict(reversed(features.items()))), LIMITS).groups
    assert (one.name, one.descriptor) == (other.name, other.descriptor)


@pytest.mark.parametrize(
    ("features", "limits"),
    [
        ({"n": Count(window="31d")}, LIMITS),
        ({"n": Count("amount", window="30d")}, LIMITS),
        ({"n": Max("quantity", window="30d")}, LIMITS),
        ({"n": Count(window="30d"), "d": DistinctDays(window="30d")}, LIMITS),
    ],
)
def test_another_layout_has_another_name(features: dict[str, Any], limits: RingLimits) -> None:
    (usual,) = ring_layout(view_of({"n": Count(window="30d")}), LIMITS).groups
    (other,) = ring_layout(view_of(features), limits).groups
    assert usual.label == other.label
    assert usual.name != other.name


def test_every_parameter_of_a_state_is_part_of_the_rings_name() -> None:
    """Bytes of other bins or other categories would be read as if they were one's own."""
    median = {"q": 0.5, "between": (1.0, 100.0), "window": "30d"}
    features: list[Any] = [
        Sum("amount", window="30d"),
        StdDev("amount", window="30d"),
        StdDev("quantity", window="30d"),
        CountDistinct("kind", categories=("a", "b"), window="30d"),
        CountDistinct("kind", categories=("a", "c"), window="30d"),
        CountDistinct("kind", categories=("a", "b", "c"), window="30d"),
        Quantile("amount", **median),
        Quantile("amount", **{**median, "between": (1.0, 101.0)}),
        Quantile("amount", **{**median, "between": (1.1, 100.0)}),
        Quantile("amount", **median, relative_error=0.051),
        Quantile("amount", **median, signed=False),
    ]
    names = [ring_layout(view_of({"f": each}), LIMITS).groups[0].name for each in features]
    assert len(set(names)) == len(names)
    # Another quantile of the same bins is read from the same bytes.
    both = view_of({"f": features[6], "g": Quantile("amount", **{**median, "q": 0.9})})
    assert ring_layout(both, LIMITS).groups[0].name == names[6]


def test_only_life_rings_depend_on_the_lateness() -> None:
    view = view_of({"n": Count(window="30d"), "m": Count()})
    usual, longer = (ring_layout(view, RingLimits(days * US_PER_DAY, 60_000_000)) for days in (1, 2))
    assert usual.groups[0].name == longer.groups[0].name
    assert usual.groups[1].name != longer.groups[1].name


def test_a_ttl_adds_the_last_event_to_life_and_lets_windows_be_forgotten() -> None:
    window, life = ring_layout(view_of({"n": Count(window="30d")}, ttl="2d"), LIMITS).groups
    assert [state.key for state in life.states] == ["max/max time None | None"]
    assert window.expire_us >= 31 * US_PER_DAY
    assert life.expire_us >= 2 * US_PER_DAY


def test_what_lasts_for_ever_is_never_forgotten() -> None:
    for group in ring_layout(view_of({"n": Count(), "t": TimeSinceLast()}, ttl="2d"), LIMITS).groups:
        assert group.expire_us == 0


def test_an_event_that_no_state_counts_touches_no_ring() -> None:
    view = view_of({"n": Count(window="30d", where=pc.field("kind") == "purchase"), "s": Sum("amount", window="30d")})
    (group,) = ring_layout(view, LIMITS).groups
    events = pa.table(
        {
            "amount": pa.array([1.0, None, None, float("nan")]),
            "kind": pa.array(["login", "purchase", "login", None]),
        }
    )
    times = np.full(4, NOW_US)
    slots, touched = event_slots(group, evaluate(events, [state.source for state in group.states]), times, times * 0)
    assert touched.tolist() == [True, True, False, False]
    np.testing.assert_array_equal(slots[2, 1:], group.empty_slot[1:])


def test_a_tile_before_1970_is_a_tile() -> None:
    view = view_of({"n": Count(window="30d"), "f": First("amount")})
    layout = ring_layout(view, LIMITS)
    event_us = -US_PER_DAY // 2
    events = pa.table(
        {
            "user_id": pa.array([7]),
            "event_id": pa.array(["a"]),
            "at": pa.array([event_us]).cast(pa.timestamp("us", "UTC")),
            "amount": pa.array([4.0]),
        }
    )
    found = features_of(layout, rings_of(layout, events, [(7,)], 1), 1)
    assert (found["n"][0], found["f"][0]) == (1.0, 4.0)


def test_a_negative_zero_is_zero_as_it_is_offline() -> None:
    events = pa.table(
        {
            "user_id": pa.array([7]),
            "event_id": pa.array(["a"]),
            "at": pa.array([NOW_US - 1]).cast(pa.timestamp("us", "UTC")),
            "amount": pa.array([-0.0]),
        }
    )
    layout = ring_layout(view_of({"last": Last("amount"), "max": Max("amount", window="1d")}), LIMITS)
    found = features_of(layout, rings_of(layout, events, [(7,)], NOW_US), NOW_US)
    assert not np.signbit([found["last"][0], found["max"][0]]).any()


def test_a_base_counts_for_a_reader_whose_clock_is_days_behind_as_well() -> None:
    layout = ring_layout(view_of({"n": Count()}), LIMITS)
    rings = {"life": Rings(np.array([[NOW_US // US_PER_DAY, 5.0]]), np.array([1]))}
    assert features_of(layout, rings, NOW_US - 3 * US_PER_DAY)["n"].tolist() == [5.0]


def test_missing_rings_read_as_no_events_at_all() -> None:
    view = view_of(
        {"n": Count(window="30d"), "s": Sum("amount"), "l": Last("amount", window="30d"), "t": TimeSinceLast()}
    )
    layout = ring_layout(view, LIMITS)
    rings = {group.label: parse_rings(group, [b"", b""]) for group in layout.groups}
    found = features_of(layout, rings, NOW_US)
    assert found["n"].tolist() == [0.0, 0.0]
    assert found["s"].tolist() == [0.0, 0.0]
    assert np.isnan(found["l"]).all()
    assert np.isnan(found["t"]).all()
