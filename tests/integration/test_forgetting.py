"""Erasure requests: afterwards a search of every byte finds nothing, and everybody else is as before."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliostat import forgetting
from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import EntityBusyError, InvalidValueError
from heliostat.features.definitions import FeatureView
from heliostat.features.offline import compute_features
from heliostat.forgetting import FORGET_KIND, forget, key_digest
from heliostat.ingestion.intake import Intake
from heliostat.ingestion.sink import Sink
from heliostat.online.bucket_rings import BucketState, BucketTask
from heliostat.online.materialize import materialize
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.schema import INGESTED, TIMESTAMP
from heliostat.settings import ClockSettings, Settings
from heliostat.storage.erasure import ServerEraser
from heliostat.storage.offline_store import DEAD_LETTERS
from heliostat.storage.stream_entries import actual_record
from heliostat.workspace import Workspace
from tests.integration.erasure_declarations import SALES, SHOP, USER, device_sales, shop_sales, user_sales

ROOT = Path(__file__).parents[2]
NOW_US = parse_instant_us("2026-03-01")
MARK = "zq7|marked-customer"
QUOTED = "zq7%7Cmarked-customer"
_ids = itertools.count()


def event(user: str, shop: str, days: float, amount: float = 10.0, **rest: Any) -> dict[str, Any]:
    at_us = NOW_US - int(days * US_PER_DAY)
    name = f"{user}-{next(_ids)}"
    return {
        "event_id": name, "user": user, "shop": shop, "device": "phone", "at": at_us, "amount": amount, **rest
    }  # fmt: skip


def prediction(user: str, name: str) -> bytes:
    entry = {
        "prediction_id": name, "entity": user, "variant": "control", "version": 1, "score": 0.5,
        "features": [1.0, 2.0], "missing": [], "source": "model", "fallback": None, "given": [],
    }  # fmt: skip
    return orjson.dumps(
        {"request_id": name, "model": "churn", "revision": 1, "at_us": NOW_US - 5, "entries": [entry]}
    )


@pytest.fixture
def workspace(home: Path) -> Iterator[Workspace]:
    """Its own embedded server, so that the server's files are searched as well; what it writes is plain."""
    settings = Settings(
        home=home,
        definitions="tests.integration.erasure_declarations",
        clock=ClockSettings(kind="replay", replay_from="2026-03-01", speed=0),
    )
    with Workspace.open(settings) as opened:
        opened.online.client.config_set("rdbcompression", "no")
        yield opened


def intake_of(workspace: Workspace) -> Intake:
    views = list(workspace.definitions.views.values())
    settings = workspace.settings
    return Intake(
        workspace.online,
        [SALES],
        views,
        clock=workspace.clock,
        settings=settings.ingestion,
        n_buckets=settings.storage.buckets,
    )


