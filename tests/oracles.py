"""A brute-force evaluator of features, written from the window contract alone.

It imports nothing from `heliostat.features`: for every feature of every row it walks over all
events and does what the contract's sentences say, with exact arithmetic. Slow, and easy to
believe. Declared objects are only asked for what they declare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from heliostat.schema import hash64, text_code, tie48

DAY_US = 86_400_000_000
HOUR_US = 3_600_000_000
RELATIVE_ERROR = 1e-12
UNITS_US = {"second": 1_000_000, "minute": 60_000_000, "hour": HOUR_US, "day": DAY_US}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Answer:
    """What a feature is, and how far from it an engine may be.

    Attributes:
        value: The exact value, rounded once; NaN is null.
        tolerance: 1e-12 of what the contract allows an error of; 0 means equal.
    """

    value: float
    tolerance: float = 0.0

    def accepts(self, found: float) -> bool:
        """Whether an engine's value is this one."""
        if math.isnan(self.value) or math.isnan(found):
            return math.isnan(self.value) and math.isnan(found)
        return abs(found - self.value) <= self.tolerance


@dataclass(frozen=True)
class Event:
    """One event: whose, when, what breaks ties, when it was taken in, and its inputs by feature."""

    key: tuple[Any, ...]
    time_us: int
    tie: int
    event_id: Any
    ingested_us: int
    passes_view: bool
    inputs: dict[str, Any]


class Oracle:
    """Answers for one view over one stream of events.

    Args:
        view: A declared feature view.
        events: The source's columns and, if it matters, ``_ingested_us``; any order, repeats included.
    """

    def __init__(self, view: Any, events: pa.Table) -> None:
        self.view = view
        self.events = self._read(events)

    def _read(self, table: pa.Table) -> list[Event]:
        view, n = self.view, table.num_rows
        keys = list(zip(*(table[column].to_pylist() for column in view.entity.key_columns), strict=True))
        times = [microseconds(instant) for instant in table[view.source.event_time].to_pylist()]
        ids = table[view.source.event_id].to_pylist()
        ties = tie48(hash64(table[view.source.event_id])).tolist()
        ingested = table["_ingested_us"].to_pylist() if "_ingested_us" in table.column_names else [0] * n
        passes = met(table, view.where)
        inputs = {
            name: [
                value if fits else None
                for value, fits in zip(looked_at(table, each), met(table, each.where), strict=True)
            ]
            for name, each in view.base_features.items()
        }
        rows = [
            Event(
                keys[i], times[i], ties[i], ids[i], ingested[i], passes[i],
                {name: values[i] for name, values in inputs.items()},
            )
            for i in range(n)
        ]  # fmt: skip
        # The same event id twice is one event: the one that came first.
        rows.sort(key=lambda event: event.ingested_us)
        first: dict[Any, Event] = {}
        for event in rows:
            first.setdefault(event.event_id, event)
        return list(first.values())

    def answer(self, key: tuple[Any, ...], as_of_us: int, *, known_at_us: int | None = None) -> dict[str, Answer]:
        """All aggregated features of an entity at an instant (derived ones follow from them).

        Args:
            key: Values of the entity's key columns.
            as_of_us: The query instant.
            known_at_us: Only events taken in by then count.
        """
        view = self.view
        own = [
            event
            for event in self.events
            if event.key == key
            and event.time_us < as_of_us
            and (known_at_us is None or event.ingested_us <= known_at_us)
        ]
        if view.ttl_us is not None:
            last = max((event.time_us for event in own if event.passes_view), default=None)
            if last is None or as_of_us - last > view.ttl_us:
                own = []
        answers = {}
        for name, each in view.base_features.items():
            since_us = lower_edge(as_of_us, each, view.hop_us)
            used = [
                event
                for event in own
                if (since_us is None or event.time_us >= since_us) and event.inputs[name] is not None
            ]
            answers[name] = aggregate(each, used, [event.inputs[name] for event in used], as_of_us)
        return answers


def lower_edge(as_of_us: int, aggregation: Any, view_hop_us: int | None) -> int | None:
    """floor(q − W, h); None for a lifetime."""
    window_us = aggregation.window_us
    if window_us is None:
        return None
    if type(aggregation).__name__ == "DistinctDays":
        hop_us = DAY_US  # what it counts are days, so its tiles are
    elif view_hop_us is not None:
        hop_us = view_hop_us
    elif window_us >= 12 * DAY_US:
        hop_us = DAY_US
    elif window_us >= 12 * HOUR_US:
        hop_us = HOUR_US
    else:
        hop_us = 5 * 60_000_000
    return (as_of_us - window_us) // hop_us * hop_us


