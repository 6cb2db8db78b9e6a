"""What Serve's HTTP server does before and after an application: said by the environment, so for all of them.

For predictions, which take fractions of a millisecond, some of it costs too much:

- Serve watches each connection, to cancel the work of clients who have gone: two tasks and a queue a request. Those
  that wait longer are looked after by our application itself (`deployments.http.unless_gone`).
- uvicorn gives the system an answer's head and its body one after the other: two system calls of 25 µs each, and two
  wake-ups of the ingress. Here the head waits for the body.
- Serve names a request that brings no ``X-Request-ID``, by a UUID: 7 µs. Here it has a plain name before.

All of this falls away without a word where Serve or uvicorn are made otherwise than we know them.
"""

from __future__ import annotations

from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from heliostat.tracing import random_hex

PREDICTIONS = ("/predict", "/infer")
"""How the paths end whose ``POST`` requests are meant."""

# Serve's own header, by which a client says the same.
_UNWATCHED = (b"x-request-disconnect-disabled", b"?1")
_REQUEST_ID = b"x-request-id"
_INTERIM = b"HTTP/1.1 100"


class Unhurried:
    """A connection on which the head of an answer leaves with the beginning of its body.

    Args:
        transport: The connection.
    """

    __slots__ = ("_head", "_transport")

    def __init__(self, transport: Any) -> None:  # noqa: ANN401 - of asyncio or uvloop
        self._transport = transport
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        """Send; what comes first, which is the head, not before more comes."""
        if self._head is None and not data.startswith(_INTERIM):
            self._head = data
        elif self._head:
            self._transport.write(self._head + data)
            self._head = b""
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Close the connection when everything has been sent."""
        if self._head:
            self._transport.write(self._head)
        self._head = b""
        self._transport.close()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the transport's own
        return getattr(self._transport, name)


class QuickAnswers:
    """An application whose predictions aren't watched, and whose answers are sent at once.

    Args:
        app: Answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith(PREDICTIONS):
            added = [_UNWATCHED]
            if all(name != _REQUEST_ID for name, _ in scope["headers"]):
                added.append((_REQUEST_ID, random_hex(16).encode()))
            scope["headers"] = [*scope["headers"], *added]
            cycle: Any = getattr(send, "__self__", None)  # uvicorn's, of this request and its answer
            transport = getattr(cycle, "transport", None)
            if transport is not None:
                cycle.transport = Unhurried(transport)
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve puts around every application: see ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``."""
    return [Middleware(QuickAnswers)]
