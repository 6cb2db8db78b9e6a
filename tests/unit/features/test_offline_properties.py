"""The offline kernel against the brute-force oracle, for any events, views and instants."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliostat.errors import HeliostatError
from heliostat.features.definitions import FeatureView
from heliostat.features.offline import compute_features, earliest_us, needed_columns, unique_events
from heliostat.features.timeline import Segments
from tests.oracles import Oracle, derived
from tests.strategies import DEVICE, SHOP, SOURCES, USER, event_streams, key_table, spines, views

thorough = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
exhaustive = settings(max_examples=2_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def rows_of(
    view: FeatureView, events: pa.Table, keys: list[tuple[Any, ...]], as_of_us: list[int], **options: Any
) -> dict[str, np.ndarray]:
    entity = view.entity
    encoded = entity.encode(key_table(entity.name, keys))
    found = compute_features([view], events, encoded, np.array(as_of_us, np.int64), **options)
    return {name.removeprefix(f"{view.name}__"): values for name, values in found.items()}


def check_against_oracle(data: st.DataObject, entity: str) -> None:
    events = data.draw(event_streams(entity))
    view = data.draw(views(entity))
    keys, as_of_us = data.draw(spines(entity, events=events))
    known_at_us = data.draw(st.sampled_from([None, None, *events["_ingested_us"].to_pylist()]))
    found = rows_of(view, events, keys, as_of_us, known_at_us=known_at_us)
    oracle = Oracle(view, events)
    for row, (key, instant) in enumerate(zip(keys, as_of_us, strict=True)):
        expected = oracle.answer(key, instant, known_at_us=known_at_us)
        for name, answer in expected.items():
            assert answer.accepts(found[name][row]), (view.describe(), key, instant, name, found[name][row], answer)
        own = {name: found[name][row] for name in expected}
        for name, value in derived(view, own).items():
            np.testing.assert_allclose(found[name][row], value, rtol=1e-14)


@thorough
@given(st.data())
def test_every_row_is_what_the_contract_says(data: st.DataObject) -> None:
    check_against_oracle(data, data.draw(st.sampled_from([USER.name, SHOP.name, DEVICE.name])))


@pytest.mark.slow
@pytest.mark.computes
@pytest.mark.timeout(900)
@exhaustive
@given(st.data())
def test_every_row_is_what_the_contract_says_at_length(data: st.DataObject) -> None:
    check_against_oracle(data, data.draw(st.sampled_from([USER.name, SHOP.name, DEVICE.name])))


def bits(columns: dict[str, np.ndarray], rows: Any = slice(None)) -> dict[str, bytes]:
    return {name: values[rows].tobytes() for name, values in columns.items()}


seeds = st.integers(0, 2**32 - 1)


def shuffled(table: pa.Table, seed: int) -> pa.Table:
    return table.take(pa.array(np.random.default_rng(seed).permutation(table.num_rows)))


@st.composite
def futures(draw: st.DrawFn, events: pa.Table, from_us: int) -> pa.Table:
    """The same events, but shuffled, and from an instant on dropped, changed or replaced."""
    past = events.filter(pc.less(events["at"].cast(pa.int64()), from_us))
    other = draw(event_streams(max_size=8))
    other = other.filter(pc.greater_equal(other["at"].cast(pa.int64()), from_us))
    ids = pa.array([f"other {row}" for row in range(other.num_rows)], pa.string())
    other = other.set_column(other.column_names.index("event_id"), "event_id", ids)
    both = pa.concat_tables([past, other])
    return shuffled(both, draw(seeds))


@thorough
@given(st.data())
def test_nothing_at_or_after_the_instant_changes_a_bit(data: st.DataObject) -> None:
    events = unique_events(SOURCES[USER.name], data.draw(event_streams()))
    view = data.draw(views())
    keys, as_of_us = data.draw(spines(events=events))
    before = rows_of(view, events, keys, as_of_us, deduplicate=False)
    chosen = data.draw(st.integers(0, len(keys) - 1))
    changed = data.draw(futures(events, as_of_us[chosen]))
    after = rows_of(view, changed, keys, as_of_us, deduplicate=False)
    assert bits(before, chosen) == bits(after, chosen)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_neither_other_entities_nor_other_rows_nor_the_order_change_a_bit(data: st.DataObject) -> None:
    events = unique_events(SOURCES[USER.name], data.draw(event_streams()))
    view = data.draw(views())
    keys, as_of_us = data.draw(spines(events=events))
    together = rows_of(view, events, keys, as_of_us, deduplicate=False)
    chosen = data.draw(st.integers(0, len(keys) - 1))
    own = events.filter(pc.equal(events["user_id"], keys[chosen][0]))
    own = shuffled(own, data.draw(seeds))
    alone = rows_of(view, own, [keys[chosen]], [as_of_us[chosen]], deduplicate=False)
    assert bits(together, chosen) == bits(alone)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_needed_columns_are_enough_and_each_is_needed(data: st.DataObject) -> None:
    events = unique_events(SOURCES[USER.name], data.draw(event_streams()))
    view = data.draw(views())
    keys, as_of_us = data.draw(spines(events=events))
    columns = needed_columns([view])
    narrow = events.select(list({*columns, "event_id"}))
    whole = rows_of(view, events, keys, as_of_us)
    assert bits(rows_of(view, narrow, keys, as_of_us)) == bits(whole)
    for column in columns:
        with pytest.raises((KeyError, HeliostatError, pa.ArrowInvalid)):
            rows_of(view, narrow.drop_columns(column), keys, as_of_us)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_events_before_the_earliest_instant_are_never_seen(data: st.DataObject) -> None:
    events = unique_events(SOURCES[USER.name], data.draw(event_streams()))
    view = data.draw(views())
    keys, as_of_us = data.draw(spines(events=events))
    since_us = earliest_us([view], np.array(as_of_us))
    if since_us is None:
        assert view.has_lifetime
        return
    seen = events.filter(pc.greater_equal(events["at"].cast(pa.int64()), since_us))
    assert bits(rows_of(view, seen, keys, as_of_us)) == bits(rows_of(view, events, keys, as_of_us))


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 130), max_size=12),
    name=st.sampled_from(["add", "minimum", "maximum"]),
    seed=seeds,
)
def test_segments_are_accumulated_by_themselves_strictly_in_order(lengths: list[int], name: str, seed: int) -> None:
    ufunc = getattr(np, name)
    values = np.random.default_rng(seed).normal(size=sum(lengths)) * 10.0 ** (seed % 20)
    starts = np.cumsum([0, *lengths])[:-1].astype(np.int64)
    segments = Segments(starts, len(values))
    forwards, backwards = segments.running(ufunc, values), segments.running(ufunc, values, backwards=True)
    for start, length in zip(starts, lengths, strict=True):
        own = values[start : start + length]
        assert forwards[start : start + length].tolist() == list(itertools.accumulate(own, ufunc))
        assert backwards[start : start + length].tolist() == list(itertools.accumulate(own[::-1], ufunc))[::-1]
