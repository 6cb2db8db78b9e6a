"""Who may ask what: the whole matrix over the ASGI application, and a shorter one over real HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import shlex
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import orjson
import pytest
import ray
from fastapi import APIRouter, FastAPI
from ray.serve.context import _get_global_client
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

from benchmarks.processes import replica_pid
from deployments import graph
from deployments.access import ROUTES, AccessControl
from deployments.application import build_app
from deployments.gateway import Parts
from deployments.stages import gateway_parts
from heliostat import cli
from heliostat.clock import ManualClock, SystemClock, parse_instant_us
from heliostat.errors import UnprotectedIngressError
from heliostat.serving.access import KeyRing, KnownKey, Scope
from heliostat.serving.keys import KeyBook
from heliostat.serving.telemetry import Meter
from heliostat.settings import ClockSettings, OnlineSettings, ServingSettings, Settings, load_settings
from heliostat.shell import api_key_headers
from heliostat.storage.catalog import Catalog
from heliostat.workspace import Workspace
from tests.integration.test_serving import purchase, register

Client = httpx.AsyncClient

MESSAGES = {
    "missing_key": "an API key is needed",
    "invalid_key": "the API key ",
    "missing_scope": "this needs an API key with scope ",
}
REFUSED = {
    "no key": "missing_key",
    "empty key": "missing_key",
    "basic": "missing_key",
    "unknown key": "invalid_key",
    "wrong secret": "invalid_key",
    "no key of ours": "invalid_key",
    "expired key": "invalid_key",
    "revoked key": "invalid_key",
}
SCOPES = [f"{scope} {how}" for scope in Scope for how in ("bearer", "header")]


class Guarded:
    """A project that asks for keys, with a model that serves and a key of each kind."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.meter = Meter()
        register(workspace, 1)
        workspace.rollout.serve("churn", 1, reason="the first one")
        self.book = KeyBook.of(workspace)
        self.keys = {scope.value: self.book.create(scope, [scope]).key for scope in Scope}
        long_ago = KeyBook(lambda: workspace.catalog, ManualClock(SystemClock().now_us() - 10_000_000))
        expired = long_ago.create("expired", list(Scope), lasts_us=9_000_000).key
        revoked = self.book.create("revoked", list(Scope)).key
        self.book.revoke("revoked")
        admin = self.keys["admin"]
        self.headers: dict[str, dict[str, str]] = {
            "no key": {},
            "empty key": {"X-API-Key": ""},
            "basic": {"Authorization": f"Basic {admin}"},
            "unknown key": {"Authorization": f"Bearer hsk_{'0' * 12}_{'x' * 43}"},
            "wrong secret": {"X-API-Key": admin[:-1] + ("a" if admin[-1] != "a" else "b")},
            "no key of ours": {"Authorization": "Bearer admin"},
            "expired key": {"Authorization": f"Bearer {expired}"},
            "revoked key": {"X-API-Key": revoked},
        }
        for scope, key in self.keys.items():
            self.headers[f"{scope} bearer"] = {"Authorization": f"bearer {key}"}
            self.headers[f"{scope} header"] = {"X-API-Key": key}

    def run(
        self,
        scenario: Callable[[Client], Awaitable[None]],
        *,
        change: Callable[[Parts], Parts] = lambda parts: parts,
        peer: tuple[str, int] = ("192.0.2.7", 5_000),
        online: OnlineSettings | None = None,
        **serving: object,
    ) -> None:
        """Send requests, from another machine, to a gateway with some serving settings changed."""
        told = self.workspace.settings
        changed = {"serving": told.serving.model_copy(update=serving), "online": online or told.online}
        mine = told.model_copy(update=changed)

        async def main() -> None:
            parts = gateway_parts(Workspace.open(mine), self.meter)
            app = build_app(change(parts))
            transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=peer)
            async with Client(transport=transport, base_url="http://gateway") as client:
                await scenario(client)
            await parts.close()

        asyncio.run(main())