def fill(workspace: Workspace) -> None:
    """Traces of the marked customer and of others in every place that there is."""
    old = [event(user, shop, days) for user in (MARK, "b", "c") for shop in ("north", "south") for days in (3, 40)]
    old.append(event(MARK, "lonely", 4))
    table = pa.Table.from_pylist(old, SALES.schema)
    workspace.event_log.append(SALES, table.slice(0, 7), ingested_us=NOW_US - US_PER_DAY)
    workspace.event_log.append(SALES, table.slice(7), ingested_us=NOW_US - US_PER_DAY)
    intake, streams, offline = intake_of(workspace), workspace.streams, workspace.offline_store
    intake.submit("sales", [event(user, "north", 0.5) for user in (MARK, "b", "c")])
    streams.append("predictions", [prediction(MARK, "p1"), prediction("b", "p2")])
    Sink.of(workspace).drain_once()
    for entity in SALES.entities:  # leaves old files behind, which hold the customer as well
        workspace.event_log.compact(SALES, entity, min_files=2)
    # These wait in their streams, next to others' entries.
    intake.submit("sales", [event(user, "south", 0.1) for user in ("b", MARK, "c")])
    streams.append("predictions", [prediction("c", "p3"), prediction(MARK, "p4")])
    streams.append(
        "actuals",
        [
            actual_record(model="churn", value=1.0, at_us=NOW_US - 1, prediction_id="p1"),
            actual_record(model="churn", value=1.0, at_us=NOW_US - 1, prediction_id="p2"),
            actual_record(model="churn", value=0.0, at_us=NOW_US - 1, entity=MARK, as_of_us=NOW_US - 9),
        ],
    )
    letters = [
        {"file": "x.csv", "row": row, "reason": "r", "event": each, "rejected_at": NOW_US - 1}
        for row, each in enumerate(
            [
                orjson.dumps({"user": MARK, "at": None}).decode(),
                orjson.dumps({"user": "b", "at": None}).decode(),
                f"not even JSON, {MARK}, 3",
            ]
        )
    ]
    offline.append_dead_letters("sales", pa.Table.from_pylist(letters, DEAD_LETTERS))
    at = pa.array([NOW_US] * 2, pa.int64()).cast(TIMESTAMP)
    snapshot = pa.table({"user": [MARK, "b"], "as_of": at, "user_sales__n_30d": [1.0, 2.0]})
    offline.write_day("user_sales@1", NOW_US - US_PER_DAY, snapshot)
    offline.write_batch("churn", NOW_US, pa.table({"user": ["b", MARK], "as_of": at, "score": [0.5, 0.9]}))
    keys = workspace.online.keys
    workspace.online.put_many({keys.batch("churn", user): b"{}" for user in (MARK, "b")})
    # What the sink has noted about somebody whose view has gone meanwhile.
    streams.note([orjson.dumps(["sales", "old_entity", MARK])])
    # A ring of a view that nobody declares any more, and what materialization has left for the next time.
    bucket = int(USER.buckets(USER.encoded([MARK]), workspace.configured.storage.buckets)[0])
    state = BucketState("layout", 3, NOW_US, NOW_US, left=("b", MARK))
    workspace.online.put_many(
        {
            keys.bundle("old_source", "user", MARK, bucket): b"bytes",
            keys.bucket_state("old_view@3", bucket): state.to_bytes(),
            keys.bucket_state("other@1", bucket): BucketState("layout", 3, NOW_US, NOW_US).to_bytes(),
        }
    )


def found_in(workspace: Workspace) -> list[str]:
    """The files below the home, and the keys of the server, with the customer's name in them, however written."""
    marks = [MARK.encode(), QUOTED.encode()]
    places = []
    for path in sorted(each for each in workspace.configured.home.rglob("*") if each.is_file()):
        told = path.read_bytes()
        if path.suffix == ".parquet":
            told += orjson.dumps(pq.ParquetFile(path).read().to_pylist(), default=str)
        if any(mark in told for mark in marks):
            places.append(str(path.relative_to(workspace.configured.home)))
    client = workspace.online.client
    held = {key.decode(): key + (client.dump(key) or b"") for key in client.scan_iter(count=1000)}
    places.extend(key for key, told in held.items() if any(mark in told for mark in marks))
    return places


def rows_of_others(workspace: Workspace) -> dict[str, list[Any]]:
    """Everything that the tables hold about others, as the tables hold it."""
    log, offline = workspace.event_log, workspace.offline_store
    tables = {
        **{each.name: log.read(SALES, each).drop_columns([INGESTED]) for each in SALES.entities},
        "predictions": offline.read_predictions("churn", start_us=0, end_us=NOW_US + 1),
        "actuals": offline.read_actuals("churn", start_us=0, end_us=NOW_US + 1),
        "snapshot": offline.read("user_sales@1", start_us=0, end_us=NOW_US),
        "batch": offline.read_batch("churn"),
        "letters": offline.read_dead_letters("sales"),
    }
    kept = {
        name: sorted(str(row) for row in table.to_pylist() if MARK not in str(row)) for name, table in tables.items()
    }
    kept["actuals"] = [row for row in kept["actuals"] if "'p1'" not in row]
    return kept


def online(workspace: Workspace, view: FeatureView, texts: list[str]) -> np.ndarray:
    settings = workspace.settings
    reader = FeatureReader(
        list(view),
        keys=workspace.online.keys,
        n_buckets=settings.storage.buckets,
        limits=RingLimits.of(settings.ingestion),
    )
    batch, _ = reader.read(workspace.online, texts, as_of_us=NOW_US)
    return np.asarray(batch.matrix)


