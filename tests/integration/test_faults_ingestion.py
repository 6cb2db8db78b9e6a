"""What ingestion promises when something dies: each accepted event is in the log once, and rings equal the kernel."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from heliostat.clock import US_PER_DAY, US_PER_HOUR, ManualClock, parse_instant_us
from heliostat.errors import OnlineStoreUnavailableError, StorageError
from heliostat.features.aggregations import Count, Last, Max, Sum
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.features.offline import compute_features
from heliostat.ingestion.intake import Intake
from heliostat.ingestion.mending import RingMender
from heliostat.ingestion.sink import Sink
from heliostat.online.materialize import materialize
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.schema import TIMESTAMP
from heliostat.settings import OnlineSettings, Settings
from heliostat.storage.embedded import EmbeddedServer
from heliostat.storage.event_log import EventLog
from heliostat.storage.offline_store import OfflineStore
from heliostat.storage.online_store import OnlineConfig, OnlineStore
from heliostat.storage.streams import Streams
from tests.sinks import kill, start_sink

NOW_US = parse_instant_us("2020-06-01T12:00:00")
ROOT = Path(__file__).parents[2]

USER = Entity("user", keys={"user_id": "int64"})
SHOP = Entity("shop", keys={"shop": "string"})
COLUMNS = {"event_id": pa.string(), "user_id": pa.int64(), "shop": pa.string(), "at": TIMESTAMP, "sum": pa.float64()}
SALES = EventSource("sales", schema=pa.schema(COLUMNS), entity=[USER, SHOP], event_time="at", event_id="event_id")
SPENDING = FeatureView(
    "spending",
    version=1,
    source=SALES,
    entity=USER,
    features={
        "n": Count(),
        "total": Sum("sum"),
        "last": Last("sum", window="30d"),
        "n_6h": Count(window="6h"),
        "largest_30d": Max("sum", window="30d"),
    },
)
TRAFFIC = FeatureView("traffic", version=1, source=SALES, entity=SHOP, features={"n_7d": Count(window="7d")})
VIEWS = (SPENDING, TRAFFIC)
USERS = 30


def sales(first: int, count: int) -> list[dict[str, Any]]:
    """Events of the last 20 days; whole sums, so that no order of adding them up shows."""
    rng = random.Random(first)
    return [
        {
            "event_id": f"e{number}",
            "user_id": rng.randrange(USERS),
            "shop": f"s{rng.randrange(5)}",
            "at": NOW_US - 1 - int(rng.choice([1, 20]) * US_PER_DAY * rng.random()),
            "sum": float(rng.randrange(100)),
        }
        for number in range(first, first + count)
    ]


class Shop:
    """A project: what was accepted, and whether the stores say the same.

    Args:
        settings: Name the stores.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.streams = Streams.open(settings)
        self.online = OnlineStore.open(settings)
        self.log = EventLog(settings.data_root, {}, settings.storage.buckets)
        self.clock = ManualClock(NOW_US)
        self.taken: set[str] = set()
        self.intake = Intake(
            self.online,
            [SALES],
            VIEWS,
            clock=self.clock,
            settings=settings.ingestion,
            n_buckets=settings.storage.buckets,
        )

    def close(self) -> None:
        self.streams.close()
        self.online.close()

    @property
    def sink(self) -> Sink:
        limits, online = RingLimits.of(self.settings.ingestion), OnlineConfig.of(self.settings)
        return Sink(
            self.streams,
            self.log,
            OfflineStore(self.settings.data_root),
            [SALES],
            self.clock,
            mender=RingMender(self.streams, self.log, online, VIEWS, limits, self.clock),
        )

    def submit(self, events: Sequence[dict[str, Any]]) -> list[str]:
        """Send events; remember those whose acceptance somebody has been told of."""
        statuses = [each.status for each in self.intake.submit("sales", events)]
        assert "rejected" not in statuses
        self.taken.update(event["event_id"] for event in events)
        return statuses

    @property
    def waiting(self) -> int:
        return sum(self.streams.lengths(self.streams.event_streams("sales")).values())

    def check(self) -> None:
        """Drain, and compare everything with what was accepted."""
        self.sink.drain_once()
        assert self.waiting == 0
        self.check_log()
        self.check_rings()

    def check_log(self) -> None:
        """Each accepted event is in it once, for each entity."""
        for entity in SALES.entities:
            ids = self.log.read(SALES, entity).column("event_id").to_pylist()
            assert len(ids) == len(set(ids))
            assert set(ids) == self.taken

    def check_rings(self) -> None:
        """What is read of them is what the kernel makes of the log."""
        limits = RingLimits.of(self.settings.ingestion)
        entities = {USER: [str(each) for each in range(USERS)], SHOP: [f"s{each}" for each in range(6)]}
        for view in VIEWS:
            texts = entities[view.entity]
            buckets = self.settings.storage.buckets
            reader = FeatureReader(list(view), keys=self.online.keys, n_buckets=buckets, limits=limits)
            as_of_us = NOW_US + US_PER_HOUR
            served = reader.read(self.online, texts, as_of_us=as_of_us)[0].matrix
            found = compute_features(
                [view],
                self.log.read(SALES, view.entity),
                view.entity.encoded(texts),
                np.full(len(texts), as_of_us),
                deduplicate=False,
            )
            np.testing.assert_array_equal(served, np.column_stack(list(found.values())))


