"""Live events as updates of the online store, before anything is sent."""

from __future__ import annotations

import struct

import pyarrow as pa
import pyarrow.compute as pc

from heliostat.clock import US_PER_DAY, US_PER_HOUR
from heliostat.features.aggregations import Count, Sum
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.online.live import LiveRings, remember_ms
from heliostat.online.tiles import RingLimits, ring_layout
from heliostat.schema import TIMESTAMP
from heliostat.storage.event_updates import EventUpdate
from heliostat.storage.online_store import OnlineKeys

KEYS = OnlineKeys("hs", "test")
LIMITS = RingLimits(2 * US_PER_DAY, 60_000_000)
N_BUCKETS = 4
DAY = 18_400

user = Entity("user", keys={"user_id": "int64"})
device = Entity("device", keys={"maker": "string", "number": "int64"})
clicks = EventSource(
    "clicks",
    schema=pa.schema(
        {
            "id": pa.int64(),
            "user_id": pa.int64(),
            "maker": pa.string(),
            "number": pa.int64(),
            "at": TIMESTAMP,
            "ms": pa.int64(),
        }
    ),
    entity=(user, device),
    event_time="at",
    event_id="id",
)
by_user = FeatureView(
    "by_user",
    version=2,
    source=clicks,
    entity=user,
    features={"n": Count(window="14d"), "slow": Count(where=pc.field("ms") > 1_000)},
)
by_device = FeatureView("by_device", version=1, source=clicks, entity=device, features={"ms": Sum("ms", window="1d")})

AT_US = DAY * US_PER_DAY + 5 * US_PER_HOUR + 7
EVENTS = pa.table(
    {
        "id": [901, 902],
        "user_id": [7, 8],
        "maker": ["a|b", "c"],
        "number": [3, 4],
        "at": [AT_US, AT_US],
        "ms": [20, 2_000],
    },
    schema=clicks.schema,
)
FIELDS = [(b"e", b"first"), (b"e", b"second")]


def live(*views: FeatureView) -> LiveRings:
    return LiveRings(clicks, [ring_layout(view, LIMITS) for view in views], keys=KEYS, n_buckets=N_BUCKETS)


def test_an_event_is_one_update_for_each_entity_that_has_views() -> None:
    assert [live(*views).updates_per_event for views in [(), (by_user,), (by_device,), (by_user, by_device)]] == [
        1,
        1,
        2,
        2,
    ]


def test_only_the_first_entitys_update_carries_the_event_to_its_stream() -> None:
    updates = live(by_user, by_device).updates(EVENTS, FIELDS)
    (bucket,) = user.buckets(pa.array([7]), N_BUCKETS)
    assert [update.stream_key is not None for update in updates] == [True, False, True, False]
    assert (updates[0].stream_key, updates[0].fields) == (KEYS.events("clicks", bucket), (b"e", b"first"))


def test_each_entity_remembers_the_event_by_itself() -> None:
    updates = live(by_user, by_device).updates(EVENTS, FIELDS)
    (bucket,) = device.buckets(pa.array(["a%7Cb|3"]), N_BUCKETS)
    assert len({update.seen_key for update in updates}) == 4
    assert updates[1].seen_key == KEYS.seen("clicks", "device", "901", bucket)


def test_rings_that_dont_count_the_event_arent_touched() -> None:
    updates = live(by_user).updates(EVENTS, FIELDS)
    days, life = (group.descriptor for group in ring_layout(by_user, LIMITS).groups)
    assert [[descriptor for descriptor, _ in update.rings] for update in updates] == [[days], [days, life]]


def test_an_event_that_no_ring_counts_needs_no_bundle() -> None:
    slow = FeatureView(
        "slow", version=1, source=clicks, entity=user, features={"n": Count(where=pc.field("ms") > 1_000)}
    )
    first, second = live(slow).updates(EVENTS, FIELDS)
    assert (first.bundle_key, first.rings) == (None, ())
    (bucket,) = user.buckets(pa.array([8]), N_BUCKETS)
    assert second.bundle_key == KEYS.bundle("clicks", "user", "8", bucket)


def test_a_slot_is_the_tile_and_what_the_event_adds() -> None:
    (_, of_device, *_) = live(by_device).updates(EVENTS, FIELDS)
    ((descriptor, slot),) = of_device.rings
    assert of_device.bundle_key is not None
    assert of_device.bundle_key.endswith(":a%7Cb|3")
    assert struct.unpack("<2d", slot) == (DAY * 24 + 5, 20.0)
    assert descriptor == ring_layout(by_device, LIMITS).groups[0].descriptor


def test_views_of_other_sources_are_none_of_its_business() -> None:
    other = EventSource("other", schema=clicks.schema, entity=user, event_time="at", event_id="id")
    view = FeatureView("view", version=1, source=other, features={"n": Count()})
    assert live(view).updates(EVENTS, FIELDS)[0].rings == ()


def test_an_event_is_late_if_any_ring_has_left_it_behind_and_a_duplicate_if_its_stream_has_it() -> None:
    both = live(by_user, by_device)
    pairs = [
        ("applied", "applied"),
        ("applied", "late"),
        ("late", "applied"),
        ("duplicate", "late"),
        ("applied", "duplicate"),
    ]
    assert both.outcomes([outcome for pair in pairs for outcome in pair]) == [
        "applied", "late", "late", "duplicate", "applied",
    ]  # fmt: skip


def test_an_id_is_remembered_until_a_repetition_could_only_fall_into_complete_tiles() -> None:
    assert remember_ms(LIMITS) * 1_000 >= LIMITS.lateness_us + US_PER_DAY


def test_no_events_make_no_updates() -> None:
    updates: list[EventUpdate] = live(by_user, by_device).updates(EVENTS.slice(0, 0), [])
    assert updates == []
