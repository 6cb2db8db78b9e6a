"""Tables and artifacts in an object store: the same contract as on a disk, against a local S3 server."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import ArtifactCorruptError, StaleProgressError, TableUnavailableError
from heliostat.forgetting import forget
from heliostat.ingestion.intake import Intake
from heliostat.ingestion.sink import Sink
from heliostat.retention import prune
from heliostat.schema import TIMESTAMP
from heliostat.settings import ClockSettings, OnlineSettings, Settings, StorageSettings
from heliostat.storage.artifact_store import ArtifactStore
from heliostat.storage.delta import Progress
from heliostat.storage.event_log import EventLog
from heliostat.storage.offline_store import DEAD_LETTERS, OfflineStore
from heliostat.workspace import Workspace
from tests.contract.services import S3_SECRET
from tests.integration.erasure_declarations import SALES, SHOP, USER

pytestmark = pytest.mark.slow

NOW_US = parse_instant_us("2026-03-01")


def event(number: int, user: str, days: float = 1.0) -> dict[str, Any]:
    at_us = NOW_US - int(days * US_PER_DAY)
    return {
        "event_id": f"e{number}", "user": user, "shop": "north", "device": "d", "at": at_us, "amount": 1.0
    }  # fmt: skip


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), SALES.schema)


@pytest.fixture
def log(s3_root: str, s3_options: dict[str, str]) -> EventLog:
    return EventLog(s3_root, s3_options, 4)


@pytest.fixture
def workspace(home: Path, valkey: str, s3_root: str, s3_options: dict[str, str]) -> Any:
    settings = Settings(
        project=f"s{home.name}",
        home=home,
        definitions="tests.integration.erasure_declarations",
        online=OnlineSettings(url=valkey),
        storage=StorageSettings(root=s3_root, options=s3_options, buckets=4),
        clock=ClockSettings(kind="replay", replay_from="2026-03-01", speed=0),
    )
    with Workspace.open(settings) as opened:
        yield opened


def test_an_event_is_in_the_log_once_and_is_read_by_bucket_time_and_version(log: EventLog) -> None:
    first = log.append(SALES, table(event(1, "a"), event(2, "b", days=9)), ingested_us=NOW_US)
    again = log.append(SALES, table(event(2, "b", days=9), event(3, "c")), ingested_us=NOW_US + 1)
    assert (first.accepted, again.accepted, again.duplicates) == (2, 1, 1)
    for entity in SALES.entities:
        assert log.read(SALES, entity).num_rows == 3
    assert log.read(SALES, USER, version=first.versions["user"]).num_rows == 2
    recent = log.read(SALES, USER, min_time_us=NOW_US - 2 * US_PER_DAY).column("event_id").to_pylist()
    assert sorted(recent) == ["e1", "e3"]
    by_bucket = [log.read_bucket(SALES, USER, bucket).num_rows for bucket in log.buckets]
    assert sum(by_bucket) == 3
    assert log.statistics(SALES, SHOP).rows == 3


def test_writers_at_the_same_time_lose_nothing_and_double_nothing(log: EventLog) -> None:
    together = threading.Barrier(4)

    def append(writer: int) -> None:
        own = EventLog(log.root, log.storage_options, log.n_buckets)
        together.wait()
        for number in range(3):
            rows = table(event(100 * writer + number, f"u{writer}"), event(7, "shared"))
            own.append(SALES, rows, ingested_us=NOW_US, entity=USER)

    log.ensure_table(SALES, USER)
    threads = [threading.Thread(target=append, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = log.read(SALES, USER).column("event_id").to_pylist()
    assert len(ids) == len(set(ids)) == 13
    assert log.compact(SALES, USER, min_files=2) > 0
    assert sorted(log.read(SALES, USER).column("event_id").to_pylist()) == sorted(ids)


def test_progress_of_a_stream_moves_with_its_rows_or_not_at_all(log: EventLog) -> None:
    log.append(SALES, table(event(1, "a")), ingested_us=1, entity=USER, progress=Progress({}, {"s": (5, 1)}))
    with pytest.raises(StaleProgressError):
        log.append(
            SALES, table(event(2, "a")), ingested_us=1, entity=USER, progress=Progress({"s": (4, 0)}, {"s": (6, 0)})
        )
    assert log.progress(SALES, USER, ["s"]) == {"s": (5, 1)}
    assert log.read(SALES, USER).num_rows == 1


def test_offline_tables_are_written_replaced_listed_and_read(s3_root: str, s3_options: dict[str, str]) -> None:
    store = OfflineStore(s3_root, s3_options)
    at = pa.array([NOW_US], pa.int64()).cast(TIMESTAMP)
    for value in (1.0, 2.0):
        rows = pa.table({"user": ["a"], "as_of": at, "n": [value]})
        store.write_day("view@1", NOW_US, rows)
        store.write_batch("churn", NOW_US, rows)
    found = store.read("view@1", start_us=NOW_US, end_us=NOW_US + US_PER_DAY)
    assert found.column("n").to_pylist() == store.read_batch("churn").column("n").to_pylist() == [2.0]
    letters = pa.Table.from_pylist(
        [{"file": "f", "row": 1, "reason": "r", "event": "{}", "rejected_at": NOW_US}], DEAD_LETTERS
    )
    assert [store.append_dead_letters("sales", letters) for _ in range(2)] == [1, 0]
    assert store.tables("features") == ["view@1"]
    assert store.tables("predictions") == []


def test_artifacts_are_found_by_their_content_and_checked(s3_root: str, s3_options: dict[str, str]) -> None:
    store = ArtifactStore(f"{s3_root}/artifacts", s3_options)
    digest = store.put({"model.txt": b"a model", "profile.json": b"{}"})
    assert store.put({"profile.json": b"{}", "model.txt": b"a model"}) == digest
    assert ArtifactStore(f"{s3_root}/artifacts", s3_options).get(digest)["model.txt"] == b"a model"
    with pytest.raises(ArtifactCorruptError):
        store.read(digest, "nothing.txt")


def test_events_go_from_the_stream_to_the_object_store_and_out_again_when_forgotten(workspace: Workspace) -> None:
    intake = Intake(
        workspace.online,
        [SALES],
        list(workspace.definitions.views.values()),
        clock=workspace.clock,
        settings=workspace.settings.ingestion,
        n_buckets=4,
    )
    for first in (0, 10):
        intake.submit("sales", [event(first + at, "ann" if at % 2 else "bob") for at in range(10)])
        Sink.of(workspace).drain_once()
    before = workspace.event_log.version(SALES, USER)
    report = forget(workspace, USER, "ann")
    assert report.left == ()
    assert report.rows["events/sales/user"] == 10
    assert workspace.event_log.read(SALES, SHOP).column("user").to_pylist() == ["bob"] * 10
    with pytest.raises(TableUnavailableError):
        workspace.event_log.read(SALES, USER, version=before)


def test_old_days_leave_the_object_store(workspace: Workspace) -> None:
    workspace.event_log.append(SALES, table(event(1, "a", days=400), event(2, "a", days=3)), ingested_us=NOW_US)
    report = prune(workspace, keep_us=100 * US_PER_DAY, force=True)
    assert dict(report.rows) == {"sales": 1}
    assert workspace.event_log.read(SALES, USER).column("event_id").to_pylist() == ["e2"]


def test_credentials_are_in_no_message_and_no_text(
    s3_options: dict[str, str], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    options = {**s3_options, "AWS_MAX_RETRIES": "0"}
    log = EventLog("s3://no-such-bucket/data", options)
    with pytest.raises(TableUnavailableError) as told:
        log.append(SALES, table(event(1, "a")), ingested_us=1)
    captured = capfd.readouterr()
    texts = [str(told.value), repr(told.value), repr(log), repr(log.table(SALES, USER)), caplog.text]
    texts += [
        captured.out,
        captured.err,
        repr(StorageSettings(options=options)),
        repr(ArtifactStore("s3://b/a", options)),
    ]
    assert not [text for text in texts if S3_SECRET in text]