@pytest.fixture
def shop(settings: Settings) -> Iterator[Shop]:
    found = Shop(settings)
    yield found
    found.close()


# ── Sinks that are killed ────────────────────────────────────────────────────────────


def drain_for_ever(document: str) -> None:
    """A sink, in a process of its own."""
    shop = Shop(Settings.model_validate_json(document))
    shop.sink.run_forever(0.001, threading.Event())


@pytest.mark.slow
def test_a_sink_that_is_killed_at_twenty_random_instants_loses_nothing_and_applies_nothing_twice(shop: Shop) -> None:
    instants = random.Random(20)
    first = 0
    for _ in range(20):
        process = start_sink(drain_for_ever, shop.settings)
        end_s = time.monotonic() + instants.uniform(0.02, 0.8)
        while time.monotonic() < end_s:
            shop.submit(sales(first, 25))
            first += 25
        kill(process)
    assert shop.log.statistics(SALES, USER).rows > 0, "the sinks were killed before they did anything"
    shop.check()


def test_a_second_sink_says_so_waits_and_takes_over_when_the_first_is_killed(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    shop.submit(sales(0, 50))
    first = start_sink(drain_for_ever, shop.settings)
    _until(lambda: shop.waiting == 0)
    stop = threading.Event()
    with caplog.at_level(logging.INFO, "heliostat.ingestion.sink"):
        second = threading.Thread(target=shop.sink.run_forever, args=(0.01, stop))
        second.start()
        _until(lambda: "another sink runs" in caplog.text)
        assert f"process {first.pid} on" in caplog.text
        kill(first)
        shop.submit(sales(50, 50))
        _until(lambda: shop.waiting == 0)
        stop.set()
        second.join()
    assert "drained 50 events" in caplog.text
    shop.check()


def test_two_sinks_that_both_drain_are_only_slower(shop: Shop) -> None:
    """Whoever takes the other for dead is wrong at worst: the tables' commits tell who was first."""
    failures: list[BaseException] = []

    def drain() -> None:
        own = Shop(shop.settings)
        try:
            for _ in range(4):
                try:
                    own.sink.drain_once()
                except StorageError as error:  # pragma: no cover - would be a failure
                    failures.append(error)
                except Exception as error:  # noqa: BLE001 - shown by the test's own thread
                    if "another sink was quicker" not in str(error):
                        failures.append(error)
        finally:
            own.close()

    threads = [threading.Thread(target=drain) for _ in range(2)]
    for thread in threads:
        thread.start()
    for batch in range(4):
        shop.submit(sales(batch * 40, 40))
    for thread in threads:
        thread.join()
    assert failures == []
    shop.check()


def _until(condition: Any, timeout_s: float = 60.0) -> None:
    end_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end_s, "it didn't come about"
        pause.wait(0.01)


# ── Repetitions ──────────────────────────────────────────────────────────────────────


def test_a_batch_that_is_sent_twice_counts_once_before_and_after_the_sink_has_moved_it(shop: Shop) -> None:
    batch = sales(0, 200)
    shop.submit(batch)
    assert set(shop.submit(batch)) == {"duplicate"}
    shop.check()
    assert set(shop.submit(batch)) == {"duplicate"}
    shop.check()


def test_an_event_of_long_ago_that_is_sent_again_counts_once_when_the_sink_has_seen_it(shop: Shop) -> None:
    """Whether it came from a file or live: no server remembers ids for ever."""
    old = {"event_id": "old", "user_id": 3, "shop": "s1", "at": NOW_US - 10 * US_PER_DAY, "sum": 5.0}
    recent = {**old, "event_id": "recent", "at": NOW_US - US_PER_HOUR}
    shop.log.append(SALES, pa.Table.from_pylist([old, recent], schema=SALES.schema), ingested_us=NOW_US)
    shop.taken |= {"old", "recent"}
    shop.submit(sales(0, 50))
    shop.sink.drain_once()
    _materialize(shop)
    shop.check_rings()
    assert shop.submit([recent]) == ["duplicate"]
    assert shop.submit([old]) == ["late"]  # for the ring of hours; what lasts counts it, the log knows better
    with pytest.raises(AssertionError):
        shop.check_rings()
    shop.check()
    assert shop.streams.noted() == []


def test_a_sink_that_is_killed_before_it_has_mended_a_ring_leaves_a_note(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.submit(sales(0, 50))
    shop.check()
    shop.online.client.delete(*shop.online.client.keys(f"{shop.online.keys.root}:d:*"))  # their ids are forgotten
    assert "duplicate" not in shop.submit(sales(0, 50))

    def die(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RingMender, "mend", die)
        with pytest.raises(KeyboardInterrupt):
            shop.sink.drain_once()
    assert shop.waiting == 0
    assert len(shop.streams.noted()) > 20
    shop.check()


def _materialize(shop: Shop) -> None:
    materialize(
        VIEWS,
        event_log=shop.log,
        online=OnlineConfig.of(shop.settings),
        as_of_us=NOW_US,
        limits=RingLimits.of(shop.settings.ingestion),
        on_ray=False,
    )


# ── The server ───────────────────────────────────────────────────────────────────────


class Server:
    """An embedded server of one's own, that can be killed."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.held = EmbeddedServer.ensure(home)

    def kill(self) -> None:
        """As the kernel's out-of-memory killer would."""
        os.kill(json.loads((self.home / "valkey" / "server.json").read_text())["pid"], signal.SIGKILL)

    def restart(self) -> None:
        _until(lambda: EmbeddedServer.running(self.home) is None)
        before, self.held = self.held, EmbeddedServer.ensure(self.home)
        assert before.url == self.held.url
        before.close()


@contextmanager
def _own_server(home: Path) -> Iterator[tuple[Server, Shop]]:
    server = Server(home)
    shop = Shop(Settings(project="crash", home=home, online=OnlineSettings(url=server.held.url)))
    try:
        yield server, shop
    finally:
        shop.close()
        server.held.close()


def test_a_server_that_is_killed_between_requests_has_kept_every_accepted_event(home: Path) -> None:
    with _own_server(home) as (server, shop):
        for turn in range(3):
            batch = sales(turn * 100, 100)
            shop.submit(batch)
            server.kill()
            server.restart()
            assert set(shop.submit(batch)) == {"duplicate"}
        shop.check()


@pytest.mark.slow
def test_a_server_that_is_killed_in_the_middle_of_batches_is_whole_once_they_are_repeated(home: Path) -> None:
    instants = random.Random(6)
    first, kills, broken = 0, 0, 0
    with _own_server(home) as (server, shop):
        # Most of a batch's time is spent before it is sent: whether a kill falls inside is a matter of luck.
        while kills < 6 or not broken:
            kills += 1
            assert kills <= 60, "no batch was interrupted half way"
            timer = threading.Timer(instants.uniform(0.01, 0.5), server.kill)
            timer.start()
            while True:
                batch = sales(first, 1000)
                first += 1000
                try:
                    shop.submit(batch)
                except OnlineStoreUnavailableError:
                    break
            timer.join()
            server.restart()
            statuses = shop.submit(batch)  # what a client does
            broken += 0 < statuses.count("duplicate") < len(batch)
            shop.sink.drain_once()
        shop.check()


def test_rings_of_a_server_whose_data_are_lost_are_rebuilt_from_the_log_and_sent_events_stay_known(
    home: Path,
) -> None:
    with _own_server(home) as (server, shop):
        shop.submit(sales(0, 500))
        shop.check()
        server.kill()
        _until(lambda: EmbeddedServer.running(home) is None)
        shutil.rmtree(home / "valkey" / "appendonlydir")
        server.restart()
        assert shop.online.client.dbsize() == 0
        _materialize(shop)
        shop.check_rings()
        recent = [each for each in sales(0, 500) if each["at"] > NOW_US - US_PER_DAY]
        assert set(shop.submit(recent)) == {"duplicate"}
        shop.submit(sales(500, 100))
        shop.check()


# ── A full disk ──────────────────────────────────────────────────────────────────────

TINY_DISK = """
import subprocess, sys
sys.path[:0] = sys.argv[1:3]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", sys.argv[3]], check=True)
from tests.integration.test_faults_ingestion import survive_a_full_disk
survive_a_full_disk(sys.argv[3], sys.argv[4])
"""


def survive_a_full_disk(folder: str, what: str) -> None:
    """Fill the disk below a folder, look what is refused, make room, and look what is there."""
    full = Path(folder)
    elsewhere = full.parent / "roomy"
    homes = {"tables": elsewhere, "server": full}
    server = Server(homes[what])
    root = str(full if what == "tables" else elsewhere)
    online = OnlineSettings(url=server.held.url)
    shop = Shop(Settings(project="full", home=elsewhere, online=online, storage={"root": root}))  # type: ignore[arg-type]
    first, refused = 0, None
    while refused is None and first < 200_000:
        batch = sales(first, 1000)
        first += 1000
        try:
            shop.submit(batch)
            if what == "tables":
                shop.sink.drain_once()
        except StorageError as error:
            refused = error
    assert refused is not None, "the disk never filled up"
    held = shop.waiting
    if what == "tables":
        assert held > 0, "what couldn't be written was trimmed"
    subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
    _until(lambda: _repeated(shop, batch))
    shop.check()
    shop.close()
    server.held.close()


def _repeated(shop: Shop, batch: Sequence[dict[str, Any]]) -> bool:
    try:
        shop.submit(batch)
    except OnlineStoreUnavailableError:  # the server looks once a second whether there is room again
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tables", "server"])
def test_a_full_disk_refuses_and_loses_nothing(home: Path, what: str) -> None:
    folder = home / "tiny"
    folder.mkdir()
    own_namespace = [str(shutil.which("unshare")), "-Urm"]
    if subprocess.run([*own_namespace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    done = subprocess.run(
        [*own_namespace, sys.executable, "-c", TINY_DISK, str(ROOT), str(ROOT / "platform"), str(folder), what],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
