"""The online store: rings, small documents and streams' keys on a server that speaks Redis.

A read is one MGET, whatever it asks for. An event is one script, atomic inside the server:
de-duplicated, appended to its stream and merged into the entity's rings, or none of it. All
keys of an entity carry its bucket as hash tag, so that the script stays inside one slot of a
Redis Cluster. `OnlineStore` blocks; `AsyncOnlineStore` is the same for asyncio.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, Self, TypeAlias

import redis.exceptions

from heliostat.errors import MaterializationConflictError
from heliostat.settings import Settings
from heliostat.storage.event_script import APPLY_EVENTS
from heliostat.storage.event_updates import OUTCOMES, EventCall, EventOutcome, EventUpdate, event_calls
from heliostat.storage.history_script import WRITE_RINGS
from heliostat.storage.online_config import OnlineConfig as OnlineConfig
from heliostat.storage.online_config import OnlineKeys as OnlineKeys
from heliostat.storage.ring_writes import SUPERSEDED, BucketLease, RingCall, RingOutcome
from heliostat.storage.scripts import Script

_Command: TypeAlias = tuple[Any, ...]

_CHUNK = 500
_EVENT_CALLS = 32
_SCANNED = 5_000


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What a server says of itself, summed over a cluster's primaries."""

    version: str
    used_memory_bytes: int
    n_keys: int
    nodes: int

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> StoreInfo:
        """From INFO's reply: of one server, or by node."""
        nodes = [info] if "used_memory" in info else list(info.values())
        return cls(
            version=str(nodes[0].get("valkey_version", nodes[0].get("redis_version", "unknown"))),
            used_memory_bytes=sum(int(node["used_memory"]) for node in nodes),
            n_keys=sum(
                int(database["keys"])
                for node in nodes
                for name, database in node.items()
                if name.startswith("db") and isinstance(database, Mapping)
            ),
            nodes=len(nodes),
        )


def _calls(
    script: Script, commands: Iterable[tuple[Sequence[str], Sequence[bytes | int]]], *, whole: bool = False
) -> list[_Command]:
    how, program = ("EVAL", script.text) if whole else ("EVALSHA", script.sha)
    return [(how, program, len(keys), *keys, *arguments) for keys, arguments in commands]


def _unknown(replies: Sequence[Any]) -> list[int]:
    """Positions of the calls whose script the server doesn't have: it was restarted, or is new."""
    return [at for at, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)]


def _checked(replies: Sequence[Any]) -> Sequence[Any]:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def _outcomes(calls: Sequence[EventCall], replies: Sequence[Sequence[int]]) -> list[EventOutcome]:
    """What became of each update, from what each call answered."""
    told = {
        at: OUTCOMES[code]
        for call, codes in zip(calls, replies, strict=True)
        for at, code in zip(call.updates, codes, strict=True)
    }
    return [told[at] for at in range(len(told))]


