"""Which events are taken: every row is judged by itself, and what is refused says why. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.clock import format_duration, format_instant
from heliostat.errors import SchemaMismatchError
from heliostat.features.definitions import EventSource
from heliostat.schema import cast_column, describe_schema, times_us

IntArray = NDArray[np.int64]

# The first year that has a name in ISO 8601 and in Python; what lies before is a broken clock.
_EARLIEST_US = -62_135_596_800_000_000
_UNREADABLE = (pa.ArrowException, TypeError, ValueError, OverflowError)
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Checked:
    """What a check says of a batch of ``n`` events.

    Attributes:
        accepted: The source's columns, in the batch's order.
        rows: Where the accepted ones were in the batch, ascending.
        rejected: Where the refused ones were, ascending.
        reasons: Why, one for each refused.
    """

    accepted: pa.Table
    rows: IntArray
    rejected: IntArray
    reasons: tuple[str, ...]


class EventCheck:
    """Judges events of one source.

    Args:
        source: What they should look like.
        future_tolerance_us: How far in the future an event may be; later ones would evict live tiles.
    """

    def __init__(self, source: EventSource, *, future_tolerance_us: int) -> None:
        self.source = source
        self._future_tolerance_us = future_tolerance_us
        self._keys = tuple(dict.fromkeys(key for entity in source.entities for key in entity.key_columns))

    def require_columns(self, schema: pa.Schema, *, what: str) -> None:
        """Refuse a table of which no row could be right: a column is missing or of a hopeless type.

        Args:
            schema: The table's.
            what: How the message names it.

        Raises:
            SchemaMismatchError: Naming every such column.
        """
        problems = []
        for field in self.source.given_schema:
            if field.name not in schema.names:
                problems.append(f"column {field.name!r} is missing (there are: {', '.join(schema.names)})")
                continue
            found = schema.field(field.name).type
            try:
                _cast(pa.chunked_array([], type=found), field.type)
            except _UNREADABLE:
                problems.append(f"column {field.name!r} is {found}, not {field.type}")
        if problems:
            raise SchemaMismatchError(what, tuple(problems), describe_schema(self.source.given_schema))

    def check(self, events: pa.Table | Sequence[Any], *, now_us: int) -> Checked:
        """Judge events.

        Args:
            events: A table that `require_columns` has passed, or parsed JSON objects; ``n`` of them.
            now_us: The present, microseconds.
        """
        n = len(events)
        reasons: dict[int, str] = {}
        columns: list[pa.Array] = []
        given = events if isinstance(events, pa.Table) else _objects(events, reasons)
        for field in self.source.given_schema:
            values: Any = (
                given.column(field.name) if isinstance(given, pa.Table) else [row.get(field.name) for row in given]
            )
            column, unreadable = _converted(values, field.type)
            columns.append(column)
            for row, value in unreadable:
                reasons.setdefault(row, f"{field.name} is {_shown(value)}, which is no {field.type}")
        table = self.source.identified(pa.table(columns, schema=self.source.given_schema))
        for row, reason in self._faults(table, now_us):
            reasons.setdefault(row, reason)
        rejected = np.array(sorted(reasons), dtype=np.int64)
        rows = np.setdiff1d(np.arange(n), rejected, assume_unique=True)
        accepted = table if len(rows) == n else table.take(pa.array(rows))
        return Checked(accepted, rows, rejected, tuple(reasons[row] for row in rejected.tolist()))

    def _faults(self, table: pa.Table, now_us: int) -> list[tuple[int, str]]:
        """Rows whose values can be read and still can't be right."""
        source, found = self.source, list[tuple[int, str]]()
        given = source.given_schema.names
        required = dict.fromkeys(name for name in (*self._keys, source.event_id, source.event_time) if name in given)
        required.update(dict.fromkeys(field.name for field in source.schema if not field.nullable))
        for name in required:
            nulls = table.column(name).is_null()
            found.extend((row, f"{name} is missing") for row in _where(nulls))
            if pa.types.is_string(table.schema.field(name).type) and name in self._keys:
                empty = pc.fill_null(pc.equal(table.column(name), ""), False)
                found.extend((row, f"{name} is an empty text, and a key can't be") for row in _where(empty))
        event_time = source.event_time
        never = pa.scalar(0, table.schema.field(event_time).type)
        times = times_us(table.column(event_time).fill_null(never))
        tolerance = format_duration(self._future_tolerance_us) if self._future_tolerance_us else "0s"
        ahead = f"{event_time} is after now ({format_instant(now_us)}) by more than {tolerance}"
        found.extend((row, ahead) for row in np.flatnonzero(times > now_us + self._future_tolerance_us).tolist())
        broken = f"{event_time} is before the year 1"
        found.extend((row, broken) for row in np.flatnonzero(times < _EARLIEST_US).tolist())
        return found


def as_json(event: Mapping[str, Any] | Any) -> str:  # noqa: ANN401 - whatever somebody sent
    """What was refused, as JSON text; what JSON doesn't know as its text."""
    return json.dumps(event, default=str, ensure_ascii=False)


def _objects(events: Sequence[Any], reasons: dict[int, str]) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for row, event in enumerate(events):
        if isinstance(event, Mapping):
            rows.append(event)
        else:
            reasons[row] = f"it is {_shown(event)}, not an object with the event's columns"
            rows.append({})
    return rows


def _where(mask: pa.ChunkedArray) -> list[int]:
    rows: list[int] = np.flatnonzero(mask.to_numpy()).tolist()
    return rows


def _converted(values: Any, dtype: pa.DataType) -> tuple[pa.Array, list[tuple[int, Any]]]:  # noqa: ANN401 - list or array
    """Values of a type; those that can't be read are null, and listed with their row."""
    try:
        return _cast(values, dtype), []
    except _UNREADABLE:
        if not (isinstance(values, pa.ChunkedArray) and _is_text(values.type)):
            return _salvaged(values, dtype)
    # Texts repeat themselves: a file with one wrong word in every row is told quickly.
    encoded = values.combine_chunks().dictionary_encode()
    distinct, unreadable = _salvaged(pa.chunked_array([encoded.dictionary]), dtype)
    wrong = dict(unreadable)
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(np.isin(codes, list(wrong)))
    return distinct.take(encoded.indices), [(row, wrong[codes[row]]) for row in rows.tolist()]


def _salvaged(values: Any, dtype: pa.DataType) -> tuple[pa.Array, list[tuple[int, Any]]]:  # noqa: ANN401 - list or array
    """As `_converted`: what can't be cast whole is halved until the culprits are alone."""
    try:
        return _cast(values, dtype), []
    except _UNREADABLE:
        if len(values) == 1:
            value = values[0]
            return pa.nulls(1, dtype), [(0, value.as_py() if isinstance(value, pa.Scalar) else value)]
    middle = len(values) // 2
    left, left_rows = _salvaged(values[:middle], dtype)
    right, right_rows = _salvaged(values[middle:], dtype)
    return pa.concat_arrays([left, right]), [*left_rows, *((row + middle, value) for row, value in right_rows)]


def _cast(values: Any, dtype: pa.DataType) -> pa.Array:  # noqa: ANN401 - list or array
    column = values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([pa.array(values)])
    from_truth, to_truth = pa.types.is_boolean(column.type), pa.types.is_boolean(dtype)
    if from_truth != to_truth and not pa.types.is_null(column.type) and not _is_text(column.type):
        raise TypeError(f"{column.type} is no {dtype}")
    whole = cast_column(column, dtype).combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


def _is_text(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype))


def _shown(value: Any) -> str:  # noqa: ANN401 - whatever somebody sent
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
