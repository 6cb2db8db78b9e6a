from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from heliostat.storage.bundles import RingBytes, directory_bytes
from heliostat.storage.ring_writes import BucketLease, EntityRings, RingCounts, RingLayouts, RingOutcome
from tests.rings import bundled

LEASE = BucketLease("fence", 9, 7)
DAYS, LIFE = b"the ring of days", b"the ring of life"
LAYOUTS = RingLayouts(((DAYS, b"days", 100), (LIFE, b"life", 90)), True, 5000)
HEAD = (9, 7, 1, 5000, b"", 2, b"days", 100, b"life", 90)
ONE_LAYOUT = RingLayouts(((DAYS, b"days", 100),), True, 5000)
RING, OTHER, MORE = b"12345678", b"1234567812345678", b"87654321"
BESIDE = directory_bytes(1)


def packed(*rings: bytes) -> RingBytes:
    return RingBytes(b"".join(rings), np.array(list(map(len, rings))))


def both(first: Sequence[bytes], second: Sequence[bytes], seen_keys: dict[int, list[str]]) -> EntityRings:
    """Two entities, which begin with number 3, and two layouts."""
    return EntityRings(3, ["a", "b"], [packed(*first), packed(*second)], seen_keys)


def test_a_calls_keys_and_arguments_are_what_the_script_expects() -> None:
    entities = both([RING, OTHER], [b"", MORE], {1: ["one", "two"]})
    (call,) = LAYOUTS.calls(LEASE, entities)
    assert call.keys == ("fence", "a", "b", "one", "two")
    first, second = bundled({DAYS: RING}), bundled({DAYS: OTHER, LIFE: MORE})
    sizes = struct.pack("<II", len(first), len(second))
    assert call.arguments == (*HEAD, 2, struct.pack("<II", 0, 2), sizes, first + second)
    assert (call.first, call.n_entities, call.n_bytes, call.n_written) == (3, 2, len(first + second), 3)


def test_where_nobody_has_recent_events_their_numbers_take_no_room() -> None:
    (call,) = LAYOUTS.calls(LEASE, both([RING, b""], [b"", b""], {}))
    assert call.arguments == (*HEAD, 2, b"", struct.pack("<II", BESIDE + 8, 0), bundled({DAYS: RING}))


def rings(n: int, ring: bytes, seen: int = 0) -> EntityRings:
    """One layout's."""
    seen_keys = {at: [f"s{at}.{number}" for number in range(seen)] for at in range(n)} if seen else {}
    return EntityRings(0, [f"k{at}" for at in range(n)], [packed(*[ring] * n)], seen_keys)


def test_a_call_keeps_the_server_busy_for_a_bounded_time() -> None:
    small = list(ONE_LAYOUT.calls(LEASE, rings(1000, RING)))
    assert max(call.n_entities for call in small) <= 128
    large = list(ONE_LAYOUT.calls(LEASE, rings(9, bytes(100_000))))
    assert max(call.n_bytes for call in large) <= 256 * 1024
    many = list(ONE_LAYOUT.calls(LEASE, rings(100, RING, seen=40)))
    assert max(len(call.keys) for call in many) <= 1025
    for calls, n, ring in ((small, 1000, RING), (large, 9, bytes(100_000)), (many, 100, RING)):
        numbers = [at for call in calls for at in range(call.first, call.first + call.n_entities)]
        assert numbers == list(range(n))
        assert [key for call in calls for key in call.keys if key.startswith("k")] == [f"k{at}" for at in range(n)]
        assert b"".join(bytes(call.arguments[-1]) for call in calls) == bundled({DAYS: ring}) * n
        assert all(call.arguments[:8] == (9, 7, 1, 5000, b"", 1, b"days", 100) for call in calls)


def test_an_entity_is_never_cut_in_two_however_large_it_is() -> None:
    (call,) = ONE_LAYOUT.calls(LEASE, rings(1, bytes(1_000_000), seen=3000))
    assert call.n_bytes == 1_000_000 + BESIDE
    assert call.keys[:3] == ("fence", "k0", "s0.0")


def test_each_call_remembers_the_ids_of_its_own_entities() -> None:
    entities = rings(300, RING)._replace(seen_keys={0: ["first"], 200: ["later"]})
    calls = list(ONE_LAYOUT.calls(LEASE, entities))
    assert [[key for key in call.keys if key in ("first", "later")] for call in calls] == [["first"], ["later"], []]
    assert struct.unpack("<128I", calls[1].arguments[9])[200 - 128] == 1  # type: ignore[arg-type]  # it is bytes


def test_nothing_to_write_is_no_call() -> None:
    assert list(LAYOUTS.calls(LEASE, EntityRings(0, [], [packed(), packed()], {}))) == []


def test_answers_are_counted() -> None:
    counts = RingCounts.of([1, 1, 0, 2, 3, 4, 5]) + RingCounts(written=1)
    assert counts == RingCounts(written=3, unchanged=1, ahead=1, busy=1, cleared=1)


def test_an_answer_says_what_was_written_and_who_is_busy() -> None:
    (call,) = LAYOUTS.calls(LEASE, both([RING, OTHER], [b"", MORE], {}))
    assert call.outcome(1) == RingOutcome(RingCounts(written=3)), "where there was nothing"
    assert call.outcome([0, 1, 5, 1]) == RingOutcome(RingCounts(written=2, unchanged=1))
    assert call.outcome([0, 3, 4, 3]) == RingOutcome(RingCounts(unchanged=1, busy=2, cleared=1), (4,))
