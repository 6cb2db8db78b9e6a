"""Materialization beside live ingestion: what is in the rings is what the kernel says, whoever wrote it."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from heliostat.clock import US_PER_DAY, US_PER_HOUR, ManualClock, parse_instant_us
from heliostat.errors import MaterializationConflictError
from heliostat.features.aggregations import Count, Last, Max, Sum
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.features.offline import compute_features
from heliostat.ingestion.intake import Intake
from heliostat.ingestion.sink import Sink
from heliostat.online import bucket_history
from heliostat.online.bucket_rings import BucketJob, BucketTask, RateLimit
from heliostat.online.materialize import Materialization, Step, materialize
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.schema import TIMESTAMP, times_us
from heliostat.settings import Settings
from heliostat.storage import event_log
from heliostat.storage.bundles import ring_id, rings_in
from heliostat.storage.event_log import EventLog
from heliostat.storage.log_version import LogVersion
from heliostat.storage.offline_store import OfflineStore
from heliostat.storage.online_store import OnlineStore
from heliostat.storage.stream_tail import StreamTail, advance
from heliostat.storage.streams import Streams
from tests.rings import bundled, rings_held

NOW_US = parse_instant_us("2020-06-01T12:00:00")
LIMITS = RingLimits(lateness_us=US_PER_DAY, future_tolerance_us=60_000_000)
N_BUCKETS = 2

USER = Entity("user", keys={"user_id": "int64"})
SHOP = Entity("shop", keys={"shop": "string"})
COLUMNS = {"event_id": pa.string(), "user_id": pa.int64(), "shop": pa.string(), "at": TIMESTAMP, "sum": pa.float64()}
SALES = EventSource("sales", schema=pa.schema(COLUMNS), entity=[USER, SHOP], event_time="at", event_id="event_id")
SPENDING = FeatureView(
    "spending",
    version=1,
    source=SALES,
    entity=USER,
    features={
        "n": Count(),
        "total": Sum("sum"),
        "last": Last("sum", window="14d"),
        "n_6h": Count(window="6h"),
        "largest_14d": Max("sum", window="14d"),
    },
)
TRAFFIC = FeatureView("traffic", version=1, source=SALES, entity=SHOP, features={"n_7d": Count(window="7d")})
ADDED = FeatureView("added", version=1, source=SALES, entity=USER, features={"n_2d": Count(window="2d")})
VIEWS = (SPENDING, TRAFFIC)
USERS, SHOPS = 12, 3


def sale(number: int, user: int, ago_us: int, *, now_us: int = NOW_US) -> dict[str, Any]:
    return {
        "event_id": f"e{number}",
        "user_id": user,
        "shop": f"s{user % SHOPS}",
        "at": now_us - ago_us,
        "sum": float(number % 97),
    }


def sales(numbers: Sequence[int], *, days: float = 20.0, now_us: int = NOW_US) -> list[dict[str, Any]]:
    """Events that depend on their number alone; half of them of the last two days."""
    found = []
    for number in numbers:
        rng = random.Random(number)
        ago_us = 1 + int(rng.choice([min(2.0, days), days]) * US_PER_DAY * rng.random())
        found.append(sale(number, rng.randrange(USERS), ago_us, now_us=now_us))
    return found


class World:
    """A project: what came in, by which way, and what its rings say.

    Args:
        settings: Name the stores.
        views: Those whose rings live events change.
    """

    def __init__(self, settings: Settings, views: Sequence[FeatureView] = VIEWS) -> None:
        self.settings, self.views = settings, tuple(views)
        self.clock = ManualClock(NOW_US)
        self.store = OnlineStore.open(settings)
        self.streams = Streams(self.store.config, N_BUCKETS)
        self.log = EventLog(settings.data_root, n_buckets=N_BUCKETS)
        self.sink = Sink(self.streams, self.log, OfflineStore(settings.data_root), [SALES], self.clock)
        self.events: dict[str, dict[str, Any]] = {}

    def live(self, events: Sequence[dict[str, Any]]) -> list[str]:
        intake = Intake(
            self.store, [SALES], self.views, clock=self.clock, settings=self.settings.ingestion, n_buckets=N_BUCKETS
        )
        statuses = [each.status for each in intake.submit("sales", events)] if events else []
        assert "rejected" not in statuses
        self._note(events)
        return statuses

    def bulk(self, events: Sequence[dict[str, Any]]) -> None:
        self.log.append(
            SALES, pa.Table.from_pylist(list(events), schema=SALES.schema), ingested_us=self.clock.now_us()
        )
        self._note(events)

    def may_be_live(self, event: dict[str, Any]) -> bool:
        """Whether it is new, or young enough for its id to be remembered."""
        return event["event_id"] not in self.events or event["at"] >= self.clock.now_us() - LIMITS.lateness_us

    def _note(self, events: Sequence[dict[str, Any]]) -> None:
        for event in events:
            self.events.setdefault(event["event_id"], event)

    def materialize(self, *views: FeatureView, **options: Any) -> tuple[Materialization, ...]:
        chosen = {"as_of_us": self.clock.now_us(), "on_ray": False, **options}
        return materialize(views or self.views, event_log=self.log, online=self.store.config, limits=LIMITS, **chosen)

    def check(self, *views: FeatureView) -> None:
        """Rings give what the offline kernel gives."""
        as_of_us = self.clock.now_us() + 1
        events = pa.Table.from_pylist(list(self.events.values()), schema=SALES.schema)
        for view in views or self.views:
            texts = (
                [str(number) for number in range(USERS + 1)] if view.entity is USER else [f"s{n}" for n in range(4)]
            )
            reader = FeatureReader(list(view), keys=self.store.keys, n_buckets=N_BUCKETS, limits=LIMITS)
            found, _ = reader.read(self.store, texts, as_of_us=as_of_us)
            expected = compute_features([view], events, view.entity.encoded(texts), np.full(len(texts), as_of_us))
            columns = [expected[f"{view.name}__{name}"] for name in view.feature_names]
            np.testing.assert_allclose(found.matrix, np.column_stack(columns), rtol=1e-12, atol=1e-9)

    def bundles(self) -> dict[str, bytes | None]:
        keys = sorted(key for chunk in self.store.scan(f"{self.store.keys.root}:r:") for key in chunk)
        return dict(zip(keys, self.store.read(keys), strict=True))

    def rings(self) -> dict[str, bytes]:
        """As ``view@version:layout:entity's key``."""
        return rings_held(self.bundles(), (*VIEWS, ADDED), LIMITS)

    def lose(self) -> None:
        """What FLUSHALL does, to this project alone."""
        for chunk in self.store.scan(f"{self.store.keys.root}:"):
            self.store.remove(chunk)

    def close(self) -> None:
        self.store.close()
        self.streams.close()


