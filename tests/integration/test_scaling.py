"""Replicas that come and go under load: no request fails, and each answer's row is in the log, once.

Real HTTP, Ray Serve, a Valkey server to be killed; the clients of benchmarks/chaos.py look at every answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from ray import serve

from benchmarks import chaos, chaos_load
from benchmarks.chaos_load import Act, Load, Truth
from deployments import graph
from heliostat import cluster
from heliostat.settings import AutoscalingSettings
from heliostat.storage.embedded import EmbeddedServer
from heliostat.workspace import Workspace
from tests.chaos_project import chaos_project

pytestmark = pytest.mark.slow  # what replicas cost is to start them


_UNHURRIED_MS = 20_000.0  # replicas that start take a small machine for seconds
_PATIENCE_S = 180.0  # what doesn't come about by then never will, however slow the machine is


class House:
    """A project whose graph is deployed now in this way, now in that.

    Each deployment's answers are looked up in the log by themselves.
    """

    def __init__(self, workspace: Workspace, truth: Truth) -> None:
        self.workspace, self.truth, self.url = workspace, truth, ""

    def deploy(self, **changes: object) -> None:
        """Deploy the graph with some serving settings changed."""
        settings = self.workspace.settings
        changed = settings.model_copy(update={"serving": settings.serving.model_copy(update=changes)})
        self.url = graph.deploy(changed)

    def run(
        self, scenario: Callable[[Load], Awaitable[None]], *, rate: float | None, connections: int = 32
    ) -> tuple[Act, Load, chaos.Audit]:
        """Load while a scenario is played, with all answers right and in the log once, and none that failed."""
        load = Load(self.url, self.truth, rate, connections=connections)
        act = load.act = Act("all of it")

        async def main() -> None:
            done = asyncio.Event()
            loading = asyncio.create_task(load.run(done))
            try:
                await scenario(load)
            finally:
                done.set()
                await loading

        asyncio.run(main())
        found = chaos.audit(self.workspace, load)
        assert chaos.verdict([act], found) == []
        assert found.answered > 100
        return act, load, found


@pytest.fixture(scope="module")
def house(session_home: Path, ray_local: None) -> Iterator[House]:  # noqa: ARG001 - it must run
    with chaos_project(session_home / "scaling") as (workspace, truth):
        yield House(workspace, truth)


def replicas(deployment: str = "Gateway") -> set[int]:
    """The processes of a deployment."""
    return {
        pid
        for pid in cluster._own_workers()
        if cluster._read_proc(pid, "cmdline").startswith(f"ray::ServeReplica:{graph.APP_NAME}:{deployment}")
    }


def states(deployment: str = "Gateway") -> dict[str, int]:
    """How many of its replicas are in which state, as Serve says."""
    return dict(serve.status().applications[graph.APP_NAME].deployments[deployment].replica_states)


async def until(what: Callable[[], bool]) -> float:
    """Wait for something; how long it took, seconds."""
    begin = time.monotonic()
    while not await asyncio.to_thread(what):
        assert time.monotonic() < begin + _PATIENCE_S, f"it never did: {serve.status().applications}"
        await asyncio.sleep(0.05)
    return time.monotonic() - begin


async def slow_request(url: str, load: Load, begun: asyncio.Event, go_on: asyncio.Event) -> None:
    """A prediction whose body arrives in two parts, and between them replicas go."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"entity_ids": [1, 2]}).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body[:5])
    await writer.drain()
    await asyncio.sleep(0.3)
    begun.set()
    await go_on.wait()
    writer.write(body[5:])
    status, answer, _ = await chaos_load._answer(reader)
    assert status == "200", answer
    load._look(load.act, 0, [1, 2], json.loads(answer))
    writer.close()


def test_replicas_that_are_replaced_answer_what_they_began_and_write_the_whole_async_log(house: House) -> None:
    options = {"replicas": 2, "log": "async", "body_timeout_s": 60.0, "deadline_ms": _UNHURRIED_MS}
    house.deploy(**options)
    before = replicas()

    async def scenario(load: Load) -> None:
        begun, go_on = [asyncio.Event() for _ in range(6)], asyncio.Event()
        slow = [asyncio.create_task(slow_request(house.url, load, each, go_on)) for each in begun]
        await asyncio.gather(*(each.wait() for each in begun))
        deploying = asyncio.create_task(asyncio.to_thread(house.deploy, **options, max_queued_requests=1000))
        # Asking Serve and telling it to deploy both pickle as two threads mustn't at once: ask once it was told.
        await until(lambda: deploying.done() or len(replicas() - before) == 2)
        await until(lambda: deploying.done() or states().get("STOPPING", 0) > 0)
        assert not deploying.done(), f"it didn't wait for those who still have a request: {deploying}, {slow}"
        await asyncio.sleep(1.0)
        assert before & replicas(), "who still has a request in flight stays"
        go_on.set()
        await asyncio.gather(*slow)
        await deploying
        assert not before & replicas()

    act, _, _ = house.run(scenario, rate=200)
    assert len(replicas()) == 2
    assert act.failed == 0
    # A replica that stops, or whose oldest row has waited for its second, has its answers wait for the log instead:
    # how many do is a matter of the machine.
    assert act.unlogged > 0, "with an asynchronous log answers leave before they are logged"
    assert not act.fallbacks


