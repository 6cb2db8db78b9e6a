"""hypothesis strategies: streams of events, views over them, instants to ask about.

Small and mean: few entities, times on the edges of hops and days, ties, repeated ids, late
arrivals, nulls, NaN, ±Inf, and magnitudes from 1e-12 to 1e12 side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import strategies as st
from numpy.typing import NDArray

from heliostat.clock import US_PER_DAY, US_PER_HOUR, US_PER_MINUTE, parse_duration_us, parse_instant_us
from heliostat.features.aggregations import (
    Aggregation,
    Count,
    DistinctDays,
    First,
    Last,
    Max,
    Mean,
    Min,
    Sum,
    TimeSinceLast,
)
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.schema import TIMESTAMP

FloatArray = NDArray[np.float64]

ORIGIN_US = parse_instant_us("1998-03-01")
SPAN_US = 45 * US_PER_DAY

_COLUMNS = [
    pa.field("event_id", pa.string()),
    pa.field("at", TIMESTAMP),
    pa.field("amount", pa.float64()),
    pa.field("quantity", pa.int64()),
    pa.field("kind", pa.string()),
    pa.field("flagged", pa.bool_()),
]

USER = Entity("user", keys={"user_id": "int64"})
SHOP = Entity("shop", keys={"shop": "string"})
DEVICE = Entity("device", keys={"account": "string", "slot": "int64"})

SOURCES = {
    USER.name: EventSource(
        "activities",
        schema=pa.schema([pa.field("user_id", pa.int64()), *_COLUMNS]),
        entity=USER,
        event_time="at",
        event_id="event_id",
    ),
    SHOP.name: EventSource(
        "sales",
        schema=pa.schema([pa.field("shop", pa.string()), *_COLUMNS]),
        entity=SHOP,
        event_time="at",
        event_id="event_id",
    ),
    DEVICE.name: EventSource(
        "signals",
        schema=pa.schema([pa.field("account", pa.string()), pa.field("slot", pa.int64()), *_COLUMNS]),
        entity=DEVICE,
        event_time="at",
        event_id="event_id",
    ),
}

KEYS: dict[str, list[tuple[Any, ...]]] = {
    USER.name: [(7,), (-1,), (2**40,)],
    SHOP.name: [("a",), ("b|c",), ("ü%7C",)],
    DEVICE.name: [("a", 1), ("a", 2), ("a|2", 1)],
}
UNKNOWN: dict[str, tuple[Any, ...]] = {USER.name: (404,), SHOP.name: ("nobody",), DEVICE.name: ("a", 3)}

_HOPS_US = (5 * US_PER_MINUTE, US_PER_HOUR, US_PER_DAY)
_NUMBERS = [0.0, -0.0, 0.1, 1.0, -2.5, 1e12, -1e12, 1e-12, 3.3e11, 7e-7]


def instants() -> st.SearchStrategy[int]:
    """Microseconds inside the span: on an edge, just beside one, or anywhere."""
    on_edges = st.builds(
        lambda hop_us, share, beside: ORIGIN_US + share * SPAN_US // 64 // hop_us * hop_us + beside,
        st.sampled_from(_HOPS_US),
        st.integers(0, 64),
        st.sampled_from([0, 0, -1, 1]),
    )
    return st.one_of(on_edges, st.integers(ORIGIN_US, ORIGIN_US + SPAN_US))


def amounts() -> st.SearchStrategy[float | None]:
    """Usable numbers of every size, and what must be skipped."""
    return st.one_of(
        st.sampled_from(_NUMBERS),
        st.floats(-1e12, 1e12, allow_nan=False),
        st.sampled_from([None, float("nan"), float("inf"), float("-inf")]),
    )


@st.composite
def event_streams(draw: st.DrawFn, entity: str = USER.name, *, max_size: int = 24) -> pa.Table:
    """Events of one source in order of arrival, with ``_ingested_us``; repeats of an id included."""
    source, keys = SOURCES[entity], KEYS[entity]
    rows = draw(
        st.lists(
            st.tuples(
                st.integers(0, len(keys) - 1),
                st.integers(0, 30),
                instants(),
                amounts(),
                st.sampled_from([None, 0, 1, 3, -2, 2**40]),
                st.sampled_from([None, "login", "purchase", "share"]),
                st.sampled_from([None, True, False]),
                st.sampled_from([0, 0, 1, US_PER_HOUR, 3 * US_PER_DAY]),
            ),
            max_size=max_size,
        )
    )
    ingested_us = [row[2] + row[7] for row in rows]
    columns: dict[str, Any] = {
        column: [keys[row[0]][part] for row in rows] for part, column in enumerate(source.entities[0].key_columns)
    }
    columns |= {
        # An id names an event of one entity: a repeat may differ in anything else.
        "event_id": [f"{row[0]}:{row[1]}" for row in rows],
        "at": [row[2] for row in rows],
        "amount": [row[3] for row in rows],
        "quantity": [row[4] for row in rows],
        "kind": [row[5] for row in rows],
        "flagged": [row[6] for row in rows],
    }
    arrays = [
        pa.array(columns[field.name], pa.int64()).cast(TIMESTAMP)
        if field.type == TIMESTAMP
        else pa.array(columns[field.name], field.type, from_pandas=False)
        for field in source.schema
    ]
    return pa.table([*arrays, pa.array(ingested_us, pa.int64())], schema=source.schema.append(
        pa.field("_ingested_us", pa.int64())
    ))  # fmt: skip


_WHERES = {
    "none": None,
    "purchases": pc.field("kind") == "purchase",
    "positive": pc.field("amount") > 0,
    "flagged": pc.field("flagged"),
}
_INPUTS: dict[str, Any] = {
    "amount": "amount",
    "quantity": "quantity",
    "flagged": "flagged",
    "weight": pc.if_else(pc.field("kind") == "purchase", 5.0, 0.5),
    "doubled": pc.multiply(pc.field("amount"), 2.0),
}
_WINDOWS = ["5m", "40m", "6h", "12h", "1d", "7d", "11d", "12d", "30d", None]


@st.composite
def aggregations(draw: st.DrawFn, *, hop: str | None = None) -> Aggregation:
    """Any function with a window that its hop divides, or none."""
    hop_us = None if hop is None else parse_duration_us(hop)
    function = draw(st.sampled_from([Count, Sum, Sum, Mean, Min, Max, First, Last, DistinctDays, TimeSinceLast]))
    fitting = [
        window
        for window in _WINDOWS
        if (window is None and function is not DistinctDays)
        or (window is not None and function is DistinctDays and parse_duration_us(window) % US_PER_DAY == 0)
        or (
            window is not None
            and function is not DistinctDays
            and (hop_us is None or parse_duration_us(window) % hop_us == 0)
        )
    ]
    window = draw(st.sampled_from(fitting))
    where = _WHERES[draw(st.sampled_from(list(_WHERES)))]
    if function is TimeSinceLast:
        return TimeSinceLast(window=window, where=where, unit=draw(st.sampled_from(["second", "hour", "day"])))
    inputs = list(_INPUTS)
    if function in (Count, DistinctDays):
        chosen = draw(st.sampled_from([None, *inputs]))
        return function(None if chosen is None else _INPUTS[chosen], window=window, where=where)
    return function(_INPUTS[draw(st.sampled_from(inputs))], window=window, where=where)


@st.composite
def views(draw: st.DrawFn, entity: str = USER.name, *, name: str = "view", max_features: int = 5) -> FeatureView:
    """A view of any functions, with or without hop, condition, ttl and derived features."""
    hop = draw(st.sampled_from([None, None, "5m", "1h", "6h", "1d"]))
    features = draw(st.lists(aggregations(hop=hop), min_size=1, max_size=max_features))
    view = FeatureView(
        name,
        version=1,
        source=SOURCES[entity],
        features={f"f{position}": each for position, each in enumerate(features)},
        hop=hop,
        where=_WHERES[draw(st.sampled_from(["none", "none", "positive"]))],
        ttl=draw(st.sampled_from([None, None, "6h", "10d"])),
    )
    if draw(st.booleans()):

        def score(f0: FloatArray) -> FloatArray:
            return np.log1p(np.abs(f0))

        def score_and_value(score: FloatArray, f0: FloatArray) -> FloatArray:
            return score + f0

        view.derived(score)
        view.derived(score_and_value)
    return view


@st.composite
def spines(
    draw: st.DrawFn, entity: str = USER.name, *, events: pa.Table | None = None, max_size: int = 8
) -> tuple[list[tuple[Any, ...]], list[int]]:
    """Keys and instants to ask about: repeats, unknown entities, instants at and beside events."""
    times: list[int] = [] if events is None else events["at"].cast(pa.int64()).to_pylist()
    beside = (
        st.builds(lambda time, by: time + by, st.sampled_from(times), st.sampled_from([0, 0, 1, -1, US_PER_DAY]))
        if times
        else instants()
    )
    keys = st.sampled_from([*KEYS[entity], UNKNOWN[entity]])
    rows = draw(st.lists(st.tuples(keys, st.one_of(instants(), beside)), min_size=1, max_size=max_size))
    return [key for key, _ in rows], [as_of_us for _, as_of_us in rows]


def key_table(entity: str, keys: list[tuple[Any, ...]]) -> pa.Table:
    """Keys as the columns of a spine."""
    declared = SOURCES[entity].entities[0]
    return pa.table(
        {
            column: pa.array([key[part] for key in keys], pa.int64() if dtype == "int64" else pa.string())
            for part, (column, dtype) in enumerate(declared.keys.items())
        }
    )
