"""What a backfill promises when something dies: the next run goes on, and rings equal the kernel."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import WorkerCrashedError

from heliostat.errors import OnlineStoreUnavailableError
from heliostat.models.definitions import Definitions
from heliostat.online.bucket_rings import BucketTask
from heliostat.online.materialize import Step
from heliostat.rebuild import rebuild
from heliostat.settings import OnlineSettings, Settings
from heliostat.storage.embedded import EmbeddedServer
from heliostat.workspace import Workspace
from tests.integration.test_materialization import (
    LIMITS,
    N_BUCKETS,
    SALES,
    SHOP,
    SPENDING,
    TRAFFIC,
    USER,
    USERS,
    World,
    sales,
)


class Server:
    """An embedded server of one's own, that can be killed."""

    def __init__(self, home: Path) -> None:
        self.home, self.held = home, EmbeddedServer.ensure(home)

    def kill(self) -> None:
        os.kill(json.loads((self.home / "valkey" / "server.json").read_text())["pid"], signal.SIGKILL)

    def restart(self) -> None:
        before, self.held = self.held, EmbeddedServer.ensure(self.home)
        before.close()


@pytest.fixture
def own(home: Path) -> Iterator[tuple[Server, World]]:
    server = Server(home)
    world = World(Settings(project="crash", home=home, online=OnlineSettings(url=server.held.url)))
    yield server, world
    world.close()
    server.held.close()


def _drive(settings: Settings, reached: str) -> None:
    """A driver that says when its first bucket is done, and then goes on slowly."""
    world = World(settings)

    def step(at: Step) -> None:
        if at.done == 1:
            Path(reached).touch()
            time.sleep(60)

    world.materialize(SPENDING, on_step=step, concurrency=1)


def test_a_driver_that_is_killed_in_the_middle_is_resumed_where_it_was(settings: Settings, home: Path) -> None:
    world = World(settings)
    world.bulk(sales(range(300)))
    reached = home / "reached"
    driver = multiprocessing.get_context("spawn").Process(target=_drive, args=(settings, str(reached)))
    driver.start()
    limit = time.monotonic() + 60
    while not reached.exists():
        assert time.monotonic() < limit
        assert driver.is_alive()
        time.sleep(0.02)
    assert driver.pid is not None
    os.kill(driver.pid, signal.SIGKILL)
    driver.join()
    (rest,) = world.materialize(SPENDING)
    assert rest.buckets == N_BUCKETS - 1
    assert 0 < rest.entities < USERS
    world.check(SPENDING)
    world.close()


def test_a_server_that_is_killed_in_the_middle_is_an_error_and_the_next_run_is_right(
    own: tuple[Server, World],
) -> None:
    server, world = own
    world.bulk(sales(range(300)))
    world.live(sales(range(300, 330)))

    def step(at: Step) -> None:
        if at.done == 1:
            server.kill()

    with pytest.raises(OnlineStoreUnavailableError, match="doesn't answer"):
        world.materialize(on_step=step)
    server.restart()
    world.materialize()
    world.check()
    before = world.rings()
    world.materialize(full=True)
    assert world.rings() == before


def test_after_a_flush_rebuild_restores_rings_ids_routes_and_positions_beside_live_ingestion(
    own: tuple[Server, World],
) -> None:
    _, world = own
    world.bulk(sales(range(200)))
    world.live(sales(range(200, 300)))
    world.sink.drain_once()
    world.store.client.flushall()
    settings = world.settings.model_copy(
        update={"storage": world.settings.storage.model_copy(update={"buckets": N_BUCKETS})}
    )
    with Workspace.open(settings) as workspace:
        workspace.clock = world.clock
        vars(workspace)["definitions"] = Definitions.of([SALES, USER, SHOP, *world.views])
        more = iter(range(300, 400, 10))

        def step(_: Step) -> None:
            first = next(more)
            world.live(sales(range(first, first + 10)))

        rebuilt = rebuild(workspace, on_ray=False, on_step=step)
    assert [each.full for each in rebuilt.rings] == [N_BUCKETS, N_BUCKETS]
    # Events later than the bound may have met the run half-way: the next one has them.
    world.materialize()
    world.check()
    recent = [each for each in sales(range(300)) if each["at"] >= world.clock.now_us() - LIMITS.lateness_us]
    assert set(world.live(recent)) == {"duplicate"}
    world.check()


# ── A Ray worker that is killed ─────────────────────────────────────────────────────


def mortal(home: Path, step: str, *, times: int) -> type[BucketTask]:
    """A task whose process is killed as it comes to a step with bucket 1, the first so many times."""

    def killed(task: BucketTask, of: Any, *given: Any) -> Any:
        before = deaths(home)
        if of.bucket == 1 and before < times:
            (home / f"death {before}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(BucketTask, step)(task, of, *given)

    return type("Mortal", (BucketTask,), {step: killed})


def deaths(home: Path) -> int:
    return len(list(home.glob("death *")))


@pytest.fixture
def beside_live_events(settings: Settings) -> Iterator[World]:
    """What came in bulk is in the log; of what came live, the sink has moved a half."""
    world = World(settings)
    world.bulk(sales(range(300)))
    world.live(sales(range(250, 350)))
    world.sink.drain_once()
    world.live(sales(range(350, 400)))
    yield world
    world.close()


def check_all(world: World) -> None:
    """Rings are the kernel's before and after the sink is through, and the log holds each event once."""
    world.materialize(TRAFFIC)
    world.check()
    world.sink.drain_once()
    for entity in (USER, SHOP):
        ids = world.log.read(SALES, entity).column("event_id").to_pylist()
        assert sorted(ids) == sorted(world.events)
    world.materialize(full=True)
    world.check()


@pytest.mark.usefixtures("ray_local")
def test_a_ray_worker_that_is_killed_during_a_backfill_is_replaced_and_the_result_is_right(
    beside_live_events: World, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heliostat.online.materialize.BucketTask", mortal(home, "_write", times=1))
    (done,) = beside_live_events.materialize(SPENDING, on_ray=True, small=0)
    assert deaths(home) == 1
    assert (done.buckets, done.entities) == (N_BUCKETS, USERS)
    beside_live_events.check(SPENDING)
    check_all(beside_live_events)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_backfill_whose_workers_are_killed_again_and_again_fails_and_is_resumed(
    beside_live_events: World, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("heliostat.online.materialize.BucketTask", mortal(home, "_remember", times=1_000))
        with pytest.raises(WorkerCrashedError):
            beside_live_events.materialize(SPENDING, on_ray=True, small=0)
    assert deaths(home) > 1, "Ray tries again"
    (rest,) = beside_live_events.materialize(SPENDING, on_ray=True, small=0)
    assert rest.buckets == N_BUCKETS - 1, "the other one had come to its end"
    assert rest.rings.written == 0, "what was written before it was noted is there"
    beside_live_events.check(SPENDING)
    check_all(beside_live_events)
