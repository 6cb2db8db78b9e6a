"""Materialization here and on Ray: one place decides, rings are the same, and each goes on where the other was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from heliostat import cluster
from heliostat.clock import US_PER_DAY, US_PER_HOUR
from heliostat.features import bucket_tasks
from heliostat.models.definitions import Definitions
from heliostat.online.materialize import Step
from heliostat.rebuild import materialize_views, rebuild
from heliostat.settings import Settings
from heliostat.workspace import Workspace
from tests.integration.test_materialization import (
    ADDED,
    N_BUCKETS,
    SALES,
    SHOP,
    SPENDING,
    USER,
    USERS,
    VIEWS,
    World,
    sale,
    sales,
)
from tests.ray_work import counted

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture
def world(settings: Settings) -> Iterator[World]:
    opened = World(settings)
    yield opened
    opened.close()


@pytest.fixture
def on_ray(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many buckets each run has given to Ray."""
    return counted(monkeypatch, bucket_tasks, "over_each")


def test_what_is_small_is_done_here_and_what_is_large_on_ray_to_the_same_bytes(
    world: World, on_ray: list[int]
) -> None:
    world.bulk(sales(range(400)))
    small = world.materialize(on_ray=True, small=400)
    here = world.rings()
    assert (on_ray, len({name.partition(":")[0] for name in here})) == ([], len(VIEWS))
    world.lose()
    large = world.materialize(on_ray=True, small=399)
    assert on_ray == [N_BUCKETS] * len(VIEWS)
    assert world.rings() == here
    assert [(each.events, each.entities, each.rings, each.n_bytes) for each in large] == [
        (each.events, each.entities, each.rings, each.n_bytes) for each in small
    ]
    world.check()


def test_without_a_ray_all_is_done_here(world: World, on_ray: list[int]) -> None:
    world.bulk(sales(range(50)))
    world.materialize(on_ray=False, small=0)
    assert on_ray == []
    world.check()


def test_only_the_events_of_buckets_that_have_changed_decide(world: World, on_ray: list[int]) -> None:
    world.bulk(sales(range(300)))
    world.materialize(SPENDING, on_ray=True, small=290)
    assert on_ray == [N_BUCKETS]
    world.bulk([sale(1000, 3, US_PER_HOUR)])
    (again,) = world.materialize(SPENDING, on_ray=True, small=290)
    assert (on_ray, again.buckets, again.entities) == ([N_BUCKETS], 1, 1)
    world.check(SPENDING)
    world.materialize(SPENDING, on_ray=True, small=290, full=True)
    assert on_ray == [N_BUCKETS] * 2


def test_events_that_no_window_reaches_do_not_decide(world: World, on_ray: list[int]) -> None:
    world.views = (ADDED,)
    world.bulk([sale(number, number % USERS, 10 * US_PER_DAY) for number in range(200)])
    world.bulk([sale(number, number % USERS, US_PER_HOUR) for number in range(200, 300)])
    (done,) = world.materialize(on_ray=True, small=100)
    assert (on_ray, done.events) == ([], 100)
    world.materialize(on_ray=True, small=99, full=True)
    assert on_ray == [N_BUCKETS]
    world.check()


@pytest.mark.parametrize("begun_on", ["here", "Ray"])
def test_what_was_interrupted_one_way_is_finished_the_other_way(
    world: World, on_ray: list[int], begun_on: str
) -> None:
    world.bulk(sales(range(300)))
    world.live(sales(range(280, 340)))
    seen: list[tuple[int, int]] = []

    def die(step: Step) -> None:
        seen.append((step.done, step.total))
        if step.done == 1:
            raise KeyboardInterrupt

    small = {"here": 1_000, "Ray": 0}
    with pytest.raises(KeyboardInterrupt):
        world.materialize(SPENDING, on_ray=True, small=small.pop(begun_on), on_step=die, concurrency=1)
    assert seen == [(0, N_BUCKETS), (1, N_BUCKETS)]
    (rest,) = world.materialize(SPENDING, on_ray=True, small=max(small.values()))
    assert rest.buckets == N_BUCKETS - 1
    assert 0 < rest.entities < USERS
    assert on_ray == [N_BUCKETS if begun_on == "Ray" else N_BUCKETS - 1]
    world.check(SPENDING)


def test_ray_is_connected_when_it_has_something_to_do_and_until_all_is_done(world: World) -> None:
    told: list[str] = []

    @contextmanager
    def connect() -> Iterator[None]:
        told.append("connected")
        yield
        told.append("let go")

    def step(at: Step) -> None:
        told.append(f"{at.views[0]} {at.done}")

    world.bulk(sales(range(60)))
    world.materialize(on_ray=True, connect=connect)
    assert told == []
    world.materialize(SPENDING, on_ray=True, small=0, connect=connect)
    assert told == [], "there is nothing to do"
    world.materialize(SPENDING, on_ray=True, small=0, connect=connect, on_step=step, full=True)
    assert told == ["spending@1 0", "connected", "spending@1 1", "spending@1 2", "let go"]


def test_a_job_with_little_to_do_starts_no_ray(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Settings] = []

    @contextmanager
    def connect(settings: Settings) -> Iterator[None]:
        started.append(settings)
        yield

    monkeypatch.setattr(cluster, "connect", connect)
    monkeypatch.setattr(cluster, "is_given", lambda _: False)
    buckets = world.settings.storage.model_copy(update={"buckets": N_BUCKETS})
    world.bulk(sales(range(100)))
    with Workspace.open(world.settings.model_copy(update={"storage": buckets})) as workspace:
        workspace.clock = world.clock
        vars(workspace)["definitions"] = Definitions.of([SALES, USER, SHOP, *world.views])
        materialize_views(workspace)
        assert rebuild(workspace).rings[0].entities == USERS
        assert started == []
        world.check()
        monkeypatch.setattr(cluster, "is_given", lambda _: True)
        materialize_views(workspace)
        assert len(started) == 1, "one that is there is joined, and says if its machines don't share the storage"


def test_after_apply_a_materialization_clears_the_rings_of_what_was_retired_until_it_comes_back(world: World) -> None:
    buckets = world.settings.storage.model_copy(update={"buckets": N_BUCKETS})
    world.bulk(sales(range(100)))
    declared = [SALES, USER, SHOP, *world.views]
    with Workspace.open(world.settings.model_copy(update={"storage": buckets})) as workspace:
        workspace.clock = world.clock
        for views in ([ADDED], [], [ADDED]):
            vars(workspace)["definitions"] = Definitions.of([*declared, *views])
            workspace.features.apply(workspace.definitions)
            materialize_views(workspace, full=not views, on_ray=False)
            assert workspace.retired_views() == ({"added@1"} if not views else set())
            assert any(name.startswith("added@1:") for name in world.rings()) == bool(views)
        world.check(*world.views, ADDED)
