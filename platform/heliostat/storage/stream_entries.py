"""What the entries of Redis Streams say: events, predictions and actuals, one field each, holding JSON. Pure.

A prediction entry is about all requests that were answered together: a list a column, or one value for all rows.
What the models saw stands behind the JSON, as the bits of its numbers: as text it would be larger, and most of the
work.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.errors import StreamEntryError
from heliostat.schema import INGESTED, TIMESTAMP
from heliostat.storage.delta import StreamId
from heliostat.storage.offline_store import ACTUALS, PREDICTIONS

StreamName = Literal["predictions", "actuals"]

EVENT_FIELD = b"e"
RECORD_FIELD = b"p"

FloatArray = NDArray[np.float64]
_F8 = np.dtype("<f8")
_UNREADABLE = (LookupError, TypeError, ValueError, OverflowError, pa.ArrowException)
_FEATURES = "features"
_OF_A_REQUEST = ("request_id", "trace_id", "latency_ms", "forced")


# ── Events ──────────────────────────────────────────────────────────────────────────


def event_entries(events: pa.Table, *, ingested_us: int) -> list[tuple[bytes, bytes]]:
    """The stream entries of events: field and value each.

    Args:
        events: Columns of the source, ``n`` rows.
        ingested_us: When they were ingested, microseconds.

    Returns:
        ``n`` entries; an event's columns as JSON, times in microseconds, and ``_ingested_us``.
    """
    columns = {name: _plain(events.column(name)) for name in events.column_names}
    names = list(columns)
    return [
        (EVENT_FIELD, orjson.dumps({**dict(zip(names, row, strict=True)), INGESTED: ingested_us}))
        for row in zip(*columns.values(), strict=True)
    ]


def events_from(payloads: Sequence[bytes], schema: pa.Schema) -> pa.Table:
    """The events of stream entries; the reverse of `event_entries`.

    Args:
        payloads: ``n`` of them.
        schema: The source's; a column that an entry doesn't have is null.

    Returns:
        The source's columns and ``_ingested_us``, ``n`` rows.

    Raises:
        StreamEntryError: If an entry can't be read.
    """
    rows = [_document(payload) for payload in payloads]
    try:
        columns = [_typed([row.get(field.name) for row in rows], field.type) for field in schema]
        columns.append(pa.array([row[INGESTED] for row in rows], pa.int64()))
    except _UNREADABLE as error:
        raise StreamEntryError("events", f"{type(error).__name__}: {error}") from error
    return pa.table(columns, names=[*schema.names, INGESTED])


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """Values that JSON keeps as they are."""
    dtype = column.type
    if pa.types.is_timestamp(dtype):
        return list(column.cast(TIMESTAMP).cast(pa.int64()).to_pylist())
    values = column.to_pylist()
    if pa.types.is_floating(dtype):
        # JSON has no NaN and no infinity; as texts they survive.
        return [str(each) if each is not None and not math.isfinite(each) else each for each in values]
    if pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype):
        return [None if each is None else base64.b64encode(each).decode() for each in values]
    return list(values)


def _typed(values: list[Any], dtype: pa.DataType) -> pa.Array:
    if pa.types.is_timestamp(dtype):
        return pa.array(values, pa.int64()).cast(dtype)
    if pa.types.is_floating(dtype):
        return pa.array([float(each) if isinstance(each, str) else each for each in values], dtype)
    if pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype):
        return pa.array([None if each is None else base64.b64decode(each) for each in values], dtype)
    return pa.array(values, dtype)


# ── Predictions and actuals ─────────────────────────────────────────────────────────


def actual_record(
    *,
    model: str,
    value: float,
    at_us: int,
    prediction_id: str | None = None,
    entity: str | None = None,
    as_of_us: int | None = None,
) -> bytes:
    """One label that was reported, by prediction id or by entity and instant.

    Args:
        model: Whose prediction it judges.
        value: The label.
        at_us: When it was reported, microseconds.
        prediction_id: Which prediction.
        entity: Or: about whom,
        as_of_us: as of when, microseconds.
    """
    return orjson.dumps(
        {
            "model": model,
            "value": value,
            "at_us": at_us,
            "prediction_id": prediction_id,
            "entity": entity,
            "as_of_us": as_of_us,
        }
    )


def prediction_ids(request_id: str, n: int) -> list[str]:
    """The names of a request's predictions: records say only the request's, and answers use the same."""
    return [f"{request_id}-{row}" for row in range(n)]


def request_of(prediction_id: str) -> str:
    """The name of a prediction's request; the reverse of `prediction_ids`."""
    return prediction_id.rpartition("-")[0]


