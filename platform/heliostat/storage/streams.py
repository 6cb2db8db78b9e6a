"""Redis Streams: the durable buffer between what happens now and the Delta tables.

Events lie in one stream for each source and bucket, appended by the script that updates the
rings; predictions and actuals in one stream each. What is applied to its table is trimmed.
This module knows the bytes of every entry: one field, holding JSON.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import orjson
import pyarrow as pa

from heliostat.errors import StreamEntryError
from heliostat.schema import INGESTED, TIMESTAMP
from heliostat.settings import Settings
from heliostat.storage.delta import StreamId
from heliostat.storage.offline_store import ACTUALS, PREDICTIONS
from heliostat.storage.online_store import OnlineConfig

StreamName = Literal["predictions", "actuals"]

EVENT_FIELD = b"e"
RECORD_FIELD = b"p"


class Streams:
    """All streams of a project, blocking. Safe to share between threads.

    Args:
        config: How to reach the server.
        n_buckets: The event log's number of buckets.
    """

    def __init__(self, config: OnlineConfig, n_buckets: int) -> None:
        self.config, self.n_buckets = config, n_buckets
        self.keys = config.keys
        with self.config.reported():
            self.client = config.connect()

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """The streams that settings name.

        Raises:
            OnlineStoreUnavailableError: If they name no server.
        """
        return cls(OnlineConfig.of(settings), settings.storage.buckets)

    def event_streams(self, source: str) -> list[str]:
        """The streams of a source's events, by bucket."""
        return self.keys.event_streams(source, self.n_buckets)

    def record_stream(self, name: StreamName) -> str:
        """The stream of predictions or actuals."""
        return record_key(self.config, name)

    def append(self, name: StreamName, records: Sequence[bytes]) -> list[StreamId]:
        """Append records to predictions or actuals, in one round trip.

        Args:
            name: Which stream.
            records: As `heliostat.serving.prediction_log.log_record` or `actual_record` make them.

        Returns:
            The entries' ids.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        with self.config.reported(), self.client.pipeline(transaction=False) as pipeline:
            for record in records:
                pipeline.xadd(self.record_stream(name), {RECORD_FIELD: record})
            return [_stream_id(each) for each in pipeline.execute()]

    def read(
        self, stream: str, *, after: StreamId | None = None, count: int = 10_000
    ) -> list[tuple[StreamId, bytes]]:
        """Read entries in order.

        Args:
            stream: Its key.
            after: Start behind this entry; None: at the beginning.
            count: At most so many.

        Returns:
            Ids and payloads.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        start = "-" if after is None else f"({after[0]}-{after[1]}"
        with self.config.reported():
            entries = self.client.xrange(stream, min=start, max="+", count=count)
        return [(_stream_id(entry), next(iter(fields.values()))) for entry, fields in entries]

    def trim(self, stream: str, through: StreamId) -> int:
        """Drop all entries up to and including one; returns how many.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        with self.config.reported():
            dropped: int = self.client.xtrim(stream, minid=f"{through[0]}-{through[1] + 1}", approximate=False)
            return dropped

    def lengths(self, streams: Sequence[str]) -> dict[str, int]:
        """How many entries wait in each stream.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        with self.config.reported(), self.client.pipeline(transaction=False) as pipeline:
            for stream in streams:
                pipeline.xlen(stream)
            return dict(zip(streams, pipeline.execute(), strict=True))

    def oldest(self, streams: Sequence[str]) -> int | None:
        """When the oldest waiting entry came, milliseconds of the server's clock; None if none waits.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        with self.config.reported(), self.client.pipeline(transaction=False) as pipeline:
            for stream in streams:
                pipeline.xrange(stream, count=1)
            found = _oldest(pipeline.execute())
            return None if found is None else found[0]

    def claim(self, holder: bytes, *, ttl_ms: int, instead_of: bytes | None = None) -> bytes:
        """Say who drains the streams, unless somebody else does.

        Args:
            holder: Who wants to.
            ttl_ms: How long that holds unless it is said again.
            instead_of: Who doesn't any more, though it still says so.

        Returns:
            Who does: ``holder``, or somebody else.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        key = f"{self.keys.root}:sink"
        with self.config.reported():
            if self.client.set(key, holder, nx=True, px=ttl_ms):
                return holder
            found: bytes | None = self.client.get(key)
            # Two that do this at the same instant may both think it is them: see `ingestion.lease`.
            if found is None or found in (holder, instead_of):
                self.client.set(key, holder, px=ttl_ms)
                return holder
            return found

    def unclaim(self, holder: bytes) -> None:
        """Say that somebody no longer drains the streams.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        key = f"{self.keys.root}:sink"
        with self.config.reported():
            if self.client.get(key) == holder:
                self.client.delete(key)

    def note(self, notes: Sequence[bytes]) -> None:
        """Remember what is left to do about events that were taken from the streams.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        with self.config.reported():
            self.client.sadd(self._notes, *notes)

    def noted(self) -> list[bytes]:
        """What is left to do.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        with self.config.reported():
            return sorted(self.client.smembers(self._notes))

    def unnote(self, notes: Sequence[bytes]) -> None:
        """Forget what is done.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        if notes:
            with self.config.reported():
                self.client.srem(self._notes, *notes)

    @property
    def _notes(self) -> str:
        return f"{self.keys.root}:mend"

    def close(self) -> None:
        """Close all connections."""
        self.client.close()


