"""Names and addresses: how the online store's keys are called, and how its server is reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from heliostat.errors import OnlineStoreUnavailableError
from heliostat.settings import Settings
from heliostat.storage.quick_commands import AsyncQuickCommands, CommandPacker, QuickCommands

# A hundred entities have more bytes of rings than a client takes at a time: over TCP that is a twentieth of a read.
_READ_BYTES = 2**17
_FAILURES = (redis.RedisError, redis.exceptions.RedisClusterException, OSError)


# A connection that the server has closed is opened once more; a timeout isn't waited for twice.
def _once_more() -> Retry:
    return Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))


def _once_more_async() -> AsyncRetry:
    return AsyncRetry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))


@dataclass(frozen=True)
class OnlineKeys:
    """The names of all keys: ``{prefix}:{project}:{kind}:…``.

    What users choose freely (entity keys, event ids) comes last, behind the hash tag, so that
    braces in it mean nothing.

    Attributes:
        prefix: Shared by all projects of a server.
        project: Keeps projects apart.
    """

    prefix: str
    project: str

    @property
    def root(self) -> str:
        """What every key begins with."""
        return f"{self.prefix}:{self.project}"

    def bundle_prefix(self, source: str, entity: str) -> str:
        """What the keys of bundles of rings begin with; `{b<bucket>}:<entity's key>` follows."""
        return f"{self.root}:r:{source}:{entity}:"

    def bundle(self, source: str, entity: str, entity_text: str, bucket: int) -> str:
        """All rings that the views over a source keep of an entity."""
        return f"{self.bundle_prefix(source, entity)}{{b{bucket}}}:{entity_text}"

    def seen(self, source: str, entity: str, event_id: str, bucket: int) -> str:
        """Says that an event of a source has been applied for one of its entities."""
        return f"{self.root}:d:{source}:{entity}:{{b{bucket}}}:{event_id}"

    def events(self, source: str, bucket: int) -> str:
        """The stream of one bucket's events."""
        return f"{self.root}:events:{source}:{{b{bucket}}}"

    def event_streams(self, source: str, n_buckets: int) -> list[str]:
        """The streams of a source's events, by bucket."""
        return [self.events(source, bucket) for bucket in range(n_buckets)]

    def epoch(self, bucket: int) -> str:
        """Counts the materializations that have begun of a bucket."""
        return f"{self.root}:epoch:{{b{bucket}}}"

    def fence(self, source: str, entity: str, bucket: int) -> str:
        """The token of whoever began last to materialize a bucket of a source and entity."""
        return f"{self.root}:fence:{source}:{entity}:{{b{bucket}}}"

    def bucket_state(self, view_ref: str, bucket: int) -> str:
        """The document that says which of the log's files a bucket's rings were made from."""
        return f"{self.root}:m:{view_ref}:{{b{bucket}}}"

    def materialized(self, view_ref: str) -> str:
        """The document that says how far a view's rings came from the event log."""
        return f"{self.root}:materialized:{view_ref}"

    def route(self, model: str) -> str:
        """The routing document of a model."""
        return f"{self.root}:route:{model}"

    def predictions(self) -> str:
        """The stream of predictions."""
        return f"{self.root}:predictions"

    def batch(self, model: str, entity_text: str) -> str:
        """A batch prediction that is kept for look-up."""
        return f"{self.root}:batch:{model}:{entity_text}"


@dataclass(frozen=True)
class OnlineConfig:
    """How to reach the online store: picklable, and cheap.

    Attributes:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        project: Keeps projects apart.
        prefix: What every key begins with.
        cluster: Whether the address is a Redis Cluster's.
        timeout_s: For connecting and for every answer.
        max_connections: Of one process, for reads; and as many again for all else.
    """

    url: str = field(repr=False)  # may hold a password
    project: str
    prefix: str = "hs"
    cluster: bool = False
    timeout_s: float = 2.0
    max_connections: int = 64

    @classmethod
    def of(cls, settings: Settings) -> OnlineConfig:
        """From settings that name a server, as `Workspace.settings` do.

        Raises:
            OnlineStoreUnavailableError: If they don't.
        """
        online = settings.online
        if online.url is None:
            raise OnlineStoreUnavailableError("(nowhere)", "online.url isn't set and no embedded server runs")
        return cls(
            url=online.url,
            project=settings.project,
            prefix=online.key_prefix,
            cluster=online.cluster,
            timeout_s=online.timeout_s,
            max_connections=online.max_connections,
        )

    @property
    def keys(self) -> OnlineKeys:
        """The names of all keys."""
        return OnlineKeys(self.prefix, self.project)

    @property
    def shown_url(self) -> str:
        """The address without user and password."""
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    def connect(self) -> Any:  # noqa: ANN401 - redis.Redis or RedisCluster, which share no type
        """A blocking client; nothing is sent before its first command, except to a cluster."""
        kind = redis.RedisCluster if self.cluster else redis.Redis
        # A cluster's client has its own way of sending.
        packer = {} if self.cluster else {"command_packer": CommandPacker()}
        return kind.from_url(self.url, retry=_once_more(), **self._options(), **packer)

    def connect_async(self) -> Any:  # noqa: ANN401 - as above
        """An asyncio client, for the loop that uses it first."""
        kind = redis.asyncio.RedisCluster if self.cluster else redis.asyncio.Redis
        return kind.from_url(self.url, retry=_once_more_async(), **self._options())

    def quick(self) -> QuickCommands | None:
        """Connections for quick commands alone; a cluster's client has to know where each key is, so it has none."""
        if self.cluster:
            return None
        options = self._options() | {"socket_read_size": _READ_BYTES}
        return QuickCommands(redis.ConnectionPool.from_url(self.url, retry=_once_more(), **options))

    def quick_async(self) -> AsyncQuickCommands | None:
        """The same for asyncio, for the loop that uses them first."""
        if self.cluster:
            return None
        # One timer a command, instead of one for each thing that a connection waits for.
        options = self._options() | {"socket_timeout": None, "socket_read_size": _READ_BYTES}
        pool = redis.asyncio.ConnectionPool.from_url(self.url, retry=_once_more_async(), **options)
        return AsyncQuickCommands(pool, self.timeout_s)

    def _options(self) -> dict[str, Any]:
        return {
            "socket_timeout": self.timeout_s,
            "socket_connect_timeout": self.timeout_s,
            "max_connections": self.max_connections,
        }

    def failure(self, error: BaseException) -> OnlineStoreUnavailableError:
        """A client's error, as Heliostat reports it."""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return OnlineStoreUnavailableError(self.shown_url, reason)

    @contextmanager
    def reported(self) -> Iterator[None]:
        """A client's errors come out as Heliostat reports them; for blocking and asyncio clients alike.

        Raises:
            OnlineStoreUnavailableError: If the client raises inside.
        """
        try:
            yield
        except _FAILURES as error:
            raise self.failure(error) from error