@pytest.fixture(scope="module")
def guarded(session_home: Path, valkey: str) -> Iterator[Guarded]:
    settings = Settings(
        project="guarded",
        home=session_home / "guarded",
        online=OnlineSettings(url=valkey, timeout_s=10.0),
        clock=ClockSettings(kind="replay", replay_from="1998-07-01", speed=0.0),
        serving=ServingSettings(host="0.0.0.0", port=0, access="keys", deadline_ms=20_000.0),  # noqa: S104 - meant
    )
    with Workspace.open(settings) as workspace:
        yield Guarded(workspace)


# ── The matrix ──────────────────────────────────────────────────────────────────────

_VALUES = {"model": "churn", "name": "churn", "version": "1", "view": "recent_purchases", "entity": "7"}


def _path(declared: str) -> str:
    return re.sub(r"\{(\w+)(?::\w+)?\}", lambda found: _VALUES[found[1]], declared)


def _example(document: dict[str, Any], declared: str) -> dict[str, Any] | None:
    """The body that the documentation shows."""
    method, path = declared.split(" ")
    route = document["paths"].get(re.sub(r":\w+\}", "}", path), {}).get(method.lower(), {})
    content = route.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return None
    found = content.get("example", content.get("schema", {}).get("example"))
    if found is None and content.get("examples"):
        found = next(iter(content["examples"].values()))["value"]
    return found or {}


def _message(reply: httpx.Response, code: str) -> str:
    """What a refusal says; the Open Inference Protocol has no place for the code."""
    if reply.request.url.path.startswith("/v2"):
        assert set(reply.json()) == {"error"}
        return str(reply.json()["error"])
    assert (set(reply.json()), reply.json()["error"]) == ({"error", "message"}, code)
    return str(reply.json()["message"])


Answers = dict[tuple[str, str], httpx.Response]


@pytest.fixture(scope="module")
def answers(guarded: Guarded) -> Answers:
    """What every route answered to every kind of caller."""
    found: Answers = {}

    async def scenario(client: Client) -> None:
        document = (await client.get("/openapi.json", headers=guarded.headers["read bearer"])).json()
        for declared in ROUTES:
            method, path = declared.split(" ")
            for who, headers in guarded.headers.items():
                body = _example(document, declared)
                found[declared, who] = await client.request(method, _path(path), json=body, headers=headers)

    guarded.run(scenario)
    return found


def test_every_route_of_the_application_has_a_declared_scope_and_every_declaration_a_route(guarded: Guarded) -> None:
    seen: set[str] = set()

    def look(parts: Parts) -> Parts:
        app = build_app(parts)
        assert isinstance(app, AccessControl)
        seen.update(f"{method} {route.path}" for route in app.routes for method in route.methods if method != "HEAD")
        return parts

    async def scenario(client: Client) -> None:
        assert (await client.get("/healthz")).status_code == 200

    guarded.run(scenario, change=look)
    assert seen == set(ROUTES)


def test_an_application_with_a_route_without_a_scope_isnt_built() -> None:
    async def answer() -> None: ...

    app = FastAPI()
    app.add_api_route("/new", answer, methods=["DELETE"])
    with pytest.raises(RuntimeError, match=r"'DELETE /new' has no scope.*ROUTES"):
        AccessControl(app, app.routes, None, Meter())
    mounted = FastAPI(openapi_url=None)
    mounted.mount("/healthz", FastAPI())
    with pytest.raises(RuntimeError, match="no plain route"):
        AccessControl(mounted, mounted.routes, None, Meter())
    sockets = FastAPI(openapi_url=None)
    router = APIRouter()
    router.add_api_websocket_route("/healthz", answer)
    sockets.include_router(router)
    with pytest.raises(RuntimeError, match="no plain route"):
        AccessControl(sockets, sockets.routes, None, Meter())


