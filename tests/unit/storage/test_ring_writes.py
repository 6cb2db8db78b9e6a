from __future__ import annotations

from heliostat.storage.ring_writes import BucketLease, EntityWrite, RingCounts, RingLayouts

LEASE = BucketLease("fence", 9, 7)
LAYOUTS = RingLayouts(((b"days", 100), (b"life", 90)), True, 5000)
HEAD = (9, 7, 1, 5000, 2, b"days", 100, b"life", 90)


def test_a_calls_keys_and_arguments_are_what_the_script_expects() -> None:
    entities = [
        EntityWrite(0, (("a1", 0, b"ring"), ("a2", 1, b"")), ("seen",)),
        EntityWrite(1, (("b1", 0, b"other"),)),
    ]
    (call,) = LAYOUTS.calls(LEASE, entities)
    assert call.keys == ("fence", "a1", "a2", "seen", "b1")
    assert call.arguments == (*HEAD, 2, 1, 1, b"ring", 2, b"", 1, 0, 1, b"other")
    assert call.entities == (0, 0, 1)
    assert call.n_bytes == 9


def test_a_call_keeps_the_server_busy_for_a_bounded_time() -> None:
    small = list(LAYOUTS.calls(LEASE, [EntityWrite(at, ((f"k{at}", 0, b"r"),)) for at in range(1000)]))
    assert [at for call in small for at in call.entities] == list(range(1000))
    assert max(len(call.entities) for call in small) <= 128
    large = list(LAYOUTS.calls(LEASE, [EntityWrite(at, ((f"k{at}", 0, bytes(100_000)),)) for at in range(9)]))
    assert [len(call.entities) for call in large] == [3, 3, 3]
    assert all(call.arguments[: len(HEAD)] == HEAD for call in [*small, *large])


def test_nothing_to_write_is_no_call() -> None:
    assert list(LAYOUTS.calls(LEASE, [])) == []


def test_answers_are_counted() -> None:
    counts = RingCounts.of([1, 1, 0, 2, 3, 4, 5]) + RingCounts(written=1)
    assert counts == RingCounts(written=3, unchanged=1, ahead=1, busy=1, cleared=1)
