"""A seeded generator of user activities, and of the rows that a training set would ask about.

The events of an ordinary product: a few users do most of it, most do little, and all do it
over `DAYS` days. The declarations over them are the ones that a user would write.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat import Count, DistinctDays, Entity, EventSource, FeatureView, Max, Mean, Min, Sum, TimeSinceLast
from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.features.aggregations import FloatArray
from heliostat.schema import TIMESTAMP

DAYS = 60
WINDOW_DAYS = 30
START_US = parse_instant_us("2026-01-01")

TYPES = ("login", "purchase", "share", "other")
WEIGHTS = {"login": 1.0, "purchase": 5.0, "share": 3.0, "other": 0.5}
_SHARES = (0.45, 0.10, 0.15, 0.30)
_NO_DURATION = 0.02
# Zipf's law with its head flattened: the busiest of 100,000 users has 1 % of the events, the median one 0.0002 %.
_HEAD = 10

EVENT_SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("event_id", pa.int64()),
        ("happened_at", TIMESTAMP),
        ("type", pa.string()),
        ("session_duration", pa.float64()),
    ]
)

user = Entity("user", keys={"user_id": "int64"}, description="Somebody with an account")

user_activities = EventSource(
    "user_activities", schema=EVENT_SCHEMA, entity=user, event_time="happened_at", event_id="event_id"
)


def _weight() -> pc.Expression:
    kind = pc.field("type")
    return pc.if_else(
        kind == "login",
        WEIGHTS["login"],
        pc.if_else(
            kind == "purchase", WEIGHTS["purchase"], pc.if_else(kind == "share", WEIGHTS["share"], WEIGHTS["other"])
        ),
    )


user_features = FeatureView(
    "user_features",
    version=1,
    source=user_activities,
    features={
        "activity_count": Count(window=f"{WINDOW_DAYS}d"),
        "avg_session_duration": Mean("session_duration", window=f"{WINDOW_DAYS}d"),
        "days_since_last": TimeSinceLast(unit="day", window=f"{WINDOW_DAYS}d"),
        "active_days": DistinctDays(window=f"{WINDOW_DAYS}d"),
        "weighted_activity": Sum(_weight(), window=f"{WINDOW_DAYS}d"),
    },
)


@user_features.derived
def activity_score(weighted_activity: FloatArray) -> FloatArray:
    """Grows with what a user does, and ever more slowly."""
    return np.log1p(weighted_activity)


def ten_features(name: str, *, where: pc.Expression | None = None, part: slice = slice(None)) -> FeatureView:
    """A view with ten features over sliding windows of 14 and 30 days, kept in daily tiles.

    Args:
        name: The view's.
        where: Only these activities count.
        part: Which of the ten.
    """
    long, short = f"{WINDOW_DAYS}d", "14d"
    features = {
        "count_30d": Count(window=long),
        "count_14d": Count(window=short),
        "duration_30d": Sum("session_duration", window=long),
        "duration_14d": Sum("session_duration", window=short),
        "avg_duration_30d": Mean("session_duration", window=long),
        "shortest_30d": Min("session_duration", window=long),
        "longest_30d": Max("session_duration", window=long),
        "weight_30d": Sum(_weight(), window=long),
        "active_days_30d": DistinctDays(window=long),
        "days_since_last": TimeSinceLast(unit="day", window=long),
    }
    chosen = dict(list(features.items())[part])
    return FeatureView(name, version=1, source=user_activities, where=where, features=chosen)


def events(n_events: int, n_users: int, seed: int) -> pa.Table:
    """Activities in the order they happened.

    Args:
        n_events: How many.
        n_users: Of how many users; numbers 0 to ``n_users - 1``, some may do nothing at all.
        seed: The same seed gives the same events.

    Returns:
        The columns of `EVENT_SCHEMA`, ``n_events`` rows; 2 % have no session duration.
    """
    return next(event_batches(n_events, n_users, seed, batch_rows=n_events))


def event_batches(
    n_events: int, n_users: int, seed: int, *, batch_rows: int = 1_000_000, busiest: float = 0.0
) -> Iterator[pa.Table]:
    """The same, a stretch of time after the other, for more of them than fit into memory.

    Args:
        n_events: How many in all.
        n_users: Of how many users.
        seed: The same seed and batch size give the same events.
        batch_rows: Most events a batch.
        busiest: The share of the events that one user has besides.

    Yields:
        The columns of `EVENT_SCHEMA`.
    """
    n_batches = -(-n_events // batch_rows)
    edges_us = START_US + np.arange(n_batches + 1) * (DAYS * US_PER_DAY) // n_batches
    firsts = np.arange(n_batches + 1) * n_events // n_batches
    for number in range(n_batches):
        rng = np.random.default_rng([seed, number])
        ids = np.arange(firsts[number], firsts[number + 1])
        n = len(ids)
        times = rng.integers(edges_us[number], edges_us[number + 1], n)
        times.sort()
        kinds = pa.DictionaryArray.from_arrays(
            pa.array(np.searchsorted(np.cumsum(_SHARES)[:-1], rng.random(n)).astype(np.int8)), pa.array(TYPES)
        )
        durations = np.round(rng.lognormal(5.0, 1.2, n), 3)
        users = _skewed(rng, n, n_users, seed)
        if busiest:
            users[rng.random(n) < busiest] = 0
        yield pa.table(
            [
                pa.array(users),
                pa.array(ids),
                pa.array(times).cast(TIMESTAMP),
                kinds.cast(pa.string()),
                pa.array(durations, mask=rng.random(n) < _NO_DURATION),
            ],
            schema=EVENT_SCHEMA,
        )


def spine(n_rows: int, n_users: int, seed: int) -> pa.Table:
    """Users at instants of the second half of the time, when a whole window lies behind.

    Users are drawn evenly, as a training set draws them, not by how much they do.

    Args:
        n_rows: How many rows.
        n_users: As for `events`.
        seed: The same seed gives the same rows.

    Returns:
        Columns ``user_id`` and ``as_of``, ``n_rows`` rows in no order.
    """
    rng = np.random.default_rng([seed, 1])
    first = START_US + WINDOW_DAYS * US_PER_DAY
    instants = rng.integers(first, START_US + DAYS * US_PER_DAY, n_rows)
    return pa.table(
        {"user_id": pa.array(rng.integers(0, n_users, n_rows)), "as_of": pa.array(instants).cast(TIMESTAMP)}
    )


def _skewed(rng: np.random.Generator, n_events: int, n_users: int, seed: int) -> NDArray[np.int64]:
    """Users of events, busy ones spread over all numbers; the same ones in all batches."""
    share = np.cumsum(1.0 / (np.arange(n_users) + _HEAD))
    ranks = np.searchsorted(share / share[-1], rng.random(n_events))
    return np.random.default_rng([seed, 0, 1]).permutation(n_users)[np.minimum(ranks, n_users - 1)]
