"""The rings of a real server against the brute-force oracle, for any events, views and orders of arrival."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliostat.clock import US_PER_DAY, US_PER_HOUR
from heliostat.features.definitions import FeatureView
from heliostat.features.offline import compute_features, unique_events
from heliostat.online.live import LiveRings, remember_ms
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits, ring_layout
from heliostat.schema import times_us
from heliostat.storage.online_store import OnlineConfig, OnlineStore
from tests.history import History
from tests.oracles import Oracle, derived
from tests.strategies import DEVICE, KEYS, ORIGIN_US, SHOP, SPAN_US, UNKNOWN, USER, event_streams, key_table, views

thorough = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
exhaustive = settings(thorough, max_examples=1_000)
ENTITIES = [USER.name, SHOP.name, DEVICE.name]
N_BUCKETS = 2
# The strategies' events arrive up to three days late; the sink needs an hour more.
SINK_LAG_US = US_PER_HOUR
LIMITS = RingLimits(3 * US_PER_DAY + SINK_LAG_US, 60_000_000)

_projects = (f"parity{number}" for number in itertools.count())


class Online:
    """One view's rings in a project of their own, and the ways in and out."""

    def __init__(self, url: str, view: FeatureView) -> None:
        self.store = OnlineStore(OnlineConfig(url, project=next(_projects)))
        self.view = view
        self.live = LiveRings(view.source, [ring_layout(view, LIMITS)], keys=self.store.keys, n_buckets=N_BUCKETS)
        self.reader = FeatureReader(list(view), keys=self.store.keys, n_buckets=N_BUCKETS, limits=LIMITS)

    def apply(self, events: pa.Table) -> list[str]:
        updates = self.live.updates(events, [(b"e", b"payload")] * events.num_rows)
        return list(self.store.apply_events(updates, remember_ms=remember_ms(LIMITS)))

    def history(self, log: pa.Table, as_of_us: int) -> History:
        return History([self.view], log, as_of_us, store=self.store, n_buckets=N_BUCKETS, limits=LIMITS)

    def rows(self, keys: list[tuple[Any, ...]], as_of_us: int) -> list[dict[str, float]]:
        entity = self.view.entity
        texts = [entity.text(dict(zip(entity.key_columns, key, strict=True))) for key in keys]
        batch, _ = self.reader.read(self.store, texts, as_of_us=as_of_us)
        names = [name.removeprefix(f"{self.view.name}__") for name in batch.names]
        return [dict(zip(names, row, strict=True)) for row in batch.matrix.tolist()]

    def state(self) -> dict[bytes, bytes]:
        """Every ring."""
        keys = sorted(self.store.client.scan_iter(f"{self.store.keys.root}:r:*", count=1000))
        return dict(zip(keys, self.store.client.mget(keys), strict=True)) if keys else {}

    def clear(self) -> None:
        keys = list(self.store.client.scan_iter(f"{self.store.keys.root}:*", count=1000))
        if keys:
            self.store.client.unlink(*keys)
        self.store.close()


def check(found: list[dict[str, float]], oracle: Oracle, keys: list[tuple[Any, ...]], as_of_us: int) -> None:
    for row, key in zip(found, keys, strict=True):
        for name, answer in oracle.answer(key, as_of_us).items():
            assert answer.accepts(row[name]), (
                oracle.view.describe()["features"],
                oracle.view.describe()["ttl"],
                key,
                name,
                row[name],
                answer,
            )
        for name, value in derived(oracle.view, row).items():
            np.testing.assert_allclose(row[name], value, rtol=1e-14)


def end_us(events: pa.Table) -> int:
    """Just after everything: a ring answers for now, and knows no event that is still to come."""
    return max([ORIGIN_US, *times_us(events["at"]).tolist()]) + 1


def in_order_of_arrival(events: pa.Table) -> pa.Table:
    return events.take(pa.array(np.argsort(events["_ingested_us"].to_numpy(), kind="stable")))


@pytest.fixture
def fresh(valkey: str) -> Iterator[Any]:
    """Makes an `Online` for one example; all are cleared in the end, whatever happened."""
    made: list[Online] = []

    def make(view: FeatureView) -> Online:
        while made:
            made.pop().clear()
        made.append(Online(valkey, view))
        return made[-1]

    yield make
    while made:
        made.pop().clear()


