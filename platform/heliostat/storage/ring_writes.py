"""Rings from history, and the calls that bring them beside what live events made. Pure.

Entities of one bucket share a call of `WRITE_RINGS`: their keys are in one slot of a cluster, and
what they have in common (the layouts, the script's own start) is paid for once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Final, NamedTuple

SUPERSEDED: Final = -1
"""What the script answers a materialization of a bucket that another one has taken over."""

UNCHANGED, WRITTEN, AHEAD, BUSY, CLEARED = range(5)

# The server does nothing else while a call runs: this much takes it a millisecond or less.
_RINGS_A_CALL = 128
_KEYS_A_CALL = 1024
_BYTES_A_CALL = 256 * 1024


@dataclass(frozen=True, slots=True)
class RingCounts:
    """What became of rings from history.

    Attributes:
        written: Changed something.
        unchanged: Held just that already.
        ahead: Left alone, since live events had moved their base beyond what history says for sure.
        busy: Live events came in between: their open tiles stay until history covers those events.
        cleared: Removed, since no event is in their reach any more.
    """

    written: int = 0
    unchanged: int = 0
    ahead: int = 0
    busy: int = 0
    cleared: int = 0

    def __add__(self, other: RingCounts) -> RingCounts:
        return RingCounts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(RingCounts)))

    @classmethod
    def of(cls, codes: Sequence[int]) -> RingCounts:
        """From what the script answers, a number a ring."""
        return cls(*(codes.count(code) for code in (WRITTEN, UNCHANGED, AHEAD, BUSY, CLEARED)))


@dataclass(frozen=True, slots=True)
class BucketLease:
    """The right to write one bucket's rings, until another materialization of it begins.

    Attributes:
        fence_key: Holds the token of whoever began last.
        token: The fence's.
        epoch: Slots that live events touched from this epoch on aren't covered by history.
    """

    fence_key: str
    token: int
    epoch: int


class EntityWrite(NamedTuple):
    """All rings of one entity, as the event log has them.

    Attributes:
        entity: Which one, as the writer counts them.
        rings: Key, number of the layout, and bytes; no bytes: no event is in its reach.
        seen_keys: Of its events in open tiles: a repetition that is sent live is a duplicate then.
    """

    entity: int
    rings: Sequence[tuple[str, int, bytes]]
    seen_keys: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class RingCall:
    """One call of `WRITE_RINGS`.

    Attributes:
        keys: All keys, in the order the script takes them.
        arguments: All arguments.
        entities: Whose each ring is: one reply each.
        n_bytes: Of all rings.
    """

    keys: tuple[str, ...]
    arguments: tuple[bytes | int, ...]
    entities: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True)
class RingLayouts:
    """What all calls of a materialization say first.

    Attributes:
        groups: For each layout its packed `RingDescriptor` and the first tile still open to late events.
        covers: Whether history holds all that live events did before the lease began.
        remember_ms: How long ids of recent events are remembered.
    """

    groups: tuple[tuple[bytes, int], ...]
    covers: bool
    remember_ms: int

    def calls(self, lease: BucketLease, entities: Iterable[EntityWrite]) -> Iterator[RingCall]:
        """The calls that write entities of one bucket, in their order.

        Args:
            lease: Of the bucket.
            entities: Any number of them; layouts are numbered from 0.
        """
        described = [part for group in self.groups for part in group]
        head = [lease.token, lease.epoch, int(self.covers), self.remember_ms, len(self.groups), *described]
        keys, arguments, whose, n_bytes = [lease.fence_key], list[bytes | int](head), list[int](), 0
        for each in entities:
            arguments += (len(each.rings), len(each.seen_keys))
            for key, layout, ring in each.rings:
                keys.append(key)
                arguments += (layout + 1, ring)
                whose.append(each.entity)
                n_bytes += len(ring)
            keys += each.seen_keys
            if len(whose) >= _RINGS_A_CALL or n_bytes >= _BYTES_A_CALL or len(keys) >= _KEYS_A_CALL:
                yield RingCall(tuple(keys), tuple(arguments), tuple(whose), n_bytes)
                keys, arguments, whose, n_bytes = [lease.fence_key], list[bytes | int](head), [], 0
        if whose:
            yield RingCall(tuple(keys), tuple(arguments), tuple(whose), n_bytes)
