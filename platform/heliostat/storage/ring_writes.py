"""Rings from history, and the calls that bring them beside what live events made. Pure.

Entities of one bucket share a call of `WRITE_RINGS`: their keys are in one slot of a cluster, and
what they have in common (the layouts, the script's own start) is paid for once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from operator import attrgetter
from typing import Final, NamedTuple

import numpy as np

from heliostat.storage.bundles import RingBytes, bundles

SUPERSEDED: Final = -1
"""What the script answers a materialization of a bucket that another one has taken over."""

UNCHANGED, WRITTEN, AHEAD, BUSY, CLEARED = range(5)

# The server does nothing else while a call runs: this much takes it a millisecond or less.
_RINGS_A_CALL = 128
_KEYS_A_CALL = 1024
_BYTES_A_CALL = 256 * 1024

_U4 = np.dtype("<u4")


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
    def total(cls, many: Iterable[RingCounts]) -> RingCounts:
        """All of them together."""
        own = attrgetter(*(each.name for each in fields(cls)))
        return cls(*map(sum, zip(*map(own, many), strict=True)))

    @classmethod
    def of(cls, codes: Sequence[int]) -> RingCounts:
        """From what the script answers: a number a ring, and one for each that went without being asked about."""
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


class EntityRings(NamedTuple):
    """All rings of some entities of one bucket, as the event log has them, in columns.

    Attributes:
        first: The number of the first entity, as the writer counts them; the others follow.
        keys: Each entity's bundle's.
        rings: For each layout, each entity's ring.
        seen_keys: By place among the entities, of events in open tiles: a repetition that is sent live is a
            duplicate then.
    """

    first: int
    keys: Sequence[str]
    rings: Sequence[RingBytes]
    seen_keys: Mapping[int, Sequence[str]]


class RingOutcome(NamedTuple):
    """What became of a call's rings.

    Attributes:
        counts: Of all of them.
        busy: Entities that live events kept busy, as the writer counts them.
    """

    counts: RingCounts
    busy: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RingCall:
    """One call of `WRITE_RINGS`.

    Attributes:
        keys: All keys, in the order the script takes them.
        arguments: All arguments.
        first: The number of the first entity.
        n_entities: How many there are.
        n_bytes: Of all bundles.
        n_written: Rings that have bytes.
    """

    keys: tuple[str, ...]
    arguments: tuple[bytes | int, ...]
    first: int
    n_entities: int
    n_bytes: int
    n_written: int

    def outcome(self, reply: int | Sequence[int]) -> RingOutcome:
        """What the script's answer means; not `SUPERSEDED`."""
        if isinstance(reply, int):
            return RingOutcome(RingCounts(written=self.n_written))
        counts = RingCounts.of(reply)
        if not counts.busy:
            return RingOutcome(counts)
        busy = {self.first + at % self.n_entities for at, code in enumerate(reply) if code == BUSY}
        return RingOutcome(counts, tuple(sorted(busy)))


@dataclass(frozen=True)
class RingLayouts:
    """What all calls of a materialization say first.

    Attributes:
        groups: For each layout the id of its rings, its packed `RingDescriptor` and the first tile still open to
            late events.
        covers: Whether history holds all that live events did before the lease began.
        remember_ms: How long ids of recent events are remembered.
        gone: Ids of other views, whose rings go, one behind the other.
    """

    groups: tuple[tuple[bytes, bytes, int], ...]
    covers: bool
    remember_ms: int
    gone: bytes = b""

    def calls(self, lease: BucketLease, entities: EntityRings) -> Iterator[RingCall]:
        """The calls that write entities of one bucket, in their order.

        Args:
            lease: Of the bucket.
            entities: Any number of them.
        """
        described = [part for _, descriptor, first_live in self.groups for part in (descriptor, first_live)]
        head = (lease.token, lease.epoch, int(self.covers), self.remember_ms, self.gone, len(self.groups), *described)
        n_entities, n_layouts = len(entities.keys), len(self.groups)
        if not n_entities:
            return
        data, sizes = bundles([ring_id for ring_id, *_ in self.groups], entities.rings)
        n_rings = np.sum([each.sizes > 0 for each in entities.rings], axis=0)
        offsets = np.zeros(n_entities + 1, dtype=np.int64)
        np.cumsum(sizes, out=offsets[1:])
        n_seen = np.zeros(n_entities + 1, dtype=np.int64)
        for at, seen in entities.seen_keys.items():
            n_seen[at + 1] = len(seen)
        seen_before = np.cumsum(n_seen)
        seen_places = sorted(entities.seen_keys)
        at_once = max(1, _RINGS_A_CALL // n_layouts)
        waiting = [(first, min(first + at_once, n_entities)) for first in range(0, n_entities, at_once)][::-1]
        while waiting:
            first, last = waiting.pop()
            n_bytes = int(offsets[last] - offsets[first])
            n_keys = last - first + int(seen_before[last] - seen_before[first])
            if last - first > 1 and (n_bytes > _BYTES_A_CALL or n_keys > _KEYS_A_CALL):
                middle = (first + last) // 2
                waiting += [(middle, last), (first, middle)]
                continue
            some_seen = seen_before[last] > seen_before[first]
            counts = n_seen[first + 1 : last + 1].astype(_U4).tobytes() if some_seen else b""
            seen_here = seen_places[bisect_left(seen_places, first) : bisect_left(seen_places, last)]
            seen_keys = [entities.seen_keys[at] for at in seen_here]
            own = sizes[first:last].astype(_U4).tobytes()
            yield RingCall(
                keys=(
                    lease.fence_key,
                    *entities.keys[first:last],
                    *chain.from_iterable(seen_keys),
                ),
                arguments=(*head, last - first, counts, own, data[offsets[first] : offsets[last]]),
                first=entities.first + first,
                n_entities=last - first,
                n_bytes=n_bytes,
                n_written=int(n_rings[first:last].sum()),
            )