def test_only_probes_are_open_and_what_changes_something_needs_more_than_read() -> None:
    opened = {declared.partition(" ")[2] for declared, needed in ROUTES.items() if needed is None}
    assert {"/healthz", "/readyz"} <= opened <= {"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}
    for declared, needed in ROUTES.items():
        if not declared.startswith("GET "):
            assert needed in (Scope.PREDICT, Scope.INGEST, Scope.ADMIN), declared
    assert ROUTES["POST /events"] == ROUTES["POST /actuals"] == Scope.INGEST
    assert ROUTES["GET /features/{view}/{entity:path}"] == Scope.READ


@pytest.mark.parametrize("who", REFUSED)
@pytest.mark.parametrize("declared", ROUTES)
def test_without_a_key_that_works_nothing_but_probes_is_answered(answers: Answers, declared: str, who: str) -> None:
    reply = answers[declared, who]
    if ROUTES[declared] is None:
        assert reply.status_code == 200
        return
    assert reply.status_code == 401
    assert _message(reply, REFUSED[who]).startswith(MESSAGES[REFUSED[who]])
    assert reply.headers["www-authenticate"].startswith('Bearer realm="heliostat"')


@pytest.mark.parametrize("who", SCOPES)
@pytest.mark.parametrize("declared", ROUTES)
def test_a_key_opens_the_routes_of_its_scopes_and_no_others(answers: Answers, declared: str, who: str) -> None:
    reply, needed = answers[declared, who], ROUTES[declared]
    scope = who.partition(" ")[0]
    if needed is None or scope in (needed, Scope.ADMIN):
        assert reply.status_code in (200, 404, 422), reply.text  # the examples' instants aren't in 1998
        return
    assert reply.status_code == 403
    assert _message(reply, "missing_scope").startswith(MESSAGES["missing_scope"] + needed)
    others = set(Scope) - {needed}
    assert not any(re.search(rf"\b{each}\b", reply.text) for each in others), (
        "it names what is needed and nothing else"
    )
    assert f'scope="{needed}"' in reply.headers["www-authenticate"]


def test_refusals_are_counted_by_route(answers: Answers, guarded: Guarded) -> None:
    assert answers
    for route, status in (("/predict", 401), ("/predict", 403), ("/events", 401), ("/predict", 200)):
        assert guarded.meter.board.value("heliostat_requests_total", route, status)


# ── What there is no path to ────────────────────────────────────────────────────────

ELSEWHERE = [
    "/nope",
    "/models/churn",
    "/predict/",
    "/PREDICT",
    "//predict",
    "/healthz/x",
    "/",
    "/-/x",
    "/metrics",
    "/v2/x",
]


def test_without_a_key_a_path_that_isnt_served_looks_like_one_that_is(guarded: Guarded) -> None:
    async def scenario(client: Client) -> None:
        served = {v2: await client.get("/v2" if v2 else "/models") for v2 in (False, True)}
        made_up = ["/models/churn/99", "/models/nope/1", "/features/nope/1", "/v2/models/nope", "/v2/health/x"]
        for path in [*ELSEWHERE, *made_up]:
            expected = served[path.startswith("/v2")]
            for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"):
                reply = await client.request(method, path)
                assert reply.status_code == 401, (method, path)
                assert dict(reply.headers) == dict(expected.headers)
                assert method == "HEAD" or reply.content == expected.content, (method, path)
        for path in ELSEWHERE:
            reply = await client.get(path, headers=guarded.headers["ingest bearer"])
            assert reply.status_code in (307, 404, 405), path
        reply = await client.get("/predict", headers=guarded.headers["read bearer"])
        assert reply.status_code == 405

    guarded.run(scenario)
    assert guarded.meter.board.value("heliostat_requests_total", "(unknown)", 401)


def test_below_another_root_path_the_same_holds(guarded: Guarded) -> None:
    async def main() -> None:
        parts = gateway_parts(Workspace.open(guarded.workspace.settings), guarded.meter)
        transport = httpx.ASGITransport(build_app(parts), root_path="/churn", client=("192.0.2.7", 1))
        async with Client(transport=transport, base_url="http://gateway/churn") as client:
            assert (await client.get("/healthz")).status_code == 200
            asked = {"entity_ids": [1]}
            for who, status in {"no key": 401, "read bearer": 403, "predict bearer": 200}.items():
                reply = await client.post("/predict", json=asked, headers=guarded.headers[who])
                assert reply.status_code == status, (who, reply.text)
            refused = await client.post("/v2/models/churn/infer", json={}, headers=guarded.headers["no key"])
            assert (refused.status_code, set(refused.json())) == (401, {"error"})
        await parts.close()

    asyncio.run(main())


def test_no_websocket_is_opened(guarded: Guarded) -> None:
    async def main() -> None:
        parts = gateway_parts(Workspace.open(guarded.workspace.settings), guarded.meter)
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        headers = [(b"x-api-key", guarded.keys["admin"].encode())]
        await build_app(parts)({"type": "websocket", "path": "/predict", "headers": headers}, receive, send)
        assert sent == [{"type": "websocket.close", "code": 1008}]
        await parts.close()

    asyncio.run(main())


def test_a_refused_request_changes_nothing_and_its_body_isnt_read(guarded: Guarded) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b'{"source": "purchases", "events": []}'

    async def scenario(client: Client) -> None:
        events = {"source": "purchases", "events": [purchase(900, 77, "1998-06-20")]}
        for who in ("no key", "read bearer", "predict bearer", "expired key"):
            reply = await client.post("/events", json=events, headers=guarded.headers[who])
            assert reply.status_code in (401, 403)
            await client.post("/events", content=body(), headers=guarded.headers[who])
        features = await client.get("/features/recent_purchases/77", headers=guarded.headers["read header"])
        assert features.json()["absent"] is True
        reply = await client.post("/events", json=events, headers=guarded.headers["ingest bearer"])
        assert (reply.status_code, reply.json()["accepted"]) == (200, 1)

    guarded.run(scenario)
    assert read == 0


NOWHERE = OnlineSettings(url="redis://:s3cret@127.0.0.1:1/0", timeout_s=0.3)


def test_what_isnt_ready_is_told_to_those_who_may_read(guarded: Guarded) -> None:
    async def scenario(client: Client) -> None:
        told = (await client.get("/readyz", headers=guarded.headers["read bearer"])).json()
        assert set(told["problems"]) == {"online_store"}
        for who in ("no key", "revoked key", "ingest bearer"):
            reply = await client.get("/readyz", headers=guarded.headers[who])
            assert (reply.status_code, reply.json()) == (503, {"status": "not ready"}), who

    guarded.run(scenario, online=NOWHERE)


# ── Time ────────────────────────────────────────────────────────────────────────────


def test_a_revoked_key_stops_within_the_bound_and_a_new_one_works_within_it(guarded: Guarded) -> None:
    async def scenario(client: Client) -> None:
        assert (await client.get("/models", headers=guarded.headers["read bearer"])).status_code == 200
        headers = {"X-API-Key": guarded.book.create("brief", ["read"]).key}
        await asyncio.sleep(0.6)
        assert (await client.get("/models", headers=headers)).status_code == 200
        guarded.book.revoke("brief")
        begin, seen = time.monotonic(), []
        while time.monotonic() < begin + 0.6:
            asked = time.monotonic()
            seen.append((asked - begin, (await client.get("/models", headers=headers)).status_code))
            await asyncio.sleep(0.01)
        assert {status for _, status in seen} <= {200, 401}
        assert next(status for at_s, status in seen if at_s >= 0.5) == 401
        assert (await client.get("/models", headers=headers)).json()["message"].startswith("the API key was revoked")

    guarded.run(scenario, keys_within_s=0.5)


def test_while_the_catalog_is_away_known_keys_work_on_for_as_long_as_is_said(guarded: Guarded) -> None:
    async def scenario(client: Client) -> None:
        asked, headers = {"entity_ids": [1]}, guarded.headers["predict bearer"]
        assert (await client.post("/predict", json=asked, headers=headers)).status_code == 200
        begin = time.monotonic()
        catalog, hidden = home / "catalog.db", home / "hidden"
        hidden.mkdir()
        for each in home.glob("catalog.db*"):
            each.rename(hidden / each.name)
        catalog.mkdir()  # and so can't be opened
        try:
            while (reply := await client.post("/predict", json=asked, headers=headers)).status_code == 200:
                assert time.monotonic() < begin + 3.0
                await asyncio.sleep(0.05)
            assert time.monotonic() > begin + 1.0
            assert (reply.status_code, reply.json()["error"]) == (503, "keys_unavailable")
            assert reply.headers["retry-after"] == "1"
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/nope")).status_code == 401
        finally:
            catalog.rmdir()
            for each in hidden.iterdir():
                each.rename(home / each.name)
            hidden.rmdir()
        limit = time.monotonic() + 10.0
        while (await client.post("/predict", json=asked, headers=headers)).status_code != 200:
            assert time.monotonic() < limit
            await asyncio.sleep(0.1)

    def load() -> tuple[KnownKey, ...]:
        with Catalog.open(guarded.workspace.settings.catalog_url) as catalog:  # an open file can't be taken away
            return KeyBook(lambda: catalog, SystemClock()).known()

    def forgetful(parts: Parts) -> Parts:
        return dataclasses.replace(parts, keys=KeyRing(load, SystemClock(), within_s=0.2, hold_s=1.2))

    home = guarded.workspace.settings.home
    guarded.run(scenario, change=forgetful)


def test_a_check_costs_a_small_part_of_a_request(guarded: Guarded) -> None:
    """The bound is 0.05 ms; what it takes is said in docs/operations.md."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        pass

    async def main() -> None:
        parts = gateway_parts(Workspace.open(guarded.workspace.settings), guarded.meter)
        served = build_app(parts)
        assert isinstance(served, AccessControl)
        control = AccessControl(answer, served.routes, parts.keys, guarded.meter)
        headers = [(b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json"), (b"content-length", b"20")]
        headers += [(b"accept", b"*/*"), (b"user-agent", b"python"), (b"x-request-id", b"a" * 36)]
        headers += [(b"authorization", b"Bearer " + guarded.keys["predict"].encode())]
        scope = {"type": "http", "method": "POST", "path": "/models/churn/predict", "headers": headers}
        await control(scope, None, None)  # type: ignore[arg-type] # neither is used
        taken = []
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(2_000):
                await control(scope, None, None)  # type: ignore[arg-type] # as above
            taken.append((time.perf_counter() - begin) / 2_000)
        assert min(taken) < 50e-6, f"{min(taken) * 1e6:.1f} us"
        await parts.close()

    asyncio.run(main())


# ── Without keys ────────────────────────────────────────────────────────────────────


def test_without_keys_the_machines_own_requests_are_answered_and_may_everything(guarded: Guarded) -> None:
    async def scenario(client: Client) -> None:
        for headers in (
            {},
            {"Host": "127.0.0.1:8000"},
            {"Host": "[::1]:8000"},
            {"Host": "localhost", "Origin": "http://localhost:3000"},
            {"Host": "192.0.2.2:8000", "X-API-Key": "whatever"},
        ):
            assert (await client.get("/models", headers=headers)).status_code == 200, headers
        assert (await client.get("/docs")).status_code == 200

    guarded.run(scenario, access="loopback", peer=("127.0.0.1", 5_000))
    guarded.run(scenario, access="loopback", peer=("::ffff:127.0.0.1", 5_000))


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:8000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost.evil.example"},
    ],
)
def test_without_keys_a_page_in_the_machines_browser_isnt_answered(guarded: Guarded, headers: dict[str, str]) -> None:
    async def scenario(client: Client) -> None:
        for path in ("/models", "/nope", "/docs"):
            reply = await client.get(path, headers=headers)
            assert (reply.status_code, reply.json()["error"]) == (403, "not_local")
        events = {"source": "purchases", "events": [purchase(901, 78, "1998-06-20")]}
        assert (await client.post("/events", json=events, headers=headers)).status_code == 403
        assert (await client.get("/features/recent_purchases/78")).json()["absent"] is True

    guarded.run(scenario, access="loopback", peer=("127.0.0.1", 5_000))


@pytest.mark.parametrize("peer", ["192.0.2.7", "fd00::7", "10.0.0.1", ""])
def test_without_keys_other_machines_arent_answered_whatever_they_say(guarded: Guarded, peer: str) -> None:
    async def scenario(client: Client) -> None:
        headers = {"X-Forwarded-For": "127.0.0.1", **guarded.headers["admin bearer"]}
        reply = await client.get("/models", headers=headers)
        assert (reply.status_code, reply.json()["error"]) == (403, "not_local")
        assert "serving.access to keys" in reply.json()["message"]
        assert (await client.get("/healthz")).status_code == 200

    guarded.run(scenario, access="loopback", peer=(peer, 5_000))


# ── What gets out ───────────────────────────────────────────────────────────────────


class _Broken:
    """Whatever it is asked for, it fails, with a text that mustn't get out."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name} in /srv/secret/place.py with redis://:s3cret@host")

    def __call__(self, *_: object) -> Any:
        raise RuntimeError("in /srv/secret/place.py with redis://:s3cret@host")


def test_an_internal_error_tells_no_trace_no_path_and_no_text_of_its_own(guarded: Guarded, answers: Answers) -> None:
    failed: list[str] = []

    def broken(parts: Parts) -> Parts:
        everything = ("predictor", "readers", "store", "streams", "intake", "models", "metadata", "route", "clock")
        return dataclasses.replace(parts, **dict.fromkeys(everything, _Broken()))

    async def scenario(client: Client) -> None:
        for declared in ROUTES:
            method, path = declared.split(" ")
            body = orjson.loads(answers[declared, "admin bearer"].request.content or b"null")
            reply = await client.request(method, _path(path), json=body, headers=guarded.headers["admin bearer"])
            if reply.status_code == 500:
                failed.append(declared)
                for telling in ("Traceback", "/", ".py", "secret", "s3cret", "line "):
                    assert telling not in reply.text, (declared, reply.text)

    guarded.run(scenario, change=broken)
    assert len(failed) >= 7, failed


def test_a_store_that_is_away_tells_no_address_and_no_folder(guarded: Guarded, answers: Answers) -> None:
    home = str(guarded.workspace.settings.home)
    seen: set[int] = set()

    async def scenario(client: Client) -> None:
        for declared in ROUTES:
            method, path = declared.split(" ")
            body = orjson.loads(answers[declared, "admin bearer"].request.content or b"null")
            reply = await client.request(method, _path(path), json=body, headers=guarded.headers["admin bearer"])
            seen.add(reply.status_code)
            for telling in ("s3cret", "127.0.0.1", "redis://", home, "sqlite"):
                assert telling not in reply.text, (declared, reply.text)

    guarded.run(scenario, online=NOWHERE)
    assert 503 in seen
    version = guarded.workspace.models.get("churn", 1)
    folder = guarded.workspace.settings.home / "data" / "artifacts" / version.artifact
    folder.rename(folder.with_name("gone"))
    try:
        guarded.run(scenario)
    finally:
        folder.with_name("gone").rename(folder)


def test_no_log_record_holds_a_key(guarded: Guarded) -> None:
    records: list[logging.LogRecord] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler, loggers = Keeping(), [logging.getLogger(name) for name in ("", "heliostat")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(logging.DEBUG)

    async def scenario(client: Client) -> None:
        for headers in guarded.headers.values():
            for path in ("/models", "/nope", "/features/recent_purchases/7"):
                await client.get(path, headers=headers)
            await client.post("/predict", json={"entity_ids": [1]}, headers=headers)

    try:
        guarded.run(scenario, online=NOWHERE)
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.removeHandler(handler)
            each.setLevel(level)
    said = "\n".join(logging.Formatter().format(each) for each in records)
    assert "answered 503" in said
    for headers in guarded.headers.values():
        for value in headers.values():
            secret = value.split("_", 2)[-1]
            assert len(secret) < 40 or secret not in said


@pytest.mark.parametrize("declared", [each for each in ROUTES if each.startswith("POST ")])
def test_every_route_that_takes_a_body_has_its_limit_in_one_piece_and_in_chunks(
    guarded: Guarded, declared: str
) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1_000):
            sent += 500
            yield b" " * 500

    async def scenario(client: Client) -> None:
        path, headers = _path(declared.partition(" ")[2]), guarded.headers["admin bearer"]
        for content in (b" " * 2_001, endless()):
            reply = await client.post(path, content=content, headers=headers)
            assert (reply.status_code, "2000 bytes" in reply.text) == (413, True), reply.text

    guarded.run(scenario, max_body_bytes=2_000)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/predict", {"entity_ids": [1, 2, 3]}, 422),
        ("/models/churn/predict", {"entity_ids": [1, 2, 3]}, 422),
        ("/actuals", {"actuals": [{"prediction_id": "a-0", "value": 1}] * 3}, 422),
    ],
)
def test_every_route_that_takes_a_batch_has_its_limit(
    guarded: Guarded, path: str, body: dict[str, Any], status: int
) -> None:
    async def scenario(client: Client) -> None:
        reply = await client.post(path, json=body, headers=guarded.headers["admin bearer"])
        assert (reply.status_code, "2" in reply.json()["message"]) == (status, True), reply.text

    guarded.run(scenario, max_entities_per_request=2)


