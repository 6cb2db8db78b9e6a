"""An event's way: taken in live, buffered in a stream, applied to its table exactly once."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from heliostat.cli import run_job
from heliostat.clock import US_PER_DAY, US_PER_S, ManualClock, parse_instant_us
from heliostat.errors import OnlineStoreUnavailableError, StaleProgressError
from heliostat.features.aggregations import Count
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.ingestion.intake import EventResult, Intake
from heliostat.ingestion.sink import Drained, Sink
from heliostat.online.tiles import RingLimits, ring_layout
from heliostat.schema import INGESTED, TIMESTAMP
from heliostat.serving.backlog import Backlog
from heliostat.serving.telemetry import Board
from heliostat.settings import OnlineSettings, Settings
from heliostat.status import status_of
from heliostat.storage.embedded import EmbeddedServer
from heliostat.storage.event_log import EventLog
from heliostat.storage.offline_store import OfflineStore
from heliostat.storage.online_store import AsyncOnlineStore, OnlineConfig, OnlineStore
from heliostat.storage.stream_entries import actual_record, event_entries, prediction_entry
from heliostat.storage.streams import AsyncStreams, Streams, record_key
from heliostat.workspace import Workspace
from jobs import ingest_events

NOW_US = parse_instant_us("1998-07-01")
ROOT = Path(__file__).parents[2]

USER = Entity("user", keys={"user_id": "int64"})
SHOP = Entity("shop", keys={"shop": "string"})
COLUMNS = {"user_id": pa.int64(), "shop": pa.string(), "event_id": pa.string(), "at": TIMESTAMP, "sum": pa.float64()}
SALES = EventSource("sales", schema=pa.schema(COLUMNS), entity=[USER, SHOP], event_time="at", event_id="event_id")
FEATURES = {"n_1h": Count(window="1h"), "n_30d": Count(window="30d")}
VIEW = FeatureView("recent", version=1, source=SALES, entity=USER, features=FEATURES)


def event(name: str, *, user: int = 1, at_us: int = NOW_US, **rest: Any) -> dict[str, Any]:
    return {"user_id": user, "shop": f"s{user % 3}", "event_id": name, "at": at_us, "sum": 1.5, **rest}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW_US)


@pytest.fixture
def intake(settings: Settings, clock: ManualClock) -> Iterator[Intake]:
    with OnlineStore.open(settings) as online:
        yield Intake(
            online, [SALES], [VIEW], clock=clock, settings=settings.ingestion, n_buckets=settings.storage.buckets
        )


@pytest.fixture
def sink(settings: Settings, clock: ManualClock) -> Iterator[Sink]:
    streams = Streams.open(settings)
    log = EventLog(settings.data_root, {}, settings.storage.buckets)
    yield Sink(streams, log, OfflineStore(settings.data_root), [SALES], clock)
    streams.close()


def _statuses(results: list[EventResult]) -> list[str]:
    return [each.status for each in results]


def _ids(sink: Sink, entity: Entity = USER) -> list[str]:
    return sorted(sink.event_log.read(SALES, entity).column("event_id").to_pylist())


def _waiting(sink: Sink) -> int:
    return sum(sink.streams.lengths(sink.streams.event_streams("sales")).values())


# ── Live intake ──────────────────────────────────────────────────────────────────────


def test_each_event_is_told_what_became_of_it(intake: Intake) -> None:
    first = intake.submit("sales", [event("a"), event("b", user=2), {**event("c"), "user_id": None}, event("a")])
    assert _statuses(first) == ["accepted", "accepted", "rejected", "duplicate"]
    again = intake.submit("sales", [event("b", user=2), event("d", at_us=NOW_US + US_PER_DAY)])
    assert _statuses(again) == ["duplicate", "rejected"]
    assert again[1].reason is not None
    assert "after now" in again[1].reason


def test_event_that_is_too_old_for_a_ring_that_moved_on_is_late_counted_and_still_history(
    settings: Settings, intake: Intake, sink: Sink
) -> None:
    limits = RingLimits(lateness_us=US_PER_DAY, future_tolerance_us=60 * US_PER_S)
    longest = ring_layout(VIEW, limits).groups[-1]
    intake.submit("sales", [event("new")])
    old_us = NOW_US - longest.n_slots * longest.hop_us  # the same slot, one turn of the ring before
    assert _statuses(intake.submit("sales", [event("old", at_us=old_us)])) == ["late"]
    with Workspace.open(settings) as workspace:
        assert status_of(workspace)["late_events"] == {"sales": 1}
    sink.drain_once()
    assert _ids(sink) == ["new", "old"]


def test_every_accepted_event_waits_in_its_buckets_stream_until_it_is_drained(intake: Intake, sink: Sink) -> None:
    intake.submit("sales", [event(f"e{user}", user=user) for user in range(40)])
    assert _waiting(sink) == 40
    moved = sink.drain_once()
    assert (moved.events, moved.duplicates, moved.trimmed) == (40, 0, 40)
    assert _waiting(sink) == 0
    assert _ids(sink) == _ids(sink, SHOP) == sorted(f"e{user}" for user in range(40))
    assert sink.drain_once() == Drained()


def test_drained_event_is_what_was_submitted_and_when(intake: Intake, sink: Sink, clock: ManualClock) -> None:
    clock.advance(7)
    intake.submit("sales", [event("a", sum=None, at_us=NOW_US - 5)])
    sink.drain_once()
    (row,) = sink.event_log.read(SALES, USER, columns=[*SALES.schema.names, INGESTED]).to_pylist()
    assert (row["user_id"], row["shop"], row["sum"], row[INGESTED]) == (1, "s1", None, NOW_US + 7)
    assert parse_instant_us(row["at"]) == NOW_US - 5


def test_intake_for_asyncio_does_the_same(settings: Settings, clock: ManualClock, sink: Sink) -> None:
    async def run() -> list[EventResult]:
        async with AsyncOnlineStore.open(settings) as online:
            intake = Intake(
                online, [SALES], [VIEW], clock=clock, settings=settings.ingestion, n_buckets=settings.storage.buckets
            )
            return [*await intake.asubmit("sales", [event("a"), {}]), *await intake.asubmit("sales", [event("a")])]

    assert _statuses(asyncio.run(run())) == ["accepted", "rejected", "duplicate"]
    assert sink.drain_once().events == 1


def test_store_that_is_away_is_reported_with_what_to_do(clock: ManualClock, tmp_path: Path) -> None:
    settings = Settings(online=OnlineSettings(url=f"unix://{tmp_path}/none.sock"))
    intake = Intake(OnlineStore.open(settings), [SALES], [], clock=clock, settings=settings.ingestion, n_buckets=16)
    with pytest.raises(OnlineStoreUnavailableError, match="heliostat up"):
        intake.submit("sales", [event("a")])


# ── Exactly once ─────────────────────────────────────────────────────────────────────


def test_sink_that_dies_between_commit_and_trim_applies_nothing_twice(
    intake: Intake, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    intake.submit("sales", [event("a"), event("b", user=2)])

    def die(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Streams, "trim", die)
        with pytest.raises(KeyboardInterrupt):
            sink.drain_once()
    assert (_ids(sink), _waiting(sink)) == (["a", "b"], 2)
    version = sink.event_log.version(SALES, USER)
    intake.submit("sales", [event("c", user=3)])
    moved = sink.drain_once()
    assert (moved.events, moved.duplicates, moved.trimmed) == (1, 0, 3)
    assert _ids(sink) == ["a", "b", "c"]
    assert sink.event_log.version(SALES, USER) == version + 1


def test_sink_that_dies_between_two_entities_repairs_the_second(
    intake: Intake, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    intake.submit("sales", [event("a"), event("b", user=2)])
    append = EventLog.append

    def die_at_shop(self: EventLog, *arguments: Any, **rest: Any) -> Any:
        if rest["entity"] is SHOP:
            raise KeyboardInterrupt
        return append(self, *arguments, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(EventLog, "append", die_at_shop)
        with pytest.raises(KeyboardInterrupt):
            sink.drain_once()
    assert _ids(sink) == ["a", "b"]
    sink.drain_once()
    assert _ids(sink) == _ids(sink, SHOP) == ["a", "b"]


KILLED = """
import os, signal, sys
from heliostat.settings import Settings
from heliostat.storage.streams import Streams
from heliostat.storage.event_log import EventLog
from heliostat.storage.offline_store import OfflineStore
from heliostat.clock import ManualClock
from heliostat.ingestion.sink import Sink
sys.path.insert(0, sys.argv[2])
from tests.integration.test_ingestion import SALES