def aggregate(aggregation: Any, events: list[Event], values: list[Any], as_of_us: int) -> Answer:
    """The function of the events in the window."""
    function = type(aggregation).__name__
    if function == "Count":
        return Answer(float(len(events)))
    if function == "Sum":
        return Answer(exact_sum(values), RELATIVE_ERROR * magnitude(values))
    if not events:
        return Answer(math.nan)
    match function:
        case "First":
            return Answer(min(zip(events, values, strict=True), key=lambda pair: order(pair[0]))[1])
        case "Last" | "Latest":
            return Answer(max(zip(events, values, strict=True), key=lambda pair: order(pair[0]))[1])
        case "DistinctDays":
            return Answer(float(len({event.time_us // DAY_US for event in events})))
        case "TimeSinceLast":
            since_us = as_of_us - max(event.time_us for event in events)
            value = float(Fraction(since_us, UNITS_US[aggregation.unit]))
            return Answer(value, RELATIVE_ERROR * value)
        case _:
            return aggregate_values(aggregation, values)


def aggregate_values(aggregation: Any, values: list[Any]) -> Answer:
    """The function of at least one value, whenever they were."""
    function = type(aggregation).__name__
    match function:
        case "Mean":
            exact = sum((Fraction(value) for value in values), Fraction()) / len(values)
            return Answer(float(exact), RELATIVE_ERROR * magnitude(values) / len(values))
        case "StdDev":
            return standard_deviation(values)
        case "Min":
            return Answer(min(values))
        case "Max":
            return Answer(max(values))
        case "CountDistinct":
            return Answer(float(len(set(values))))
        case "Quantile":
            return quantile(aggregation, values)
        case _:
            raise AssertionError(f"the contract page doesn't say what {function} is")


def standard_deviation(values: list[Any]) -> Answer:
    """Of a sample, so divided by n − 1: exactly 0 of equal values, else within 1e-12 of their root mean square."""
    n = len(values)
    if n < 2:
        return Answer(math.nan)
    mean = sum((Fraction(value) for value in values), Fraction()) / n
    variance = sum((Fraction(value) - mean) ** 2 for value in values) / (n - 1)
    if variance == 0:
        return Answer(0.0)
    root_mean_square = math.sqrt(float(sum(Fraction(value) ** 2 for value in values) / n))
    return Answer(math.sqrt(float(variance)), RELATIVE_ERROR * root_mean_square)


def quantile(aggregation: Any, values: list[Any]) -> Answer:
    """Each value is replaced by that of its bin; then it is the one with ⌊q·(n − 1)⌋ others before it."""
    error, (low, high) = aggregation.relative_error, aggregation.between
    ratio = (1 + error) / (1 - error)
    n_bins = max(1, math.ceil((math.log(high) - math.log(low)) / math.log(ratio)))

    def binned(value: float) -> float:
        if abs(value) < low or (value < 0 and not aggregation.signed):
            return 0.0
        number = max(number for number in range(n_bins) if low * ratio**number <= abs(value))
        return math.copysign(low * ratio**number * (2 * ratio / (ratio + 1)), value)

    inside = sorted(binned(value) for value in values)
    value = inside[math.floor(aggregation.q * (len(inside) - 1))]
    return Answer(value, RELATIVE_ERROR * abs(value))


def order(event: Event) -> tuple[int, int]:
    """What first and last go by."""
    return event.time_us, event.tie


def exact_sum(values: list[Any]) -> float:
    """Correctly rounded."""
    return math.fsum(values)


def magnitude(values: list[Any]) -> float:
    """The sum of |x|."""
    return math.fsum(abs(value) for value in values)


def microseconds(instant: datetime) -> int:
    """Since the epoch; without a zone it is UTC."""
    aware = instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)
    return (aware - EPOCH) // timedelta(microseconds=1)


def numbers(table: pa.Table, column: Any) -> list[float | None]:
    """A column or expression as numbers; None where there is nothing to use: null, NaN, ±Inf."""
    if column is None:
        return [1.0] * table.num_rows
    raw = table[column].to_pylist() if isinstance(column, str) else evaluated(table, column)
    raw = [text_code(value) if isinstance(value, str) else value for value in raw]
    return [float(value) if value is not None and math.isfinite(float(value)) else None for value in raw]


def looked_at(table: pa.Table, aggregation: Any) -> list[Any]:
    """What an aggregation uses of each row; None where it uses nothing."""
    if type(aggregation).__name__ == "Latest":  # an event without a value says that there is none now
        return [math.nan if value is None else value for value in numbers(table, aggregation.column)]
    if type(aggregation).__name__ != "CountDistinct":
        return numbers(table, aggregation.column)
    raw = (
        table[aggregation.column].to_pylist()
        if isinstance(aggregation.column, str)
        else evaluated(table, aggregation.column)
    )
    return [value if value in aggregation.categories else None for value in raw]


def met(table: pa.Table, condition: Any) -> list[bool]:
    """Where a condition is true; null isn't."""
    if condition is None:
        return [True] * table.num_rows
    return [value is True for value in evaluated(table, condition)]


def evaluated(table: pa.Table, expression: Any) -> list[Any]:
    """An expression's value for each row, by another way than the platform's."""
    scanner = pyarrow.dataset.dataset(table).scanner(columns={"value": expression}, use_threads=False)
    return scanner.to_table()["value"].to_pylist()


def derived(view: Any, features: dict[str, float]) -> dict[str, float]:
    """What the view's derived features are, given its aggregated ones: one row."""
    values = {name: np.array([value]) for name, value in features.items()}
    for name, feature in view.derived_features.items():
        with np.errstate(all="ignore"):
            values[name] = np.asarray(feature.function(*(values[each] for each in feature.inputs)), float)
    return {name: float(values[name][0]) for name in view.derived_features}