# ── On Ray Serve ────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Deployed:
    """Where a graph answers: its ingress on loopback, and its replica's own port on the machine's address."""

    ingress: str
    replica: str


@pytest.fixture(scope="module")
def deployed(guarded: Guarded, ray_local: None) -> Iterator[Deployed]:  # noqa: ARG001 - it must run
    settings = guarded.workspace.settings
    serving = settings.serving.model_copy(update={"keys_within_s": 1.0})
    with pytest.MonkeyPatch.context() as patch:
        # Other ingresses of this machine have the usual ports.
        patch.setattr(graph, "_LOOPBACK", (*graph._LOOPBACK, serving.host))
        ingress = graph.deploy(settings.model_copy(update={"serving": serving}))
    groups = ray.get(_get_global_client()._controller.get_target_groups.remote(from_proxy_manager=True))
    (target,) = [each for group in groups for each in group.targets]
    yield Deployed(ingress, f"http://{ray.util.get_node_ip_address()}:{target.port}")
    graph.undeploy()


def test_on_serve_the_replicas_own_port_is_reached_from_outside_and_asks_for_keys_as_the_ingress_does(
    guarded: Guarded, deployed: Deployed
) -> None:
    assert not deployed.replica.startswith("http://127.")
    routes: list[tuple[str, str, Any, Scope | None]] = [
        ("POST", "/predict", {"entity_ids": [1]}, Scope.PREDICT),
        ("POST", "/models/churn/predict", {"entity_ids": [1]}, Scope.PREDICT),
        ("POST", "/events", {"source": "purchases", "events": [purchase(902, 79, "1998-06-20")]}, Scope.INGEST),
        ("GET", "/models", None, Scope.READ),
        ("GET", "/features/recent_purchases/7", None, Scope.READ),
        ("GET", "/openapi.json", None, Scope.READ),
        ("GET", "/healthz", None, None),
    ]
    for base in (deployed.ingress, deployed.replica):
        with httpx.Client(base_url=base, timeout=20) as client:
            for method, path, body, needed in routes:
                for who, headers in guarded.headers.items():
                    reply = client.request(method, path, json=body, headers=headers)
                    expected = 401 if who in REFUSED else 403
                    if needed is None or who.partition(" ")[0] in (needed, Scope.ADMIN):
                        expected = 200
                    assert reply.status_code == expected, (base, method, path, who, reply.text)
            unknown = client.get("/nope")
            assert (unknown.status_code, unknown.json()["error"]) == (401, "missing_key")
            forged = client.get("/models", headers={"X-Forwarded-For": "127.0.0.1", "Host": "localhost"})
            assert forged.status_code == 401