settings = Settings.model_validate_json(sys.argv[1])
moment = sys.argv[3]
if moment == "before the trim":
    Streams.trim = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
else:
    from deltalake import DeltaTable
    DeltaTable.create_write_transaction = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
log = EventLog(settings.data_root, {}, settings.storage.buckets)
Sink(Streams.open(settings), log, OfflineStore(settings.data_root), [SALES], ManualClock(0)).drain_once()
"""


@pytest.mark.parametrize(("moment", "applied"), [("before the commit", 0), ("before the trim", 4)])
def test_killed_sink_leaves_all_for_the_next_one(
    intake: Intake, sink: Sink, settings: Settings, moment: str, applied: int
) -> None:
    intake.submit("sales", [event(f"e{user}", user=user) for user in range(4)])
    sink.streams.append("predictions", [_prediction("p0"), _prediction("p1")])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, settings.model_dump_json(), str(ROOT), moment],
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}"},
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(_ids(sink)) == applied
    assert _waiting(sink) == 4
    sink.drain_once()
    assert _ids(sink) == _ids(sink, SHOP) == [f"e{user}" for user in range(4)]
    assert _predicted(sink) == ["p0", "p1"]


def test_two_sinks_at_once_apply_everything_once(intake: Intake, sink: Sink, settings: Settings) -> None:
    other = Sink(Streams.open(settings), sink.event_log, sink.offline_store, [SALES], sink.clock)
    wanted: list[str] = []
    failures: list[BaseException] = []

    def drain(mine: Sink) -> None:
        try:
            for _ in range(6):
                mine.drain_once()
        except StaleProgressError:
            pass  # the other was quicker five times in a row, and has applied it
        except BaseException as error:  # noqa: BLE001 - shown by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=drain, args=(each,)) for each in (sink, other)]
    for thread in threads:
        thread.start()
    for batch in range(6):
        names = [f"{batch}-{user}" for user in range(10)]
        intake.submit("sales", [event(name, user=user) for user, name in enumerate(names)])
        sink.streams.append("predictions", [_prediction(f"p{name}") for name in names])
        wanted.extend(names)
    for thread in threads:
        thread.join()
    assert failures == []
    sink.drain_once()
    other.streams.close()
    assert _ids(sink) == _ids(sink, SHOP) == sorted(wanted)
    assert _predicted(sink) == sorted(f"p{name}" for name in wanted)


def test_other_sink_that_empties_a_stream_between_its_length_and_its_entries_is_no_error(
    intake: Intake, sink: Sink, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Sink(Streams.open(settings), sink.event_log, sink.offline_store, [SALES], sink.clock)
    intake.submit("sales", [event("a"), event("b", user=2)])
    sink.streams.append("predictions", [_prediction("p")])
    measured = sink.streams.lengths

    def overtaken(streams: Sequence[str]) -> dict[str, int]:
        lengths = measured(streams)
        other.drain_once()
        return lengths

    monkeypatch.setattr(sink.streams, "lengths", overtaken)
    assert sink.drain_once() == Drained()
    other.streams.close()
    assert _ids(sink) == _ids(sink, SHOP) == ["a", "b"]
    assert _predicted(sink) == ["p"]


def test_event_that_came_in_bulk_as_well_is_one_event(intake: Intake, sink: Sink) -> None:
    rows = pa.Table.from_pylist([event("a"), event("b")], schema=SALES.schema)
    sink.event_log.append(SALES, rows, ingested_us=5)
    intake.submit("sales", [event("b"), event("c")])
    moved = sink.drain_once()
    assert (moved.events, moved.duplicates) == (1, 1)
    assert _ids(sink) == ["a", "b", "c"]


def test_entry_that_cannot_be_read_is_put_aside_and_stops_nobody(intake: Intake, sink: Sink) -> None:
    intake.submit("sales", [event("a")])
    stream = next(each for each, n in sink.streams.lengths(sink.streams.event_streams("sales")).items() if n)
    no_key = event_entries(
        pa.Table.from_pylist([{**event("x"), "user_id": None}], schema=SALES.schema), ingested_us=1
    )[0][1]
    for payload in (b"nonsense", b'{"event_id": 5, "_ingested_us": 1}', no_key):
        sink.streams.client.xadd(stream, {b"e": payload})
    intake.submit("sales", [event("b")])
    moved = sink.drain_once()
    assert (moved.events, moved.unreadable, moved.trimmed) == (2, 3, 5)
    assert _ids(sink) == ["a", "b"]
    letters = sink.offline_store.read_dead_letters("sales")
    assert {each.partition(" ")[0] for each in letters.column("file").to_pylist()} == {stream}
    assert "nonsense" in letters.column("event").to_pylist()
    assert "user_id is missing" in letters.column("reason").to_pylist()


def test_more_than_one_read_is_drained_at_once(intake: Intake, sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heliostat.ingestion.sink._ENTRIES_A_STREAM", 3)
    monkeypatch.setattr("heliostat.ingestion.sink._RECORDS_A_STREAM", 3)
    intake.submit("sales", [event(f"e{number:02}", user=1) for number in range(10)])
    sink.streams.append("predictions", [_prediction(f"p{number}") for number in range(7)])
    moved = sink.drain_once()
    assert (moved.events, moved.predictions) == (10, 7)
    assert len(_ids(sink)) == 10


def test_little_files_of_many_drains_are_merged(intake: Intake, sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heliostat.ingestion.sink._COMMITS_A_COMPACTION", 64)
    for number in range(34):
        intake.submit("sales", [event(f"e{number}")])
        sink.drain_once()
    assert sink.event_log.statistics(SALES, USER).files < 10
    assert len(_ids(sink)) == 34


def test_files_that_were_merged_into_others_are_deleted_once_nobody_may_read_them_any_more(
    intake: Intake, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heliostat.ingestion.sink._COMMITS_A_COMPACTION", 99)

    def on_disk(*folder: str) -> int:
        return len(list(Path(sink.event_log.root, *folder).rglob("*.parquet")))

    stop = threading.Event()
    stop.wait = lambda *_: stop.set()  # type: ignore[method-assign,assignment] # one round
    for number in range(34):
        intake.submit("sales", [event(f"e{number}")])
        sink.streams.append("predictions", [_prediction(f"p{number:02}")])
        sink.drain_once()
    before = sink.event_log.table(SALES, USER).current()
    folders = ("events", "sales", "user"), ("predictions", "churn")
    assert [on_disk(*folder) > 34 for folder in folders] == [True, True]
    sink.run_forever(0.01, stop)
    assert [on_disk(*folder) > 34 for folder in folders] == [True, True]  # a day hasn't passed
    assert len(_ids(sink)) == 34
    sink.vacuum_after_us, sink._vacuumed_s = 0, -1e9
    stop.clear()
    sink.run_forever(0.01, stop)
    assert on_disk(*folders[0]) == sink.event_log.statistics(SALES, USER).files < 10
    assert on_disk(*folders[1]) < 10
    assert len(_ids(sink)) == 34
    assert _predicted(sink) == [f"p{number:02}" for number in range(34)]
    assert before.version() == sink.event_log.version(SALES, USER), "to delete what no table has is no commit"


def test_table_that_is_away_for_a_moment_doesnt_end_the_sink(
    intake: Intake, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    intake.submit("sales", [event("e0")])
    sink.streams.append("predictions", [_prediction("p0")])
    sink.drain_once()
    intake.submit("sales", [event("e1")])
    sink.streams.append("predictions", [_prediction("p1")])
    stop, rounds = threading.Event(), list[float]()

    def pause(seconds: float = 0.0) -> bool:
        rounds.append(seconds)
        monkeypatch.undo()
        if len(rounds) == 2:
            stop.set()
        return stop.is_set()

    def away(*_: Any) -> Any:
        raise DeltaError("the log is away")

    stop.wait = pause  # type: ignore[method-assign,assignment]
    monkeypatch.setattr(DeltaTable, "transaction_version", away)
    sink.run_forever(0.25, stop)
    assert rounds == [0.5, 0.25]  # waited for, then as ever
    assert (_ids(sink), _predicted(sink)) == (["e0", "e1"], ["p0", "p1"])


def test_old_files_that_cant_be_looked_for_dont_end_the_sink(
    intake: Intake, sink: Sink, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    intake.submit("sales", [event("e0")])
    sink.streams.append("predictions", [_prediction("p0")])
    stop = threading.Event()
    stop.wait = lambda *_: stop.set()  # type: ignore[method-assign,assignment] # one round

    def too_many(_: Path) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", too_many)
        sink.run_forever(0.01, stop)
    assert "old files weren't looked for" in caplog.text
    assert (_ids(sink), _predicted(sink)) == (["e0"], ["p0"])


# ── Predictions and actuals ──────────────────────────────────────────────────────────


def _prediction(name: str, *, model: str = "churn", at_us: int = NOW_US) -> bytes:
    entry = {
        "prediction_id": name,
        "entity": "7",
        "variant": "control",
        "version": 3,
        "score": 0.25,
        "features": [1.0, None],
        "missing": ["recent__n_30d"],
        "source": "model",
    }
    return orjson.dumps({"request_id": "r", "model": model, "revision": 1, "at_us": at_us, "entries": [entry]})


def _predicted(sink: Sink, model: str = "churn") -> list[str]:
    rows = sink.offline_store.read_predictions(model, start_us=0, end_us=NOW_US + 1)
    return sorted(rows.column("prediction_id").to_pylist())


def test_predictions_of_several_models_reach_their_tables_once(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    sink.streams.append("predictions", [_prediction("a"), _prediction("b", model="spend"), _prediction("c")])
    append, seen = OfflineStore.append_stream, list[str]()

    def die_at_second(self: OfflineStore, kind: Any, model: str, *rest: Any) -> int:
        seen.append(model)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return append(self, kind, model, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(OfflineStore, "append_stream", die_at_second)
        with pytest.raises(KeyboardInterrupt):
            sink.drain_once()
    sink.streams.append("predictions", [_prediction("d", model="spend")])
    assert sink.drain_once().predictions == 2
    assert (_predicted(sink), _predicted(sink, "spend")) == (["a", "c"], ["b", "d"])


def test_prediction_that_was_appended_twice_is_one(sink: Sink) -> None:
    sink.streams.append("predictions", [_prediction("a"), _prediction("a"), _prediction("b")])
    assert sink.drain_once().predictions == 2
    assert _predicted(sink) == ["a", "b"]


def test_prediction_that_is_appended_again_after_its_first_entry_was_drained_is_still_one(sink: Sink) -> None:
    sink.streams.append("predictions", [_prediction("a"), _prediction("b")])
    assert sink.drain_once().predictions == 2
    sink.streams.append("predictions", [_prediction("b"), _prediction("c")])
    assert sink.drain_once().predictions == 1
    sink.streams.append("predictions", [_prediction("a")])
    moved = sink.drain_once()
    assert (moved.predictions, moved.trimmed) == (0, 1)
    assert _predicted(sink) == ["a", "b", "c"]


def test_unreadable_prediction_is_put_aside(sink: Sink) -> None:
    sink.streams.append("predictions", [b"{}", _prediction("a"), _prediction("b", model="../../etc")])
    moved = sink.drain_once()
    assert (moved.predictions, moved.unreadable, moved.trimmed) == (1, 2, 3)
    assert sink.offline_store.read_dead_letters("predictions").num_rows == 2


def test_of_an_unreadable_prediction_every_bit_is_kept(sink: Sink) -> None:
    numbers = np.array([[0.1, np.nan, np.inf]])
    entry = prediction_entry({"model": "churn", "at_us": 1}, numbers)
    sink.streams.append("predictions", [entry])
    assert sink.drain_once().unreadable == 1
    (letter,) = sink.offline_store.read_dead_letters("predictions").to_pylist()
    line, _, content = letter["event"].partition("\n")
    assert (line.encode(), base64.b64decode(content)) == (entry.partition(b"\n")[0], numbers.tobytes())


def test_predictions_and_actuals_of_asyncio_are_drained(settings: Settings, sink: Sink) -> None:
    async def append() -> None:
        streams = AsyncStreams(OnlineConfig.of(settings))
        await streams.append_predictions([_prediction("a")])
        await streams.append("actuals", [actual_record(model="churn", value=1.0, at_us=5, prediction_id="a")])
        await streams.aclose()

    asyncio.run(append())
    assert sink.drain_once() == Drained(predictions=1, actuals=1, trimmed=2)
    assert sink.offline_store.read_actuals("churn", start_us=0, end_us=9).column("value").to_pylist() == [1.0]


def test_a_connection_that_the_server_closed_meanwhile_costs_no_prediction(settings: Settings, sink: Sink) -> None:
    config = OnlineConfig.of(settings)

    async def append() -> None:
        streams = AsyncStreams(config)
        await streams.append_predictions([_prediction("a")])
        with config.connect() as other:
            assert other.client_kill_filter(_type="normal", skipme=True) >= 1
        await streams.append_predictions([_prediction("b")])
        await streams.aclose()

    asyncio.run(append())
    assert sink.drain_once() == Drained(predictions=2, actuals=0, trimmed=2)


def test_a_server_that_refuses_an_entry_says_so(settings: Settings) -> None:
    config = OnlineConfig.of(settings)

    async def append() -> None:
        streams = AsyncStreams(config)
        with config.connect() as other:
            other.set(record_key(config, "predictions"), "no stream")
        try:
            with pytest.raises(OnlineStoreUnavailableError, match="WRONGTYPE"):
                await streams.append_predictions([_prediction("a")])
        finally:
            with config.connect() as other:
                other.delete(record_key(config, "predictions"))
            await streams.aclose()

    asyncio.run(append())


def test_a_replica_tells_what_waits_for_the_sink_and_since_when(settings: Settings, sink: Sink) -> None:
    def look() -> dict[str, tuple[float, float]]:
        async def once() -> None:
            streams = AsyncStreams(OnlineConfig.of(settings))
            await Backlog(streams, names, board).refresh()
            await streams.aclose()

        board = Board()
        asyncio.run(once())
        entries, age = "heliostat_stream_entries", "heliostat_stream_age_seconds"
        return {name: (board.value(entries, name), board.value(age, name)) for name in names}

    events = sink.streams.event_streams("sales")
    names = {"predictions": [sink.streams.record_stream("predictions")], "events sales": events}
    assert look() == {"predictions": (0, 0.0), "events sales": (0, 0.0)}
    sink.streams.append("predictions", [_prediction("a"), _prediction("b")])
    for number, stream in enumerate(events[:3]):
        sink.streams.client.xadd(stream, {b"e": b"x"}, id=f"{1_000 * (number + 1)}-0")
    found = look()
    sink.streams.client.delete(*events[:3])
    assert found["predictions"] == (2, pytest.approx(0, abs=60))
    assert found["events sales"] == (3, pytest.approx(time.time() - 1.0, abs=60))
    sink.drain_once()
    assert look() == {"predictions": (0, 0.0), "events sales": (0, 0.0)}


def test_looking_at_the_streams_ends_when_it_is_told_to_whatever_it_is_at(settings: Settings) -> None:
    async def scenario(pause_s: float) -> None:
        streams = AsyncStreams(OnlineConfig.of(settings))
        backlog = Backlog(streams, {"predictions": [record_key(streams.config, "predictions")]}, Board())
        backlog.start()
        await asyncio.sleep(pause_s)
        async with asyncio.timeout(5):
            await backlog.close()
        await streams.aclose()

    for number in range(40):
        asyncio.run(scenario(number * 0.0002))


def test_waiting_entries_can_be_counted_and_their_age_told(sink: Sink) -> None:
    stream = sink.streams.record_stream("predictions")
    assert (sink.streams.lengths([stream]), sink.streams.oldest([stream])) == ({stream: 0}, None)
    (first, _) = sink.streams.append("predictions", [_prediction("a"), _prediction("b")])
    assert (sink.streams.lengths([stream]), sink.streams.oldest([stream])) == ({stream: 2}, first[0])


def test_events_and_predictions_survive_a_crash_of_the_server(home: Path, clock: ManualClock) -> None:
    with EmbeddedServer.ensure(home) as server:
        settings = Settings(project="crash", home=home, online=OnlineSettings(url=server.url))
        with OnlineStore.open(settings) as online:
            intake = Intake(online, [SALES], [VIEW], clock=clock, settings=settings.ingestion, n_buckets=16)
            intake.submit("sales", [event("a"), event("b")])
        pid = json.loads((home / "valkey" / "server.json").read_text())["pid"]
        os.kill(pid, signal.SIGKILL)
        while EmbeddedServer.running(home) is not None:
            pass
        with EmbeddedServer.ensure(home), OnlineStore.open(settings) as online:
            intake = Intake(online, [SALES], [VIEW], clock=clock, settings=settings.ingestion, n_buckets=16)
            assert _statuses(intake.submit("sales", [event("b"), event("c")])) == ["duplicate", "accepted"]
            streams = Streams.open(settings)
            log = EventLog(settings.data_root, {}, 16)
            sink = Sink(streams, log, OfflineStore(settings.data_root), [SALES], clock)
            sink.drain_once()
            streams.close()
            assert _ids(sink) == ["a", "b", "c"]


# ── Jobs ─────────────────────────────────────────────────────────────────────────────


def _job(name: str, settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"jobs/{name}.py", *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **settings.environment()},
    )


def _purchases(path: Path, *rows: tuple[int | None, int]) -> Path:
    table = pa.table(
        {
            "event_id": pa.array(range(len(rows)), pa.int64()),
            "customer_id": pa.array([row[0] for row in rows], pa.int64()),
            "purchased_at": pa.array([row[1] for row in rows], TIMESTAMP),
            "quantity": pa.array([1] * len(rows), pa.int64()),
            "amount": pa.array([9.99] * len(rows), pa.float64()),
        }
    )
    pq.write_table(table, path)
    return path


@pytest.fixture
def ingest(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """The job as a command, in this process: exit code, standard output, standard error."""
    logger = logging.getLogger("heliostat")
    before = logger.handlers, logger.level, logger.propagate
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ingest_events.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_job(ingest_events.main)
        said = capsys.readouterr()
        return int(str(ended.value.code)), said.out, said.err

    yield run
    logger.handlers, logger.level, logger.propagate = before


def test_ingest_job_takes_files_once_and_says_so_as_json(
    settings: Settings, home: Path, ingest: Callable[..., tuple[int, str, str]]
) -> None:
    file = _purchases(home / "in.parquet", (1, 5), (2, 6), (None, 7))
    first = _job("ingest_events", settings, "--source", "purchases", "--json", str(file))
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert (report["accepted"], report["rejected"]) == (2, 1)
    code, output, _ = ingest("--source", "purchases", str(file))
    assert (code, output[:40]) == (0, "purchases: 0 new events, 2 known already")


@pytest.mark.parametrize(
    ("source", "file", "code", "said"),
    [
        ("purchases", "none.csv", 3, "none.csv' doesn't exist; check the path"),
        ("nope", "nothing.parquet", 4, "there is no event source 'nope'; declared are: purchases"),
        ("purchases", "wrong.csv", 3, "column 'customer_id' is missing (there are: a, b)"),
        ("purchases", "nothing.parquet", 3, ""),
        ("purchases", "data.txt", 3, "a file name that ends with .parquet"),
        (None, "nothing.parquet", 2, "--source"),
    ],
)
def test_ingest_job_ends_with_the_documented_code_and_names_the_fix(
    home: Path, ingest: Callable[..., tuple[int, str, str]], source: str | None, file: str, code: int, said: str
) -> None:
    _purchases(home / "nothing.parquet", (None, 5))
    (home / "wrong.csv").write_text("a,b\n1,2\n")
    (home / "data.txt").write_text("a b")
    ended, _, error = ingest(*(() if source is None else ("--source", source)), str(home / file))
    assert (ended, said in error) == (code, True), error


def test_sink_job_drains_once_or_until_it_is_asked_to_end(settings: Settings) -> None:
    streams = Streams.open(settings)
    streams.append("predictions", [_prediction("a")])
    once = _job("sink_streams", settings, "--once", "--json")
    assert json.loads(once.stdout)["predictions"] == 1, once.stderr
    running = subprocess.Popen(
        [sys.executable, "jobs/sink_streams.py", "--interval", "0.05", "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings.environment()},
    )
    streams.append("predictions", [_prediction("b")])
    stream = streams.record_stream("predictions")
    waited = threading.Event()
    for _ in range(400):
        if streams.lengths([stream])[stream] == 0 or waited.wait(0.05):
            break
    running.terminate()
    output, _ = running.communicate(timeout=30)
    assert running.returncode == 0
    assert json.loads(output)["predictions"] == 1
    streams.close()
