from __future__ import annotations

from heliostat.storage.event_updates import EventUpdate, event_calls


def update(name: str, bucket: int, *, stream: bool = True, rings: tuple[bytes, ...] = (b"d1", b"d2")) -> EventUpdate:
    return EventUpdate(
        epoch_key=f"epoch{bucket}",
        seen_key=f"hs:p:d:s:u:{{b{bucket}}}:{name}",
        stream_key=f"stream{bucket}" if stream else None,
        fields=(b"e", name.encode()) if stream else (),
        bundle_key=f"{name}-rings" if rings else None,
        rings=tuple((each, b"slot") for each in rings),
    )


def test_a_calls_keys_and_arguments_are_what_the_script_expects() -> None:
    (call,) = event_calls([update("a", 3), update("b", 3, rings=(b"d2",))], remember_ms=5000)
    seen = "hs:p:d:s:u:{b3}:"
    assert call.keys == ("epoch3", f"{seen}a", "stream3", "a-rings", f"{seen}b", "stream3", "b-rings")
    head = (5000, 2, b"d1", b"d2")
    assert call.arguments == (*head, *(2, b"e", b"a", 2, 1, b"slot", 2, b"slot"), *(2, b"e", b"b", 1, 2, b"slot"))
    assert call.updates == (0, 1)


def test_an_update_without_a_stream_has_no_fields() -> None:
    (call,) = event_calls([update("a", 3, stream=False, rings=())], remember_ms=5000)
    assert (call.keys, call.arguments) == (("epoch3", "hs:p:d:s:u:{b3}:a"), (5000, 0, 0, 0))


def test_updates_of_a_bucket_share_a_call_in_their_order_and_no_call_has_two_buckets() -> None:
    names = [(f"e{number}", number % 3) for number in range(10)]
    calls = list(event_calls([update(*each) for each in names], remember_ms=1))
    assert [call.updates for call in calls] == [(0, 3, 6, 9), (1, 4, 7), (2, 5, 8)]


def test_what_appends_to_a_stream_comes_before_what_only_changes_rings() -> None:
    calls = event_calls([update("a", 1, stream=False), update("a", 1), update("b", 2)], remember_ms=1)
    assert [call.updates for call in calls] == [(1,), (2,), (0,)]


def test_a_call_keeps_the_server_busy_for_a_bounded_time() -> None:
    calls = list(event_calls([update(f"e{number}", 0) for number in range(1000)], remember_ms=1))
    assert max(len(call.updates) for call in calls) <= 64
    assert [at for call in calls for at in call.updates] == list(range(1000))


def test_braces_in_an_event_id_are_no_hash_tag() -> None:
    assert update("a{b9}", 3).slot == "b3"