def test_on_serve_what_else_a_replica_listens_on_wants_rays_token(deployed: Deployed) -> None:
    """Serve's stages talk to each other by gRPC, in pickles, on a port of every replica on all interfaces."""
    pid = replica_pid()
    inodes = {str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    listening = [line[1].rpartition(":") for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes]
    everywhere = {int(port, 16) for address, _, port in listening if not int(address, 16)}
    own = int(deployed.replica.rpartition(":")[2])
    assert own in everywhere
    codes = []
    for port in everywhere - {own}:
        with grpc.insecure_channel(f"{ray.util.get_node_ip_address()}:{port}") as channel:
            call = ASGIServiceStub(channel).HandleRequest
            for told in ((), (("authorization", "Bearer wrong"),)):
                with pytest.raises(grpc.RpcError) as refused:
                    call(ASGIRequest(pickled_request_metadata=b"not a pickle"), metadata=told, timeout=10)
                codes.append(refused.value.code())
    # The other port is the one of Ray's core, which has no such service.
    assert set(codes) <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}
    assert codes.count(grpc.StatusCode.UNAUTHENTICATED) == 2


def test_on_serve_a_revoked_key_stops_within_the_bound(guarded: Guarded, deployed: Deployed) -> None:
    headers = {"X-API-Key": guarded.book.create("brief-on-serve", ["read"]).key}
    with httpx.Client(base_url=deployed.replica, timeout=20) as client:
        time.sleep(1.0)
        assert client.get("/models", headers=headers).status_code == 200
        guarded.book.revoke("brief-on-serve")
        time.sleep(1.0)
        assert client.get("/models", headers=headers).status_code == 401


