"""Which of several sinks drains: one at a time, the others wait for it to end.

Only a courtesy. What makes two sinks safe is that each table's commit carries how far it has read
(`heliostat.storage.delta.Progress`); the lease spares them the work that the other has done.
"""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import asdict, dataclass, field

import orjson

from heliostat.storage.streams import Streams

_SHORTEST_S = 15.0


@dataclass(frozen=True)
class Holder:
    """A sink, as it tells the others of itself.

    Attributes:
        host: The machine's name.
        pid: Of its process, on that machine.
        token: Tells this run from any other.
    """

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_gone(self) -> bool:
        """Whether it ran on this machine and was killed: nobody needs to wait for it."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


class SinkLease:
    """This sink's claim to be the one that drains.

    Args:
        streams: What is drained; the claim lies beside them.
        interval_s: How often `other` is called, about, seconds: a claim outlives a few of these pauses.
    """

    def __init__(self, streams: Streams, *, interval_s: float) -> None:
        self._streams, self._me = streams, Holder()
        self._ttl_ms = round(max(_SHORTEST_S, 5 * interval_s) * 1000)

    def other(self) -> Holder | None:
        """Claim, or claim again.

        Returns:
            None if this sink is the one that drains now; otherwise the one that does.

        Raises:
            OnlineStoreUnavailableError: If the streams' server doesn't answer.
        """
        mine = orjson.dumps(asdict(self._me))
        found = self._streams.claim(mine, ttl_ms=self._ttl_ms)
        if found == mine:
            return None
        holder = _read(found)
        if holder is not None and not holder.is_gone:
            return holder
        self._streams.claim(mine, ttl_ms=self._ttl_ms, instead_of=found)
        return None

    def release(self) -> None:
        """Let another sink take over at once.

        Raises:
            OnlineStoreUnavailableError: If the streams' server doesn't answer.
        """
        self._streams.unclaim(orjson.dumps(asdict(self._me)))


def _read(value: bytes) -> Holder | None:
    try:
        return Holder(**orjson.loads(value))
    except (TypeError, orjson.JSONDecodeError):
        return None  # of another program; it isn't waited for
