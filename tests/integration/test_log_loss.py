"""A gateway that is killed without a word: of what it answered, the log lacks no more than the settings allow."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from deployments.application import build_app
from deployments.stages import gateway_parts
from heliostat.ingestion.sink import Sink
from heliostat.ports import free_ports
from heliostat.serving.telemetry import Meter
from heliostat.settings import ClockSettings, OnlineSettings, ServingSettings, Settings
from heliostat.storage.embedded import EmbeddedServer
from heliostat.workspace import Workspace
from tests.integration.test_prediction_log import logged
from tests.integration.test_serving import Shop
from tests.sinks import kill, start_sink

BUFFER_ROWS = 60
MAX_DELAY_S = 0.5


def serve_for_ever(document: str) -> None:
    """A gateway, in a process of its own."""
    settings = Settings.model_validate_json(document)

    async def main() -> None:
        app = build_app(gateway_parts(Workspace.open(settings), Meter()))
        await uvicorn.Server(uvicorn.Config(app, port=settings.serving.port, log_level="error")).serve()

    asyncio.run(main())


@pytest.fixture
def shop(home: Path) -> Iterator[Shop]:
    settings = Settings(
        project="loss",
        home=home,
        online=OnlineSettings(timeout_s=1.0),
        clock=ClockSettings(kind="replay", replay_from="1998-07-01", speed=0.0),
    )
    try:
        with Workspace.open(settings) as workspace:
            yield Shop(workspace)
    finally:
        EmbeddedServer.stop(home)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that doesn't run as long as the block does."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("log", ["durable", "async"])
def test_a_gateway_that_is_killed_takes_no_more_rows_along_than_its_log_allows(shop: Shop, log: str) -> None:
    settings = shop.workspace.settings
    (port,) = free_ports("127.0.0.1", 1)
    serving = ServingSettings(
        port=port, log=log, log_buffer_rows=BUFFER_ROWS, log_max_delay_s=MAX_DELAY_S, deadline_ms=3_000.0
    )
    gateway = start_sink(serve_for_ever, settings.model_copy(update={"serving": serving}))
    server = json.loads((settings.home / "valkey" / "server.json").read_text())["pid"]
    answered: dict[str, float] = {}
    refused = asyncio.Event()

    async def ask(client: httpx.AsyncClient, pause_s: float) -> None:
        while True:
            try:
                reply = await client.post("/predict", json={"entity_ids": [1, 2]})
            except httpx.TransportError:
                return
            if reply.status_code == 200:
                assert reply.json()["logged"] is (log == "durable")
                answered.update(
                    dict.fromkeys((e["prediction_id"] for e in reply.json()["entities"]), time.monotonic())
                )
            else:
                assert (reply.status_code, reply.json()["error"]) == (503, "prediction_log"), reply.text
                refused.set()
            await asyncio.sleep(pause_s)

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            limit = time.monotonic() + 60
            while time.monotonic() < limit:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/healthz")).status_code == 200:
                        break
                await asyncio.sleep(0.05)
            asking = [asyncio.create_task(ask(client, 0.002 * each)) for each in range(1, 9)]
            while len(answered) < 200:  # noqa: ASYNC110 - in the middle of it
                await asyncio.sleep(0.001)
            if log == "async":
                # The only way to see rows in memory: the server takes none for a while.
                with stopped(server):
                    async with asyncio.timeout(20):
                        await refused.wait()
                    await asyncio.to_thread(kill, gateway)
            else:
                await asyncio.to_thread(kill, gateway)
            await asyncio.gather(*asking)

    asyncio.run(scenario())
    Sink.of(shop.workspace).drain_once()
    counted = logged(shop.workspace)
    assert set(counted.values()) == {1}
    lost = [at for name, at in answered.items() if name not in counted]
    if log == "durable":
        assert lost == []
        assert not refused.is_set()
    else:
        # It may be none: what waits in the socket of the server that stood still is written after all.
        assert len(lost) <= BUFFER_ROWS
        assert max(lost, default=0.0) - min(lost, default=0.0) < MAX_DELAY_S + 2.0  # until a client has its answer
