"""The prediction log end to end: each answered prediction once, whatever happens to connections and processes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from deployments.application import build_app
from deployments.stages import gateway_parts
from heliostat.clock import parse_instant_us
from heliostat.ingestion.sink import Sink
from heliostat.serving.telemetry import Meter
from heliostat.settings import OnlineSettings, Settings
from heliostat.telemetry import _TextFormatter
from heliostat.workspace import Workspace
from tests.integration.test_serving import NOWHERE, Client, Shop, purchase
from tests.sinks import kill, start_sink

END_US = parse_instant_us("1998-07-02")


@pytest.fixture
def shop(settings: Settings) -> Iterator[Shop]:
    with Workspace.open(settings) as workspace:
        yield Shop(workspace)


def logged(workspace: Workspace) -> Counter[str]:
    """How often each prediction id is in the Delta table."""
    rows = workspace.offline_store.read_predictions("churn", start_us=0, end_us=END_US, columns=["prediction_id"])
    return Counter(rows.column("prediction_id").to_pylist())


def streamed(workspace: Workspace) -> int:
    stream = workspace.streams.record_stream("predictions")
    return workspace.streams.lengths([stream])[stream]


# ── Exactly once ────────────────────────────────────────────────────────────────────


class Cutter:
    """Stands between a client and its server; every so often an answer to XADD is lost with its connection."""

    def __init__(self, unix_socket: str, *, every: int) -> None:
        self._socket, self._every = unix_socket, every
        self.written = 0
        self.cut = 0

    async def serve(self) -> tuple[asyncio.Server, str]:
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        return server, f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, downstream = await asyncio.open_unix_connection(self._socket)
        cutting = asyncio.Event()
        back = asyncio.create_task(self._back(upstream, writer, cutting))
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                if b"XADD" in data:
                    self.written += 1
                    if self.written % self._every == 0:
                        cutting.set()
                downstream.write(data)
                await downstream.drain()
        downstream.close()
        await back

    async def _back(
        self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, cutting: asyncio.Event
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await upstream.read(65_536):
                if cutting.is_set():  # the server has done it, and nobody hears of it
                    self.cut += 1
                    writer.transport.abort()
                    return
                writer.write(data)
                await writer.drain()
        writer.close()


def drain_for_ever(document: str) -> None:
    """A sink, in a process of its own."""
    with Workspace.open(Settings.model_validate_json(document)) as workspace:
        Sink.of(workspace).run_forever(0.001, threading.Event())


@pytest.mark.parametrize("log", ["durable", "async"])
def test_each_answered_prediction_is_in_the_table_once_though_connections_are_cut_and_sinks_killed(
    shop: Shop, valkey: str, log: str
) -> None:
    workspace = shop.workspace
    answered: list[str] = []

    async def scenario() -> None:
        cutter = Cutter(valkey.removeprefix("unix://").partition("?")[0], every=4)
        server, url = await cutter.serve()
        serving = shop.serving(log=log, batch_max_entities=5)
        online = OnlineSettings(url=url, timeout_s=10.0)
        parts = gateway_parts(
            Workspace.open(workspace.settings.model_copy(update={"serving": serving, "online": online})), Meter()
        )
        transport = httpx.ASGITransport(build_app(parts), raise_app_exceptions=False)
        async with Client(transport=transport, base_url="http://gateway") as client:

            async def ask(pause_s: float) -> None:
                for _ in range(12):
                    reply = await client.post("/predict", json={"entity_ids": [1, 2]})
                    if reply.status_code == 200:
                        answered.extend(each["prediction_id"] for each in reply.json()["entities"])
                    await asyncio.sleep(pause_s)

            async def sinks() -> None:
                pauses = random.Random(3)
                for _ in range(3):
                    sink = await asyncio.to_thread(start_sink, drain_for_ever, workspace.settings)
                    await asyncio.sleep(pauses.uniform(0.3, 0.9))
                    await asyncio.to_thread(kill, sink)

            await asyncio.gather(sinks(), *(ask(0.02 * each) for each in range(1, 7)))
        await parts.close()
        assert cutter.cut > 3, "no answer was lost"
        server.close()
        await server.wait_closed()

    asyncio.run(scenario())
    Sink.of(workspace).drain_once()
    assert streamed(workspace) == 0
    counted = logged(workspace)
    assert set(counted.values()) == {1}
    assert len(answered) > 100
    assert set(answered) <= set(counted)


# ── What a row says ─────────────────────────────────────────────────────────────────


def test_a_callers_trace_is_in_every_answer_the_log_and_its_row(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}

    async def scenario(client: Client) -> None:
        events = [purchase(n, 1, "1998-06-20") for n in range(3)]
        reply = await client.post("/events", json={"source": "purchases", "events": events}, headers=headers)
        assert reply.headers["traceparent"].split("-")[1] == trace
        reply = await client.post("/predict", json={"entity_ids": [1, 2]}, headers=headers)
        version, found, span, flags = reply.headers["traceparent"].split("-")
        assert (version, found, flags) == ("00", trace, "01")
        assert span != "b7ad6b7169203331"
        other = await client.post("/predict", json={"entity_ids": [3]}, headers={"traceparent": f"00-{trace}-0-01"})
        assert other.headers["traceparent"].split("-")[1] != trace
        for path in ("/nope", "/healthz", "/models/nope/1"):
            assert (await client.get(path, headers=headers)).headers["traceparent"].split("-")[1] == trace
        Sink.of(shop.workspace).drain_once()
        rows = shop.workspace.offline_store.read_predictions("churn", start_us=0, end_us=END_US).to_pylist()
        first, second, third = sorted(rows, key=lambda row: row["entity"])
        assert (first["trace_id"], second["trace_id"]) == (trace, trace)
        assert third["trace_id"] == other.headers["traceparent"].split("-")[1]
        assert 0 < first["latency_ms"] < 20_000
        assert first["newest_event"].isoformat() == "1998-06-20T00:00:00+00:00"
        assert (second["newest_event"], third["newest_event"]) == (None, None)

    async def without_store(client: Client) -> None:
        reply = await client.post("/predict", json={"entity_ids": [1]}, headers=headers)
        assert (reply.status_code, reply.headers["traceparent"].split("-")[1]) == (503, trace)

    shop.run(scenario)
    caplog.handler.setFormatter(_TextFormatter())
    with caplog.at_level("WARNING", "heliostat.gateway"):
        shop.run(without_store, online=NOWHERE)
    assert any("answered 503" in line and trace in line for line in caplog.text.splitlines())