class OnlineStore:
    """The online store, blocking. Safe to share between threads.

    Args:
        config: How to reach it.
    """

    def __init__(self, config: OnlineConfig) -> None:
        self.config = config
        self.keys = config.keys
        with self.config.reported():
            self.client = config.connect()
            self._reads = config.quick()

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """The store that the settings name.

        Raises:
            OnlineStoreUnavailableError: If they name none.
        """
        return cls(OnlineConfig.of(settings))

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values of keys, None where there is none: one round trip.

        On a cluster it is one for each node, and not atomic.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        if not keys:
            return []
        with self.config.reported():
            values: list[bytes | None] = (
                self.client.mget_nonatomic(keys) if self._reads is None else self._reads.mget(keys)
            )
            return values

    def put_many(self, documents: Mapping[str, bytes], *, ttl_s: float | None = None) -> None:
        """Set small documents by key.

        Args:
            documents: Values by key.
            ttl_s: How long they live; None: until replaced.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        self._pipeline(_puts(documents, ttl_s))

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The documents that exist, by key.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        return {key: value for key, value in zip(keys, self.read(keys), strict=True) if value is not None}

    def apply_events(self, updates: Sequence[EventUpdate], *, remember_ms: int) -> list[EventOutcome]:
        """Apply events, each atomically, in this order.

        Safe to repeat after an error: what was applied is a duplicate then.

        Args:
            updates: One for each event and entity.
            remember_ms: How long an event's id is remembered.

        Returns:
            What became of each.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        calls = list(event_calls(updates, remember_ms=remember_ms))
        replies = self._run(APPLY_EVENTS, ((call.keys, call.arguments) for call in calls), at_once=_EVENT_CALLS)
        return _outcomes(calls, replies)

    def begin_bucket(self, source: str, entity: str, bucket: int) -> BucketLease:
        """Begin to materialize a bucket: whoever had begun before can't write it any more.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        fence = self.keys.fence(source, entity, bucket)
        (token,) = self._pipeline([("INCR", self.keys.epoch(bucket))])
        self._pipeline([("SET", fence, token)])
        return BucketLease(fence, int(token), int(token))

    def write_rings(self, calls: Sequence[RingCall]) -> list[RingOutcome]:
        """Bring rings from history beside those that live events made; twice is as good as once.

        Returns:
            What became of each call's rings.

        Raises:
            MaterializationConflictError: If another materialization of the bucket has begun meanwhile.
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        replies = self._run(WRITE_RINGS, ((call.keys, call.arguments) for call in calls))
        if SUPERSEDED in replies:
            raise MaterializationConflictError(calls[replies.index(SUPERSEDED)].keys[0])
        return [call.outcome(reply) for call, reply in zip(calls, replies, strict=True)]

    def scan(self, prefix: str) -> Iterator[list[str]]:
        """All keys that begin with a prefix, some at a time; one may come twice.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        pattern = re.sub(r"([*?\[\]^\\])", r"\\\1", prefix) + "*"
        with self.config.reported():
            found = (each.decode() for each in self.client.scan_iter(match=pattern, count=_SCANNED))
            while chunk := list(islice(found, _SCANNED)):
                yield chunk

    def remove(self, keys: Sequence[str]) -> int:
        """Remove keys; returns how many there were.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        return sum(self._pipeline([("UNLINK", key) for key in keys])) if keys else 0

    def _run(
        self,
        script: Script,
        commands: Iterable[tuple[Sequence[str], Sequence[bytes | int]]],
        *,
        at_once: int = _CHUNK,
    ) -> list[Any]:
        remaining, replies = iter(commands), list[Any]()
        while chunk := list(islice(remaining, at_once)):
            found = list(self._pipeline(_calls(script, chunk), raising=False))
            again = _unknown(found)
            if again:
                repeated = self._pipeline(_calls(script, [chunk[at] for at in again], whole=True), raising=False)
                for at, reply in zip(again, repeated, strict=True):
                    found[at] = reply
            with self.config.reported():
                replies.extend(_checked(found))
        return replies

    def _pipeline(self, commands: Sequence[_Command], *, raising: bool = True) -> Sequence[Any]:
        with self.config.reported(), self.client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            replies: Sequence[Any] = pipeline.execute(raise_on_error=raising)
            return replies

    def ping(self) -> None:
        """Ask whether it answers.

        Raises:
            OnlineStoreUnavailableError: If it doesn't.
        """
        with self.config.reported():
            self.client.ping()

    def info(self) -> StoreInfo:
        """What the server says of itself.

        Raises:
            OnlineStoreUnavailableError: If it doesn't answer.
        """
        with self.config.reported():
            return StoreInfo.of(self.client.info(**_primaries(self.config)))

    def close(self) -> None:
        """Close all connections."""
        self.client.close()
        if self._reads is not None:
            self._reads.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncOnlineStore:
    """The online store for asyncio; to be used on one loop only.

    Args:
        config: How to reach it.
    """

    def __init__(self, config: OnlineConfig) -> None:
        self.config = config
        self.keys = config.keys
        self.client = config.connect_async()
        self._reads = config.quick_async()

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """As `OnlineStore.open`."""
        return cls(OnlineConfig.of(settings))

    async def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """As `OnlineStore.read`."""
        if not keys:
            return []
        with self.config.reported():
            values: list[bytes | None] = await (
                self.client.mget_nonatomic(keys) if self._reads is None else self._reads.mget(keys)
            )
            return values

    async def put_many(self, documents: Mapping[str, bytes], *, ttl_s: float | None = None) -> None:
        """As `OnlineStore.put_many`."""
        await self._pipeline(_puts(documents, ttl_s))

    async def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """As `OnlineStore.get_many`."""
        values = await self.read(keys)
        return {key: value for key, value in zip(keys, values, strict=True) if value is not None}

    async def apply_events(self, updates: Sequence[EventUpdate], *, remember_ms: int) -> list[EventOutcome]:
        """As `OnlineStore.apply_events`."""
        calls, replies = list(event_calls(updates, remember_ms=remember_ms)), list[Any]()
        for begin in range(0, len(calls), _EVENT_CALLS):
            chunk = [(call.keys, call.arguments) for call in calls[begin : begin + _EVENT_CALLS]]
            found = list(await self._pipeline(_calls(APPLY_EVENTS, chunk), raising=False))
            again = _unknown(found)
            if again:
                whole = _calls(APPLY_EVENTS, [chunk[at] for at in again], whole=True)
                for at, reply in zip(again, await self._pipeline(whole, raising=False), strict=True):
                    found[at] = reply
            with self.config.reported():
                replies.extend(_checked(found))
        return _outcomes(calls, replies)

    async def _pipeline(self, commands: Sequence[_Command], *, raising: bool = True) -> Sequence[Any]:
        with self.config.reported():
            async with self.client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                replies: Sequence[Any] = await pipeline.execute(raise_on_error=raising)
                return replies

    async def ping(self) -> None:
        """As `OnlineStore.ping`."""
        with self.config.reported():
            await self.client.ping()

    async def info(self) -> StoreInfo:
        """As `OnlineStore.info`."""
        with self.config.reported():
            return StoreInfo.of(await self.client.info(**_primaries(self.config)))

    async def aclose(self) -> None:
        """Close all connections."""
        await self.client.aclose()
        if self._reads is not None:
            await self._reads.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _puts(documents: Mapping[str, bytes], ttl_s: float | None) -> list[_Command]:
    lifetime = () if ttl_s is None else ("PX", max(1, round(ttl_s * 1000)))
    return [("SET", key, value, *lifetime) for key, value in documents.items()]


def _primaries(config: OnlineConfig) -> dict[str, str]:
    return {"target_nodes": "primaries"} if config.cluster else {}
