"""How many events came too late for a ring, by source: a count beside the rings, for whoever looks at the whole.

Such events are in the event log all the same. The count is for people: losing it loses nothing else.
"""

from __future__ import annotations

from heliostat.storage.online_store import AsyncOnlineStore, OnlineKeys, OnlineStore


def late_key(keys: OnlineKeys) -> str:
    """Where the counts are kept: a hash, by source."""
    return f"{keys.root}:late"


def count_late(store: OnlineStore, source: str, events: int) -> None:
    """Add to a source's count.

    Raises:
        OnlineStoreUnavailableError: If the server doesn't answer.
    """
    with store.config.reported():
        store.client.hincrby(late_key(store.keys), source, events)


async def acount_late(store: AsyncOnlineStore, source: str, events: int) -> None:
    """As `count_late`, for asyncio."""
    with store.config.reported():
        await store.client.hincrby(late_key(store.keys), source, events)


def late_events(store: OnlineStore) -> dict[str, int]:
    """The counts by source; sources without a late event are left out.

    Raises:
        OnlineStoreUnavailableError: If the server doesn't answer.
    """
    with store.config.reported():
        found = store.client.hgetall(late_key(store.keys))
    return {name.decode(): int(count) for name, count in sorted(found.items())}
