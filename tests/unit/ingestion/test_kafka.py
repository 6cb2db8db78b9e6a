from __future__ import annotations

import pytest

from heliostat.errors import KafkaUnavailableError
from heliostat.ingestion.kafka import Consumed, Record, events_of, next_offsets


def record(offset: int, value: bytes | None, *, partition: int = 0) -> Record:
    return Record("shop.purchases", partition, offset, value)


def test_a_message_is_one_json_object() -> None:
    good, bad = events_of([record(0, b'{"event_id": 5}'), record(1, b'{"event_id": "a", "n": null}')])
    assert [event for _, event in good] == [{"event_id": 5}, {"event_id": "a", "n": None}]
    assert bad == []


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "it has no value"),
        (b"", "it is no JSON"),
        (b"\x00\x00\x00\x00\x05avro", "it is no JSON"),
        (b"[1, 2]", "no object"),
        (b'{"a": NaN}', "it is no JSON"),
    ],
)
def test_a_message_that_is_no_event_says_why_and_stops_no_other(value: bytes | None, reason: str) -> None:
    good, bad = events_of([record(0, value), record(1, b'{"event_id": 5}')])
    assert [each.offset for each, _ in good] == [1]
    assert (bad[0][0].offset, reason in bad[0][1]) == (0, True)


def test_what_is_committed_is_the_offset_after_the_last_of_each_partition() -> None:
    records = [record(7, b""), record(3, b"", partition=1), record(9, None), record(8, b"")]
    assert next_offsets(records) == {("shop.purchases", 0): 10, ("shop.purchases", 1): 4}
    assert next_offsets([]) == {}


def test_dead_letters_name_topic_and_partition() -> None:
    assert record(4, b"", partition=2).place == "shop.purchases[2]"


def test_what_was_taken_adds_up() -> None:
    total = Consumed(3, 1, 0) + Consumed(rejected=2)
    assert (total, total.messages) == (Consumed(3, 1, 2), 6)


def test_brokers_that_are_not_named_are_an_error_with_the_setting() -> None:
    assert "ingestion.kafka" in str(KafkaUnavailableError("(nowhere)", "ingestion.kafka names no brokers"))