def check_live_events(data: st.DataObject, fresh: Any) -> None:
    entity = data.draw(st.sampled_from(ENTITIES))
    events, view = in_order_of_arrival(data.draw(event_streams(entity))), data.draw(views(entity))
    as_of_us = end_us(events) + data.draw(st.sampled_from([0, 1, US_PER_HOUR, 11 * US_PER_DAY]))
    online, keys = fresh(view), [*KEYS[entity], UNKNOWN[entity]]
    outcomes = online.apply(events)
    assert outcomes.count("duplicate") == events.num_rows - unique_events(view.source, events).num_rows
    oracle = Oracle(view, events)
    check(online.rows(keys, as_of_us), oracle, keys, as_of_us)
    # History of an earlier instant has nothing to say that such rings don't know.
    online.history(unique_events(view.source, events), data.draw(st.integers(ORIGIN_US, as_of_us))).write()
    check(online.rows(keys, as_of_us), oracle, keys, as_of_us)


def check_a_mixture(data: st.DataObject, fresh: Any) -> None:
    """History is brought in at any time, any number of times, and the sink may lag behind."""
    entity = data.draw(st.sampled_from(ENTITIES))
    events, view = in_order_of_arrival(data.draw(event_streams(entity))), data.draw(views(entity))
    arrivals, n = events["_ingested_us"].to_numpy(), events.num_rows
    online, keys = fresh(view), [*KEYS[entity], UNKNOWN[entity]]
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    for begin, end in itertools.pairwise([0, *cuts, n]):
        online.apply(events.slice(begin, end - begin))
        now_us = int(arrivals[end]) if end < n else end_us(events) + 3 * US_PER_DAY
        lag_us = data.draw(st.sampled_from([0, SINK_LAG_US]))
        sunk = unique_events(view.source, events.slice(0, end).filter(pa.array(arrivals[:end] <= now_us - lag_us)))
        history = online.history(sunk, now_us)
        history.write()
        before = online.state()
        assert history.write().written == 0
        assert online.state() == before
        check(online.rows(keys, now_us + 1), Oracle(view, events.slice(0, end)), keys, now_us + 1)
    as_of_us, oracle = end_us(events) + 3 * US_PER_DAY, Oracle(view, events)
    check(online.rows(keys, as_of_us), oracle, keys, as_of_us)
    # An earlier instant has nothing to say that the rings don't know already.
    online.history(unique_events(view.source, events), data.draw(st.integers(ORIGIN_US, as_of_us))).write()
    check(online.rows(keys, as_of_us), oracle, keys, as_of_us)


def check_history(data: st.DataObject, fresh: Any) -> None:
    entity = data.draw(st.sampled_from(ENTITIES))
    events, view = data.draw(event_streams(entity)), data.draw(views(entity))
    as_of_us = data.draw(st.integers(ORIGIN_US, ORIGIN_US + SPAN_US + 11 * US_PER_DAY))
    online, keys = fresh(view), [*KEYS[entity], UNKNOWN[entity]]
    online.history(unique_events(view.source, events), as_of_us).write()
    rows, oracle = online.rows(keys, as_of_us), Oracle(view, events)
    check(rows, oracle, keys, as_of_us)
    encoded = view.entity.encode(key_table(entity, keys))
    offline = compute_features([view], events, encoded, np.full(len(keys), as_of_us))
    for position, (key, row) in enumerate(zip(keys, rows, strict=True)):
        for name, answer in oracle.answer(key, as_of_us).items():
            value = offline[f"{view.name}__{name}"][position]
            assert (
                value == row[name]
                or np.isnan([value, row[name]]).all()
                or abs(value - row[name]) <= 2 * answer.tolerance
            )


@thorough
@given(data=st.data())
def test_live_events_in_any_order_of_arrival_are_what_the_contract_says(data: st.DataObject, fresh: Any) -> None:
    check_live_events(data, fresh)


@thorough
@given(data=st.data())
def test_any_mixture_of_history_and_live_events_is_what_the_contract_says(data: st.DataObject, fresh: Any) -> None:
    check_a_mixture(data, fresh)


@thorough
@given(data=st.data())
def test_history_alone_is_what_the_contract_says_and_what_the_offline_kernel_says(
    data: st.DataObject, fresh: Any
) -> None:
    check_history(data, fresh)


@pytest.mark.slow
@pytest.mark.computes
@pytest.mark.timeout(900)
@pytest.mark.parametrize("check_way", [check_live_events, check_a_mixture, check_history])
@exhaustive
@given(data=st.data())
def test_every_way_in_is_what_the_contract_says_at_length(data: st.DataObject, check_way: Any, fresh: Any) -> None:
    check_way(data, fresh)
