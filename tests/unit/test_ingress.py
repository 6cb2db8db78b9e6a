from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.http import read_body, unless_gone
from heliostat.errors import SlowBodyError
from heliostat.ingress import QuickAnswers
from heliostat.timers import Limits

ANSWER = b'{"predictions": [0.25]}'
TOLD = (
    *((path, b"told: ?1") for path in ("/predict", "/models/churn/predict", "/v2/models/churn/infer")),
    *((path, b"told: \r\n") for path in ("/events", "/models", "/v2/models/churn")),
)


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - of things that tell nobody
            await asyncio.sleep(0.001)


class Connection(asyncio.Protocol):
    """A client that keeps what arrives, piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.pieces.append(data)

    def connection_lost(self, _: Exception | None) -> None:
        self.lost = True

    async def until(self, holds: Callable[[bytes], bool]) -> bytes:
        await eventually(lambda: holds(b"".join(self.pieces)))
        return b"".join(self.pieces)


@contextlib.asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[Callable[[], Awaitable[Connection]]]:
    """A real server; gives a way to connect to it."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
    running = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]

    async def connect() -> Connection:
        _, protocol = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
        return protocol

    try:
        yield connect
    finally:
        server.should_exit = True
        await running


def request(path: str = "/predict", *headers: str, body: bytes = b"{}") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: here", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def answering(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with a document, and tells in a header what it was told."""
    await receive()
    told = b", ".join(value for name, value in scope["headers"] if name == b"x-request-disconnect-disabled")
    named = b", ".join(value for name, value in scope["headers"] if name == b"x-request-id")
    headers = [(b"content-length", b"%d" % len(ANSWER)), (b"told", told), (b"named", named)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})


def test_head_and_body_of_an_answer_arrive_in_one_piece() -> None:
    async def scenario() -> None:
        async with served(QuickAnswers(answering)) as connect:
            connection = await connect()
            for _ in range(50):  # on one connection
                connection.pieces.clear()
                connection.transport.write(request())
                whole = await connection.until(lambda found: found.endswith(ANSWER))
                assert whole.startswith(b"HTTP/1.1 200")
                assert len(connection.pieces) == 1

    asyncio.run(scenario())


def test_serve_is_told_not_to_watch_predictions_and_nothing_of_other_requests() -> None:
    async def scenario() -> None:
        async with served(QuickAnswers(answering)) as connect:
            for path, told in TOLD:
                connection = await connect()
                connection.transport.write(request(path))
                assert told in await connection.until(lambda found: found.endswith(ANSWER))

    asyncio.run(scenario())


def test_a_prediction_has_a_name_of_its_own_unless_it_brings_one() -> None:
    async def scenario() -> None:
        async with served(QuickAnswers(answering)) as connect:
            connection = await connect()
            connection.transport.write(request() + request() + request("/predict", "X-Request-ID: mine"))
            whole = await connection.until(lambda found: found.count(ANSWER) == 3)
            first, second, third = re.findall(rb"named: (.*)\r\n", whole)
            assert re.fullmatch(rb"[0-9a-f]{32}", first)
            assert first != second
            assert third == b"mine"

    asyncio.run(scenario())


def test_requests_that_were_sent_ahead_are_answered_in_turn() -> None:
    async def scenario() -> None:
        async with served(QuickAnswers(answering)) as connect:
            connection = await connect()
            connection.transport.write(request() * 5)
            whole = await connection.until(lambda found: found.count(ANSWER) == 5)
            assert whole.count(b"HTTP/1.1 200") == 5

    asyncio.run(scenario())


def test_a_client_that_waits_for_100_continue_gets_it_before_the_answer() -> None:
    async def scenario() -> None:
        async with served(QuickAnswers(answering)) as connect:
            connection = await connect()
            head, body = request("/predict", "Expect: 100-continue", "Connection: close").split(b"\r\n\r\n")
            connection.transport.write(head + b"\r\n\r\n")
            assert (await connection.until(lambda found: b"\r\n\r\n" in found)).startswith(b"HTTP/1.1 100 Continue")
            connection.transport.write(body)
            await connection.until(lambda found: found.endswith(ANSWER))
            await eventually(lambda: connection.lost)

    asyncio.run(scenario())


@pytest.mark.parametrize("after_head", [False, True])
def test_an_application_that_raises_ends_its_connection(after_head: bool) -> None:
    async def raising(_: Scope, __: Receive, send: Send) -> None:
        if after_head:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        raise RuntimeError("meant")

    async def scenario() -> bytes:
        async with served(QuickAnswers(raising)) as connect:
            connection = await connect()
            connection.transport.write(request())
            await eventually(lambda: connection.lost)
            return b"".join(connection.pieces)

    assert asyncio.run(scenario()).startswith(b"HTTP/1.1 200" if after_head else b"HTTP/1.1 500")


def test_an_answer_in_parts_and_one_without_a_body_arrive_whole() -> None:
    async def in_parts(scope: Scope, _: Receive, send: Send) -> None:
        empty = dict(scope["headers"]).get(b"wants") == b"nothing"
        await send({"type": "http.response.start", "status": 204 if empty else 200, "headers": []})
        for part in () if empty else (b"one", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    async def scenario() -> None:
        async with served(QuickAnswers(in_parts)) as connect:
            connection = await connect()
            connection.transport.write(request())
            await connection.until(lambda found: found.endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"))
            connection.pieces.clear()
            connection.transport.write(request("/predict", "Wants: nothing"))
            assert (await connection.until(lambda found: b"\r\n\r\n" in found)).startswith(b"HTTP/1.1 204")

    asyncio.run(scenario())


def test_work_for_a_client_who_has_gone_is_given_up() -> None:
    ended = list[str]()

    async def working(scope: Scope, receive: Receive, _: Send) -> None:
        async def work() -> None:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

        await read_body(scope, receive, 1_000, Limits(5))
        try:
            await unless_gone(receive, work(), Limits(0.05))
        except ClientDisconnect:
            ended.append("gone")

    async def scenario() -> None:
        async with served(QuickAnswers(working)) as connect:
            connection = await connect()
            connection.transport.write(request())
            await asyncio.sleep(0.2)
            assert not ended  # it is still there
            connection.transport.abort()
            await eventually(lambda: len(ended) == 2)

    asyncio.run(scenario())
    assert ended == ["cancelled", "gone"]


def test_work_that_is_done_before_anybody_looks_is_answered_as_it_is() -> None:
    async def receive() -> dict[str, object]:
        await asyncio.sleep(3600)
        raise AssertionError

    async def scenario() -> None:
        assert await unless_gone(receive, asyncio.sleep(0.001, "quick"), Limits(60)) == "quick"
        assert await unless_gone(receive, asyncio.sleep(0.1, "watched"), Limits(0.01)) == "watched"
        with pytest.raises(ValueError, match="its own"):
            await unless_gone(receive, failing(), Limits(60))

    async def failing() -> None:
        raise ValueError("its own")

    asyncio.run(scenario())


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def receive() -> dict[str, object]:
        await asyncio.sleep(3600)
        raise AssertionError

    async def scenario() -> None:
        with pytest.raises(SlowBodyError, match=r"0\.05"):
            await read_body({"type": "http", "headers": []}, receive, 100, Limits(0.05))

    asyncio.run(scenario())
