"""The Open Inference Protocol, version 2, over the gateway: what stock clients of other model servers speak.

Predictions go the same way as those of ``POST /predict``. Errors are ``{"error": TEXT}``, as the protocol has
them. What tensors mean: `heliostat.serving.open_inference`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope

from deployments.access import forced_variant
from deployments.gateway import Api, Parts
from deployments.http import RETRY_AFTER, JsonBody, answer_to, as_protocol_has_it, header_of, json_response
from heliostat.errors import (
    HeliostatError,
    InvalidFieldError,
    UnknownAliasError,
    UnknownVersionError,
    VersionNotServingError,
)
from heliostat.models.definitions import ModelSpec
from heliostat.models.registry import PRODUCTION
from heliostat.serving.open_inference import (
    HEADER_LENGTH,
    infer_body,
    model_document,
    parse_infer,
    server_document,
)

PREFIX = "/v2"

_BYTES = "application/octet-stream"

Endpoint = Callable[..., Awaitable[Response]]


def _answered(endpoint: Endpoint) -> Endpoint:
    """Lets an endpoint's errors leave as the protocol has them."""

    @functools.wraps(endpoint)
    async def answer(*args: Any, **named: Any) -> Response:  # noqa: ANN401 - the endpoint's own
        try:
            return await endpoint(*args, **named)
        except Exception as error:  # noqa: BLE001 - whatever happens is answered
            return as_protocol_has_it(PREFIX, answer_to(error))

    return answer


class OpenInference:
    """What the protocol's routes do.

    Args:
        parts: What the gateway works with.
        api: Does what other routes do as well: bodies, predictions, readiness.
    """

    def __init__(self, parts: Parts, api: Api) -> None:
        self._parts, self._api = parts, api
        self._server = server_document(importlib.metadata.version("heliostat"))

    async def server(self) -> Response:
        """What the server is, and which extensions it speaks."""
        return json_response(self._server)

    async def live(self) -> Response:
        """Whether the process runs."""
        return json_response({"live": True})

    async def ready(self) -> Response:
        """Whether all models can be asked."""
        problems = await self._api.problems()
        return json_response({"ready": not problems}, 503 if problems else 200, RETRY_AFTER if problems else None)

    @_answered
    async def model(self, name: str) -> Response:
        """A model's tensors, and the versions of it that serve."""
        return await self._describe(name, None)

    @_answered
    async def model_version(self, name: str, version: str) -> Response:
        """The same of a model of which this version serves."""
        return await self._describe(name, version)

    async def _describe(self, name: str, version: str | None) -> Response:
        spec = self._parts.definitions.model(name)
        versions = await self._serving(spec, version)
        return json_response(model_document(spec, versions, sorted(self._api.overridable_of(spec))))

    @_answered
    async def model_ready(self, name: str) -> Response:
        """Whether a model can be asked."""
        return await self._model_ready(name, None)

    @_answered
    async def model_version_ready(self, name: str, version: str) -> Response:
        """Whether a version of a model serves and can be asked."""
        return await self._model_ready(name, version)

    async def _model_ready(self, name: str, version: str | None) -> Response:
        spec = self._parts.definitions.model(name)
        try:
            await self._serving(spec, version)
            await self._parts.predictor.warm_up(spec.name)
        except (UnknownVersionError, VersionNotServingError):
            raise
        except HeliostatError:
            return json_response({"name": spec.name, "ready": False}, 503)
        return json_response({"name": spec.name, "ready": True})

    async def infer(self, request: Request, name: str) -> Response:
        """Predictions for the entities of a tensor."""
        return await self.answer_infer(request.scope, request.receive, name)

    async def infer_version(self, request: Request, name: str, version: str) -> Response:
        """The same, if this version is the one that answers everybody."""
        return await self.answer_infer(request.scope, request.receive, name, version)

    @_answered
    async def answer_infer(self, scope: Scope, receive: Receive, name: str, version: str | None = None) -> Response:
        """As `infer`, for whoever has no request object."""
        spec = self._parts.definitions.model(name)
        if version is not None:
            serving = tuple(str(each) for each in await self._serving(spec, version))
            if serving != (version,):
                raise VersionNotServingError(spec.name, version, serving)
        encoding = header_of(scope, b"content-encoding")
        if encoding not in (None, b"identity"):
            told = f"is {encoding.decode('latin-1')!r}"
            raise InvalidFieldError("header 'Content-Encoding'", told, "a body that isn't compressed")
        body = await self._api.body(scope, receive)
        asked = parse_infer(body, _header_length(scope), spec)
        answer = await self._api.predictions(receive, asked.body, spec.name, forced_variant(scope))
        others = {str(each) for each in answer.predictions.versions} - {version}
        if version is not None and others:  # promoted meanwhile, or a fallback: not what was asked for
            raise VersionNotServingError(spec.name, version, tuple(sorted(others)))
        body, header_length = infer_body(answer, asked)
        if header_length is None:
            return JsonBody(body)
        return Response(body, 200, {HEADER_LENGTH: str(header_length)}, _BYTES)

    async def _serving(self, spec: ModelSpec, version: str | None) -> tuple[int, ...]:
        """The versions that serve.

        Raises:
            UnknownAliasError: If none does.
            UnknownVersionError: If the given one isn't there.
            VersionNotServingError: If it doesn't serve.
        """
        route = await asyncio.to_thread(self._parts.route, spec.name)
        if route is None:
            raise UnknownAliasError(spec.name, PRODUCTION, ())
        versions = tuple(
            sorted({each.version for each in route.variants if each.weight > 0 or each is route.control})
        )
        if version is not None and version not in map(str, versions):
            if not (version.isascii() and version.isdecimal()):
                raise UnknownVersionError(spec.name, version, tuple(map(str, versions)))
            await asyncio.to_thread(self._parts.models.get, spec.name, int(version))
            raise VersionNotServingError(spec.name, version, tuple(map(str, versions)))
        return versions


def _header_length(scope: Scope) -> int | None:
    found = header_of(scope, HEADER_LENGTH.lower().encode())
    if found is None:
        return None
    text = found.decode("latin-1")
    if not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise InvalidFieldError(f"header {HEADER_LENGTH!r}", f"is {text!r}", "a number of bytes")
    return int(text)
