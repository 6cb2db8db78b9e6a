"""What one event does to the online store, and the calls that do it to many. Pure.

Events of one bucket share a call of `APPLY_EVENTS`: their keys are in one slot of a cluster, and
what they have in common (the rings' descriptors, the script's own start) is paid for once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

EventOutcome: TypeAlias = Literal["applied", "duplicate", "late"]
"""What became of an event; ``late``: taken, but too old for at least one of its rings, which had moved on."""

OUTCOMES: Final[tuple[EventOutcome, ...]] = ("duplicate", "applied", "late")
"""By what the script answers: 0, 1, 2."""

# The server does nothing else while a call runs: this many events take it a millisecond.
_EVENTS_A_CALL = 64


@dataclass(frozen=True, slots=True)
class EventUpdate:
    """All that one event does to one entity's part of the store.

    Attributes:
        epoch_key: Counts the bucket's materializations: which of them an event comes after.
        seen_key: Set once the event is applied; another event with the same key is a duplicate.
        stream_key: Where the event is appended; None: nowhere.
        fields: Field, value, field, value, …: the stream's entry.
        bundle_key: Where the entity's rings are; None: no ring is concerned.
        rings: Packed descriptor and slot (tile number, then the state's columns) of each ring.
    """

    epoch_key: str
    seen_key: str
    stream_key: str | None
    fields: tuple[bytes, ...]
    bundle_key: str | None
    rings: tuple[tuple[bytes, bytes], ...]

    @property
    def slot(self) -> str:
        """The bucket's hash tag: updates with the same one may share a call."""
        return self.seen_key.partition("{")[2].partition("}")[0]


@dataclass(frozen=True, slots=True)
class EventCall:
    """One call of `APPLY_EVENTS`.

    Attributes:
        keys: All keys, in the order the script takes them.
        arguments: All arguments.
        updates: Which updates it applies, by their position: one reply each.
    """

    keys: tuple[str, ...]
    arguments: tuple[bytes | int, ...]
    updates: tuple[int, ...]


def event_calls(updates: Sequence[EventUpdate], *, remember_ms: int) -> Iterator[EventCall]:
    """The calls that apply updates: those of a bucket together, in their order.

    What appends to a stream comes first, so that a connection that breaks in between leaves no
    event in a ring that isn't on its way into the log.

    Args:
        updates: Any; those of one event for several entities may be in several calls.
        remember_ms: How long an event's id is remembered.
    """
    together: dict[tuple[bool, str], list[int]] = {}
    for at, update in enumerate(updates):
        together.setdefault((update.stream_key is None, update.slot), []).append(at)
    for group in sorted(together, key=lambda each: each[0]):
        positions = together[group]
        for begin in range(0, len(positions), _EVENTS_A_CALL):
            yield _call(updates, positions[begin : begin + _EVENTS_A_CALL], remember_ms)


def _call(updates: Sequence[EventUpdate], positions: Sequence[int], remember_ms: int) -> EventCall:
    descriptors: dict[bytes, int] = {}
    keys: list[str] = [updates[positions[0]].epoch_key]
    arguments: list[bytes | int] = []
    for at in positions:
        update = updates[at]
        keys.append(update.seen_key)
        if update.stream_key is None:
            arguments.append(0)
        else:
            keys.append(update.stream_key)
            arguments.append(len(update.fields))
            arguments.extend(update.fields)
        arguments.append(len(update.rings))
        if update.bundle_key is not None:
            keys.append(update.bundle_key)
        for descriptor, slot in update.rings:
            arguments.append(descriptors.setdefault(descriptor, len(descriptors) + 1))
            arguments.append(slot)
    return EventCall(tuple(keys), (remember_ms, len(descriptors), *descriptors, *arguments), tuple(positions))
