"""Nothing that happens at or after a row's instant may change a bit of the row, over real Ray and a real log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from heliostat.clock import US_PER_DAY, US_PER_HOUR, parse_instant_us
from heliostat.features.aggregations import (
    Count,
    DistinctDays,
    First,
    FloatArray,
    Last,
    Max,
    Mean,
    Min,
    Sum,
    TimeSinceLast,
)
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.features.point_in_time import historical_features, snapshot
from heliostat.schema import TIMESTAMP
from heliostat.storage.event_log import EventLog

pytestmark = pytest.mark.usefixtures("ray_local")

ORIGIN_US = parse_instant_us("2026-05-01")
CUT_US = ORIGIN_US + 30 * US_PER_DAY + 7 * US_PER_HOUR
EVENTS = 3_000

USER = Entity("user", keys={"user_id": "int64"})
ACTIVITY = EventSource(
    "activity",
    schema=pa.schema(
        [("event_id", pa.string()), ("user_id", pa.int64()), ("at", TIMESTAMP), ("amount", pa.float64())]
    ),
    entity=USER,
    event_time="at",
    event_id="event_id",
)
VIEW = FeatureView(
    "all",
    version=1,
    source=ACTIVITY,
    features={
        "count": Count(window="14d"),
        "sum": Sum("amount", window="14d"),
        "sum_short": Sum("amount", window="6h"),
        "sum_ever": Sum("amount"),
        "mean": Mean("amount", window="7d", where=pc.field("amount") > 0),
        "least": Min("amount", window="30d"),
        "most": Max("amount"),
        "first": First("amount", window="12h"),
        "last": Last("amount"),
        "days": DistinctDays(window="20d"),
        "since": TimeSinceLast(),
    },
    ttl="20d",
)


@VIEW.derived
def score(sum_ever: FloatArray, mean: FloatArray) -> FloatArray:
    return np.log1p(np.abs(sum_ever)) * mean


def activity(seed: int, *, tag: str, n: int = EVENTS) -> pa.Table:
    """Busy users, ties on whole hours, magnitudes from 1e-6 to 1e9."""
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "event_id": [f"{tag}{number}" for number in range(n)],
            "user_id": rng.zipf(1.4, n) % 40,
            "at": pa.array(ORIGIN_US + rng.integers(0, 60 * 24, n) * US_PER_HOUR).cast(TIMESTAMP),
            "amount": rng.normal(size=n) * 10.0 ** rng.integers(-6, 9, n),
        },
        schema=ACTIVITY.schema,
    )


def before(events: pa.Table) -> pa.Table:
    return events.filter(pc.less(events["at"].cast(pa.int64()), CUT_US))


def from_then_on(events: pa.Table) -> pa.Table:
    return events.filter(pc.greater_equal(events["at"].cast(pa.int64()), CUT_US))


def shuffled(events: pa.Table, seed: int) -> pa.Table:
    return events.take(pa.array(np.random.default_rng(seed).permutation(events.num_rows)))


def other_amounts(events: pa.Table) -> pa.Table:
    return events.set_column(3, "amount", pc.multiply(pc.add(events["amount"], 1.0), -1e6))


def at_the_cut(events: pa.Table) -> pa.Table:
    """All at the very instant that is asked about."""
    return events.set_column(2, "at", pa.array(np.full(events.num_rows, CUT_US)).cast(TIMESTAMP))


FUTURES = {
    "removed": lambda later: later.slice(0, 0),
    "shuffled": lambda later: shuffled(later, 2),
    "changed": other_amounts,
    "at the instant itself": at_the_cut,
    "replaced": lambda _: from_then_on(activity(9, tag="other")),
}


def log_of(root: Path, parts: list[pa.Table]) -> EventLog:
    log = EventLog(str(root), n_buckets=4)
    for part in parts:
        log.append(ACTIVITY, part, ingested_us=ORIGIN_US)
    return log


def bits(table: pa.Table) -> dict[str, bytes]:
    return {ref.name: table[ref.name].to_numpy().tobytes() for ref in VIEW}


@pytest.fixture(scope="module")
def spine() -> pa.Table:
    """Rows at the cut and before it, some at the instants of events."""
    rng = np.random.default_rng(4)
    instants = np.where(rng.random(300) < 0.5, CUT_US, ORIGIN_US + rng.integers(0, 30 * 24, 300) * US_PER_HOUR)
    return pa.table({"user_id": rng.integers(0, 45, 300), "as_of": pa.array(instants).cast(TIMESTAMP)})


@pytest.fixture(scope="module")
def events() -> pa.Table:
    return activity(1, tag="e")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, events: pa.Table, spine: pa.Table) -> dict[str, bytes]:
    log = log_of(tmp_path_factory.mktemp("whole"), [events])
    return bits(historical_features(spine, [VIEW], log))


@pytest.mark.parametrize("future", list(FUTURES))
def test_no_bit_of_a_row_depends_on_its_future(
    future: str, events: pa.Table, spine: pa.Table, expected: dict[str, bytes], tmp_path: Path
) -> None:
    past, later = before(events), FUTURES[future](from_then_on(events))
    # The past arrives in another order and other batches as well, partly after the future.
    past = shuffled(past, 3)
    parts = [past.slice(0, 700), later, past.slice(700)]
    log = log_of(tmp_path, [part for part in parts if part.num_rows])
    assert bits(historical_features(spine, [VIEW], log)) == expected


def test_the_test_would_see_a_leak(
    events: pa.Table, spine: pa.Table, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The same futures, moved to just before the cut, do change rows."""
    moved = at_the_cut(from_then_on(events))
    moved = moved.set_column(2, "at", pa.array(np.full(moved.num_rows, CUT_US - 1)).cast(TIMESTAMP))
    found = bits(historical_features(spine, [VIEW], log_of(tmp_path, [pa.concat_tables([before(events), moved])])))
    assert all(found[name] != expected[name] for name in expected)


def test_a_snapshot_does_not_see_its_future_either(events: pa.Table, tmp_path: Path) -> None:
    whole = snapshot(VIEW, log_of(tmp_path / "whole", [events]), as_of_us=CUT_US).sort_by("user_id")
    cut = snapshot(VIEW, log_of(tmp_path / "cut", [before(events)]), as_of_us=CUT_US).sort_by("user_id")
    assert whole["user_id"].equals(cut["user_id"])
    assert bits(whole) == bits(cut)
