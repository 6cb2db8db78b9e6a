"""Each act of benchmarks/chaos.py, shorter: real HTTP, Ray Serve with two replicas, a Valkey server to be killed.

All of it is slow; test_live_promotion.py and the unit tests play parts of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import chaos, chaos_load
from benchmarks.chaos_load import Act, Load, Truth
from deployments import graph
from heliostat.workspace import Workspace
from tests.chaos_project import chaos_project

pytestmark = pytest.mark.slow

RATE = 40.0
Play = Callable[[chaos.Stage, Act], Awaitable[None]]


class Theatre:
    """A deployed project, and what its versions say."""

    def __init__(self, workspace: Workspace, truth: Truth, url: str) -> None:
        self.workspace, self.truth, self.url = workspace, truth, url
        self.played: list[Load] = []

    def play(self, what: Play, *, seconds: float) -> Act:
        """One act under load; every answer was right and is in the log once, and nothing failed that needn't."""
        load = Load(self.url, self.truth, RATE, connections=32)
        stage = chaos.Stage(self.workspace, load, seconds=seconds)

        async def scenario() -> None:
            done = asyncio.Event()
            loading = asyncio.create_task(load.run(done))
            await asyncio.sleep(0.5)
            await stage.play("the act", lambda act: what(stage, act))
            await stage.play("afterwards", chaos.Stage(self.workspace, load, seconds=0.5).nothing)
            done.set()
            await loading

        asyncio.run(scenario())
        found = chaos.audit(self.workspace, load)
        assert chaos.verdict(stage.acts, found) == []
        assert found.answered > RATE * seconds
        act, _ = stage.acts
        return act


@pytest.fixture(scope="module")
def theatre(session_home: Path, ray_local: None) -> Iterator[Theatre]:  # noqa: ARG001 - it must run
    with chaos_project(session_home / "chaos") as (workspace, truth):
        url = graph.deploy(workspace.settings)
        # Both replicas have seen everybody, and the models have shown themselves.
        asyncio.run(chaos.capacity(url, truth, seconds=1.0))
        yield Theatre(workspace, truth, url)


def test_twenty_promotions_rollbacks_and_splits_fail_nobody(theatre: Theatre) -> None:
    act = theatre.play(lambda stage, act: stage.promotions(act), seconds=4)
    assert not act.fallbacks


def test_a_version_that_raises_gives_way(theatre: Theatre) -> None:
    act = theatre.play(lambda stage, act: stage.bad_version(act, chaos_load.RAISES), seconds=4)
    assert act.fallbacks.keys() == {"control", "last_good_version"}
    assert act.failed == 0


def test_a_version_that_hangs_gives_way_in_time(theatre: Theatre) -> None:
    act = theatre.play(lambda stage, act: stage.bad_version(act, chaos_load.HANGS), seconds=4)
    assert act.fallbacks.keys() == {"control", "last_good_version"}
    assert act.failed == 0


def test_a_corrupt_artifact_gives_way(theatre: Theatre) -> None:
    act = theatre.play(lambda stage, act: stage.bad_version(act, chaos_load.CORRUPT), seconds=4)
    assert act.fallbacks.keys() == {"control", "last_good_version"}
    assert act.failed == 0


def test_a_store_that_is_killed_and_started_again_stops_nobody(theatre: Theatre) -> None:
    act = theatre.play(lambda stage, act: stage.store_killed(act), seconds=6)
    assert act.failed == 0
    assert act.unlogged > 0
    assert act.fallbacks.keys() <= {"last_seen_features", "training_medians"}
    assert act.fallbacks
    assert act.recovery_s is not None, "without help"


def test_a_replica_that_is_killed_takes_no_more_along_than_it_was_asked(theatre: Theatre) -> None:
    before = set(chaos.replicas())
    theatre.play(lambda stage, act: stage.replica_killed(act), seconds=6)
    after = set(chaos.replicas())
    assert len(before) == len(after) == 2
    assert before != after