def offline(workspace: Workspace, view: FeatureView, texts: list[str]) -> np.ndarray:
    events = workspace.event_log.read(SALES, view.entity)
    instants = np.full(len(texts), NOW_US)
    columns = compute_features([view], events, view.entity.encoded(texts), instants, deduplicate=False)
    return np.column_stack([columns[ref.name] for ref in view])


def materialized(workspace: Workspace) -> None:
    """The rings of all views from the log, as the job makes them."""
    materialize(
        workspace.definitions.views.values(),
        event_log=workspace.event_log,
        online=workspace.online_config,
        as_of_us=NOW_US,
        limits=RingLimits.of(workspace.settings.ingestion),
        on_ray=False,
    )


def test_nothing_of_a_forgotten_entity_is_found_in_any_byte_and_others_are_as_before(workspace: Workspace) -> None:
    fill(workspace)
    materialized(workspace)
    Sink.of(workspace).drain_once()
    before = rows_of_others(workspace)
    places = found_in(workspace)
    assert any(each.startswith("valkey/appendonlydir") for each in places)
    for kind in ("events/sales/user", "events/sales/shop", "predictions", "actuals", "features", "batch", "dead_"):
        assert any(each.startswith(f"data/{kind}") for each in places), f"{kind} holds nothing to erase: {places}"
    report = forget(workspace, USER, MARK)
    assert report.left == ()
    assert {report.rows[f"events/sales/{each.name}"] for each in SALES.entities} == {7}, "of each entity's table"
    assert report.rows["predictions/churn"] == report.rows["dead_letters/sales"] == 2
    assert report.rows["actuals/churn"] == 2, "also the one that only names a forgotten prediction"
    assert found_in(workspace) == []
    assert rows_of_others(workspace) == before


def test_what_waits_in_streams_goes_and_others_entries_are_sunk_once(workspace: Workspace) -> None:
    fill(workspace)
    forget(workspace, USER, MARK)
    assert found_in(workspace) == []
    assert Sink.of(workspace).drain_once().events == 0
    users = workspace.event_log.read(SALES, USER).column("user").to_pylist()
    assert sorted(users) == ["b"] * 6 + ["c"] * 6


def test_rings_of_others_lose_its_share_and_nothing_else(workspace: Workspace) -> None:
    fill(workspace)
    materialized(workspace)
    Sink.of(workspace).drain_once()
    before = online(workspace, user_sales, ["b", "c"])
    report = forget(workspace, USER, MARK)
    assert report.others == {"shop": 3, "device": 1}
    shops = ["north", "south", "lonely"]
    np.testing.assert_array_equal(online(workspace, shop_sales, shops), offline(workspace, shop_sales, shops))
    assert online(workspace, shop_sales, ["lonely"])[0, 0] == 0, "nobody else ever bought there"
    np.testing.assert_array_equal(online(workspace, user_sales, ["b", "c"]), before)
    assert online(workspace, device_sales, [f"{QUOTED}|phone"])[0, 0] == 0


def test_forgetting_again_changes_nothing_and_the_catalog_has_a_hash_of_the_key(workspace: Workspace) -> None:
    fill(workspace)
    first = forget(workspace, USER, MARK)
    version = workspace.event_log.version(SALES, USER)
    again = forget(workspace, USER, MARK)
    assert (dict(again.rows), again.keys, again.passes, again.vacuumed) == ({}, 0, 1, 0)
    assert workspace.event_log.version(SALES, USER) == version
    with workspace.catalog.read() as rows:
        runs = rows.runs(FORGET_KIND)
    digest = key_digest("default", USER, MARK)
    assert [(run.subject, run.outcome) for run in runs] == [(f"user:{digest}", "forgotten")] * 2
    assert runs[1].report == first.to_document()
    assert digest != key_digest("default", SHOP, MARK) != key_digest("default", USER, "b")


_SLOW = [pytest.param(at, marks=pytest.mark.slow) for at in (1, 4, 6, 8, 11, 15, 18, 21, 30)]