@pytest.fixture
def world(settings: Settings) -> Iterator[World]:
    opened = World(settings)
    yield opened
    opened.close()


def sent(done: Sequence[Materialization]) -> list[int]:
    return [each.entities for each in done]


# ── Both ways in ────────────────────────────────────────────────────────────────────


def test_bulk_events_in_tiles_that_live_events_have_touched_are_there_at_once(world: World) -> None:
    world.live([sale(1, 5, US_PER_HOUR)])
    world.bulk([sale(2, 5, 2 * US_PER_HOUR)])
    world.materialize()
    world.check()


def test_an_event_that_came_in_bulk_and_is_sent_live_again_is_a_duplicate(world: World) -> None:
    events = [sale(1, 5, US_PER_HOUR), sale(2, 5, 20 * US_PER_HOUR)]
    world.bulk(events)
    world.materialize()
    assert world.live(events) == ["duplicate", "duplicate"]
    world.check()


def test_an_event_that_was_sent_live_before_its_bulk_was_materialized_counts_once(world: World) -> None:
    world.bulk([sale(1, 5, US_PER_HOUR)])
    world.live([sale(1, 5, US_PER_HOUR)])
    world.materialize()
    world.check()
    world.sink.drain_once()
    world.materialize()
    world.check()


def test_live_events_that_no_table_has_yet_are_kept_when_their_tile_is_replaced(world: World) -> None:
    world.bulk(sales(range(40)))
    world.live(sales(range(30, 80)))
    world.materialize()
    world.check()
    world.sink.drain_once()
    world.materialize(full=True)
    world.check()