def test_on_serve_no_log_file_holds_a_key(guarded: Guarded, deployed: Deployed) -> None:
    secrets = [value.split("_", 2)[-1].encode() for each in guarded.headers.values() for value in each.values()]
    secrets = [each for each in secrets if len(each) > 40]
    with httpx.Client(base_url=deployed.replica, timeout=20) as client:
        for headers in guarded.headers.values():
            client.post("/predict", content=b"{not json", headers=headers)
            client.get("/nope", headers=headers)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    files = [each for each in logs.rglob("*") if each.is_file()]
    assert any("serve" in str(each) and "Gateway" in each.name for each in files)
    for file in files:
        content = file.read_bytes()
        assert not any(secret in content for secret in secrets), file


def test_a_running_serve_that_others_reach_gets_no_graph_without_keys(guarded: Guarded, deployed: Deployed) -> None:
    assert deployed
    settings = guarded.workspace.settings
    open_to_all = settings.model_copy(
        update={"serving": settings.serving.model_copy(update={"access": "loopback", "host": "127.0.0.1"})}
    )
    with pytest.raises(UnprotectedIngressError, match=r"the running Ray Serve listens on '0\.0\.0\.0'"):
        graph.deploy(open_to_all)


def test_an_ingress_that_others_would_reach_isnt_opened_without_keys(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = guarded.workspace.settings
    open_to_all = settings.model_copy(update={"serving": settings.serving.model_copy(update={"access": "loopback"})})
    with pytest.raises(UnprotectedIngressError, match=r"(?i)set serving\.access to keys"):
        graph.deploy(open_to_all)
    for name, value in open_to_all.environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnprotectedIngressError, match="heliostat keys create"):
        graph.build(graph.GraphArguments())


