"""Kafka topics as a source of live events: a consumer in front of the same intake as `POST /events`.

A message is one event, a JSON object with the source's columns. Offsets are committed once all
events before them are in the online store and its streams. So nothing is lost; what is delivered
again, after a crash or a rebalance, is told by its event id, as is what came over HTTP as well.
Needs the extra `kafka`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, Self

import orjson
import pyarrow as pa

from heliostat.clock import Clock
from heliostat.errors import KafkaUnavailableError, MissingExtraError, StorageError
from heliostat.ingestion.intake import Intake
from heliostat.settings import KafkaSettings
from heliostat.storage.offline_store import DEAD_LETTERS, OfflineStore

_log = logging.getLogger(__name__)

_WAIT_S = 0.5
_LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True)
class Record:
    """One message.

    Attributes:
        topic: Where it was.
        partition: Which part of the topic.
        offset: Its number there.
        value: What it holds; None for a tombstone.
    """

    topic: str
    partition: int
    offset: int
    value: bytes | None

    @property
    def place(self) -> str:
        """The topic and partition, as dead letters name them."""
        return f"{self.topic}[{self.partition}]"


@dataclass(frozen=True)
class Consumed:
    """What came of messages.

    Attributes:
        accepted: New events, late ones included.
        duplicates: Events that were known already.
        rejected: Messages that are no event of their source; they are dead letters.
    """

    accepted: int = 0
    duplicates: int = 0
    rejected: int = 0

    def __add__(self, other: Consumed) -> Consumed:
        return Consumed(
            self.accepted + other.accepted, self.duplicates + other.duplicates, self.rejected + other.rejected
        )

    @property
    def messages(self) -> int:
        """How many messages that were."""
        return self.accepted + self.duplicates + self.rejected

    def __str__(self) -> str:
        return f"{self.accepted:,} new events, {self.duplicates:,} known already, {self.rejected:,} rejected"


def events_of(records: Sequence[Record]) -> tuple[list[tuple[Record, dict[str, Any]]], list[tuple[Record, str]]]:
    """Read messages.

    Args:
        records: Any.

    Returns:
        Those that hold a JSON object, with it; and the others, with the reason.
    """
    good: list[tuple[Record, dict[str, Any]]] = []
    bad: list[tuple[Record, str]] = []
    for record in records:
        if record.value is None:
            bad.append((record, "it has no value"))
            continue
        try:
            event = orjson.loads(record.value)
        except orjson.JSONDecodeError as error:
            bad.append((record, f"it is no JSON ({error})"))
            continue
        if isinstance(event, dict):
            good.append((record, event))
        else:
            bad.append((record, "it is JSON, but no object with the event's columns"))
    return good, bad


def next_offsets(records: Sequence[Record]) -> dict[tuple[str, int], int]:
    """By topic and partition, the offset after the last of these messages: what is committed."""
    offsets: dict[tuple[str, int], int] = {}
    for each in records:
        at = each.topic, each.partition
        offsets[at] = max(offsets.get(at, 0), each.offset + 1)
    return offsets


class KafkaIntake:
    """Takes events from topics. Use it as a context manager: closing leaves the consumer group.

    Args:
        settings: Brokers, group and topics.
        intake: Where events go; one with a blocking store.
        letters: Where messages go that are no events.
        clock: Tells when those were put aside.
        batch: Messages at a time; at most what the intake takes.

    Raises:
        MissingExtraError: If the client library isn't installed.
        KafkaUnavailableError: If the settings name no broker, or a client can't be made of them.
    """

    def __init__(
        self, settings: KafkaSettings, intake: Intake, letters: OfflineStore, clock: Clock, *, batch: int
    ) -> None:
        self._settings, self._intake, self._letters, self._clock, self._batch = (
            settings,
            intake,
            letters,
            clock,
            batch,
        )
        if settings.brokers is None or not settings.topics:
            raise KafkaUnavailableError("(nowhere)", "ingestion.kafka names no brokers or no topics")
        self._client = _client_library()
        options = {
            "bootstrap.servers": settings.brokers,
            "group.id": settings.group,
            "auto.offset.reset": settings.start,
            **settings.options,
            # Ours: an offset is committed when its event is safe, and not before.
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
        }
        try:
            self._consumer = self._client.Consumer(options)
            self._consumer.subscribe(list(settings.topics))
        except (self._client.KafkaException, ValueError, TypeError) as error:
            raise KafkaUnavailableError(settings.brokers, str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._consumer.close()

    def run_forever(self, stop: threading.Event, *, idle_s: float | None = None) -> Consumed:
        """Take what comes; a store that is away is waited for, and the consumer stays in its group.

        Args:
            stop: Set it to end after the batch under way.
            idle_s: End when nothing has come for so long, seconds; None: never.

        Returns:
            What was taken in all.

        Raises:
            KafkaUnavailableError: If the client says that it can't go on.
        """
        total, quiet_s = Consumed(), 0.0
        while not stop.is_set() and (idle_s is None or quiet_s < idle_s):
            records = self._read()
            if not records:
                quiet_s += _WAIT_S
                continue
            quiet_s = 0.0
            taken = self._taken(records, stop)
            if taken is None:
                break  # nothing of it is committed: it will be delivered again
            self._commit(records)
            total += taken
            _log.info("took %s", taken)
        return total

    def _read(self) -> list[Record]:
        records: list[Record] = []
        for message in self._consumer.consume(self._batch, _WAIT_S):
            error = message.error()
            if error is None:
                records.append(Record(message.topic(), message.partition(), message.offset(), message.value()))
            elif error.fatal():
                raise KafkaUnavailableError(str(self._settings.brokers), error.str())
            else:
                _log.warning("Kafka: %s", error.str())
        return records

    def _taken(self, records: Sequence[Record], stop: threading.Event) -> Consumed | None:
        """Take messages in, however often that has to be tried; None if it should stop before."""
        pause_s = _WAIT_S
        while not stop.is_set():
            try:
                return self.take(records)
            except StorageError as error:
                _log.warning("%d messages wait, next try in %.1f s: %s", len(records), pause_s, error)
            self._stay(pause_s, stop)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        return None

    def _stay(self, pause_s: float, stop: threading.Event) -> None:
        """Wait without being taken for dead: who doesn't poll leaves its group."""
        self._consumer.pause(self._consumer.assignment())
        found = self._consumer.poll(0)
        if found is not None and found.error() is None:
            # Of a partition that was assigned this instant: it has to be read again.
            self._consumer.seek(self._client.TopicPartition(found.topic(), found.partition(), found.offset()))
        stop.wait(pause_s)
        self._consumer.resume(self._consumer.assignment())

    def take(self, records: Sequence[Record]) -> Consumed:
        """Take messages in; doing it again changes nothing.

        Args:
            records: Any, of the topics in the settings.

        Raises:
            OnlineStoreUnavailableError: If the store doesn't answer.
            TableCommitError: If dead letters can't be written.
        """
        good, bad = events_of(records)
        by_source: dict[str, list[tuple[Record, dict[str, Any]]]] = {}
        for record, event in good:
            by_source.setdefault(self._settings.topics[record.topic], []).append((record, event))
        refused: dict[str, list[tuple[Record, str]]] = {}
        for record, reason in bad:
            refused.setdefault(self._settings.topics[record.topic], []).append((record, reason))
        accepted = duplicates = 0
        for source, members in by_source.items():
            results = self._intake.submit(source, [event for _, event in members])
            for (record, _), result in zip(members, results, strict=True):
                if result.status == "rejected":
                    refused.setdefault(source, []).append((record, str(result.reason)))
                elif result.status == "duplicate":
                    duplicates += 1
                else:
                    accepted += 1
        self._put_aside(refused)
        return Consumed(accepted, duplicates, sum(map(len, refused.values())))

    def _put_aside(self, refused: Mapping[str, Sequence[tuple[Record, str]]]) -> None:
        now_us = self._clock.now_us()
        for source, members in refused.items():
            letters = [
                {
                    "file": record.place,
                    "row": record.offset,
                    "reason": reason,
                    "event": (record.value or b"").decode(errors="replace"),
                    "rejected_at": now_us,
                }
                for record, reason in members
            ]
            self._letters.append_dead_letters(source, pa.Table.from_pylist(letters, schema=DEAD_LETTERS))

    def _commit(self, records: Sequence[Record]) -> None:
        offsets = [self._client.TopicPartition(*at, offset) for at, offset in next_offsets(records).items()]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=False)
        except self._client.KafkaException as error:
            # A rebalance has given the partition to somebody else, or the broker is away.
            _log.warning("offsets weren't committed, so these events will come again: %s", error)


def _client_library() -> ModuleType:
    try:
        import confluent_kafka
    except ModuleNotFoundError as error:
        raise MissingExtraError("ingestion.kafka", "confluent-kafka", "kafka") from error
    library: ModuleType = confluent_kafka
    return library
