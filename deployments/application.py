"""The ASGI application: routes, access control, traces, counting.

`build_app` makes it from its parts; it knows nothing of Ray, so that it can be run, and debugged, by any ASGI
server. `deployments.graph` puts it on Ray Serve.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import documentation
from deployments.access import AccessControl
from deployments.gateway import Api, Parts
from deployments.http import answer_to, header_of, install_error_handlers, path_of
from deployments.open_inference import OpenInference
from heliostat.serving.telemetry import Meter
from heliostat.tracing import CURRENT, Trace
from heliostat.tracing import HEADER as TRACE_HEADER


class Application:
    """The ASGI application: predictions answered at once, everything else by FastAPI.

    FastAPI's middlewares and dependency solving cost a prediction a tenth of its time. Its own routes of the
    same paths only document them.

    Args:
        api: Answers predictions.
        inference: Answers those of the Open Inference Protocol.
        app: Answers the rest.
        meter: Counts all of it.
    """

    def __init__(self, api: Api, inference: OpenInference, app: FastAPI, meter: Meter) -> None:
        self._api, self._inference, self._app, self._meter = api, inference, app, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = Trace.of(header_of(scope, TRACE_HEADER))
        token = CURRENT.set(trace)
        status = 500
        self._meter.in_flight += 1
        route, answering = self._prediction(scope, receive) if scope["method"] == "POST" else ("", None)
        try:
            if answering is not None:
                response = await _answered(answering)
                status = response.status_code
                response.raw_headers.append((TRACE_HEADER, trace.header))
                await response(scope, receive, send)
                return

            async def noting(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    message["headers"] = [*message.get("headers", ()), (TRACE_HEADER, trace.header)]
                await send(message)

            await self._app(scope, receive, noting)
        finally:
            self._meter.in_flight -= 1
            route = route or getattr(scope.get("route"), "path", "(unknown)")
            self._meter.answered(route, status, trace.age_ms)
            CURRENT.reset(token)

    def _prediction(self, scope: Scope, receive: Receive) -> tuple[str, Awaitable[Response] | None]:
        """The route of a prediction, and what answers it; None of any other request."""
        match path_of(scope).split("/"):
            case ["", "predict"]:
                return "/predict", self._api.answer_predict(scope, receive)
            case ["", "models", model, "predict"] if model:
                return "/models/{model}/predict", self._api.answer_predict(scope, receive, model)
            case ["", "v2", "models", name, "infer"] if name:
                return "/v2/models/{name}/infer", self._inference.answer_infer(scope, receive, name)
        return "", None


async def _answered(answering: Awaitable[Response]) -> Response:
    try:
        return await answering
    except Exception as error:  # noqa: BLE001 - whatever happens is answered
        return answer_to(error)


def build_app(parts: Parts) -> ASGIApp:
    """The application.

    Args:
        parts: What its routes work with.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await api.close()
        await parts.close()

    api = Api(parts)
    inference = OpenInference(parts, api)
    app = FastAPI(title="Heliostat", description=documentation.DESCRIPTION, version="1", lifespan=lifespan)
    documentation.add_routes(app, api, inference, parts.definitions)
    install_error_handlers(app)
    return AccessControl(Application(api, inference, app, parts.meter), app.routes, parts.keys, parts.meter)