def test_what_is_committed_when_a_run_has_begun_is_in_its_rings(world: World) -> None:
    world.bulk(sales(range(40)))
    more = iter([sales(range(40, 80))])

    def commit_once(_: Step) -> None:
        world.bulk(next(more, []))

    read = [each.events for each in world.materialize(on_step=commit_once)]
    world.check()
    assert read == [each.events for each in world.materialize(full=True)]


def test_two_buckets_at_once_make_the_same_rings_as_one_after_the_other(world: World) -> None:
    world.bulk(sales(range(300)))
    world.live(sales(range(290, 340)))
    done = world.materialize()
    together = world.rings()
    assert together
    again = world.materialize(full=True, concurrency=1)
    assert [each.rings.written for each in again] == [0] * len(VIEWS)
    assert world.rings() == together
    assert sent(again) == sent(done)


def test_a_view_that_is_added_gets_what_live_events_did_before_it_was(world: World) -> None:
    world.live(sales(range(50)))
    world.views = (*VIEWS, ADDED)
    world.live(sales(range(50, 60)))
    world.materialize()
    world.check(SPENDING, TRAFFIC, ADDED)


def test_a_long_history_is_read_without_ids_where_none_are_needed_and_gives_the_same_rings(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.views = (*VIEWS, ADDED)
    world.bulk([*sales(range(300)), sale(300, 5, -30_000_000)])
    read: list[tuple[bool, int | None]] = []

    class Watched(LogVersion):
        def read(self, buckets: Any, *, columns: Any, min_time_us: int | None, **options: Any) -> pa.Table:
            read.append(("event_id" in columns, min_time_us))
            return super().read(buckets, columns=columns, min_time_us=min_time_us, **options)

    monkeypatch.setattr(event_log, "LogVersion", Watched)
    world.materialize(concurrency=1)
    together = world.rings()
    assert [ids for ids, _ in read] == [True] * 2 * N_BUCKETS
    world.lose()
    read.clear()
    monkeypatch.setattr(bucket_history, "_READ_TOGETHER", 0)
    world.materialize(concurrency=1)
    assert [ids for ids, _ in read] == [True, False] * 2 * N_BUCKETS
    assert None not in {first_us for ids, first_us in read if ids}, "no ids of all of the past"
    assert world.rings() == together
    world.clock.advance(60_000_000)
    world.check()


def test_of_two_materializations_of_a_bucket_the_one_that_began_first_gives_up(world: World) -> None:
    world.bulk(sales(range(20)))
    late = BucketTask((SPENDING,), world.log, 1, world.store.config, NOW_US, LIMITS)

    class Slow(OnlineStore):
        def write_rings(self, calls: Any) -> Any:
            if world.store.read([world.store.keys.materialized("spending@1")]) == [None]:
                world.materialize(SPENDING)
            return super().write_rings(calls)

    with Slow(world.store.config) as store, pytest.raises(MaterializationConflictError, match="began meanwhile"):
        late.run(BucketJob(0, None, NOW_US), store)
    world.check(SPENDING)


def test_an_entity_that_is_busy_all_the_time_is_right_all_the_same(world: World) -> None:
    """One entity is written to in every gap between reading and writing, many times."""
    world.bulk([sale(number, 5, US_PER_HOUR + number) for number in range(20)])
    numbers = iter(range(1000, 1012))

    class Busy(OnlineStore):
        def write_rings(self, calls: Any) -> Any:
            number = next(numbers, None)
            if number is not None:
                world.live([sale(number, 5, 60_000_000)])
            return super().write_rings(calls)

    task = BucketTask((SPENDING,), world.log, 1, world.store.config, NOW_US, LIMITS)
    with Busy(world.store.config) as store:
        for bucket in range(N_BUCKETS):
            task.run(BucketJob(bucket, None, NOW_US), store)
    assert next(numbers, None) is None
    world.check(SPENDING)


def test_an_entity_that_never_comes_to_rest_is_named_and_done_the_next_time(world: World) -> None:
    world.bulk([sale(number, 5, US_PER_HOUR + number) for number in range(20)])
    (bucket,) = USER.buckets(USER.encoded(["5"]), N_BUCKETS).tolist()
    numbers = iter(range(1000, 2000))

    class Restless(OnlineStore):
        def write_rings(self, calls: Any) -> Any:
            world.live([sale(next(numbers), 5, 60_000_000)])
            return super().write_rings(calls)

    task = BucketTask((SPENDING,), world.log, 1, world.store.config, NOW_US, LIMITS)
    with Restless(world.store.config) as store:
        task.run(BucketJob(bucket, None, NOW_US), store)
    state = orjson.loads(world.store.read([world.store.keys.bucket_state("spending@1", bucket)])[0] or b"")
    assert state["left"] == ["5"]
    world.materialize(SPENDING)
    world.check(SPENDING)


def test_materializing_beside_live_ingestion_and_the_sink_ends_as_the_kernel_says(world: World) -> None:
    world.bulk(sales(range(300)))
    stop = threading.Event()

    def ingest() -> None:
        try:
            for first in range(200, 1_200, 25):
                world.live(sales(range(first, first + 25)))
                world.sink.drain_once()
        finally:
            stop.set()

    thread = threading.Thread(target=ingest)
    thread.start()
    rounds = 0
    while not stop.is_set() or rounds < 3:
        world.materialize(full=rounds % 2 == 0)
        rounds += 1
    thread.join()
    # Events later than the bound may have met a run half-way: the next one has them.
    world.materialize()
    world.check()
    world.materialize(full=True)
    world.check()
    before = world.rings()
    assert all(each.rings.written == 0 for each in world.materialize(full=True))
    assert world.rings() == before


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["live", "live", "bulk", "sink", "materialize", "full", "time", "lose"]),
        st.integers(0, 39),
        st.integers(1, 8),
    ),
    min_size=4,
    max_size=14,
)