class AsyncStreams:
    """Appending for asyncio; to be used on one loop only.

    Args:
        config: How to reach the server.
        client: A client to share; None: one of its own.
    """

    def __init__(self, config: OnlineConfig, client: Any = None) -> None:  # noqa: ANN401 - redis' clients share no type
        self.config = config
        self.client = config.connect_async() if client is None else client
        self._owned = client is None
        self._quick = config.quick_async() if self._owned else None

    async def append(self, name: StreamName, records: Sequence[bytes]) -> list[StreamId]:
        """As `Streams.append`."""
        stream = record_key(self.config, name)
        with self.config.reported():
            if len(records) == 1 and self._quick is not None:
                return [_stream_id(await self._quick.xadd(stream, RECORD_FIELD, records[0]))]
            if len(records) == 1:  # a pipeline costs as much again
                return [_stream_id(await self.client.xadd(stream, {RECORD_FIELD: records[0]}))]
            async with self.client.pipeline(transaction=False) as pipeline:
                for record in records:
                    pipeline.xadd(stream, {RECORD_FIELD: record})
                return [_stream_id(each) for each in await pipeline.execute()]

    async def append_predictions(self, records: list[bytes]) -> list[StreamId]:
        """Append to the prediction stream: what `serving.prediction_log` asks for."""
        return await self.append("predictions", records)

    async def backlog(self, streams: Sequence[str]) -> tuple[int, StreamId | None]:
        """How many entries wait in streams, and the oldest of them; None if none waits.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        with self.config.reported():
            async with self.client.pipeline(transaction=False) as pipeline:
                for stream in streams:
                    pipeline.xlen(stream)
                    pipeline.xrange(stream, count=1)
                found = await pipeline.execute()
        return sum(found[::2]), _oldest(found[1::2])

    async def aclose(self) -> None:
        """Close all connections that are its own."""
        if self._owned:
            await self.client.aclose()
        if self._quick is not None:
            await self._quick.aclose()


def record_key(config: OnlineConfig, name: StreamName) -> str:
    """The key of the stream of predictions or actuals."""
    return config.keys.predictions() if name == "predictions" else f"{config.keys.root}:{name}"


def _oldest(heads: Sequence[Any]) -> StreamId | None:
    """Of streams' first entries, as the server gives them, the one that came first; None if there are none."""
    return min((_stream_id(head[0][0]) for head in heads if head), default=None)


def _stream_id(text: bytes | str) -> StreamId:
    ms, _, seq = (text.decode() if isinstance(text, bytes) else text).partition("-")
    return int(ms), int(seq)


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
    except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
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
    ids: dict[str, list[StreamId]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    schema = PREDICTIONS if name == "predictions" else ACTUALS
    try:
        for entry, payload in entries:
            document = _document(payload)
            model = _model(name, document)
            found = _prediction_rows(document) if name == "predictions" else [_actual_row(document)]
            ids.setdefault(model, []).extend([entry] * len(found))
            rows.setdefault(model, []).extend(found)
        return {model: (ids[model], pa.Table.from_pylist(each, schema=schema)) for model, each in rows.items()}
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise StreamEntryError(name, f"{type(error).__name__}: {error}") from error


def _prediction_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    shared = {"model": document["model"], "revision": document.get("revision"), "at": int(document["at_us"])}
    if "columns" not in document:  # as an earlier release wrote it: one request, an object a prediction
        return [{**each, **shared, "request_id": document.get("request_id")} for each in document["entries"]]
    names = [
        {
            "prediction_id": prediction_id,
            "request_id": request["request_id"],
            "trace_id": request.get("trace_id"),
            "latency_ms": request.get("latency_ms"),
            "forced": request.get("forced"),
        }
        for request in document["requests"]
        for prediction_id in prediction_ids(request["request_id"], request["rows"])
    ]
    same = {"missing": (), "given": (), **document.get("same", {})}
    columns = {**{name: [value] * len(names) for name, value in same.items()}, **document["columns"]}
    if "newest_event" in columns:
        columns["newest_event"] = [None if each is None else int(each) for each in columns["newest_event"]]
    for vector, places in zip(columns["features"], columns.pop("infinite", ()), strict=False):
        for place, sign in places or ():  # JSON spells infinity as null, as it does NaN
            vector[place] = math.inf * sign
    sources = ["model" if each is None else "fallback" for each in columns.get("fallback", [None] * len(names))]
    rows = zip(names, sources, *columns.values(), strict=True)
    return [
        {**name, **shared, "source": source, **dict(zip(columns, row, strict=True))} for name, source, *row in rows
    ]


def _actual_row(document: Mapping[str, Any]) -> dict[str, Any]:
    return {**document, "at": int(document["at_us"]), "as_of": document.get("as_of_us")}


def _model(name: StreamName, document: Mapping[str, Any]) -> str:
    model = document.get("model")
    if not isinstance(model, str) or not model.isidentifier():
        raise StreamEntryError(name, f"{model!r} names no model")
    return model


def _document(payload: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise StreamEntryError("any", f"it is no JSON ({error}): {payload[:80]!r}") from None
    if not isinstance(document, dict):
        raise StreamEntryError("any", f"it is no JSON object: {payload[:80]!r}")
    return document