def prediction_entry(document: Mapping[str, Any], vectors: FloatArray | Sequence[FloatArray]) -> bytes:
    """The entry of predictions that were made together: a line of JSON, and behind it the bits of the vectors.

    Args:
        document: All but the vectors; numpy's arrays and numbers may be in it.
        vectors: What the models saw: a matrix of shape ``(n, width)``, or ``n`` vectors, each as wide as it is.
    """
    width: int | list[int]
    if isinstance(vectors, np.ndarray):
        width, numbers = vectors.shape[1], vectors
    else:
        width, numbers = [len(vector) for vector in vectors], np.concatenate(vectors)
    line = orjson.dumps({**document, "width": width}, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"\n".join((line, numbers.astype(_F8, copy=False).tobytes()))


def rows_from(
    name: StreamName, entries: Sequence[tuple[StreamId, bytes]]
) -> dict[str, tuple[list[StreamId], pa.Table]]:
    """The table rows of stream entries, by model.

    Args:
        name: Which stream.
        entries: Ids and payloads.

    Returns:
        For each model, the entry of each row, and rows with the columns of `PREDICTIONS` or `ACTUALS`.

    Raises:
        StreamEntryError: If an entry can't be read.
    """
    found: dict[str, _Rows] = {}
    schema = PREDICTIONS if name == "predictions" else ACTUALS
    try:
        for entry, payload in entries:
            line, _, content = payload.partition(b"\n")
            document = _document(line)
            model = _model(name, document)
            rows = found.get(model)
            if rows is None:
                rows = found[model] = _Rows(schema)
            if name == "actuals":
                rows.add(entry, 1, _actual_columns(document))
            elif "columns" in document:
                _add_predictions(rows, entry, document, content)
            else:
                _add_requests_predictions(rows, entry, document)
        return {model: (rows.ids, rows.table()) for model, rows in found.items()}
    except _UNREADABLE as error:
        raise StreamEntryError(name, f"{type(error).__name__}: {error}") from error


class _Rows:
    """Rows that become more entry by entry, held by column: an object a row would be most of a sink's work.

    Args:
        schema: Of the table. Its column ``features`` is kept as numbers one behind the other, and how many are whose.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._columns: dict[str, list[Any]] = {name: [] for name in schema.names if name != _FEATURES}
        self._widths: list[int | None] = []
        self._numbers: list[bytes] = []
        self.ids: list[StreamId] = []

    def add(self, entry: StreamId, n: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Add ``n`` rows of an entry; a column that they lack is null, one that the table lacks is left out."""
        for name, held in self._columns.items():
            values = columns.get(name)
            if values is None:
                held.extend(itertools.repeat(None, n))
            elif len(values) == n:
                held.extend(values)
            else:
                raise ValueError(f"{name} has {len(values)} values, and there are {n} rows")
        self.ids.extend(itertools.repeat(entry, n))

    def add_vectors(self, n: int, widths: int | Sequence[int], numbers: bytes) -> None:
        """Add the vectors of ``n`` rows, as bits of numbers; NaN is null."""
        if isinstance(widths, int):
            widths = [widths] * n
        if len(widths) != n or min(widths, default=0) < 0 or len(numbers) != _F8.itemsize * sum(widths):
            raise ValueError(f"{len(numbers)} bytes aren't the numbers of {n} vectors of {widths}")
        self._widths.extend(widths)
        self._numbers.append(numbers)

    def add_vector(self, values: Sequence[float | None] | None) -> None:
        """Add one row's vector; None: it has none."""
        numbers = np.array(() if values is None else values, dtype=_F8)  # None becomes NaN
        if numbers.ndim != 1:
            raise ValueError(f"{values!r} is no vector")
        self._widths.append(None if values is None else len(numbers))
        self._numbers.append(numbers.tobytes())

    def table(self) -> pa.Table:
        """All of them."""
        return pa.table(
            [
                self._vectors() if field.name == _FEATURES else pa.array(self._columns[field.name], field.type)
                for field in self._schema
            ],
            schema=self._schema,
        )

    def _vectors(self) -> pa.Array:
        ends = list(itertools.accumulate((width or 0 for width in self._widths), initial=0))
        numbers = np.frombuffer(b"".join(self._numbers), dtype=_F8)
        missing = pa.array([width is None for width in self._widths], pa.bool_())
        return pa.ListArray.from_arrays(
            pa.array(ends, pa.int32()), pa.array(numbers, pa.float64(), from_pandas=True), mask=missing
        )


def _add_predictions(rows: _Rows, entry: StreamId, document: Mapping[str, Any], content: bytes) -> None:
    """Add the predictions of an entry that has a list a column, or one value for all rows."""
    columns: dict[str, Any] = {name: [] for name in ("prediction_id", *_OF_A_REQUEST)}
    for request in document["requests"]:
        count = request["rows"]
        columns["prediction_id"] += prediction_ids(request["request_id"], count)
        for name in _OF_A_REQUEST:
            columns[name] += [request.get(name)] * count
    n = len(columns["prediction_id"])
    same = {"missing": (), "given": (), **document.get("same", {}), **_of_all(document)}
    columns.update({name: [value] * n for name, value in same.items()})
    columns.update(document["columns"])
    if "newest_event" in columns:
        columns["newest_event"] = [None if each is None else int(each) for each in columns["newest_event"]]
    columns["source"] = ["model" if each is None else "fallback" for each in columns.get("fallback", [None] * n)]
    rows.add(entry, n, columns)
    if "width" in document:
        rows.add_vectors(n, document["width"], content)
        return
    # An earlier release wrote them as JSON, which spells infinity as null, as it does NaN.
    vectors = columns[_FEATURES]
    for vector, places in zip(vectors, columns.get("infinite", ()), strict=False):
        for place, sign in places or ():
            vector[place] = math.inf * sign
    if len(vectors) != n:
        raise ValueError(f"{len(vectors)} vectors, and there are {n} rows")
    for vector in vectors:
        rows.add_vector(vector)


def _add_requests_predictions(rows: _Rows, entry: StreamId, document: Mapping[str, Any]) -> None:
    """Add the predictions of an entry of an earlier release: one request, an object a prediction."""
    for each in document["entries"]:
        row = {**each, **_of_all(document), "request_id": document.get("request_id")}
        rows.add(entry, 1, {name: [value] for name, value in row.items()})
        rows.add_vector(row.get(_FEATURES))


def _of_all(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": document["model"], "revision": document.get("revision"), "at": int(document["at_us"])}


def _actual_columns(document: Mapping[str, Any]) -> dict[str, list[Any]]:
    row = {**document, "at": int(document["at_us"]), "as_of": document.get("as_of_us")}
    return {name: [value] for name, value in row.items()}


def _model(name: StreamName, document: Mapping[str, Any]) -> str:
    model = document.get("model")
    if not isinstance(model, str) or not model.isidentifier():
        raise StreamEntryError(name, f"{model!r} names no model")
    return model


def entry_text(payload: bytes) -> str:
    """An entry as text that keeps every bit of it: what stands behind its first line becomes base64."""
    line, newline, content = payload.partition(b"\n")
    text = line.decode(errors="backslashreplace")
    return f"{text}\n{base64.b64encode(content).decode()}" if newline else text


def _document(payload: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise StreamEntryError("any", f"it is no JSON ({error}): {payload[:80]!r}") from None
    if not isinstance(document, dict):
        raise StreamEntryError("any", f"it is no JSON object: {payload[:80]!r}")
    return document