def play(world: World, steps: Sequence[tuple[str, int, int]]) -> None:
    """An event that came in bulk is due once materialized; one that came live is there at once."""
    for kind, first, count in steps:
        events = sales(range(first, first + count))
        if kind == "live":
            world.live([each for each in events if world.may_be_live(each)])
        elif kind == "bulk":
            world.bulk(events)
        elif kind == "sink":
            world.sink.drain_once()
        elif kind == "time":
            world.clock.advance(count * US_PER_HOUR)
        elif kind == "lose":
            world.sink.drain_once()
            world.lose()
        else:
            world.materialize(full=kind == "full")
            world.check()
    world.materialize()
    world.check()
    world.live([each for each in sales(range(20)) if world.may_be_live(each)])
    world.check()


def played(settings: Settings, folder: Path, steps: Sequence[tuple[str, int, int]]) -> None:
    world = World(settings.model_copy(update={"home": folder, "project": f"m{folder.name}"}))
    try:
        play(world, steps)
    finally:
        world.lose()
        world.close()


patient = hypothesis_settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@hypothesis_settings(patient, max_examples=10)
@given(steps=STEPS)
def test_any_order_of_live_bulk_sink_and_materializations_is_what_the_kernel_says(
    steps: list[tuple[str, int, int]], settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    played(settings, tmp_path_factory.mktemp("world"), steps)


@pytest.mark.slow
@pytest.mark.computes
@hypothesis_settings(patient, max_examples=100)
@given(steps=STEPS)
def test_any_order_of_them_many_times_over(
    steps: list[tuple[str, int, int]], settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    played(settings, tmp_path_factory.mktemp("world"), steps)


# ── Only what has changed ───────────────────────────────────────────────────────────


def test_only_entities_with_new_events_are_written_again(world: World) -> None:
    world.bulk(sales(range(200)))
    assert sent(world.materialize()) == [USERS, SHOPS]
    world.bulk([sale(1000, 3, US_PER_HOUR), sale(1001, 3, 5 * US_PER_DAY)])
    of_users, of_shops = world.materialize()
    assert (of_users.buckets, of_users.entities, of_users.full) == (1, 1, 0)
    assert of_shops.entities == 1
    world.check()


def test_windows_that_slide_need_no_write(world: World) -> None:
    world.bulk(sales(range(200)))
    world.materialize()
    world.clock.advance(20 * US_PER_HOUR)
    assert [(each.buckets, each.entities) for each in world.materialize()] == [(0, 0), (0, 0)]
    world.check()


def test_now_and_then_all_entities_are_looked_at(world: World) -> None:
    world.bulk(sales(range(200)))
    world.materialize()
    world.clock.advance(US_PER_DAY)
    assert [each.full for each in world.materialize()] == [N_BUCKETS, N_BUCKETS]
    world.check()


def test_merging_small_files_is_no_change(world: World) -> None:
    for first in range(0, 40, 10):
        world.bulk(sales(range(first, first + 10)))
    world.materialize()
    assert world.log.compact(SALES, USER, min_files=2) > 0
    of_users, _ = world.materialize()
    assert of_users.entities == 0
    world.bulk([sale(1000, 3, US_PER_HOUR)])
    world.log.compact(SALES, USER, min_files=2)
    of_users, _ = world.materialize()
    assert (of_users.entities, of_users.full) == (1, 0)
    world.check()


def test_events_that_the_log_had_before_their_time_came_are_due_when_it_comes(world: World) -> None:
    """As when old data are replayed."""
    world.bulk(sales(range(100)))
    world.bulk([sale(1000, 3, -US_PER_HOUR * 3)])
    future = world.events.pop("e1000")
    world.materialize()
    world.check()
    world.clock.advance(4 * US_PER_HOUR)
    world.events["e1000"] = future
    of_users, _ = world.materialize()
    assert (of_users.full, of_users.entities) == (0, 1)
    world.check()


def test_what_a_killed_run_has_done_is_not_done_again(world: World) -> None:
    world.bulk(sales(range(200)))
    seen: list[Step] = []

    def die(step: Step) -> None:
        seen.append(step)
        if step.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.materialize(SPENDING, on_step=die, concurrency=1)
    assert [(step.done, step.total) for step in seen] == [(0, N_BUCKETS), (1, N_BUCKETS)]
    (rest,) = world.materialize(SPENDING)
    assert (rest.buckets, rest.entities + seen[-1].entities) == (N_BUCKETS - 1, USERS)
    world.check(SPENDING)


def test_another_bound_on_lateness_begins_anew(world: World) -> None:
    world.bulk(sales(range(50)))
    world.materialize(SPENDING)
    wider = replace(LIMITS, lateness_us=3 * US_PER_DAY)
    (done,) = materialize(
        [SPENDING], event_log=world.log, online=world.store.config, limits=wider, as_of_us=NOW_US, on_ray=False
    )
    assert done.full == N_BUCKETS


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_rate_limit_is_kept_over_all_that_is_written(
    world: World, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("heliostat.online.bucket_rings.time.sleep", slept.append)
    monkeypatch.setattr("heliostat.online.bucket_rings.time.monotonic", lambda: 0.0)
    world.bulk(sales(range(200)))
    world.materialize(SPENDING, rate=RateLimit(entities_per_s=4.0), concurrency=at_once)
    assert sum(slept) == pytest.approx(at_once * USERS / 4.0), "buckets under way wait side by side"
    assert RateLimit(None, 100.0).shared(2).seconds(5, 100) == 2.0


# ── What nothing is left of ─────────────────────────────────────────────────────────


def test_rings_of_entities_that_vanished_from_the_log_are_cleared_and_no_others(world: World) -> None:
    world.bulk(sales(range(100)))
    world.materialize()
    world.live([sale(5000, 11, 60_000_000)])
    other = World(world.settings.model_copy(update={"home": world.settings.home / "other"}))
    kept = [each for each in sales(range(100)) if each["user_id"] not in (2, 3, 11)]
    other.bulk(kept)
    done, _ = other.materialize(full=True)
    assert done.rings.cleared == 2 * 3
    other.events["e5000"] = sale(5000, 11, 60_000_000)
    other.check(SPENDING)
    texts = {name.rpartition(":")[2] for name in other.rings() if name.startswith("spending@1:")}
    assert texts == {str(each["user_id"]) for each in [*kept, {"user_id": 11}]}
    other.close()


def test_rings_whose_windows_have_all_emptied_are_cleared(world: World) -> None:
    world.bulk(sales(range(60)))
    world.materialize()
    assert any(name.startswith("traffic@1:") for name in world.rings())
    world.clock.advance(60 * US_PER_DAY)
    world.materialize()
    left = world.rings()
    assert left
    assert all(":life." in name for name in left)
    world.check()


def test_rings_of_a_layout_that_is_no_more_are_cleared(world: World) -> None:
    world.bulk(sales(range(60)))
    world.materialize()
    before = {key: rings_in(value) for key, value in world.bundles().items()}
    prefix = world.store.keys.bundle_prefix("sales", "user")
    (of_seven,) = [key for key in before if key.startswith(prefix) and key.endswith(":7")]
    nobody = of_seven.removesuffix(":7") + ":700"
    stale, foreign = ring_id("spending@1", "1d.00000000"), ring_id("other@1", "1d.00000000")
    world.store.put_many(
        {
            of_seven: bundled({stale: b"stale 01", **before[of_seven], foreign: b"foreign1"}),
            nobody: bundled({stale: b"stale 02", foreign: b"foreign2"}),
        }
    )
    world.materialize(full=True)
    before[of_seven][foreign], before[nobody] = b"foreign1", {foreign: b"foreign2"}
    assert {key: rings_in(value) for key, value in world.bundles().items()} == before


def test_rings_of_views_that_nobody_declares_any_more_leave_every_bundle(world: World) -> None:
    world.views = (*VIEWS, ADDED)
    world.bulk(sales(range(60)))
    world.live([sale(5000, 700, 60_000_000)])
    world.materialize()
    assert any(name.startswith("added@1:") for name in world.rings())
    rest = {name: ring for name, ring in world.rings().items() if not name.startswith("added@1:")}
    world.views = VIEWS
    world.materialize(SPENDING, full=True)
    assert any(name.startswith("added@1:") for name in world.rings()), "somebody else may read it"
    world.materialize(SPENDING, full=True, gone=["added@1", "traffic@1", "other@1"])
    assert world.rings() == rest, "those of another entity are in bundles of its own"
    world.check()


# ── After a server was lost ─────────────────────────────────────────────────────────


def test_after_the_servers_data_were_lost_all_comes_back_from_the_log(world: World) -> None:
    world.bulk(sales(range(200)))
    world.materialize()
    world.live(sales(range(150, 300)))
    world.sink.drain_once()
    world.lose()
    world.materialize()
    world.check()
    assert set(world.live(sales(range(300)))) <= {"duplicate", "late", "accepted"}
    recent = [each for each in sales(range(300)) if each["at"] >= NOW_US - US_PER_DAY]
    assert set(world.live(recent)) == {"duplicate"}


def test_after_a_loss_a_server_whose_clock_is_behind_takes_no_new_entry_for_an_old_one(world: World) -> None:
    world.live(sales(range(10)))
    world.sink.drain_once()
    streams = world.streams.event_streams("sales")
    ahead = dict.fromkeys(streams, (9999999999999, 5))
    assert advance(world.store, ahead) == len(streams)
    assert advance(world.store, ahead) == 0
    world.live(sales(range(10, 20)))
    ids = [entry for stream in streams for entry, _ in world.streams.read(stream)]
    assert len(ids) == 10
    assert min(ids) > (9_999_999_999_999, 5)


def test_a_tail_is_read_once_and_says_when_it_has_missed_something(world: World) -> None:
    streams = world.streams.event_streams("sales")
    tail = StreamTail(world.store, streams, most=100)
    assert tail.follow() == []
    world.live(sales(range(10)))
    assert len(tail.follow() or []) == 10
    assert tail.follow() == []
    world.live(sales(range(10, 15)))
    world.sink.drain_once()
    assert tail.follow() is None
    world.live(sales(range(20, 40)))
    assert StreamTail(world.store, streams, most=5).follow() is None


def test_events_ahead_of_the_instant_within_the_tolerance_survive_a_materialization(world: World) -> None:
    world.clock.set(NOW_US - NOW_US % US_PER_HOUR - 10_000_000)
    world.bulk(sales(range(50), now_us=world.clock.now_us()))
    world.live([sale(900, 4, -30_000_000, now_us=world.clock.now_us())])
    world.materialize(full=True)
    world.clock.advance(40_000_000)
    world.check()
    assert times_us(pa.array([world.events["e900"]["at"]], TIMESTAMP))[0] < world.clock.now_us()
