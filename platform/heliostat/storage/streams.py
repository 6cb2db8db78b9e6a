"""Redis Streams: the durable buffer between what happens now and the Delta tables.

Events lie in one stream for each source and bucket, appended by the script that updates the
rings; predictions and actuals in one stream each. What is applied to its table is trimmed.
What an entry's bytes say, `heliostat.storage.stream_entries` knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, TypeAlias

from heliostat.settings import Settings
from heliostat.storage.delta import StreamId
from heliostat.storage.online_store import OnlineConfig
from heliostat.storage.quick_commands import Held
from heliostat.storage.stream_entries import RECORD_FIELD, StreamName

CheckedRecord: TypeAlias = tuple[bytes, Held]
"""A record, and what has to hold when it is appended."""


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

    @property
    def can_check(self) -> bool:
        """Whether `append_prediction_while` is to be had: a cluster keeps the two keys in different places."""
        return self._quick is not None

    async def append_prediction_while(self, checked: CheckedRecord) -> bool:
        """Append to the prediction stream if, at that instant, another key holds what it has to; says whether it did.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        if self._quick is None:
            raise NotImplementedError("ask can_check first")
        record, held = checked
        with self.config.reported():
            stream = record_key(self.config, "predictions")
            return await self._quick.xadd_while(held, stream, RECORD_FIELD, record) is not None

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