@pytest.mark.parametrize("at", [2, 5, 13, 24, 40, *_SLOW])
def test_run_that_was_killed_is_run_again(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """It ends at its so-many-th step, wherever that is, as if it were killed."""
    fill(workspace)
    materialized(workspace)
    steps = itertools.count(1)

    def killed_at(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            if next(steps) == at:
                raise KeyboardInterrupt
            return step(*given, **named)

        return run

    with monkeypatch.context() as patched:
        for name in ("erase_rows", "vacuum"):
            patched.setattr(forgetting, name, killed_at(getattr(forgetting, name)))
        for name in ("delete", "remember", "rewrite_streams", "rewrite_files"):
            patched.setattr(ServerEraser, name, killed_at(getattr(ServerEraser, name)))
        patched.setattr(BucketTask, "remake", killed_at(BucketTask.remake))
        with pytest.raises(KeyboardInterrupt):
            forget(workspace, USER, MARK)
    forget(workspace, USER, MARK)
    assert found_in(workspace) == []
    shops = ["north", "south", "lonely"]
    np.testing.assert_array_equal(online(workspace, shop_sales, shops), offline(workspace, shop_sales, shops))
    with workspace.catalog.read() as rows:
        assert [run.outcome for run in rows.runs(FORGET_KIND)] == ["forgotten", "failed"]


def forget_apart(document: str) -> None:
    """In a process of its own."""
    with Workspace.open(Settings.model_validate_json(document)) as workspace:
        forget(workspace, USER, MARK)


@pytest.mark.slow
def test_run_that_was_killed_with_signal_9_is_run_again(workspace: Workspace) -> None:
    fill(workspace)
    materialized(workspace)
    # Forked off a process that has imported everything: what is killed is the work, and not the imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def run(seconds: float | None = None) -> int | None:
        running = context.Process(target=forget_apart, args=(workspace.settings.model_dump_json(),))
        running.start()
        running.join(seconds)
        running.kill()
        running.join()
        return running.exitcode

    assert run() == 0
    fill(workspace)
    started_s = time.monotonic()
    assert run() == 0
    lasts_s = time.monotonic() - started_s
    codes = []
    for share in np.random.default_rng(7).uniform(0.1, 1.0, 8).tolist():
        fill(workspace)
        codes.append(run(share * lasts_s))
    assert codes.count(-signal.SIGKILL) > 2
    report = forget(workspace, USER, MARK, exclusive=True)
    assert report.left == ()
    assert found_in(workspace) == []
    shops = ["north", "south", "lonely"]
    np.testing.assert_array_equal(online(workspace, shop_sales, shops), offline(workspace, shop_sales, shops))


def test_entity_whose_events_keep_coming_is_busy_until_they_stop_and_what_comes_after_is_new(
    workspace: Workspace,
) -> None:
    fill(workspace)
    intake, stop = intake_of(workspace), threading.Event()

    def keep_sending() -> None:
        while not stop.is_set():
            intake.submit("sales", [event(MARK, "north", 0.2)])

    sender = threading.Thread(target=keep_sending)
    sender.start()
    try:
        with pytest.raises(EntityBusyError, match="Stop whoever sends them"):
            forget(workspace, USER, MARK)
    finally:
        stop.set()
        sender.join()
    forget(workspace, USER, MARK)
    assert found_in(workspace) == []
    intake.submit("sales", [event(MARK, "north", 0.2, amount=3.0)])
    Sink.of(workspace).drain_once()
    np.testing.assert_array_equal(online(workspace, user_sales, [MARK]), [[1.0, 3.0]])
    np.testing.assert_array_equal(offline(workspace, user_sales, [MARK]), [[1.0, 3.0]])


def test_files_that_nobody_committed_are_told_and_go_when_nothing_else_writes(workspace: Workspace) -> None:
    fill(workspace)
    table = workspace.event_log.table(SALES, USER)
    rows = pa.Table.from_pylist([event(MARK, "north", 1)], SALES.schema)
    table.write(rows, value="0")
    report = forget(workspace, USER, MARK)
    (left,) = report.left
    assert left.startswith("1 files of events/sales/user that nobody has committed")
    assert "run this again in a day, or with --exclusive" in left
    assert report.exit_code == 5
    report = forget(workspace, USER, MARK, exclusive=True)
    assert (report.left, report.exit_code) == ((), 0)
    assert found_in(workspace) == []


def test_key_that_is_none_of_the_entitys_is_refused_before_anything_is_written(workspace: Workspace) -> None:
    with pytest.raises(InvalidValueError, match="user"):
        forget(workspace, USER, "")
    with workspace.catalog.read() as rows:
        assert rows.runs(FORGET_KIND) == ()
