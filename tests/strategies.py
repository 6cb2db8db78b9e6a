"""hypothesis strategies: streams of events, views over them, instants to ask about.

Small and mean: few entities, times on the edges of hops and days, ties, repeated ids, late
arrivals, nulls, NaN, ±Inf, and magnitudes from 1e-12 to 1e12 side by side.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
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
    CountDistinct,
    DistinctDays,
    First,
    Last,
    Latest,
    Max,
    Mean,
    Min,
    Quantile,
    StdDev,
    Sum,
    TimeSinceLast,
)
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.features.windows import default_hop_us
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

ORDERS = EventSource(
    "orders",
    schema=pa.schema([pa.field("user_id", pa.int64()), pa.field("shop", pa.string()), *_COLUMNS]),
    entity=[USER, SHOP],
    event_time="at",
    event_id="event_id",
)
"""Each event is about two entities."""

KEYS: dict[str, list[tuple[Any, ...]]] = {
    USER.name: [(7,), (-1,), (2**40,)],
    SHOP.name: [("a",), ("b|c",), ("ü%7C",)],
    DEVICE.name: [("a", 1), ("a", 2), ("a|2", 1)],
}
UNKNOWN: dict[str, tuple[Any, ...]] = {USER.name: (404,), SHOP.name: ("nobody",), DEVICE.name: ("a", 3)}

_HOPS_US = (5 * US_PER_MINUTE, US_PER_HOUR, US_PER_DAY)

# Drawing is most of a property test's time, so choices come from long prepared lists, one draw each.
_RANDOM = random.Random(1997)


def _prepared_instants() -> list[int]:
    """The edges of hops inside the span, what is just beside them, and some in between."""
    edges = [ORIGIN_US + _RANDOM.randrange(SPAN_US) // hop_us * hop_us for hop_us in _HOPS_US for _ in range(40)]
    beside = [edge + by for edge in edges[::2] for by in (-1, 1)]
    return [*edges, *beside, *(ORIGIN_US + _RANDOM.randrange(SPAN_US) for _ in range(150))]


def _prepared_amounts() -> list[float | None]:
    """Usable numbers of every size, and what must be skipped."""
    plain = [0.0, -0.0, 0.1, 1.0, -2.5, 1e12, -1e12, 1e-12, 3.3e11, 7e-7]
    skipped = [None, float("nan"), float("inf"), float("-inf")]
    wide = [_RANDOM.choice([-1, 1]) * 10.0 ** _RANDOM.uniform(-12, 12) for _ in range(60)]
    return [*plain, *skipped, *wide, *skipped]


# Beside an event: on it, just after it, and where windows and time-to-lives of it end.
_BESIDE_US = (0, 1, 6 * US_PER_HOUR, 6 * US_PER_HOUR + 1, US_PER_DAY, 10 * US_PER_DAY, 10 * US_PER_DAY + 1)
_KINDS = (None, "login", "purchase", "share")
_LATENESS_US = (0, 0, 1, US_PER_HOUR, 3 * US_PER_DAY)
_DETAILS = list(itertools.product((None, 0, 1, 3, -2, 2**40), _KINDS, (None, True, False), _LATENESS_US))

_INSTANTS = st.sampled_from(_prepared_instants())


def _prepared_pools() -> list[list[int]]:
    """A few instants each, some of them close together: ties and busy days are the rule."""
    prepared = _prepared_instants()
    pools = []
    for _ in range(200):
        chosen = _RANDOM.sample(prepared, 6)
        crowd = [chosen[0] + _RANDOM.choice(_HOPS_US) * _RANDOM.randrange(12) for _ in range(4)]
        pools.append([*chosen, *crowd])
    return pools


_POOLS = st.sampled_from(_prepared_pools())
_EVENTS = st.tuples(
    st.sampled_from([0, 0, 0, 1, 2]),
    st.integers(0, 40),
    st.integers(0, 9),
    st.sampled_from(_prepared_amounts()),
    st.sampled_from(_DETAILS),
)


@st.composite
def event_streams(draw: st.DrawFn, entity: str = USER.name, *, max_size: int = 24) -> pa.Table:
    """Events of one source in order of arrival, with ``_ingested_us``; repeats of an id included."""
    source, keys = SOURCES[entity], KEYS[entity]
    pool = draw(_POOLS)
    # Left to itself, hypothesis prefers lists of about five.
    drawn = draw(st.lists(_EVENTS, min_size=draw(st.sampled_from([0, max_size // 2])), max_size=max_size))
    rows = [(who, number, pool[when], amount, detail) for who, number, when, amount, detail in drawn]
    columns: dict[str, Any] = {
        column: [keys[row[0]][part] for row in rows] for part, column in enumerate(source.entities[0].key_columns)
    }
    columns |= {
        # An id names an event of one entity: a repeat may differ in anything else.
        "event_id": [f"{who}:{number}" for who, number, *_ in rows],
        "at": [time_us for _, _, time_us, *_ in rows],
        "amount": [amount for *_, amount, _ in rows],
        "quantity": [quantity for *_, (quantity, _, _, _) in rows],
        "kind": [kind for *_, (_, kind, _, _) in rows],
        "flagged": [flagged for *_, (_, _, flagged, _) in rows],
    }
    arrays = [
        pa.array(columns[field.name], pa.int64()).cast(TIMESTAMP)
        if field.type == TIMESTAMP
        else pa.array(columns[field.name], field.type, from_pandas=False)
        for field in source.schema
    ]
    ingested_us = [time_us + late_us for _, _, time_us, _, (*_, late_us) in rows]
    return pa.table(
        [*arrays, pa.array(ingested_us, pa.int64())],
        schema=source.schema.append(pa.field("_ingested_us", pa.int64())),
    )


@st.composite
def order_streams(draw: st.DrawFn, *, max_size: int = 24) -> pa.Table:
    """As `event_streams`, of `ORDERS`: an id names an event of one user in one shop."""
    events = draw(event_streams(USER.name, max_size=max_size))
    shops = [KEYS[SHOP.name][int(text.partition(":")[2]) % 3][0] for text in events["event_id"].to_pylist()]
    return events.add_column(1, "shop", pa.array(shops, pa.string()))


_WHERES: dict[str, pc.Expression] = {
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


_CATEGORIES: list[tuple[Any, tuple[Any, ...]]] = [
    ("kind", ("purchase", "login", "share", "never")),
    ("kind", ("purchase",)),
    # 52 of them, so that the highest bit is used.
    ("kind", (*(f"a{number}" for number in range(50)), "purchase", "share")),
    ("quantity", (0, 1, 3, -2, 2**40, 99)),
    ("quantity", (*range(1, 52), -2)),
    (pc.if_else(pc.field("flagged"), pc.field("kind"), "plain"), ("plain", "login", "purchase")),
]
_SHARES = (0.0, 0.1, 0.5, 0.5, 0.9, 0.99, 1.0)
_RANGES = [((0.01, 1000.0), 0.1), ((1e-12, 1e12), 0.5), ((1.0, 5.0), 0.05), ((1e-3, 1e6), 0.25), ((2.5, 3e11), 0.4)]
_MOST_CELLS = 6_000  # so that an example's rings stay small
_FUNCTIONS: list[type[Aggregation]] = [
    Count, Sum, Sum, Mean, StdDev, StdDev, Min, Max, First, Last, Latest, DistinctDays, CountDistinct, CountDistinct,
    Quantile, Quantile, TimeSinceLast,
]  # fmt: skip


def _prepared_quantile(
    wanted: str | None, windows: list[str | None], hop_us: int | None, column: Any, where: Any
) -> Quantile:
    between, error = _RANDOM.choice(_RANGES)
    chosen = Quantile(
        column,
        q=_RANDOM.choice(_SHARES),
        between=between,
        relative_error=error,
        signed=_RANDOM.random() < 0.7,
        where=where,
    )
    slots = {
        window: 0
        if window is None
        else parse_duration_us(window) // (hop_us or default_hop_us(parse_duration_us(window)))
        for window in windows
    }
    fitting = [window for window in windows if slots[window] * chosen.bins.width <= _MOST_CELLS]
    return replace(chosen, window=wanted if wanted in fitting else _RANDOM.choice(fitting))


def _prepared_aggregations(hop: str | None) -> list[Aggregation]:
    """Each function over each window that a hop allows, a few times, of any input and condition."""
    view_hop_us = None if hop is None else parse_duration_us(hop)
    hop_us = view_hop_us or 1
    whole = [window for window in _WINDOWS if window is None or parse_duration_us(window) % hop_us == 0]
    days = [window for window in _WINDOWS if window is not None and parse_duration_us(window) % US_PER_DAY == 0]
    pairs = [
        (function, window) for function in _FUNCTIONS for window in (days if function is DistinctDays else whole)
    ]
    found: list[Aggregation] = []
    for function, window in itertools.islice(itertools.cycle(pairs), 600):
        where = _RANDOM.choice([None, *_WHERES.values()])
        column = _RANDOM.choice(list(_INPUTS.values()))
        if function is TimeSinceLast:
            unit: Any = _RANDOM.choice(["second", "minute", "hour", "day"])
            found.append(TimeSinceLast(window=window, where=where, unit=unit))
        elif function is Quantile:
            found.append(_prepared_quantile(window, whole, view_hop_us, column, where))
        elif function is CountDistinct:
            column, categories = _RANDOM.choice(_CATEGORIES)
            found.append(CountDistinct(column, categories=categories, window=window, where=where))
        elif function in (Count, DistinctDays) and _RANDOM.random() < 0.5:
            found.append(function(window=window, where=where))
        else:
            if function in (First, Last, Latest) and _RANDOM.random() < 0.3:
                column = "kind"  # a text, as its code
            found.append(function(column, window=window, where=where))
    return found


_HOPS = (None, None, "5m", "1h", "6h", "1d")
AGGREGATIONS = {hop: _prepared_aggregations(hop) for hop in dict.fromkeys(_HOPS)}
"""What a view of a hop is made of."""

_AGGREGATIONS = {hop: st.sampled_from(prepared) for hop, prepared in AGGREGATIONS.items()}
_VIEW_OPTIONS = st.sampled_from(
    list(itertools.product(_HOPS, (None, None, _WHERES["positive"]), (None, None, "6h", "10d"), (True, False)))
)


@st.composite
def views(
    draw: st.DrawFn,
    entity: str = USER.name,
    *,
    name: str = "view",
    source: EventSource | None = None,
    max_features: int = 5,
) -> FeatureView:
    """A view of any functions, with or without hop, condition, ttl and derived features."""
    hop, where, ttl, derives = draw(_VIEW_OPTIONS)
    features = draw(st.lists(_AGGREGATIONS[hop], min_size=1, max_size=max_features))
    view = FeatureView(
        name,
        version=1,
        source=source or SOURCES[entity],
        entity=SOURCES[entity].entities[0],
        features={f"f{position}": each for position, each in enumerate(features)},
        hop=hop,
        where=where,
        ttl=ttl,
    )
    if derives:

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
    near = [time + by for time in times for by in _BESIDE_US]
    instants = st.one_of(_INSTANTS, st.sampled_from(near)) if near else _INSTANTS
    keys = st.sampled_from([*KEYS[entity], UNKNOWN[entity]])
    rows = draw(st.lists(st.tuples(keys, instants), min_size=1, max_size=max_size))
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
