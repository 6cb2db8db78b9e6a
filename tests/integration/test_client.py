"""The client against a real gateway over real HTTP, on a wire that breaks."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import uvicorn

from deployments.application import build_app
from deployments.stages import gateway_parts
from heliostat.client import AsyncClient, Client, Sent
from heliostat.errors import GatewayError, GatewayUnreachableError
from heliostat.ingestion.intake import EventResult, Intake
from heliostat.serving.telemetry import Meter
from heliostat.settings import IngestionSettings, Settings, load_settings
from heliostat.workspace import Workspace
from tests.integration.test_ingestion import ROOT
from tests.integration.test_serving import Shop, purchase, register, shop  # noqa: F401 - a fixture


class Gateway:
    """A gateway of one project on a port of its own, served by uvicorn in a thread."""

    def __init__(self, settings: Settings) -> None:
        self.meter = Meter()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            # The parts belong to the server's loop: they are made on it.
            if self._app is None:
                self._app = build_app(gateway_parts(Workspace.open(settings), self.meter))
            await self._app(scope, receive, send)

        self._app: Any = None
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(app, lifespan="on", log_level="error", timeout_graceful_shutdown=2)
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()


class Wire:
    """A TCP connection to a port that loses the first answers: all is sent there, nothing comes back.

    Args:
        port: Where it leads.
        lost: How many answers are lost.
    """

    def __init__(self, port: int, lost: int) -> None:
        self._port, self._left, self.lost = port, lost, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            back = threading.Thread(target=self._back, args=(server, client), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                while data := client.recv(65_536):
                    server.sendall(data)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_WR)
            back.join()

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65_536):
                if self._left > 0:
                    self._left -= 1
                    self.lost += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def gateway(settings: Settings) -> Iterator[Gateway]:
    small = settings.model_copy(update={"ingestion": IngestionSettings(max_events_per_request=40)})
    with Gateway(small) as found:
        yield found


@pytest.fixture
def model(settings: Settings) -> None:
    with Workspace.open(settings) as workspace:
        register(workspace, 1)
        workspace.rollout.serve("churn", 1, reason="the first one")


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Client]:
    with Client(f"http://127.0.0.1:{gateway.port}", timeout_s=20.0, pause_s=0.01) as found:
        yield found


def _wired(gateway: Gateway, lost: int, test: Callable[[Client, Wire], None]) -> None:
    wire = Wire(gateway.port, lost)
    with Client(wire.url, timeout_s=20.0, pause_s=0.01) as client:
        test(client, wire)
    wire.close()


@pytest.mark.usefixtures("model")
def test_a_sent_event_shows_in_the_next_features_and_prediction(client: Client) -> None:
    assert client.features("recent_purchases", 7).absent
    before = client.predict([7], model="churn")
    assert client.send("purchases", purchase(1, 7, "1998-06-20")) == Sent(accepted=1, requests=1)
    found = client.features("recent_purchases", 7)
    assert (found.view, dict(found.entity), found.absent) == ("recent_purchases@1", {"customer_id": 7}, False)
    after = client.predict([7, "8"])
    assert [each.entity_id for each in after.entities] == [7, "8"]
    assert before.entities[0].absent_views != after.entities[0].absent_views == ()
    assert (after.model, after.model_version, after.logged) == ("churn", 1, True)


def test_many_events_go_in_batches_and_wrong_ones_are_told_by_their_place(client: Client) -> None:
    client.batch_events = 30
    events = [purchase(number, number % 5, "1998-06-20") for number in range(100)]
    events[64] = {**events[64], "customer_id": None}
    events[99] = {**events[99], "purchased_at": "tomorrow"}
    sent = client.send("purchases", (event for event in events))
    assert (sent.accepted, sent.requests) == (98, 4)
    assert [(each.position, each.event_id) for each in sent.rejected] == [(64, 64), (99, 99)]
    assert "customer_id is missing" in sent.rejected[0].reason
    with pytest.raises(GatewayError, match=r"2 events were rejected, the first \(at 64\): customer_id is missing"):
        sent.raise_for_rejected()
    assert client.send("purchases", events[:10]) == Sent(duplicates=10, requests=1)


def test_what_several_requests_bring_at_once_goes_in_together_and_each_is_told_its_own(
    shop: Shop,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[int] = []
    asubmit = Intake.asubmit

    async def counted(self: Intake, source: str, events: Sequence[Any]) -> list[EventResult]:
        batches.append(len(events))
        if len(batches) == 2:
            raise ZeroDivisionError("somebody's events broke the check")
        return await asubmit(self, source, events)

    monkeypatch.setattr(Intake, "asubmit", counted)

    async def scenario(client: httpx.AsyncClient) -> None:
        async def post(number: int) -> list[str]:
            events = [purchase(number, number, "1998-06-20"), {"event_id": -number}][: 1 + number % 2]
            reply = await client.post("/events", json={"source": "purchases", "events": events})
            return [each["status"] for each in reply.json()["results"]]

        for first in (0, 40):
            told = await asyncio.gather(*(post(number) for number in range(first, first + 40)))
            assert told == [["accepted"], ["accepted", "rejected"]] * 20

    shop.run(scenario)
    assert len(batches) < 80
    assert max(batches) > 2


def test_events_that_are_all_wrong_are_an_answer_and_no_error(client: Client) -> None:
    sent = client.send("purchases", [{}, {"event_id": 5}])
    assert (sent.accepted, [each.event_id for each in sent.rejected]) == (0, [None, 5])


def test_a_batch_that_is_too_large_for_the_gateway_is_halved(client: Client) -> None:
    events = [purchase(number, 3, "1998-06-20") for number in range(150)]
    assert client.send("purchases", events).accepted == 150
    assert client.batch_events <= 40


@pytest.mark.parametrize(
    ("ask", "code", "said"),
    [
        (lambda client: client.send("sales", {"a": 1}), "unknown_source", "purchases"),
        (lambda client: client.predict([1], model="churm"), "unknown_model", "churn"),
        (lambda client: client.features("recent", 1), "unknown_view", "recent_purchases"),
        (lambda client: client.features("recent_purchases", "x"), "invalid_value", "customer_id"),
        (lambda client: client.predict([]), "invalid_field", "at least one entity id"),
    ],
)
def test_a_refusal_carries_the_gateways_code_and_what_exists(
    client: Client, ask: Callable[[Client], object], code: str, said: str
) -> None:
    with pytest.raises(GatewayError, match=said) as raised:
        ask(client)
    assert (raised.value.code, raised.value.status in (404, 422)) == (code, True)


def test_a_batch_whose_answer_was_lost_is_sent_again_and_counted_once(gateway: Gateway, settings: Settings) -> None:
    def test(client: Client, wire: Wire) -> None:
        sent = client.send("purchases", [purchase(number, number, "1998-06-20") for number in range(20)])
        # The gateway had taken it when the answer was lost.
        assert (sent.accepted, sent.duplicates, sent.requests, wire.lost) == (0, 20, 3, 2)

    _wired(gateway, 2, test)
    with Workspace.open(settings) as workspace:
        streams = workspace.streams.event_streams("purchases")
        assert sum(workspace.streams.lengths(streams).values()) == 20


@pytest.mark.usefixtures("model")
def test_a_prediction_whose_answer_was_lost_is_not_asked_for_again(gateway: Gateway) -> None:
    def test(client: Client, wire: Wire) -> None:
        with pytest.raises(GatewayUnreachableError, match="in 1 tries") as raised:
            client.predict([1])
        assert (raised.value.code, wire.lost) == ("unreachable", 1)

    _wired(gateway, 1, test)


def test_a_gateway_that_never_answers_is_reported_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            Client(url, timeout_s=0.2, tries=2, pause_s=0.01) as client,
            pytest.raises(GatewayUnreachableError) as gone,
        ):
            client.send("purchases", {"event_id": 1})
    assert gone.value.tries == 2
    assert "ReadTimeout" in str(gone.value)
    assert "safe" in str(gone.value)


@pytest.mark.usefixtures("model")
def test_predictions_are_explained_and_what_became_of_them_is_reported(client: Client, settings: Settings) -> None:
    answer = client.predict([7, 8], model="churn", features=[{"count_30d": 2}, None], explain=True)
    for each in answer.entities:
        told = each.explanation
        assert told is not None
        assert sum(told.contributions.values()) + told.base_value == pytest.approx(told.raw_score, abs=1e-9)
        assert (told.scale, each.unexplained, each.fallback) == ("log-odds", None, None)
    assert client.predict([7]).entities[0].explanation is None
    client.batch_actuals = 2
    happened = [{"prediction_id": each.prediction_id, "value": 1} for each in answer.entities]
    assert client.actuals([*happened, {"entity_id": 9, "as_of": "1998-04-01", "value": True}], model="churn") == 3
    with Workspace.open(settings) as workspace:
        assert len(workspace.streams.read(workspace.streams.record_stream("actuals"))) == 3


@pytest.mark.usefixtures("model")
def test_models_say_who_serves_whom_and_a_version_what_it_is(client: Client, settings: Settings) -> None:
    with Workspace.open(settings) as workspace:
        register(workspace, 2)
        workspace.rollout.start_split("churn", experiment="both", control=1, challenger=2, weight=0.25, coverage=0.8)
    (model,) = client.models()
    assert (model.name, model.versions, model.inputs, model.shadow) == ("churn", (1, 2), {}, ())
    assert model.serving == pytest.approx({1: 0.8, 2: 0.2})
    assert client.model("churn").version == 2
    assert client.model("churn", 2).features == client.model("churn").features != ()


@pytest.mark.usefixtures("model")
def test_the_asynchronous_client_says_and_hears_the_same(gateway: Gateway, client: Client) -> None:
    async def scenario() -> None:
        url = f"http://127.0.0.1:{gateway.port}/"
        async with AsyncClient(url, timeout_s=20.0, pause_s=0.01, connections=4) as other:
            events = [purchase(number, number % 5, "1998-06-20") for number in range(100)]
            events[64] = {**events[64], "customer_id": None}
            sent = await other.send("purchases", events)
            assert (sent.accepted, [each.position for each in sent.rejected]) == (99, [64])
            assert other.batch_events <= 40
            many = await asyncio.gather(*(other.predict([number % 5]) for number in range(40)))
            expected = client.predict([0, 1, 2, 3, 4]).values
            assert [each.values[0] for each in many] == expected * 8
            assert (await other.features("recent_purchases", 3)).values["count_30d"] == 20.0
            assert await other.models() == client.models()
            assert await other.model("churn", 1) == client.model("churn", 1)
            assert await other.actuals({"prediction_id": many[0].entities[0].prediction_id, "value": 0}) == 1
            with pytest.raises(GatewayError, match="churn") as unknown:
                await other.predict([1], model="churm")
            assert (unknown.value.code, unknown.value.status) == ("unknown_model", 404)

    asyncio.run(scenario())


def test_the_asynchronous_client_repeats_events_whose_answer_was_lost_and_no_prediction(gateway: Gateway) -> None:
    async def scenario() -> None:
        wire = Wire(gateway.port, 2)
        async with AsyncClient(wire.url, timeout_s=20.0, pause_s=0.01) as client:
            sent = await client.send("purchases", [purchase(number, number, "1998-06-20") for number in range(20)])
            assert (sent.accepted, sent.duplicates, sent.requests, wire.lost) == (0, 20, 3, 2)
        wire.close()
        wire = Wire(gateway.port, 1)
        async with AsyncClient(wire.url, timeout_s=20.0, pause_s=0.01) as client:
            for call in (client.predict([1]), client.actuals({"prediction_id": "a", "value": 1})):
                wire._left = 1
                with pytest.raises(GatewayUnreachableError, match="in 1 tries"):
                    await call
        wire.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_is_sent_with_each_request_and_shown_in_no_text(kind: type[Client | AsyncClient]) -> None:
    client = kind("http://127.0.0.1:1", api_key="hs_secret")
    assert client._http.headers["Authorization"] == "Bearer hs_secret"
    assert "hs_secret" not in repr(client) + str(client)
    assert "Authorization" not in kind("http://127.0.0.1:1")._http.headers


def test_a_store_that_is_away_is_waited_for(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    away = settings.model_copy(update={"online": settings.online.model_copy(update={"url": "redis://127.0.0.1:1/0"})})
    with Gateway(away) as gateway, Client(f"http://127.0.0.1:{gateway.port}", tries=3, pause_s=0.01) as client:
        waits: list[float] = []
        monkeypatch.setattr(client._waiting, "wait", waits.append)
        with pytest.raises(GatewayError, match="the online store doesn't answer") as raised:
            client.send("purchases", purchase(1, 1, "1998-06-20"))
    assert (raised.value.status, raised.value.code) == (503, "online_store_unavailable")
    assert waits == [1.0, 1.0]  # what Retry-After says


def test_the_client_loads_neither_ray_nor_arrow() -> None:
    code = "import sys, heliostat.client; print({'ray', 'pyarrow', 'numpy', 'pandas', 'redis'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


def test_the_pages_example_runs_and_says_what_it_shows(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "ingestion.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{gateway.port}"), {})  # noqa: S102 - the page
    first, values = capsys.readouterr().out.splitlines()
    assert first == "1 customer_id is missing"
    assert "1.0" in values


@pytest.mark.usefixtures("model")
def test_the_interfaces_pages_example_runs(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "interfaces.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{gateway.port}"), {})  # noqa: S102 - the page
    *predictions, models = capsys.readouterr().out.splitlines()
    assert [each.split()[0] + each.split()[-1] for each in predictions] == ["7log-odds", "8log-odds"]
    assert models == "['churn'] candidate"


def test_the_pages_settings_are_understood(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "ingestion.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "settings.yaml").write_text(block)
    kafka = load_settings([tmp_path / "settings.yaml"], environ={}, base=None).ingestion.kafka
    assert (kafka.topics, kafka.brokers) == (
        {"shop.purchases": "purchases"},
        "kafka-1.internal:9092,kafka-2.internal:9092",
    )
