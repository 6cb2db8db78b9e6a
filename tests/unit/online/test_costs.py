from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.features.aggregations import Count, Last, Sum
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.online import costs
from heliostat.online.backfill import BucketRings, RingPlan
from heliostat.online.costs import backfill_costs
from heliostat.online.tiles import RingLimits
from heliostat.schema import TIMESTAMP
from heliostat.storage.bundles import bundles
from heliostat.storage.event_log import EventLog
from heliostat.storage.online_store import OnlineKeys

NOW_US = parse_instant_us("2026-05-01")
KEYS = OnlineKeys("hs", "test")
LIMITS = RingLimits(lateness_us=US_PER_DAY, future_tolerance_us=60_000_000)
USER = Entity("user", keys={"user_id": "int64"})
SHOP = Entity("shop", keys={"shop": "string"})
SALES = EventSource(
    "sales",
    schema=pa.schema(
        [
            ("id", pa.int64()),
            ("user_id", pa.int64()),
            ("shop", pa.string()),
            ("at", TIMESTAMP),
            ("amount", pa.float64()),
        ]
    ),
    entity=(USER, SHOP),
    event_time="at",
    event_id="id",
)
RECENT = FeatureView("recent", version=1, source=SALES, entity=USER, features={"n": Count(window="7d")})
SPENT = FeatureView("spent", version=1, source=SALES, entity=USER, features={"s": Sum("amount", window="14d")})
EVER = FeatureView("ever", version=1, source=SALES, entity=USER, features={"last": Last("amount")})
BY_SHOP = FeatureView("by_shop", version=1, source=SALES, entity=SHOP, features={"n": Count(window="7d")})


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    """1,000 events of 100 users 90 days ago, then 500 events of 50 users yesterday; 4 buckets."""
    event_log = EventLog(str(tmp_path), n_buckets=4)
    for first, n, users, days in ((0, 1_000, 100, 90), (1_000, 500, 50, 1)):
        rows = np.arange(n)
        event_log.append(
            SALES,
            pa.table(
                {
                    "id": rows + first,
                    "user_id": rows % users,
                    "shop": np.where(rows % 2, "b", "a"),
                    "at": pa.array(NOW_US - days * US_PER_DAY + rows, pa.int64()).cast(TIMESTAMP),
                    "amount": rows.astype(np.float64),
                }
            ),
            ingested_us=NOW_US,
        )
    return event_log


def _costs(log: EventLog, *views: FeatureView) -> tuple[costs.BackfillCost, ...]:
    return backfill_costs(views, log, as_of_us=NOW_US, keys=KEYS, limits=LIMITS)


def test_a_window_reads_only_files_that_reach_into_it(log: EventLog) -> None:
    (cost,) = _costs(log, RECENT)
    whole = log.statistics(SALES, USER)
    assert (cost.events, cost.entities, cost.entities_counted) == (500, 50, True)
    assert 0 < cost.size_bytes < whole.size_bytes
    assert cost.files == 4


def test_a_lifetime_reads_everything(log: EventLog) -> None:
    (cost,) = _costs(log, EVER)
    whole = log.statistics(SALES, USER)
    assert (cost.events, cost.size_bytes, cost.files) == (1_500, whole.size_bytes, whole.files)
    assert cost.entities == 100


def test_views_of_one_source_and_entity_share_their_reading(log: EventLog) -> None:
    shared, of_shops = _costs(log, RECENT, BY_SHOP, SPENT)
    assert (shared.views, shared.events) == (("recent@1", "spent@1"), 500)
    assert (of_shops.views, of_shops.entities) == (("by_shop@1",), 2)
    assert shared.ring_bytes > _costs(log, RECENT)[0].ring_bytes


def test_the_rings_bytes_are_at_least_those_that_a_materialization_writes(log: EventLog) -> None:
    (cost,) = _costs(log, RECENT)
    plan = RingPlan((RECENT,), KEYS, NOW_US, LIMITS)
    writes = [
        write
        for bucket in log.buckets
        for events in [log.read_bucket(SALES, USER, bucket, min_time_us=NOW_US - 8 * US_PER_DAY)]
        for write in BucketRings.of(plan, bucket, events, events.slice(0, 0)).writes()
    ]
    ids = [group.ring_id for group in plan.groups]
    written = sum(sum(map(len, write.keys)) + len(bundles(ids, write.rings).data) for write in writes)
    slots = sum(
        len(rings.data) // group.slot_bytes
        for write in writes
        for group, rings in zip(plan.groups, write.rings, strict=True)
    )
    sparse = (cost.events - slots) * plan.groups[0].slot_bytes
    assert written <= cost.ring_bytes <= 1.1 * (written + sparse)


def test_entities_of_a_large_log_are_counted_in_some_buckets_and_scaled_up(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_COUNTED_EVENTS", 800)
    (cost,) = _costs(log, EVER)
    assert not cost.entities_counted
    assert 60 <= cost.entities <= 140, "100 users, spread over 4 buckets by a hash"
    assert "about" in str(cost)


def test_a_log_without_events_costs_nothing(tmp_path: Path) -> None:
    (cost,) = _costs(EventLog(str(tmp_path / "empty")), RECENT)
    assert (cost.events, cost.size_bytes, cost.entities, cost.ring_bytes) == (0, 0, 0, 0)
