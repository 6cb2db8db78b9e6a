"""What lies in streams and may not be in the tables yet: read once, then followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import redis
import redis.exceptions

from heliostat.storage.delta import StreamId
from heliostat.storage.online_store import OnlineStore


class StreamTail:
    """Reads streams' entries, each once. Whoever opens a table after `follow` misses nothing in between.

    An entry is trimmed only once its table has it: what was trimmed before the first `follow` is in
    a table that is opened afterwards.

    Args:
        store: The server.
        streams: Their keys.
        most: Longer streams aren't read.
    """

    def __init__(self, store: OnlineStore, streams: Sequence[str], *, most: int) -> None:
        self._store, self._streams, self._most = store, tuple(streams), most
        self._read: dict[str, tuple[StreamId, int]] = {}

    def follow(self) -> list[bytes] | None:
        """The payloads of entries that weren't read yet.

        Returns:
            Payloads in order, stream by stream; None if entries were trimmed before they could be read, or
            are too many: then the tail has to be read anew, with the table opened afterwards.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        payloads: list[bytes] = []
        with self._store.config.reported():
            for stream in self._streams:
                found = self._more(stream)
                if found is None:
                    return None
                payloads += found
        return payloads

    def _more(self, stream: str) -> list[bytes] | None:
        known = self._read.get(stream)
        start = "-" if known is None else f"({known[0][0]}-{known[0][1]}"
        with self._store.client.pipeline(transaction=True) as pipeline:
            pipeline.xinfo_stream(stream)
            pipeline.xrange(stream, min=start, max="+", count=self._most + 1)
            info, entries = pipeline.execute(raise_on_error=False)
        if isinstance(info, redis.exceptions.ResponseError) and "no such key" in str(info):
            return []
        for reply in (info, entries):
            if isinstance(reply, Exception):
                raise reply
        if len(entries) > self._most:
            return None
        about = _mapping(info)
        added = int(about.get("entries-added", 0))
        if known is not None and added - known[1] != len(entries):
            return None
        last = _stream_id(entries[-1][0]) if entries else _stream_id(about["last-generated-id"])
        self._read[stream] = last, added
        return [next(iter(_mapping(fields).values())) for _, fields in entries]


def advance(store: OnlineStore, positions: Mapping[str, StreamId]) -> int:
    """Let streams go on behind what their tables have, after the server's data were lost.

    A new server numbers entries by its own clock. Were it behind the old one's, new entries would pass
    for old ones, which are applied already.

    Args:
        store: The server.
        positions: The last entry that was applied, by stream.

    Returns:
        How many streams were behind.

    Raises:
        OnlineStoreUnavailableError: If the server doesn't answer.
    """
    behind = 0
    for stream, last in positions.items():
        with store.config.reported(), store.client.pipeline(transaction=True) as pipeline:
            # Refused if the stream is that far already.
            pipeline.xadd(stream, {b"x": b""}, id=f"{last[0]}-{last[1] + 1}")
            pipeline.xdel(stream, f"{last[0]}-{last[1] + 1}")
            added, _ = pipeline.execute(raise_on_error=False)
        if not isinstance(added, Exception):
            behind += 1
        elif "equal or smaller" not in str(added):
            raise store.config.failure(added) from added
    return behind


def _mapping(reply: Any) -> dict[str, Any]:  # noqa: ANN401 - a cluster's client leaves a transaction's replies as lists
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {name.decode() if isinstance(name, bytes) else name: value for name, value in pairs}


def _stream_id(text: Any) -> StreamId:  # noqa: ANN401 - bytes or text, as the client decodes
    ms, _, seq = (text.decode() if isinstance(text, bytes) else str(text)).partition("-")
    return int(ms), int(seq)
