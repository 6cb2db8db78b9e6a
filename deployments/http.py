"""What every route shares: bodies with a limit, errors as documents, and what is counted."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from heliostat.errors import BodyTooLargeError, HeliostatError, SlowBodyError
from heliostat.timers import Interruption, Limits

_logger = logging.getLogger("heliostat.gateway")

T = TypeVar("T")

JSON = "application/json"
"""What answers are."""

_JSON_TYPE = (b"content-type", JSON.encode())

RETRY_AFTER_S = 1
"""When a client that was told 503 may try again, seconds."""

RETRY_AFTER = {"Retry-After": str(RETRY_AFTER_S)}
"""The header that says so."""

_KEPT_HEADERS = ("allow", "retry-after", "www-authenticate")

_WORD = re.compile(r"(?<!^)(?=[A-Z])")


class JsonBody(Response):
    """A document that is written already, as an HTTP answer.

    Args:
        body: JSON.
    """

    def __init__(self, body: bytes) -> None:
        # Not by `Response`, which takes 6 µs to find out what these headers are.
        self.status_code, self.body, self.background = 200, body, None
        self.raw_headers = [(b"content-length", b"%d" % len(body)), _JSON_TYPE]


def json_response(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:  # noqa: ANN401 - JSON
    """A document as an HTTP answer; NaN becomes null."""
    return Response(orjson.dumps(document), status, headers, JSON)


def path_of(scope: Scope) -> str:
    """A request's path below the prefix at which the application is served."""
    path: str = scope["path"]
    root = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path


def header_of(scope: Scope, name: bytes) -> bytes | None:
    """A request's header by its name in small letters; None if it has none, the first if it has several."""
    return next((value for each, value in scope["headers"] if each == name), None)


async def read_body(scope: Scope, receive: Receive, limit_bytes: int, limits: Limits) -> bytes:
    """A request's body, given up as soon as it is larger than allowed, whatever its headers say, or late.

    Args:
        scope: The request.
        receive: Gives the body.
        limit_bytes: Allowed.
        limits: How long it may take.

    Raises:
        BodyTooLargeError: If it is larger than the limit.
        SlowBodyError: If it isn't there in time.
        ClientDisconnect: If the client has gone.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > limit_bytes:
            raise BodyTooLargeError(limit_bytes)
    try:
        return await limits.keep(_received(receive, limit_bytes))
    except TimeoutError:
        raise SlowBodyError(limits.delay_s) from None


async def _received(receive: Receive, limit_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        if size > limit_bytes:
            raise BodyTooLargeError(limit_bytes)
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def unless_gone(receive: Receive, work: Awaitable[T], limits: Limits) -> T:
    """What a request's work gives; given up when its client has gone.

    For requests that Serve doesn't watch (`heliostat.ingress`). To watch a connection costs more than most requests
    do, so that it begins when one has taken long.

    Args:
        receive: Has given the whole body.
        work: What is to be done.
        limits: How long it may take before the client is watched.

    Raises:
        ClientDisconnect: If the client has gone.
    """
    watching: asyncio.Task[None] | None = None

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        leaving.make()

    def begin() -> None:
        nonlocal watching
        watching = asyncio.create_task(watch())

    with Interruption(ClientDisconnect) as leaving:
        due = limits.call(begin)
        try:
            return await work
        finally:
            due.cancel()
            if watching is not None:
                watching.cancel()


def error_code(error: HeliostatError) -> str:
    """What clients can rely on: ``unknown_model`` for UnknownModelError."""
    return _WORD.sub("_", type(error).__name__.removesuffix("Error")).lower()


def error_document(error: HeliostatError) -> dict[str, Any]:
    """An error as clients see it: its code, what happened, and what exists or what to do."""
    document: dict[str, Any] = {"error": error_code(error), "message": error.public_text}
    if error.http_status >= 500:
        return document
    for name in ("known", "fix", "expected"):
        value = getattr(error, name, None)
        if value is not None:
            document["fix" if name == "expected" else name] = value
    return document


def answer_to(error: Exception) -> Response:
    """What a request that raised an error is answered."""
    if isinstance(error, HeliostatError):
        if error.http_status >= 500:
            _logger.warning("answered %d: %s", error.http_status, error)
        headers = RETRY_AFTER if error.http_status == 503 else None
        return json_response(error_document(error), error.http_status, headers)
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it; the meter counts it
    _logger.error("unexpected error", exc_info=error)
    message = f"unexpected {type(error).__name__}; the gateway's log has the details"
    return json_response({"error": "internal", "message": message, "fix": "report it with the log"}, 500)


def as_protocol_has_it(path: str, response: Response) -> Response:
    """An error's answer as clients of a path expect it.

    Below ``/v2``, the Open Inference Protocol, an error is a text alone, and 400 whatever is wrong with a request.
    """
    if path != "/v2" and not path.startswith("/v2/"):
        return response
    document = orjson.loads(response.body or b"{}")
    told = "; ".join(str(document[name]) for name in ("message", "fix") if document.get(name))
    kept = {name: value for name, value in response.headers.items() if name in _KEPT_HEADERS}
    return json_response({"error": told}, 400 if response.status_code == 422 else response.status_code, kept)


def install_error_handlers(app: FastAPI) -> None:
    """Let every error of an app leave as a document, also those that no route of ours raised."""

    async def raised(_: Request, error: Exception) -> Response:
        return answer_to(error)

    async def http(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
        codes = {404: "unknown_path", 405: "method_not_allowed"}
        message = f"{request.method} {request.url.path} isn't served"
        fix = "see /docs for what is"
        document = {"error": codes.get(status, f"http_{status}"), "message": message, "fix": fix}
        return as_protocol_has_it(path_of(request.scope), json_response(document, status, headers))

    async def invalid(_: Request, error: Exception) -> Response:
        first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
        place = ".".join(str(part) for part in first.get("loc", ()))
        message = f"{place or 'the request'}: {first.get('msg', 'is invalid')}"
        return json_response({"error": "invalid_field", "message": message, "fix": "see /docs"}, 422)

    app.add_exception_handler(HeliostatError, raised)
    app.add_exception_handler(ClientDisconnect, raised)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, raised)