# ── The command line ────────────────────────────────────────────────────────────────


def test_keys_are_made_shown_once_listed_and_revoked(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)

    def heliostat(command: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["heliostat", *shlex.split(command)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(str(ended.value.code)), said.out, said.err

    code, key, told = heliostat("keys create shop --scope predict --scope read --expires 90d")
    assert (code, bool(re.fullmatch(r"hsk_[0-9a-f]{12}_[\w-]{43}\n", key))) == (0, True)
    assert "isn't shown again" in told
    code, out, _ = heliostat("keys list --json")
    (listed,) = orjson.loads(out)
    assert (listed["name"], listed["state"], listed["scopes"]) == ("shop", "works", ["predict", "read"])
    assert listed["last_four"] == key.strip()[-4:]
    days = parse_instant_us(listed["expires"]) - parse_instant_us(listed["created"])
    assert days == 90 * 86_400_000_000
    assert abs(parse_instant_us(listed["created"]) - SystemClock().now_us()) < 60_000_000, "not in 1998"
    _, table, _ = heliostat("keys list")
    catalog = b"".join(each.read_bytes() for each in settings.home.glob("catalog.db*"))
    for place in (out, table, catalog.decode("latin-1")):
        assert key.strip() not in place
        assert key.strip().split("_", 2)[2] not in place
    code, _, told = heliostat("keys create shop --scope read")
    assert (code, "works already" in told) == (5, True)
    code, _, told = heliostat("keys create other --scope everything")
    assert (code, "read, predict, ingest, admin" in told) == (3, True)
    assert heliostat("keys revoke shop")[0] == 0
    assert orjson.loads(heliostat("keys list --json")[1])[0]["state"] == "revoked"
    code, _, told = heliostat("keys revoke shop")
    assert (code, "no API key 'shop'" in told) == (4, True)


def test_the_command_lines_own_key_is_no_setting(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_API_KEY", "hsk_0_secret")
    loaded = load_settings(environ={"HELIOSTAT_API_KEY": "hsk_0_secret"}, home=settings.home)
    assert "secret" not in repr(loaded) + repr(loaded.environment())
    assert api_key_headers() == {"Authorization": "Bearer hsk_0_secret"}
    monkeypatch.delenv("HELIOSTAT_API_KEY")
    assert api_key_headers() == {}