def test_who_was_silent_while_replicas_were_replaced_is_answered_on_the_same_connection(house: House) -> None:
    options = {"replicas": 1, "deadline_ms": _UNHURRIED_MS}
    house.deploy(**options)
    before = replicas()
    host, port = house.url.removeprefix("http://").split(":")
    body = json.dumps({"entity_ids": [1, 2]})
    request = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, bytes]:
        writer.write(request)
        status, answer, _ = await chaos_load._answer(reader)
        return status, answer

    async def scenario() -> None:
        pipes = [await asyncio.open_connection(host, int(port)) for _ in range(8)]
        assert {(await ask(*pipe))[0] for pipe in pipes} == {"200"}
        await asyncio.to_thread(house.deploy, **options, max_queued_requests=1000)
        assert not before & replicas()
        for pipe in pipes:
            status, answer = await ask(*pipe)
            assert status == "200", answer
            pipe[1].close()

    asyncio.run(scenario())


def test_replicas_follow_the_load_up_and_down_and_no_request_fails(house: House) -> None:
    scaling = AutoscalingSettings(max_replicas=2, target_requests=4, look_back_s=10.5, up_after_s=0, down_after_s=1)
    house.deploy(replicas=1, autoscaling=scaling, log="async", deadline_ms=_UNHURRIED_MS)
    asyncio.run(until(lambda: len(replicas()) == 1))

    async def busy(_: Load) -> None:
        await until(lambda: states().get("RUNNING") == 2)

    act, _, _ = house.run(busy, rate=None, connections=32)
    assert act.failed == 0

    async def quiet(_: Load) -> None:
        await until(lambda: states() == {"RUNNING": 1})

    act, _, _ = house.run(quiet, rate=20)
    assert act.failed == 0


def test_replicas_stopped_while_the_log_is_away_write_their_rows_once_it_is_back(house: House) -> None:
    if not replicas():  # those of another test do as well
        house.deploy(replicas=1, log="async")
    home = house.workspace.settings.home

    async def scenario(load: Load) -> None:
        await asyncio.sleep(1.0)
        os.kill(json.loads((home / "valkey" / "server.json").read_text())["pid"], signal.SIGKILL)
        before = load.act.unlogged
        await until(lambda: load.act.unlogged > before + 20)

    load = Load(house.url, house.truth, 60)
    act = load.act

    async def main() -> None:
        done = asyncio.Event()
        loading = asyncio.create_task(load.run(done))
        await scenario(load)
        done.set()
        await loading
        stopping = asyncio.create_task(asyncio.to_thread(graph.drain))
        await asyncio.sleep(2.0)
        assert replicas(), "they hold rows that are nowhere else"
        (await asyncio.to_thread(EmbeddedServer.ensure, home)).close()
        assert await stopping

    asyncio.run(main())
    assert not replicas()
    found = chaos.audit(house.workspace, load)
    assert chaos.verdict([act], found) == []
    assert act.unlogged > 20


@pytest.mark.parametrize("stage", ["ModelReplica", "FeatureLookup", "ABRouter"])
def test_a_stage_whose_replica_is_killed_is_stood_in_for(house: House, stage: str) -> None:
    if not replicas(stage):
        house.deploy(replicas=1, placement="distributed")
    before = replicas(stage)

    async def scenario(load: Load) -> None:
        await asyncio.sleep(1.0)
        os.kill(*before, signal.SIGKILL)
        await until(lambda: len(replicas(stage) - before) == 1 and states(stage) == {"RUNNING": 1})
        # Its breaker opens again by itself.
        await until(lambda: time.monotonic() > load.act.last_bad_at + 1.0)

    act, _, _ = house.run(scenario, rate=40, connections=128)
    assert act.failed == 0
    if stage != "ABRouter":  # the gateway's own stands in for that, and says the same
        assert act.fallbacks
